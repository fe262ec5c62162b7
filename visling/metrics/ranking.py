"""Ranks and recalls of retrieval: where the right candidate of each query stands.

Letters  Q queries, C candidates.
Source   The evaluation of caption retrieval that its literature shares (VSE++, SCAN); ViLBERT's release for captions as
         queries. Both sort by an unstable sort, so that equal scores are ordered by chance; here ties have a rule.
Units    Ranks count from 0, recalls are in percent; median and mean rank count from 1, as they are published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from visling.errors import DataError

CUTS = (1, 5, 10)
"""Lengths of the list at which recall is published."""

Ties = Literal["stable", "distractors_first"]
"""Among equal scores: the candidate that is listed first comes first ("stable"), or every wrong candidate comes before
a right one, so that a model that scores all alike finds nothing."""

_CELLS = 1 << 22
"""Scores that are compared at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """How well queries of one direction find a right candidate."""

    recalls: tuple[float, ...]
    """Share of the queries whose best right candidate is among the first 1, 5, 10, in percent."""
    median: float
    mean: float


def best_ranks(scores: NDArray[Any], queries: ArrayLike, candidates: ArrayLike, ties: Ties = "stable") -> NDArray[Any]:
    """Rank (Q,) of the best right candidate of every query, from 0.

    Args:
        scores: (Q, C), higher is better; a pair of -inf was not scored and comes last, the wrong ones first.
        queries: (Q,) what each query belongs to, such as the number of its image.
        candidates: (C,) what each candidate belongs to; those of the query's own are right.
    Raises:
        DataError: a score that is not a number, sizes that differ, or a query without a right candidate.
    """
    owners, owned = np.asarray(queries), np.asarray(candidates)
    if scores.shape != (len(owners), len(owned)):
        raise DataError(
            f"scores of {len(owners)} queries and {len(owned)} candidates must be a matrix of that shape; found "
            f"{scores.shape}."
        )
    ranks = np.empty(len(owners), np.int64)
    step = max(1, _CELLS // max(len(owned), 1))
    for start in range(0, len(owners), step):
        ranks[start : start + step] = _rank_rows(
            scores[start : start + step], owners[start : start + step, None] == owned, ties, start
        )
    return ranks


def _rank_rows(scores: NDArray[Any], right: NDArray[np.bool_], ties: Ties, start: int) -> NDArray[np.int64]:
    """Ranks of some of the queries; `start` is the number of the first."""
    if np.isnan(scores).any():
        raise DataError(
            f"a score of query {start + int(np.isnan(scores).any(1).argmax())} is not a number: the model diverged. "
            "Train it again with a lower rate."
        )
    if not right.any(1).all():
        raise DataError(
            f"query {start + int((~right.any(1)).argmax())} has no right candidate. Rank it among its own candidates."
        )
    ours = np.where(right, scores, -np.inf)
    first = np.where(right & (scores == ours.max(1, keepdims=True)), np.arange(scores.shape[1]), scores.shape[1])
    first = first.min(1, keepdims=True)  # (Q, 1) the best right candidate, the first of several
    best = np.take_along_axis(scores, first, axis=1)
    level = (scores == best) & ~right
    if ties == "stable":
        # Unscored pairs are no tie: where they stand says nothing.
        level &= (np.arange(scores.shape[1]) < first) | np.isneginf(best)
    ranks: NDArray[np.int64] = ((scores > best) | level).sum(1)
    return ranks


def summarise(ranks: ArrayLike) -> Ranking:
    """Recalls, median and mean of ranks that count from 0.

    Raises:
        DataError: no ranks.
    """
    places = np.asarray(ranks)
    if not places.size:
        raise DataError("the recall of no queries was asked for. Is the annotation file empty?")
    return Ranking(
        recalls=tuple(float(100 * (places < cut).mean()) for cut in CUTS),
        median=float(np.floor(np.median(places)) + 1),
        mean=float(places.mean() + 1),
    )


def average(rankings: Sequence[Ranking]) -> Ranking:
    """Mean of the rankings of several folds: COCO's "1K" is that of five times 1,000 images.

    Raises:
        DataError: no folds.
    """
    if not rankings:
        raise DataError("the mean of no folds was asked for.")
    return Ranking(
        recalls=tuple(float(np.mean(column)) for column in zip(*(one.recalls for one in rankings), strict=True)),
        median=float(np.mean([one.median for one in rankings])),
        mean=float(np.mean([one.mean for one in rankings])),
    )


def sum_of_recalls(*directions: Ranking) -> float:
    """ "rsum": all recalls of all directions added up."""
    return sum(sum(one.recalls) for one in directions)
