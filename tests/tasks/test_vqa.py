"""VQA: files to examples, both losses against plain arithmetic, decoding, the official numbers, a state that survives
JSON."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from visling.data.annotations.questions import QuestionRecord
from visling.data.answers import AnswerVocabulary
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError
from visling.metrics.answers import vqa_accuracy
from visling.tasks.answers import answer_loss
from visling.tasks.base import TaskSource
from visling.tasks.vqa import VQA, VqaConfig, answer_vocabulary, majority_answers
from visling.types import Batch, InputSpec, Prediction, Targets

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden" / "metrics" / "vqa.json").read_text(encoding="utf-8")
)
TOKENIZER = Tokenizer()
RNG = np.random.default_rng(0)

UNREAD = cast(Batch, None)
"""The batch of a decoding that does not look at it."""


def asked(
    number: int,
    answers: list[str],
    kind: str = "what color",
    best: str | None = None,
    question: str = "what color is it?",
) -> QuestionRecord:
    most = best if best is not None else max(answers, key=answers.count)
    return QuestionRecord(
        id=str(number),
        images=(str(number // 1000),),
        question=question,
        question_type=kind,
        answer_type="other",
        answers=tuple(answers),
        multiple_choice_answer=most,
    )


def unanswered(number: int) -> QuestionRecord:
    return QuestionRecord(
        id=str(number),
        images=("7",),
        question="what?",
        question_type="",
        answer_type="",
        answers=None,
        multiple_choice_answer=None,
    )


def task(*answers: str, **settings: Any) -> VQA:
    return VQA(VqaConfig(**{"loss": "kl", **settings}), AnswerVocabulary(answers))


def test_records_come_from_the_official_files(tmp_path: Path) -> None:
    questions = [{"question_id": n, "image_id": 42, "question": f"is it {n}?"} for n in (42000, 42001)]
    answers = [
        {
            "question_id": n,
            "image_id": 42,
            "question_type": "is it",
            "answer_type": "yes/no",
            "multiple_choice_answer": "yes",
            "answers": [{"answer": "yes", "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)],
        }
        for n in (42001, 42000)
    ]
    for split in ("train2014", "test2015"):
        (tmp_path / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "v2_mscoco_train2014_annotations.json").write_text(json.dumps({"annotations": answers}))
    vqa = VQA(VqaConfig(min_count=2))
    train = vqa.records(tmp_path, "train")
    assert [(r.id, r.images, r.question, r.multiple_choice_answer) for r in train] == [
        ("42000", ("42",), "is it 42000?", "yes"),
        ("42001", ("42",), "is it 42001?", "yes"),
    ]
    vqa.setup(train)
    assert list(vqa.answers) == ["yes"]
    assert [r.answers for r in vqa.records(tmp_path, "test2015")] == [None, None]


def test_vocabulary_lists_frequent_normalised_answers() -> None:
    given = ["The red"] * 2 + ["red"] + ["two"] * 3 + ["blue"] * 4 + ["1,000"] * 2 + ["rare"]
    records = [asked(n, [answer] * 10) for n, answer in enumerate(given)]
    assert list(answer_vocabulary(records, 2)) == ["blue", "2", "red", "1000"]
    with pytest.raises(DataError, match="occurs 9 times"):
        answer_vocabulary(records, 9)
    with pytest.raises(DataError, match="none of the 1 training questions has an answer"):
        answer_vocabulary([unanswered(1)], 1)


def test_setup_keeps_a_given_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "answers.txt"
    path.write_text("<unk>\n\nyes\n")
    vqa = VQA(VqaConfig(answers=path, min_count=1))
    vqa.setup([asked(1, ["red"] * 10)])
    assert list(vqa.answers) == ["<unk>", "", "yes"]
    assert vqa.heads["classify"].outputs == 3


def test_heads_need_the_vocabulary() -> None:
    with pytest.raises(ConfigError, match="call setup"):
        _ = VQA().heads


def test_example_asks_for_the_answer_slot_and_scores_softly() -> None:
    record = asked(5000, ["red"] * 3 + ["blue"] + ["The red"] * 6)
    vqa = task("blue", "red", "green")
    slotted = vqa.example(record, TextLayout(TOKENIZER, InputSpec(answer_slot="same_segment")), RNG)
    row = slotted.rows[0]
    assert slotted.images == ("5",)
    assert row.answer_at is not None
    assert row.ids[row.answer_at] == TOKENIZER.mask
    assert vqa.example(record, TextLayout(TOKENIZER, InputSpec()), RNG).rows[0].answer_at is None
    assert slotted.labels["answer"].dense().tolist() == pytest.approx([0.3, 0.9, 0.0])
    assert vqa.example(unanswered(1), TextLayout(TOKENIZER, InputSpec()), RNG).labels == {}


def test_soft_scores_equal_the_recorded_ones() -> None:
    layout = TextLayout(TOKENIZER, InputSpec())
    assert len(GOLDEN["soft_targets"]) > 10
    for case in GOLDEN["soft_targets"]:
        names = sorted(set(case["answers"]))
        scores = task(*names).example(asked(1, case["answers"]), layout, RNG).labels["answer"].dense()
        assert dict(zip(names, scores.tolist(), strict=True)) == pytest.approx(case["raw_count_table"], abs=1e-6)


def _cases() -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    return 3 * torch.randn(3, 4), torch.tensor([[1.0, 0.3, 0, 0], [0, 0, 0, 0], [0, 0.6, 0.9, 0.3]])


def test_kl_is_against_scores_that_do_not_sum_to_one() -> None:
    logits, scores = _cases()
    total = 0.0
    for row, truth in zip(logits.double(), scores.double(), strict=True):
        norm = math.log(row.exp().sum().item())
        total += sum(s * (math.log(s) - (x - norm)) for x, s in zip(row.tolist(), truth.tolist(), strict=True) if s)
    loss = answer_loss(logits, scores, "kl")
    assert loss.value.item() == pytest.approx(total / 3, rel=1e-5)
    assert [float(n) for n in loss.parts["answer"]] == [pytest.approx(total, rel=1e-5), 3]
    reference = torch.nn.functional.kl_div(logits.log_softmax(1), scores, reduction="batchmean")
    torch.testing.assert_close(loss.value, reference)


def test_bce_is_the_mean_times_the_number_of_answers() -> None:
    logits, scores = _cases()
    total = sum(
        -s * math.log(1 / (1 + math.exp(-x))) - (1 - s) * math.log(1 - 1 / (1 + math.exp(-x)))
        for x, s in zip(logits.double().flatten().tolist(), scores.double().flatten().tolist(), strict=True)
    )
    loss = answer_loss(logits, scores, "bce")
    assert loss.value.item() == pytest.approx(total / logits.numel() * logits.shape[1], rel=1e-5)


def test_training_accuracy_is_the_score_of_the_best_answer() -> None:
    logits = torch.tensor([[5.0, 0, 0, 0], [5.0, 0, 0, 0], [0, 0, 9.0, 0]])
    hits, count = answer_loss(logits, _cases()[1], "kl").parts["answer_accuracy"]
    assert hits.item() == pytest.approx(1.9)
    assert int(count) == 3


@pytest.mark.parametrize("kind", ["kl", "bce"])
def test_losses_are_float32_in_half_precision(kind: Any) -> None:
    logits, scores = _cases()
    loss = answer_loss(logits.bfloat16(), scores, kind)
    assert loss.value.dtype == torch.float32
    torch.testing.assert_close(loss.value, answer_loss(logits.bfloat16().float(), scores, kind).value, rtol=0, atol=0)


def test_loss_reads_collated_examples() -> None:
    vqa = task("blue", "red")
    source = TaskSource(
        vqa, [asked(1000, ["red"] * 10), asked(2000, ["blue"] * 2 + ["no"] * 8)], TextLayout(TOKENIZER, InputSpec())
    )
    examples = [source.example(index, RNG) for index in range(len(source))]
    _, targets = Collator(None, InputSpec(), TOKENIZER)(examples, [RNG, RNG])
    logits = {"classify": torch.tensor([[0.0, 1.0], [2.0, 0.0]])}
    expected = answer_loss(logits["classify"], torch.tensor([[0.0, 1.0], [0.6, 0.0]]), "kl")
    torch.testing.assert_close(vqa.loss(logits, targets).value, expected.value)
    assert not torch.allclose(task("blue", "red", loss="bce").loss(logits, targets).value, expected.value)


def test_decode_gives_five_answers_with_probabilities() -> None:
    names = [f"answer {n}" for n in range(7)]
    logits = torch.arange(7.0)[None] + torch.tensor([[0.0], [10.0]])
    predictions = task(*names).decode({"classify": logits}, UNREAD, [unanswered(1), unanswered(2)])
    assert [p.id for p in predictions] == ["1", "2"]
    first = predictions[0]
    assert [name for name, _ in first.top] == [f"answer {n}" for n in (6, 5, 4, 3, 2)]
    assert (first.value, first.confidence) == first.top[0]
    assert first.confidence == pytest.approx(math.exp(6) / sum(math.exp(n) for n in range(7)), rel=1e-5)
    assert predictions[1].confidence == pytest.approx(first.confidence, rel=1e-5)
    binary = task(*names, loss="bce").decode({"classify": logits}, UNREAD, [unanswered(1), unanswered(2)])
    assert binary[0].confidence == pytest.approx(1 / (1 + math.exp(-6)), rel=1e-5)


def test_the_unknown_answer_is_never_given() -> None:
    logits = {"classify": torch.tensor([[9.0, 1.0, 2.0]])}
    given = task("<unk>", "no", "yes").decode(logits, UNREAD, [unanswered(1)])[0]
    assert given.value == "yes"
    assert given.confidence == pytest.approx(math.exp(2) / (math.exp(1) + math.exp(2)), rel=1e-5)
    assert task("<unk>", "no", "yes", mask_unknown=False).decode(logits, UNREAD, [unanswered(1)])[0].value == "<unk>"
    assert task("maybe", "no", "yes").decode(logits, UNREAD, [unanswered(1)])[0].value == "maybe"


@pytest.mark.parametrize("version", ["2017", "2021"])
def test_report_gives_the_official_numbers(version: Any) -> None:
    records = [
        QuestionRecord(
            id=str(case["question_id"]),
            images=(str(case["image_id"]),),
            question="?",
            question_type=case["question_type"],
            answer_type=case["answer_type"],
            answers=tuple(case["answers"]),
            multiple_choice_answer=case["answers"][0],
        )
        for case in GOLDEN["cases"]
    ]
    predictions = [
        Prediction(id=str(case["question_id"]), value=case["prediction"], confidence=1.0)
        for case in reversed(GOLDEN["cases"])
    ]
    report = task("yes", metric_version=version).report(predictions, records).to_dict("vqa", "val")
    expected = GOLDEN["expected"][version]
    score = report["scores"]["accuracy"]
    assert (score["value"], score["count"]) == (expected["overall"], len(records))
    assert score["low"] < score["value"] < score["high"]
    assert report["variants"] == {"script": version}
    assert {name: score["value"] for name, score in report["by"]["question_type"].items()} == expected[
        "perQuestionType"
    ]
    assert {name: score["value"] for name, score in report["by"]["answer_type"].items()} == expected["perAnswerType"]
    with pytest.raises(DataError, match="1 missing"):
        task("yes").report(predictions[1:], records)


def test_submission_and_details() -> None:
    vqa = task("red", "blue")
    records = [asked(5000, ["red"] * 3 + ["blue"] * 7), unanswered(6000)]
    predictions = vqa.decode({"classify": torch.tensor([[2.0, 1.0], [0.0, 1.0]])}, UNREAD, records)
    assert vqa.submission(predictions) == [
        {"question_id": 5000, "answer": "red"},
        {"question_id": 6000, "answer": "blue"},
    ]
    rows = json.loads(json.dumps(vqa.details(predictions, records)))
    assert list(rows[0]) == ["id", "image", "text", "type", "truth", "prediction", "confidence", "top", "score"]
    assert (rows[0]["truth"], rows[0]["prediction"], rows[0]["score"]) == ("blue", "red", pytest.approx(0.9))
    assert [name for name, _ in rows[0]["top"]] == ["red", "blue"]
    assert (rows[1]["truth"], rows[1]["score"]) == (None, None)
    with pytest.raises(DataError, match="without answers"):
        vqa.report(predictions, records)


def test_a_test_split_is_submitted_in_full(tmp_path: Path) -> None:
    """The server takes every question of test2015 once, and so do the files that an evaluation writes."""
    questions = [{"question_id": n, "image_id": 1, "question": f"is it {n}?"} for n in (1000, 1001)]
    (tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json").write_text(json.dumps({"questions": questions}))
    vqa = task("red", "blue")
    records = vqa.records(tmp_path, "test2015")
    assert not vqa.labelled(records)
    predictions = vqa.decode({"classify": torch.tensor([[2.0, 1.0], [0.0, 1.0]])}, UNREAD, records)
    assert vqa.submission(predictions) == [
        {"question_id": 1000, "answer": "red"},
        {"question_id": 1001, "answer": "blue"},
    ]
    extra = Prediction(id="9", value="red", confidence=1.0)
    for given, message in (
        (predictions[1:], "1 missing, 0 in excess, first '1000'"),
        ([*predictions, extra], "0 missing, 1 in excess, first '9'"),
    ):
        with pytest.raises(DataError, match=message):
            vqa.details(given, records)
    with pytest.raises(DataError, match="two predictions answer question '1001'"):
        vqa.submission([*predictions, predictions[1]])
    own = vqa.submission([replace(extra, id="photo")])
    assert own == [{"question_id": "photo", "answer": "red"}], "ids of one's own files may be words"


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Two dogs", ["two dogs"] * 10, 1.0),  # 2021 would leave unanimous answers as they are
        ("the man's hat?", ["man 's hat"] * 4 + ["hat"] * 6, 1.0),
        ("1,000", ["1000"] * 3 + ["10"] * 7, 0.9),
        ("1,0-0", ["10 0"] * 2 + ["no"] * 8, 0.6),  # commas are gone before the marks are judged
        ("dont", ["don't"] * 10, 1.0),
        ("cat", ["dog"] * 10, 0.0),
    ],
)
def test_mmf_normalises_in_its_own_way(prediction: str, answers: list[str], score: float) -> None:
    vqa = task("red", metric_version="mmf")
    report = vqa.report([Prediction(id="1000", value=prediction, confidence=1.0)], [asked(1000, answers)])
    assert report.scores["accuracy"].value == pytest.approx(100 * score)
    assert report.variants == {"script": "mmf"}
    assert vqa.details([Prediction(id="1000", value=prediction, confidence=1.0)], [asked(1000, answers)])[0][
        "score"
    ] == pytest.approx(score)


def test_a_pickled_list_names_the_answers(tmp_path: Path) -> None:
    (tmp_path / "trainval_label2ans.pkl").write_bytes(pickle.dumps(["red", "", "blue"]))
    assert list(VQA(VqaConfig(answers=tmp_path / "trainval_label2ans.pkl")).answers) == ["red", "", "blue"]


def test_state_restores_the_task(tmp_path: Path) -> None:
    path = tmp_path / "answers.txt"
    path.write_text("no\nyes\n\n")
    vqa = VQA(VqaConfig(answers=path, loss="bce", metric_version="2017"))
    state = json.loads(json.dumps(vqa.state()))
    path.unlink()  # the run folder alone is enough
    again = VQA.from_state(state)
    assert list(again.answers) == ["no", "yes", ""]
    assert (again.config.loss, again.config.metric_version) == ("bce", "2017")
    with pytest.raises(ConfigError, match="lists its answers"):
        VQA.from_state({"config": {}})
    with pytest.raises(ConfigError, match="Did you mean 'loss'"):
        VQA.from_state({"config": {"los": "kl"}, "answers": ["a"]})


def test_majority_answers_by_question_type() -> None:
    train = [
        asked(n, [answer] * 10, kind)
        for n, (answer, kind) in enumerate([("2", "how many"), ("red", "what color"), ("red", "what color")])
    ]
    train += [asked(10 + n, ["yes"] * 10, "is it") for n in range(4)]
    train += [asked(20, ["1"] * 10, "how many")]
    test = [
        asked(101, ["2"] * 10, "how many"),
        asked(102, ["red"] * 10, "what color"),
        asked(103, ["yes"] * 10, "is that"),
    ]
    predictions = majority_answers(train, test)
    assert [p.value for p in predictions] == [
        "1",
        "red",
        "yes",
    ]  # a tie goes to the first in the alphabet; a new type to the most frequent of all
    assert [p.confidence for p in predictions] == [0.5, 1.0, 0.5]
    assert VQA().report(predictions, test).scores["accuracy"].value == 66.67
    assert vqa_accuracy({p.id: p.value for p in predictions}, test).overall.total == 2
    with pytest.raises(DataError, match="found none"):
        majority_answers([unanswered(1)], test)


def test_targets_without_labels_have_no_answer() -> None:
    example = task("a").example(unanswered(1), TextLayout(TOKENIZER, InputSpec()), RNG)
    _, targets = Collator(None, InputSpec(), TOKENIZER)([example], [RNG])
    assert isinstance(targets, Targets)
    assert targets.answer is None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_right_answer_among_few_scores_100(count: int) -> None:
    """One's own data often has a single answer a question, which the official rule scores 0."""
    records = [asked(1000, ["The Giraffe"] * count), asked(2000, ["two"] * count), asked(3000, ["yes"] * 10)]
    vqa = VQA(VqaConfig(min_count=1, loss="kl"))
    vqa.setup(records)
    examples = [vqa.example(record, TextLayout(TOKENIZER, InputSpec()), RNG) for record in records]
    truth = torch.tensor(np.stack([example.labels["answer"].dense() for example in examples]))
    assert truth.sum(1).tolist() == [1, 1, 1]
    perfect = {"classify": 20 * truth}
    predictions = vqa.decode(perfect, UNREAD, records)
    assert vqa.report(predictions, records).scores["accuracy"].value == 100
    assert [row["score"] for row in vqa.details(predictions, records)] == [1, 1, 1]
    (note,) = vqa.notes(records)
    assert note.startswith("2 of 3 questions have fewer than 4 answers")
    assert vqa.notes([*records[2:], unanswered(1)]) == []


