"""ViLBERT's multi-task trainer: the controllers of stop-and-go, whose turn it is, and the rates, as recorded from the
release's training scripts on a dummy model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from visling.recipes.multitask import PUBLISHED
from visling.recipes.vilbert_tasks import TASKS, multitask_optim
from visling.train.config import TrainConfig
from visling.train.engine import fit
from visling.train.log import Log, read
from visling.train.multitask import Controller, StopAndGo, TurnBatches, Turns
from visling.types import Loss

RESETS = (6, 8)
"""Epochs after which the release resets its controllers."""


@pytest.fixture
def recorded(golden: Path) -> Any:
    return json.loads((golden / "vilbert_tasks" / "multi_task" / "stop_and_go.json").read_text(encoding="utf-8"))


@pytest.fixture
def schedules(golden: Path) -> Any:
    groups = json.loads((golden / "vilbert_tasks" / "optimizer_groups.json").read_text(encoding="utf-8"))
    return {name: groups[name]["schedules"] for name in ("first_release", "multi_task_release")}


def state_of(controller: Controller) -> dict[str, Any]:
    return {
        "in_stop": controller.paused,
        "best": controller.best,
        "bad": controller.bad,
        "cooldown": controller.cooldown,
    }


def settings_of(recorded: Mapping[str, Any], **changes: Any) -> StopAndGo:
    settings = recorded["settings"]
    return StopAndGo(
        patience=settings["patience"],
        threshold=settings["threshold"],
        resume_below=settings["continue_threshold"],
        cooldown=settings["cooldown"],
        **changes,
    )


def test_a_controller_pauses_and_resumes_a_task_as_in_the_release(recorded: Any) -> None:
    for sequence in recorded["sequences"]:
        controller = Controller(settings_of(recorded))
        for row in sequence:
            controller.record(row["score"])
            assert {"score": row["score"], **state_of(controller)} == row
    assert any(row["in_stop"] for sequence in recorded["sequences"] for row in sequence)


class Numbers:
    """A task's batches: the numbers of its own updates."""

    def __init__(self, length: int) -> None:
        self.length, self._epoch, self.at = length, 0, 0

    @property
    def epoch(self) -> int:
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch, self.at = value, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for number in range(self.at, self.length):
            self.at = number + 1
            yield torch.tensor([[1.0]]), torch.tensor(self.epoch * self.length + number)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.at = state["epoch"], state["at"]


