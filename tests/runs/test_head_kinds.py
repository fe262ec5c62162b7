"""The task contract is wide enough: a toy task with a head of each kind is trained, evaluated and asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from fixtures.toy_tasks import Toy, ToyConfig, ToyRecord
from PIL import Image

from visling import api
from visling import config as configs
from visling.cli import app
from visling.models import build_tiny, head_styles, names
from visling.models.task_model import TaskModel
from visling.recipes.tables import FINETUNING
from visling.regions.store import NativeStore
from visling.runs.evaluate import evaluate
from visling.runs.finetune import finetune
from visling.types import HeadKind

KINDS = (*get_args(HeadKind), "all pairs")
ABOUT_REGIONS = ("regions", "slots_regions", "region_targets", "projection")
FAMILY = {"regions": "vlbert", "region_targets": "vlbert", "projection": "cvlp", "pair": "lxmert"}
"""Families whose tiny presets show two images in two rows, or have a head of the kind in their main layout."""


def tune(world: Any, out: Path, kind: str, *settings: str) -> None:
    model = FAMILY.get(kind, "visualbert")
    config = configs.override(
        FINETUNING[f"{model}-vqa-scenes"](),
        [
            "encoder=tiny", 'task="fixtures.toy_tasks"', f'task_settings={{kind = "{kind}"}}', "any_features=true",
            "batch_size=8", "train.max_steps=2", "train.validate_every=1", "train.precision=fp32", *settings,
        ],
    )  # fmt: skip
    finetune(config, out, data=world.scenes, store=world.regions, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_with_a_head_of_each_kind_is_trained_and_evaluated(world: Any, tmp_path: Path, kind: str) -> None:
    tune(world, tmp_path / "run", kind)
    scores = evaluate(tmp_path / "run", split="val", batch_size=2)
    details = [json.loads(line) for line in (tmp_path / "run" / "details_val.jsonl").read_text().splitlines()]
    assert len(details) == scores["scores"]["accuracy"]["count"] == (2 if kind == "pair" else 3)
    if kind in ABOUT_REGIONS:
        store = NativeStore.open(world.regions)
        for row in details:
            boxes = store[row["image"]].boxes
            assert np.abs(boxes - np.array(row["prediction"], np.float32)).max(1).min() < 0.1, "a box of the image"
    if kind == "all pairs":
        assert {row["prediction"] for row in details} <= {row["image"] for row in details}


@pytest.mark.parametrize("kind", ABOUT_REGIONS)
def test_targets_about_regions_reach_the_loss(world: Any, tmp_path: Path, kind: str, monkeypatch: Any) -> None:
    """They are made where the store is known: with other ones the loss is another."""
    losses = []
    for number in range(2):
        tune(world, tmp_path / str(number), kind, "train.max_steps=1")
        log = [json.loads(line) for line in (tmp_path / str(number) / "log.jsonl").read_text().splitlines()]
        losses.append(next(line["loss"] for line in log if line["kind"] == "train"))
        real = Toy.region_targets

        def reversed_targets(task: Toy, record: ToyRecord, regions: Any, real: Any = real) -> dict[str, Any]:
            return {name: np.ones_like(value) for name, value in real(task, record, regions).items()}

        monkeypatch.setattr(Toy, "region_targets", reversed_targets)
    assert losses[0] != losses[1]


def test_all_pairs_are_scored_as_one_by_one(world: Any, tmp_path: Path) -> None:
    """Batches of any size give the same best image."""
    tune(world, tmp_path / "run", "all pairs")
    predicted = []
    for batch_size in (1, 4, 9):
        evaluate(tmp_path / "run", split="val", batch_size=batch_size, overwrite=True)
        predicted.append(json.loads((tmp_path / "run" / "predictions_val.json").read_text()))
    assert predicted[0] == predicted[1] == predicted[2]
    assert len(predicted[0]) == 3


@pytest.mark.parametrize("kind", ["classify", "regions"])
def test_any_task_is_asked_about_raw_images(world: Any, tmp_path: Path, kind: str) -> None:
    tune(world, tmp_path / "run", kind)
    answer = api.load(tmp_path / "run", device="cpu").answer(Image.open(world.picture()), "star")
    assert answer.text
    if kind == "regions":
        assert (
            np.abs(answer.regions.boxes - np.array(json.loads(answer.text.replace("(", "[").replace(")", "]"))))
            .max(1)
            .min()
            < 0.1
        ), "a box of the image that was asked about"


def test_a_task_that_ranks_is_asked_about_one_pair(world: Any, tmp_path: Path) -> None:
    tune(world, tmp_path / "run", "all pairs")
    assert api.load(tmp_path / "run", device="cpu").answer(world.picture(), "star").text in ("0", "1")


def test_a_task_about_two_images_is_asked_from_the_command_line(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(world, tmp_path / "run", "pair")
    images = sorted(map(str, (world.scenes / "images" / "test").glob("*.png")))[:2]
    command = ["visling", "predict", "--run", str(tmp_path / "run"), *images, "star", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        app.run()
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert f"{', '.join(images)}: " in said
    (drawing,) = (tmp_path / "run" / "answers").iterdir()
    assert f"regions, drawn in {drawing}" in said, "both images in one drawing"
    monkeypatch.setattr(sys, "argv", [word for word in command if word != images[1]])
    with pytest.raises(SystemExit) as end:
        app.run()
    assert end.value.code == 2
    assert "reads 2 images at a time; found 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", names())
def test_every_family_builds_a_head_of_every_kind_that_it_has(name: str) -> None:
    styles = head_styles(name)
    for kind in KINDS:
        if kind in styles:
            task = Toy(ToyConfig(kind=kind))  # type: ignore[arg-type]
            model = TaskModel(build_tiny(name), task.heads, styles, group=task.group)
            assert [*model.heads] == ["toy"]
