"""NLVR2's files: where they lie, and lines that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visling.data.annotations.statements import find_nlvr2, nlvr2_group, read_nlvr2
from visling.errors import DataError


def line(**fields: Any) -> str:
    return json.dumps({"sentence": "there is a dog", "label": "True", "identifier": "dev-7-0-0"} | fields)


def write(root: Path, *lines: str, split: str = "dev") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{split}.json").write_text("\n".join(lines))
    return root


def test_records_of_a_file_keep_its_order(tmp_path: Path) -> None:
    write(tmp_path, line(identifier="train-10-0-1"), line(identifier="train-2-0-0"), split="train")
    assert [record.id for record in read_nlvr2(tmp_path / "train.json")] == ["train-10-0-1", "train-2-0-0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line()[:40], r"line 2 is not a JSON object"),
        ("[1]", r"line 2 is a JSON list"),
        (line(identifier="7-0"), r"not of the form SPLIT-SET-PAIR-SENTENCE.*NLVR v1"),
        (line(identifier=None), r"'identifier' must be a text"),
        (line(sentence=" "), r"'sentence' must be a text"),
        (line(label="yes"), r"label 'yes' is unknown"),
        (line(label=1), r"label 1 is unknown"),
        (line(identifier="dev-1-0-0"), r"'dev-1-0-0' comes twice"),
    ],
)
def test_lines_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, line(identifier="dev-1-0-0"), text)
    with pytest.raises(DataError, match=message):
        read_nlvr2(tmp_path / "dev.json")


def test_a_file_of_the_folder_itself_comes_first(tmp_path: Path) -> None:
    assert find_nlvr2(tmp_path, "dev") is None
    for folder in ("data/balanced", "data", "."):
        write(tmp_path / folder, line())
        assert find_nlvr2(tmp_path, "dev") == tmp_path / folder / "dev.json"


def test_pairs_of_one_sentence_are_a_group() -> None:
    assert nlvr2_group("dev-7-0-1") == nlvr2_group("dev-7-3-1")
    assert nlvr2_group("dev-7-0-1") != nlvr2_group("dev-7-0-2")


LXMERT = {
    "identifier": "dev-7-0-0",
    "img0": "left",
    "img1": "right",
    "sent": "a dog",
    "uid": "nlvr2_valid_0",
    "label": 1,
}


@pytest.mark.parametrize("indent", [None, 1])
def test_files_of_lxmert(tmp_path: Path, indent: int | None) -> None:
    hidden = {name: value for name, value in LXMERT.items() if name != "label"} | {"identifier": "dev-7-1-0"}
    (tmp_path / "valid.json").write_text(json.dumps([LXMERT, hidden], indent=indent))
    first, second = read_nlvr2(tmp_path / "valid.json")
    assert (first.id, first.images, first.sentence, first.label) == ("dev-7-0-0", ("left", "right"), "a dog", True)
    assert second.label is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": "True"}, r"entry 1: label 'True' is unknown; expected 0 or 1"),
        ({"label": 2}, r"entry 1: label 2 is unknown"),
        ({"img1": None}, r"entry 1: field 'img1' must be a text"),
        ({"identifier": "7-0"}, r"entry 1: identifier '7-0' is not of the form"),
    ],
)
def test_entries_of_lxmert_that_cannot_be_read(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    (tmp_path / "valid.json").write_text(json.dumps([LXMERT | changed], indent=1))
    with pytest.raises(DataError, match=message):
        read_nlvr2(tmp_path / "valid.json")
    (tmp_path / "valid.json").write_text("[1]")
    with pytest.raises(DataError, match="entry 1 is a int; expected an object"):
        read_nlvr2(tmp_path / "valid.json")
