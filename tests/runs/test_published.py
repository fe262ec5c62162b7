"""Every published pre-training recipe, its encoder small, on files of the official layouts and regions with all that
its losses tell."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visling import models
from visling.errors import StoreError
from visling.recipes.configs import PretrainConfig
from visling.recipes.tables import PUBLISHED_PRETRAINING
from visling.regions.writer import StoreWriter
from visling.runs.pretrain import pretrain
from visling.types import RegionArray
from visling.vision.end_to_end import ExtractorConfig

Files = Callable[..., Path]
FAMILIES = {
    "visualbert": "visualbert-coco",
    "vlbert": "vlbert-base-prec",
    "vilbert": "vilbert-conceptual",
    "lxmert": "lxmert-20epochs-qa",
    "cvlp": "cvlp-release",
}
"""A recipe of each family."""
IMAGES = (
    *(str(zlib.crc32(f"http://a.org/{name}.jpg".encode())) for name in ("street", "sky")),
    *(f"{split}-{pair}-0-img{side}" for split in ("train", "dev") for pair in (1, 2) for side in (0, 1)),
    "1",
    "2",
)
CLASSES, ATTRIBUTES = 1600, 400
SIZES = frozenset({
    "hidden_size", "num_layers", "num_text_layers", "num_region_layers", "num_cross_layers", "num_heads",
    "intermediate_size", "region_hidden_size", "num_region_heads", "region_intermediate_size", "co_attention_size",
    "num_co_attention_heads", "pooled_size", "text_layers_before", "region_layers_before", "coordinate_size",
    "visual_size",
})  # fmt: skip
"""Settings of encoders that say how large they are; all others are part of what a recipe publishes."""


def small(name: str, **train: Any) -> PretrainConfig:
    """A published recipe with an encoder of the size of `tiny`, for few updates of two examples."""
    run = PUBLISHED_PRETRAINING[name]()
    tiny = models.spec(run.model).presets["tiny"]
    sizes = {field.name: getattr(tiny, field.name) for field in fields(tiny) if field.name in SIZES}
    settings: Mapping[str, Mapping[str, Any]] = run.objective_settings
    if run.model == "cvlp":
        sizes |= {
            field: 3 for field in sizes if field.endswith("_layers")
        }  # the fewest of which the key network can leave one out
        settings = {"region_contrast": {**settings["region_contrast"], "queue_size": 24}}
    short = replace(run.train, log_every=1, **{"max_steps": 2, **train})
    extractor = None
    if run.extractor is not None:
        extractor = ExtractorConfig(blocks=(1, 1, 1), stem_size=4, widths=(4, 4, 6, 4), shorter_side=32, longer_side=64)
        sizes["feature_size"] = extractor.feature_size
    encoder, batch = replace(run.encoder, **sizes), 2 // run.train.accumulation
    return replace(
        run, encoder=encoder, extractor=extractor, objective_settings=settings, batch_size=batch, train=short
    )


def store_of(path: Path, width: int, *, label: int = 0) -> Path:
    """A store of all images with distributions, classes and attributes of Visual Genome's detector; `label` is the
    class of the last region."""
    rng = np.random.default_rng(0)
    with StoreWriter(path, feature_size=width, fingerprint="test") as writer:
        for image in IMAGES:
            probs = rng.dirichlet(np.ones(CLASSES + 1), 3).astype(np.float16)
            classes = probs[:, 1:].argmax(1).astype(np.int16)
            if image == IMAGES[-1] and label:
                classes[-1] = label
            regions = RegionArray(
                features=rng.normal(size=(3, width)).astype(np.float16),
                boxes=np.array([[0, 0, 30, 30], [10, 10, 50, 40], [40, 0, 60, 60]], np.float32),
                size=(64, 64),
                classes=classes,
                class_confidence=rng.uniform(0.2, 1, 3).astype(np.float16),
                attributes=rng.integers(0, ATTRIBUTES, (3, 2)).astype(np.int16),
                attribute_confidence=rng.uniform(0.2, 1, (3, 2)).astype(np.float16),
                probs=probs,
            )
            writer.add(image, regions)
    return path


@pytest.fixture(scope="module")
def data(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with everything that the recipes read."""
    folder = tmp_path_factory.mktemp("official")
    runs = [recipe() for recipe in PUBLISHED_PRETRAINING.values()]
    for kind, split in {
        (part.kind, split) for run in runs for part in run.corpora for split in (run.train_split, run.valid_split)
    }:
        for part in split.split("+"):
            files(folder, "nlvr2" if kind == "statements" else kind, "val" if part.endswith("minival") else part)
    (folder / "minival.txt").write_text("1\n")
    answers = sorted({"man", "blue", *(f"answer {number}" for number in range(9498))})
    (folder / "all_ans.json").write_text(json.dumps([{"ans": answer, "dsets": ["vqa"]} for answer in answers]))
    return folder


