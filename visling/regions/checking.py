"""What is wrong with a store: every problem with the image that has it, not only the first.

Letters  R regions of an image, C classes with the background.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visling.image_ids import canonical
from visling.regions.store import NativeStore
from visling.types import RegionArray

OUTSIDE = 1.0
"""Pixels by which a box may leave its image: detectors round."""
SUM_TOLERANCE = 0.01
"""How far a class distribution may sum from 1; it is stored in half precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    kind: str
    """What it is, in one word."""
    image: str | None
    """The image that has it; None = the store."""
    what: str
    """What was found and what is expected."""


def find_problems(store: NativeStore, progress: Callable[[int, int], None] | None = None) -> Iterator[Problem]:
    """Everything that is wrong with a store, from digests to single numbers; reads all of it, with little memory.

    Args:
        progress: called with images done and in all.
    """
    for _, what in store.damaged_files():
        yield Problem(kind="digest", image=None, what=what)
    if (misplaced := _find_misplaced(store)) is not None:
        yield misplaced
        return
    yield from _find_repeated(store)
    for number, (image_id, regions) in enumerate(store.scan(), 1):
        for kind, what in _examine(regions, len(store.class_names), len(store.attribute_names)):
            yield Problem(kind=kind, image=image_id, what=what)
        if progress is not None:
            progress(number, len(store))


def _find_misplaced(store: NativeStore) -> Problem | None:
    """The first image whose rows are not those behind the rows of the image before."""
    end = 0
    for image_id, placement in store.placements():
        if placement.first_row != end or placement.regions < 0:
            return Problem(
                kind="index",
                image=image_id,
                what=f"begins at row {placement.first_row} with {placement.regions} rows; expected row {end}. "
                "The index is damaged: convert or extract again.",
            )
        end += placement.regions
    if end != (total := store.manifest["regions"]):
        return Problem(kind="index", image=None, what=f"the index has {end} rows, the manifest {total}.")
    return None


def _find_repeated(store: NativeStore) -> Iterator[Problem]:
    """Ids that occur twice, and images that are stored twice under two spellings of their id."""
    for one, other in itertools.pairwise(store.ids):
        if one == other:
            yield Problem(kind="id", image=one, what="occurs twice in the index.")
    spellings: dict[str, list[str]] = {}
    for image_id in dict.fromkeys(store.ids):
        if (alias := canonical(image_id)) != image_id:
            spellings.setdefault(alias, []).append(image_id)
    known = frozenset(store.ids)
    for alias, names in spellings.items():
        group = [alias, *names] if alias in known else names
        for name, other in itertools.combinations(group, 2):
            if _are_equal(store[name], store[other]):
                yield Problem(
                    kind="alias",
                    image=other,
                    what=f"is stored as {name!r} too, with the same boxes: one image under two ids, so that a short id "
                    "of it is ambiguous.",
                )


def _are_equal(one: RegionArray, other: RegionArray) -> bool:
    return one.size == other.size and np.array_equal(one.boxes, other.boxes)


def _examine(regions: RegionArray, classes: int, attributes: int) -> Iterator[tuple[str, str]]:
    """Kind and description of what is wrong with one image.

    Args:
        classes, attributes: how many have a name; 0 = none has.
    """
    width, height = regions.size
    if min(width, height) <= 0:
        yield "size", f"is of {width} x {height} pixels; expected a positive width and height."
    for name in ("features", "boxes", "class_confidence", "attribute_confidence", "probs"):
        values = getattr(regions, name)
        if values is not None and (bad := _count_rows(~np.isfinite(values))):
            yield "number", f"{bad} of {len(regions)} regions have {name} that are not finite."
    yield from _examine_boxes(regions)
    probs = regions.probs
    if probs is not None and len(probs):
        sums = probs.astype(np.float32).sum(1)
        if bad := int((~(np.abs(sums - 1) <= SUM_TOLERANCE)).sum()):
            worst = float(sums[np.abs(sums - 1).argmax()])
            yield "distribution", f"{bad} of {len(regions)} class distributions do not sum to 1; found {worst:.3f}."
    for name, lowest, named in (("classes", 0, classes), ("attributes", -1, attributes)):
        labels = getattr(regions, name)
        most = named or (probs.shape[1] - 1 if name == "classes" and probs is not None else 0)
        if labels is None or not labels.size:
            continue
        low, high = int(labels.min()), int(labels.max())
        if low < lowest or (most and high >= most):
            expected = f"{lowest} to {most - 1}" if most else f"{lowest} or more"
            yield "label", f"has {name} from {low} to {high}; expected {expected}."


def _examine_boxes(regions: RegionArray) -> Iterator[tuple[str, str]]:
    boxes, (width, height) = regions.boxes, regions.size
    if not len(boxes):
        return
    if bad := _count_rows(boxes[:, 2:] < boxes[:, :2]):
        yield "box", f"{bad} of {len(boxes)} boxes are inverted; expected x2 >= x1 and y2 >= y1."
    limits = np.array([width, height, width, height], np.float32)
    beyond = np.maximum(boxes - limits, -boxes)
    if bad := _count_rows(beyond > OUTSIDE):
        swapped = not (np.maximum(boxes - limits[[1, 0, 3, 2]], -boxes) > OUTSIDE).any()
        hint = " They fit an image of swapped width and height." if swapped else ""
        yield (
            "box",
            f"{bad} of {len(boxes)} boxes leave the image of {width} x {height}, by up to {beyond.max():.1f} "
            f"pixels.{hint}",
        )
    if len(boxes) > 1 and boxes.max() <= 1.0 and min(width, height) > 2:
        yield "box", f"the boxes look like unit corners in an image of {width} x {height}; expected pixels."


def _count_rows(wrong: NDArray[np.bool_]) -> int:
    """Rows (R) or (R, C) with something wrong."""
    return int(wrong.reshape(len(wrong), -1).any(1).sum()) if wrong.size else 0
