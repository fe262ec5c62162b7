"""Batches of an epoch in an order that depends on (seed, epoch) alone, prepared ahead by a thread or by processes.

A chunk is a few global batches' worth of examples. What they show is chosen, sorted by text length and cut into
batches, which are then shuffled: rows of a batch have similar lengths, and nothing is padded for long. Every process
goes through the same chunks, takes its share of each global batch, and lays out and masks no other texts.

A global batch is what one update trains on: `batch_size` examples of each process in each of `accumulation`
micro-batches. It is the unit of order, of sorting and of `drop_last`, so that the examples of an update and their order
do not depend on how it is divided.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from visling import runtime
from visling.data.batches.collate import Collator
from visling.data.batches.examples import Source, as_batch_source
from visling.data.batches.permutation import InOrder, Order, shuffle
from visling.data.batches.workers import check_workers, explain_killed, spread
from visling.data.text import TextLayout
from visling.draws import KeyedDraws, Stream
from visling.errors import ConfigError, DataError
from visling.types import Batch, Targets

_ORDER, _CHUNK = 0x6F72646572, 0x6368756E6B
"""Keys that keep the streams of order and chunk shuffling apart from those of examples."""


Indexed = tuple[NDArray[np.int64], Batch, Targets]
"""A batch with the numbers of its examples."""


class Loader:
    """Iterates over one epoch's `(Batch, Targets)`; restart it anywhere with `state_dict` and `load_state_dict`.

    Set `epoch` before each pass: order and examples follow from (seed, epoch). The numbers that make and mask an
    example depend on (seed, epoch, index) alone, so neither process count nor restarts change it.

    Args:
        collator: makes the batches of the examples.
        batch_size: examples per batch and process.
        accumulation: batches of each process that make a global batch (training).
        drop_last: leave out the examples that do not fill a global batch; False yields them as a smaller batch.
        bucket: global batches that are sorted by length together; 1 keeps the order. None: 16 when shuffling, else 1.
        deal: what processes share out. "examples": each global batch has batch_size examples for each of them in each
            of its micro-batches (training). "batches": whole batches of batch_size examples in turn, the same ones that
            one process alone would make, so that results do not depend on the number of processes (evaluation).
        order: numbers of all examples in the order in which they come where nothing is shuffled; None = as in the
            source.
        prefetch: batches prepared ahead by a background thread; 0 works in the caller's thread.
        workers: processes that prepare the batches in place of this one, two ahead each; for machines with free cores.
        layout: lays out the texts of the source; counts the rows that workers cut.
        pin: page-lock batches for asynchronous transfer to a GPU.
        rank, world_size: this process's share; None = those of the process group.
    Raises:
        ConfigError: a size that is not positive, fewer examples than one global batch with `drop_last`, or workers
            where no process can be forked.
    """

    def __init__(
        self,
        source: Source,
        collator: Collator,
        *,
        batch_size: int,
        seed: int,
        accumulation: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
        bucket: int | None = None,
        deal: Literal["examples", "batches"] = "examples",
        order: NDArray[np.int64] | None = None,
        prefetch: int = 4,
        workers: int = 0,
        layout: TextLayout | None = None,
        pin: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.source, self.collator = as_batch_source(source), collator
        self.batch_size, self.seed, self.shuffle, self.drop_last = batch_size, seed, shuffle, drop_last
        self.bucket = (16 if shuffle else 1) if bucket is None else bucket
        self.accumulation = accumulation
        self.deal, self.prefetch, self.pin = deal, prefetch, pin
        self.order: Order = InOrder(len(source)) if order is None else order
        self.workers, self.layout = workers, layout
        self.rank = runtime.rank() if rank is None else rank
        self.world_size = runtime.world_size() if world_size is None else world_size
        check_workers(workers)
        for name, value in (
            ("batch_size", batch_size),
            ("accumulation", accumulation),
            ("bucket", self.bucket),
            ("world_size", self.world_size),
        ):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1; found {value}.")
        if drop_last and len(source) < self.global_size:
            raise ConfigError(
                f"{len(source)} examples do not fill one batch of {self.global_size} ({self.world_size} processes, "
                f"train.accumulation = {accumulation}): no step would be taken. "
                "Use smaller batches or less accumulation, or give more examples."
            )
        self._checked = False
        self._epoch = 0
        self._start = 0
        self._yielded = 0
        self.numbers: NDArray[np.int64] | None = None
        """Of the examples in the batch that was handed out last."""

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
        full, rest = divmod(len(self.source), self.global_size)
        if self.deal == "examples":
            begun = 0 if self.drop_last else len(range(self.rank, min(rest, self._stride), self.world_size))
            return full * self.accumulation + begun
        every = full + (0 if self.drop_last else int(rest > 0))
        return len(range(self.rank, every, self.world_size))

    def __iter__(self) -> Iterator[tuple[Batch, Targets]]:
        for _, batch, targets in self.batches_with_index():
            yield batch, targets

    def batches_with_index(self) -> Iterator[Indexed]:
        """The same batches, each with the numbers (N,) of its examples in the source."""
        start, self._start = self._start, 0
        self._yielded = start
        stop, numbers = threading.Event(), range(start, len(self))
        epoch = _Epoch(self, self._epoch, stop)
        made = spread(epoch, numbers, self.workers, self.layout) if self.workers else _make_in_order(epoch, numbers)
        if self.pin:
            made = _pin(made)
        batches = _prefetch(made, self.prefetch, stop) if self.prefetch else made
        try:
            with explain_killed():
                for item in batches:
                    self._validate_first(item[1])
                    self._yielded += 1
                    self.numbers = item[0]
                    yield item
        finally:
            batches.close()
            made.close()

    def state_dict(self) -> dict[str, Any]:
        """Position: how many batches and whole global batches of which epoch were yielded, and what the order depends
        on."""
        divided = [self.world_size, self.accumulation]
        updates = self._yielded // self.accumulation
        return {
            "epoch": self._epoch,
            "batches": self._yielded,
            "updates": updates,
            "divided": divided,
            **self._identity(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where `state_dict` was taken: the next iteration begins with the batch that would have come next. A
        state after a whole global batch is also one of other numbers of processes and of micro-batches.

        Raises:
            ConfigError: the state belongs to another seed, number of examples or global batch, or was taken within a
                global batch that was divided in another way.
        """
        for key, here in self._identity().items():
            if state.get(key) != here:
                raise ConfigError(
                    f"cannot resume the loader: {key} was {state.get(key)!r}, now it is {here!r}. "
                    "Resume with the same data and settings, or begin a new run."
                )
        updates, divided = int(state["updates"]), [self.world_size, self.accumulation]
        begun = int(state["batches"]) - updates * state["divided"][1]
        if begun and state["divided"] != divided:
            raise ConfigError(
                f"cannot resume the loader: the state was taken within a global batch that {state['divided'][0]} "
                f"processes shared out in {state['divided'][1]} micro-batches each; now they are {divided[0]} and "
                f"{divided[1]}. Resume with the numbers of then."
            )
        self.move_to(int(state["epoch"]), updates * self.accumulation + begun)

    @property
    def position(self) -> int:
        """Batches of the epoch before the one with which the next iteration begins."""
        return self._start

    def move_to(self, epoch: int, batches: int) -> None:
        """Let the next iteration begin after a number of batches of an epoch."""
        self._epoch, self._start, self._yielded = epoch, batches, batches

    @property
    def global_size(self) -> int:
        """Examples of a global batch."""
        return self.batch_size * (self._stride if self.deal == "examples" else 1)

    @property
    def _stride(self) -> int:
        """Batches that a global batch is divided into."""
        return self.world_size * self.accumulation

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "examples": len(self.source),
            "global_batch": self.global_size,
            "bucket": self.bucket,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

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


