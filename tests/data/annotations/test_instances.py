"""Object annotations: COCO's layout with its dirt, and NLVR's structured representation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visling.data.annotations.instances import nlvr_instances, read_instances
from visling.errors import DataError

CONTENT: dict[str, Any] = {
    "images": [
        {"id": 900, "file_name": "COCO_val2014_000000000900.jpg", "width": 40, "height": 30},
        {"id": 7, "file_name": "sub/odd.png", "width": 10, "height": 10},
        {"id": 8, "file_name": "bare.png"},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}],
    "annotations": [
        {
            "id": 1,
            "image_id": 900,
            "category_id": 3,
            "bbox": [1, 2, 3.5, 4],
            "attributes": ["red", "large"],
            "iscrowd": 0,
        },
        {"id": 2, "image_id": 900, "category_id": 90, "bbox": [30, 20, 20, 20], "iscrowd": 1},
        {"id": 3, "image_id": 900, "category_id": 90, "bbox": [5, 5, 0, 4]},
        {"id": 4, "image_id": 900, "category_id": 90, "bbox": [40, 5, 3, 3]},
        {"id": 5, "image_id": 12345, "category_id": 3, "bbox": [0, 0, 5, 5]},
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, 5, 5]},
        {"id": 6, "image_id": 7, "category_id": 3, "bbox": [0, 0, 5, 5], "attributes": []},
    ],
}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_dirty_file_is_read_and_its_dirt_counted(tmp_path: Path) -> None:
    found = read_instances(write(tmp_path / "a.json", CONTENT))
    assert [record.id for record in found.records] == ["COCO_val2014_000000000900", "odd", "bare"]
    first, second, third = found.records
    assert first.file_name == "COCO_val2014_000000000900.jpg"
    assert first.images == ("COCO_val2014_000000000900",)
    assert first.size == (40, 30)
    assert first.boxes.tolist() == [[1, 2, 4.5, 6], [30, 20, 40, 30]]  # clipped to the image
    assert first.boxes.dtype == np.float32
    assert first.categories == ("car", "toothbrush")
    assert first.attributes == (("red", "large"), None)
    assert first.crowd == (False, True)
    assert second.attributes == ((),)
    assert second.file_name == "sub/odd.png"
    assert third.boxes.shape == (0, 4)
    assert third.size is None
    assert found.category_names == ("toothbrush", "car")
    assert found.attribute_names == ("large", "red")
    assert (found.empty_boxes, found.unlisted_images, found.repeated) == (2, 1, 1)


def test_listed_attributes_keep_their_order(tmp_path: Path) -> None:
    assert read_instances(
        write(tmp_path / "a.json", {**CONTENT, "attributes": ["red", "small", "large"]})
    ).attribute_names == (
        "red",
        "small",
        "large",
    )
    with pytest.raises(DataError, match="'large' occurs but is not in the file's list"):
        read_instances(write(tmp_path / "a.json", {**CONTENT, "attributes": ["red"]}))


def test_a_truncated_file_says_where(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", CONTENT)
    path.write_text(path.read_text()[:-60])
    with pytest.raises(DataError, match=r"a\.json is truncated or not JSON: .*line 1"):
        read_instances(path)
    with pytest.raises(DataError, match="no annotation file"):
        read_instances(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 4}, "annotation 1 is of category 4"),
        ({"bbox": [1, 2, 3]}, "annotation 1: bbox must be four finite numbers"),
        ({"bbox": [1, 2, "3", 4]}, "annotation 1: bbox must be four finite numbers"),
        ({"bbox": [1, 2, float("nan"), 4]}, "annotation 1: bbox must be four finite numbers"),
        ({"attributes": "red"}, "annotation 1: attributes must be a list"),
    ],
)
def test_a_wrong_annotation_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    annotations = [{**CONTENT["annotations"][0], **change}]
    with pytest.raises(DataError, match=message):
        read_instances(write(tmp_path / "a.json", {**CONTENT, "annotations": annotations}))


def test_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="list 'images'"):
        read_instances(write(tmp_path / "a.json", {"annotations": []}))
    twice = [CONTENT["images"][0], {**CONTENT["images"][0], "id": 901}]
    with pytest.raises(DataError, match="listed under several ids"):
        read_instances(write(tmp_path / "a.json", {**CONTENT, "images": twice}))


ROW = {
    "sentence": "There is a tower.",
    "label": "true",
    "identifier": "12-0",
    "directory": "3",
    "structured_rep": [
        [{"y_loc": 80, "type": "square", "color": "Yellow", "x_loc": 40, "size": 20}],
        [{"y_loc": 5, "type": "circle", "color": "#0099ff", "x_loc": 1, "size": 10}],
        [{"y_loc": 70, "type": "triangle", "color": "Black", "x_loc": 70, "size": 30}],
    ],
}


def nlvr(root: Path, rows: list[str], pictures: tuple[int, ...] = (0, 1, 2, 3, 4, 5)) -> Path:
    (root / "dev" / "images" / "3").mkdir(parents=True)
    (root / "dev" / "dev.json").write_text("\n".join(rows))
    for picture in pictures:
        Image.new("RGBA", (400, 100)).save(root / "dev" / "images" / "3" / f"dev-12-0-{picture}.png")
    return root


def test_nlvr_boxes_follow_the_order_of_the_picture(tmp_path: Path) -> None:
    found = nlvr_instances(nlvr(tmp_path, [json.dumps(ROW)]), "dev")
    assert [record.id for record in found.records] == [f"dev-12-0-{k}" for k in range(6)]
    assert found.records[0].boxes.tolist() == [[40, 80, 60, 100], [151, 5, 161, 15], [370, 70, 400, 100]]
    assert found.records[3].categories == ("circle", "triangle", "square")  # third order: 1, 2, 0
    assert found.records[3].boxes.tolist() == [[1, 5, 11, 15], [220, 70, 250, 100], [340, 80, 360, 100]]
    assert found.records[3].attributes == (("blue", "small"), ("black", "large"), ("yellow", "medium"))
    assert found.records[3].file_name == "3/dev-12-0-3.png"
    assert found.records[0].size == (400, 100)
    assert found.category_names == ("circle", "square", "triangle")
    assert set(found.attribute_names) == {"yellow", "blue", "black", "small", "medium", "large"}


def test_nlvr_pictures_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    assert [
        record.id for record in nlvr_instances(nlvr(tmp_path, [json.dumps(ROW)], pictures=(1, 4)), "dev").records
    ] == ["dev-12-0-1", "dev-12-0-4"]
    with pytest.raises(DataError, match="none of the pictures"):
        nlvr_instances(nlvr(tmp_path / "other", [json.dumps(ROW)], pictures=()), "dev")


def test_a_broken_nlvr_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2 of 2 is truncated"):
        nlvr_instances(nlvr(tmp_path / "a", [json.dumps(ROW), json.dumps(ROW)[:-20]]), "dev")
    strange = json.dumps(ROW).replace("circle", "hexagon")
    with pytest.raises(DataError, match="line 1 of 1"):
        nlvr_instances(nlvr(tmp_path / "b", [strange]), "dev")
    with pytest.raises(DataError, match="no NLVR file"):
        nlvr_instances(tmp_path, "train")
