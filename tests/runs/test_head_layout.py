"""A fine-tuning may give its task the heads of another released layout than the family's main one: ViLBERT's first
release has an answer classifier of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from visling import config as configs
from visling.errors import ConfigError
from visling.models.task_model import TaskModel
from visling.pretrained.export import export
from visling.pretrained.folder import read_model_folder
from visling.recipes.configs import FinetuneConfig
from visling.recipes.tables import FINETUNING
from visling.runs.evaluate import evaluate
from visling.runs.finetune import finetune


def small(*settings: str) -> FinetuneConfig:
    """ViLBERT on drawn questions for two updates; released models do not whiten features."""
    config = configs.override(
        FINETUNING["vilbert-vqa-scenes"](),
        ["encoder=tiny", "batch_size=8", "train.max_steps=2", "train.precision=fp32", "train.validate_every=1"],
    )
    return configs.override(config, ["encoder.whiten_features=false", *settings])


@pytest.fixture(scope="module")
def run(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first") / "run"
    finetune(small("head_layout=first"), out, data=world.scenes, store=world.regions, device="cpu")
    return out


def test_it_is_read_again_with_the_same_head(run: Path) -> None:
    saved = read_model_folder(run)
    assert {place: (head.part, head.style) for place, head in saved.heads.items()} == {
        "heads.classify": ("classify", "weight_norm")
    }
    model, task = saved.task_model()
    assert isinstance(model, TaskModel)
    names = {name.rpartition(".")[2] for name, _ in model.heads["classify"].named_parameters()}
    assert names == {"gain", "direction", "bias"}
    assert evaluate(run, split="test", batch_size=8)["task"] == task.name


def test_it_is_written_in_the_layout_of_its_head(run: Path, tmp_path: Path) -> None:
    made = export(run, tmp_path / "first.safetensors")
    assert made.layout == "first"
    written, saved = load_file(tmp_path / "first.safetensors"), read_model_folder(run)
    assert torch.equal(written["vil_prediction.main.3.weight_v"], saved.weights["heads.classify.output.direction"])


def test_the_main_layout_needs_no_description(world: Any, tmp_path: Path) -> None:
    finetune(small(), tmp_path / "run", data=world.scenes, store=world.regions, device="cpu")
    assert not read_model_folder(tmp_path / "run").heads


def test_a_layout_that_the_family_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lxmert has no heads of a layout 'first'\. .*official"):
        configs.override(FINETUNING["lxmert-vqa-scenes"](), ["head_layout=first"])
