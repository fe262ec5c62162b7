"""Orders of examples: a list of their numbers, or, where a list would be large, a function of the place.

A shuffled list of 10^9 numbers takes 8 GB and a minute, in every process, at every epoch and every time a run is
resumed. Above `MOST_LISTED` examples the number at a place is computed instead: place -> number is a Feistel network,
which maps [0, count) onto itself under a key drawn from (seed, epoch). It takes no memory, no time to begin with, and
the same time for a chunk of places anywhere in the order.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from visling import runtime

MOST_LISTED = 1 << 24
"""Examples up to which a shuffled order is a list: 134 MB, made in a second. Another number would change the order of
runs with so many examples."""

_ROUNDS = 8
"""Four would do for a perfect mixing function (Luby & Rackoff 1988)."""


class Order(Protocol):
    """Numbers of all examples in the order in which they come."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: slice, /) -> NDArray[np.int64]:
        """The numbers at some places."""
        ...


class InOrder:
    """0, 1, 2, ..., none of which is kept."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, places: slice, /) -> NDArray[np.int64]:
        return np.arange(*places.indices(self._count), dtype=np.int64)


class KeyedOrder:
    """A random order of `count` numbers that is computed where it is asked for.

    A number below `high` * `low`, which is hardly more than `count`, is cut into a high and a low digit; each in turn
    is moved, modulo its base, by a mix of the other one and a key. That can be undone, so that no two places have one
    number. A number that is no example's is mapped again until it is one: that follows a cycle, which leads back.

    Args:
        key: what the order depends on, such as (seed, epoch).
    Source:
        Black & Rogaway 2002, "Ciphers with arbitrary finite domains", section 5 (generalised Feistel) and 4 (cycle
        walking); the mixing function is the finaliser of SplitMix64 (Steele et al. 2014).
    """

    def __init__(self, count: int, *key: int) -> None:
        self._count = count
        self._high = math.isqrt(max(count - 1, 0)) + 1
        self._low = -(-count // self._high)
        self._keys = runtime.generator_for(*key).integers(1 << 64, size=_ROUNDS, dtype=np.uint64)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, places: slice, /) -> NDArray[np.int64]:
        numbers = self._permute(np.arange(*places.indices(self._count), dtype=np.uint64))
        while (outside := numbers >= self._count).any():
            numbers[outside] = self._permute(numbers[outside])
        return numbers.astype(np.int64)

    def _permute(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """A permutation of the numbers below `high` * `low`."""
        bases = np.uint64(self._high), np.uint64(self._low)
        digits = [numbers // bases[1], numbers % bases[1]]
        for turn, key in enumerate(self._keys):
            moved, other = turn % 2, 1 - turn % 2
            digits[moved] = (digits[moved] + _mix(digits[other] ^ key) % bases[moved]) % bases[moved]
        return digits[0] * bases[1] + digits[1]


def shuffle(count: int, *key: int) -> Order:
    """A random order of `count` examples that depends on the key alone: a list of up to `MOST_LISTED` numbers, a
    `KeyedOrder` of more."""
    if count > MOST_LISTED:
        return KeyedOrder(count, *key)
    return runtime.generator_for(*key).permutation(count)


def _mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Numbers of 64 bits each of whose bits depends on every bit of the given one."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
