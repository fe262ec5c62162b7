"""Every published fine-tuning recipe, its encoder small, from files of the official layouts to an evaluated model.

The files are those of drawn scenes, under the names that the releases give their splits; LXMERT's and CVLP's are lists
as their release has them. Features are random, of the width that a recipe reads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling import config as configs
from visling import models
from visling.data.annotations import gqa as gqa_files
from visling.data.annotations import questions as vqa_files
from visling.recipes.configs import FinetuneConfig
from visling.recipes.tables import PUBLISHED_FINETUNING
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.runs.evaluate import evaluate
from visling.runs.finetune import finetune
from visling.tasks.gqa import GQA
from visling.tasks.nlvr2 import NLVR2
from visling.tasks.vqa import VQA
from visling.vision.vcr_network import VcrNetworkConfig

SIZES = frozenset({
    "hidden_size", "num_layers", "num_text_layers", "num_region_layers", "num_cross_layers", "num_heads",
    "intermediate_size", "region_hidden_size", "num_region_heads", "region_intermediate_size", "co_attention_size",
    "num_co_attention_heads", "pooled_size", "text_layers_before", "region_layers_before", "coordinate_size",
    "visual_size",
})  # fmt: skip
"""Settings of encoders that say how large they are; all others are part of what a recipe publishes."""


def small(name: str) -> FinetuneConfig:
    """A published recipe with an encoder of the size of `tiny`, and a narrow region extractor if it has one, for two
    updates of two examples."""
    run = PUBLISHED_FINETUNING[name]()
    tiny = models.spec(run.model).presets["tiny"]
    sizes = {field.name: getattr(tiny, field.name) for field in fields(tiny) if field.name in SIZES}
    extractor = run.extractor
    if extractor is not None:
        pictures: dict[str, Any] = {"shorter_side": 32, "longer_side": 64}
        if isinstance(extractor, VcrNetworkConfig):
            pictures = {"picture_width": 64, "picture_height": 32, "mask_channels": 4}
        extractor = replace(extractor, blocks=(1, 1, 1), stem_size=4, widths=(4, 4, 4, 8), **pictures)
        sizes["feature_size"] = extractor.feature_size
    return replace(
        run,
        encoder=replace(run.encoder, **sizes),
        extractor=extractor,
        batch_size=2,
        train=replace(run.train, max_steps=2, accumulation=1, log_every=1),
    )


@pytest.fixture(scope="module")
def official(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every task: `scenes` in the layouts of the data sets, `lxmert` in that of LXMERT's release."""
    folder = tmp_path_factory.mktemp("official")
    shutil.copytree(world.scenes, folder / "scenes", ignore=shutil.ignore_patterns("images", "nlvr"))
    for dataset in ("refcoco+", "refcocog"):
        shutil.copytree(folder / "scenes" / "refcoco", folder / "scenes" / dataset)
    references = folder / "scenes" / "refcocog" / "refs(unc).p"
    references.rename(references.with_name("refs(umd).p"))
    held_out = VQA().records(world.scenes, "val")
    images = sorted({record.images[0] for record in held_out})
    (folder / "scenes" / "annotations" / "minival.txt").write_text("\n".join(images[:2]))
    answers = {
        record.multiple_choice_answer for split in ("train", "val") for record in VQA().records(world.scenes, split)
    }
    write_list(folder / "answers_vqa.json", sorted(filter(None, answers)))
    answers = {record.answer for split in ("train", "val", "test") for record in GQA().records(world.scenes, split)}
    write_list(folder / "answers_gqa.json", sorted(filter(None, answers)))
    write_lxmert(world.scenes, folder / "lxmert")
    return folder


