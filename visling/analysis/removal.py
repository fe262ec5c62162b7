"""Asking again without some of the words or regions: whether an answer rests on what an explanation says it rests on.

Words are cut out and the others close up; [CLS], [SEP], the token that answers and phrases to be grounded always stay.
Regions are cut out of the image; none may be left. What stands behind the regions stays: a whole image that the store
or an extractor describes still shows everything, one that is the mean of the regions is the mean of those left.

Source   Chefer, Gur & Wolf 2021 (arXiv 2103.15679), section 4; release `perturbation.py`, whose numbers of what is kept
         are one too low at some fractions.
Letters  B rows, G rows of the example, T tokens, R regions, P phrases.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from visling.analysis.relevance import Explanation
from visling.models.task_model import TaskModel
from visling.tasks.base import Task
from visling.types import Batch, Example, Prediction, Record

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Shares that are removed, of the paper's curves."""
Part = Literal["regions", "text"]
"""What is removed."""
Order = Literal["most_first", "least_first", "random"]
"""Which of it goes first: the most relevant, the least relevant, or by chance."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How an answer fares as more is removed."""

    part: Part
    method: str
    """Of `relevance.METHODS`; "random" where the order is random."""
    order: Order
    values: tuple[float, ...]
    """Probability of the original answer at each fraction, of random orders the mean."""
    area: float
    """Under the values, by the trapezoid rule. With the most relevant first, lower is better; with the least relevant
    first, higher."""


@dataclass(frozen=True, kw_only=True)
class Changed:
    """The answer to a changed question."""

    value: float
    """Probability of the original answer."""
    answer: str
    """The answer now."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """An example asked again without each of its words and regions in turn."""

    value: float
    """Probability of the answer when nothing is missing."""
    words: tuple[Mapping[tuple[int, ...], Changed], ...]
    """For each row: the tokens of a word, as in `EncodedRow.words` -> what the model answers without it. Words that
    always stay are not in it."""
    regions: tuple[Mapping[int, Changed], ...]
    """For each row: a region's number, as in `EncodedRow.regions` -> what the model answers without it. An image that
    all rows share loses it in all of them."""


def without(
    batch: Batch,
    example: Example,
    *,
    tokens: Mapping[int, Collection[int]] | None = None,
    regions: Mapping[int, Collection[int]] | None = None,
) -> Batch:
    """The batch of one example (`Prepared.batch`) after tokens and regions were cut out of its rows.

    Args:
        tokens: row of the example -> positions, as in `Word.tokens`.
        regions: row of the example -> numbers of regions, as in `EncodedRow.regions`.
    Raises:
        DataError: there is no such row, token or region, or the token always stays.
    """
    raise NotImplementedError


def removable_tokens(example: Example) -> tuple[tuple[int, ...], ...]:
    """Positions in each row whose tokens may be cut out."""
    raise NotImplementedError


def keep(batch: Batch, tokens: Tensor, regions: Tensor | None) -> Batch:
    """The batch with those tokens and regions alone that are marked, in their order, the others closing up.

    Args:
        batch: unshared, with features of the regions.
        tokens: (B, T) bool.
        regions: (B, R) bool; None = all.
    """
    raise NotImplementedError


def removal_curves(
    model: TaskModel,
    task: Task[Any, Any],
    batch: Batch,
    example: Example,
    record: Record,
    explanation: Explanation,
    *,
    place: int = 0,
    fractions: Sequence[float] = FRACTIONS,
    seeds: int = 3,
) -> tuple[Curve, ...]:
    """Curves of one example for each part, each method of the explanation and both orders, and of random orders.

    Args:
        batch: of this example (`Prepared.batch`).
        place: of the answer in `explanation.prediction.top`.
        seeds: random orders to average.
    """
    raise NotImplementedError


def leave_one_out(
    model: TaskModel,
    task: Task[Any, Any],
    batch: Batch,
    example: Example,
    record: Record,
    prediction: Prediction,
    *,
    place: int = 0,
) -> LeftOut:
    """One example asked again without each of its words and regions in turn, in few forward passes.

    Args:
        batch: of this example (`Prepared.batch`).
        prediction: for the whole question.
        place: of the answer in `prediction.top`.
    """
    raise NotImplementedError


def area_under(fractions: Sequence[float], values: Sequence[float]) -> float:
    """Area under a curve by the trapezoid rule."""
    raise NotImplementedError
