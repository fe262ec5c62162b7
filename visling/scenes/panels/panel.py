"""Panels: three grey boxes of scattered shapes or of one tower each, drawn as NLVR (version 1) draws them.

Colours, sizes, gaps, the share of items at an edge and the coverage of edge pixels were measured on NLVR's development
pictures.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visling.scenes.world import pick, shuffled

SHAPES = ("circle", "square", "triangle")
COLOURS = {"yellow": "Yellow", "blue": "#0099ff", "black": "Black"}
"""Colour word -> its name in structured_rep."""
SIZES = {"small": 10, "medium": 20, "large": 30}
"""Size word -> width, pixels."""

BOX = 100
"""Side of a grey box, pixels."""
STEP = 150
"""From the left edge of one box to that of the next, pixels."""
TALLEST = 4
"""Most blocks in a tower."""

_RGB = {"yellow": (255, 255, 0), "blue": (0, 153, 255), "black": (0, 0, 0)}
_PAPER, _GAP = (211, 211, 211), (128, 128, 128)
MOST_ITEMS = 7
"""Most scattered items in a box, as in NLVR."""
_EDGE_RATE = 0.18
"""Share of scattered items set against the right edge, and against the bottom."""
_BLOCK, _BLOCK_STEP, _TOWER_X = 20, 21, 40
"""Width of a block, distance from one to the next, and left edge of a tower, pixels."""
_FINE = 8
"""Supersampling factor."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One item of a box; x and y are its left top corner inside the box, pixels."""

    x: int
    y: int
    shape: str
    color: str
    size: int

    @property
    def edges(self) -> dict[str, int]:
        """Distance to each side of the box, pixels."""
        return {"left": self.x, "right": BOX - self.x - self.size, "top": self.y, "bottom": BOX - self.y - self.size}

    def official(self) -> dict[str, Any]:
        """The item as structured_rep writes it."""
        return {"y_loc": self.y, "type": self.shape, "color": COLOURS[self.color], "x_loc": self.x, "size": self.size}


