"""What sentences about panels are built of: truth with a third value, quantities, and the words for numbers.

A condition is true, false or, where readers would disagree, None (open to dispute).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from visling.scenes.panels.panel import Box, Panel, Piece
from visling.scenes.world import pick

Truth = bool | None
"""None: open to dispute."""
PieceTest = Callable[[Piece], Truth]
BoxTest = Callable[[Box], Truth]

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A sentence and its truth on a panel."""

    form: str
    """Construction that it belongs to; forms are counted in the summary."""
    text: str
    truth: Callable[[Panel], Truth]


Maker = Callable[[np.random.Generator], Sentence]
"""Makes a random sentence of one form."""


def negate(truth: Truth) -> Truth:
    """Whether it is false."""
    return None if truth is None else not truth


def both_true(first: Truth, second: Truth) -> Truth:
    """Whether both are true."""
    return all_true((first, second))


def all_true(truths: Sequence[Truth]) -> Truth:
    """Whether all are true."""
    return False if False in truths else None if None in truths else True


def any_true(truths: Sequence[Truth]) -> Truth:
    """Whether any is true."""
    return True if True in truths else None if None in truths else False


def common_truth(*truths: Truth) -> Truth:
    """The truth that several readings share; None where they differ."""
    return truths[0] if all(truth is truths[0] for truth in truths) else None


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """How many: its words before a noun, whether that noun is singular, and whether a number satisfies it."""

    words: str
    singular: bool
    holds: Callable[[int], Truth]

    def judge(self, truths: Sequence[Truth]) -> Truth:
        """Whether this many things are true, of which some may be open to dispute."""
        sure = sum(truth is True for truth in truths)
        open_ones = sum(truth is None for truth in truths)
        return common_truth(*(self.holds(sure + k) for k in range(open_ones + 1)))


def write_number(number: int, rng: np.random.Generator) -> str:
    """A number as a word or, less often, as digits."""
    return str(number) if rng.random() < 0.4 else _NUMBERS[number]


def sample_quantity(
    rng: np.random.Generator,
    most: int,
    kinds: Sequence[str] = ("a", "bare", "exactly", "at least", "at most", "only", "more than", "no"),
) -> Quantity:
    """A random quantity of at most `most`."""
    kind = pick(rng, kinds)
    n = int(rng.integers(1, most + 1))
    word = write_number(n, rng)
    if kind == "a":
        return Quantity(words="a", singular=True, holds=lambda number: number >= 1)
    if kind == "no":
        return Quantity(words="no", singular=True, holds=lambda number: number == 0)
    if kind == "bare":
        # "there are two towers" is false of three: all twelve development labels that decide it say so.
        return Quantity(words=word, singular=n == 1, holds=lambda number: number == n)
    if kind == "exactly":
        return Quantity(
            words=f"{pick(rng, ('exactly', 'exactly', 'only'))} {word}",
            singular=n == 1,
            holds=lambda number: number == n,
        )
    if kind == "at least":
        return Quantity(
            words=f"{pick(rng, ('at least', 'at least', 'atleast'))} {word}",
            singular=n == 1,
            holds=lambda number: number >= n,
        )
    if kind == "at most":
        return Quantity(words=f"at most {word}", singular=n == 1, holds=lambda number: number <= n)
    if kind == "more than":
        return Quantity(
            words=f"more than {write_number(max(1, n - 1), rng)}",
            singular=n <= 2,
            holds=lambda number: number > max(1, n - 1),
        )
    return Quantity(words=f"only {word}", singular=n == 1, holds=lambda number: number == n)


def inflect_noun(noun: str, singular: bool) -> str:
    """A noun, in the plural unless `singular`."""
    return noun if singular else "boxes" if noun == "box" else noun + "s"


def say_there_is(quantity: Quantity, noun_phrase: str) -> str:
    """ "There is" or "There are", the quantity, and what is counted."""
    return f"There {'is' if quantity.singular else 'are'} {quantity.words} {noun_phrase}"
