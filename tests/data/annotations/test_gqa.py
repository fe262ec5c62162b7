from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.data.annotations import gqa
from visling.data.annotations.gqa import count_steps, read_gqa_split
from visling.data.annotations.questions import UNTOLD
from visling.data.answers import AnswerVocabulary
from visling.errors import DataError

QUESTION = {
    "question": "What is on the white wall?",
    "imageId": "2375429",
    "answer": "pipe",
    "fullAnswer": "The pipe is on the wall.",
    "isBalanced": True,
    "groups": {"global": "thing", "local": "14-wall_on,s"},
    "types": {"structural": "query", "semantic": "rel", "detailed": "relS"},
    "semantic": [
        {"operation": "select", "dependencies": [], "argument": "wall (722332)"},
        {"operation": "filter color", "dependencies": [0], "argument": "white"},
        {"operation": "relate", "dependencies": [1], "argument": "_,on,s (712442)"},
        {"operation": "query", "dependencies": [2], "argument": "name"},
    ],
    "annotations": {"question": {"5": "722332"}, "answer": {"0": "712442"}, "fullAnswer": {}},
    "entailed": ["07333408", "7333408"],
    "equivalent": ["07333408"],
}
BARE = {"isBalanced": True, "question": "Who is wearing the dress?", "imageId": "n161313"}


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_everything_that_is_kept_of_a_question(tmp_path: Path) -> None:
    save(tmp_path / "testdev_balanced_questions.json", {"07333408": QUESTION, "201640614": BARE, "a-1": BARE})
    full, bare, other = read_gqa_split(tmp_path, "testdev")
    assert (full.id, full.images, full.question, full.answer) == (
        "07333408",
        ("2375429",),
        QUESTION["question"],
        "pipe",
    )
    assert (full.structural, full.semantic, full.detailed) == ("query", "rel", "relS")
    assert (full.global_group, full.local_group) == ("thing", "14-wall_on,s")
    assert full.balanced
    assert full.num_steps == 3, "to query a name is no step"
    assert full.entailed == ("07333408", "7333408"), "ids keep their leading zeros"
    assert (bare.id, bare.images, bare.answer) == ("201640614", ("n161313",), None)
    assert (bare.structural, bare.global_group, bare.entailed, bare.num_steps) == ("", None, (), 0)
    assert other.id == "a-1", "an id that is no number"


@pytest.mark.parametrize(
    ("operation", "argument", "counts"),
    [
        ("select", "dog (1)", True),
        ("exist", "?", False),
        ("query", "name", False),
        ("query", "color", True),
        ("choose name", "dog|cat", False),
        ("choose color", "red|blue", True),
        ("select", "existing thing", False),
    ],
)
def test_steps(operation: str, argument: str, counts: bool) -> None:
    assert count_steps([{"operation": operation, "argument": argument}]) == counts


def test_unbalanced_questions_keep_no_entailed_ones(tmp_path: Path) -> None:
    save(tmp_path / "val_all_questions.json", {"1": {**QUESTION, "isBalanced": False}, "2": QUESTION, "3": BARE})
    records = read_gqa_split(tmp_path, "val_all")
    assert [record.balanced for record in records] == [False, True, True]
    assert [len(record.entailed) for record in records] == [0, 2, 0]


SPLITS = {
    "train": "train_balanced_questions",
    "train_balanced": "train_balanced_questions",
    "val": "val_balanced_questions",
    "testdev": "testdev_balanced_questions",
    "test": "test_balanced_questions",
    "challenge": "challenge_balanced_questions",
    "val_all": "val_all_questions",
    "submission": "submission_all_questions",
}


@pytest.mark.parametrize("folder", [".", "questions1.2", "gqa", "gqa/questions"])
@pytest.mark.parametrize("split", SPLITS)
def test_files_of_a_split(tmp_path: Path, split: str, folder: str) -> None:
    for number, name in enumerate(sorted(set(SPLITS.values()))):
        save(tmp_path / folder / f"{name}.json", {f"0{number}": {**BARE, "question": name}})
    (record,) = read_gqa_split(tmp_path, split)
    assert record.question == SPLITS[split]


