"""Three-valued truth, quantities and sentences of panels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from visling.scenes.panels.panel import Box, Panel, Piece
from visling.scenes.world import pick

Truth = bool | None

OnPiece = Callable[[Piece], Truth]

OnBox = Callable[[Box], Truth]

APART = 2
"""An item touches a side when no pixel lies between, and does not from this many on; with one pixel between nothing is
said."""

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven")


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A sentence and its truth on a panel (None: open to dispute)."""

    form: str
    text: str
    truth: Callable[[Panel], Truth]


Maker = Callable[[np.random.Generator], Sentence]


# --- three-valued logic ---


def conjoin(first: Truth, second: Truth) -> Truth:
    if first is False or second is False:
        return False
    return None if first is None or second is None else True


def negated(truth: Truth) -> Truth:
    return None if truth is None else not truth


def agreed(*truths: Truth) -> Truth:
    """The common truth of several readings."""
    return truths[0] if all(truth is truths[0] for truth in truths) else None


def exists(truths: Sequence[Truth]) -> Truth:
    """Whether any is true."""
    return True if True in truths else None if None in truths else False


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """How many: its words before a noun, whether that noun is singular, and whether a number satisfies it."""

    words: str
    single: bool
    holds: Callable[[int], Truth]

    def over(self, truths: Sequence[Truth]) -> Truth:
        """Truth over things of which some are open to dispute."""
        sure = sum(truth is True for truth in truths)
        open_ones = sum(truth is None for truth in truths)
        return agreed(*(self.holds(sure + k) for k in range(open_ones + 1)))


def numeral(number: int, rng: np.random.Generator) -> str:
    return str(number) if rng.random() < 0.4 else _WORDS[number]


def draw_quantity(
    rng: np.random.Generator,
    most: int,
    kinds: Sequence[str] = ("a", "bare", "exactly", "at least", "at most", "only", "more than", "no"),
) -> Quantity:
    """A random quantity of at most `most`."""
    kind = pick(rng, kinds)
    n = int(rng.integers(1, most + 1))
    word = numeral(n, rng)
    if kind == "a":
        return Quantity(words="a", single=True, holds=lambda found: found >= 1)
    if kind == "no":
        return Quantity(words="no", single=True, holds=lambda found: found == 0)
    if kind == "bare":
        # "there are two towers" is false of three: all of the twelve development labels that tell.
        return Quantity(words=word, single=n == 1, holds=lambda found: found == n)
    if kind == "exactly":
        return Quantity(
            words=f"{pick(rng, ('exactly', 'exactly', 'only'))} {word}", single=n == 1, holds=lambda found: found == n
        )
    if kind == "at least":
        return Quantity(
            words=f"{pick(rng, ('at least', 'at least', 'atleast'))} {word}",
            single=n == 1,
            holds=lambda found: found >= n,
        )
    if kind == "at most":
        return Quantity(words=f"at most {word}", single=n == 1, holds=lambda found: found <= n)
    if kind == "more than":
        return Quantity(
            words=f"more than {numeral(max(1, n - 1), rng)}", single=n <= 2, holds=lambda found: found > max(1, n - 1)
        )
    return Quantity(words=f"only {word}", single=n == 1, holds=lambda found: found == n)


def inflect(word: str, single: bool) -> str:
    return word if single else "boxes" if word == "box" else word + "s"