class Replay:
    """A run of the engine on a dummy model whose validation scores are the recorded ones."""

    def __init__(self, lengths: Mapping[str, int], scores: Mapping[str, list[float]], turns: Turns) -> None:
        self.turns, self.scores = turns, {name: iter(values) for name, values in scores.items()}
        self.last = {name: values[-1] for name, values in scores.items()}
        self.batches = TurnBatches({name: Numbers(length) for name, length in lengths.items()}, turns)
        self.trained: list[list[Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.traces: dict[str, list[dict[str, Any]]] = {name: [] for name in lengths}

    def run(self, config: TrainConfig, log: Path | None = None) -> None:
        model = nn.Linear(1, 1)

        def step(batch: Any, labelled: Any) -> Loss:
            name, number = labelled
            iteration, expected = self.turns.stretch[self.batches.state_dict()["done"] - 1]
            assert name == expected
            assert number == sum(other == name for _, other in self.trained), "each task reads its own batches in order"
            self.trained.append([iteration, name])
            return Loss.mean("loss", model(batch))

        def validate() -> Mapping[str, float]:
            self.turns.validate(self._score)
            return {"mean": 0.0}

        with Log(log) as lines:
            fit(
                model, step, self.batches, config=config, log=lines, validate=validate,
                pace=None if self.turns.stop_and_go is None else self.turns,
            )  # fmt: skip

    def _score(self, name: str) -> float:
        score = next(self.scores[name], self.last[name])
        iteration = self.turns.state_dict()["first"] - 1
        self.evaluations.append(
            {"task": name, "iteration": iteration, "after_updates": len(self.trained), "score": score}
        )
        return score


def turns_of(run: Mapping[str, Any], stop_and_go: StopAndGo | None) -> Turns:
    lengths, epochs = run["iterations_per_epoch_of_each_task"], run["num_train_epochs"]
    own = TASKS["vqa"].epochs  # of every task in the runs
    longest = max(lengths.values())
    per_epoch = int(own * longest * run["train_iter_multiplier"] / epochs)
    return Turns(lengths, epochs=epochs, iterations_per_epoch=per_epoch, stop_and_go=stop_and_go)


def config_of(lr: float = 2e-5, **changes: Any) -> TrainConfig:
    return TrainConfig(optim=multitask_optim(lr, {}), metric="mean", direction="max", log_every=1, **changes)


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_trains_and_validates_the_tasks_in_the_iterations_of_the_release(recorded: Any, number: int) -> None:
    run = recorded["trainer_runs"][number]
    assert run["error"] is None
    stop_and_go = settings_of(recorded, every=run["train_iter_gap"], reset_after=RESETS)
    turns = turns_of(run, stop_and_go)
    replay = Replay(run["iterations_per_epoch_of_each_task"], run["validation_scores"], turns)
    for name, controller in turns.controllers.items():
        _trace(controller, replay.traces[name], turns)
    replay.run(config_of())
    assert replay.trained == run["trained_iteration_and_task"]
    assert len(replay.trained) == run["updates"]
    assert replay.evaluations == run["evaluations"]
    for name, known in run["controllers"].items():
        assert [pytest.approx(row) for row in replay.traces[name]] == known["trace"], name
        assert turns.controllers[name].paused == known["in_stop_at_end"]


def _trace(controller: Controller, trace: list[dict[str, Any]], turns: Turns) -> None:
    """Write down what happens to a controller, in the words of the recording."""
    record, reset, resets = controller.record, controller.reset, iter(sorted(turns.resets))

    def recording(score: float) -> None:
        record(score)
        trace.append({"score": score, **state_of(controller), "iteration": turns.state_dict()["first"] - 1})

    def resetting() -> None:
        reset()
        trace.append({"reset": True, "iteration": next(resets)})

    controller.record, controller.reset = recording, resetting  # type: ignore[method-assign]


def test_a_run_without_resets_is_another_one(recorded: Any) -> None:
    run = recorded["trainer_runs"][0]
    turns = turns_of(run, settings_of(recorded, every=run["train_iter_gap"]))
    replay = Replay(run["iterations_per_epoch_of_each_task"], run["validation_scores"], turns)
    replay.run(config_of())
    assert replay.trained != run["trained_iteration_and_task"]


@pytest.mark.parametrize(
    "name",
    [
        "warmup_linear, one task (README command)",
        "warmup_linear, one task that stops improving",
        "warmup_linear, two tasks",
    ],
)
def test_the_rate_of_every_update_is_that_of_the_release(
    recorded: Any, schedules: Any, tmp_path: Path, name: str
) -> None:
    """The schedule advances once an iteration, behind its first update, and not where every task is paused."""
    run = schedules["multi_task_release"][name]
    lengths = run["iterations_per_epoch"]
    arguments = dict(zip(run["arguments"][::2], run["arguments"][1::2], strict=True))
    epochs = int(arguments.get("--num_train_epochs", 20))
    shape = {"iterations_per_epoch_of_each_task": lengths, "num_train_epochs": epochs, "train_iter_multiplier": 1.0}
    turns = turns_of(shape, settings_of(recorded, reset_after=RESETS))
    rising = [float(number + 1) for number in range(1000)]
    scores = run.get("validation_scores", dict.fromkeys(lengths, rising))
    replay = Replay(lengths, scores, turns)
    replay.run(config_of(run["optimizer_arguments"]["lr"]), tmp_path / "log.jsonl")
    rates = [line["lr"] for line in read(tmp_path / "log.jsonl") if line["kind"] == "train"]
    assert len(rates) == run["updates"]
    assert rates == pytest.approx(run["lr_rest"], rel=1e-6, abs=1e-13)
    if "iteration_and_task_of_each_backward" in run:
        assert replay.trained == run["iteration_and_task_of_each_backward"]
    if "evaluations" in run:
        assert replay.evaluations == run["evaluations"]


def test_both_tasks_of_the_first_release_are_trained_in_every_iteration(schedules: Any, tmp_path: Path) -> None:
    run = schedules["first_release"]["mannul, two tasks trained in turn"]
    lengths = run["iterations_per_epoch"]
    shape = {"iterations_per_epoch_of_each_task": lengths, "num_train_epochs": 20, "train_iter_multiplier": 1.0}
    replay = Replay(lengths, {name: [0.5] for name in lengths}, turns_of(shape, None))
    published = PUBLISHED["vilbert-vcr-joint"]().train
    replay.run(
        replace(published, log_every=1, optim=replace(published.optim, weight_decay=0.0)), tmp_path / "log.jsonl"
    )
    assert replay.trained == run["iteration_and_task_of_each_backward"]
    assert len(replay.evaluations) == 20 * len(lengths)
    rates = [line["lr"] for line in read(tmp_path / "log.jsonl") if line["kind"] == "train"]
    assert rates == pytest.approx(run["lr_rest"], rel=1e-6, abs=1e-13)
