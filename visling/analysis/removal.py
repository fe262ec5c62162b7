"""Asking again without some of the words or regions: whether an answer rests on what an explanation says it rests on.

Words are cut out and the others close up; [CLS], [SEP], the token that answers and the tokens of phrases that are
grounded always stay. Regions are cut out of the image; none may be left. What stands behind the regions stays: a whole
image that the store or an extractor describes still shows everything, one that is the mean of the regions is the mean
of those that are left.

Source   Chefer, Gur & Wolf 2021 (arXiv 2103.15679), section 4; release `perturbation.py`, whose numbers of what is kept
         are one too low at some fractions.
Letters  N examples, G rows of each, B = N * G, T tokens, R regions, U units that are removed one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling import runtime
from visling.analysis.relevance import Explanation, Scores
from visling.errors import DataError
from visling.models.task_model import TaskModel
from visling.tasks.base import Task
from visling.types import Batch, Example, Prediction, Record, Regions, Slots, Text, TextRow

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Shares that are removed, of the paper's curves."""
Part = Literal["regions", "text"]
"""What is removed."""
PARTS: tuple[Part, ...] = ("regions", "text")
Order = Literal["most_first", "least_first", "random"]
"""Which of it goes first: the most relevant, the least relevant, or by chance."""
SIGNS: Mapping[Order, int] = {"most_first": 1, "least_first": -1}
"""Factor of the scores by which what has the highest goes first."""
Unit = tuple[tuple[int, int], ...]
"""(row, position) of what is removed together: a token, or a region in all rows that show it."""
_MOST_ROWS = 256
"""Rows of a forward pass."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How an answer fares as more is removed."""

    part: Part
    method: str
    """Of `relevance.METHODS`; "random" where the order is random."""
    order: Order
    fractions: tuple[float, ...]
    """Shares that are removed, ascending."""
    values: tuple[float, ...]
    """Probability of the original answer at each fraction; of random orders the mean."""
    area: float
    """Under the values, by the trapezoid rule. With the most relevant first, lower is better; with the least relevant
    first, higher."""


@dataclass(frozen=True, kw_only=True)
class Changed:
    """What a model predicts for a changed question."""

    value: float
    """Probability of the original answer."""
    prediction: Prediction


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """An example asked again without each of its words and regions in turn."""

    value: float
    """Probability of the answer when nothing is missing."""
    words: tuple[Mapping[tuple[int, ...], Changed], ...]
    """For each row: the tokens of a word, as in `Word.tokens` -> what follows without it. Words that always stay are
    not in it."""
    regions: tuple[Mapping[int, Changed], ...]
    """For each row: a region's number, as in `EncodedRow.regions` -> what follows without it. An image that all rows
    share loses the region in all of them."""


def removable_tokens(example: Example) -> list[list[int]]:
    """For each row of an example, the positions of the tokens that may be cut out."""
    return [[at for at in range(len(row.ids)) if not _stays(row, at)] for row in example.rows]


def _stays(row: TextRow, at: int) -> bool:
    special = at in (0, len(row.ids) - 1) if row.words is None else row.words[at] < 0
    return special or at == row.answer_at or at in row.phrases


def keep(batch: Batch, tokens: Tensor, regions: Tensor | None = None) -> Batch:
    """The batch with those tokens and regions alone that are marked, in their order.

    Args:
        batch: unshared, with features of the regions.
        tokens: (B, T) bool.
        regions: (B, R) bool; None = all.
    """
    tokens = tokens & batch.text.mask
    shown = batch.regions
    if shown is not None:
        regions = shown.mask if regions is None else regions & shown.mask
        shown = _keep_regions(shown, regions)
    links = batch.links
    if links is not None and regions is not None:
        links = _take(_take(links, tokens, 1).transpose(1, 2), regions, 1).transpose(1, 2)
    phrases = batch.phrases
    if phrases is not None:
        phrases = Slots(at=_move(phrases.at, tokens), mask=phrases.mask)
    return replace(batch, text=_keep_text(batch.text, tokens), regions=shown, links=links, phrases=phrases, pixels=None)