def test_the_loss_of_few_answers_is_not_negative() -> None:
    vqa = task("red", "blue")
    records = [asked(1, ["red"]), asked(2, ["red", "blue"]), asked(3, ["red", "blue", "never listed"])]
    examples = [vqa.example(record, TextLayout(TOKENIZER, InputSpec()), RNG) for record in records]
    scores = torch.tensor(np.stack([example.labels["answer"].dense() for example in examples]))
    assert answer_loss(20 * scores.log().clamp(min=-9), scores, "kl").value >= -1e-6
    assert answer_loss(scores.clamp(min=1e-9).log(), scores, "kl").value.item() == pytest.approx(0, abs=1e-6)


def test_questions_may_be_asked_as_in_the_release() -> None:
    record = asked(1, ["red"] * 10, question="Red, or blue? Which")
    layout = TextLayout(TOKENIZER, InputSpec(answer_slot="same_segment"))
    texts = [
        TOKENIZER.decode(task("red", question_text=kind).example(record, layout, RNG).rows[0].ids)
        for kind in ("written", "release")
    ]
    assert texts == ["red , or blue ? which ? [MASK]", "red or blue which ? [MASK]"]


def test_answers_about_sides_are_exchanged_for_a_mirrored_image() -> None:
    vqa = task("left", "right", "blue")
    record = replace(unanswered(1), answers=("left",) * 10)
    layout = TextLayout(Tokenizer(), InputSpec())
    example = vqa.example(record, layout, np.random.default_rng(0))
    assert example.labels["answer"].indices.tolist() == [0]
    assert example.mirrored_labels["answer"].indices.tolist() == [1]
    assert not vqa.example(replace(record, answers=("blue",) * 10), layout, np.random.default_rng(0)).mirrored_labels