def test_chunks_are_one_split(tmp_path: Path) -> None:
    folder = tmp_path / "questions1.2" / "train_all_questions"
    for chunk in range(11):
        save(folder / f"train_all_questions_{chunk}.json", {f"{chunk:02d}": BARE})
    assert read_gqa_split(tmp_path, "train_all").ids() == [f"{chunk:02d}" for chunk in range(11)]
    save(folder / "train_all_questions_11.json", {"3": BARE, "03": BARE})
    with pytest.raises(DataError, match=r"train_all_questions: question 03 comes twice"):
        read_gqa_split(tmp_path, "train_all")


def test_a_question_twice_in_a_file(tmp_path: Path) -> None:
    entry = json.dumps(BARE)
    for number in ("007", "x"):
        (tmp_path / "val_balanced_questions.json").write_text(
            f'{{"{number}": {entry}, "1": {entry}, "{number}": {entry}}}'
        )
        with pytest.raises(DataError, match=f"question {number} comes twice"):
            read_gqa_split(tmp_path, "val")


@pytest.mark.parametrize("field", ["question", "imageId"])
def test_a_missing_field(tmp_path: Path, field: str) -> None:
    save(tmp_path / "val_balanced_questions.json", {"1": {key: value for key, value in BARE.items() if key != field}})
    with pytest.raises(DataError, match=r"val_balanced_questions\.json: question 1 lacks 'question' or 'imageId'"):
        read_gqa_split(tmp_path, "val")


def test_a_truncated_file(tmp_path: Path) -> None:
    path = save(tmp_path / "val_balanced_questions.json", {"1": BARE, "2": QUESTION})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"val_balanced_questions\.json is truncated"):
        read_gqa_split(tmp_path, "val")


@pytest.mark.parametrize("empty", [None, "", " \n", "\u0301"])
def test_questions_without_a_word_are_counted(tmp_path: Path, empty: str | None) -> None:
    save(tmp_path / "val_balanced_questions.json", {"1": BARE, "2": {**BARE, "question": empty}})
    left_out = Counter[str]()
    assert read_gqa_split(tmp_path, "val", left_out).ids() == ["1"]
    assert left_out == {"questions without a word": 1}
    with pytest.raises(DataError, match=r"question 2 is empty: found .*at least one word"):
        read_gqa_split(tmp_path, "val")


def test_an_unknown_split_names_what_is_there(tmp_path: Path) -> None:
    save(tmp_path / "gqa" / "questions1.2" / "val_all_questions.json", {"1": BARE})
    with pytest.raises(DataError, match=r"no questions of GQA's split 'dev' .*found val_all_questions\.json"):
        read_gqa_split(tmp_path, "dev")
    with pytest.raises(DataError, match=r"expected val_balanced_questions\.json"):
        read_gqa_split(tmp_path, "val")


# Records


def test_records_are_a_sequence(tmp_path: Path) -> None:
    save(
        tmp_path / "val_balanced_questions.json",
        {f"{number:02d}": {**BARE, "imageId": str(number % 3)} for number in range(9)},
    )
    records = read_gqa_split(tmp_path, "val")
    ids = [f"{number:02d}" for number in range(9)]
    assert len(records) == 9
    assert [record.id for record in records] == ids == [records[place].id for place in range(9)]
    assert records[-1].id == "08"
    assert [record.id for record in records[2:5]] == ids[2:5]
    assert records.select([4, 1]).select([1]).ids() == ["01"]
    with pytest.raises(IndexError):
        records[9]
    assert list(pickle.loads(pickle.dumps(records))) == list(records), "they go to worker processes"
    assert list(records.image_ids()) == [record.images[0] for record in records]


# Choices


