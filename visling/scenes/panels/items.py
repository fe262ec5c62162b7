"""Sentences about the scattered items of a panel, whatever box they are in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from visling.scenes.panels.logic import (
    BoxTest,
    PieceTest,
    Quantity,
    Sentence,
    Truth,
    all_true,
    any_true,
    both_true,
    inflect_noun,
    negate,
    sample_quantity,
    say_there_is,
    write_number,
)
from visling.scenes.panels.panel import COLOURS, SHAPES, SIZES, Panel, Piece
from visling.scenes.world import pick, shuffled

_APART = 2
"""An item touches a side if no pixel lies between them, and does not from this many pixels on; one pixel is open to
dispute."""
_SIDES = ("left", "right", "top", "bottom")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A sort of item: its words, and the test for it."""

    adjectives: str
    noun: str
    test: Callable[[Piece], bool]

    def words(self, singular: bool) -> str:
        """Adjectives and noun."""
        return f"{self.adjectives} {inflect_noun(self.noun, singular)}".strip()


def sample_kind(rng: np.random.Generator, *, plain_rate: float = 0.1, size_rate: float = 0.12, noun: str = "") -> Kind:
    """A random sort of item: mostly a colour, a shape or both."""
    draw = rng.random()
    color = pick(rng, tuple(COLOURS)) if draw > plain_rate else ""
    colours: tuple[str, ...]
    shape = pick(rng, SHAPES) if rng.random() < 0.6 and not noun else ""
    size = pick(rng, tuple(SIZES)) if rng.random() < size_rate else ""
    if color and rng.random() < 0.05:
        other = pick(rng, [c for c in COLOURS if c != color])
        adjectives, colours = f"{color} or {other}", (color, other)
    else:
        adjectives, colours = color, ((color,) if color else tuple(COLOURS))
    word = pick(rng, ("big", "large")) if size == "large" else size
    return Kind(
        adjectives=f"{word} {adjectives}".strip(),
        noun=noun or shape or pick(rng, ("item", "item", "object")),
        test=lambda piece: (
            piece.color in colours and (not shape or piece.shape == shape) and (not size or piece.size == SIZES[size])
        ),
    )


def sample_two_kinds(rng: np.random.Generator) -> tuple[Kind, Kind]:
    """Two sorts of items with different words."""
    first, second = sample_kind(rng, plain_rate=0.0), sample_kind(rng, plain_rate=0.0)
    while second.words(True) == first.words(True):
        second = sample_kind(rng, plain_rate=0.0)
    return first, second


def _judge_contact(piece: Piece, sides: Sequence[str] = _SIDES) -> Truth:
    """Whether an item touches one of these sides of its box."""
    gap = min(piece.edges[side] for side in sides)
    return True if gap == 0 else False if gap >= _APART else None


def _judge_corner(piece: Piece) -> Truth:
    """Whether an item lies in a corner of its box."""
    return both_true(_judge_contact(piece, ("left", "right")), _judge_contact(piece, ("top", "bottom")))


def sample_contact(rng: np.random.Generator) -> tuple[str, PieceTest]:
    """What an item touches: words that follow its noun, and the test."""
    draw = rng.random()
    closely = "closely " if rng.random() < 0.25 else ""
    if draw < 0.42:
        wall = pick(rng, ("the wall", "the edge", "the edge", "an edge", "the side", "a wall"))
        return f"{closely}touching {wall}", _judge_contact
    if draw < 0.62:
        wall = pick(rng, ("any edge", "any edge", "the edge", "the wall"))
        return f"not touching {wall}", lambda piece: negate(_judge_contact(piece))
    if draw < 0.78:
        base = pick(rng, ("the base", "the bottom", "the bottom of a box", "the bottom edge"))
        return f"{closely}touching {base}", lambda piece: _judge_contact(piece, ("bottom",))
    if draw < 0.9:
        corner = pick(rng, ("a corner", "the corner", "a box corner", "a corner of a box"))
        return f"{closely}touching {corner}", _judge_corner
    side = pick(rng, ("right", "right", "left", "top"))
    wall = pick(rng, (f"{side} wall of a box", f"the {side} wall", f"the {side} edge"))
    return f"{closely}touching {wall}", lambda piece: _judge_contact(piece, (side,))


