"""Problems of files: grouped, counted, cut to what can be read, and all in one error."""

from __future__ import annotations

from pathlib import Path

import pytest

from visling.data.annotations.problems import MOST_KINDS, MOST_PLACES, Place, Problems
from visling.data.annotations.tables import ImageNames, Table
from visling.errors import DataError

FILE = Path("train.csv")


def said(problems: Problems) -> str:
    """The message that reports the problems."""
    with pytest.raises(DataError) as caught:
        problems.refuse()
    return str(caught.value)


def test_nothing_is_wrong() -> None:
    Problems().refuse()


def test_a_single_problem_is_one_sentence_and_its_mend() -> None:
    problems = Problems()
    problems.add(Place(FILE, "line", 3), "no text in field 'question'", "Fill it in.")
    assert said(problems) == "train.csv, line 3: no text in field 'question'. Fill it in."


def test_problems_of_one_kind_are_counted_in_one_line() -> None:
    problems = Problems()
    for number in range(2, 4 + MOST_PLACES):
        problems.add(Place(FILE, "line", number), f"field 'rating' must be a number; found 'x{number}'", "Change it.")
    problems.add(Place(FILE), "no field 'image'", "Add it.")
    problems.add(Place(Path("valid.json"), "entry", 1), "field 'rating' must be a number; found ''", "Change it.")
    first, second, third, fourth = said(problems).split("\n")
    assert first == f"{MOST_PLACES + 4} problems were found:"
    assert second == (
        "- train.csv, line 2: field 'rating' must be a number; found 'x2'. Change it. The same in 9 more: lines 3, 4, "
        "5, 6, 7, 8, 9, 10 and 1 more."
    )
    assert third == "- train.csv: no field 'image'. Add it."
    assert fourth.startswith("- valid.json, entry 1: "), "of another file"


def test_kinds_beyond_the_first_are_counted() -> None:
    problems = Problems()
    for number in range(MOST_KINDS + 3):
        problems.add(Place(FILE), f"problem {number}", "Mend it.")
    lines = said(problems).split("\n")
    assert len(lines) == 1 + MOST_KINDS + 1
    assert lines[-1] == "- and 3 more kinds of problems"


def test_a_row_reads_as_empty_what_it_reports(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": 3, "tags": ["a", {}], "rating": "much", "image": [1]}\n{"text": "two", "tags": 5}\n')
    problems, images = Problems(), ImageNames()
    first, second = Table(file, problems, images).rows
    assert (first.text("text"), first.texts("tags"), first.number("rating"), first.image("image")) == (
        "",
        ("a",),
        0,
        "",
    )
    assert (second.text("text"), second.texts("tags")) == ("two", ("5",))
    assert len(problems) == 4
    assert second.text("absent") == "", "a field that the table lacks is reported by `require`"
    assert len(problems) == 4
    assert Table(file, problems, images).require("txet", "words") == "txet"
    assert "no field 'txet' or 'words'; it has text, tags, rating, image. Did you mean 'text'?" in said(problems)
    assert not images.places
