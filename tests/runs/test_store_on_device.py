"""Runs whose features live on the device train exactly as those that read them from the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visling import config as configs
from visling.errors import ConfigError
from visling.recipes.tables import FINETUNING, PRETRAINING
from visling.runs.finetune import finetune
from visling.runs.inputs import Inputs
from visling.runs.pretrain import pretrain
from visling.train.log import read

SHORT = (
    "batch_size=8", "train.max_steps=4", "train.precision=fp32", "train.log_every=1", "train.validate_every=100",
)  # fmt: skip


def losses(out: Path) -> list[Any]:
    return [(line["loss"], line["parts"]) for line in read(out / "log.jsonl") if line["kind"] == "train"]


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Widths of the features that the batches carried from the host, step by step."""
    widths: list[int] = []
    fill = Inputs.fill

    def noting(self: Inputs, batch: Any, targets: Any) -> Any:
        widths.append(batch.regions.features.shape[-1])
        return fill(self, batch, targets)

    monkeypatch.setattr(Inputs, "fill", noting)
    return widths


@pytest.mark.parametrize("model", ["lxmert", "cvlp", "vlbert"])
def test_pretraining_is_the_same(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    widths = watch(monkeypatch)
    for name in ("true", "false"):
        queue = ["objective_settings.region_contrast.queue_size=64"] if model == "cvlp" else []
        run = configs.override(PRETRAINING[f"{model}-scenes"](), [*SHORT, *queue, f"store_on_device={name}"])
        pretrain(run, tmp_path / name, data=[str(world.scenes)], store=world.regions, device="cpu")
        wide = json.loads((tmp_path / name / "run.json").read_text())["inputs"]["feature_size"]
        assert set(widths) == {1 if name == "true" else wide}
        widths.clear()
    assert losses(tmp_path / "true") == losses(tmp_path / "false")


def test_finetuning_is_the_same(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = watch(monkeypatch)
    for name in ("true", "false"):
        run = configs.override(FINETUNING["visualbert-vqa-scenes"](), [*SHORT, f"store_on_device={name}"])
        finetune(run, tmp_path / name, data=world.scenes, store=world.regions, device="cpu")
        assert (1 in widths) == (name == "true")
        widths.clear()
    assert losses(tmp_path / "true") == losses(tmp_path / "false")
    last = [line for line in read(tmp_path / "true" / "log.jsonl") if line["kind"] == "valid"][-1]
    assert (
        last["scores"]
        == [line for line in read(tmp_path / "false" / "log.jsonl") if line["kind"] == "valid"][-1]["scores"]
    ), "validation reads the store"


def test_a_run_without_stored_features_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"store_on_device=true .* sees the words alone"):
        configs.override(FINETUNING["visualbert-vqa-scenes"](), ["text_only=true", "store_on_device=true"])
    with pytest.raises(ConfigError, match=r"store_on_device=true .* computes features while it trains"):
        configs.override(FINETUNING["vlbert-vqa-scenes-e2e"](), ["store_on_device=true"])