def test_choices(tmp_path: Path) -> None:
    save(tmp_path / "questions1.2" / "val_all_questions.json", {"01": QUESTION, "02": QUESTION})
    assert read_gqa_split(tmp_path, "val_all")[0].choices is None
    save(tmp_path / "eval" / "val_choices" / "val_choices_0.json", {"01": {"valid": ["a", "b"], "plausible": ["a"]}})
    first, second = read_gqa_split(tmp_path, "val_all")
    assert first.choices is second.choices
    assert first.choices is not None
    assert first.choices["01"] == (("a", "b"), ("a",))
    with pytest.raises(DataError, match="has no choices for question 02"):
        first.choices["02"]
    save(tmp_path / "eval" / "val_choices" / "val_choices_1.json", {"02": {"valid": ["a"]}})
    with pytest.raises(DataError, match=r"val_choices_1\.json: question 02 lacks 'valid' or 'plausible'"):
        read_gqa_split(tmp_path, "val_all")[0].choices["01"]  # type: ignore[index]


# LXMERT's lists

ENTRY = {"img_id": "2375429", "question_id": "07333408", "sent": "is it red?", "label": {"yes": 1.0}}


def test_lxmert_lists(tmp_path: Path) -> None:
    bare = {key: value for key, value in ENTRY.items() if key != "label"} | {"question_id": "1"}
    for split in ("valid", "submit"):
        save(tmp_path / "gqa" / f"{split}.json", [ENTRY, bare])
        first, second = read_gqa_split(tmp_path, split)
        assert (first.id, first.images, first.question, first.answer) == ("07333408", ("2375429",), "is it red?", "yes")
        assert first.balanced
        assert not first.structural
        assert second.answer is None


def test_official_files_come_before_lists(tmp_path: Path) -> None:
    save(tmp_path / "train.json", [ENTRY])
    save(tmp_path / "questions" / "train_balanced_questions.json", {"5": BARE})
    assert read_gqa_split(tmp_path, "train").ids() == ["5"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "must be a list of entries; found an object"),
        ([{"img_id": "1"}], "entry 0 lacks 'question_id', 'img_id' or 'sent'"),
        ([{**ENTRY, "label": {"yes": 1.0, "no": 0.3}}], "expected one answer with the score 1"),
        ([{**ENTRY, "label": {"yes": 0.3}}], "expected one answer with the score 1"),
        ([ENTRY, ENTRY], "question 07333408 comes twice"),
        ([{**ENTRY, "sent": 3}], "question 07333408 is empty: found 3"),
    ],
)
def test_not_a_list_of_lxmert(tmp_path: Path, content: Any, message: str) -> None:
    save(tmp_path / "train.json", content)
    with pytest.raises(DataError, match=message):
        read_gqa_split(tmp_path, "train", Counter())


# ViLBERT's parts


def make_cache(folder: Path, entries: list[dict[str, Any]], answers: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainval_target.pkl").write_bytes(pickle.dumps(entries, protocol=2))
    (folder / "trainval_label2ans.pkl").write_bytes(pickle.dumps(answers, protocol=2))


def cached(number: str, labels: list[int], image: str = "1") -> dict[str, Any]:
    return {"question_id": number, "image_id": image, "question": "is it red?", "labels": labels, "scores": [1.0]}


@pytest.fixture
def two_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gqa, "NUM_MINVAL", 2)


@pytest.mark.usefixtures("two_held_out")
def test_parts_of_a_cache(tmp_path: Path) -> None:
    entries = [cached("9", [0]), cached("10", []), cached("07", [1], image="2"), cached("11", [0])]
    make_cache(tmp_path / "cache", entries, ["yes", "no"])
    trainval, minval = (read_gqa_split(tmp_path, split) for split in ("trainval", "minval"))
    assert (trainval.ids(), minval.ids()) == (["07", "10"], ["11", "9"]), "compared as text"
    assert [record.answer for record in trainval] == ["no", UNTOLD]
    np.save(tmp_path / "cache" / "genome_test_ids.npy", np.array(["2", "5"]))
    assert read_gqa_split(tmp_path, "trainval_clean").ids() == ["10"]


