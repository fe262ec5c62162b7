"""Lists of images in the forms that releases and people write, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.data.annotations.image_lists import read_image_list, without_images
from visling.errors import DataError
from visling.types import Record


@pytest.mark.parametrize(
    "names", [["9", "25"], [9, 25], ["COCO_train2014_000000000009.jpg", "COCO_val2014_000000000025"]], ids=str
)
@pytest.mark.parametrize("suffix", ["npy", "json", "txt"])
def test_names_numbers_and_files(tmp_path: Path, names: list[Any], suffix: str) -> None:
    path = tmp_path / f"list.{suffix}"
    if suffix == "npy":
        np.save(path, np.array(names))
    else:
        path.write_text(json.dumps(names) if suffix == "json" else "".join(f"{name}\n" for name in names))
    assert read_image_list(path) == {"9", "25"}


def test_records_of_listed_images_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("COCO_test2015_000000000009\nflickr\n")
    images = [("9",), ("COCO_train2014_000000000010",), ("10", "flickr"), ("COCO_train2014_000000000009",)]
    records = [Record(id=str(number), images=names) for number, names in enumerate(images)]
    assert [record.id for record in without_images(records, tmp_path / "list.txt")] == ["1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.npy", None, "Check the path"),
        ("gone.json", None, "no annotation file"),
        ("gone.txt", None, "no annotation file"),
        ("cut.npy", b"\x93NUMPY\x01\x00", "no array of image ids"),
        ("dict.json", b'{"ids": [1]}', "must be a JSON list"),
        ("flags.json", b"[true]", "found True"),
        ("shares.json", b"[0.5]", "found 0.5"),
        ("empty.txt", b"\n", "lists no image"),
    ],
)
def test_what_is_no_list(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_image_list(tmp_path / name)


@pytest.mark.parametrize(
    ("array", "message"),
    [(np.zeros((2, 2), np.int64), "shape"), (np.array([0.5]), "found 0.5"), (np.array([[]]), "shape")],
)
def test_arrays_of_something_else(tmp_path: Path, array: Any, message: str) -> None:
    np.save(tmp_path / "list.npy", array)
    with pytest.raises(DataError, match=message):
        read_image_list(tmp_path / "list.npy")


def test_an_array_of_objects_runs_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "list.npy", np.array(["9", None], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="no array of image ids"):
        read_image_list(tmp_path / "list.npy")
