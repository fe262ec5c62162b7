"""Every model on every task: trained a step, evaluated, submission written, and asked about raw pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visling import api, models
from visling import config as configs
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
    without = {"nlvr"}  # it has drawn panels of its own
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
    check_raw_images(api.load(tmp_path / "run", device="cpu"), sorted((world.scenes / "images" / "test").glob("*.png")))


def check_raw_images(model: api.Predictor, pictures: list[Path]) -> None:
    """Ask the task about pictures, in the way that it is asked."""
    if model.task.all_pairs() is not None:
        ranking = model.rank(pictures, "a red star")
        assert sorted(image for image, _ in ranking) == pictures
        scores = [score for _, score in ranking]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) > 1, "a score that depends on the image"
        return
    choices = ["red", "because it is left of the circle", "blue"] if model.task.choices else []
    answer = model.answer(pictures[: model.task.images], "the small [red star]", choices)
    assert 0 <= answer.confidence <= 1
    assert answer.top or answer.text
    if choices:
        assert {name for name, _ in answer.top} <= set(choices)
    for x1, y1, x2, y2 in answer.boxes:
        assert 0 <= x1 < x2 <= answer.image.width
        assert 0 <= y1 < y2 <= answer.image.height
