"""DistributedDataParallel and FSDP2, by several processes on one machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from visling import runtime
from visling.errors import ConfigError
from visling.train.config import TrainConfig
from visling.train.log import read
from visling.train.parallel import choose_compilation

PROGRAM = str(Path(__file__).parent / "wrapped.py")


def run_processes(processes: int, *arguments: str | Path) -> str:
    """What a program of `wrapped.py` prints."""
    command = [sys.executable, PROGRAM, str(processes), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Warning" not in ended.stderr
    return ended.stdout


def tiny(world: Any, recipe: str) -> list[str]:
    """Settings of a small model whose streams have more than one layer."""
    changes = [*world.settings, "batch_size=4", "train.optim.lr=0.001"]
    layers = {"lxmert": (3, 1, 3), "cvlp": (3, 1, 3)}.get(recipe.split("-")[0])
    if recipe.startswith("vilbert"):
        changes = [change for change in changes if not change.startswith("encoder.")]  # its preset is small
    elif layers is None:
        changes.append("encoder.num_layers=2")
    else:
        changes.remove("encoder.num_layers=1")
        changes += [
            f"encoder.num_{name}_layers={count}"
            for name, count in zip(("text", "region", "cross"), layers, strict=True)
        ]
    return changes


def test_gradients_are_means_over_processes() -> None:
    assert run_processes(2, "gradients") == "means\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "processes", "settings"),
    [
        ("visualbert-scenes", 2, ("optim.name=bert_adam", "optim.clip=per_tensor")),
        ("vlbert-scenes", 2, ("optim.name=release_adamw", "accumulation=2")),
        ("vilbert-scenes", 2, ("optim.name=adamw", "optim.clip=global_in_order")),
        ("lxmert-scenes", 4, ("optim.name=sgd", "accumulation=2")),
        ("lxmert-scenes", 2, ("optim.name=sgd", "precision=bf16")),
        ("cvlp-scenes", 4, ("optim.name=bert_adam", "optim.clip=global")),
    ],
)
def test_spread_models_are_trained_alike(world: Any, recipe: str, processes: int, settings: tuple[str, ...]) -> None:
    """Every family, every optimiser, every way of clipping, batches together and one after the other."""
    # bf16 keeps eight bits: sums in another order are rounded to others
    tolerance = "1e-3" if "precision=bf16" in settings else "1e-5"
    changes = [*tiny(world, recipe), "train.optim.clip_norm=0.5", *(f"train.{setting}" for setting in settings)]
    assert run_processes(processes, "family", world.folder, recipe, tolerance, *changes) == "equal\n"


def test_one_process_has_nobody_to_share_with(toy: ModuleType, tmp_path: Path) -> None:
    model, _ = toy.run(tmp_path / "spread", shard=True)
    other, _ = toy.run(tmp_path / "whole")
    events = [entry["message"] for entry in read(tmp_path / "spread" / "log.jsonl") if entry["kind"] == "event"]
    assert sum("train.shard does nothing" in text for text in events) == 1
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_kernels_of_a_spread_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config, device = TrainConfig(shard=True, compile="kernels"), torch.device("cpu")
    assert choose_compilation(config, device, recordable=True) == "kernels"
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match=r"train\.shard"):
        choose_compilation(config, device, recordable=True)
