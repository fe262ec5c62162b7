"""GQA: how answers are listed, learned, predicted, scored and submitted."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from visling.data.annotations.gqa_records import GqaRecord
from visling.data.answers import AnswerVocabulary
from visling.data.corpora.base import check_images
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError, StoreError
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.tasks.base import load
from visling.tasks.gqa import GQA, GqaConfig
from visling.types import Batch, InputSpec, Prediction, RegionArray, Targets

RNG = np.random.default_rng(0)
UNREAD = cast(Batch, None)
"""The batch of a decoding that does not look at it."""


def record(number: str = "07", **fields: Any) -> GqaRecord:
    known = {
        "images": (number,), "question": "is it red?", "answer": "yes", "structural": "verify", "semantic": "attr",
        "detailed": "verifyAttr",
    }  # fmt: skip
    return GqaRecord(id=number, **(known | fields))


def predict(records: Sequence[GqaRecord], answer: Callable[[GqaRecord], Any]) -> list[Prediction]:
    return [Prediction(id=one.id, value=answer(one), confidence=0.5) for one in records]


def listed(*answers: str, **settings: Any) -> GQA:
    return GQA(GqaConfig(**settings), AnswerVocabulary(answers))


def layout() -> TextLayout:
    return TextLayout(Tokenizer(), InputSpec())


def entry(**fields: Any) -> dict[str, Any]:
    return {
        "question": "is it red?", "imageId": "1", "answer": "yes", "isBalanced": True,
        "groups": {"global": None, "local": "05-thing_red"}, "semantic": [],
        "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"}, "entailed": [],
    } | fields  # fmt: skip


def save(root: Path, name: str, content: Any) -> Path:
    (root / f"{name}.json").write_text(json.dumps(content))
    return root


# Answers


def test_answers_of_the_training_questions() -> None:
    task = GQA(GqaConfig(min_count=2))
    with pytest.raises(ConfigError, match="not known yet"):
        _ = task.heads
    task.setup(
        [record(str(number), answer=answer) for number, answer in enumerate(["no", "yes", "no", "yes", "red", None])]
    )
    assert list(task.answers) == ["no", "yes"]
    assert task.heads["classify"].outputs == 2
    with pytest.raises(DataError, match="none of the 1 training questions has an answer"):
        GQA().setup([record(answer=None)])


def test_answers_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"no": 1, "yes": 0}, protocol=2))
    (tmp_path / "a.json").write_text('["yes", "no"]')
    for name in ("a.pkl", "a.json"):
        task = GQA(GqaConfig(answers=tmp_path / name))
        task.setup([record(answer="red")])
        assert list(task.answers) == ["yes", "no"]
    assert list(GQA.from_state(task.state()).answers) == ["yes", "no"], "without the file"
    with pytest.raises(ConfigError, match="lists its answers under 'answers'"):
        GQA.from_state({"config": {}})


# Examples and losses


def test_targets_are_one_answer_or_none() -> None:
    task = listed("yes", "left", "right")
    targets = {
        answer: task.example(record(answer=answer), layout(), RNG).labels.get("answer")
        for answer in ("left", "Left", None)
    }
    assert targets["left"].dense().tolist() == [0, 1, 0]
    assert targets["Left"].dense().tolist() == [0, 0, 0], "compared as written"
    assert targets[None] is None
    mirrored = task.example(record(answer="left"), layout(), RNG).mirrored_labels
    assert mirrored["answer"].dense().tolist() == [0, 0, 1]
    assert not task.example(record(answer="yes"), layout(), RNG).mirrored_labels


LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.3, 0.2, -4.0]])
ONE_HOT = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bce", F.binary_cross_entropy_with_logits(LOGITS, ONE_HOT) * 3),
        ("kl", -LOGITS.log_softmax(1)[0, 1] / 2),
        ("mce", F.cross_entropy(LOGITS, torch.tensor([1, 0])) * 3),
    ],
)
def test_losses(kind: Any, expected: torch.Tensor) -> None:
    loss = listed("a", "b", "c", loss=kind).loss({"classify": LOGITS}, Targets(answer=ONE_HOT))
    assert_close(loss.value, expected)
    assert loss.parts["answer_accuracy"][0] == 0


@pytest.mark.parametrize("kind", ["bce", "kl", "mce"])
def test_predictions_are_the_best_answers(kind: Any) -> None:
    task = listed("a", "b", "c", loss=kind)
    first, second = task.decode({"classify": LOGITS}, UNREAD, [record("07"), record("7")])
    assert (first.id, first.value, second.id, second.value) == ("07", "a", "7", "a")
    assert [answer for answer, _ in first.top] == ["a", "c", "b"]
    chance = LOGITS.sigmoid() if kind == "bce" else LOGITS.softmax(1)
    assert first.confidence == pytest.approx(float(chance[0, 0]))
    assert task.submission([first, second]) == [
        {"questionId": "07", "prediction": "a"}, {"questionId": "7", "prediction": "a"},
    ]  # fmt: skip


# Report


def make_split(root: Path, *, choices: bool = True) -> GQA:
    everything = {
        "01": entry(entailed=["02", "01"]),
        "02": entry(isBalanced=False, answer="no", imageId="2"),
        "03": entry(
            answer="red", groups={"global": "color", "local": None},
            types={"structural": "query", "semantic": "attr", "detailed": "directOf"},
            semantic=[{"operation": "select", "argument": "thing (1)"}, {"operation": "query", "argument": "color"}],
        ),
        "04": entry(imageId="n3", answer="no"),
    }  # fmt: skip
    save(root, "val_all_questions", everything)
    save(root, "val_balanced_questions", {number: one for number, one in everything.items() if one["isBalanced"]})
    if choices:
        allowed = {"valid": ["yes", "no"], "plausible": ["yes"]}
        save(root, "val_choices", dict.fromkeys(everything, allowed))
    return GQA()


def test_report(tmp_path: Path) -> None:
    task = make_split(tmp_path)
    records = task.records(tmp_path, "val_all")
    report = task.report(predict(records, lambda one: "yes"), records)
    scores = {name: (pytest.approx(score.value), score.count) for name, score in report.scores.items()}
    assert scores == {
        "accuracy": (100 / 3, 3), "binary": (50, 2), "open": (0, 1), "validity": (100, 3), "plausibility": (100, 3),
        "consistency": (0, 1), "distribution": (1, 1),
    }  # fmt: skip
    assert report.variants == {"script": "official"}
    assert {name: score.count for name, score in report.by["structural"].items()} == {"query": 1, "verify": 2}
    assert report.by["semantic"]["attr"].count == 3
    assert {number: score.count for number, score in report.by["steps"].items()} == {"0": 2, "2": 1}
    assert {number: score.count for number, score in report.by["words"].items()} == {"3": 3}
    low, high = report.scores["accuracy"].low, report.scores["accuracy"].high
    assert low is not None
    assert high is not None
    assert low < 100 / 3 < high


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    task = make_split(tmp_path, choices=False)
    records = task.records(tmp_path, "val")
    report = task.report(predict(records, lambda one: one.answer), records)
    assert report.scores.keys() == {"accuracy", "binary", "open", "distribution"}
    assert report.variants["validity and plausibility"].startswith("left out: the split has no choices file")
    assert "in the one with _all" in report.variants["consistency"]
    assert report.scores["accuracy"].value == 100
    assert json.loads(json.dumps(report.to_dict("gqa", "val")))["variants"] == report.variants


def test_a_prediction_is_missing(tmp_path: Path) -> None:
    task = make_split(tmp_path)
    records = task.records(tmp_path, "val")
    with pytest.raises(DataError, match="1 missing, 0 in excess, first '04'"):
        task.report(predict(records, lambda one: "yes")[:-1], records)


def test_questions_that_cannot_be_scored() -> None:
    task = listed("yes")
    unknown = [record(answer=None)]
    assert not task.labelled(unknown)
    assert task.labelled([record()])
    with pytest.raises(DataError, match="1 questions have no answer, first '07'"):
        task.report(predict(unknown, lambda one: "yes"), unknown)
    with pytest.raises(DataError, match="question 07 has no answer"):
        task.report(predict(unknown, lambda one: "yes"), [replace(unknown[0], structural="")])
    unbalanced = [record(balanced=False)]
    with pytest.raises(DataError, match="none of the 1 questions is balanced"):
        task.report(predict(unbalanced, lambda one: "yes"), unbalanced)


def test_lists_without_types_have_an_accuracy(tmp_path: Path) -> None:
    labels = [{"yes": 1.0}, {"no": 1.0}]
    save(
        tmp_path,
        "valid",
        [{"img_id": "1", "question_id": f"0{k}", "sent": "red?", "label": labels[k]} for k in range(2)],
    )
    task = GQA()
    records = task.records(tmp_path, "valid")
    report = task.report(predict(records, lambda one: "yes"), records)
    assert {name: score.value for name, score in report.scores.items()} == {"accuracy": 50}
    assert report.variants == {"script": "LXMERT's evaluator, since questions have no types"}
    majority = task.baselines(records, records)["majority answer per local group"]
    assert {prediction.value for prediction in majority} == {"no"}, "the first of two that are as frequent"


def test_notes(tmp_path: Path) -> None:
    save(tmp_path, "val_balanced_questions", {"1": entry(), "2": entry(question=""), "3": entry(answer="red")})
    task = listed("yes")
    records = task.records(tmp_path, "val")
    assert task.notes(records) == [
        "1 questions without a word are left out",
        "1 of 2 questions have an answer that is not among those listed",
    ]
    assert listed("yes", "red").notes(records) == []


def test_details(tmp_path: Path) -> None:
    task = make_split(tmp_path)
    records = task.records(tmp_path, "val_all")
    rows = task.details(predict(records, lambda one: "yes"), records)
    assert [(row["id"], row["type"], row["truth"], row["score"]) for row in rows] == [
        ("01", "verify", "yes", 1.0), ("02", "verify", "no", 0.0), ("03", "query", "red", 0.0),
        ("04", "verify", "no", 0.0),
    ]  # fmt: skip
    bare = [record(answer=None)]
    assert task.details(predict(bare, lambda one: "yes"), bare)[0]["score"] is None


# Baselines


def test_majority_answers() -> None:
    train = [
        record("1", structural="query", detailed="directOf", global_group="color", local_group="star", answer="red"),
        record("2", structural="query", detailed="directOf", global_group="color", local_group="star", answer="red"),
        *(
            record(
                f"3{k}",
                structural="query",
                detailed="directOf",
                global_group="color",
                local_group="ring",
                answer="blue",
            )
            for k in range(3)
        ),
        *(record(f"4{k}", answer="yes") for k in range(9)),
        record("5", answer=None),
    ]
    asked = [
        record("a", structural="query", detailed="directOf", global_group="color", local_group="star"),
        record("b", structural="query", detailed="directOf", global_group="color", local_group="moon"),
        record("c", structural="query", detailed="other", global_group="x", local_group="moon"),
        record("d", structural="choose", detailed="other"),
    ]
    found = listed("yes").baselines(train, asked)
    assert [one.value for one in found["majority answer per local group"]] == ["red", "blue", "blue", "yes"]
    assert [one.value for one in found["majority answer per question type"]] == ["blue", "blue", "blue", "yes"]
    assert found["majority answer per local group"][1].confidence == pytest.approx(3 / 5)
    with pytest.raises(DataError, match="majority baseline needs training questions"):
        listed("yes").baselines([record(answer=None)], asked)


# Images


def test_an_image_without_regions_is_named(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", feature_size=2, fingerprint="x") as writer:
        boxes = np.array([[0, 0, 5, 5]], np.float32)
        writer.add("2375429", RegionArray(features=np.ones((1, 2), np.float16), boxes=boxes, size=(9, 9)))
    store = NativeStore.open(tmp_path / "store")
    check_images([record(images=("2375429",))], store)
    with pytest.raises(StoreError, match="example '09' needs image 'n161313'"):
        check_images([record("07", images=("2375429",)), record("09", images=("n161313",))], store)


def test_query() -> None:
    asked = listed("yes").query(["is it red?"], ["photo"])
    assert (asked.images, asked.question, asked.answer) == (("photo",), "is it red?", None)
    assert load("gqa") is GQA
