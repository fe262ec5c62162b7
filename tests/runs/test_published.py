"""Every published pre-training recipe, its encoder small, on files of the official layouts and regions with all that
its losses tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.published_recipes import IMAGES, Files, small_pretraining, train, write_corpora
from PIL import Image

from visling.errors import StoreError
from visling.recipes.tables import PUBLISHED_PRETRAINING
from visling.regions.writer import StoreWriter
from visling.runs.pretrain import pretrain
from visling.types import RegionArray

FAMILIES = {
    "visualbert": "visualbert-coco",
    "vlbert": "vlbert-base-prec",
    "vilbert": "vilbert-conceptual",
    "lxmert": "lxmert-20epochs-qa",
    "cvlp": "cvlp-release",
}
"""A recipe of each family."""
CLASSES, ATTRIBUTES = 1600, 400


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
    return write_corpora(files, tmp_path_factory.mktemp("official"))


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


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAMILIES.values() else pytest.mark.slow) for name in PUBLISHED_PRETRAINING],
)
def test_a_published_recipe_pretrains(
    tmp_path: Path, data: Path, regions: Callable[[int], Path], pictures: Path, name: str
) -> None:
    run = small_pretraining(name)
    lines = train(run, tmp_path / "run", data, regions(run.encoder.feature_size), pictures)
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert any(line["loss"] > 0 for line in lines)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES.values())
def test_the_loss_falls(tmp_path: Path, data: Path, regions: Callable[[int], Path], name: str) -> None:
    run = small_pretraining(name, max_steps=60, validate_every=100, patience=None)
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
    run = small_pretraining("lxmert-20epochs-qa")
    message = rf"image '2' has a region with label {CLASSES} among its classes, but there are {CLASSES} of them"
    if what == "attributes":
        assert run.region_losses is not None
        run = replace(run, region_losses=replace(run.region_losses, num_classes=CLASSES + 1, num_attributes=100))
        message = r"image '.+' has a region with label \d+ among its attributes, but there are 100 of them"
    with pytest.raises(StoreError, match=message):
        pretrain(run, tmp_path / "run", data=[str(data)], store=store, device="cpu")
    assert not (tmp_path / "run").exists()
