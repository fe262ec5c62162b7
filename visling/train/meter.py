"""Losses between log lines: kept on the device, summed when they are read."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from visling.train.exchange import gather
from visling.train.log import Log
from visling.train.not_finite import NotFiniteError
from visling.train.state import State, Sums
from visling.types import Batch, Loss


class Meter:
    """Losses since the last log line; they stay on the device until they are read."""

    def __init__(self, sums: Sums) -> None:
        self._sums = sums
        self._waiting: list[tuple[int, Loss, int]] = []
        self._clock = time.monotonic()

    def add(self, step: int, loss: Loss, examples: int) -> None:
        """Add one micro-step of update `step`."""
        self._waiting.append((step, loss, examples))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for batches."""
        yield

    def skip(self) -> None:
        """Leave the time since the last read out of the training time."""
        self._clock = time.monotonic()

    def read(self, step: int) -> None:
        """Sum up the losses that were added, up to update `step`.

        Raises:
            NotFiniteError: a loss was not finite.
        """
        waiting = [entry for entry in self._waiting if entry[0] <= step]
        self._waiting = []
        tensors = [
            t
            for _, loss, _ in waiting
            for t in (loss.value, *(value for part in loss.parts.values() for value in part))
        ]
        numbers = iter(
            torch.stack([t.detach().to(tensors[0].device, torch.float64) for t in tensors]).tolist() if tensors else []
        )
        bad: tuple[int, dict[str, float]] | None = None
        for at, loss, examples in waiting:
            value = next(numbers)
            parts = {name: (next(numbers), next(numbers)) for name in loss.parts}
            if not math.isfinite(value) and bad is None:
                bad = at, {name: _divide(*part) for name, part in parts.items()}
            self._sums.loss += value
            self._sums.steps += 1
            self._sums.examples += examples
            for name, (amount, count) in parts.items():
                part = self._sums.parts.setdefault(name, [0.0, 0.0])
                part[0] += amount
                part[1] += count
        self._sums.seconds += time.monotonic() - self._clock
        self._clock = time.monotonic()
        everywhere = [entry for entry in gather(bad) if entry is not None]
        if everywhere:
            step, parts = min(everywhere, key=itemgetter(0))
            raise NotFiniteError(
                step,
                parts,
                "The weights have been corrupted since that step; the saved state, if any, is an earlier one.",
                own=bad is not None and bad[0] == step,
            )

    def report(self, log: Log, state: State, *, epoch: int, lr: float, seconds: float) -> None:
        """Write a training line about all losses read so far, over all processes, and start over."""
        everyone = gather(self._sums)
        steps = sum(sums.steps for sums in everyone)
        parts: dict[str, list[float]] = {}
        for sums in everyone:
            for name, (amount, count) in sums.parts.items():
                part = parts.setdefault(name, [0.0, 0.0])
                part[0] += amount
                part[1] += count
        spent = max(self._sums.seconds, 1e-9)
        updates = state.step - state.logged
        log.train(
            step=state.step,
            epoch=epoch,
            loss=sum(sums.loss for sums in everyone) / steps,
            parts={name: _divide(*part) for name, part in parts.items() if part[1]},  # not those without a target
            lr=lr,
            examples_per_second=sum(sums.examples for sums in everyone) / spent,
            seconds=seconds,
            seconds_per_step=spent / updates,
        )
        state.logged, state.sums = state.step, Sums()
        self._sums = state.sums


def count_examples(item: tuple[Any, Any]) -> int:
    """Examples in a pair: groups of rows of a Batch, items of a list, else the length of the first tensor."""
    batch = item[0]
    if isinstance(batch, Batch):
        rows = batch.text.ids if batch.text.row is None else batch.text.row
        return int(rows.shape[0]) // batch.group
    if isinstance(batch, list):
        return len(batch)
    return next(len(leaf) for leaf in pytree.tree_leaves(item) if isinstance(leaf, Tensor))


def _divide(amount: float, count: float) -> float:
    return amount / max(count, 1.0)
