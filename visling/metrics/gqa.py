"""Scores of GQA, equal to the official script; the share of right answers of LXMERT's evaluator.

Sources  GQA: `eval.py` of the data set's `eval.zip`. LXMERT: `GQAEvaluator` of its release.
Differs  Grounding, for models that submit attention maps, is not computed: the script's part for regions fails.
Units    Scores are fractions, but distribution is a chi-square divided by 100, lower being better.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from visling.errors import DataError
from visling.metrics.answers import Average

K = TypeVar("K", int, str)

COMMON = ("color", "material", "shape")
"""All that is valid and plausible where the pattern of a question has "Common" in its name."""

Choices = Callable[[str], tuple[Sequence[str], Sequence[str]]]
"""Question id -> its valid and its plausible answers."""


class GqaQuestion(Protocol):
    """What the metric reads of a question."""

    @property
    def id(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str | None: ...
    @property
    def balanced(self) -> bool: ...
    @property
    def structural(self) -> str: ...
    @property
    def semantic(self) -> str: ...
    @property
    def detailed(self) -> str: ...
    @property
    def global_group(self) -> str | None: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def entailed(self) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GqaScores:
    """Official scores, over balanced questions."""

    accuracy: Average
    binary: Average
    """Of questions that are not of the type "query"."""
    open: Average
    """Of those that are."""
    validity: Average | None
    """Share of predictions that could answer the question; None without choices."""
    plausibility: Average | None
    """Share of predictions that make sense in the real world."""
    consistency: Average | None
    """Mean, over right predictions that entail something, of the accuracy on what they entail; None unless asked
    for."""
    distribution: Average
    """Distance of predicted from true answers, within global groups and weighted by their size."""
    structural: Mapping[str, Average]
    semantic: Mapping[str, Average]
    words: Mapping[int, Average]
    """By number of words of the question."""
    steps: Mapping[int, Average]
    """By steps of reasoning."""


def gqa_scores(
    predictions: Mapping[str, str],
    questions: Sequence[GqaQuestion],
    *,
    choices: Choices | None = None,
    consistency: bool = False,
) -> GqaScores:
    """Official scores of predictions; answers are compared as written.

    Args:
        predictions: question id -> answer; those of other questions are not read.
        consistency: whether it is computed; `questions` must then hold all that the balanced ones entail.
    Raises:
        DataError: a balanced question (with `consistency`, any) has no prediction, a question has no answer, or a right
            one entails a question that is not there.
    """
    balanced = [question for question in questions if question.balanced]
    asked = questions if consistency else balanced
    if missing := [question.id for question in asked if question.id not in predictions]:
        raise DataError(
            f"{len(missing)} of {len(asked)} questions have no prediction, first {missing[0]!r}. "
            "Predict the whole split."
        )
    if unknown := [question.id for question in asked if question.answer is None]:
        raise DataError(f"{len(unknown)} questions have no answer, first {unknown[0]!r}: nothing can be scored.")
    hits = {question.id: float(predictions[question.id] == question.answer) for question in asked}
    in_order = [hits[question.id] for question in balanced]
    is_open = [question.structural == "query" for question in balanced]
    valid, plausible = _check_choices(predictions, balanced, choices) if choices is not None else (None, None)
    return GqaScores(
        accuracy=_average(in_order),
        binary=_average(hit for hit, query in zip(in_order, is_open, strict=True) if not query),
        open=_average(hit for hit, query in zip(in_order, is_open, strict=True) if query),
        validity=valid,
        plausibility=plausible,
        consistency=_average(_score_entailed(hits, balanced)) if consistency else None,
        distribution=_distribution(predictions, balanced),
        structural=_by(in_order, [question.structural for question in balanced]),
        semantic=_by(in_order, [question.semantic for question in balanced]),
        words=_by(in_order, [len(question.question.split()) for question in balanced]),
        steps=_by(in_order, [question.num_steps for question in balanced]),
    )


def label_scores(predictions: Mapping[str, str], labels: Mapping[str, Mapping[str, float]]) -> Average:
    """Score of each prediction in the label of its question, over the number of predictions (LXMERT's evaluator).

    Args:
        labels: question id -> answer -> score; an answer that is not there scores 0.
    Raises:
        DataError: a prediction for an unknown question.
    """
    if unknown := [number for number in predictions if number not in labels]:
        raise DataError(
            f"{len(unknown)} of {len(predictions)} predictions are for questions that are not there, first "
            f"{unknown[0]!r}. Score them with the file of the same split."
        )
    return _average(labels[number].get(answer, 0.0) for number, answer in predictions.items())


def _check_choices(
    predictions: Mapping[str, str], balanced: Sequence[GqaQuestion], choices: Choices
) -> tuple[Average, Average]:
    """Validity and plausibility."""
    valid: list[float] = []
    plausible: list[float] = []
    for question in balanced:
        lists = (COMMON, COMMON) if "Common" in question.detailed else choices(question.id)
        for found, allowed in zip((valid, plausible), lists, strict=True):
            found.append(float(predictions[question.id] in allowed))
    return _average(valid), _average(plausible)


def _score_entailed(hits: Mapping[str, float], balanced: Sequence[GqaQuestion]) -> list[float]:
    """Accuracy on what each right prediction entails, the question itself left out."""
    scores = []
    for question in balanced:
        others = [other for other in question.entailed if other != question.id]
        if not others or not hits[question.id]:
            continue
        if lacking := [other for other in others if other not in hits]:
            raise DataError(
                f"question {question.id} entails {lacking[0]!r}, which is not among the {len(hits)} questions: "
                "consistency needs the file of all questions, not of the balanced ones alone."
            )
        scores.append(sum(hits[other] for other in others) / len(others))
    return scores


def _distribution(predictions: Mapping[str, str], balanced: Sequence[GqaQuestion]) -> Average:
    """Chi-square of predicted answers within each global group, weighted by its number of questions.

    Quirk: predicted answers that no question of the group has are not counted.
    """
    true: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for question in balanced:
        if question.global_group is not None and question.answer is not None:
            true[question.global_group][question.answer] += 1
            predicted[question.global_group][predictions[question.id]] += 1
    total = 0.0
    for group, answers in true.items():
        distance = sum((predicted[group][answer] - count) ** 2 / count for answer, count in answers.items())
        total += distance * answers.total() / 100
    return Average(total=total, count=sum(answers.total() for answers in true.values()))


def _by(hits: Sequence[float], keys: Sequence[K]) -> dict[K, Average]:
    """Means of groups, in the order of their keys."""
    groups: dict[K, list[float]] = defaultdict(list)
    for hit, key in zip(hits, keys, strict=True):
        groups[key].append(hit)
    return {key: _average(groups[key]) for key in sorted(groups)}


def _average(scores: Iterable[float]) -> Average:
    values = list(scores)
    return Average(total=float(sum(values)), count=len(values))
