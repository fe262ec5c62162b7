"""Objects of an annotation: what texts call them, which regions of a store show them, and what they are.

Shapes   O objects of an image, R regions, M side of a mask.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from visling.boxes import iou
from visling.data.annotations.vcr import PERSON, VcrRecord, read_metadata
from visling.data.outlines import outline_mask
from visling.errors import DataError
from visling.types import IGNORE, MaskGrid, RegionArray, RegionObjects

LISTED_NAMES = (
    "Casey", "Riley", "Jessie", "Jackie", "Avery", "Jaime", "Peyton", "Kerry", "Jody", "Kendall", "Frankie", "Pat",
    "Quinn",
)  # fmt: skip
"""Names of people in VL-BERT's texts, in this order (release, `vcr/data/datasets/vcr.py`)."""

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "trafficlight",
    "firehydrant", "stopsign", "parkingmeter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sportsball", "kite", "baseballbat", "baseballglove", "skateboard", "surfboard", "tennisracket", "bottle",
    "wineglass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot",
    "hotdog", "pizza", "donut", "cake", "chair", "couch", "pottedplant", "bed", "diningtable", "toilet", "tv", "laptop",
    "mouse", "remote", "keyboard", "cellphone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock",
    "vase", "scissors", "teddybear", "hairdrier", "toothbrush",
)  # fmt: skip
"""Classes of VCR's objects, those of COCO without spaces; as targets they count from 1, the whole image is 0."""

SAME_BOX = 1.0
"""Pixels by which each coordinate of a stored box may differ from an object and still belong to it: stores may hold
rounded boxes."""


def list_names(objects: Sequence[str], first: int = 0) -> dict[int, str]:
    """A name for every person, in the order of the objects, and its class for everything else.

    Args:
        first: number of the first name in `LISTED_NAMES`, which start again after the last.
    Source:
        VL-BERT release. There `first` counts the names of all visits to all questions so far.
    """
    names, people = {}, first
    for number, kind in enumerate(objects):
        names[number] = LISTED_NAMES[people % len(LISTED_NAMES)] if kind == PERSON else kind
        people += kind == PERSON
    return names


def draw_names(objects: Sequence[str], table: Sequence[str], draw: Callable[[int], int]) -> dict[int, str]:
    """A name for every person, drawn from a table with replacement, and its class for everything else.

    Args:
        draw: number of entries -> one of them; called for one person after the other.
    Source:
        ViLBERT release, `vcr_dataset.py`.
    """
    return {number: table[draw(len(table))] if kind == PERSON else kind for number, kind in enumerate(objects)}


def read_name_table(path: Path) -> list[str]:
    """The column `name` of ViLBERT's `unisex_names_table.csv`.

    Raises:
        DataError: the file is missing, or it has no such column or no name.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            names = [row["name"] for row in csv.DictReader(file)]
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError("a row without a name")
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise DataError(
            f"cannot read names from {path}: {error!r}. Expected a CSV file with a column 'name', as ViLBERT's "
            "unisex_names_table.csv."
        ) from error
    if not names:
        raise DataError(f"{path} lists no name. Expected a CSV file with a column 'name' and a row per name.")
    return names


def find_first_object(objects: NDArray[np.float32], regions: NDArray[np.float32]) -> int | None:
    """Number of the region that is object 0: 0, or 1 after the whole image; None if the regions are others than the
    objects in their order.

    Args:
        objects: (O, 4) pixel corners.
        regions: (R, 4) pixel corners in the same image.
    """
    start = len(regions) - len(objects)
    return start if start in (0, 1) and bool((np.abs(regions[start:] - objects) <= SAME_BOX).all()) else None


def shows_whole_image(regions: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.bool_]:
    """(R,) which regions (R, 4), in pixels of an image of `size`, are the image itself."""
    distances: NDArray[np.float32] = np.abs(regions - np.array([0, 0, *size], np.float32)).max(1, initial=0)
    return distances <= SAME_BOX


def bind_objects(
    objects: NDArray[np.float32], regions: NDArray[np.float32], *, least_overlap: float
) -> NDArray[np.int64]:
    """(O,) the region that shows each object, -1 where there is none.

    The regions are the objects themselves, where they have their boxes and order; else an object is shown by the
    region that overlaps it most.

    Args:
        objects: (O, 4) pixel corners.
        regions: (R, 4) pixel corners in the same image.
        least_overlap: intersection over union that a region needs (ours; the releases read the objects themselves).
    """
    start = find_first_object(objects, regions)
    if start is not None:
        return np.arange(start, len(regions))
    if not len(objects) or not len(regions):
        return np.full(len(objects), -1)
    overlaps = iou(torch.from_numpy(objects), torch.tensor(regions, dtype=torch.float32)).numpy()
    overlaps[(objects[:, None] == regions).all(2)] = 1  # also where a box has no area
    best = overlaps.argmax(1)
    return np.where(overlaps.max(1) >= least_overlap, best, -1)


def classify_regions(
    objects: Sequence[str], bound: NDArray[np.int64], regions: RegionArray, classes: Sequence[str]
) -> NDArray[np.int64]:
    """(R,) class of each region: that of the object that it shows, from 1, 0 for the whole image, IGNORE for others.

    Args:
        objects: class of each object.
        bound: (O,) of `bind_objects`.
        classes: all there are, by target less one.
    """
    found = np.where(shows_whole_image(regions.boxes, regions.size), 0, IGNORE)
    for kind, region in zip(objects, bound.tolist(), strict=True):
        if region >= 0 and kind in classes:
            found[region] = 1 + classes.index(kind)
    return found


def describe_objects(
    record: VcrRecord,
    bind: Callable[[VcrRecord, RegionArray], NDArray[np.int64]],
    classes: Sequence[str],
    regions: RegionArray,
    grid: MaskGrid,
) -> RegionObjects:
    """Classes of the objects that the regions show, and masks drawn from their outlines; a question about raw input
    knows no object.

    Args:
        bind: (O,) the region that shows each object of a record, as `bind_objects`.
        classes: as in `classify_regions`.
        grid: how masks are drawn.
    Raises:
        DataError: the objects of the image are not described.
    """
    masks = np.ones((len(regions), grid.size, grid.size), bool)
    if record.metadata is None:
        return RegionObjects(classes=np.zeros(len(regions), np.int64), masks=masks)
    described, bound = read_metadata(record), bind(record, regions)
    for item, region in enumerate(bound.tolist()):
        if region >= 0:
            masks[region] = outline_mask(
                described.outlines[item], described.boxes[item].tolist(), size=grid.size, inclusive=grid.inclusive
            )
    found = classify_regions(record.objects, bound, regions, classes)
    return RegionObjects(classes=np.where(found == IGNORE, 0, found), masks=masks)
