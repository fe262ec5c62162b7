"""Pictures for people: regions drawn on an image, answers as bars, and both on one card. Pillow only."""

from __future__ import annotations

import base64
import colorsys
import io
import math
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from visling.analysis.region_names import name_regions
from visling.errors import BoxError, RunError
from visling.types import RegionArray

Colour = tuple[int, int, int]
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_Rectangle = tuple[float, float, float, float]

_LONG_SIDE, _SHORT_SIDE, _LARGEST = 512, 160, 2048
"""A picture is enlarged until its sides reach the first two, but never beyond the third."""
_CROWDED = 0.4
"""A label is left out if more than this share of it would cover other labels."""

# Ten hues that most colour-blind readers can tell apart at this lightness; further ones walk round the circle.
_PALETTE: tuple[Colour, ...] = (
    (230, 57, 70),
    (29, 120, 200),
    (255, 183, 3),
    (42, 157, 105),
    (157, 78, 221),
    (251, 113, 33),
    (0, 180, 216),
    (214, 40, 140),
    (128, 185, 24),
    (120, 85, 60),
)
_PAPER, _INK, _SOFT, _TRACK, _ACCENT = (255, 255, 255), (28, 32, 40), (104, 112, 124), (234, 237, 242), (29, 120, 200)


def region_colour(index: int) -> Colour:
    """Colour of the index-th region; neighbours in the list are easy to tell apart."""
    if index < len(_PALETTE):
        return _PALETTE[index]
    hue = (index * 0.618033988749895) % 1.0
    red, green, blue = colorsys.hls_to_rgb(hue, 0.45 + 0.12 * (index % 2), 0.75)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_regions(
    image: Image.Image,
    regions: RegionArray,
    *,
    class_names: Sequence[str] = (),
    attribute_names: Sequence[str] = (),
    highlight: Sequence[float] | None = None,
    full: float | None = None,
    top: int | None = None,
    scale: int | None = None,
) -> Image.Image:
    """A copy of the image with its regions drawn and named.

    Args:
        image: the image of the boxes, at any size; boxes are pixels of `regions.size` and are stretched to it.
        class_names: names by class id; without them the region's number is written.
        attribute_names: names by attribute id; without them attributes are left out.
        highlight: one weight per region (attention, say), at least 0. The heavier, the stronger a region is drawn.
        full: weight that is drawn at full strength; None = the heaviest of `highlight`.
        top: number of regions drawn: the first, or the heaviest if there is a `highlight`; None draws all.
        scale: whole factor by which the picture is enlarged; None enlarges small pictures until labels are readable.
    Raises:
        BoxError: `highlight` has another length than `regions`, or `scale` is below 1.
    """
    if scale is not None and scale < 1:
        raise BoxError(f"scale must be a whole number of at least 1; found {scale}.")
    picture = _flatten(image)
    factor = scale if scale is not None else _choose_enlargement(picture.size)
    width, height = picture.width * factor, picture.height * factor
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    weights = _scale_weights(highlight, len(regions), full)
    order = list(range(len(regions)) if weights is None else np.argsort(-weights, kind="stable"))[:top]
    if not order:
        return picture

    stretch = np.array([width / max(regions.size[0], 1), height / max(regions.size[1], 1)] * 2, dtype=np.float64)
    boxes = [_clip_box(np.asarray(regions.boxes[index], dtype=np.float64) * stretch, width, height) for index in order]
    strength = [1.0 if weights is None else float(weights[index]) for index in order]
    line = max(2, round(min(width, height) / 220))
    canvas = ImageDraw.Draw(picture, "RGBA")
    # Large boxes first, so that small ones stay visible on top of them.
    for rank in sorted(range(len(order)), key=lambda r: -_measure_area(boxes[r])):
        _draw_outline(canvas, boxes[rank], region_colour(rank), line, strength[rank], filled=weights is not None)
    font = _load_font(max(11, min(16, round(math.sqrt(width * height) / 38))))
    placed: list[_Rectangle] = []
    labels = _label_regions(regions, class_names, attribute_names, confidence=highlight is None)
    for rank, index in enumerate(order):
        if strength[rank] < 0.05:
            continue
        text = labels[index]
        if highlight is not None:
            text += f" · {float(highlight[index]):.2f}"
        _draw_label(canvas, text, rank, boxes, font, (width, height), placed)
    return picture


