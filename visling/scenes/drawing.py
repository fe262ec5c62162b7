"""Draws the objects of a scene in one of two styles and reports the tight box of each.

Every object is drawn alone at four times the resolution, reduced, and pasted where its pixels meet no other object's:
boxes are exact and nothing is hidden.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from visling.errors import ConfigError
from visling.scenes.world import SHAPES, WIDTHS, Item

STYLES = ("plain", "sketch")

RGB = {
    "red": (214, 36, 36),
    "green": (36, 150, 60),
    "blue": (38, 84, 214),
    "yellow": (234, 194, 12),
    "orange": (246, 128, 18),
    "purple": (142, 52, 184),
    "brown": (118, 72, 36),
    "black": (24, 24, 24),
}

_FINE = 4
"""Supersampling factor."""
_FAINT = 24
"""After reduction, alpha below this (of 255) becomes 0, so that the drawn pixels are those one can see."""
_SHARED_BOX = 0.12
"""Largest overlap of two boxes, as a share of the smaller one."""

Points = NDArray[np.float64]


def draw_scene(
    items: Sequence[Item], size: int, style: str, rng: np.random.Generator
) -> tuple[Image.Image, list[Item]]:
    """A picture and its objects with their boxes, in drawing order.

    Raises:
        ConfigError: the objects do not fit into a picture of this size.
    """
    scale = size / 128
    sprites = []
    for item in items:
        low, high = WIDTHS[item.size]
        width = max(6, round(float(rng.uniform(low, high)) * scale))
        sprites.append(_render_sprite(item, width, style, scale, rng))
    places = _place_masks([sprite[..., 3] > 0 for sprite in sprites], size, rng)
    canvas = _paint_background(size, style, rng)
    placed = []
    for item, sprite, (x, y) in zip(items, sprites, places, strict=True):
        height, width = sprite.shape[:2]
        alpha = sprite[..., 3:].astype(np.float64) / 255
        part = canvas[y : y + height, x : x + width]
        canvas[y : y + height, x : x + width] = part * (1 - alpha) + sprite[..., :3] * alpha
        placed.append(dataclasses.replace(item, box=(x, y, x + width, y + height)))
    return Image.fromarray(np.rint(canvas).clip(0, 255).astype(np.uint8)), placed


def _paint_background(size: int, style: str, rng: np.random.Generator) -> Points:
    """(size, size, 3) empty sheet."""
    if style == "plain":
        return np.full((size, size, 3), float(rng.integers(236, 253)))
    coarse = rng.normal(0, 5, (size // 8 + 2, size // 8 + 2)).astype(np.float32)
    blotches = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 3.5, (size, size))
    paper = np.array([238.0, 226.0, 198.0]) + rng.normal(0, 3, 3)
    return np.asarray(paper[None, None] + (blotches + grain)[..., None])


def _place_masks(masks: list[NDArray[np.bool_]], size: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Left top corner of each mask such that no pixels meet and boxes hardly overlap. Large ones are placed first."""
    order = sorted(range(len(masks)), key=lambda i: -masks[i].size)
    if masks[order[0]].shape[0] >= size:
        raise ConfigError(
            f"objects of {masks[order[0]].shape[0]} pixels do not fit into a picture of {size}. Raise `size`."
        )
    for _ in range(60):
        taken = np.zeros((size, size), dtype=bool)
        boxes = np.zeros((0, 4))
        places = [(0, 0)] * len(masks)
        for i in order:
            spot = _find_spot(masks[i], taken, boxes, rng)
            if spot is None:
                break
            (x, y), (height, width) = spot, masks[i].shape
            places[i] = spot
            taken[y : y + height, x : x + width] |= masks[i]
            boxes = np.concatenate([boxes, [[x, y, x + width, y + height]]])
        else:
            return places
    raise ConfigError(f"{len(masks)} objects do not fit into a picture of {size} x {size} pixels. Lower `max_objects`.")


def _find_spot(
    mask: NDArray[np.bool_], taken: NDArray[np.bool_], boxes: Points, rng: np.random.Generator
) -> tuple[int, int] | None:
    """A free left top corner, or None after many tries."""
    height, width = mask.shape
    size = taken.shape[0]
    xs = rng.integers(0, size - width + 1, 80)
    ys = rng.integers(0, size - height + 1, 80)
    if len(boxes):
        shared_x = np.minimum(xs[:, None] + width, boxes[:, 2]) - np.maximum(xs[:, None], boxes[:, 0])
        shared_y = np.minimum(ys[:, None] + height, boxes[:, 3]) - np.maximum(ys[:, None], boxes[:, 1])
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        shared = shared_x.clip(min=0) * shared_y.clip(min=0) / np.minimum(areas, width * height)
        open_at = np.flatnonzero((shared <= _SHARED_BOX).all(axis=1))
    else:
        open_at = np.arange(len(xs))
    for k in open_at:
        x, y = int(xs[k]), int(ys[k])
        if not (taken[y : y + height, x : x + width] & mask).any():
            return x, y
    return None