def count_in_box(quantity: Quantity, test: PieceTest) -> BoxTest:
    """Test of a box: whether the quantity holds of its items that pass a test."""
    return lambda box: quantity.judge([test(piece) for piece in box])


def say_items(rng: np.random.Generator) -> Sentence:
    """How many items of a sort there are."""
    kind, quantity = sample_kind(rng, plain_rate=0.0), sample_quantity(rng, 5)
    return Sentence(
        form="items",
        text=say_there_is(quantity, kind.words(quantity.singular)),
        truth=lambda panel: quantity.judge([kind.test(p) for p in panel.pieces]),
    )


def say_items_touching(rng: np.random.Generator) -> Sentence:
    """How many items of a sort touch a side or none."""
    kind, quantity = sample_kind(rng), sample_quantity(rng, 3)
    words, touches = sample_contact(rng)
    return Sentence(
        form="items touching",
        text=say_there_is(quantity, f"{kind.words(quantity.singular)} {words}"),
        truth=lambda panel: quantity.judge([both_true(kind.test(p), touches(p)) for p in panel.pieces]),
    )


def say_not_coloured(rng: np.random.Generator) -> Sentence:
    """That an item touches a side and is not of a colour."""
    color, shape = pick(rng, tuple(COLOURS)), pick(rng, SHAPES)
    words, touches = sample_contact(rng)
    return Sentence(
        form="not coloured",
        text=f"There is a {shape} {words} that is not {color}",
        truth=lambda panel: any_true(
            [both_true(p.shape == shape and p.color != color, touches(p)) for p in panel.pieces]
        ),
    )


def say_two_touching(rng: np.random.Generator) -> Sentence:
    """How many items of two colours touch a side, and that no others do."""
    colours, n, m = shuffled(rng, tuple(COLOURS)), int(rng.integers(1, 4)), int(rng.integers(1, 4))
    wall = pick(rng, ("the wall", "the edge"))

    def truth(panel: Panel) -> Truth:
        touching = [(p.color, _judge_contact(p)) for p in panel.pieces]
        if any(truth is None for _, truth in touching):
            return None
        return [sum(bool(truth) for color, truth in touching if color == c) for c in colours] == [n, m, 0]

    first, second = f"{write_number(n, rng)} {colours[0]}", f"{write_number(m, rng)} {colours[1]}"
    text = f"Only {first} and {second} {inflect_noun('item', m == 1)} are touching {wall}"
    return Sentence(form="two touching", text=text, truth=truth)


def say_all_touching(rng: np.random.Generator) -> Sentence:
    """That all items of a sort, or none, touch a side."""
    kind = sample_kind(rng, plain_rate=0.0)
    words, touches = sample_contact(rng)
    lead, wanted = pick(rng, (("All the ", True), ("All ", True), ("", True), ("None of the ", False)))

    def truth(panel: Panel) -> Truth:
        truths = [touches(p) if wanted else negate(touches(p)) for p in panel.pieces if kind.test(p)]
        return None if len(truths) < 2 else all_true(truths)

    return Sentence(form="all touching", text=f"{lead}{kind.words(False)} are {words}", truth=truth)


def say_same_box(rng: np.random.Generator) -> Sentence:
    """That all items of a sort are in one box."""
    kind = sample_kind(rng, plain_rate=0.0)

    def truth(panel: Panel) -> Truth:
        counts = [sum(kind.test(p) for p in box) for box in panel.boxes]
        return None if sum(counts) < 2 else sum(n > 0 for n in counts) == 1

    return Sentence(
        form="same box",
        text=f"{pick(rng, ('All', 'All the'))} {kind.words(False)} are in {pick(rng, ('the same', 'one'))} box",
        truth=truth,
    )


def say_colours_touching(rng: np.random.Generator) -> Sentence:
    """How many colours touch a side."""
    n = int(rng.integers(1, 4))

    def truth(panel: Panel) -> Truth:
        sure = {p.color for p in panel.pieces if _judge_contact(p)}
        most = {p.color for p in panel.pieces if _judge_contact(p) is not False}
        return (len(sure) == n) if sure == most else None

    wall = pick(rng, ("the wall", "the edge"))
    lead = {1: "There is only one color", 2: "There are only 2 colors", 3: "All 3 different colors are"}[n]
    return Sentence(form="colours touching", text=f"{lead} touching {wall}", truth=truth)
