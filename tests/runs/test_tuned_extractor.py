"""Fine-tuning with a jointly trained region extractor: what it learns, keeps, resumes, scores and predicts, and what is
refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from visling import config as configs
from visling.models.task_model import TaskModel
from visling.pretrained.folder import read_model_folder
from visling.recipes.configs import FinetuneConfig
from visling.recipes.tables import FINETUNING
from visling.runs.evaluate import evaluate
from visling.runs.finetune import Finetuning, finetune
from visling.train.optim import build_optimizer
from visling.vision.end_to_end import ExtractorConfig

SMALL = ExtractorConfig(blocks=(1, 1, 1), stem_size=4, widths=(4, 4, 6, 4), shorter_side=32, longer_side=64)
TINY = (
    "extractor={blocks = [1, 1, 1], stem_size = 4, widths = [4, 4, 6, 4], shorter_side = 32, longer_side = 64}",
    "encoder.feature_size=16", "encoder.whiten_features=false", "encoder.masks_features=false",
    "encoder.hidden_size=16", "encoder.visual_size=16", "encoder.num_layers=1", "encoder.num_heads=2",
    "encoder.intermediate_size=32", "encoder.visual_scale_init=1.0", "encoder.text_visual_scale_init=1.0", "flip=0.5",
    "batch_size=4", "train.max_steps=4", "train.precision=fp32", "train.log_every=1", "train.validate_every=100",
)  # fmt: skip
TASKS = {"referring": ("task_settings.loss=positive", "task_settings.whole_image=true"), "vcr": ()}
"""With the losses of the release."""


def tiny(task: str, *settings: str) -> FinetuneConfig:
    """VL-BERT's recipe on scenes with a tiny extractor."""
    return configs.override(FINETUNING[f"vlbert-{task}-scenes"](), [*TINY, *TASKS[task], *settings])


def tune(world: Any, out: Path, task: str, *settings: str, **options: Any) -> list[dict[str, Any]]:
    """Run it; what it logged."""
    where = {"data": world.scenes, "store": world.regions, "images": world.scenes, "device": "cpu", **options}
    finetune(tiny(task, *settings), out, **where)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def prepared(world: Any, task: str, *settings: str) -> Finetuning:
    """A run before its first update."""
    return Finetuning(
        tiny(task, *settings), data=world.scenes, store=world.regions, init=None, device="cpu", other_features=False,
        images=world.scenes, backbone=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each task."""
    folder = tmp_path_factory.mktemp("tuned")
    for task in TASKS:
        tune(world, folder / task, task)
    return {task: folder / task for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_losses_reach_the_later_stages_and_nothing_else_of_the_network(world: Any, task: str) -> None:
    training = prepared(world, task).build()
    model, (batch, targets) = training.model, next(iter(training.batches))
    assert isinstance(model, TaskModel)
    model.train()
    training.step(batch, targets).value.backward()
    trained = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.any())
    }
    behind = ("extractor.stages.1.", "extractor.stages.2.", "extractor.head.")
    network = {name for name, _ in model.named_parameters() if name.startswith("extractor.")}
    later = {name for name in network if name.startswith(behind) and ".norm." not in name}
    assert {name for name in trained if name.startswith("extractor.")} == later
    optimiser, _ = build_optimizer(model, tiny(task).train.optim, 10)
    moved = {name for group in optimiser.param_groups for name in group["names"]}
    assert moved & network == later


@pytest.mark.parametrize("task", TASKS)
def test_a_stopped_run_resumes_bit_by_bit(world: Any, runs: dict[str, Path], tmp_path: Path, task: str) -> None:
    tune(world, tmp_path / "parts", task, "train.max_seconds=0.01")
    state = json.loads((tmp_path / "parts" / "last" / "state.json").read_text())["state"]
    assert state["step"] < 4
    tune(world, tmp_path / "parts", task, resume=True)
    whole, parts = (
        load_file(max((run / "last").glob("model*.safetensors"))) for run in (runs[task], tmp_path / "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("task", TASKS)
def test_the_model_folder_has_the_network_and_is_scored_with_it(
    world: Any, runs: dict[str, Path], tmp_path: Path, task: str
) -> None:
    saved = read_model_folder(runs[task])
    assert saved.extractor == SMALL
    assert json.loads((runs[task] / "run.json").read_text())["images"] == str(world.scenes)
    run = shutil.copytree(runs[task], tmp_path / "run")
    found = evaluate(run, split="val", batch_size=3)
    last = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    valid = [line["scores"] for line in last if line["kind"] == "valid"][-1]
    assert found["scores"]["accuracy"]["value"] == pytest.approx(valid["accuracy"])
    details = (run / "details_val.jsonl").read_text()

    # The features are those of the network: without it, predictions are others.
    weights = load_file(run / "model" / "model.safetensors")
    blind = {name: torch.zeros_like(t) if name.startswith("extractor.head") else t for name, t in weights.items()}
    save_file(blind, run / "model" / "model.safetensors")
    evaluate(run, split="val", batch_size=3, overwrite=True)
    assert (run / "details_val.jsonl").read_text() != details