Box = tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Boxes of items; in a panel of towers each box lists its blocks from the base up."""

    boxes: tuple[Box, ...]
    towers: bool

    @property
    def pieces(self) -> list[Piece]:
        """The items of all boxes."""
        return [piece for box in self.boxes for piece in box]

    def permuted(self, order: Sequence[int]) -> Panel:
        """The same boxes in another order."""
        return Panel(boxes=tuple(self.boxes[i] for i in order), towers=self.towers)


def sample_panel(rng: np.random.Generator, num_boxes: int, towers: bool, most_items: int = MOST_ITEMS) -> Panel:
    """A random panel of towers, or with at most `most_items` scattered items in each box."""
    if towers:
        boxes = tuple(
            _stack_blocks([pick(rng, tuple(COLOURS)) for _ in range(int(rng.integers(1, TALLEST + 1)))])
            for _ in range(num_boxes)
        )
    else:
        boxes = tuple(
            _scatter_pieces([_sample_piece(rng) for _ in range(int(rng.integers(1, most_items + 1)))], rng)
            for _ in range(num_boxes)
        )
    return Panel(boxes=boxes, towers=towers)


def vary_panel(panel: Panel, rng: np.random.Generator, most_items: int = MOST_ITEMS) -> Panel:
    """A panel that differs little: its items dealt anew to its boxes, or one of them changed."""
    sizes = [len(box) for box in panel.boxes]
    if panel.towers:
        blocks = [piece.color for piece in panel.pieces]
        if rng.random() < 0.6:
            blocks = shuffled(rng, blocks)
            sizes = _redeal_sizes(sizes, TALLEST, rng) if rng.random() < 0.5 else sizes
        else:
            blocks[int(rng.integers(len(blocks)))] = pick(rng, tuple(COLOURS))
        starts = np.cumsum([0, *sizes])
        return Panel(boxes=tuple(_stack_blocks(blocks[a:b]) for a, b in itertools.pairwise(starts)), towers=True)
    kinds = panel.pieces
    if rng.random() < 0.6:
        kinds = shuffled(rng, kinds)
        sizes = _redeal_sizes(sizes, most_items, rng) if rng.random() < 0.5 else sizes
    else:
        changed = int(rng.integers(len(kinds)))  # drawn before the new item
        kinds[changed] = _sample_piece(rng)
    starts = np.cumsum([0, *sizes])
    return Panel(boxes=tuple(_scatter_pieces(kinds[a:b], rng) for a, b in itertools.pairwise(starts)), towers=False)


def draw_panel(panel: Panel) -> Image.Image:
    """The picture, RGBA, 100 pixels high, with 50-pixel gaps between the boxes."""
    width = STEP * (len(panel.boxes) - 1) + BOX
    canvas = np.full((BOX, width, 4), 255, dtype=np.uint8)
    canvas[..., :3] = _GAP
    for k, box in enumerate(panel.boxes):
        canvas[:, k * STEP : k * STEP + BOX, :3] = _PAPER
        for piece in box:
            stamp = _render_piece(piece.shape, piece.color, piece.size)
            left = k * STEP + piece.x
            canvas[piece.y : piece.y + piece.size, left : left + piece.size, :3] = stamp
    return Image.fromarray(canvas)


def piece_box(place: int, piece: Piece) -> tuple[int, int, int, int]:
    """Pixel corners, in the whole picture, of an item of box number `place`."""
    left = place * STEP + piece.x
    return left, piece.y, left + piece.size, piece.y + piece.size


@cache
def _render_piece(shape: str, color: str, size: int) -> NDArray[np.uint8]:
    """(size, size, 3): an item on the colour of its box; items never overlap, so it can be pasted anywhere."""
    at = (np.arange(size * _FINE) + 0.5) / _FINE
    x, y = at[None, :], at[:, None]
    if shape == "square":
        inside = np.ones((size * _FINE, size * _FINE), dtype=bool)
    elif shape == "circle":
        inside = (x - size / 2) ** 2 + (y - size / 2) ** 2 <= (size / 2) ** 2
    else:
        inside = np.abs(x - size / 2) <= y / 2
    cover = inside.reshape(size, _FINE, size, _FINE).mean(axis=(1, 3))[..., None]
    colour = np.array(_PAPER) * (1 - cover) + np.array(_RGB[color]) * cover
    stamp: NDArray[np.uint8] = np.rint(colour).astype(np.uint8)
    return stamp


def _stack_blocks(colours: Sequence[str]) -> Box:
    """Blocks of these colours, from the base up."""
    top = BOX - _BLOCK
    return tuple(
        Piece(x=_TOWER_X, y=top - k * _BLOCK_STEP, shape="square", color=color, size=_BLOCK)
        for k, color in enumerate(colours)
    )


def _sample_piece(rng: np.random.Generator) -> Piece:
    """A random item that has no place yet."""
    return Piece(
        x=0, y=0, shape=pick(rng, SHAPES), color=pick(rng, tuple(COLOURS)), size=pick(rng, tuple(SIZES.values()))
    )


def _scatter_pieces(pieces: Sequence[Piece], rng: np.random.Generator) -> Box:
    """The items at random places, at least one pixel apart, some against the right edge or the bottom."""
    while True:
        placed: list[Piece] = []
        for piece in sorted(pieces, key=lambda one: -one.size):
            room = BOX - piece.size
            for _ in range(60):
                u = rng.random(4)
                x = room if u[0] < _EDGE_RATE else int(u[1] * (room + 1))
                y = room if u[2] < _EDGE_RATE else int(u[3] * (room + 1))
                if all(
                    x > other.x + other.size
                    or other.x > x + piece.size
                    or y > other.y + other.size
                    or other.y > y + piece.size
                    for other in placed
                ):
                    placed.append(dataclasses.replace(piece, x=x, y=y))
                    break
            else:
                break
        else:
            return tuple(shuffled(rng, placed))


def _redeal_sizes(sizes: Sequence[int], most: int, rng: np.random.Generator) -> list[int]:
    """Other numbers of items per box with the same sum, from 1 to `most` each."""
    total = sum(sizes)
    for _ in range(20):
        dealt = [int(n) for n in rng.integers(1, most + 1, len(sizes) - 1)]
        if 1 <= total - sum(dealt) <= most:
            return [*dealt, total - sum(dealt)]
    return list(sizes)
