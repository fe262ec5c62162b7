"""Scores of labels: precision, recall and F1 per label and averaged, area under the ROC curve, average precision.

Shapes   N examples, L labels. An example with one label is a row with one True.
Units    Fractions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Flags = NDArray[np.bool_]
Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LabelScores:
    """Scores of each label (L,), and of all together."""

    precision: Numbers
    """0 where the label is never predicted."""
    recall: Numbers
    """0 where no example has the label."""
    f1: Numbers
    true: NDArray[np.int64]
    """Examples that have the label."""
    predicted: NDArray[np.int64]
    """Examples that are given the label."""
    micro_f1: float
    """Of the counts summed over labels."""

    @property
    def occurring(self) -> Flags:
        """(L,) labels that some example has or is given."""
        occurring: Flags = (self.true + self.predicted) > 0
        return occurring

    @property
    def macro_f1(self) -> float:
        """Mean over the labels that occur, as `f1_score(average="macro")` of scikit-learn for one label per example."""
        return float(self.f1[self.occurring].mean()) if self.occurring.any() else 0.0

    @property
    def weighted_f1(self) -> float:
        """Mean over labels, weighted by the examples that have them."""
        return float((self.f1 * self.true).sum() / max(int(self.true.sum()), 1))


def label_scores(truth: Flags, predicted: Flags) -> LabelScores:
    """Precision, recall and F1.

    Args:
        truth, predicted: (N, L).
    """
    hits = (truth & predicted).sum(0)
    true, given = truth.sum(0), predicted.sum(0)
    return LabelScores(
        precision=hits / np.maximum(given, 1),
        recall=hits / np.maximum(true, 1),
        f1=2 * hits / np.maximum(true + given, 1),
        true=true,
        predicted=given,
        micro_f1=float(2 * hits.sum() / max(int(true.sum() + given.sum()), 1)),
    )


def auroc(truth: Flags, scores: Numbers) -> float | None:
    """Probability that an example with the label scores above one without it, ties counted half; None where all or none
    have it.

    Args:
        truth, scores: (N,).
    """
    positives = int(truth.sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        return None
    above = mid_ranks(scores)[truth].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def mid_ranks(values: Numbers) -> Numbers:
    """(N,) ranks from 1, the mean rank for equal values."""
    _, member, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Numbers = (last - (counts - 1) / 2)[member]
    return ranks


def average_precision(truth: Flags, scores: Numbers) -> float | None:
    """Precision averaged over the recall that each threshold adds, examples of equal score taken together; None where
    no example has the label.

    Args:
        truth, scores: (N,).
    """
    if not truth.any():
        return None
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(truth[order])
    last_of_tie = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = hits[last_of_tie]
    added = np.diff(hits, prepend=0) / hits[-1]
    return float((added * hits / (last_of_tie + 1)).sum())
