"""Phrase localisation: whether the best boxes for a phrase are boxes of what it names.

Source   Flickr30K Entities: Plummer et al. 2015 (evaluation of the authors' pl-clc); BAN and VisualBERT, which count a
         hit on any box; ViLBERT's multi-task release, which knows the first box alone.
Shapes   R proposals of an image, m annotated boxes of a phrase; all boxes are corners of the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from visling import boxes as box_ops

Target = Literal["any_box", "union_box", "first_box"]
RANKS = (1, 5, 10)
"""How many of the best boxes may be looked at."""


@dataclass(frozen=True, kw_only=True)
class MatchRule:
    """When a box is right for a phrase."""

    target: Target = "any_box"
    """What it must overlap with: any annotated box (BAN, VisualBERT), the smallest box around all of them (the authors
    of the data set), or the first one (ViLBERT, multi-task)."""
    inclusive: bool = False
    """Count both end pixels in widths and heights (+1), as the authors and ViLBERT do."""
    strict: bool = False
    """The overlap must exceed the threshold (ViLBERT); else it may equal it."""
    threshold: float = 0.5
    """Intersection over union."""

    def __str__(self) -> str:
        pixels = " with +1" if self.inclusive else ""
        return f"{self.target}, IoU{pixels} {'>' if self.strict else '>='} {self.threshold:g}"


@dataclass(frozen=True, kw_only=True)
class PhraseScores:
    """Shares of phrases."""

    recall: dict[int, float]
    """k -> share with a right box among the k best."""
    upper_bound: float
    """Share with a right box among all."""
    phrases: int


def right_boxes(
    proposals: NDArray[np.floating] | Sequence[Sequence[float]],
    annotated: Sequence[Sequence[float]],
    rule: MatchRule | None = None,
) -> NDArray[np.bool_]:
    """Which proposals (R, 4) are right for a phrase with the annotated boxes (m, 4), m >= 1, as (R,).

    Args:
        rule: None = VisualBERT's.
    """
    rule = MatchRule() if rule is None else rule
    wanted = np.asarray(annotated, np.float64).reshape(-1, 4)
    if rule.target == "union_box":
        wanted = np.concatenate([wanted[:, :2].min(0), wanted[:, 2:].max(0)])[None]
    elif rule.target == "first_box":
        wanted = wanted[:1]
    given = torch.from_numpy(np.asarray(proposals, np.float64).reshape(-1, 4))
    overlaps = box_ops.iou(given, torch.from_numpy(wanted), inclusive=rule.inclusive).numpy()
    right: NDArray[np.bool_] = overlaps > rule.threshold if rule.strict else overlaps >= rule.threshold
    found: NDArray[np.bool_] = np.any(right, axis=1)
    return found


def first_rank(ranked: NDArray[np.bool_]) -> int | None:
    """Rank, from 1, of the first right box among boxes (R,) sorted by score; None if none is right."""
    at = np.flatnonzero(ranked)
    return int(at[0]) + 1 if len(at) else None


def phrase_scores(ranks: Sequence[int | None], reachable: Sequence[bool]) -> PhraseScores:
    """Recall at `RANKS` and its upper bound.

    Args:
        ranks: of each phrase, the rank of its first right box; None = none is right.
        reachable: of each phrase, whether any region of its image is right.
    """
    count = max(len(ranks), 1)
    return PhraseScores(
        recall={most: sum(rank is not None and rank <= most for rank in ranks) / count for most in RANKS},
        upper_bound=sum(reachable) / count,
        phrases=len(ranks),
    )
