"""VCR's files: what is read, their dirt, what is refused; the rows made of them are compared in
`tests/parity/test_visualbert_vcr.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.data.annotations.vcr import (
    NEUTRAL_NAMES,
    VcrRecord,
    find_vcr,
    has_vcr,
    read_metadata,
    read_vcr,
    with_names,
)
from visling.errors import DataError


def row(number: int = 0, **changed: Any) -> dict[str, Any]:
    """A line of the official layout; `changed` fields of None are left out."""
    full = {
        "movie": "3015_A_MOVIE",
        "objects": ["person", "person", "dog"],
        "interesting_scores": [0],
        "answer_likelihood": "possible",
        "img_fn": "lsmdc_3015_A_MOVIE/3015_A_MOVIE_00.23.57.935-00.24.00.783@0.jpg",
        "metadata_fn": "lsmdc_3015_A_MOVIE/3015_A_MOVIE_00.23.57.935-00.24.00.783@0.json",
        "question": ["Does", [1], "see", [0, 2], "?"],
        "answer_choices": [["Yes", "."], [[0], "does", "."], ["No", "."], [[2], "barks", "."]],
        "answer_label": 1,
        "rationale_choices": [["Look", "."], [[1], "smiles", "."], ["Hm", "."], ["Oh", "."]],
        "rationale_label": 3,
        "img_id": f"train-{number}",
        "question_number": number,
        "annot_id": f"train-{number}",
    }
    return {name: value for name, value in (full | changed).items() if value is not None}


def save(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in rows), encoding="utf-8")
    return path


def one(tmp_path: Path, **changed: Any) -> VcrRecord:
    (record,) = read_vcr(save(tmp_path / "train.jsonl", row(**changed)), tmp_path / "vcr1images").records
    return record


def test_a_question_keeps_its_tags(tmp_path: Path) -> None:
    record = one(tmp_path)
    assert record == VcrRecord(
        id="train-0",
        images=("3015_A_MOVIE_00.23.57.935-00.24.00.783@0",),
        objects=("person", "person", "dog"),
        question=("Does", (1,), "see", (0, 2), "?"),
        answer_choices=(("Yes", "."), ((0,), "does", "."), ("No", "."), ((2,), "barks", ".")),
        rationale_choices=(("Look", "."), ((1,), "smiles", "."), ("Hm", "."), ("Oh", ".")),
        answer_label=1,
        rationale_label=3,
        movie="3015_A_MOVIE",
        question_number=0,
        metadata=tmp_path / "vcr1images" / "lsmdc_3015_A_MOVIE" / "3015_A_MOVIE_00.23.57.935-00.24.00.783@0.json",
    )


def test_a_test_split_has_no_labels(tmp_path: Path) -> None:
    record = one(tmp_path, answer_label=None, rationale_label=None)
    assert (record.answer_label, record.rationale_label) == (None, None)


def test_dirt_is_left_out_and_counted(tmp_path: Path) -> None:
    file = save(
        tmp_path / "train.jsonl",
        row(0),
        row(0, question=["again"]),
        row(1, question=[" ", "\u200b", []]),
        row(2, rationale_choices=[["a"], [], ["b"], ["c"]]),
        row(3, question=[[0]], answer_choices=[["a", ""], [[]], ["b"], ["c"]]),
        row(4, question=["", [], "Who", "?"]),
    )
    file.write_text(file.read_text() + "\n  \n")
    found = read_vcr(file, tmp_path)
    assert [record.id for record in found.records] == ["train-0", "train-4"]
    assert (found.empty, found.repeated) == (3, 1)


@pytest.mark.parametrize(
    "name", ["annot_id", "movie", "question_number", "img_fn", "metadata_fn", "objects", "question", "answer_choices"]
)
def test_a_missing_field_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"train\.jsonl, line 1: field '{name}'"):
        one(tmp_path, **{name: None})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"question": ["Is", [3], "?"]}, "line 1: question names object 3, but 3 are listed"),
        ({"answer_choices": [["a"], ["b"], [[-1]], ["c"]]}, "answer_choices names object -1, but 3 are listed"),
        ({"question": "Is it ?"}, "question must be lists of words and tags; found 'Is it"),
        ({"question": ["Is", [True], "?"]}, r"question holds \[True\]; expected words, and lists of integers"),
        ({"question": ["Is", 1, "?"]}, "question holds 1; expected words"),
        ({"objects": "person"}, "objects must be a list of class names; found 'person'"),
        ({"answer_choices": [["a"]] * 3}, "answer_choices must be a list of 4 sentences; found 3 of them"),
        ({"rationale_choices": "a"}, "rationale_choices must be a list of 4 sentences; found 'a'"),
        ({"answer_label": 4}, "answer_label 4 is not the number of a choice; expected 0 to 3"),
        ({"rationale_label": -1}, "rationale_label -1 is not the number of a choice"),
        ({"answer_label": "1"}, "answer_label must be an integer; found '1'"),
        ({"question_number": True}, "question_number must be an integer; found True"),
    ],
)
def test_what_is_not_of_the_layout_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        one(tmp_path, **changed)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "train.jsonl", row(0), row(1))
    file.write_text(file.read_text()[:-50])
    with pytest.raises(DataError, match=r"train\.jsonl, line 2 is not a JSON object: .*truncated"):
        read_vcr(file, tmp_path)
    with pytest.raises(DataError, match="gone"):
        read_vcr(tmp_path / "gone.jsonl", tmp_path)


@pytest.mark.parametrize(
    "changed",
    [{"img_fn": "other/3015_A_MOVIE_00.23.57.935-00.24.00.783@0.jpg"}, {"objects": ["person", "person", "cat"]}],
)
def test_a_picture_that_is_described_in_two_ways_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=r"line 2: image 3015_A_MOVIE_00\.23\.57\.935-00\.24\.00\.783@0 is described as"
    ):
        read_vcr(save(tmp_path / "train.jsonl", row(0), row(1, **changed)), tmp_path)


@pytest.mark.parametrize("folder", [".", "vcr1annots"])
def test_where_the_files_lie(tmp_path: Path, folder: str) -> None:
    file = save(tmp_path / folder / "val.jsonl", row())
    assert has_vcr(tmp_path, "val")
    assert not has_vcr(tmp_path, "train")
    (tmp_path / "vcr1images").mkdir()
    assert find_vcr(tmp_path, "val") == (file, tmp_path / "vcr1images")
    with pytest.raises(DataError, match=r"no train\.jsonl of VCR .*vcr1annots"):
        find_vcr(tmp_path, "train")


def test_images_may_lie_beside_the_folder_of_annotations(tmp_path: Path) -> None:
    file = save(tmp_path / "vcr1annots" / "val.jsonl", row())
    (tmp_path / "vcr1images").mkdir()
    assert find_vcr(tmp_path / "vcr1annots", "val") == (file, tmp_path / "vcr1images")


# Objects of a picture

METADATA = {
    "boxes": [[1.5, 2, 30, 40, 0.9], [0, 0, 9, 9, 0.8], [5, 5, 60, 64, 0.7]],
    "segms": [[[[1.5, 2], [30, 2], [30, 40]]], [], [[[5, 5], [60, 5], [60, 64]]]],
    "names": ["person", "person", "dog"],
    "width": 100,
    "height": 64,
}


@pytest.fixture
def described(tmp_path: Path) -> Callable[..., VcrRecord]:
    """Writes the metadata of a record's picture, with changed fields."""

    def write(**changed: Any) -> VcrRecord:
        record = one(tmp_path)
        record.metadata.parent.mkdir(parents=True, exist_ok=True)
        content = {name: value for name, value in (METADATA | changed).items() if value is not None}
        record.metadata.write_text(json.dumps(content))
        return record

    return write


