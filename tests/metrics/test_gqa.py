"""GQA's scores against those that the official script gave (`golden/metrics/gqa.json`), and what the script cannot
say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from visling.errors import DataError
from visling.metrics.gqa import Choices, GqaScores, gqa_scores, label_scores

EXACT = 1e-9


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the metric reads."""

    id: str
    answer: str | None
    question: str = "is it red?"
    balanced: bool = True
    structural: str = "verify"
    semantic: str = "attr"
    detailed: str = "verifyAttr"
    global_group: str | None = None
    num_steps: int = 2
    entailed: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Recording:
    """Questions, predictions and official scores."""

    questions: list[Question]
    predictions: dict[str, str]
    choices: Choices
    expected: dict[str, Any]

    def scores(self, **changes: Any) -> GqaScores:
        given = {"choices": self.choices, "consistency": True} | changes
        return gqa_scores(self.predictions, self.questions, **given)


NOT_STEPS = ("exist", "query: name", "choose name")


@pytest.fixture
def recording(golden: Path) -> Recording:
    content = json.loads((golden / "metrics" / "gqa.json").read_text())
    questions = []
    for number, entry in content["questions"].items():
        steps = [f"{step['operation']}: {step['argument']}" for step in entry["semantic"]]
        questions.append(
            Question(
                id=number,
                answer=entry["answer"],
                question=entry["question"],
                balanced=entry["isBalanced"],
                global_group=entry["groups"]["global"],
                num_steps=sum(not any(word in step for word in NOT_STEPS) for step in steps),
                entailed=tuple(entry["entailed"]),
                **entry["types"],
            )
        )
    choices = content["choices"]
    return Recording(
        questions,
        {entry["questionId"]: entry["prediction"] for entry in content["predictions"]},
        lambda number: (choices[number]["valid"], choices[number]["plausible"]),
        content["expected"],
    )


SCORES = ("accuracy", "binary", "open", "validity", "plausibility", "consistency")
BY = {
    "structural": "accuracyPerStructuralType",
    "semantic": "accuracyPerSemanticType",
    "words": "accuracyPerLength",
    "steps": "accuracyPerSteps",
}
"""Ours -> as recorded."""


def compare(recording: Recording, found: GqaScores) -> None:
    for name in SCORES:
        assert 100 * getattr(found, name).value == pytest.approx(recording.expected[name], abs=EXACT), name
    assert found.distribution.value == pytest.approx(recording.expected["distribution"], abs=EXACT)
    for ours, theirs in BY.items():
        means = {str(key): [100 * mean.value, mean.count] for key, mean in getattr(found, ours).items()}
        assert means.keys() == recording.expected[theirs].keys()
        for key, (value, count) in recording.expected[theirs].items():
            assert means[key] == [pytest.approx(value, abs=EXACT), count], (ours, key)


def test_every_score_is_the_official_one(recording: Recording) -> None:
    compare(recording, recording.scores())


def test_one_changed_prediction_is_noticed(recording: Recording) -> None:
    number = next(question.id for question in recording.questions if question.balanced)
    recording.predictions[number] += " "
    with pytest.raises(AssertionError):
        compare(recording, recording.scores())


def test_unbalanced_questions_count_for_consistency_alone(recording: Recording) -> None:
    unbalanced = {question.id for question in recording.questions if not question.balanced}
    before = recording.scores()
    for number in unbalanced:
        recording.predictions[number] = "something else"
    after = recording.scores()
    assert (after.accuracy, after.validity, after.distribution) == (
        before.accuracy,
        before.validity,
        before.distribution,
    )
    assert after.consistency != before.consistency
    for number in unbalanced:
        del recording.predictions[number]
    assert recording.scores(consistency=False).accuracy == before.accuracy
    with pytest.raises(
        DataError, match=f"{len(unbalanced)} of {len(recording.questions)} questions have no prediction"
    ):
        recording.scores()


def test_without_choices_and_consistency(recording: Recording) -> None:
    found = recording.scores(choices=None, consistency=False)
    assert (found.validity, found.plausibility, found.consistency) == (None, None, None)


def test_common_allows_three_answers_alone() -> None:
    asked = [Question(id=str(number), answer="x", detailed="twoCommon") for number in range(2)]
    found = gqa_scores({"0": "material", "1": "red"}, asked, choices=lambda number: (("red",), ("red",)))
    assert found.validity is not None
    assert (found.validity.total, found.validity.count) == (1, 2)


def test_distribution_ignores_answers_that_are_never_right() -> None:
    asked = [Question(id=str(number), answer="ab"[number // 3], global_group="g") for number in range(4)]
    right = gqa_scores({"0": "a", "1": "a", "2": "a", "3": "b"}, asked)
    assert right.distribution.value == 0
    wrong = gqa_scores({"0": "a", "1": "a", "2": "never", "3": "b"}, asked)
    assert wrong.distribution.value == pytest.approx((2 - 3) ** 2 / 3 / 100)
    assert gqa_scores({"0": "a"}, [Question(id="0", answer="a")]).distribution.count == 0, "no group at all"


def test_an_entailed_question_must_be_there() -> None:
    asked = [Question(id="0", answer="yes", entailed=("0", "1"))]
    with pytest.raises(DataError, match="question 0 entails '1', which is not among"):
        gqa_scores({"0": "yes"}, asked, consistency=True)
    found = gqa_scores({"0": "no"}, asked, consistency=True)
    assert found.consistency is not None
    assert found.consistency.count == 0, "only right answers are asked what they entail"


@pytest.mark.parametrize(
    ("predictions", "answer", "message"),
    [({}, "yes", "1 of 1 questions have no prediction, first '0'"), ({"0": "yes"}, None, "1 questions have no answer")],
)
def test_nothing_is_scored_by_halves(predictions: dict[str, str], answer: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        gqa_scores(predictions, [Question(id="0", answer=answer)])


def test_label_scores_divide_by_the_number_of_predictions() -> None:
    labels = {"07": {"yes": 1.0}, "7": {"no": 1.0}}
    assert label_scores({"07": "yes"}, labels).value == 1
    assert label_scores({"07": "yes", "7": "yes"}, labels).value == 0.5
    with pytest.raises(DataError, match="1 of 1 predictions are for questions that are not there, first '8'"):
        label_scores({"8": "yes"}, labels)
