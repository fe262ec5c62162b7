"""How true explanations are over a data set: accuracy as what they find is removed, most relevant first and least
relevant first, against removal by chance and by raw attention.

Every question is explained once, for the answer that the model gives to all of it, and asked again with more and more
removed. With the most relevant first, the smaller the area under the accuracy the better; with the least relevant
first, the larger.

Source   Chefer, Gur & Wolf 2021 (arXiv 2103.15679), section 4. The paper gives no interval; ours are 95 % by the
         bootstrap over images, of an area and of the difference between two areas of the same questions.
Letters  N questions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from visling import runtime
from visling.analysis.relevance import METHODS, Explanation, explain
from visling.analysis.relevance_rules import Rules
from visling.analysis.removal import FRACTIONS, PARTS, SIGNS, Asked, Asker, Order, Part, area_under, list_rows_read
from visling.data.batches.shown import ShownExamples
from visling.errors import ConfigError, DataError
from visling.models.task_model import TaskModel
from visling.tasks.answers import mean_score
from visling.tasks.base import Score, Task

RELEVANCE, RANDOM, RAW = "relevance", "random", "raw_attention"
"""The published method, and what methods are compared with."""
CONTRAST = "contrast"
"""Relevance of the answer's logarithm of probability (`Rules.contrast`), which is judged next to the published
method."""


@dataclass(frozen=True, kw_only=True)
class JudgedCurve:
    """Accuracy of a model as a method's order removes words or regions."""

    part: Part
    method: str
    """Of `relevance.METHODS`, "contrast", or "random"."""
    order: Order
    accuracy: tuple[float, ...]
    """In percent at each fraction."""
    area: Score
    """Under the accuracy, by the trapezoid rule, in percent."""
    gain: Mapping[str, Score]
    """Name of what it is compared with -> by how much the area is better, in percent: smaller with the most relevant
    first, larger with the least relevant first. A random order is compared with nothing."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Curves of a data set."""

    questions: Mapping[Part, int]
    """That have something to remove."""
    images: int
    fractions: tuple[float, ...]
    """Shares that are removed."""
    seeds: int
    """Random orders of each question."""
    curves: tuple[JudgedCurve, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain objects."""
        return asdict(self)


class _Curve(NamedTuple):
    part: Part
    method: str
    order: Order


def judge(
    model: TaskModel,
    task: Task[Any, Any],
    batches: Iterable[ShownExamples],
    *,
    methods: Sequence[str] = METHODS,
    fractions: Sequence[float] = FRACTIONS,
    seeds: int = 5,
    progress: Callable[[int], None] = lambda done: None,
) -> Judgement:
    """Curves of labelled examples.

    Args:
        model: in evaluation mode.
        methods: of `relevance.METHODS`; with "relevance" also by contrast, and raw attention always.
        seeds: random orders of each question, whose mean accuracy is compared.
        progress: called with the number of questions done.
    Raises:
        ConfigError: no such method, a task whose answers have no output of their own, or one that ranks.
        DataError: an example has no label, or none has anything to remove.
    """
    if task.all_pairs() is not None:
        raise ConfigError(
            f"the task {task.name} ranks all texts and images, so that no answer is right or wrong by itself. Judge a "
            "run of another task."
        )
    methods = list(dict.fromkeys([*methods, RAW]))
    found: dict[_Curve, list[NDArray[np.float64]]] = defaultdict(list)
    images: dict[Part, list[str]] = {part: [] for part in PARTS}
    done = 0
    for shown in batches:
        judged = _JudgedBatch(model, task, shown, methods, fractions, seeds)
        for curve, scores in judged.score().items():
            found[curve].append(scores)
        for part, numbers in judged.numbers.items():
            images[part] += [shown.records[number].images[0] for number in numbers]
        done += len(shown.records)
        progress(done)
    joined = {curve: np.concatenate(parts) for curve, parts in found.items()}
    areas = {curve: np.array([area_under(fractions, row) for row in scores]) for curve, scores in joined.items()}
    return Judgement(
        questions={part: len(names) for part, names in images.items()},
        images=len({name for names in images.values() for name in names}),
        fractions=tuple(fractions),
        seeds=seeds,
        curves=tuple(
            JudgedCurve(
                part=curve.part,
                method=curve.method,
                order=curve.order,
                accuracy=tuple((100 * scores.mean(0)).tolist()),
                area=mean_score(areas[curve].tolist(), images[curve.part]),
                gain=_compare(curve, areas, images[curve.part]),
            )
            for curve, scores in joined.items()
            if len(scores)
        ),
    )


def _compare(curve: _Curve, areas: Mapping[_Curve, NDArray[np.float64]], images: Sequence[str]) -> dict[str, Score]:
    """`JudgedCurve.gain`."""
    if curve.order == "random":
        return {}
    others = {RANDOM: _Curve(curve.part, RANDOM, "random"), RAW: curve._replace(method=RAW)}
    return {
        name: mean_score((-SIGNS[curve.order] * (areas[curve] - areas[other])).tolist(), images)
        for name, other in others.items()
        if other != curve
    }


class _JudgedBatch:
    """The questions of a batch, explained, and asked again in every order."""

    def __init__(
        self,
        model: TaskModel,
        task: Task[Any, Any],
        shown: ShownExamples,
        methods: Sequence[str],
        fractions: Sequence[float],
        seeds: int,
    ) -> None:
        self.task, self.shown, self.fractions = task, shown, fractions
        given = model, task, shown.batch, shown.records
        self.explanations = explain(*given, methods=methods, most=1)
        self.contrasts: list[Explanation] = []
        if RELEVANCE in methods:
            self.contrasts = explain(*given, methods=[RELEVANCE], most=1, rules=Rules(contrast=True))
            methods = [RELEVANCE, CONTRAST, *(name for name in methods if name != RELEVANCE)]
        rows = [list_rows_read(explanation) for explanation in self.explanations]
        self.asker = Asker(model, task, shown.batch, shown.examples, shown.records, rows=rows)
        self.numbers: dict[Part, list[int]] = {
            part: [n for n, one in enumerate(self.explanations) if one.scores[RAW] and self.asker.units[part][n]]
            for part in PARTS
        }
        """Of the examples that have something to remove."""
        self.orders: dict[_Curve, list[list[list[Asked]]]] = {}
        """For each repetition and each example, what is asked at each fraction."""
        for part in PARTS:
            for method in methods:
                for order, sign in SIGNS.items():
                    self.orders[_Curve(part, method, order)] = [
                        self._list_removals(part, self._find(part, method), sign)
                    ]
            self.orders[_Curve(part, RANDOM, "random")] = [
                self._list_removals(part, self._draw(part, seed)) for seed in range(seeds)
            ]

    def _list_removals(
        self, part: Part, scores_of: Callable[[int], NDArray[np.float64]], sign: int = 1
    ) -> list[list[Asked]]:
        return [
            self.asker.list_removals(part, number, sign * scores_of(number), self.fractions)
            for number in self.numbers[part]
        ]

    def _find(self, part: Part, method: str) -> Callable[[int], NDArray[np.float64]]:
        """Scores of an example's units by a method."""
        explanations = self.contrasts if method == CONTRAST else self.explanations
        name = RELEVANCE if method == CONTRAST else method
        return lambda number: self.asker.score_units(part, number, explanations[number].scores[name][0])

    def _draw(self, part: Part, seed: int) -> Callable[[int], NDArray[np.float64]]:
        """Random scores of an example's units; they depend on its number in the data set."""
        return lambda number: runtime.generator_for(seed, PARTS.index(part), self.shown.numbers[number]).random(
            len(self.asker.units[part][number])
        )

    def score(self) -> dict[_Curve, NDArray[np.float64]]:
        """What the answers are worth, as fractions, for each example and fraction that is removed; of random orders the
        mean."""
        every = (question for orders in self.orders.values() for one in orders for row in one for question in row)
        self.asker.ask(every)
        return {
            curve: np.mean([self._score(curve.part, one) for one in orders], axis=0)
            for curve, orders in self.orders.items()
        }

    def _score(self, part: Part, questions: Sequence[Sequence[Asked]]) -> NDArray[np.float64]:
        """(N, F) of what is asked of each example."""
        records = [self.shown.records[number] for number in self.numbers[part]]
        scores = np.zeros((len(records), len(self.fractions)))
        for place in range(len(self.fractions)):
            predictions = [self.asker[row[place]] for row in questions]
            for number, row in enumerate(self.task.details(predictions, records)):
                if row["score"] is None:
                    raise DataError(
                        f"example {row['id']} has no label, so that no answer to it is right or wrong. Judge a split "
                        "whose answers are known."
                    )
                scores[number, place] = row["score"]
        return scores
