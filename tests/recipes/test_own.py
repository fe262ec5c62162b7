"""The small recipes for one's own data: every family learns from captions and from questions with features of any
width, and every task has its own score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visling import config as configs
from visling import models
from visling.errors import ConfigError
from visling.recipes.own import on_own_data
from visling.recipes.tables import FINETUNING, PRETRAINING
from visling.runs.finetune import finetune, fit_to_family
from visling.runs.pretrain import pretrain
from visling.tasks.base import load as load_task
from visling.tasks.base import names as task_names

FEW = ("train.max_steps=2", "train.precision=fp32", "batch_size=4")


@pytest.mark.parametrize("model", models.names())
def test_captions_then_questions(world: Any, tmp_path: Path, model: str) -> None:
    """The objectives need nothing of a store but features, and a fine-tuning starts from the pre-training."""
    run = configs.override(
        PRETRAINING[f"{model}-small"](),
        [*FEW, *(["objective_settings.region_contrast.queue_size=32"] * (model == "cvlp"))],
    )
    assert set(run.objectives) <= {"masked_lm", "matching", "region_contrast"}
    pretrain(run, tmp_path / "pretrained", data=[str(world.scenes)], store=world.regions, device="cpu")
    asked = configs.override(FINETUNING[f"{model}-small"](), FEW)
    out = tmp_path / "vqa"
    finetune(asked, out, data=world.scenes, store=world.regions, init=tmp_path / "pretrained", device="cpu")
    described = json.loads((out / "model" / "config.json").read_text())["config"]
    assert (described["vocabulary"], described["vocab_size"]) == ("bert-base-uncased", 30522)
    assert described["feature_size"] == 16, "the width follows the store"
    scores = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert any("accuracy" in row.get("scores", {}) for row in scores)


@pytest.mark.parametrize("task", [*task_names(), "vcr-rationale"])
def test_every_task_has_its_settings_and_its_own_score(task: str) -> None:
    run = fit_to_family(on_own_data("visualbert", task))
    kind = load_task(run.task)
    kind.configured(run.task_settings)
    assert (run.train.metric, run.train.direction) == (kind.metric, "max")
    assert run.recipe == "visualbert-small"


def test_a_task_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"no task 'vqaa'\. Did you mean 'vqa'"):
        on_own_data("visualbert", "vqaa")
