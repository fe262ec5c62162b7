"""Answers in the spelling of LXMERT's table; values recorded from the release are compared in
`tests/parity/test_lxmert_io.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from visling.data.answer_table import build_table, listed, read_table, table_form, table_rows
from visling.errors import DataError


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


def test_each_answer_of_a_task_has_its_row_or_none() -> None:
    assert table_rows(["the No.", "never seen", "Yes", ""], ["no", "yes"]) == (0, None, 1, None)


def test_a_table_of_some_data_sets_keeps_its_order(tmp_path: Path) -> None:
    (tmp_path / "all_ans.json").write_text(
        '[{"ans": "a", "dsets": ["vqa"]}, {"ans": "b", "dsets": ["gqa"]}, {"ans": "c", "dsets": ["vqa", "gqa"]}]'
    )
    assert list(read_table(tmp_path / "all_ans.json")) == ["a", "b", "c"]
    assert list(read_table(tmp_path / "all_ans.json", ["vqa"])) == ["a", "c"]
    with pytest.raises(DataError, match=r"has no answer of gqaa; its data sets are gqa, vqa"):
        read_table(tmp_path / "all_ans.json", ["gqaa", "vqa"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["yes"]', "list of objects with 'ans'"),
        ('{"yes": 0}', "list of objects"),
        ('[{"ans": "a", "dsets": []}, {"ans": "a", "dsets": []}]', "more than once"),
        ('[{"ans": "a"', "truncated"),
    ],
)
def test_damaged_tables(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "all_ans.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "all_ans.json")


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ({"grey": 1.0, "Gray": 0.3, "silver": 0.9}, [("gray", 0.3)]),
        ({"Gray": 0.3, "gray": 1.0}, [("gray", 0.3)]),  # what had to be respelt overwrites
        ({"gray": 1.0, "Gray": 0.3}, [("gray", 0.3)]),
        ({"Two": 0.6, "yes": 0.3, "2": 1.0}, [("yes", 0.3), ("2", 0.6)]),
        ({"silver": 1.0}, []),
        ({}, []),
    ],
)
def test_labels_keep_what_the_table_has(label: dict[str, float], expected: list[tuple[str, float]]) -> None:
    before = dict(label)
    assert sorted(listed(label, {"gray", "2", "yes"}).items()) == sorted(expected)
    assert label == before


def test_a_table_of_frequent_answers_is_sorted() -> None:
    labels = [
        {"Yes": 1.0, "no": 0.3},
        {"yes.": 0.6},
        {"the cat": 1.0},
        {"no": 1.0},
        {"no": 0.3},
        {".": 1.0},
        {"": 1.0},
        {},
    ]
    assert list(build_table(labels, 2)) == ["no", "yes"]
    assert list(build_table(labels, 1)) == ["cat", "no", "yes"]
    with pytest.raises(DataError, match="no answer occurs 3 times"):
        build_table(labels, 3)
