"""Every model on every task: trained a step, evaluated, submission written, and asked about raw pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from visling import api, models
from visling import config as configs
from visling.errors import ConfigError, RunError
from visling.recipes.scenes import TASKS
from visling.recipes.tables import FINETUNING
from visling.runs.evaluate import evaluate
from visling.runs.finetune import Finetuning, finetune
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
        check_candidates(model, api.Question(pictures[0], "a red star"))
        ranking = model.rank(pictures, "a red star")
        assert sorted(image for image, _ in ranking) == pictures
        scores = [score for _, score in ranking]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) > 1, "a score that depends on the image"
        return
    choices = ["red", "because it is left of the circle", "blue"] if model.task.choices else []
    check_candidates(model, api.Question(pictures[: model.task.images], "the small [red star]", choices))
    answer = model.answer(pictures[: model.task.images], "the small [red star]", choices)
    assert 0 <= answer.confidence <= 1
    assert answer.top or answer.text
    if choices:
        assert {name for name, _ in answer.top} <= set(choices)
    for x1, y1, x2, y2 in answer.boxes:
        assert 0 <= x1 < x2 <= answer.image.width
        assert 0 <= y1 < y2 <= answer.image.height


def check_candidates(model: api.Predictor, question: api.Question) -> None:
    """The output behind each candidate is a number with a graph, and better candidates have higher ones."""
    prepared = model.prepare(question)
    logits = model.model(prepared.batch)
    (prediction,) = model.task.decode(logits, prepared.batch, [prepared.record])
    candidates = [
        model.task.logit(logits, prepared.batch, 0, prediction, place) for place in range(len(prediction.top) or 1)
    ]
    assert all(value.shape == () and value.requires_grad for value in candidates)
    values = [value.item() for value in candidates]
    if model.task.name == "grounding":  # the candidates are phrases, each with its best region
        slots = logits["phrases"][0].max(dim=-1).values.tolist()
        assert values == slots[: len(values)]
    elif not prediction.top:
        assert values == [pytest.approx(prediction.value)]
    else:
        assert values == sorted(values, reverse=True)
        assert len(set(values)) > 1


@pytest.mark.parametrize(
    ("model", "task"), [*(("vlbert", task) for task in TASKS), ("lxmert", "referring"), ("vilbert", "referring")]
)
def test_what_is_counted_beforehand_is_what_the_loss_divides_by(world: Any, model: str, task: str) -> None:
    config = configs.override(FINETUNING[f"{model}-{task}-scenes"](), TINY)
    run = Finetuning(config, data=world.scenes, store=world.regions, init=None, device="cpu", other_features=False)
    training = run.build()
    assert training.count is not None
    item = next(iter(training.batches))
    terms = training.step(*item).terms
    assert terms is not None
    assert {name: float(count) for name, count in training.count(*item).items()} == {
        name: float(term.count) for name, term in terms.items()
    }


def test_both_phases_of_vcr_are_scored_together_or_written_into_one_file(world: Any, tmp_path: Path) -> None:
    runs = {}
    for phase in ("vcr", "vcr-rationale"):
        config = configs.override(FINETUNING[f"visualbert-{phase}-scenes"](), TINY)
        runs[phase] = tmp_path / phase
        finetune(config, runs[phase], data=world.scenes, store=world.regions, device="cpu")
    with pytest.raises(RunError, match=r"vcr has not been evaluated on 'val'. First: visling evaluate"):
        evaluate(runs["vcr-rationale"], split="val", joint=runs["vcr"])
    alone = evaluate(runs["vcr"], split="val")["scores"]["accuracy"]
    found = evaluate(runs["vcr-rationale"], split="val", joint=runs["vcr"])
    together = found["joint"]["scores"]
    assert (together["answer"]["value"], together["rationale"]["value"]) == (
        alone["value"],
        found["scores"]["accuracy"]["value"],
    )
    assert together["joint"]["value"] <= min(together["answer"]["value"], together["rationale"]["value"])

    # Without labels, as in the official test split, rationales are chosen given each answer.
    data = tmp_path / "scenes"
    shutil.copytree(world.scenes / "vcr", data / "vcr")
    lines = [json.loads(line) for line in (data / "vcr" / "val.jsonl").read_text().splitlines()]
    unlabelled = [{name: value for name, value in line.items() if not name.endswith("_label")} for line in lines]
    (data / "vcr" / "val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in unlabelled))
    evaluate(runs["vcr"], split="val", data=data, overwrite=True)
    found = evaluate(runs["vcr-rationale"], split="val", data=data, joint=runs["vcr"], overwrite=True)
    assert found["scores"] == {}
    assert "joint" not in found
    written = (runs["vcr-rationale"] / "predictions_joint_val.csv").read_text().splitlines()
    assert len(written) == 1 + len(lines)
    assert {len(line.split(",")) for line in written} == {1 + 4 + 16}
    other = configs.override(FINETUNING["visualbert-vqa-scenes"](), TINY)
    finetune(other, tmp_path / "vqa", data=world.scenes, store=world.regions, device="cpu")
    with pytest.raises(ConfigError, match="task vqa has one phase"):
        evaluate(tmp_path / "vqa", split="val", joint=runs["vcr"])
