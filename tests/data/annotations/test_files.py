"""What all readers of annotation files share: JSON, JSON lines, lists, and messages that name file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visling.data.annotations.files import (
    entries,
    has_words,
    is_split,
    read_ids,
    read_json,
    read_json_lines,
    read_lines,
    text_field,
    the_one,
)
from visling.data.text import Tokenizer
from visling.errors import DataError


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        ("train2014", "train", True),
        ("train", "train", True),
        ("trainval2014", "train", False),
        ("test-dev2015", "test", False),
        ("test2015", "test", True),
        ("train2014", "train2014", True),
        ("train2017", "train2014", False),
    ],
)
def test_split_names(name: str, split: str, expected: bool) -> None:
    assert is_split(name, split) is expected


@pytest.mark.parametrize("text", ["a", "?", "e\u0301", "\u0301e", "\u0939\u093f"])
def test_has_words(text: str) -> None:
    assert has_words(text)
    assert Tokenizer().encode(text)


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b\ufeff", "\ufffd", "\u0301", "\u0301 \u0308\u200b"])
def test_without_words(text: str) -> None:
    assert not has_words(text)
    assert not Tokenizer().encode(text), "a layout would refuse it"


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_json_file_that_is_cut_off_is_named_with_the_place(tmp_path: Path) -> None:
    assert read_json(write(tmp_path / "whole.json", b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}, "with a byte order mark"
    with pytest.raises(DataError, match=r"cut\.json is truncated or not JSON.*line 1, character 5 of 5 bytes"):
        read_json(write(tmp_path / "cut.json", b'{"a":'))
    with pytest.raises(DataError, match=r"byte 1 of 2 bytes"):
        read_json(write(tmp_path / "latin.json", b'"\xe9'))
    with pytest.raises(DataError, match="no annotation file"):
        read_json(tmp_path / "none.json")


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    file = write(tmp_path / "lines.txt", "\ufeffone\u2028still one\r\n\ntwo".encode())
    assert list(read_lines(file)) == [(1, "one\u2028still one"), (2, ""), (3, "two")]
    with pytest.raises(DataError, match=r"not UTF-8 text: line 2, byte 0"):
        list(read_lines(write(tmp_path / "latin.txt", b"a\n\xe9\n")))


def test_json_lines_have_their_numbers(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", b'{"a": 1}\n\n  \n{"a": 2}\n')
    assert list(read_json_lines(file)) == [(1, {"a": 1}), (4, {"a": 2})]
    with pytest.raises(DataError, match="no annotation file"):
        next(read_json_lines(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": ', r"rows\.jsonl, line 2 is not a JSON object: .*may be truncated"),
        ("[1]", r"rows\.jsonl, line 2 is a JSON list; expected one object per line"),
        ("null", "line 2 is a JSON NoneType"),
    ],
)
def test_json_lines_hold_objects(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path / "rows.jsonl", f'{{"a": 1}}\n{line}'.encode())
    with pytest.raises(DataError, match=message):
        list(read_json_lines(file))


def test_lists_hold_ids_or_file_names(tmp_path: Path) -> None:
    file = write(tmp_path / "val.txt", b"12\n\nimages/COCO_val2014_000000000009.jpg\n")
    assert read_ids(file) == {"12", "COCO_val2014_000000000009"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"must be an object with a list 'images'; found a list"),
        ({"other": []}, r"must be an object with a list 'images'; found an object with other"),
        ({"images": [1]}, r"entry 0 of 'images' must be an object; found a int"),
        ({"images": [{"id": 1}, {"name": "x"}]}, r"entry 1 of 'images' lacks 'id'; found name"),
    ],
)
def test_lists_of_entries_are_checked(content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        entries(json.loads(json.dumps(content)), "images", ("id",), Path("file.json"))


def test_one_file_is_wanted(tmp_path: Path) -> None:
    first, second = tmp_path / "a_train.json", tmp_path / "b_train.json"
    assert the_one([first], "*_train.json", tmp_path, [first]) == first
    with pytest.raises(DataError, match=r"several files .*a_train\.json, b_train\.json"):
        the_one([first, second], "*_train.json", tmp_path, [first, second])
    with pytest.raises(DataError, match=r"found a_train\.json\. Check the folder and the split"):
        the_one([], "*_val.json", tmp_path, [first])


def test_a_text_field_holds_a_text() -> None:
    assert text_field({"name": "a"}, "name", "file, line 1") == "a"
    for value in ({}, {"name": " "}, {"name": 1}):
        with pytest.raises(DataError, match="file, line 1: field 'name' must be a text that is not empty"):
            text_field(value, "name", "file, line 1")