def _keep_text(text: Text, kept: Tensor) -> Text:
    at = None if text.answer_at is None else _move(text.answer_at[:, None], kept)[:, 0]
    take = partial(_take, kept=kept, least=1)
    return replace(
        text, ids=take(text.ids), mask=take(text.mask), segments=take(text.segments), answer_at=at, count=None
    )


def _keep_regions(regions: Regions, kept: Tensor) -> Regions:
    names = ("features", "boxes", "mask", "hidden", "image", "labels")
    found: dict[str, Any] = {
        name: _take(value, kept, 1) for name in names if (value := getattr(regions, name)) is not None
    }
    return replace(regions, **found, count=None)


def _take(values: Tensor, kept: Tensor, least: int) -> Tensor:
    """Values (B, N, ...) at the kept positions (B, N), padded with zeros to the most of any row, or to `least`."""
    longest = min(max(int(kept.sum(1).max()), least), kept.shape[1])
    order = (~kept).int().argsort(dim=1, stable=True)[:, :longest]
    there = kept.gather(1, order).view(*order.shape, *[1] * (values.dim() - 2))
    return values[torch.arange(len(order), device=order.device)[:, None], order] * there


def _move(at: Tensor, kept: Tensor) -> Tensor:
    """Where positions (B, P) are among the kept ones."""
    return (kept.cumsum(1) - 1).gather(1, at)


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
        DataError: there is no such row, token or region, or it always stays.
    """
    kept_tokens = batch.text.mask.clone()
    for row, positions in (tokens or {}).items():
        _require_row(row, example)
        allowed = removable_tokens(example)[row]
        for at in positions:
            if at not in allowed:
                raise DataError(
                    f"token {at} of row {row} cannot be left out: [CLS], [SEP], the token that answers and phrases "
                    f"that are grounded stay, and the row has {len(example.rows[row].ids)} tokens. Those that can "
                    f"are {_list(allowed)}."
                )
            kept_tokens[row, at] = False
    kept_regions = None if batch.regions is None else batch.regions.mask.clone()
    for row, numbers in (regions or {}).items():
        _require_row(row, example)
        count = 0 if kept_regions is None or batch.regions is None else int(batch.regions.mask[row].sum())
        for number in numbers:
            if kept_regions is None or not 0 <= number < count:
                raise DataError(
                    f"region {number} of row {row} cannot be left out: the row shows {count} regions, counted from 0, "
                    "and what stands behind them stays."
                )
            kept_regions[row, number] = False
    return keep(batch, kept_tokens, kept_regions)


def _require_row(row: int, example: Example) -> None:
    if not 0 <= row < len(example.rows):
        raise DataError(f"no row {row}: the question has {len(example.rows)}, counted from 0.")


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def probability(prediction: Prediction, place: int, again: Prediction) -> float:
    """Probability of an original candidate in a later prediction; 0 where that no longer lists it.

    Candidates that are regions are recognised by their boxes, since their numbers change when others are removed.
    """
    if not prediction.top:
        return again.confidence
    name = prediction.top[place][0]
    if not prediction.boxes:
        return dict(again.top).get(name, 0.0)
    chosen = prediction.value == prediction.boxes[0]  # one of the regions, not the best one of a phrase
    for (other, share), box in zip(again.top, again.boxes, strict=True):
        if box == prediction.boxes[place] and (chosen or other == name):
            return share
    return 0.0


def count_kept(units: int, fraction: float) -> int:
    """Units that stay when a fraction, a decimal number, is removed."""
    return int((1 - Fraction(str(fraction))) * units)


def area_under(fractions: Sequence[float], values: Sequence[float]) -> float:
    """Area under a curve by the trapezoid rule."""
    return float(np.trapezoid(values, fractions))


@dataclass(frozen=True, slots=True)
class Asked:
    """A question without some of its units."""

    example: int
    part: Part
    gone: frozenset[int]
    """Numbers of the units."""


class Asker:
    """Asks a model about the examples of a batch again, without some of their words or regions; each question once.

    Args:
        batch: of the examples, on the model's device, with features of the regions.
        rows: of each example, the numbers of the rows whose words are removed; None = all.
    """

    def __init__(
        self,
        model: TaskModel,
        task: Task[Any, Any],
        batch: Batch,
        examples: Sequence[Example],
        records: Sequence[Record],
        *,
        rows: Sequence[Collection[int]] | None = None,
    ) -> None:
        self.model, self.task, self.examples, self.records = model, task, examples, records
        self.rows = [range(batch.group)] * len(examples) if rows is None else rows
        self.batch = replace(batch.unshared(), pixels=None)
        self.units = {part: [self._list_units(part, number) for number in range(len(examples))] for part in PARTS}
        self._known: dict[Asked, Prediction] = {}

    def _list_units(self, part: Part, number: int) -> list[Unit]:
        """What can be removed from an example."""
        example, regions = self.examples[number], self.batch.regions
        if part == "text":
            positions = removable_tokens(example)
            return [((row, at),) for row in self.rows[number] for at in positions[row]]
        if regions is None:
            return []
        group = self.batch.group
        counts = regions.mask[number * group : (number + 1) * group].sum(1).tolist()
        if len(example.images) == 1:
            return [tuple((row, at) for row in range(group)) for at in range(counts[0])]
        return [((row, at),) for row, count in enumerate(counts) for at in range(count)]

    def score_units(self, part: Part, number: int, rows: Sequence[Scores]) -> NDArray[np.float64]:
        """What each unit of an example counts for, (U,)."""
        values = [getattr(scores, part) for scores in rows]
        units = self.units[part][number]
        return np.array([sum(float(values[row][at]) for row, at in unit) for unit in units], np.float64)

    def list_removals(
        self, part: Part, number: int, scores: NDArray[np.float64], fractions: Sequence[float]
    ) -> list[Asked]:
        """An example without the units of the highest scores, at each fraction; of equal ones the first goes first."""
        order = np.argsort(-scores, kind="stable").tolist()
        gone = [len(order) - count_kept(len(order), fraction) for fraction in fractions]
        return [Asked(number, part, frozenset(order[:count])) for count in gone]

    def ask(self, questions: Iterable[Asked]) -> None:
        """Predict for these questions, several in a batch, those with the most left first."""
        new = list(dict.fromkeys(question for question in questions if question not in self._known))
        new.sort(key=lambda question: (question.part, len(question.gone)))
        size = max(_MOST_ROWS // self.batch.group, 1)
        for start in range(0, len(new), size):
            chunk = new[start : start + size]
            for question, prediction in zip(chunk, self._predict(chunk), strict=True):
                self._known[question] = prediction

    def __getitem__(self, question: Asked) -> Prediction:
        """The prediction for a question that was asked."""
        return self._known[question]

    @torch.inference_mode()
    def _predict(self, questions: Sequence[Asked]) -> list[Prediction]:
        group, regions = self.batch.group, self.batch.regions
        device = self.batch.text.ids.device
        first = torch.tensor([question.example * group for question in questions], device=device)
        rows = (first[:, None] + torch.arange(group, device=device)).flatten()
        batch = _take_rows(self.batch, rows)
        tokens = batch.text.mask.clone()
        shown = None if regions is None else regions.mask[rows]
        for number, question in enumerate(questions):
            units = self.units[question.part][question.example]
            gone = [(number * group + row, at) for unit in question.gone for row, at in units[unit]]
            marked = tokens if question.part == "text" else shown
            if gone and marked is not None:
                marked[tuple(torch.tensor(gone, device=device).T)] = False
        batch = keep(batch, tokens, shown)
        encoded = self.model.encoder(batch, reads=self.model.reads_of_encoded(batch))  # features are computed
        records = [self.records[question.example] for question in questions]
        return self.task.decode(self.model.read(encoded, batch), batch, records)


def _take_rows(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of an unshared batch, in any order and number."""
    phrases = None if batch.phrases is None else replace(batch.phrases, taken=None)
    return replace(batch, phrases=phrases).map(lambda tensor: tensor[rows])


