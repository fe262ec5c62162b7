"""ViLBERT's multi-task trainer: the controllers of stop-and-go, whose turn it is, and the rates, as recorded from the
release's training scripts on a dummy model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetuning_schedules import Recorded, iterations_per_epoch, read_vilbert
from torch import nn

from visling.recipes.multitask import PUBLISHED
from visling.recipes.vilbert_tasks import multitask_optim
from visling.train import engine
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


def state_of(controller: Controller) -> dict[str, Any]:
    return {
        "in_stop": controller.paused,
        "best": controller.best,
        "bad": controller.bad,
        "cooldown": controller.cooldown,
    }


def settings_of(recorded: Mapping[str, Any]) -> StopAndGo:
    settings = recorded["settings"]
    return StopAndGo(
        patience=settings["patience"],
        threshold=settings["threshold"],
        resume_below=settings["continue_threshold"],
        cooldown=settings["cooldown"],
    )


def settings_of_script(recorded: Mapping[str, Any]) -> StopAndGo:
    """The controllers' settings in the runs. The script has its numbers in its code, and our defaults are those: they
    need not be the numbers with which the single controllers were recorded."""
    settings = (settings_of(recorded), StopAndGo())
    fitting = [each for each in settings if all(explains(each, run) for run in recorded["trainer_runs"])]
    assert fitting, "no controller of ours pauses and resumes as those of the runs"
    return fitting[0]


def explains(settings: StopAndGo, run: Mapping[str, Any]) -> bool:
    """Whether controllers with these settings go through the states of a run's, given its scores."""
    for known in run["controllers"].values():
        controller = Controller(settings)
        for row in known["trace"]:
            if "reset" in row:
                controller.reset()
                continue
            controller.record(row["score"])
            if state_of(controller) != pytest.approx({name: row[name] for name in state_of(controller)}):
                return False
    return True


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
        self.place = (-1, 0)
        """First iteration of the stretch, and the number of the update in it."""
        self.trained: list[list[Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.traces: dict[str, list[dict[str, Any]]] = {name: [] for name in lengths}

    def run(self, config: TrainConfig, log: Path | None = None) -> None:
        model = nn.Linear(1, 1)

        def step(batch: Any, labelled: Any) -> Loss:
            name, number = labelled
            first = self.turns.state_dict()["first"]
            self.place = (first, self.place[1] + 1 if self.place[0] == first else 0)
            iteration, expected = self.turns.stretch[self.place[1]]
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


def turns_of(recorded: Mapping[str, Any], run: Mapping[str, Any], **changes: Any) -> Turns:
    lengths, epochs = run["iterations_per_epoch_of_each_task"], run["num_train_epochs"]
    rule = replace(settings_of_script(recorded), every=run["train_iter_gap"], reset_after=RESETS)
    return Turns(
        lengths,
        epochs=epochs,
        iterations_per_epoch=iterations_per_epoch(lengths, epochs, run["train_iter_multiplier"]),
        stop_and_go=replace(rule, **changes),
    )


def config_of(lr: float = 2e-5, **changes: Any) -> TrainConfig:
    return TrainConfig(optim=multitask_optim(lr, {}), metric="mean", direction="max", log_every=1, **changes)


def test_a_run_trains_and_validates_the_tasks_in_the_iterations_of_the_release(recorded: Any) -> None:
    assert recorded["trainer_runs"]
    for run in recorded["trainer_runs"]:
        assert run["error"] is None
        turns = turns_of(recorded, run)
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


def test_batches_that_are_moved_ahead_do_not_change_the_order(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the next batch is taken while the last one is used, but none from beyond the next validation."""

    def move_ahead(items: Iterable[Any], device: torch.device) -> Iterator[Any]:
        ready: list[Any] = []
        for item in items:
            yield from ready
            ready = [item]
        yield from ready

    monkeypatch.setattr(engine, "move_ahead", move_ahead)
    run = recorded["trainer_runs"][0]
    turns = turns_of(recorded, run)
    replay = Replay(run["iterations_per_epoch_of_each_task"], run["validation_scores"], turns)
    replay.run(config_of())
    assert replay.trained == run["trained_iteration_and_task"]
    assert replay.evaluations == run["evaluations"]


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
    """Where a reset finds a task paused."""
    runs = [run for run in recorded["trainer_runs"] if _has_reset_of_a_pause(run)]
    if not runs:
        pytest.skip("no reset in these runs finds a task paused")
    for run in runs:
        turns = turns_of(recorded, run, reset_after=())
        replay = Replay(run["iterations_per_epoch_of_each_task"], run["validation_scores"], turns)
        replay.run(config_of())
        assert replay.trained != run["trained_iteration_and_task"]


def _has_reset_of_a_pause(run: Mapping[str, Any]) -> bool:
    """Whether a reset resumes a task for longer than until an iteration in which it would be trained anyway."""
    gap = run["train_iter_gap"]
    for known in run["controllers"].values():
        trace = known["trace"]
        for number, row in enumerate(trace):
            if "reset" not in row or not number or not trace[number - 1].get("in_stop", False):
                continue
            pauses = [after["iteration"] for after in trace[number + 1 :] if after.get("in_stop", False)]
            until = pauses[0] if pauses else trace[-1]["iteration"]
            if any(iteration % gap for iteration in range(row["iteration"] + 1, until + 1)):
                return True
    return False


def read_schedules(golden: Path, release: str) -> list[Recorded]:
    """Recorded runs of a release without accumulation."""
    return [run for run in read_vilbert(golden).values() if (run.release, run.accumulation) == (release, 1)]


def test_the_rate_of_every_update_is_that_of_the_release(golden: Path, recorded: Any, tmp_path: Path) -> None:
    """The schedule advances once an iteration, behind its first update, and not where every task is paused."""
    runs = [run for run in read_schedules(golden, "multi_task_release") if run.scheduler == "warmup_linear"]
    assert runs
    for number, run in enumerate(runs):
        known = run.values
        lengths = known["iterations_per_epoch"]
        shape = {
            "iterations_per_epoch_of_each_task": lengths,
            "num_train_epochs": run.epochs,
            "train_iter_multiplier": float(run.option("--train_iter_multiplier", "1")),
            "train_iter_gap": int(run.option("--train_iter_gap", "4")),
        }
        rising = [2.0**number for number in range(1000)]
        scores = known.get("validation_scores", dict.fromkeys(lengths, rising))
        replay = Replay(lengths, scores, turns_of(recorded, shape))
        log = tmp_path / f"log{number}.jsonl"
        replay.run(config_of(run.lr), log)
        rates = [line["lr"] for line in read(log) if line["kind"] == "train"]
        assert len(rates) == known["updates"]
        assert rates == pytest.approx(known["lr_rest"], rel=1e-6, abs=1e-13)
        if "iteration_and_task_of_each_backward" in known:
            assert replay.trained == known["iteration_and_task_of_each_backward"]
        if "evaluations" in known:
            assert replay.evaluations == known["evaluations"]


def test_both_tasks_of_the_first_release_are_trained_in_every_iteration(golden: Path, tmp_path: Path) -> None:
    runs = [run for run in read_schedules(golden, "first_release") if _has_two_tasks_of_one_length(run)]
    assert runs
    published = PUBLISHED["vilbert-vcr-joint"]().train
    for number, run in enumerate(runs):
        lengths = run.values["iterations_per_epoch"]
        turns = Turns(lengths, epochs=run.epochs, iterations_per_epoch=run.per_epoch, stop_and_go=None)
        replay = Replay(lengths, {name: [0.5] for name in lengths}, turns)
        optim, log = replace(published.optim, lr=run.lr, weight_decay=0.0), tmp_path / f"log{number}.jsonl"
        replay.run(replace(published, epochs=run.epochs, log_every=1, optim=optim), log)
        assert replay.trained == run.values["iteration_and_task_of_each_backward"]
        assert len(replay.evaluations) == run.epochs * len(lengths)
        rates = [line["lr"] for line in read(log) if line["kind"] == "train"]
        assert rates == pytest.approx(run.values["lr_rest"], rel=1e-6, abs=1e-13)


def _has_two_tasks_of_one_length(run: Recorded) -> bool:
    lengths = list(run.values["iterations_per_epoch"].values())
    return run.scheduler == "mannul" and len(lengths) == 2 and len(set(lengths)) == 1
