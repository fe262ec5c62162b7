"""Boxes of images from any annotation that lists them, for features at exactly these boxes.

Layout                what is read                                                            box
COCO instances        images: id, file_name, width, height; annotations: image_id, bbox       x, y, w, h
refer's instances     the same                                                                x, y, w, h
MAttNet's detections  a list of objects with image_id and box (`..._notime_dets.json`)        x, y, w, h
VCR's metadata        a folder with one file per image: boxes, width, height                  x1, y1, x2, y2, score

Boxes keep the order of their file; crowds are boxes like others. Whether they lie inside their image is for the reader
of the picture to see.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visling.data.annotations.files import Layout, entries, plain_id, read_json
from visling.errors import DataError
from visling.image_ids import Aliases, from_file_name

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class GivenBoxes:
    """Boxes by image."""

    boxes: Mapping[str, NDArray[np.float32]]
    """Image id -> (N, 4) pixel corners; N may be 0."""
    sizes: Mapping[str, Size] = field(default_factory=dict)
    """Image id -> width and height, where the file has them."""
    _aliases: Aliases = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_aliases", Aliases(self.boxes))

    def find(self, image_id: str) -> tuple[NDArray[np.float32], Size | None] | None:
        """Boxes and size of an image under any spelling of its id; None if it is not listed."""
        name = self._aliases.find(image_id)
        return None if name is None else (self.boxes[name], self.sizes.get(name))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all images and boxes."""
        digest = hashlib.sha256()
        for name, boxes in sorted(self.boxes.items()):
            digest.update(f"{name} {len(boxes)} ".encode("utf-8", "surrogatepass"))
            digest.update(boxes.tobytes())
        return digest.hexdigest()


def read_boxes(path: Path) -> GivenBoxes:
    """Boxes of a file or folder of one of the layouts above; its content decides which.

    Raises:
        DataError: missing, truncated or of another layout, or a box that is not of finite numbers.
    """
    if path.is_dir():
        return _read_folder(path)
    with Layout(path):
        content = read_json(path)
        if isinstance(content, list):
            listed = entries({"detections": content}, "detections", ("image_id", "box"), path)
            return _collect(((plain_id(entry["image_id"]), entry["box"]) for entry in listed), {}, {}, path)
        images = entries(content, "images", ("id",), path)
        names = {image["id"]: from_file_name(str(image.get("file_name", image["id"]))) for image in images}
        sizes = {
            names[image["id"]]: (int(image["width"]), int(image["height"]))
            for image in images
            if image.get("width") and image.get("height")
        }
        listed = entries(content, "annotations", ("image_id", "bbox"), path)
        known = ((names[entry["image_id"]], entry["bbox"]) for entry in listed if entry["image_id"] in names)
        return _collect(known, dict.fromkeys(names.values(), ()), sizes, path)


def join_boxes(parts: Sequence[GivenBoxes]) -> GivenBoxes:
    """The boxes of several files; those of an image follow one another in the order of the files, which may spell its
    id differently.

    Raises:
        DataError: two files have another size of an image.
    """
    first, *others = parts
    boxes, sizes = dict(first.boxes), dict(first.sizes)
    for part in others:
        known = Aliases(boxes)
        for name, further in part.boxes.items():
            own = known.find(name) or name
            boxes[own] = np.concatenate([boxes[own], further]) if own in boxes else further
            size = part.sizes.get(name)
            if size is not None and sizes.setdefault(own, size) != size:
                raise DataError(
                    f"image {name} has {sizes[own][0]} x {sizes[own][1]} pixels in one file of boxes, "
                    f"{size[0]} x {size[1]} in another. Give files about the same images."
                )
    return GivenBoxes(boxes=boxes, sizes=sizes)


def _collect(
    listed: Iterable[tuple[str, Any]], empty: Mapping[str, Any], sizes: Mapping[str, Size], path: Path
) -> GivenBoxes:
    """Boxes x, y, w, h with the name of their image, by image.

    Args:
        empty: images that are listed even if they have no box.
    """
    rows: dict[str, list[list[float]]] = defaultdict(list, {name: [] for name in empty})
    for name, box in listed:
        x, y, width, height = _check_box(box, f"{path}: image {name}")
        rows[name].append([x, y, x + width, y + height])
    return GivenBoxes(
        boxes={name: np.array(boxes, np.float32).reshape(-1, 4) for name, boxes in rows.items()}, sizes=sizes
    )


def _read_folder(folder: Path) -> GivenBoxes:
    boxes, sizes = {}, {}
    for path in sorted(folder.rglob("*.json")):
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("boxes"), list):
            raise DataError(f"{path} lists no boxes: expected one file of VCR's metadata for each image.")
        with Layout(path):
            size = (int(content.get("width") or 0), int(content.get("height") or 0))
            rows = [_check_box(box[:4] if isinstance(box, list) else box, str(path)) for box in content["boxes"]]
        boxes[path.stem] = np.array(rows, np.float32).reshape(-1, 4)
        if all(size):
            sizes[path.stem] = size
    if not boxes:
        raise DataError(f"no file of boxes in {folder}: expected VCR's metadata, one .json for each image.")
    return GivenBoxes(boxes=boxes, sizes=sizes)


def _check_box(box: Any, where: str) -> list[float]:
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in box)
    ):
        raise DataError(f"{where}: a box must be four finite numbers; found {box!r}.")
    return [float(value) for value in box]
