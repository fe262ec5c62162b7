"""Every model on every task: trained a step, evaluated, submission written, and asked about raw pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visling import config as configs
from visling import models
from visling.recipes.scenes import TASKS
from visling.recipes.tables import FINETUNING
from visling.runs.evaluate import evaluate
from visling.runs.finetune import finetune
from visling.tasks.base import names

TINY = (
    "encoder=tiny", "batch_size=8", "train.max_steps=2", "train.validate_every=1", "train.precision=fp32",
    "train.log_every=1",
)  # fmt: skip


def test_every_task_of_the_package_is_on_scenes() -> None:
    without = {"nlvr", "nlvr2"}  # it has drawn panels of its own
    assert {how.task or name for name, how in TASKS.items()} == set(names()) - without


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", models.names())
def test_train_a_step_evaluate_and_write_a_submission(world: Any, tmp_path: Path, model: str, task: str) -> None:
    config = configs.override(FINETUNING[f"{model}-{task}-scenes"](), TINY)
    state = finetune(config, tmp_path / "run", data=world.scenes, store=world.regions, device="cpu")
    assert state.step == 2
    found = evaluate(tmp_path / "run", split=config.valid_split, batch_size=3)
    assert found["scores"][config.train.metric]["count"] > 0
    assert found["baselines"], "what the labels alone give away"
    details = (tmp_path / "run" / f"details_{config.valid_split}.jsonl").read_text().splitlines()
    assert all("prediction" in json.loads(line) for line in details)
    assert list((tmp_path / "run").glob(f"predictions_{config.valid_split}.*"))
