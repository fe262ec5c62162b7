"""LXMERT's merged files: their dirt and where they lie; what its own loader made of them is compared in
`tests/parity/test_lxmert_io.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visling.data.annotations.lxmert import (
    LxmertRecord,
    find_answer_table,
    find_lxmert,
    from_question,
    has_lxmert,
    read_lxmert,
)
from visling.data.annotations.questions import QuestionRecord
from visling.errors import DataError


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_dirt(tmp_path: Path) -> None:
    file = save(
        tmp_path / "mscoco_train.json",
        [
            {
                "img_id": 9,
                "sentf": {"mscoco": ["  a cat ", "", None], "vqa": ["what?", " "]},
                "labelf": {"vqa": [{"yes": 1.0}, {"no": 1.0}]},
            },
            {"img_id": 9, "sentf": {"mscoco": ["again", "more"]}},
            {"img_id": 10, "sentf": {"gqa": ["who?"]}, "labelf": None},
        ],
    )
    found = read_lxmert(file)
    assert found.records == (
        LxmertRecord(id="9_mscoco_000", images=("9",), sentence="a cat", source="mscoco", scores=None),
        LxmertRecord(id="9_vqa_000", images=("9",), sentence="what?", source="vqa", scores={"yes": 1.0}),
        LxmertRecord(id="9_mscoco_001", images=("9",), sentence="more", source="mscoco", scores=None),
        LxmertRecord(id="10_gqa_000", images=("10",), sentence="who?", source="gqa", scores=None),
    )
    assert (found.empty, found.repeated) == (3, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "list of images with 'img_id' and 'sentf'"),
        ([{"img_id": "a"}], "list of images with 'img_id' and 'sentf'"),
        (
            [{"img_id": "a", "sentf": {"vqa": ["x", "y"]}, "labelf": {"vqa": [{}]}}],
            "image a has 2 sentences of vqa, but answers to 1",
        ),
    ],
)
def test_other_layouts(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_lxmert(save(tmp_path / "x.json", content))


def test_find(tmp_path: Path) -> None:
    for name in ("mscoco_train", "mscoco_nominival", "vgnococo", "mscoco_minival"):
        save(tmp_path / "lxmert" / f"{name}.json", [])
    assert [file.stem for file in find_lxmert(tmp_path, "train")] == ["mscoco_train", "mscoco_nominival", "vgnococo"]
    assert [file.stem for file in find_lxmert(tmp_path / "lxmert", "val")] == ["mscoco_minival"]
    assert [file.stem for file in find_lxmert(tmp_path, "mscoco_train,vgnococo")] == ["mscoco_train", "vgnococo"]
    assert find_answer_table(tmp_path) is None
    assert (
        find_answer_table(save(tmp_path / "lxmert" / "all_ans.json", []).parent.parent)
        == tmp_path / "lxmert" / "all_ans.json"
    )
    (tmp_path / "lxmert" / "vgnococo.json").unlink()
    assert has_lxmert(tmp_path, "train")
    assert not has_lxmert(tmp_path, "test")
    with pytest.raises(
        DataError, match=r"'train' in .* lacks vgnococo\.json; found all_ans\.json, mscoco_minival\.json"
    ):
        find_lxmert(tmp_path, "train")


def question(*answers: str) -> QuestionRecord:
    return QuestionRecord(
        id="7",
        images=("1",),
        question="how many?",
        question_type="",
        answer_type="",
        answers=answers,
        multiple_choice_answer=None,
    )


def test_questions_of_other_data_sets() -> None:
    people = from_question(question("Two", "2", "two.", "2", "3", "4", "4", "the men", "many", "many"), "vqa")
    assert people.scores == {"2": 1.0, "3": 0.3, "4": 0.6, "men": 0.3, "many": 0.6}
    assert people.sentence == "how many?"
    assert from_question(question("The Street."), "gqa").scores == {"street": 1.0}
    silent = QuestionRecord(
        id="7", images=("1",), question="?", question_type="", answer_type="", answers=None, multiple_choice_answer=None
    )
    assert from_question(silent, "gqa").scores is None
