"""Learning rates of the official fine-tunings of ViLBERT and VL-BERT, update by update, as our optimisers apply them
(`golden/{vilbert,vlbert}_tasks/optimizer_groups.json`).

A rate is measured, not read: without memory of earlier gradients, an update moves a parameter by its rate. The updates
in which the multi-task release makes a mistake are left out, see `FLAWS`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from visling.train.optim import OptimConfig, apply_schedule, build_optimizer
from visling.train.schedule import Plateau, PlateauState, Schedule

HEAD_RATE = 1e-4
"""Of ViLBERT's `vil_*` parameters, whatever the rate of the others."""
EPOCHS: Mapping[str, int] = {"TASK5": 10, "TASK6": 10}
"""Epochs in the multi-task release's task file, where they are not 20."""
OURS = Path(__file__).parents[1] / "golden"
"""The recording in which every rule makes a difference; in another, scores may rise too steadily for that."""
FLAWS: Mapping[str, str] = {
    "mannul": "every epoch that begins within the warm-up begins at the full rate",
    "cosine_warm": "the very first update has the full rate",
}
"""Scheduler of the multi-task release -> what follows from making it after that of the warm-up."""


class Net(nn.Module):
    """One number at the rate of the head, one at that of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = nn.Parameter(torch.zeros(()))
        self.vil_prediction = nn.Parameter(torch.zeros(()))


class Measured:
    """A network whose updates show their rates."""

    def __init__(self, config: OptimConfig, total: int, per_epoch: float) -> None:
        self.net = Net()
        plain = replace(config, betas=(0.0, 0.0), eps=1e-30, momentum=0.0, weight_decay=0.0, clip="none")
        self.optimizer, self.schedule = build_optimizer(self.net, plain, total, per_epoch=per_epoch)

    def update(self, done: int, schedule: Schedule, level: float = 1.0) -> tuple[float, float]:
        """Rates of the rest and of the head in the update after `done` others."""
        for parameter in self.net.parameters():
            parameter.data.zero_()
            parameter.grad = torch.ones(())
        apply_schedule(self.optimizer, schedule, done, level=level)
        self.optimizer.step()
        rest, head = (-float(parameter.detach()) for parameter in self.net.parameters())
        return rest, head


@dataclass(frozen=True)
class Recorded:
    """One run of ViLBERT's official training script on a dummy model."""

    release: str
    values: Mapping[str, Any]

    def option(self, name: str, default: str) -> str:
        """Value of an option of the script."""
        given: list[str] = self.values["arguments"]
        return given[given.index(name) + 1] if name in given else default

    @property
    def scheduler(self) -> str:
        return self.option("--lr_scheduler", "mannul")

    @property
    def lr(self) -> float:
        """Peak rate of the rest."""
        return float(self.values["optimizer_arguments"]["lr"])

    @property
    def accumulation(self) -> int:
        return int(self.values["accumulation"])

    @property
    def epochs(self) -> int:
        """Steps of the scheduler that counts epochs."""
        return int(self.option("--num_train_epochs", "20"))

    @property
    def per_epoch(self) -> int:
        """Iterations between two of them: in the multi-task release, those of the task file, cut into `epochs`."""
        tasks = self.values["iterations_per_epoch"]
        if self.release == "first_release":
            return int(max(tasks.values()))
        return iterations_per_epoch(tasks, self.epochs, float(self.option("--train_iter_multiplier", "1")))

    @property
    def total(self) -> int:
        """What the warm-up is a tenth of."""
        return self.per_epoch * self.epochs // self.accumulation

    def updates(self) -> list[tuple[int, int]]:
        """Of each update its iteration and how far the schedule has counted before it: updates in the first release,
        iterations in the multi-task release, where the first task of an iteration moves the count."""
        if "iteration_and_task_of_each_backward" not in self.values:
            per_epoch, size = self.per_epoch // self.accumulation, self.accumulation
            return [
                (done // per_epoch * self.per_epoch + done % per_epoch * size, done)
                for done in range(self.values["updates"])
            ]
        iterations = [each for each, _ in self.values["iteration_and_task_of_each_backward"]]
        if self.release == "first_release":
            return [(iteration, done) for done, iteration in enumerate(iterations)]
        return [(iteration, len(set(iterations[:done]))) for done, iteration in enumerate(iterations)]

    def is_flawed(self, count: int) -> bool:
        if self.release == "first_release" or count >= 0.1 * self.total:
            return False
        begins = count % (self.per_epoch // self.accumulation) == 0 if self.scheduler == "mannul" else count == 0
        return self.scheduler in FLAWS and begins

    def config(self) -> OptimConfig:
        """Our settings for it."""
        constant = {"schedule": "warmup_constant"}
        cosine = {"schedule": "warmup_cosine", "cosine_period": "run"}
        shape: dict[str, Any] = {
            ("first_release", "mannul"): {**constant, "drop_epochs": (12, 16), "drop_factor": 0.1},
            ("first_release", "automatic"): {**constant, "plateau": Plateau()},
            ("multi_task_release", "warmup_linear"): {"schedule": "warmup_linear"},
            ("multi_task_release", "mannul"): {**constant, "drop_epochs": (5, 7), "drop_factor": 0.2},
            ("multi_task_release", "automatic"): {**constant, "plateau": Plateau()},
            ("multi_task_release", "cosine"): cosine,
            ("multi_task_release", "cosine_warm"): cosine,
        }[self.release, self.scheduler]
        lr = self.lr
        name: Any = "bert_adam" if self.release == "first_release" else "release_adamw"
        return OptimConfig(
            name=name, lr=lr, warmup_share=0.1, bias_correction=False, rates={"vil_prediction": HEAD_RATE / lr}, **shape
        )


def iterations_per_epoch(tasks: Mapping[str, int], epochs: int, multiplier: float) -> int:
    """Of a run of the multi-task script: `epochs` of the run share the epochs that the task file has for its last task,
    in iterations of its longest one."""
    whole = EPOCHS.get(list(tasks)[-1], 20)
    return max(int(whole * count * multiplier / epochs) for count in tasks.values())


def read_vilbert(golden: Path) -> dict[str, Recorded]:
    found = json.loads((golden / "vilbert_tasks" / "optimizer_groups.json").read_text(encoding="utf-8"))
    return {
        f"{release}: {name}": Recorded(release, values)
        for release, described in found.items()
        for name, values in described["schedules"].items()
    }


def measure(run: Recorded, config: OptimConfig) -> list[tuple[float, float]]:
    """Our rates, at every update."""
    updates = run.updates()
    measured = Measured(config, run.total, run.per_epoch // run.accumulation)
    schedule = measured.schedule
    if len(run.values["iterations_per_epoch"]) > 1:  # an epoch has as many updates as the script made of its tasks
        ends = [epoch * run.per_epoch for epoch in config.drop_epochs]
        schedule = replace(
            schedule, drops=tuple(next(count for iteration, count in updates if iteration >= end) for end in ends)
        )
    scores = {each["after_updates"]: each["score"] for each in run.values.get("evaluations", [])}
    plateau, found = PlateauState(), []
    for number, (_, count) in enumerate(updates, 1):
        found.append(measured.update(count, schedule, plateau.level))
        if config.plateau is not None and number in scores:
            plateau.add(scores[number], config.plateau, "max")
    return found


def compare(run: Recorded, found: list[tuple[float, float]]) -> None:
    expected = np.array([run.values["lr_rest"], run.values["lr_head"]]).T
    kept = [not run.is_flawed(count) for _, count in run.updates()]
    np.testing.assert_allclose(np.array(found)[kept], expected[kept], rtol=1e-6, atol=1e-14)
    peak = [run.lr, HEAD_RATE]
    for rates in expected[np.logical_not(kept)]:
        np.testing.assert_allclose(rates, peak, err_msg="the release's mistake is not where it was")


def test_rates_of_vilbert(golden: Path) -> None:
    runs = read_vilbert(golden)
    assert {run.scheduler for run in runs.values()} >= {"mannul", "automatic", "warmup_linear"}
    for name, run in runs.items():
        try:
            compare(run, measure(run, run.config()))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize(
    ("scheduler", "change"),
    [
        ("mannul", {"drop_epochs": (12, 17)}),
        ("mannul", {"drop_factor": 0.2}),
        ("mannul", {"warmup_share": 0.2}),
        ("mannul", {"evaluate": "after"}),
        ("mannul", {"rates": {}}),
        ("automatic", {"plateau": Plateau(patience=2)}),
        ("automatic", {"plateau": Plateau(cooldown=0)}),
        ("automatic", {"plateau": Plateau(threshold=0.0)}),
        ("automatic", {"plateau": Plateau(factor=0.1)}),
    ],
)
def test_other_rules_are_noticed(scheduler: str, change: dict[str, Any]) -> None:
    run = next(
        run for run in read_vilbert(OURS).values() if (run.release, run.scheduler) == ("first_release", scheduler)
    )
    found = measure(run, replace(run.config(), **change))
    with pytest.raises(AssertionError):
        compare(run, found)


def test_rates_of_vlbert(golden: Path) -> None:
    """Of each published config some hundred updates, from the first to the last."""
    tasks = json.loads((golden / "vlbert_tasks" / "optimizer_groups.json").read_text(encoding="utf-8"))
    assert {task["optimizer"] for task in tasks.values()} == {"AdamW", "SGD"}
    for name, task in tasks.items():
        config = OptimConfig(
            name="sgd" if task["optimizer"] == "SGD" else "release_adamw",
            lr=task["base_lr"],
            bias_correction=False,
            schedule={"triangle": "triangle", "step": "warmup_constant"}[task["schedule"]],  # type: ignore[arg-type]
            warmup_steps=task["warmup_updates"],
            evaluate="after",
            drop_epochs=tuple(task["lr_step_epochs"]),
            drop_factor=task["lr_factor_at_step"] or 1.0,
        )
        measured = Measured(config, task["updates"], task["batches_per_epoch"] / task["accumulation"])
        assert list(measured.schedule.drops) == task["milestones"]
        numbers, expected = zip(*task["lr_of_update"], strict=True)
        found = [measured.update(number - 1, measured.schedule)[0] for number in numbers]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-14, err_msg=name)
