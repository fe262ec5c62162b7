"""COCO caption files, clean and dirty."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visling.data.annotations.captions import CaptionRecord, find_captions_file, is_split, read_captions
from visling.errors import DataError

CONTENT: dict[str, Any] = {
    "info": {"description": "COCO 2014 Dataset"},
    "images": [
        {"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": 640, "height": 480},
        {"id": 42, "file_name": "train/scene_000000000042.png", "width": 64, "height": 64},
        {"id": 43, "file_name": "scene_000000000043.png", "width": 64, "height": 64},
        {"id": 44, "file_name": "scene_000000000044.png", "width": 64, "height": 64},
    ],
    "annotations": [
        {"id": 1, "image_id": 9, "caption": "Closeup of bins of food that include broccoli and bread.\n"},
        {"id": 2, "image_id": 42, "caption": "  a small  red circle "},
        {"id": 2, "image_id": 42, "caption": "the same id again"},
        {"id": 3, "image_id": 42, "caption": "  \n"},
        {"id": 4, "image_id": 44, "caption": None},
        *({"id": 10 + n, "image_id": 9, "caption": f"caption {n}"} for n in range(6)),
    ],
}


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_records_and_dirt(tmp_path: Path) -> None:
    found = read_captions(save(tmp_path / "captions_train2014.json", CONTENT))
    assert found.records[0] == CaptionRecord(
        id="1", images=("COCO_train2014_000000000009",), caption="Closeup of bins of food that include broccoli and bread."
    )
    assert found.records[1] == CaptionRecord(id="2", images=("scene_000000000042",), caption="a small red circle")
    assert len(found.records) == 8
    assert (found.empty, found.repeated, found.surplus) == (2, 1, 0)
    assert found.bare_images == ("scene_000000000043", "scene_000000000044")


def test_five_captions_per_image(tmp_path: Path) -> None:
    found = read_captions(save(tmp_path / "captions.json", CONTENT), most=5)
    kept = [record.id for record in found.records if record.images == ("COCO_train2014_000000000009",)]
    assert kept == ["1", "10", "11", "12", "13"]
    assert found.surplus == 2


def test_truncated_file_names_file_and_position(tmp_path: Path) -> None:
    file = save(tmp_path / "captions_val.json", CONTENT)
    file.write_text(file.read_text()[:300])
    with pytest.raises(DataError, match=r"captions_val\.json is truncated or not JSON.*line 1, character \d+ of 300 bytes"):
        read_captions(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must be an object with a list 'annotations'; found a list"),
        ({"images": []}, "object with images"),
        ({"annotations": []}, "list 'images'"),
        ({"images": [], "annotations": [{"id": 1, "image_id": 5}]}, "entry 0 of 'annotations' lacks 'caption'"),
        ({"images": [], "annotations": [{"id": 1, "image_id": 5, "caption": "x"}]}, "caption 1 speaks of image 5"),
    ],
)
def test_other_layouts(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_captions(save(tmp_path / "captions.json", content))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no annotation file"):
        read_captions(tmp_path / "absent.json")


def test_find_captions_file(tmp_path: Path) -> None:
    wanted = save(tmp_path / "annotations" / "captions_train2014.json", CONTENT)
    save(tmp_path / "annotations" / "captions_trainval2014.json", CONTENT)
    assert find_captions_file(tmp_path, "train") == wanted
    assert find_captions_file(tmp_path, "train2014") == wanted
    with pytest.raises(DataError, match=r"captions_val\*\.json.*found captions_train2014\.json, captions_trainval2014\.json"):
        find_captions_file(tmp_path, "val")
    save(tmp_path / "captions_train.json", CONTENT)
    with pytest.raises(DataError, match="several files"):
        find_captions_file(tmp_path, "train")


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