def list_rows_read(explanation: Explanation, place: int = 0) -> list[int]:
    """Rows of an example that its answer depends on: of several choices, the row of the one that is chosen."""
    methods = [by_place[place] for by_place in explanation.scores.values() if by_place]
    return sorted({row for rows in methods for row, one in enumerate(rows) if one.text.any() or one.regions.any()})


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
    """Curves of one example: for each part that it has, each method of the explanation in both orders, and random
    orders. Words are removed from the rows that the answer depends on.

    Args:
        batch: of this example (`Prepared.batch`); the model is not asked about its pixels again.
        place: of the answer in `explanation.prediction.top`.
        seeds: random orders to average.
    Returns:
        Empty where nothing was predicted.
    """
    if not all(explanation.scores.values()):
        return ()
    asker = Asker(model, task, batch, [example], [record], rows=[list_rows_read(explanation, place)])
    found: list[tuple[Part, str, Order, list[list[Asked]]]] = []
    for part in PARTS:
        if not asker.units[part][0]:
            continue
        for method, by_place in explanation.scores.items():
            scores = asker.score_units(part, 0, by_place[place])
            for order, sign in SIGNS.items():
                found.append((part, method, order, [asker.list_removals(part, 0, sign * scores, fractions)]))
        draws = [runtime.generator_for(seed).random(len(asker.units[part][0])) for seed in range(seeds)]
        found.append((part, "random", "random", [asker.list_removals(part, 0, draw, fractions) for draw in draws]))
    asker.ask(question for *_, orders in found for order in orders for question in order)
    curves = []
    for part, method, order, orders in found:
        values = [[probability(explanation.prediction, place, asker[question]) for question in one] for one in orders]
        mean = tuple(np.mean(values, axis=0).tolist())
        area = area_under(fractions, mean)
        curves.append(Curve(part=part, method=method, order=order, fractions=tuple(fractions), values=mean, area=area))
    return tuple(curves)


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
    asker = Asker(model, task, batch, [example], [record])
    words: list[dict[tuple[int, ...], Asked]] = [{} for _ in example.rows]
    number_of = {unit[0]: number for number, unit in enumerate(asker.units["text"][0])}
    for row, own in enumerate(example.rows):
        for tokens in _group_words(own):
            if gone := frozenset(number_of[row, at] for at in tokens if (row, at) in number_of):
                words[row][tokens] = Asked(0, "text", gone)
    regions: list[dict[int, Asked]] = [{} for _ in example.rows]
    for number, unit in enumerate(asker.units["regions"][0]):
        for row, at in unit:
            regions[row][at] = Asked(0, "regions", frozenset((number,)))
    whole = Asked(0, "text", frozenset())
    every = [question for row in words for question in row.values()]
    every += [question for row in regions for question in row.values()]
    asker.ask([whole, *every])

    def change(question: Asked) -> Changed:
        return Changed(value=probability(prediction, place, asker[question]), prediction=asker[question])

    return LeftOut(
        value=change(whole).value,
        words=tuple({tokens: change(question) for tokens, question in row.items()} for row in words),
        regions=tuple({at: change(question) for at, question in row.items()} for row in regions),
    )


def _group_words(row: TextRow) -> list[tuple[int, ...]]:
    """Positions of each word's tokens."""
    numbers = np.arange(len(row.ids)) if row.words is None else row.words
    groups: dict[int, list[int]] = {}
    for at, number in enumerate(numbers.tolist()):
        if number >= 0:
            groups.setdefault(number, []).append(at)
    return [tuple(positions) for positions in groups.values()]