@pytest.fixture(scope="module")
def regions(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Region stores by feature width."""
    folder = tmp_path_factory.mktemp("regions")

    def store(width: int) -> Path:
        path = folder / str(width)
        return path if path.exists() else store_of(path, width)

    return store


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of every image."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(1)
    for image in IMAGES:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{image}.jpg")
    return folder


def train(
    run: PretrainConfig, out: Path, data: Path, store: Path, pictures: Path | None = None
) -> list[dict[str, Any]]:
    """What a run logs of its updates."""
    state = pretrain(
        run, out, data=[str(data)], store=store, images=pictures if run.extractor is not None else None, device="cpu"
    )
    assert state.step == run.train.max_steps
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line for line in lines if line["kind"] == "valid"]
    return [line for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAMILIES.values() else pytest.mark.slow) for name in PUBLISHED_PRETRAINING],
)
def test_a_published_recipe_pretrains(
    tmp_path: Path, data: Path, regions: Callable[[int], Path], pictures: Path, name: str
) -> None:
    run = small(name)
    lines = train(run, tmp_path / "run", data, regions(run.encoder.feature_size), pictures)
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert any(line["loss"] > 0 for line in lines)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES.values())
def test_the_loss_falls(tmp_path: Path, data: Path, regions: Callable[[int], Path], name: str) -> None:
    run = small(name, max_steps=60, validate_every=100, patience=None)
    run = replace(
        run, train=replace(run.train, optim=replace(run.train.optim, lr=5e-3, warmup_steps=None, warmup_share=0.1))
    )
    lines = train(run, tmp_path / "run", data, regions(run.encoder.feature_size))

    def mean(part: str, lines: list[dict[str, Any]]) -> float:
        """Mean over the updates that have this part: two short captions often have no masked word, and no replaced
        one."""
        return float(np.mean([line["parts"][part] for line in lines if part in line["parts"]]))

    first, last = ({part: mean(part, third) for part in run.objectives} for third in (lines[:20], lines[-20:]))
    assert sum(last.values()) < 0.8 * sum(first.values()), (first, last)


@pytest.mark.parametrize("what", ["classes", "attributes"])
def test_a_label_outside_the_table_is_refused(tmp_path: Path, data: Path, what: str) -> None:
    store = store_of(tmp_path / "regions", 2048, label=CLASSES)
    run = small("lxmert-20epochs-qa")
    message = rf"image '2' has a region with label {CLASSES} among its classes, but there are {CLASSES} of them"
    if what == "attributes":
        assert run.region_losses is not None
        run = replace(run, region_losses=replace(run.region_losses, num_classes=CLASSES + 1, num_attributes=100))
        message = r"image '.+' has a region with label \d+ among its attributes, but there are 100 of them"
    with pytest.raises(StoreError, match=message):
        pretrain(run, tmp_path / "run", data=[str(data)], store=store, device="cpu")
    assert not (tmp_path / "run").exists()
