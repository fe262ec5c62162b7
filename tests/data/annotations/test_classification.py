"""Files of labelled texts: four formats, names of fields, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visling.data.annotations.classification import FieldNames, find_classification, read_classification
from visling.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"id": 42953, "img": "img/42953.png", "label": 0, "text": "its their character not their color that matters"},
    {"id": 1235, "img": "img/01235.png", "label": 1, "text": 'she said: "no, thanks"'},
]


def write(file: Path, rows: list[Any]) -> Path:
    """Rows in the format of a suffix."""
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    else:
        mark = "," if file.suffix == ".csv" else "\t"
        names = list(rows[0])
        cells = [[str(row.get(name, "")) for name in names] for row in rows]
        quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
        file.write_text("\n".join(mark.join(row) for row in [names, *quoted]) + "\n", encoding="utf-8-sig")
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_hateful_memes_in_every_format(tmp_path: Path, suffix: str) -> None:
    records = read_classification(write(tmp_path / f"train{suffix}", ROWS))
    assert [record.id for record in records] == ["42953", "1235"]
    assert [record.images for record in records] == [("42953",), ("01235",)], "by the stem of the file"
    assert [record.labels for record in records] == [("0",), ("1",)]
    assert [record.text for record in records] == [row["text"] for row in ROWS]
    assert not any(record.several for record in records)
    assert all(record.second is None for record in records)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_several_labels(tmp_path: Path, suffix: str) -> None:
    labels: list[Any] = [["cat", "dog"], [], ["dog"]]
    if suffix == ".csv":
        labels = ["|".join(some) for some in labels]
    rows = [{"question": f"what is here {number}", "labels": some} for number, some in enumerate(labels)]
    records = read_classification(write(tmp_path / f"train{suffix}", rows))
    assert [record.labels for record in records] == [("cat", "dog"), (), ("dog",)]
    assert all(record.several for record in records)
    assert [record.id for record in records] == ["1", "2", "3"], "numbers of rows"
    assert all(record.images == () for record in records), "texts alone"


def test_names_of_ones_own_and_a_second_text(tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", [{"key": "a", "premise": "p", "hypothesis": "h", "photo": 7, "gold": "yes"}])
    names = FieldNames(
        id=("key",), text=("premise",), second=("hypothesis",), image=("photo",), label=("gold",),
        required=frozenset({"id", "text", "second", "image"}),
    )  # fmt: skip
    (record,) = read_classification(file, names)
    assert (record.id, record.text, record.second, record.images) == ("a", "p", "h", ("7",))
    assert record.labels == ("yes",)
    with pytest.raises(DataError, match=r"no field 'caption'; it has key, premise, hypothesis, photo, gold"):
        read_classification(file, FieldNames(text=("caption",), required=frozenset({"text"})))


def test_a_hidden_split_and_an_image_without_text(tmp_path: Path) -> None:
    rows = [{"id": "a", "image": "x.jpg", "text": ""}, {"id": "b", "image": "y.jpg", "text": "two"}]
    records = read_classification(write(tmp_path / "test.jsonl", rows))
    assert [record.labels for record in records] == [None, None]
    assert [record.text for record in records] == ["", "two"]
    assert read_classification(write(tmp_path / "empty.jsonl", [])) == []


def test_where_a_split_is_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file of split 'val'.*found no file of these kinds"):
        find_classification(tmp_path, "val")
    (tmp_path / "classification").mkdir()
    inner = write(tmp_path / "classification" / "train.csv", ROWS)
    assert find_classification(tmp_path, "train") == inner
    with pytest.raises(DataError, match=r"no file of split 'dev_seen'.*found classification/train\.csv"):
        find_classification(tmp_path, "dev_seen")
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"split 'train' is in several files: .*train\.jsonl, .*train\.csv"):
        find_classification(tmp_path, "train")


GOOD = {"id": 1, "image": "a.png", "text": "a cat", "label": "yes"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD, r"line 2: id '1' is that of .*line 1 too"),
        (GOOD | {"id": 2, "text": " ", "image": None}, r"line 2: no image in field 'image'; 1 of 2 rows have one"),
        ({"id": 2, "text": "no picture", "label": "no"}, r"line 2: no image in field 'image'; 1 of 2 rows"),
        (GOOD | {"id": None}, r"line 2: no id in field 'id'; 1 of 2 rows"),
        (GOOD | {"id": 2, "label": None}, r"line 2: no label in field 'label'; 1 of 2 rows have one"),
        (GOOD | {"id": 2, "label": ["yes"]}, r"line 2: field 'label' holds a list, in the rows before it one label"),
        (GOOD | {"id": 2, "label": 0.5}, r"line 2: field 'label' must hold texts or whole numbers.*found 0\.5"),
        (GOOD | {"id": 2, "label": {"a": 1}}, r"line 2: field 'label' must hold texts.*found \{'a': 1\}"),
        (GOOD | {"id": 2, "text": 5}, r"line 2: field 'text' must be a text; found 5"),
        (GOOD | {"id": True}, r"line 2: field 'id' must be a text or a whole number; found True"),
        (GOOD | {"id": 2, "image": ["a.png"]}, r"line 2: field 'image' must be the name of an image file"),
        ([], r"line 2: a JSON list, not an object"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path: Path, row: Any, message: str) -> None:
    file = write(tmp_path / "train.jsonl", [GOOD, row])
    with pytest.raises(DataError, match=message):
        read_classification(file)


def test_no_text_and_no_image(tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", [{"text": "one", "label": 1}, {"text": " ", "label": 1}])
    with pytest.raises(DataError, match="line 2: neither a text nor an image"):
        read_classification(file)
    file = write(tmp_path / "train.jsonl", [{"body": "one", "label": 1}])
    with pytest.raises(DataError, match=r"neither a text \(text, question.*its fields are body, label.*text_field"):
        read_classification(file)


def test_labels_that_a_submission_could_not_tell_apart(tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", [{"text": "one", "labels": ["a|b"]}])
    with pytest.raises(DataError, match=r"label 'a\|b' holds '\|'"):
        read_classification(file)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,label\none,1,2\n", r"line 2: 3 cells; the header names 2"),
        ("a.csv", "text,label\none\n", r"line 2: 1 cells; the header names 2"),
        ("a.csv", 'text,label\n"one" x,1\n', r"is not a table"),
        ("a.json", '{"text": "one"}', r"must be a list of objects; found a dict"),
        ("a.json", "[1]", r"entry 1: must be an object; found a int"),
        ("a.jsonl", '{"text": ', r"line 1: not a JSON object"),
    ],
)
def test_files_that_are_damaged(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_classification(tmp_path / name)


def test_a_table_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    with pytest.raises(
        DataError, match=r"is not UTF-8 text: line 2, byte 14: .* as Windows-1252 the line reads 'café,1'"
    ):
        read_classification(tmp_path / "a.csv")