@pytest.mark.usefixtures("two_held_out")
def test_parts_of_the_official_files(tmp_path: Path) -> None:
    save(tmp_path / "train_balanced_questions.json", {"9": QUESTION, "10": QUESTION})
    save(tmp_path / "val_balanced_questions.json", {"07": QUESTION, "11": QUESTION})
    assert read_gqa_split(tmp_path, "trainval").ids() == ["07", "10"]
    assert read_gqa_split(tmp_path, "minval").ids() == ["11", "9"]
    with pytest.raises(DataError, match=r"no list of images .*genome_test_ids\.npy"):
        read_gqa_split(tmp_path, "train_clean")
    np.save(tmp_path / "genome_test_ids.npy", np.array(["2375429"]))
    assert len(read_gqa_split(tmp_path, "train_clean")) == 0
    save(tmp_path / "val_balanced_questions.json", {"9": QUESTION})
    with pytest.raises(DataError, match="question 9 comes twice"):
        read_gqa_split(tmp_path, "trainval")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([cached("1", [2])], r"question 1 has the labels \[2\]; expected at most one number below 2"),
        ([cached("1", [0, 1])], "expected at most one number"),
        ([{"question_id": "1"}], "must be a list of objects with image_id, labels, question, question_id"),
        ({}, "must be a list of objects"),
        ([cached("1", []), cached("1", [])], "question 1 comes twice"),
    ],
)
def test_not_a_cache(tmp_path: Path, entries: Any, message: str) -> None:
    make_cache(tmp_path / "cache", entries, ["yes", "no"])
    with pytest.raises(DataError, match=message):
        read_gqa_split(tmp_path, "trainval")


@pytest.mark.parametrize("content", [["yes", "no"], {"no": 1, "yes": 0}])
def test_pickled_answers(tmp_path: Path, content: Any) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=2))
    assert list(AnswerVocabulary.load(tmp_path / "a.pkl")) == ["yes", "no"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["yes", 3], "holds strings; found 3"),
        ({"no": 1, "yes": 1}, "must be a list of answers"),
        ({"no": "one"}, "must be a list of answers"),
        ("yes", "must be a list of answers"),
    ],
)
def test_not_answers(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match=message):
        AnswerVocabulary.load(tmp_path / "a.pkl")


# Size

MEASURE = """
import sys, torch
from pathlib import Path
from visling.data.annotations.gqa import read_gqa_split
from visling.train.memory import take_peak_memory
print(len(read_gqa_split(Path(sys.argv[1]), "train_all")), take_peak_memory(torch.device("cpu")))
"""
OFFICIAL = 14_305_356
"""Questions of train_all."""
MOST = 2e9
"""Bytes that reading them may take in all."""


@pytest.mark.slow
def test_the_largest_split_fits_into_two_gigabytes(tmp_path: Path) -> None:
    """Of a twentieth and a tenth of it: a question takes what the peaks differ by, and all else, the interpreter and
    buffers included, is there once."""
    few, many = OFFICIAL // 20, OFFICIAL // 10
    low, high = (measure_reading(tmp_path / str(number), number) for number in (few, many))
    whole = high + (high - low) / (many - few) * (OFFICIAL - many)
    assert whole < MOST, f"{low / 1e9:.2f} GB for a twentieth, {high / 1e9:.2f} GB for a tenth"


def measure_reading(place: Path, number: int) -> int:
    """Peak of memory, in bytes, of a process that reads so many questions."""
    folder = place / "train_all_questions"
    folder.mkdir(parents=True)
    filler = json.dumps(QUESTION["semantic"])
    for chunk in range(2):
        with (folder / f"train_all_questions_{chunk}.json").open("w") as file:
            for row in range(chunk, number, 2):
                question = f"Is the number {row} to the left of the tall brown table?"
                file.write(
                    f'{"{" if row == chunk else ","}"{row:08d}": {{"question": "{question}", "imageId": '
                    f'"{row % 72140}", "answer": "a{row % 1800}", "isBalanced": {str(row % 15 == 0).lower()}, '
                    f'"groups": {{"global": null, "local": "g{row % 200_000}"}}, "types": {{"structural": "query", '
                    f'"semantic": "rel", "detailed": "d{row % 100}"}}, "semantic": {filler}, "entailed": '
                    f'["{row:08d}", "{row + 1:08d}", "{row + 2:08d}"]}}'
                )
            file.write("}")
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(place)], capture_output=True, text=True, check=True, timeout=600
    )
    read, peak = map(int, ended.stdout.split())
    assert read == number
    return peak
