"""Boxes are read from COCO's, MAttNet's and VCR's layouts, in the order of their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.data.annotations.boxes import join_boxes, read_boxes
from visling.errors import DataError

IMAGES = [
    {"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": 640, "height": 480},
    {"id": 10, "file_name": "COCO_train2014_000000000010.jpg"},
]
ANNOTATIONS = [
    {"id": 2, "image_id": 9, "bbox": [5, 6, 10, 20], "iscrowd": 1},
    {"id": 1, "image_id": 9, "bbox": [1.5, 2, 3, 4], "iscrowd": 0},
    {"id": 3, "image_id": 99, "bbox": [1, 2, 3, 4]},
]


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def boxes_of(found: Any) -> Any:
    return found[0].tolist()


def test_coco_instances(tmp_path: Path) -> None:
    given = read_boxes(write(tmp_path / "i.json", {"images": IMAGES, "annotations": ANNOTATIONS}))
    for spelling in ("9", "COCO_train2014_000000000009"):
        found = given.find(spelling)
        assert found is not None
        assert boxes_of(found) == [[5, 6, 15, 26], [1.5, 2, 4.5, 6]], "in file order, with the crowd"
        assert found[1] == (640, 480)
    bare = given.find("10")
    assert bare is not None, "listed without a box"
    assert (bare[0].shape, bare[1]) == ((0, 4), None)
    assert given.find("99") is None, "its image is not listed"


def test_detections_of_mattnet(golden: Path) -> None:
    file = golden / "vlbert_tasks/refcoco/data/refcoco+/proposal/res101_coco_minus_refer_notime_dets.json"
    given = read_boxes(file)
    rows = json.loads(file.read_text())
    for image in {row["image_id"] for row in rows}:
        wanted = [row["box"] for row in rows if row["image_id"] == image]
        found = given.find(f"COCO_train2014_{image:012d}")
        assert found is not None
        np.testing.assert_allclose(found[0], [[x, y, x + w, y + h] for x, y, w, h in wanted], rtol=1e-6)


def test_metadata_of_vcr(golden: Path) -> None:
    folder = golden / "vlbert_tasks/vcr/data/vcr1images"
    given = read_boxes(folder)
    files = sorted(folder.rglob("*.json"))
    assert files
    for file in files:
        content = json.loads(file.read_text())
        found = given.find(file.stem)
        assert found is not None
        np.testing.assert_allclose(found[0], np.array(content["boxes"], np.float32).reshape(-1, 5)[:, :4], rtol=1e-6)
        assert found[1] == (content["width"], content["height"])


def test_the_fingerprint_is_of_images_and_boxes(tmp_path: Path) -> None:
    first = read_boxes(write(tmp_path / "a.json", {"images": IMAGES, "annotations": ANNOTATIONS}))
    second = read_boxes(write(tmp_path / "b.json", {"images": IMAGES[::-1], "annotations": ANNOTATIONS}))
    other = read_boxes(write(tmp_path / "c.json", {"images": IMAGES, "annotations": ANNOTATIONS[1:]}))
    assert first.fingerprint == second.fingerprint != other.fingerprint


def test_boxes_of_several_files_follow_one_another(tmp_path: Path) -> None:
    annotated = read_boxes(write(tmp_path / "i.json", {"images": IMAGES, "annotations": ANNOTATIONS}))
    detected = read_boxes(
        write(tmp_path / "d.json", [{"image_id": 9, "box": [0, 0, 1, 2]}, {"image_id": 7, "box": [0] * 4}])
    )
    given = join_boxes([detected, annotated])
    found, other = given.find("COCO_train2014_000000000009"), given.find("7")
    assert found is not None
    assert other is not None
    assert boxes_of(found) == [[0, 0, 1, 2], [5, 6, 15, 26], [1.5, 2, 4.5, 6]]
    assert found[1] == (640, 480)
    assert len(other[0]) == 1
    assert len(detected.boxes["9"]) == 1, "the parts stay"
    wider = {"images": [{**IMAGES[0], "width": 641}], "annotations": []}
    with pytest.raises(DataError, match="640 x 480 pixels in one file of boxes, 641 x 480 in another"):
        join_boxes([annotated, read_boxes(write(tmp_path / "w.json", wider))])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": IMAGES}, "'annotations'"),
        ([{"image_id": 1}], "'box'"),
        ({"images": IMAGES, "annotations": [{"image_id": 9, "bbox": [1, 2, 3]}]}, "must be four finite numbers"),
        ([{"image_id": 1, "box": [1, 2, 3, float("nan")]}], "must be four finite numbers"),
        ("text", "must be an object with a list 'images'"),
    ],
)
def test_other_layouts_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_boxes(write(tmp_path / "boxes.json", content))


def test_folders_of_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file of boxes"):
        read_boxes(tmp_path)
    write(tmp_path / "a.json", {"names": []})
    with pytest.raises(DataError, match="lists no boxes"):
        read_boxes(tmp_path)
    write(tmp_path / "a.json", {"boxes": [7]})
    with pytest.raises(DataError, match="must be four finite numbers"):
        read_boxes(tmp_path)