def answer_bars(top: Sequence[tuple[str, float]], *, width: int = 380) -> Image.Image:
    """Answers with their probabilities as horizontal bars, in the order of the list.

    Args:
        top: (answer, probability in [0, 1]) pairs; an empty list gives a picture that says so.
        width: pixels.
    """
    font, bold = _load_font(16), _load_font(16)
    row, margin, number = 44, 12, 64
    picture = Image.new("RGB", (width, max(1, len(top)) * row + margin), _PAPER)
    canvas = ImageDraw.Draw(picture)
    if not top:
        canvas.text((margin, margin), "no answer", font=font, fill=_SOFT)
        return picture
    track = width - 2 * margin - number
    for place, (answer, probability) in enumerate(top):
        y = margin // 2 + place * row
        share = min(max(probability, 0.0), 1.0) if math.isfinite(probability) else 0.0
        colour = _ACCENT if place == 0 else (150, 178, 206)
        canvas.text(
            (margin, y), _shorten(answer, font, width - 2 * margin), font=font, fill=_INK if place == 0 else _SOFT
        )
        bar = (margin, y + 24, margin + track, y + 34)
        canvas.rounded_rectangle(bar, radius=5, fill=_TRACK)
        if share > 0:
            canvas.rounded_rectangle((bar[0], bar[1], bar[0] + max(10.0, track * share), bar[3]), radius=5, fill=colour)
        percent = f"{100 * share:.1f}%"
        canvas.text((width - margin, y + 29), percent, font=bold, fill=_INK if place == 0 else _SOFT, anchor="rm")
    return picture


