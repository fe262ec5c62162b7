"""Annotated objects: COCO instances JSON (with attributes, if the file has them), and NLVR's structured representation
read as such.

Source   COCO object detection format, cocodataset.org/#format-data; NLVR version 1, Suhr et al. 2017.
Letters  N objects of an image.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visling import damage
from visling.data.annotations.files import Layout, entries, read_json
from visling.errors import DataError
from visling.image_ids import from_file_name
from visling.types import Record

_NLVR_COLOURS = {"yellow": "yellow", "#0099ff": "blue", "black": "black"}
_NLVR_SIZES = {10: "small", 20: "medium", 30: "large"}
_NLVR_TYPES = ("circle", "square", "triangle")
_NLVR_STEP, _NLVR_SIDE = 150, 100
"""Distance between the left edges of two boxes, and the side of a box, in pixels."""

_Object = tuple[NDArray[np.float32], str, tuple[str, ...] | None, bool]
"""Box, category, attributes, crowd."""


@dataclass(frozen=True, kw_only=True)
class InstanceRecord(Record):
    """The objects of one image."""

    file_name: str
    """Path below the image folder."""
    size: tuple[int, int] | None
    """Width and height in pixels; None = not given in the file."""
    boxes: NDArray[np.float32]
    """(N, 4) pixel corners, inside the image where its size is known."""
    categories: tuple[str, ...]
    """(N,)."""
    attributes: tuple[tuple[str, ...] | None, ...]
    """(N,): names of all attributes that apply; None = not annotated."""
    crowd: tuple[bool, ...]
    """(N,): the box surrounds a group rather than one object."""


@dataclass(frozen=True, kw_only=True)
class Instances:
    """What an instances file holds, and what was left out of it."""

    records: tuple[InstanceRecord, ...]
    """One per listed image, in the order of the file; images without objects included."""
    category_names: tuple[str, ...]
    """As the file lists them, which need not all occur."""
    attribute_names: tuple[str, ...]
    """As the file lists them, else all that occur, sorted."""
    empty_boxes: int = 0
    """Objects without area inside their image, left out."""
    unlisted_images: int = 0
    """Objects of images that the file does not list, left out."""
    repeated: int = 0
    """Objects whose id had occurred before, left out."""


def read_instances(path: str | Path) -> Instances:
    """Objects of a COCO instances file; annotations may carry `"attributes": ["red", ...]`.

    Raises:
        DataError: the file is missing, truncated or of another layout, names a category it does not list, lists a file
            name twice, or holds a box that is not four finite numbers.
    """
    path = Path(path)
    with Layout(path, "annotation") as at:
        content = read_json(path)
        images = {image["id"]: image for image in entries(content, "images", ("id", "file_name"), path)}
        categories = {
            category["id"]: str(category["name"]) for category in entries(content, "categories", ("id", "name"), path)
        }
        repeated_names = [
            name for name, count in Counter(image["file_name"] for image in images.values()).items() if count > 1
        ]
        if repeated_names:
            raise DataError(
                f"{path}: image file {repeated_names[0]!r} is listed under several ids. Every image must be "
                "listed once."
            )
        objects: dict[Any, list[_Object]] = {key: [] for key in images}
        left_out: Counter[str] = Counter()
        seen: set[Any] = set()
        occurring: set[str] = set()
        for at.entry, annotation in enumerate(
            entries(content, "annotations", ("image_id", "category_id", "bbox"), path)
        ):
            number = at.entry
            where = f"{path}: annotation {annotation.get('id', number)}"
            if annotation["category_id"] not in categories:
                raise DataError(
                    f"{where} is of category {annotation['category_id']}, which the file's categories do not list."
                )
            attributes = _read_attributes(annotation.get("attributes"), where)
            box = _read_corners(annotation["bbox"], images.get(annotation["image_id"], {}), where)
            if annotation["image_id"] not in images:
                left_out["unlisted"] += 1
            elif annotation.get("id", number) in seen:
                left_out["repeated"] += 1
            elif box[2] <= box[0] or box[3] <= box[1]:
                left_out["empty"] += 1
            else:
                objects[annotation["image_id"]].append(
                    (box, categories[annotation["category_id"]], attributes, bool(annotation.get("iscrowd", 0)))
                )
                occurring.update(attributes or ())
            seen.add(annotation.get("id", number))
        listed = content.get("attributes")
        if isinstance(listed, list):
            names = tuple(str(name["name"] if isinstance(name, dict) else name) for name in listed)
            if unknown := sorted(occurring - set(names)):
                raise DataError(
                    f"{path}: attribute {unknown[0]!r} occurs but is not in the file's list of attributes: "
                    f"{', '.join(names)}."
                )
        else:
            names = tuple(sorted(occurring))
        return Instances(
            records=tuple(
                _make_record(image["file_name"], _read_size(image), objects[key]) for key, image in images.items()
            ),
            category_names=tuple(dict.fromkeys(categories.values())),
            attribute_names=names,
            empty_boxes=left_out["empty"],
            unlisted_images=left_out["unlisted"],
            repeated=left_out["repeated"],
        )


def nlvr_instances(root: str | Path, split: str) -> Instances:
    """Objects of NLVR (version 1) pictures, from the structured representation in `{split}/{split}.json`.

    Every statement has up to six pictures, K = 0 to 5, in which its three boxes are in the K-th order of
    `itertools.permutations`; those in the folder are read. File names are relative to `{split}/images`. Categories are
    the shapes, attributes colour and size.

    Raises:
        DataError: the file is missing, truncated or of another layout, or its pictures are missing.
    """
    folder = Path(root) / split
    path = folder / f"{split}.json"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start}: {error.reason}. Download it again.") from error
    except FileNotFoundError as error:
        raise DataError(
            f"no NLVR file {path}. Give the folder that holds {split}/{split}.json and {split}/images."
        ) from error
    records: dict[str, InstanceRecord] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = damage.parse_json(line)
            boxes = [[_read_nlvr_item(item) for item in box] for box in row["structured_rep"]]
            stem = f"{row['directory']}/{split}-{row['identifier']}"
        except damage.LAYOUT as error:
            raise DataError(
                f"{path}, line {number} of {len(lines)} is truncated or not of NLVR's layout: {error!r}. "
                "Download it again."
            ) from error
        width = _NLVR_STEP * (len(boxes) - 1) + _NLVR_SIDE
        for picture, order in enumerate(itertools.permutations(range(len(boxes)))):
            name = f"{stem}-{picture}.png"
            # Unlike a path's own method, it takes a name that can be no file's for one that is missing.
            if name in records or not os.path.exists(folder / "images" / name):
                continue
            objects = [
                (box + np.array([_NLVR_STEP * slot, 0, _NLVR_STEP * slot, 0], np.float32), category, attributes, False)
                for slot, source in enumerate(order)
                for box, category, attributes in boxes[source]
            ]
            records[name] = _make_record(name, (width, _NLVR_SIDE), objects)
    if not records:
        raise DataError(
            f"none of the pictures that {path} names is in {folder / 'images'}. Copy the images of the split there."
        )
    names = (*_NLVR_COLOURS.values(), *_NLVR_SIZES.values())
    return Instances(records=tuple(records.values()), category_names=_NLVR_TYPES, attribute_names=names)


def _read_nlvr_item(item: dict[str, Any]) -> tuple[NDArray[np.float32], str, tuple[str, ...]]:
    x, y, size = item["x_loc"], item["y_loc"], item["size"]
    attributes = (_NLVR_COLOURS[item["color"].lower()], _NLVR_SIZES[size])
    return np.array([x, y, x + size, y + size], np.float32), _NLVR_TYPES[_NLVR_TYPES.index(item["type"])], attributes


def _make_record(file_name: str, size: tuple[int, int] | None, objects: Sequence[_Object]) -> InstanceRecord:
    stem = from_file_name(file_name)
    return InstanceRecord(
        id=stem,
        images=(stem,),
        file_name=file_name,
        size=size,
        boxes=np.stack([box for box, *_ in objects]) if objects else np.zeros((0, 4), np.float32),
        categories=tuple(category for _, category, _, _ in objects),
        attributes=tuple(attributes for _, _, attributes, _ in objects),
        crowd=tuple(crowd for *_, crowd in objects),
    )


def _read_size(image: dict[str, Any]) -> tuple[int, int] | None:
    width, height = image.get("width"), image.get("height")
    return (int(width), int(height)) if width and height else None


def _read_corners(bbox: Any, image: dict[str, Any], where: str) -> NDArray[np.float32]:
    """Left, top, width, height -> corners, clipped to the image if its size is known."""
    if (
        not isinstance(bbox, list)
        or len(bbox) != 4
        or not all(isinstance(value, int | float) and math.isfinite(value) for value in bbox)
    ):
        raise DataError(f"{where}: bbox must be four finite numbers [left, top, width, height]; found {bbox!r}.")
    left, top, width, height = (float(value) for value in bbox)
    corners = np.array([left, top, left + max(width, 0.0), top + max(height, 0.0)], np.float32)
    size = _read_size(image)
    return corners if size is None else corners.clip(0.0, np.array([*size, *size], np.float32))


def _read_attributes(value: Any, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise DataError(f"{where}: attributes must be a list of names; found {value!r}.")
    return tuple(dict.fromkeys(value))
