"""Random numbers of many examples at once, where those of each depend on (seed, epoch, index) alone.

NumPy's Philox is a counter-based generator: its numbers are counters, encrypted under a key. Here the key is (seed,
epoch) and the counter (block, stream, index, 0), so that one generator is moved to any example by setting its counter,
which takes half a microsecond; seeding another one takes seven.

Shapes   N examples.
Source   Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox-4x64-10).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """What numbers are drawn for; the streams of an example are independent of one another."""

    EXAMPLE = 0
    """Which texts an example shows, and its labels."""
    MIRROR = 1
    """Whether images are mirrored."""
    TOKENS = 2
    """Which word pieces are hidden."""
    REGIONS = 3
    """Which regions are hidden."""
    PLACE = 4
    """Where pictures lie on their canvas."""


class Draws(ABC):
    """Random numbers of N examples, each from the beginning of its own generator."""

    replayed: bool
    """Whether the order matters in which numbers are drawn: they may be those of a release."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def each(self, stream: Stream) -> Iterator[np.random.Generator]:
        """The generator of each example in turn, to be used before the next is asked for."""

    @abstractmethod
    def generators(self, stream: Stream) -> Sequence[np.random.Generator]:
        """The generators of all examples, side by side: slower than `each`."""

    def uniform(self, stream: Stream, width: int) -> NDArray[np.float64]:
        """(N, width) numbers in [0, 1): the first `width` of each generator."""
        return self.flat(stream, np.full(len(self), width)).reshape(len(self), width)

    def flat(self, stream: Stream, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """The first `counts` (N,) numbers in [0, 1) of each generator, one example after the other."""
        numbers = np.empty(int(counts.sum()), np.float64)
        start = 0
        for count, generator in zip(counts.tolist(), self.each(stream), strict=True):
            numbers[start : start + count] = generator.random(count)
            start += count
        return numbers


class KeyedDraws(Draws):
    """Draws that depend on (seed, epoch, index) and the stream alone: no batch and no process changes an example.

    Args:
        seed, epoch: not negative.
        indices: (N,) numbers of the examples.
    """

    replayed = False

    def __init__(self, seed: int, epoch: int, indices: NDArray[np.int64] | Sequence[int]) -> None:
        self.seed, self.epoch = seed, epoch
        self.indices = np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, places: NDArray[np.int64]) -> KeyedDraws:
        """The draws of some of the examples, by their places in `indices`."""
        return KeyedDraws(self.seed, self.epoch, self.indices[places])

    def each(self, stream: Stream) -> Iterator[np.random.Generator]:
        """See `Draws`. One generator is moved from example to example."""
        bits = self._philox(stream, 0)
        generator, state = np.random.Generator(bits), bits.state
        counter = state["state"]["counter"]
        for index in self.indices.tolist():
            counter[2] = index
            bits.state = state
            yield generator

    def generators(self, stream: Stream) -> Sequence[np.random.Generator]:
        """See `Draws`."""
        return [np.random.Generator(self._philox(stream, index)) for index in self.indices.tolist()]

    def _philox(self, stream: Stream, index: int) -> np.random.Philox:
        key, counter = (np.array(words, np.uint64) for words in ((self.seed, self.epoch), (0, stream, index, 0)))
        return np.random.Philox(key=key, counter=counter)


class GivenDraws(Draws):
    """Draws from generators that exist already, one per example. Their streams are not apart: numbers come in the order
    in which they are asked for, so that what released code drew can be replayed."""

    replayed = True

    def __init__(self, generators: Sequence[np.random.Generator]) -> None:
        self._generators = generators

    def __len__(self) -> int:
        return len(self._generators)

    def each(self, stream: Stream) -> Iterator[np.random.Generator]:
        """See `Draws`."""
        return iter(self._generators)

    def generators(self, stream: Stream) -> Sequence[np.random.Generator]:
        """See `Draws`."""
        return self._generators


def as_draws(given: Draws | Sequence[np.random.Generator]) -> Draws:
    """Draws as they are; a sequence of generators as `GivenDraws`."""
    return given if isinstance(given, Draws) else GivenDraws(given)