def prediction_card(pictures: Sequence[Image.Image], question: str, top: Sequence[tuple[str, float]]) -> Image.Image:
    """One picture that explains an answer: images (next to each other), question, and answers as bars.

    Args:
        pictures: as `draw_regions` leaves them; a model that reads no image has none.
        top: (answer, probability) pairs, best first.
    """
    margin, column = 24, 380
    picture = place_side_by_side(pictures)
    wide = picture.width > 1.6 * picture.height
    picture.thumbnail((900 * max(1, min(len(pictures), 2)), 560) if wide else (640, 640), Image.Resampling.LANCZOS)
    side = max(picture.width, column) if wide else column
    font = _load_font(22)
    lines = _wrap_words(question, font, side)
    bars = answer_bars(top, width=side + 24)
    text_height = len(lines) * 29 + 16
    if wide:
        size = (side + 2 * margin, picture.height + text_height + bars.height + 3 * margin)
        corner, text = (margin + (side - picture.width) // 2, margin), (margin, picture.height + 2 * margin)
    else:
        size = (picture.width + side + 3 * margin, max(picture.height, text_height + bars.height) + 2 * margin)
        corner, text = (margin, margin), (picture.width + 2 * margin, margin)
    card = Image.new("RGB", size, _PAPER)
    card.paste(picture, corner)
    canvas = ImageDraw.Draw(card)
    for number, line in enumerate(lines):
        canvas.text((text[0], text[1] + 29 * number), line, font=font, fill=_INK)
    # The bars carry a margin of their own; moved left by it, they stand flush with the question.
    card.paste(bars, (text[0] - 12, text[1] + text_height))
    return card


def compress_picture(picture: Image.Image) -> tuple[str, bytes]:
    """Kind and content of an image file: PNG (smaller for drawings) or JPEG (smaller for photographs)."""
    options = []
    for kind, settings in (("png", {"optimize": True}), ("jpeg", {"quality": 82})):
        with io.BytesIO() as file:
            picture.save(file, kind, **settings)
            options.append((len(file.getvalue()), kind, file.getvalue()))
    _, kind, content = min(options)
    return kind, content


def encode_picture(picture: Image.Image) -> str:
    """A data URI of a picture."""
    kind, content = compress_picture(picture)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def save_picture(picture: Image.Image, target: Path) -> None:
    """Write a picture in the format of its file name.

    Raises:
        RunError: it cannot be written, or no format has this name.
    """
    try:
        picture.save(target)
    except (OSError, ValueError) as error:  # ValueError: no image format has this suffix
        raise RunError(
            f"cannot write the picture {target}: {error}. Name another file, in a folder that exists, ending in .png."
        ) from error


def place_side_by_side(pictures: Sequence[Image.Image], *, gap: int = 16) -> Image.Image:
    """Pictures in a row, each as high as the highest; a gap of pixels between them is paper."""
    height = max((picture.height for picture in pictures), default=1)
    row = [picture.resize((max(1, round(picture.width * height / picture.height)), height)) for picture in pictures]
    joined = Image.new("RGB", (max(1, sum(part.width + gap for part in row) - gap), height), _PAPER)
    x = 0
    for part in row:
        joined.paste(part, (x, 0))
        x += part.width + gap
    return joined


def _flatten(image: Image.Image) -> Image.Image:
    """An RGB copy; transparent parts become white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, (*_PAPER, 255))
        return Image.alpha_composite(paper, rgba).convert("RGB")
    return image.convert("RGB")


def _choose_enlargement(size: tuple[int, int]) -> int:
    long, short = max(size), min(size)
    wanted = max(math.ceil(_LONG_SIDE / long), math.ceil(_SHORT_SIDE / short))
    return max(1, min(wanted, _LARGEST // long))


def _scale_weights(highlight: Sequence[float] | None, count: int, full: float | None) -> NDArray[np.float64] | None:
    """Weights divided by `full`, or by the largest, up to 1; negative or undefined ones count as 0."""
    if highlight is None:
        return None
    weights = np.asarray(highlight, dtype=np.float64).reshape(-1)
    if len(weights) != count:
        raise BoxError(f"highlight must hold one weight per region: found {len(weights)} for {count} regions.")
    weights = np.where(np.isfinite(weights), weights, 0.0).clip(min=0.0)
    most = float(weights.max(initial=0.0)) if full is None else full
    scaled: NDArray[np.float64] = (weights / max(most, 1e-12)).clip(max=1.0)
    return scaled


def _clip_box(box: NDArray[np.float64], width: int, height: int) -> _Rectangle:
    """The part of a box that lies in the picture, at least two pixels wide and high where the picture is."""
    x1, x2 = sorted(float(np.clip(np.nan_to_num(value), 0, width - 1)) for value in (box[0], box[2]))
    y1, y2 = sorted(float(np.clip(np.nan_to_num(value), 0, height - 1)) for value in (box[1], box[3]))
    return (
        min(x1, max(width - 3, 0)),
        min(y1, max(height - 3, 0)),
        min(max(x2, x1 + 2), width - 1),
        min(max(y2, y1 + 2), height - 1),
    )


def _measure_area(box: _Rectangle) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _draw_outline(
    canvas: ImageDraw.ImageDraw, box: _Rectangle, colour: Colour, line: int, strength: float, *, filled: bool
) -> None:
    opacity = round(70 + 185 * strength)
    width = max(1, round(line * (0.5 + 0.9 * strength))) if filled else line
    # A light rim outside and a dark one inside keep the line visible on a ground of its own colour.
    canvas.rectangle(
        (box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1), outline=(255, 255, 255, round(opacity * 0.7)), width=1
    )
    canvas.rectangle(box, outline=(0, 0, 0, round(opacity * 0.55)), width=width + 1)
    fill = (*colour, round(70 * strength)) if filled else None
    canvas.rectangle(box, outline=(*colour, opacity), width=width, fill=fill)


def _label_regions(
    regions: RegionArray, class_names: Sequence[str], attribute_names: Sequence[str], *, confidence: bool
) -> list[str]:
    """Names of regions, each with the confidence of its class if that is asked for and known."""
    names = name_regions(regions, class_names=class_names, attribute_names=attribute_names)
    if not confidence or regions.classes is None or not class_names or regions.class_confidence is None:
        return names
    return [f"{name} {100 * float(share):.0f}%" for name, share in zip(names, regions.class_confidence, strict=True)]


class _Spot(NamedTuple):
    cost: float
    rank: int
    place: _Rectangle
    covered: float


def _draw_label(
    canvas: ImageDraw.ImageDraw,
    text: str,
    owner: int,
    boxes: Sequence[_Rectangle],
    font: _Font,
    size: tuple[int, int],
    placed: list[_Rectangle],
) -> None:
    """Write a label next to or in the box it belongs to, inside the picture, where it hides the least of labels and
    small regions."""
    text = _shorten(text, font, size[0] - 8)
    left, up, right, down = canvas.textbbox((0, 0), text, font=font)
    width, height = right - left + 8, down - up + 6
    if not text or width > size[0] or height > size[1]:
        return
    (x1, y1, x2, y2), colour = boxes[owner], region_colour(owner)
    corners = [
        (x1, y1 - height),
        (x1, y1),
        (x2 - width, y1 - height),
        (x1, y2),
        (x2 - width, y2),
        (x1, y2 - height),
        (x2 - width, y1),
    ]
    corners += [(x2, y1), (x1 - width, y1), (x2, y2 - height), (x1 - width, y2 - height)]
    corners += [(x1, y1 + step * height) for step in range(1, 6) if y1 + (step + 1) * height <= y2]
    spots = []
    for rank, (x, y) in enumerate(corners):
        x, y = min(max(x, 0), size[0] - width), min(max(y, 0), size[1] - height)
        place = (x, y, x + width, y + height)
        covered = sum(_measure_overlap(place, other) for other in placed) / (width * height)
        hidden = max(_measure_overlap(place, other) / max(_measure_area(other), 1.0) for other in boxes)
        spots.append(_Spot(covered + 0.5 * hidden, rank, place, covered))
    best = min(spots)
    if best.covered > _CROWDED:
        return
    placed.append(best.place)
    x, y = best.place[:2]
    canvas.rectangle((x, y, x + width - 1, y + height - 1), fill=(*colour, 255))
    bright = (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]) > 150
    canvas.text((x + 4 - left, y + 3 - up), text, font=font, fill=(20, 20, 20, 255) if bright else (255, 255, 255, 255))


def _measure_overlap(first: _Rectangle, second: _Rectangle) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)


@lru_cache(maxsize=16)
def _load_font(size: int) -> _Font:
    return ImageFont.load_default(size)


_PLAIN = str.maketrans({"–": "-", "—": "-", "−": "-", "×": "x", "→": ">", "ß": "ss", "æ": "ae", "ø": "o"})


def _make_printable(text: str) -> str:
    """Text in the characters that Pillow's built-in font can draw: accents fall off, other scripts become question
    marks."""
    folded = "".join(
        c
        for c in unicodedata.normalize("NFKD", " ".join(text.split()).translate(_PLAIN))
        if not unicodedata.combining(c)
    )
    return "".join(c if " " <= c <= "~" or c in "·…“”‘’" else "?" for c in folded.replace("...", "…"))


def _shorten(text: str, font: _Font, width: float) -> str:
    """The text, cut with an ellipsis if it is wider than `width` pixels; empty if nothing fits."""
    text = _make_printable(text)
    if font.getlength(text) <= width:
        return text
    kept = bisect_right(range(1, len(text) + 1), width, key=lambda count: font.getlength(text[:count] + "…"))
    return text[:kept].rstrip() + "…" if kept else ""


def _wrap_words(text: str, font: _Font, width: float, *, most: int = 6) -> list[str]:
    """Lines no wider than `width` pixels; the last of at most `most` ends in an ellipsis if more would follow."""
    lines: list[str] = []
    for word in _make_printable(text).split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 : most + 1])]  # two lines are too wide for one
    return [_shorten(line, font, width) for line in lines]
