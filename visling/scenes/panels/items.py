"""Sentences about the items of a panel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from visling.scenes.panels.logic import (
    APART,
    OnBox,
    OnPiece,
    Quantity,
    Sentence,
    Truth,
    conjoin,
    draw_quantity,
    exists,
    inflect,
    negated,
    numeral,
)
from visling.scenes.panels.panel import COLOURS, SHAPES, SIZES, Panel, Piece
from visling.scenes.world import pick, shuffled

# --- items ---


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A sort of item: adjectives, noun, test."""

    adjectives: str
    noun: str
    test: Callable[[Piece], bool]

    def said(self, single: bool) -> str:
        """Its words."""
        return f"{self.adjectives} {inflect(self.noun, single)}".strip()


def draw_kind(rng: np.random.Generator, *, plain_rate: float = 0.1, size_rate: float = 0.12, noun: str = "") -> Kind:
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


def two_kinds(rng: np.random.Generator) -> tuple[Kind, Kind]:
    """Two sorts of items with different words."""
    first, second = draw_kind(rng, plain_rate=0.0), draw_kind(rng, plain_rate=0.0)
    while second.said(True) == first.said(True):
        second = draw_kind(rng, plain_rate=0.0)
    return first, second


def _touches(piece: Piece, sides: Sequence[str]) -> Truth:
    gap = min(piece.edges[side] for side in sides)
    return True if gap == 0 else False if gap >= APART else None


def _in_corner(piece: Piece) -> Truth:
    return conjoin(_touches(piece, ("left", "right")), _touches(piece, ("top", "bottom")))


def draw_place(rng: np.random.Generator) -> tuple[str, OnPiece]:
    """Where an item touches its box: words after the noun, test."""
    draw = rng.random()
    closely = "closely " if rng.random() < 0.25 else ""
    if draw < 0.42:
        wall = pick(rng, ("the wall", "the edge", "the edge", "an edge", "the side", "a wall"))
        return f"{closely}touching {wall}", lambda piece: _touches(piece, ("left", "right", "top", "bottom"))
    if draw < 0.62:
        return f"not touching {pick(rng, ('any edge', 'any edge', 'the edge', 'the wall'))}", lambda piece: negated(
            _touches(piece, ("left", "right", "top", "bottom"))
        )
    if draw < 0.78:
        base = pick(rng, ("the base", "the bottom", "the bottom of a box", "the bottom edge"))
        return f"{closely}touching {base}", lambda piece: _touches(piece, ("bottom",))
    if draw < 0.9:
        corner = pick(rng, ("a corner", "the corner", "a box corner", "a corner of a box"))
        return f"{closely}touching {corner}", _in_corner
    side = pick(rng, ("right", "right", "left", "top"))
    wall = pick(rng, (f"{side} wall of a box", f"the {side} wall", f"the {side} edge"))
    return f"{closely}touching {wall}", lambda piece: _touches(piece, (side,))


def in_box(quantity: Quantity, test: OnPiece) -> OnBox:
    return lambda box: quantity.over([test(piece) for piece in box])


def all_pieces(panel: Panel) -> list[Piece]:
    return [piece for box in panel.boxes for piece in box]


def there_is(quantity: Quantity, rest: str) -> str:
    return f"There {'is' if quantity.single else 'are'} {quantity.words} {rest}"


def items_sentence(rng: np.random.Generator) -> Sentence:
    kind, quantity = draw_kind(rng, plain_rate=0.0), draw_quantity(rng, 5)
    return Sentence(
        form="items",
        text=there_is(quantity, kind.said(quantity.single)),
        truth=lambda panel: quantity.over([kind.test(p) for p in all_pieces(panel)]),
    )


def items_touching(rng: np.random.Generator) -> Sentence:
    kind, quantity = draw_kind(rng), draw_quantity(rng, 3)
    words, place = draw_place(rng)
    return Sentence(
        form="items touching",
        text=there_is(quantity, f"{kind.said(quantity.single)} {words}"),
        truth=lambda panel: quantity.over([conjoin(kind.test(p), place(p)) for p in all_pieces(panel)]),
    )


def not_coloured(rng: np.random.Generator) -> Sentence:
    color, shape = pick(rng, tuple(COLOURS)), pick(rng, SHAPES)
    words, place = draw_place(rng)
    return Sentence(
        form="not coloured",
        text=f"There is a {shape} {words} that is not {color}",
        truth=lambda panel: exists(
            [conjoin(p.shape == shape and p.color != color, place(p)) for p in all_pieces(panel)]
        ),
    )


def two_touching(rng: np.random.Generator) -> Sentence:
    colours, n, m = shuffled(rng, tuple(COLOURS)), int(rng.integers(1, 4)), int(rng.integers(1, 4))
    wall = pick(rng, ("the wall", "the edge"))

    def truth(panel: Panel) -> Truth:
        touching = [(p.color, _touches(p, ("left", "right", "top", "bottom"))) for p in all_pieces(panel)]
        if any(touches is None for _, touches in touching):
            return None
        return [sum(bool(touches) for color, touches in touching if color == c) for c in colours] == [n, m, 0]

    text = f"Only {numeral(n, rng)} {colours[0]} and {numeral(m, rng)} {colours[1]} {inflect('item', m == 1)} are touching {wall}"
    return Sentence(form="two touching", text=text, truth=truth)


def all_touching(rng: np.random.Generator) -> Sentence:
    kind = draw_kind(rng, plain_rate=0.0)
    words, place = draw_place(rng)
    lead, wanted = pick(rng, (("All the ", True), ("All ", True), ("", True), ("None of the ", False)))

    def truth(panel: Panel) -> Truth:
        found = [place(p) if wanted else negated(place(p)) for p in all_pieces(panel) if kind.test(p)]
        if len(found) < 2:
            return None
        return False if False in found else None if None in found else True

    return Sentence(form="all touching", text=f"{lead}{kind.said(False)} are {words}", truth=truth)


def same_box(rng: np.random.Generator) -> Sentence:
    kind = draw_kind(rng, plain_rate=0.0)

    def truth(panel: Panel) -> Truth:
        number = [sum(kind.test(p) for p in box) for box in panel.boxes]
        return None if sum(number) < 2 else sum(n > 0 for n in number) == 1

    return Sentence(
        form="same box",
        text=f"{pick(rng, ('All', 'All the'))} {kind.said(False)} are in {pick(rng, ('the same', 'one'))} box",
        truth=truth,
    )


def colours_touching(rng: np.random.Generator) -> Sentence:
    n = int(rng.integers(1, 4))

    def truth(panel: Panel) -> Truth:
        sides = ("left", "right", "top", "bottom")
        sure = {p.color for p in all_pieces(panel) if _touches(p, sides)}
        most = {p.color for p in all_pieces(panel) if _touches(p, sides) is not False}
        return (len(sure) == n) if sure == most else None

    wall = pick(rng, ("the wall", "the edge"))
    lead = {1: "There is only one color", 2: "There are only 2 colors", 3: "All 3 different colors are"}[n]
    return Sentence(form="colours touching", text=f"{lead} touching {wall}", truth=truth)
