"""Batches of an epoch in an order that depends on (seed, epoch) alone, prepared ahead by one thread.

A chunk is a few global batches' worth of examples. Its examples are built, sorted by text length and cut into batches,
which are then shuffled: rows of a batch have similar lengths, and nothing is padded for long. Every process goes
through the same chunks and takes its share of each global batch.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from visling import runtime
from visling.data.batches.collate import Collator
from visling.errors import ConfigError, DataError
from visling.types import Batch, Example, Targets

_ORDER, _CHUNK = 0x6F72646572, 0x6368756E6B
"""Keys that keep the streams of order and chunk shuffling apart from those of examples."""


class Source(Protocol):
    """Examples by number; randomness comes only from the generator passed in."""

    def __len__(self) -> int: ...
    def example(self, index: int, rng: np.random.Generator) -> Example: ...


Indexed = tuple[NDArray[np.int64], Batch, Targets]


class Loader:
    """Iterates over one epoch's `(Batch, Targets)`; restart it anywhere with `state_dict` and `load_state_dict`.

    Set `epoch` before each pass: order and examples follow from (seed, epoch). A generator for (seed, epoch, index)
    makes and masks each example, so neither process count nor restarts change it.

    Args:
        collator: makes the batches of the examples.
        batch_size: examples per batch and process.
        drop_last: leave out the examples that do not fill a global batch; False yields them as a smaller batch.
        bucket: global batches that are sorted by length together; 1 keeps the order. None: 16 when shuffling, else 1.
        deal: what processes share out. "examples": each global batch has batch_size examples for each of them
            (training). "batches": whole batches of batch_size examples in turn, the same ones that one process alone
            would make, so that results do not depend on the number of processes (evaluation).
        order: numbers of all examples in the order in which they come where nothing is shuffled; None = as in the
            source.
        prefetch: batches prepared ahead by a background thread; 0 works in the caller's thread.
        pin: page-lock batches for asynchronous transfer to a GPU.
        rank, world_size: this process's share; None = those of the process group.
    Raises:
        ConfigError: a size that is not positive, or fewer examples than one global batch with `drop_last`.
    """

    def __init__(
        self,
        source: Source,
        collator: Collator,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = True,
        bucket: int | None = None,
        deal: Literal["examples", "batches"] = "examples",
        order: NDArray[np.int64] | None = None,
        prefetch: int = 4,
        pin: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.source, self.collator = source, collator
        self.batch_size, self.seed, self.shuffle, self.drop_last = batch_size, seed, shuffle, drop_last
        self.bucket = (16 if shuffle else 1) if bucket is None else bucket
        self.deal, self.prefetch, self.pin = deal, prefetch, pin
        self.order = np.arange(len(source)) if order is None else order
        self.rank = runtime.rank() if rank is None else rank
        self.world_size = runtime.world_size() if world_size is None else world_size
        for name, value in (
            ("batch_size", batch_size),
            ("bucket", self.bucket),
            ("world_size", self.world_size),
        ):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1; found {value}.")
        if drop_last and len(source) < self._global_size:
            raise ConfigError(
                f"{len(source)} examples do not fill one batch of {self._global_size} ({self.world_size} processes): "
                "no step would be taken. "
                "Lower batch_size, or give more examples."
            )
        self._checked = False
        self._epoch = 0
        self._start = 0
        self._yielded = 0

    @property
    def epoch(self) -> int:
        """The pass that the next iteration makes; setting another one resets the position within the old."""
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        if value != self._epoch:
            self._epoch, self._start, self._yielded = value, 0, 0

    def __len__(self) -> int:
        """Batches of an epoch in this process."""
        full, rest = divmod(len(self.source), self._global_size)
        if self.deal == "examples":
            return full + (0 if self.drop_last else int(rest > self.rank))
        every = full + (0 if self.drop_last else int(rest > 0))
        return len(range(self.rank, every, self.world_size))

    def __iter__(self) -> Iterator[tuple[Batch, Targets]]:
        for _, batch, targets in self.batches_with_index():
            yield batch, targets

    def batches_with_index(self) -> Iterator[Indexed]:
        """The same batches, each with the numbers (N,) of its examples in the source."""
        start, self._start = self._start, 0
        self._yielded = start
        stop = threading.Event()
        made = self._make_batches(start, stop)
        batches = _prefetch(made, self.prefetch, stop) if self.prefetch else made
        try:
            for item in batches:
                self._yielded += 1
                yield item
        finally:
            batches.close()

    def state_dict(self) -> dict[str, Any]:
        """Position: how many batches of which epoch were yielded, and what the order depends on."""
        return {"epoch": self._epoch, "batches": self._yielded, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where `state_dict` was taken: the next iteration begins with the batch that would have come next.

        Raises:
            ConfigError: the state belongs to another seed, number of examples or batch size.
        """
        for key, here in self._identity().items():
            if state.get(key) != here:
                raise ConfigError(
                    f"cannot resume the loader: {key} was {state.get(key)!r}, now it is {here!r}. "
                    "Resume with the same data and settings, or begin a new run."
                )
        self._epoch, self._start = int(state["epoch"]), int(state["batches"])
        self._yielded = self._start

    @property
    def _global_size(self) -> int:
        return self.batch_size * (self.world_size if self.deal == "examples" else 1)

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "examples": len(self.source),
            "global_batch": self._global_size,
            "bucket": self.bucket,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def _draw_order(self) -> NDArray[np.int64]:
        count = len(self.source)
        order = runtime.generator_for(self.seed, self._epoch, _ORDER).permutation(count) if self.shuffle else self.order
        return order[: count - count % self._global_size] if self.drop_last else order

    def _make_batches(self, start: int, stop: threading.Event) -> Generator[Indexed, None, None]:
        """Batches of this process from number `start` on; `stop` interrupts a long chunk."""
        order, size, epoch = self._draw_order(), self._global_size, self._epoch
        # Whole batches are dealt in turn: this process's batch k is batch rank + k * world_size of all.
        first = start if self.deal == "examples" else self.rank + start * self.world_size
        chunk_size = size * self.bucket
        for chunk in range(first // self.bucket, -(-len(order) // chunk_size)):
            indices = order[chunk * chunk_size : (chunk + 1) * chunk_size]
            if self.bucket == 1:
                batches = [indices]
                ready: dict[int, tuple[Example, np.random.Generator]] = {}
            else:
                ready = {}
                for index in indices:
                    if stop.is_set():
                        return
                    ready[int(index)] = self._make_example(int(index), epoch)
                batches = self._sort_into_batches(indices, ready, epoch, chunk)
            for number, members in enumerate(batches, start=chunk * self.bucket):
                if number < first or (self.deal == "batches" and (number - first) % self.world_size):
                    continue
                share = members[self.rank :: self.world_size] if self.deal == "examples" else members
                if not len(share):
                    continue
                pairs = [ready.pop(int(index)) if ready else self._make_example(int(index), epoch) for index in share]
                batch, targets = self.collator([example for example, _ in pairs], [rng for _, rng in pairs])
                self._validate_first(batch)
                yield share, *((batch.pin(), targets.pin()) if self.pin else (batch, targets))

    def _validate_first(self, batch: Batch) -> None:
        """Validate the first batch of a run; a fault of the store shows from the start."""
        if self._checked:
            return
        self._checked = True
        try:
            batch.validate()
        except ValueError as error:
            raise DataError(
                f"the first batch cannot be read by a model: {error}. Look at the store with `visling regions inspect`."
            ) from error

    def _make_example(self, index: int, epoch: int) -> tuple[Example, np.random.Generator]:
        rng = runtime.generator_for(self.seed, epoch, index)
        return self.source.example(index, rng), rng

    def _sort_into_batches(
        self,
        indices: NDArray[np.int64],
        ready: Mapping[int, tuple[Example, np.random.Generator]],
        epoch: int,
        chunk: int,
    ) -> list[NDArray[np.int64]]:
        """Global batches of a chunk: sorted by longest row, cut, and shuffled if the loader shuffles; a smaller batch
        stays last."""
        lengths = np.array([max(len(row.ids) for row in ready[int(index)][0].rows) for index in indices])
        ordered = indices[np.argsort(lengths, kind="stable")]
        size = self._global_size
        rest = len(ordered) % size
        if rest:
            # The smaller batch is drawn from all lengths, not from the longest texts.
            late = np.zeros(len(ordered), bool)
            late[np.linspace(0, len(ordered) - 1, rest).astype(int)] = True
            ordered = np.concatenate([ordered[~late], ordered[late]])
        batches = [ordered[first : first + size] for first in range(0, len(ordered), size)]
        if self.shuffle:
            full = len(ordered) // size
            batches = [
                batches[number] for number in runtime.generator_for(self.seed, epoch, _CHUNK, chunk).permutation(full)
            ] + batches[full:]
        return batches


def _prefetch(items: Iterator[Indexed], depth: int, stop: threading.Event) -> Generator[Indexed, None, None]:
    """The items, made by a background thread at most `depth` ahead; its exceptions are raised here, and closing ends
    it. If it is never closed (an error ends the program), it ends with the main thread: one that the interpreter stops
    in the middle of torch aborts the process."""
    waiting: queue.Queue[tuple[Indexed | None, BaseException | None]] = queue.Queue(maxsize=depth)

    def offer(entry: tuple[Indexed | None, BaseException | None]) -> None:
        while not stop.is_set():
            if not threading.main_thread().is_alive():
                stop.set()
                return
            with contextlib.suppress(queue.Full):
                waiting.put(entry, timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                offer((item, None))
                if stop.is_set():
                    return
        except BaseException as error:
            offer((None, error))
        else:
            offer((None, None))

    thread = threading.Thread(target=work, name="visling-loader")
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stop.set()
        thread.join()
