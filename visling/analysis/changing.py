"""A question changed by the reader: words and regions left out, boxes drawn, and asked again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np

from visling.analysis.encoded_rows import list_words
from visling.analysis.question import Prepared, SeenImage
from visling.analysis.removal import without
from visling.data.batches.region_order import take_regions
from visling.data.text import Tokenizer
from visling.errors import DataError
from visling.types import Example, TextRow
from visling.vision.region_detector import RegionDetector

Place = tuple[int, int]
"""Row of an encoding, and number of a word or of a region in it."""
Box = tuple[float, float, float, float]


def leave_out(
    asked: Prepared, tokenizer: Tokenizer, *, words: Iterable[Place] = (), regions: Iterable[Place] = ()
) -> Prepared:
    """The question without some words and regions. What several rows share is left out of all of them: a region of the
    only image, a word of a part of the text that is the same (the question of a choice).

    Args:
        words: row and number among `EncodedRow.words`.
        regions: row and number among `EncodedRow.regions`.
    Raises:
        DataError: there is no such word or region, or it always stays: a special token, the whole image.
    """
    example = asked.example
    tokens: dict[int, set[int]] = {}
    for row, number in words:
        for other, positions in _find_word(example, tokenizer, row, number).items():
            tokens.setdefault(other, set()).update(positions)
    gone: dict[int, set[int]] = {}
    for row, number in regions:
        for other in range(len(example.rows)) if len(example.images) == 1 else [row]:
            gone.setdefault(other, set()).add(number)
    batch = without(asked.batch, example, tokens=tokens, regions=gone)
    rows = tuple(_cut_row(one, tokens.get(number, ())) for number, one in enumerate(example.rows))
    return replace(asked, batch=batch, example=replace(example, rows=rows))


def draw_boxes(seen: SeenImage, detector: RegionDetector | None, boxes: Sequence[Box], most: int) -> SeenImage:
    """The image with further regions at given boxes, behind the detected ones; where there are too many, the last
    detected ones make room.

    Args:
        boxes: pixel corners.
        most: regions that the model sees (`InputSpec.max_regions`).
    Raises:
        ConfigError: the detector takes no features at given boxes.
        DataError: the model sees no image, or a box is not within it.
    """
    if detector is None:
        raise DataError("a box cannot be drawn for a run that reads the words alone. Ask a model that sees the image.")
    detector.check_given_boxes()
    width, height = seen.regions.size
    for x1, y1, x2, y2 in boxes:
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise DataError(
                f"the box ({x1:g}, {y1:g}, {x2:g}, {y2:g}) is not within the image of {width} x {height} pixels: "
                "expected 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height."
            )
    if len(boxes) > most:
        raise DataError(f"{len(boxes)} boxes are drawn; the model sees {most} regions of an image. Draw fewer.")
    (drawn,) = detector.regions_at([seen.pixels], [np.array(boxes, np.float32)])
    return SeenImage(seen.pixels, take_regions(seen.regions, slice(most - len(boxes))).join(drawn))


def find_regions(asked: Prepared, other: Prepared, regions: Iterable[Place]) -> list[Place]:
    """Where regions of a question are in another one about the same images, to which boxes were added; those that the
    other does not show are left out.

    Raises:
        DataError: there is no such region.
    """
    found = []
    for row, number in regions:
        if asked.batch.regions is None or other.batch.regions is None or not 0 <= row < len(asked.example.rows):
            raise DataError(f"no region {number} in row {row}: the question has {len(asked.example.rows)} rows.")
        count = int(asked.batch.regions.mask[row].sum())
        if not 0 <= number < count:
            raise DataError(f"no region {number} in row {row}, which shows {count} regions, counted from 0.")
        box = asked.batch.regions.boxes[row, number]
        same = (other.batch.regions.boxes[row] == box).all(1) & other.batch.regions.mask[row]
        found += [(row, at) for at in same.nonzero()[:1, 0].tolist()]
    return found


def _find_word(example: Example, tokenizer: Tokenizer, row: int, number: int) -> dict[int, tuple[int, ...]]:
    """Token positions of a word in each row that shares it."""
    if not 0 <= row < len(example.rows):
        raise DataError(f"no row {row}: the question has {len(example.rows)}, counted from 0.")
    listed = [list_words(one, tokenizer) for one in example.rows]
    words = listed[row]
    if not 0 <= number < len(words) or words[number].special:
        choices = ", ".join(f"{at} ({word.text})" for at, word in enumerate(words) if not word.special)
        raise DataError(f"word {number} of row {row} cannot be left out: expected one of {choices}.")
    end = next(at for at in range(number, len(words)) if words[at].special)
    return {other: own[number].tokens for other, own in enumerate(listed) if own[: end + 1] == words[: end + 1]}


def _cut_row(row: TextRow, gone: Collection[int]) -> TextRow:
    """A row without some tokens."""
    kept = np.setdiff1d(np.arange(len(row.ids)), list(gone))
    moved = {int(old): new for new, old in enumerate(kept)}
    return replace(
        row,
        ids=row.ids[kept],
        segments=row.segments[kept],
        words=None if row.words is None else row.words[kept],
        answer_at=None if row.answer_at is None else moved[row.answer_at],
        phrases=tuple(moved.get(at, at) for at in row.phrases),
    )
