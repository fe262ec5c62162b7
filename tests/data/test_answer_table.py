"""Answers in the spelling of LXMERT's table, against values recorded from the release (`golden/lxmert_io`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from visling.data.answer_table import table_form, table_rows


def test_spelling_follows_the_release(golden: Path) -> None:
    recorded = json.loads((golden / "lxmert_io" / "expected.json").read_text())["convert_answer"]
    assert len(recorded) > 20
    assert {answer: table_form(answer) for answer in recorded} == recorded


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("a an x", "x"),
        ("the a x", "a x"),
        ("an a x", "a x"),
        ("a the x", "x"),
        ("x..", "x."),
        (" a x", " a x"),
        ("x .", "x"),
        ("Ten", "10"),
        ("a two", "2"),
        ("eleven", "eleven"),
        ("a", "a"),
    ],
)
def test_articles_and_full_stops_go_once(answer: str, form: str) -> None:
    assert table_form(answer) == form


def test_rows_follow_the_release(golden: Path) -> None:
    folder = golden / "lxmert_io"
    table = [entry["ans"] for entry in json.loads((folder / "all_ans.json").read_text())]
    answers = json.loads((folder / "expected.json").read_text())["task_label2ans"]
    expected = load_file(folder / "answer_head_transfer.safetensors")["row_map"].tolist()
    assert [-1 if row is None else row for row in table_rows(answers, table)] == expected
