"""Several tasks trained in turn: whose turn it is, when a task that has stopped improving pauses, and their batches.

An iteration visits the tasks in their order, and each that is not paused makes an update of its own. With `StopAndGo` a
task is validated when its own epoch is complete, and what its score says changes the iterations after it, so the order
is known from one validation to the next: such a stretch is what the engine treats as an epoch.

Source   ViLBERT's multi-task release, `train_tasks.py` and `MultiTaskStopOnPlateau`; without `StopAndGo`, the first
         release's training of both VCR tasks. Recorded runs: tests/parity/test_vilbert_multitask.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from visling.errors import ConfigError, RunError
from visling.train.batches import Batches


@dataclass(frozen=True, kw_only=True)
class StopAndGo:
    """When a task pauses because its validation score has stopped improving, and when it is trained again.

    The defaults are those of ViLBERT's multi-task release.
    """

    patience: int = 1
    """Validations in a row without an improvement that change nothing; the next one pauses the task."""
    threshold: float = 0.001
    """An improvement is a score above best x (1 + threshold)."""
    resume_below: float = 0.005
    """A paused task is trained again once its score is below best x (1 - resume_below). A new best alone does not
    resume it."""
    cooldown: int = 1
    """Validations after a pause begins or ends that do not count, whatever they say."""
    every: int | None = 4
    """A paused task still makes an update in every so many-th iteration (release: `train_iter_gap`); None = none."""
    reset_after: tuple[int, ...] = ()
    """Epochs of the run after each of which all tasks are trained again and their best scores forgotten (release: 6 and
    8, one epoch after each drop of its default schedule, but under every schedule)."""

    def __post_init__(self) -> None:
        if self.patience < 0 or self.cooldown < 0 or self.threshold < 0:
            raise ConfigError(
                "stop_and_go.patience, cooldown and threshold must be 0 or more; found "
                f"{self.patience}, {self.cooldown}, {self.threshold}."
            )
        if not 0 <= self.resume_below < 1:
            raise ConfigError(f"stop_and_go.resume_below must lie in [0, 1); found {self.resume_below}.")
        if self.every is not None and self.every < 1:
            raise ConfigError(
                f"stop_and_go.every must be 1 or more; found {self.every}. To leave a paused task alone set it to none."
            )
        if any(epoch < 1 for epoch in self.reset_after):
            raise ConfigError(f"stop_and_go.reset_after counts epochs from 1; found {self.reset_after}.")


class Controller:
    """Whether one task is paused, by the scores that it has reached."""

    def __init__(self, settings: StopAndGo) -> None:
        self.settings = settings
        self.reset()

    def reset(self) -> None:
        """Forget all scores; the task is trained."""
        self.best: float | None = None
        self.bad = 0
        """Validations in a row without an improvement, outside the cooldown."""
        self.cooldown = 0
        """Validations that are still to be ignored."""
        self.paused = False

    def record(self, score: float) -> None:
        """Take a validation score; higher is better."""
        settings = self.settings
        if self.best is None or score > self.best * (1 + settings.threshold):
            self.best, self.bad = score, 0
        else:
            self.bad += 1
        if self.cooldown:
            self.cooldown, self.bad = self.cooldown - 1, 0
        if self.bad > settings.patience:
            self.paused, self.cooldown, self.bad = True, settings.cooldown, 0
        elif self.paused and score < self.best * (1 - settings.resume_below):
            self.paused, self.cooldown, self.bad = False, settings.cooldown, 0

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"best": self.best, "bad": self.bad, "cooldown": self.cooldown, "paused": self.paused}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.best, self.bad = state["best"], state["bad"]
        self.cooldown, self.paused = state["cooldown"], state["paused"]


class Turns:
    """Which task each update of a run trains, and after which updates which tasks are validated.

    Args:
        lengths: task -> updates in its own epoch, in the order in which an iteration visits the tasks.
        epochs: of the run.
        iterations_per_epoch: of the run.
        stop_and_go: None = every task is trained in every iteration, and all are validated after each epoch of the run.
    """

    def __init__(
        self, lengths: Mapping[str, int], *, epochs: int, iterations_per_epoch: int, stop_and_go: StopAndGo | None
    ) -> None:
        self.lengths, self.iterations_per_epoch, self.stop_and_go = dict(lengths), iterations_per_epoch, stop_and_go
        self.iterations = epochs * iterations_per_epoch
        self.controllers = {} if stop_and_go is None else {name: Controller(stop_and_go) for name in lengths}
        self.due: list[str] = []
        """Tasks whose validation the end of the last stretch asks for; none while a stretch lasts."""
        self.latest: dict[str, float] = {}
        """Task -> its last validation score, if it has one that is a number."""
        self.best: dict[str, float] = {}
        """Task -> its highest validation score."""
        self._first = 0
        """First iteration of the stretch."""
        self._trained = 0
        """Iterations before the stretch in which some task made an update."""
        if not iterations_per_epoch:
            raise ConfigError(
                f"an epoch of the run has no iteration: its tasks have {self.lengths} batches. Use fewer train.epochs "
                "or a larger multiplier."
            )

    @property
    def most(self) -> int:
        """Updates of the run if no task ever pauses."""
        return self.iterations * len(self.lengths)

    @property
    def complete(self) -> bool:
        """Whether all iterations have passed."""
        return self._first >= self.iterations

    @property
    def resets(self) -> frozenset[int]:
        """Iterations at whose end all tasks are trained again."""
        after = () if self.stop_and_go is None else self.stop_and_go.reset_after
        return frozenset(epoch * self.iterations_per_epoch - 1 for epoch in after)

    @cached_property
    def stretch(self) -> list[tuple[int, str]]:
        """(iteration, task) of each update until the next validation; empty where every task is paused."""
        assert not self.due, f"not validated yet: {self.due}"
        return [
            (iteration, name)
            for iteration in range(self._first, self._find_last() + 1)
            for name in self.lengths
            if self._has_turn(name, iteration)
        ]

    def share(self, update: int) -> float:
        """Share of the run that has passed before update number `update` of the stretch: the schedule of the learning
        rate reads it.

        It advances with the first update of an iteration, and not in iterations in which every task is paused, as in
        the release.
        """
        started = 0 if update == 0 else self._started[update - 1]
        return (self._trained + started) / self.iterations

    def epoch(self, update: int) -> int:
        """Epoch of the run, from 1, in which `update` updates of the stretch have been made."""
        iteration = self.stretch[update - 1][0] if update else max(self._first - 1, 0)
        return iteration // self.iterations_per_epoch + 1

    def advance(self) -> None:
        """Go to the end of the stretch; `due` then names the tasks to validate."""
        last = self._find_last()
        self._trained += self._started[-1] if self._started else 0
        if any(self._first <= iteration < last for iteration in self.resets):
            self._reset()
        self._first = last + 1
        self.due = [name for name in self.lengths if self._is_due(name, last)]
        self._forget_stretch()

    def finish(self) -> None:
        """End the run here: the next validation is of all tasks, as it is at the planned end."""
        if not self.complete:
            self.due = []

    def validate(self, score: Callable[[str], float]) -> None:
        """Take the scores of the tasks that are `due`, and of those that come due while all tasks are paused: nothing
        is trained before that. Where none is due the run has ended: take those of all tasks.

        Args:
            score: validation score of a task, as its model is now.
        """
        if not self.due:
            for name in self.lengths:
                self._take(name, score(name))
        while self.due:
            for name in self.due:
                value = score(name)
                self._take(name, value)
                if self.controllers:
                    self.controllers[name].record(value)
            self.due = []
            if self._first - 1 in self.resets:
                self._reset()
            if not self.complete and not self.stretch:
                self.advance()

    def _take(self, name: str, score: float) -> None:
        if not math.isnan(score):
            self.latest[name] = score
            self.best[name] = max(score, self.best.get(name, score))

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "latest": dict(self.latest),
            "best": dict(self.best),
            "first": self._first,
            "trained": self._trained,
            "due": list(self.due),
            "controllers": {name: controller.state_dict() for name, controller in self.controllers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.latest, self.best = dict(state["latest"]), dict(state["best"])
        self._first, self._trained, self.due = state["first"], state["trained"], list(state["due"])
        for name, controller in self.controllers.items():
            controller.load_state_dict(state["controllers"][name])
        self._forget_stretch()

    @cached_property
    def _started(self) -> list[int]:
        """Iterations of the stretch that have begun after each of its updates."""
        begins = (
            number == 0 or iteration != self.stretch[number - 1][0]
            for number, (iteration, _) in enumerate(self.stretch)
        )
        return list(accumulate(begins, initial=0))[1:]

    def _forget_stretch(self) -> None:
        """Make the next reader of the stretch plan it anew."""
        self.__dict__.pop("stretch", None)
        self.__dict__.pop("_started", None)

    def _find_last(self) -> int:
        """Last iteration of the stretch: the next one after which a task is validated."""
        return next(
            iteration
            for iteration in range(self._first, self.iterations)
            if any(self._is_due(name, iteration) for name in self.lengths)
        )

    def _is_due(self, name: str, iteration: int) -> bool:
        if iteration == self.iterations - 1:
            return True
        if self.stop_and_go is None:
            return (iteration + 1) % self.iterations_per_epoch == 0
        # Release: by the number of the iteration, which counts from 0, so the first epoch is one update longer
        return iteration > 0 and iteration % self.lengths[name] == 0

    def _has_turn(self, name: str, iteration: int) -> bool:
        if self.stop_and_go is None or not self.controllers[name].paused:
            return True
        every = self.stop_and_go.every
        awake = any(self._first <= reset < iteration for reset in self.resets)
        return awake or (every is not None and iteration % every == 0)

    def _reset(self) -> None:
        for controller in self.controllers.values():
            controller.reset()


class TurnBatches:
    """The batches of several tasks in the order of their turns, each as (batch, (task, targets)).

    One epoch of the engine is a stretch between two validations: the loaders of the tasks go on from one to the next,
    each through epochs of its own.

    Args:
        loaders: task -> its batches.
        accumulation: batches per update, which all are of one task.
    """

    def __init__(self, loaders: Mapping[str, Batches], turns: Turns, accumulation: int = 1) -> None:
        self.loaders, self.turns, self.accumulation = loaders, turns, accumulation
        self._epoch = self._done = 0
        self._taken = dict.fromkeys(loaders, 0)
        """Task -> batches of its loader's epoch that have been handed out."""
        self._open: dict[str, Iterator[tuple[Any, Any]]] = {}

    @property
    def epoch(self) -> int:
        """Number of the stretch; the only other one that can be set is the next."""
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        if value == self._epoch:
            return
        assert value == self._epoch + 1, f"a stretch follows from the one before it: {self._epoch}, then {value}"
        self.turns.advance()
        self._epoch, self._done = value, 0

    def __len__(self) -> int:
        """Batches of the stretch."""
        return len(self.turns.stretch) * self.accumulation

    def __iter__(self) -> Iterator[tuple[Any, tuple[str, Any]]]:
        for number in range(self._done, len(self)):
            _, name = self.turns.stretch[number // self.accumulation]
            batch, targets = self._next(name)
            self._done += 1
            yield batch, (name, targets)

    def state_dict(self) -> dict[str, Any]:
        """Position of all tasks after the last update whose batches were handed out, counted in updates."""
        return {
            "epoch": self._epoch,
            "done": self._done // self.accumulation,
            "turns": self.turns.state_dict(),
            "taken": {name: taken // self.accumulation for name, taken in self._taken.items()},
            "loaders": {name: loader.state_dict() for name, loader in self.loaders.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move to a position.

        Raises:
            RunError: it is one of other tasks.
        """
        if (saved := list(state["taken"])) != list(self._taken):
            raise RunError(
                f"cannot resume: the run was started with the tasks {', '.join(saved)}, now they are "
                f"{', '.join(self._taken)}. Resume with the same tasks in the same order."
            )
        self._epoch, self._done = state["epoch"], state["done"] * self.accumulation
        self._taken = {name: taken * self.accumulation for name, taken in state["taken"].items()}
        self.turns.load_state_dict(state["turns"])
        self._open = {}
        for name, loader in self.loaders.items():
            loader.load_state_dict(state["loaders"][name])

    def _next(self, name: str) -> tuple[Any, Any]:
        """The next batch of a task, of its next epoch if the last one is over."""
        loader = self.loaders[name]
        if self._taken[name] == len(loader):
            loader.epoch += 1
            self._taken[name] = 0
        if name not in self._open:
            self._open[name] = iter(loader)
        item = next(self._open[name])
        self._taken[name] += 1
        if self._taken[name] == len(loader):
            over = self._open.pop(name)
            if isinstance(over, Generator):
                over.close()  # the loader must release its last batches before the next epoch is set
        return item
