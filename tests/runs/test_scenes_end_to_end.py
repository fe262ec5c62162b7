"""VL-BERT from pixels to loss on drawn scenes: the recipes train, are scored, and answer from a raw picture; stored
features are not read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from torch.testing import assert_close
from typer.testing import CliRunner

from visling import api
from visling import config as configs
from visling.cli.app import app
from visling.errors import ConfigError
from visling.pretrained.folder import read_model_folder
from visling.recipes.tables import FINETUNING
from visling.recipes.vlbert_tasks import SCENES_EXTRACTOR
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.runs.evaluate import evaluate
from visling.runs.finetune import finetune

TASKS = {"vqa": (), "referring": ("task_settings.loss=positive", "task_settings.whole_image=true")}
"""With losses that the tiny world has labels for: its detector's boxes hit no object."""
SHORT = ("batch_size=4", "train.max_steps=3", "train.precision=fp32", "train.validate_every=100")


def train(world: Any, out: Path, task: str, *settings: str, store: Path | None = None, **options: Any) -> Path:
    config = configs.override(FINETUNING[f"vlbert-{task}-scenes-e2e"](), [*SHORT, *TASKS[task], *settings])
    finetune(config, out, data=world.scenes, store=store or world.regions, images=world.scenes, device="cpu", **options)
    return out


@pytest.fixture(scope="module")
def runs(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("end-to-end")
    return {task: train(world, folder / task, task) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_the_source_of_the_features_and_the_rate_differ_from_the_stored_run(task: str) -> None:
    stored, joint = FINETUNING[f"vlbert-{task}-scenes"](), FINETUNING[f"vlbert-{task}-scenes-e2e"]()
    names = [name for name in configs.difference(joint, stored) if not name.startswith("encoder.")]
    changed = {"extractor" if name.startswith("extractor") else name for name in names}
    assert changed == {"recipe", "extractor", "any_features", "train.optim.lr"}
    encoder = {name for name in configs.difference(joint, stored) if name.startswith("encoder.")}
    assert encoder == {"encoder.feature_size", "encoder.whiten_features", "encoder.masks_features"}


@pytest.mark.parametrize("task", TASKS)
def test_every_convolution_of_the_network_is_trained(world: Any, runs: dict[str, Path], task: str) -> None:
    weights = load_file(runs[task] / "model" / "model.safetensors")
    start = train(world, runs[task].parent / f"{task}-start", task, "train.optim.lr=1e-12", "train.max_steps=1")
    before = load_file(start / "model" / "model.safetensors")
    network = [name for name in weights if name.startswith("extractor.")]
    moved = {name for name in network if not np.allclose(weights[name], before[name], atol=1e-7)}
    assert moved == {name for name in network if name.endswith("convolution.weight")}


@pytest.mark.parametrize("task", TASKS)
def test_a_stopped_run_resumes_bit_by_bit(world: Any, runs: dict[str, Path], tmp_path: Path, task: str) -> None:
    train(world, tmp_path / "run", task, "train.max_seconds=0.01")
    assert json.loads((max((tmp_path / "run" / "last").glob("step-*")) / "state.json").read_text())["state"]["step"] < 3
    train(world, tmp_path / "run", task, resume=True)
    whole, parts = (read_model_folder(run).weights for run in (runs[task], tmp_path / "run"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert_close(parts[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("task", TASKS)
def test_a_raw_picture_is_answered_as_in_the_evaluation(
    world: Any, runs: dict[str, Path], tmp_path: Path, task: str
) -> None:
    run = shutil.copytree(runs[task], tmp_path / "run")
    assert read_model_folder(run).extractor == SCENES_EXTRACTOR
    found = evaluate(run, split="val", batch_size=3)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    valid = [line["scores"] for line in lines if line["kind"] == "valid"][-1]
    assert found["scores"]["accuracy"]["value"] == pytest.approx(valid["accuracy"])
    model = api.load(run, device="cpu")
    for row in [json.loads(line) for line in (run / "details_val.jsonl").read_text().splitlines()][:4]:
        (picture,) = (world.scenes / "images").rglob(f"*{int(row['image']):012d}.png")
        answer = model.answer(picture, row["text"])
        assert answer.confidence == pytest.approx(row["confidence"], abs=1e-4)
        if task == "referring":
            np.testing.assert_allclose(answer.boxes[0], row["boxes"][0], atol=0.02)
    asked = ["predict", "--run", str(run), str(world.picture()), "the red star", "--out", str(tmp_path / "cards")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "cards").glob("*.png"))) == 1


@pytest.mark.parametrize("task", TASKS)
def test_the_features_of_the_store_are_not_read(world: Any, runs: dict[str, Path], tmp_path: Path, task: str) -> None:
    source = NativeStore.open(world.regions)
    with StoreWriter(tmp_path / "regions", feature_size=16, fingerprint=source.fingerprint) as writer:
        for image in source.ids:
            regions = source[image]
            writer.add(image, replace(regions, features=np.zeros_like(regions.features), attributes=None,
                                      attribute_confidence=None))  # fmt: skip
    blank = train(world, tmp_path / "run", task, store=tmp_path / "regions")
    ours, theirs = (read_model_folder(run).weights for run in (runs[task], blank))
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)


def test_the_pictures_are_asked_for(world: Any, tmp_path: Path) -> None:
    files = ["--data", str(world.scenes), "--store", str(world.regions), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, ["finetune", "--recipe", "vlbert-vqa-scenes-e2e", *files])
    assert isinstance(done.exception, ConfigError)
    assert "name the folder of the images with --images" in str(done.exception)
    assert not (tmp_path / "run").exists()