class _Stopped(Exception):
    """The batch is not wanted any more."""


class _Epoch:
    """The batches of an epoch in this process, by number; made in order, each chunk is prepared once.

    Args:
        stop: interrupts a long chunk.
    """

    def __init__(self, loader: Loader, epoch: int, stop: threading.Event) -> None:
        self.loader, self.epoch, self.stop = loader, epoch, stop
        count = len(loader.source)
        self.order = shuffle(count, loader.seed, epoch, _ORDER) if loader.shuffle else loader.order
        self.count = count - count % loader.global_size if loader.drop_last else count
        """Examples of the epoch; `drop_last` leaves out the last ones of the order."""
        self._chunk: tuple[int, list[NDArray[np.int64]], dict[int, Any]] = (-1, [], {})
        """Number of a chunk, its global batches, and what each of its examples shows."""

    def __getitem__(self, number: int) -> Indexed:
        loader = self.loader
        # Whole batches are dealt in turn: this process's batch k is batch rank + k * world_size of all.
        if loader.deal == "batches":
            number, part = loader.rank + number * loader.world_size, 0
        else:
            number, part = divmod(number, loader.accumulation)
        if loader.bucket == 1:
            members = self._take(number * loader.global_size, loader.global_size)
        else:
            members = self._prepare_chunk(number // loader.bucket)[number % loader.bucket]
        if loader.deal == "examples":
            share = members[loader.rank + loader.world_size * part :: loader.world_size * loader.accumulation]
        else:
            share = members
        shown = self._choose(share) if loader.bucket == 1 else self._chunk[2]
        examples = loader.source.lay_out([shown[index] for index in share.tolist()])
        return share, *loader.collator(examples, KeyedDraws(loader.seed, self.epoch, share))

    def _take(self, start: int, count: int) -> NDArray[np.int64]:
        return self.order[start : min(start + count, self.count)]

    def _prepare_chunk(self, number: int) -> list[NDArray[np.int64]]:
        if self._chunk[0] != number:
            size = self.loader.global_size * self.loader.bucket
            indices = self._take(number * size, size)
            shown = self._choose(indices)
            self._chunk = number, self._sort_into_batches(indices, list(shown.values()), number), shown
        return self._chunk[1]

    def _choose(self, indices: NDArray[np.int64]) -> dict[int, Any]:
        """What each example shows, by its number."""
        shown = {}
        rngs = KeyedDraws(self.loader.seed, self.epoch, indices).each(Stream.EXAMPLE)
        for index, rng in zip(indices.tolist(), rngs, strict=True):
            if self.stop.is_set():
                raise _Stopped
            shown[index] = self.loader.source.choose(index, rng)
        return shown

    def _sort_into_batches(
        self, indices: NDArray[np.int64], shown: Sequence[Any], chunk: int
    ) -> list[NDArray[np.int64]]:
        """Global batches of a chunk: sorted by longest row, cut, and shuffled if the loader shuffles; a smaller batch
        stays last."""
        lengths = self.loader.source.measure(shown)
        ordered = indices[np.argsort(lengths, kind="stable")]
        size = self.loader.global_size
        rest = len(ordered) % size
        if rest:
            # The smaller batch is drawn from all lengths, not from the longest texts.
            late = np.zeros(len(ordered), bool)
            late[np.linspace(0, len(ordered) - 1, rest).astype(int)] = True
            ordered = np.concatenate([ordered[~late], ordered[late]])
        batches = [ordered[first : first + size] for first in range(0, len(ordered), size)]
        if self.loader.shuffle:
            full = len(ordered) // size
            rng = runtime.generator_for(self.loader.seed, self.epoch, _CHUNK, chunk)
            batches = [batches[number] for number in rng.permutation(full)] + batches[full:]
        return batches


def _make_in_order(batches: _Epoch, numbers: range) -> Generator[Indexed, None, None]:
    with contextlib.suppress(_Stopped):
        for number in numbers:
            yield batches[number]


def _pin(items: Generator[Indexed, None, None]) -> Generator[Indexed, None, None]:
    """The items, page-locked."""
    with contextlib.closing(items):
        for index, batch, targets in items:
            yield index, batch.pin(), targets.pin()


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