def test_metadata(described: Callable[..., VcrRecord]) -> None:
    found = read_metadata(described())
    assert found.boxes.tolist() == [[1.5, 2, 30, 40], [0, 0, 9, 9], [5, 5, 60, 64]]
    np.testing.assert_allclose(found.confidence, [0.9, 0.8, 0.7], rtol=1e-6)
    assert found.outlines == tuple(METADATA["segms"])  # type: ignore[arg-type]
    assert found.size == (100, 64)


def test_a_picture_without_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"question 'train-0' of VCR has no metadata .*@0\.json\. Unpack"):
        read_metadata(one(tmp_path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"boxes": None}, "is not metadata of VCR: it lacks boxes"),
        ({"width": None, "segms": None}, "it lacks segms, width"),
        (
            {"names": ["person", "person", "cat"]},
            r"lists the objects \['person', 'person', 'cat'\], question 'train-0' lists",
        ),
        ({"boxes": [[0, 0, 1, 1]] * 3}, "boxes must be five numbers for each of 3 objects"),
        ({"boxes": [[0, 0, 1, 1, 0.5]] * 2}, "boxes must be five numbers for each of 3 objects"),
        ({"segms": [[]]}, "has outlines of 1 objects, but boxes of 3"),
        ({"height": "64"}, "height must be an integer"),
    ],
)
def test_metadata_of_another_layout_is_refused(
    described: Callable[..., VcrRecord], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_metadata(described(**changed))


def test_truncated_metadata_is_refused(described: Callable[..., VcrRecord]) -> None:
    record = described()
    record.metadata.write_text(record.metadata.read_text()[:-9])
    with pytest.raises(DataError, match=r"@0\.json is truncated or not JSON"):
        read_metadata(record)
    record.metadata.write_text("[]")
    with pytest.raises(DataError, match="is not metadata of VCR: found a list"):
        read_metadata(record)


def test_a_picture_without_objects_has_no_boxes(tmp_path: Path) -> None:
    plain = ["Who", "?"]
    record = one(tmp_path, objects=[], question=plain, answer_choices=[plain] * 4, rationale_choices=[plain] * 4)
    record.metadata.parent.mkdir(parents=True)
    record.metadata.write_text(json.dumps(METADATA | {"names": [], "boxes": [], "segms": []}))
    assert read_metadata(record).boxes.shape == (0, 4)


# Names


def test_people_get_neutral_names_in_turn_and_things_their_class() -> None:
    words, names = with_names(((2, 0), "and", (3,), "see", (2,)), ("person", "cat", "person", "dog"), {})
    assert words == [("Casey", 2), ("Riley", 0), ("and", None), ("dog", 3), ("see", None), ("Casey", 2)]
    assert names == {2: "Casey", 0: "Riley", 3: "dog"}


def test_names_stay_but_are_counted_anew() -> None:
    given = {2: "Casey", 0: "Riley"}
    words, names = with_names(((4,), (0,), (5,)), ("person",) * 6, given)
    assert words == [("Casey", 4), ("Riley", 0), ("Riley", 5)], "as in the release: two people of one name"
    assert given == {2: "Casey", 0: "Riley"}, "what another choice calls people is nothing to this one"
    assert len(names) == 4


def test_after_fifteen_people_names_come_again() -> None:
    words, _ = with_names((tuple(range(16)),), ("person",) * 16, {})
    assert [name for name, _ in words] == [*NEUTRAL_NAMES, "Casey"]
    assert [number for number, name in enumerate(NEUTRAL_NAMES) if name == "Peyton"] == [6, 10]
