"""Captions of panels that name every attribute of the items in them: pre-training for the judgement of statements."""

from __future__ import annotations

from collections import Counter

import numpy as np

from visling.scenes.language import NUMBERS, indefinite, plural
from visling.scenes.panels.panel import Box, Panel, Piece
from visling.scenes.panels.plain import PLACES, piece_name
from visling.scenes.world import pick, shuffled

_MOST_NAMED = 4
"""Most items named in one caption."""
_APART = 8
"""Least distance of two centres, pixels, for one to be above or left of the other."""


def panel_captions(panel: Panel, rng: np.random.Generator, count: int) -> list[str]:
    """Different true captions of a panel, at most `count`."""
    forms = (
        (_list_blocks, _describe_tower, _relate_blocks)
        if panel.towers
        else (_name_items, _name_items, _relate_items, _count_kinds, _name_edge)
    )
    captions: list[str] = []
    for _ in range(8 * count):
        where = int(rng.integers(len(panel.boxes)))
        text = pick(rng, forms)(panel.boxes[where], PLACES[len(panel.boxes)][where], rng)
        if text and text not in captions:
            captions.append(text)
        if len(captions) == count:
            break
    return captions


def _find_centre(piece: Piece) -> tuple[float, float]:
    """Middle of an item, pixels."""
    return piece.x + piece.size / 2, piece.y + piece.size / 2


def _join_parts(parts: list[str]) -> str:
    """Parts with commas and "and" between them."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _name_items(box: Box, place: str, rng: np.random.Generator) -> str:
    """Some or all items, each with all its attributes."""
    named = shuffled(rng, list(box))[: int(rng.integers(1, _MOST_NAMED + 1))]
    return f"{_join_parts([indefinite(piece_name(piece)) for piece in named])} in the {place} box"


def _relate_items(box: Box, place: str, rng: np.random.Generator) -> str:
    """Where one item is relative to another."""
    if len(box) < 2:
        return ""
    first, second = shuffled(rng, list(box))[:2]
    dx, dy = _find_centre(first)[0] - _find_centre(second)[0], _find_centre(first)[1] - _find_centre(second)[1]
    words = [("above" if dy < 0 else "below", abs(dy)), ("left of" if dx < 0 else "right of", abs(dx))]
    clear = [word for word, distance in words if distance >= _APART]
    return (
        f"{indefinite(piece_name(first))} {pick(rng, clear)} {indefinite(piece_name(second))} in the {place} box"
        if clear
        else ""
    )


def _count_kinds(box: Box, place: str, rng: np.random.Generator) -> str:
    """How many items there are of each colour, or of each shape."""
    by_color = bool(rng.integers(2))
    counts = Counter(piece.color if by_color else piece.shape for piece in box)
    parts = []
    for kind, number in shuffled(rng, sorted(counts.items())):
        noun = f"{kind} item" if by_color else kind
        parts.append(f"{NUMBERS[number]} {noun if number == 1 else plural(noun)}")
    return f"the {place} box has {_join_parts(parts)}"


def _name_edge(box: Box, place: str, rng: np.random.Generator) -> str:
    """An item and the edge it touches, or that it touches none."""
    piece = box[int(rng.integers(len(box)))]
    touched = [edge for edge, distance in piece.edges.items() if distance <= 0]
    what = f"the {pick(rng, touched)} edge" if touched else "no edge"
    return f"{indefinite(piece_name(piece))} touching {what} of the {place} box"


def _list_blocks(box: Box, place: str, rng: np.random.Generator) -> str:
    """Every block of a tower, from the base up or from the top down."""
    colors = [piece.color for piece in box]
    if rng.integers(2):
        return f"the {place} tower has blocks from base to top : {', '.join(colors)}"
    return f"the {place} tower has blocks from top to base : {', '.join(reversed(colors))}"


def _describe_tower(box: Box, place: str, rng: np.random.Generator) -> str:
    """Height, base and top of a tower."""
    number = NUMBERS[len(box)] if rng.integers(2) else str(len(box))
    blocks = "block" if len(box) == 1 else "blocks"
    base, top = indefinite(box[0].color), indefinite(box[-1].color)
    return f"the {place} tower has {number} {blocks} with {base} base and {top} block at the top"


def _relate_blocks(box: Box, place: str, rng: np.random.Generator) -> str:
    """Two neighbouring blocks."""
    if len(box) < 2:
        return ""
    lower = int(rng.integers(len(box) - 1))
    under, over = box[lower].color, box[lower + 1].color
    if rng.integers(2):
        return f"{indefinite(over)} block on top of {indefinite(under)} block in the {place} tower"
    return f"{indefinite(under)} block below {indefinite(over)} block in the {place} tower"
