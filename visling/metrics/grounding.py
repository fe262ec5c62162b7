"""Referring expressions: does the chosen box overlap the referred one by one half? One score per sentence.

Boxes are pixels x, y, w, h, as they are annotated: at an overlap of exactly one half, the rounding of x + w decides.

rule       overlap                                                            right   used by
mattnet    right edge x + w - 1; shared only where this leaves both extents   >= 0.5  MAttNet, the community's
           positive, and then 1 is added to them; areas w h                           reference
inclusive  both end pixels count: corners x + w, 1 is added to every extent   >= 0.5  VL-BERT's test script
strict     the same, in single precision                                      > 0.5   ViLBERT, both releases; VOLTA
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rule = Literal["mattnet", "inclusive", "strict"]

THRESHOLD = 0.5
"""Least overlap of a box that is right."""

DESCRIPTIONS = {
    "mattnet": "MAttNet's IoU of x, y, w, h, at least 0.5",
    "inclusive": "IoU of inclusive pixels, at least 0.5 (VL-BERT)",
    "strict": "IoU of inclusive pixels, above 0.5 (ViLBERT)",
}
"""What a report says of the rule that it followed."""


def overlap(boxes: ArrayLike, box: ArrayLike, rule: Rule = "mattnet") -> NDArray[Any]:
    """IoU of each of many boxes with one; float64, or float32 for "strict".

    Args:
        boxes: (..., 4) x, y, w, h.
        box: (4,) x, y, w, h.
    Returns:
        (...); 0 for a box whose width or height is negative.
    """
    first, second = np.asarray(boxes, np.float64), np.asarray(box, np.float64)
    if rule == "mattnet":
        start = np.maximum(first[..., :2], second[:2])
        extents = np.minimum(first[..., :2] + first[..., 2:] - 1, second[:2] + second[2:] - 1) - start
        inside = np.where((extents > 0).all(-1), (extents + 1).prod(-1), 0)
        areas = [each[..., 2:].clip(min=0).prod(-1) for each in (first, second)]
    else:
        number: Any = np.float32 if rule == "strict" else np.float64
        low: list[NDArray[Any]] = [each[..., :2].astype(number) for each in (first, second)]
        high: list[NDArray[Any]] = [(each[..., :2] + each[..., 2:]).astype(number) for each in (first, second)]
        inside = (np.minimum(*high) - np.maximum(*low) + number(1)).clip(min=0).prod(-1)
        areas = [(end - start + number(1)).clip(min=0).prod(-1) for start, end in zip(low, high, strict=True)]
    union = areas[0] + areas[1] - inside
    shares: NDArray[Any] = np.divide(inside, union, out=np.zeros_like(union), where=union > 0)
    return shares


def fits(boxes: ArrayLike, box: ArrayLike, rule: Rule = "mattnet") -> NDArray[np.bool_]:
    """Whether each of many boxes (..., 4) counts as the box (4,)."""
    overlaps = overlap(boxes, box, rule)
    reached: NDArray[np.bool_] = overlaps > THRESHOLD if rule == "strict" else overlaps >= THRESHOLD
    return reached


def referring_hits(
    predicted: Sequence[Sequence[float] | None], referred: Sequence[Sequence[float]], rule: Rule = "mattnet"
) -> list[float]:
    """1 for every sentence whose predicted box is right, else 0; None, where there was no candidate, is a miss.

    Their mean is the accuracy: no sentence is left out of it.
    """
    return [
        float(box is not None and bool(fits(box, truth, rule))) for box, truth in zip(predicted, referred, strict=True)
    ]
