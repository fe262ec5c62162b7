"""Prepared files of VQA: what their readers make of them, what they refuse, and which layout a folder has."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.data.annotations import questions
from visling.data.annotations.prepared_questions import (
    find_imdb,
    find_targets,
    read_imdb,
    read_targets,
    read_vqa_layout,
)
from visling.data.annotations.questions import UNTOLD
from visling.errors import DataError

TEN = ["red"] * 4 + ["blue"] * 3 + ["dark red"] * 2 + ["1"]
ENTRY: dict[str, Any] = {
    "image_name": "COCO_train2014_000000000009",
    "image_id": 9,
    "question_id": 9000,
    "question_str": "What colour, exactly?",
    "question_tokens": ["what", "colour", "exactly"],
    "answers": TEN,
    "valid_answers": TEN[:7],
}
ANSWERS = ["yes", "no", "red"]


def save_imdb(path: Path, *entries: Any) -> Path:
    array = np.empty(len(entries) + 1, dtype=object)
    array[:] = [{"dataset_name": "vqa", "version": 1}, *entries]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, allow_pickle=True)
    return path


def without(entry: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in names}


def save_questions(folder: Path, split: str, asked: dict[int, int], *, answered: bool = False) -> Path:
    """Question id -> image id."""
    entries = [
        {"question_id": number, "image_id": image, "question": f"is it {number}?"} for number, image in asked.items()
    ]
    if answered:
        given = [
            {"question_id": number, "image_id": image, "answers": [{"answer": "yes"}] * 10}
            for number, image in asked.items()
        ]
        (folder / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps({"annotations": given}))
    path = folder / f"v2_OpenEnded_mscoco_{split}_questions.json"
    path.write_text(json.dumps({"questions": entries}))
    return path


def save_targets(folder: Path, split: str, targets: Any, *, answers: Any = ANSWERS) -> Path:
    cache = folder / "cache"
    cache.mkdir(exist_ok=True)
    (cache / f"trainval_{'label2ans' if isinstance(answers, list) else 'ans2label'}.pkl").write_bytes(
        pickle.dumps(answers)
    )
    path = cache / f"{split}_target.pkl"
    path.write_bytes(pickle.dumps(targets))
    return path


def target(number: int, image: int, labels: list[int], scores: list[float]) -> dict[str, Any]:
    return {"question_id": number, "image_id": image, "labels": labels, "scores": scores}


# imdb files


def test_an_imdb_entry(tmp_path: Path) -> None:
    (record,) = read_imdb(save_imdb(tmp_path / "imdb_train2014.npy", ENTRY))
    assert (record.id, record.images, record.question) == (
        "9000",
        ("COCO_train2014_000000000009",),
        "what colour exactly",
    )
    assert record.answers == tuple(TEN)
    assert record.multiple_choice_answer == "red"


@pytest.mark.parametrize(
    ("lacking", "added", "answers", "most"),
    [
        (["answers"], {"all_answers": TEN}, (*TEN,), "red"),
        (["answers"], {}, (*TEN[:7], *[UNTOLD] * 3), "red"),
        (["answers", "valid_answers"], {"answer": "zebra"}, ("zebra",), "zebra"),
        (["answers", "valid_answers"], {}, None, None),
        (["answers"], {"valid_answers": ["<unk>"]}, ("<unk>", *[UNTOLD] * 9), "<unk>"),
    ],
)
def test_where_an_imdb_entry_keeps_its_answers(
    tmp_path: Path, lacking: list[str], added: dict[str, Any], answers: tuple[str, ...] | None, most: str | None
) -> None:
    (record,) = read_imdb(save_imdb(tmp_path / "imdb_x.npy", {**without(ENTRY, *lacking), **added}))
    assert (record.answers, record.multiple_choice_answer) == (answers, most)


def test_an_imdb_entry_without_tokens_or_name(tmp_path: Path) -> None:
    (record,) = read_imdb(save_imdb(tmp_path / "imdb_x.npy", without(ENTRY, "question_tokens", "image_name")))
    assert (record.question, record.images) == ("What colour, exactly?", ("9",))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [without(ENTRY, "question_id")],
            "entry 1 must be an object with 'question_id' .* found image_name",
        ),
        ([ENTRY, ["a"]], "entry 2 must be an object .* found list"),
        ([ENTRY, ENTRY], "question 9000 comes twice"),
        ([{**ENTRY, "question_tokens": [], "question_str": " "}], "question 9000 is empty"),
    ],
)
def test_what_is_no_imdb_file(tmp_path: Path, entries: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_imdb(save_imdb(tmp_path / "imdb_x.npy", *entries))


def test_imdb_files_are_found_by_split(tmp_path: Path) -> None:
    file = save_imdb(tmp_path / "data" / "imdb" / "imdb_train2014.npy", ENTRY)
    save_imdb(tmp_path / "data" / "imdb" / "imdb_val2train2014.npy", ENTRY)
    assert find_imdb(tmp_path, "train") == find_imdb(tmp_path, "train2014") == file
    assert find_imdb(tmp_path, "val") is None
    save_imdb(tmp_path / "imdb_train2015.npy", ENTRY)
    with pytest.raises(DataError, match="several files"):
        find_imdb(tmp_path, "train")


# Target files


def test_targets_in_the_order_of_question_ids(tmp_path: Path) -> None:
    asked = save_questions(tmp_path, "train2014", {10001: 10, 9000: 9, 9001: 9})
    file = save_targets(
        tmp_path, "train", [target(9001, 9, [], []), target(10001, 10, [2, 1], [0.9, 0.3]), target(9000, 9, [0], [1])]
    )
    assert find_targets(tmp_path, "train") == find_targets(tmp_path, "train2014") == file
    first, second, third = read_targets(asked, file)
    assert [record.id for record in (first, second, third)] == ["9000", "9001", "10001"]
    assert first.answers == ("yes",) * 4 + (UNTOLD,) * 6
    assert (second.answers, second.multiple_choice_answer) == ((UNTOLD,) * 10, None)
    assert third.answers == ("red",) * 3 + ("no",) + (UNTOLD,) * 6
    assert third.multiple_choice_answer == "red"


def test_answers_by_their_numbers(tmp_path: Path) -> None:
    asked = save_questions(tmp_path, "train2014", {9000: 9})
    file = save_targets(tmp_path, "train", [target(9000, 9, [1], [0.3])], answers={"b": 1, "a": 0})
    assert read_targets(asked, file)[0].multiple_choice_answer == "b"


@pytest.mark.parametrize(
    ("targets", "answers", "message"),
    [
        ([], ANSWERS, "no target for 1 of the 1 questions .* first 9000"),
        ([target(9000, 8, [0], [1])], ANSWERS, "about image 8"),
        ([target(9000, 9, [3], [1])], ANSWERS, "answer 3, .* has 3 answers"),
        ([target(9000, 9, [0, 1], [1])], ANSWERS, "as many scores"),
        ([{"question_id": 9000}], ANSWERS, "another layout"),
        ({"9000": 1}, ANSWERS, "another layout"),
        ([target(9000, 9, [0], [1])], {"a": 0, "b": 2}, "without a gap"),
    ],
)
def test_what_are_no_targets(tmp_path: Path, targets: Any, answers: Any, message: str) -> None:
    asked = save_questions(tmp_path, "train2014", {9000: 9})
    with pytest.raises(DataError, match=message):
        read_targets(asked, save_targets(tmp_path, "train", targets, answers=answers))


def test_targets_without_their_list(tmp_path: Path) -> None:
    asked = save_questions(tmp_path, "train2014", {9000: 9})
    file = save_targets(tmp_path, "train", [target(9000, 9, [0], [1])])
    (file.parent / "trainval_label2ans.pkl").write_bytes(pickle.dumps({"yes": 0}))
    with pytest.raises(DataError, match="must be a list of answers"):
        read_targets(asked, file)
    (file.parent / "trainval_label2ans.pkl").unlink()
    with pytest.raises(DataError, match="trainval_ans2label"):
        read_targets(asked, file)


# Which layout


def test_a_folder_with_one_layout(tmp_path: Path) -> None:
    for name in ("official", "lxmert", "imdb", "targets"):
        (tmp_path / name).mkdir()
    save_questions(tmp_path / "official", "train2014", {1: 1}, answered=True)
    entry = {"question_id": 2, "img_id": "COCO_train2014_000000000002", "sent": "is it?", "label": {"no": 1}}
    (tmp_path / "lxmert" / "train.json").write_text(json.dumps([entry]))
    save_imdb(tmp_path / "imdb" / "imdb_train2014.npy", {**ENTRY, "question_id": 3})
    save_questions(tmp_path / "targets", "train2014", {4: 4})
    save_targets(tmp_path / "targets", "train", [target(4, 4, [2], [1])])
    found = {name: read_vqa_layout(tmp_path / name, "train") for name in ("official", "lxmert", "imdb", "targets")}
    assert {name: [record.id for record in records] for name, records in found.items()} == {
        "official": ["1"],
        "lxmert": ["2"],
        "imdb": ["3"],
        "targets": ["4"],
    }
    assert {name: records[0].multiple_choice_answer for name, records in found.items()} == {
        "official": "yes",
        "lxmert": "no",
        "imdb": "red",
        "targets": "red",
    }


def test_several_layouts_need_a_choice(tmp_path: Path) -> None:
    save_questions(tmp_path, "train2014", {1: 1}, answered=True)
    save_questions(tmp_path, "test2015", {7: 7})
    save_targets(tmp_path, "train", [target(1, 1, [1], [1])])
    save_imdb(tmp_path / "imdb_train2014.npy", ENTRY)
    with pytest.raises(
        DataError,
        match=r"in several layouts: official .*; imdb .*; targets \(train_target.pkl\).*task_settings.layout=official",
    ):
        read_vqa_layout(tmp_path, "train")
    assert read_vqa_layout(tmp_path, "train", "official")[0].multiple_choice_answer == "yes"
    assert read_vqa_layout(tmp_path, "train", "targets")[0].multiple_choice_answer == "no"
    assert read_vqa_layout(tmp_path, "train", "imdb")[0].id == "9000"
    assert [record.id for record in read_vqa_layout(tmp_path, "test")] == ["7"]


def test_val_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "NUM_LAST", 1)
    save_questions(tmp_path, "val2014", {1: 1, 20: 2, 3: 3})
    save_targets(tmp_path, "val", [target(n, image, [0], [1]) for n, image in ((1, 1), (20, 2), (3, 3))])
    (tmp_path / "minival.json").write_text(json.dumps([{"question_id": 3, "img_id": "3", "sent": "?"}]))
    parts = {
        split: [record.id for record in read_vqa_layout(tmp_path, split)]
        for split in ("val", "minval", "nominval", "minival", "nominival")
    }
    assert parts == {
        "val": ["1", "3", "20"],
        "minval": ["20"],
        "nominval": ["1", "3"],
        "minival": ["3"],
        "nominival": ["1", "20"],
    }


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("official", "v2_OpenEnded_.train._questions.json"),
        ("lxmert", "no train.json"),
        ("imdb", "no imdb_train"),
        ("targets", "no train_target.pkl"),
        (None, "v2_OpenEnded_.train._questions.json"),
    ],
)
def test_an_empty_folder(tmp_path: Path, layout: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_vqa_layout(tmp_path, "train", layout)