def _render_sprite(item: Item, width: int, style: str, scale: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(h, w, 4) RGBA of one object, cut to its drawn pixels."""
    paint = _paint_plain if style == "plain" else _paint_sketch
    large = paint(item, width, scale, rng)
    small = np.asarray(large.resize((large.width // _FINE, large.height // _FINE), Image.Resampling.BOX)).copy()
    small[small[..., 3] < _FAINT] = 0
    rows, columns = np.flatnonzero(small[..., 3].any(axis=1)), np.flatnonzero(small[..., 3].any(axis=0))
    return small[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _paint_plain(item: Item, width: int, scale: float, rng: np.random.Generator) -> Image.Image:
    """Flat colour with an outline; textures are colour on a pale tint."""
    side = width * _FINE
    outline = [tuple(p) for p in (_OUTLINES[item.shape] * (side - 1)).tolist()]
    hole = [tuple(p) for p in (_HOLES[item.shape] * (side - 1)).tolist()] if item.shape in _HOLES else None
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    pen.polygon(outline, fill=255)
    if hole:
        pen.polygon(hole, fill=0)
    colour = RGB[item.color]
    pale = tuple(round(0.12 * c + 0.88 * 255) for c in colour)
    fill = Image.new("RGB", (side, side), colour if item.texture == "solid" else pale)
    pen = ImageDraw.Draw(fill)
    step = (3.4 * math.sqrt(scale) + 0.06 * width) * _FINE
    if item.texture == "striped":
        at = -step * float(rng.random())
        while at < side:
            pen.rectangle((0, at, side, at + 0.5 * step), fill=colour)
            at += step
    elif item.texture == "dotted":
        _draw_dots(pen, side, step, 0.29 * step, colour, rng, 0.0)
    if item.texture != "solid":
        line = round(1.1 * _FINE * math.sqrt(scale))
        pen.line([*outline, outline[0], outline[1]], fill=colour, width=2 * line)
        if hole:
            pen.line([*hole, hole[0], hole[1]], fill=colour, width=2 * line)
    fill.putalpha(mask)
    # The colour outside the mask must not bleed into reduced edge pixels: reduce with premultiplied alpha.
    return _fill_outside(fill, colour)


def _fill_outside(picture: Image.Image, outside: tuple[int, int, int]) -> Image.Image:
    """The picture with one colour wherever it is transparent."""
    flat = Image.new("RGB", picture.size, outside)
    alpha = picture.getchannel("A")
    flat.paste(picture.convert("RGB"), mask=alpha)
    flat.putalpha(alpha)
    return flat


def _paint_sketch(item: Item, width: int, scale: float, rng: np.random.Generator) -> Image.Image:
    """Pencil: a wobbly outline drawn twice, hatching instead of a fill, everything a little turned."""
    border = 2 * _FINE
    side = width * _FINE
    full = side + 2 * border
    angle = math.radians(float(rng.uniform(-9, 9)))
    outline = [tuple(p) for p in _wobble_outline(_OUTLINES[item.shape], side, border, angle, rng).tolist()]
    hole = (
        [tuple(p) for p in _wobble_outline(_HOLES[item.shape], side, border, angle, rng).tolist()]
        if item.shape in _HOLES
        else None
    )
    inside = Image.new("L", (full, full), 0)
    pen = ImageDraw.Draw(inside)
    pen.polygon(outline, fill=255)
    if hole:
        pen.polygon(hole, fill=0)
    strokes = Image.new("L", (full, full), 0)
    pen = ImageDraw.Draw(strokes)
    root = math.sqrt(scale)
    if item.texture == "solid":
        _draw_hatch(pen, full, 2.1 * _FINE * root, 1.45 * _FINE * root, math.radians(50) + angle, rng)
    elif item.texture == "striped":
        _draw_hatch(pen, full, 4.6 * _FINE * root, 1.7 * _FINE * root, angle, rng)
    else:
        _draw_dots(pen, full, 4.4 * _FINE * root, 1.25 * _FINE * root, 255, rng, 0.12)
    ink = Image.new("L", (full, full), 0)
    ink.paste(strokes, mask=inside)
    pen = ImageDraw.Draw(ink)
    line = max(2, round(0.85 * _FINE * root))
    for path in [outline, *([hole] if hole else [])]:
        shift = rng.normal(0, 0.35 * _FINE, 2)
        again = [(x + float(shift[0]), y + float(shift[1])) for x, y in path]
        pen.line([*path, path[0], path[1]], fill=255, width=line, joint="curve")
        pen.line([*again, again[0]], fill=210, width=line)
    colour = RGB[item.color]
    shade = np.array(colour) * float(rng.uniform(0.86, 1.0))
    picture = Image.new("RGB", (full, full), tuple(int(c) for c in shade))
    picture.putalpha(ink)
    return picture


def _wobble_outline(unit: Points, side: int, border: int, angle: float, rng: np.random.Generator) -> Points:
    """Unit outline -> fine pixels: finer steps, a slow wave along the path, a small turn about the middle."""
    closed = np.concatenate([unit, unit[:1]])
    steps = [np.linspace(a, b, 5)[:4] for a, b in itertools.pairwise(closed)] if len(unit) < 20 else [unit]
    path = np.concatenate(steps)
    turn = np.linspace(0, 2 * math.pi, len(path), endpoint=False)
    wave = sum(
        float(rng.normal(0, 0.012)) * np.sin(k * turn[:, None] + rng.uniform(0, 2 * math.pi, 2)[None])  # (points, 2)
        for k in (2, 3, 5)
    )
    centred = path + wave - 0.5
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return np.asarray((centred @ rotation.T) * (0.94 * side) + side / 2 + border)


def _draw_hatch(
    pen: ImageDraw.ImageDraw, full: int, step: float, line: float, angle: float, rng: np.random.Generator
) -> None:
    """Parallel hand-drawn lines over the whole square."""
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]])
    at = -0.75 * full + step * float(rng.random())
    while at < 0.75 * full:
        middle = full / 2 + across * (at + float(rng.normal(0, 0.08 * step)))
        lean = across * float(rng.normal(0, 0.12 * step))
        start, end = middle - along * full * 0.75 - lean, middle + along * full * 0.75 + lean
        pen.line(
            [(float(start[0]), float(start[1])), (float(end[0]), float(end[1]))],
            fill=int(rng.integers(215, 256)),
            width=round(line),
        )
        at += step


def _draw_dots(
    pen: ImageDraw.ImageDraw,
    full: int,
    step: float,
    radius: float,
    fill: int | tuple[int, int, int],
    rng: np.random.Generator,
    jitter: float,
) -> None:
    """A staggered grid of dots over the whole square."""
    start = rng.random(2) * step
    row, y = 0, -step + float(start[1])
    while y < full + step:
        x = -step + float(start[0]) + (row % 2) * step / 2
        while x < full + step:
            dx, dy = rng.normal(0, jitter * step, 2) if jitter else (0.0, 0.0)
            pen.ellipse((x + dx - radius, y + dy - radius, x + dx + radius, y + dy + radius), fill=fill)
            x += step
        y += step * 0.86
        row += 1


def _trace_arc(radius: float, start: float, end: float, steps: int, middle: tuple[float, float] = (0.5, 0.5)) -> Points:
    """Points on a circle between two angles in degrees."""
    turn = np.radians(np.linspace(start, end, steps))
    return np.stack([middle[0] + radius * np.cos(turn), middle[1] + radius * np.sin(turn)], axis=1)


def _trace_star() -> Points:
    """Five-pointed star."""
    turn = np.radians(np.arange(10) * 36 - 90)
    radius = np.where(np.arange(10) % 2 == 0, 0.5, 0.21)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)


def _trace_cross() -> Points:
    """Upright cross of equal arms."""
    a, b = 0.33, 0.67
    return np.array([(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)])


def _trace_heart() -> Points:
    """Heart."""
    turn = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(turn) ** 3
    y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
    return np.stack([x, y], axis=1)


def _trace_moon() -> Points:
    """Crescent: an outer arc and the mirrored inner one."""
    outer = _trace_arc(0.5, 50, 310, 36)
    inner = _trace_arc(
        0.42, -70, 70, 24, (0.5 + 0.5 * math.cos(math.radians(50)) - 0.42 * math.cos(math.radians(70)), 0.5)
    )
    left_half = inner[::-1].copy()
    left_half[:, 0] = 2 * inner[0, 0] - left_half[:, 0]
    return np.concatenate([outer, left_half[::-1]])


def _fit_unit_square(points: Points) -> Points:
    """Stretched to fill the unit square."""
    low, high = points.min(axis=0), points.max(axis=0)
    return np.asarray((points - low) / (high - low))


_TRACERS: dict[str, Callable[[], Points]] = {
    "circle": lambda: _trace_arc(0.5, 0, 352, 44),
    "square": lambda: np.array([(0.0, 0.0), (1, 0), (1, 1), (0, 1)]),
    "triangle": lambda: np.array([(0.5, 0.0), (1, 1), (0, 1)]),
    "star": _trace_star,
    "cross": _trace_cross,
    "diamond": lambda: np.array([(0.5, 0.0), (1, 0.5), (0.5, 1), (0, 0.5)]),
    "heart": _trace_heart,
    "moon": _trace_moon,
    "ring": lambda: _trace_arc(0.5, 0, 352, 44),
}
_OUTLINES = {shape: _fit_unit_square(_TRACERS[shape]()) for shape in SHAPES}
"""Shape -> closed outline in the unit square."""
_HOLES = {"ring": _trace_arc(0.22, 0, 350, 36)}
"""Shape -> outline of its hole."""