def write_lxmert(scenes: Path, folder: Path) -> None:
    """VQA, GQA and NLVR2 of the scenes as LXMERT's release has them."""
    for task in ("vqa", "gqa", "nlvr2"):
        (folder / task).mkdir(parents=True)
    held_out = VQA().records(scenes, "val")
    half = len(held_out) // 2
    for split, asked in {
        "train": VQA().records(scenes, "train"), "nominival": held_out[:half], "minival": held_out[half:]
    }.items():  # fmt: skip
        write_list(
            folder / "vqa" / f"{split}.json",
            [
                question(int(record.id), record.images[0], record.question, record.multiple_choice_answer)
                for record in asked
            ],
        )
    for split, source in {"train": "train", "valid": "val", "testdev": "test"}.items():
        write_list(
            folder / "gqa" / f"{split}.json",
            [
                question(record.id, record.images[0], record.question, record.answer)
                for record in GQA().records(scenes, source)
            ],
        )
    for split, source in {"train": "train", "valid": "dev"}.items():
        write_list(
            folder / "nlvr2" / f"{split}.json",
            [
                {"identifier": record.id, "uid": record.id, "img0": record.images[0], "img1": record.images[1],
                 "sent": record.sentence, "label": int(bool(record.label))}
                for record in NLVR2().records(scenes, source)
            ],
        )  # fmt: skip


def question(number: int | str, image: str, text: str, answer: str | None) -> dict[str, Any]:
    return {"question_id": number, "img_id": image, "sent": text, "label": {answer: 1.0}}


def write_list(file: Path, content: Sequence[Any]) -> None:
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def regions(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Stores by feature width: the detected boxes of the scenes with random features."""
    folder, source = tmp_path_factory.mktemp("regions"), NativeStore.open(world.regions)

    def store(width: int) -> Path:
        path, rng = folder / str(width), np.random.default_rng(0)
        if not path.exists():
            with StoreWriter(path, feature_size=width, fingerprint="test") as writer:
                for image in source.ids:
                    found = source[image]
                    features = rng.normal(size=(len(found), width)).astype(np.float16)
                    writer.add(
                        image, replace(found, features=features, classes=None, class_confidence=None, probs=None)
                    )
        return path

    return store


@pytest.mark.parametrize("name", PUBLISHED_FINETUNING)
def test_a_published_recipe_trains_and_is_evaluated(
    world: Any,
    tmp_path: Path,
    official: Path,
    regions: Callable[[int], Path],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, constant in ((gqa_files, "NUM_MINVAL"), (vqa_files, "NUM_LAST")):
        monkeypatch.setattr(module, constant, 4)
    run = small(name)
    if run.task_settings.get("min_count", 0) is None:
        run = configs.override(run, [f"task_settings.answers={official}/answers_{run.task}.json"])
    data = official / "lxmert" / run.task if run.model in ("lxmert", "cvlp") else official / "scenes"
    out = tmp_path / "run"
    images = None if run.extractor is None else world.scenes
    state = finetune(run, out, data=data, store=regions(run.encoder.feature_size), images=images, device="cpu")
    assert state.step == 2
    logged = read_log(out)
    assert all(np.isfinite(line["loss"]) for line in logged["train"])
    assert any(run.start in line["message"] for line in logged["event"]), "no --init: the log says what is missing"
    averaged = run.train.average is not None
    assert {run.train.metric, *([f"averaged_{run.train.metric}"] if averaged else [])} <= set(
        logged["valid"][-1]["scores"]
    )
    folders = ["model", *(["models/last"] if {"best", "last"} <= set(run.train.keep) else [])]
    folders += ["models/averaged"] if averaged else []
    assert all((out / folder / "model.safetensors").is_file() for folder in folders)
    found = evaluate(out, split=run.valid_split, batch_size=8)
    assert found["scores"][run.train.metric]["count"] > 0
    if averaged:
        second = evaluate(out / "models" / "averaged", split=run.valid_split, batch_size=8)
        assert second["scores"].keys() == found["scores"].keys()


def read_log(out: Path) -> Mapping[str, list[dict[str, Any]]]:
    """Lines of a run's log by kind."""
    found: dict[str, list[dict[str, Any]]] = {"train": [], "valid": [], "event": []}
    for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()):
        found.setdefault(line["kind"], []).append(line)
    return found
