"""What a log line reports: losses, which are kept on the device and summed when they are read, and how the machine was
used."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from visling import runtime
from visling.train.exchange import gather
from visling.train.log import Log, Machine, format_rate
from visling.train.memory import take_peak_memory
from visling.train.not_finite import NotFiniteError
from visling.train.rate import measure_rate
from visling.train.state import RunFolder, State, Sums
from visling.types import Batch, Loss

CountProducts = Callable[[Any], float]
"""Floating-point operations of the matrix products that a micro-step on a batch and its targets needs, both as they
come from the loader, on the host."""


class Meter:
    """Losses since the last log line, which stay on the device until they are read, and how the machine was used.

    Every process makes one at the same time.

    Args:
        products: None = not known; then neither is how much of the device's rate is used, which is not measured.
    """

    def __init__(
        self, sums: Sums, device: torch.device, precision: runtime.Precision, products: CountProducts | None = None
    ) -> None:
        self._sums, self._device, self._products = sums, device, products
        self._rate = None if products is None else measure_rate(device, precision)
        self._waiting: list[tuple[int, Loss, int, float]] = []
        take_peak_memory(device)  # of what came before the run
        self._clock = time.monotonic()

    def announce(self, log: Log, run_folder: RunFolder | None, step: int) -> None:
        """Report the rate of matrix products, if it was measured, at the step with which the run begins."""
        if self._rate is None:
            return
        if run_folder is not None:
            run_folder.record({"product_rate": self._rate})
        where = "" if runtime.world_size() == 1 else f" in all {runtime.world_size()} processes together"
        log.event(f"matrix products measured at {format_rate(self._rate)}{where}", step=step)

    def add(self, step: int, loss: Loss, examples: int, flops: float) -> None:
        """Add one micro-step of update `step`.

        Args:
            flops: from `count_products`.
        """
        self._waiting.append((step, loss, examples, flops))

    def count_products(self, item: Any) -> float:
        """Operations that a micro-step needs whose batch and targets are `item`, still on the host; 0 if that is not
        known."""
        return 0.0 if self._products is None else self._products(item)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for the loader."""
        began = time.monotonic()
        yield
        self._sums.waited += time.monotonic() - began

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
            for _, loss, *_ in waiting
            for t in (loss.value, *(value for part in loss.parts.values() for value in part))
        ]
        numbers = iter(
            torch.stack([t.detach().to(tensors[0].device, torch.float64) for t in tensors]).tolist() if tensors else []
        )
        bad: tuple[int, dict[str, float]] | None = None
        for at, loss, examples, flops in waiting:
            value = next(numbers)
            parts = {name: (next(numbers), next(numbers)) for name in loss.parts}
            if not math.isfinite(value) and bad is None:
                bad = at, {name: _divide(*part) for name, part in parts.items()}
            self._sums.loss += value
            self._sums.steps += 1
            self._sums.examples += examples
            self._sums.flops += flops
            for name, (amount, count) in parts.items():
                part = self._sums.parts.setdefault(name, [0.0, 0.0])
                part[0] += amount
                part[1] += count
        self._sums.seconds += time.monotonic() - self._clock
        self._clock = time.monotonic()
        everywhere = [entry for entry in gather(bad) if entry is not None]
        if everywhere:
            first = min(everywhere, key=itemgetter(0))
            raise NotFiniteError(
                *first,
                "The weights have been corrupted since that step; the saved state, if any, is an earlier one.",
                own=bad is not None and bad[0] == first[0],
            )

    def report(self, log: Log, state: State, *, epoch: int, lr: float, seconds: float) -> None:
        """Write a training line about all losses read so far, over all processes, and start over."""
        gathered = gather((self._sums, take_peak_memory(self._device)))
        everyone, memory = [sums for sums, _ in gathered], [peak for _, peak in gathered if peak is not None]
        total = everyone[0].add(everyone[1:])
        spent = max(self._sums.seconds, 1e-9)
        updates = state.step - state.logged
        machine = Machine(
            examples_per_second=total.examples / spent,
            data_wait=max(sums.waited / max(sums.seconds, 1e-9) for sums in everyone),
            memory=max(memory, default=None),
            utilisation=None if self._rate is None else total.flops / spent / self._rate,
            product_rate=self._rate,
        )
        log.train(
            step=state.step,
            epoch=epoch,
            loss=total.loss / total.steps,
            parts={name: _divide(*part) for name, part in total.parts.items() if part[1]},  # not those without a target
            lr=lr,
            machine=machine,
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
