"""VQA accuracy and NLVR v1 scores against the official scripts' results, rule by rule; scores by data set; the
bootstrap against its definition."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from visling.errors import DataError
from visling.metrics.answers import (
    CONTRACTIONS,
    MARKS,
    Average,
    Version,
    bootstrap,
    nlvr_images,
    nlvr_structured,
    normalise,
    same_ids,
    source_scores,
    strip_articles,
    strip_marks,
    strip_space,
    vqa_accuracy,
    vqa_score,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
VQA: dict[str, Any] = json.loads((GOLDEN / "vqa.json").read_text(encoding="utf-8"))
NLVR: dict[str, Any] = json.loads((GOLDEN / "nlvr1.json").read_text(encoding="utf-8"))
LABELS = {example["identifier"]: example["label"] for example in NLVR["examples"]}


@dataclasses.dataclass(frozen=True)
class Asked:
    id: str
    answers: tuple[str, ...]
    question_type: str = "what"
    answer_type: str = "other"


@dataclasses.dataclass(frozen=True)
class Scored:
    source: str
    scores: dict[str, float] | None


def test_scores_by_data_set() -> None:
    found = source_scores(
        [
            ("red", Scored("vqa", {"red": 0.3, "blue": 1.0})),
            ("green", Scored("vqa", {"red": 1.0})),
            ("red", Scored("gqa", {"red": 1.0})),
            ("red", Scored("vqa", {})),  # asked, but no answer is listed
            ("red", Scored("mscoco", None)),  # a caption
        ]
    )
    assert found.overall == Average(total=1.3, count=4)
    assert found.sources == {"gqa": Average(total=1.0, count=1), "vqa": Average(total=0.3, count=3)}
    assert source_scores([]).overall == Average(total=0.0, count=0)


ASKED = [Asked(str(c["question_id"]), tuple(c["answers"]), c["question_type"], c["answer_type"]) for c in VQA["cases"]]
GIVEN = {str(c["question_id"]): c["prediction"] for c in VQA["cases"]}


@pytest.mark.parametrize("version", ["2017", "2021"])
def test_vqa_equals_the_official_script(version: Version) -> None:
    scores, expected = vqa_accuracy(GIVEN, ASKED, version), VQA["expected"][version]
    assert scores.overall.percent == expected["overall"]
    assert 100 * scores.overall.value == pytest.approx(expected["overall_unrounded"], abs=1e-9)
    assert {kind: mean.percent for kind, mean in scores.question_types.items()} == expected["perQuestionType"]
    assert {kind: mean.percent for kind, mean in scores.answer_types.items()} == expected["perAnswerType"]
    assert {name: round(100 * score, 2) for name, score in scores.each.items()} == {
        str(case["question_id"]): case[f"acc_{version}"] for case in VQA["cases"]
    }
    assert scores.overall.count == len(VQA["cases"])
    assert sum(mean.total for mean in scores.question_types.values()) == pytest.approx(scores.overall.total)


def test_normalisation_equals_the_official_script() -> None:
    for pair in VQA["normalisation"]:
        marked = strip_marks(strip_space(pair["input"]))
        assert (marked, strip_articles(marked)) == (pair["after_punctuation"], pair["after_digit_article"]), pair[
            "input"
        ]
        assert normalise(pair["input"]) == pair["after_digit_article"]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("red-blue", "red blue"),
        ("red -blue", "red blue"),
        ("stop - now", "stop now"),
        ("x-y- z", "xy z"),  # one "- " decides for every hyphen
        ("1,000-pound", "1000pound"),  # a comma between digits deletes all marks
        ("a.m.", "am"),
        ("3.", "3"),
        ("1.5", "1.5"),
        ("no.1", "no.1"),
        ("." * 40, "." * 8),
        ("it's 5:30 & $2", "it's 5:30 & $2"),
        ("1,٣", "1 ٣"),  # only ASCII digits count as digits
    ],
)
def test_marks(raw: str, clean: str) -> None:
    assert " ".join(strip_marks(raw).split()) == clean


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("The Dog", "dog"),
        ("none", "0"),
        ("ten  cats", "10 cats"),
        ("dont", "don't"),
        ("Im", "im"),
        ("somebody'd", "somebodyd"),
        ("the", ""),
        ("eleven", "eleven"),
    ],
)
def test_articles_numbers_and_contractions(raw: str, clean: str) -> None:
    assert strip_articles(raw) == clean


def test_tables_have_the_official_sizes() -> None:
    assert len(CONTRACTIONS) == 120
    assert len(MARKS) == len(set(MARKS)) == 21


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_score_by_number_of_agreeing_answers(agreeing: int, score: float) -> None:
    answers = ["red"] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    assert vqa_score("red", answers) == pytest.approx(score, abs=1e-12)


def test_versions_differ_where_the_answers_agree() -> None:
    assert vqa_score("the man", ["the man"] * 10, "2021") == 1
    assert vqa_score("the man", ["the man"] * 10, "2017") == 0  # only the prediction loses its article
    assert vqa_score("two", ["2"] * 10, "2021") == 0
    assert vqa_score("two", ["2"] * 10, "2017") == 1
    assert vqa_score("red\n", ["red", "red "] * 5, "2021") == 1  # equal once stripped
    assert vqa_score("Two", ["Two"] * 5 + ["cat"] * 5, "2017") == 0
    assert vqa_score("Two", ["Two"] * 5 + ["cat"] * 5, "2021") == 1


def test_unanswered_questions_are_refused() -> None:
    with pytest.raises(DataError, match="without answers"):
        vqa_score("red", [])
    with pytest.raises(DataError, match="no examples"):
        _ = Average(total=0, count=0).value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"1": "a"}, "1 missing, 0 in excess .lacks '2'"),
        ({"1": "a", "2": "a", "3": "a"}, "0 missing, 1 in excess .has unknown '3'"),
        ({}, "2 missing"),
    ],
)
def test_ids_must_be_the_same_set(given: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        vqa_accuracy(given, [Asked("1", ("a",) * 10), Asked("2", ("a",) * 10)])
    same_ids({"1": "a", "2": "b"}, {"2": 0, "1": 0})


def test_nlvr_equals_the_official_scripts() -> None:
    images = nlvr_images([(name, value) for name, value in NLVR["predictions_images"]], LABELS)
    assert {"precision": images.precision.value, "consistency": images.consistency.value} == NLVR["expected_images"]
    assert images.precision.count == 6 * len(LABELS)
    structured = nlvr_structured([(name, value) for name, value in NLVR["predictions_structured"]], LABELS)
    assert {"precision": structured.precision.value, "consistency": structured.consistency.value} == NLVR[
        "expected_structured"
    ]
    assert structured.consistency.count == len({name.split("-")[0] for name in LABELS})


def test_one_wrong_picture_costs_its_presentation() -> None:
    labels = {"7-0": "true", "7-1": "true", "8-0": "false"}
    right = [(f"dev-{name}-{k}.png", label) for name, label in labels.items() for k in range(6)]
    assert nlvr_images(right, labels).consistency.value == 1
    wrong = [("dev-7-1-5.png", "false") if name == "dev-7-1-5.png" else (name, value) for name, value in right]
    scores = nlvr_images(wrong, labels)
    assert (scores.precision.total, scores.precision.count) == (17, 18)
    assert (scores.consistency.total, scores.consistency.count) == (1, 2)
    again = nlvr_images([*wrong, ("test-7-1-5.png", "TRUE")], labels)  # the later row counts; the split is not read
    assert again.precision.value == 1


def test_nlvr_wants_every_picture_once() -> None:
    rows = [(name, value) for name, value in NLVR["predictions_images"]]
    with pytest.raises(DataError, match="1 missing"):
        nlvr_images(rows[:-1], LABELS)
    with pytest.raises(DataError, match="1 in excess"):
        nlvr_images([*rows, ("dev-99999-0-0.png", "true")], LABELS)
    with pytest.raises(DataError, match="missing"):
        nlvr_structured([("7-0", "true")], {"7-0": "true", "7-1": "true"})


def test_bootstrap_draws_groups_not_values() -> None:
    values, groups = [1.0] * 50 + [0.0] * 50, ["a"] * 50 + ["b"] * 50
    assert bootstrap(values, groups, draws=500, seed=1) == (0.0, 1.0)  # two groups: often only one of them is drawn
    low, high = bootstrap(values, [str(n) for n in range(100)], draws=2000, seed=1)
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015)
    assert bootstrap(values, groups, seed=1) == bootstrap(values, groups, seed=1)


def test_bootstrap_weighs_groups_by_their_size() -> None:
    values, groups = [1.0] * 3 + [0.0], ["a", "a", "a", "b"]
    means = {bootstrap(values, groups, draws=1, seed=seed)[0] for seed in range(40)}
    assert means == {0.0, 0.75, 1.0}


def test_bootstrap_refuses_nothing_and_unequal_lengths() -> None:
    with pytest.raises(DataError, match="0 values"):
        bootstrap([], [])
    with pytest.raises(DataError, match="2 values and 1 groups"):
        bootstrap([1.0, 0.0], ["a"])


@pytest.mark.parametrize("version", ["2017", "2021"])
@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("giraffe", ["giraffe"], 1.0),
        ("giraffe", ["The Giraffe."], 1.0),
        ("zebra", ["giraffe"], 0.0),
        ("2", ["two", "two"], 1.0),
        ("red", ["red", "blue"], 0.5),
        ("red", ["red", "red", "blue"], 2 / 3),
        ("red", ["red", "red", "red"], 1.0),
        ("red", ["red", "red", "red", "red"], 1.0),
        ("red", ["red", "red", "red", "blue"], (3 * 2 / 3 + 1) / 4),
    ],
)
def test_few_answers_score_by_their_share(version: Any, prediction: str, answers: list[str], score: float) -> None:
    assert vqa_score(prediction, answers, version) == pytest.approx(score)
