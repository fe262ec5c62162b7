"""What every reader of feature files offers, and the one converter that turns what they read into a store.

A reader decodes one layout: it finds its way about the file and yields regions image by image. Everything else is
common to all layouts and happens here: order, progress, resuming, repeated images, checks, counts.

Letters  R regions of an image, F feature width.
"""

from __future__ import annotations

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from visling.errors import BoxError, DataError, VislingError
from visling.feature_kinds import KINDS
from visling.regions.formats.kinds import recognise_kind
from visling.regions.writer import StoreWriter
from visling.types import RegionArray

OUTSIDE = 1.0
"""Pixels by which a box may leave its image: it is clipped to the image. A box further out belongs to another image,
or to another layout."""

_LOWEST_LABELS: Mapping[str, int] = {"classes": 0, "attributes": -1}
"""Fields of labels and their lowest value; -1 is no attribute."""
_HIGHEST_LABEL = int(np.iinfo(np.int16).max)
"""A store keeps labels in 16 bits."""
_COMMIT_EVERY = 256
"""Images between two commits: the most that an interruption costs."""
_SAMPLE = 16
"""Images at the front of a file whose numbers of regions tell the kind of its features."""


class ImageRegions(NamedTuple):
    """One image of a feature file."""

    image_id: str
    """As the file spells it; numbers in decimal."""
    regions: RegionArray | None
    """None for an image that was skipped."""
    position: int
    """How much of the file has been read, this image included, in the reader's unit."""
    where: str
    """Place in the file for messages, such as "line 3"."""


class RegionReader(ABC):
    """A feature file, opened. The path may be a folder; files that belong to it (tables of ids or sizes) are found by
    their released names next to it.

    Whatever the file holds, its images are yielded as the store keeps them:

        boxes       pixels of the original image: unit corners are multiplied by its size, features of a grid get the
                    boxes of their cells; without boxes every region is the whole image, of 1 x 1 if its size is unknown
        classes     from 0, without the background
        probs       with the background last

    Args:
        layout: the layout to read; None = the one that the file has.
    Raises:
        DataError: the file is missing, of another layout, or holds no region.
    """

    layout: str
    """Name of the layout, kept in the store's settings."""
    feature_size: int
    """F, as the first image with regions has it."""
    total: int
    """How much there is to read, in `unit`s."""
    unit: Literal["bytes", "images"] = "images"
    """What positions count."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, if the file holds them."""
    attribute_names: tuple[str, ...] = ()
    """Names of the attributes, if the file holds them."""
    has_boxes: bool = True
    """False where the layout holds no boxes: every region is the whole image."""
    has_sizes: bool = True
    """False where the layout holds no size of the images."""
    notes: tuple[str, ...] = ()
    """What a user should know about the way from the file to the store: what was computed because the layout lacks it,
    or left out."""
    box_hint: str = "Does the file have another layout?"
    """Ends the message about a box that lies outside its image."""

    def __init__(self, path: str | Path, layout: str | None = None) -> None:
        self.path = find_file(path)

    @property
    def fingerprint(self) -> str:
        """Identity of the detector: the kind of the features where the layout, their width and the numbers of regions
        at the front of the file tell it, else the layout's name."""
        counts: list[int] = []
        # A damaged entry is met again, and named, when the file is converted.
        with contextlib.suppress(VislingError):
            for image in itertools.islice(self.images(), _SAMPLE):
                counts.append(0 if image.regions is None else len(image.regions))
        return recognise_kind(self.layout, self.feature_size, [count for count in counts if count]) or self.layout

    @abstractmethod
    def images(self, skip: Container[str] = ()) -> Iterator[ImageRegions]:
        """Image by image, in the order of the file.

        Args:
            skip: ids of images that are not decoded; it may grow while the images are read.
        Raises:
            DataError: an entry that was cut off or is not of the layout; says which.
        """


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion did."""

    images: int
    """Written now."""
    regions: int
    """Of the images written now."""
    existing: int
    """Images that the store already held."""
    repeated: int
    """Entries left out because their image had come before; the first entry of an image counts."""
    clipped: int = 0
    """Boxes that left their image, by up to a pixel, and were cut to it."""


def find_file(path: str | Path) -> Path:
    """The path of a feature file.

    Raises:
        DataError: nothing is there.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"no file {path} of region features. Check the path; released files come zipped: unpack them first."
        )
    return path


def damaged_file(path: Path, where: str, what: str) -> DataError:
    """The error for an entry that cannot be read: where it is in the file, and what is wrong with it."""
    return DataError(
        f"{path}, {where}, {what}. The file is truncated, damaged or of another layout: download it again."
    )


def convert_regions(
    files: Sequence[RegionReader],
    store: str | Path,
    *,
    fingerprint: str | None = None,
    class_names: Sequence[str] = (),
    attribute_names: Sequence[str] = (),
    dtype: Literal["float16", "float32"] = "float16",
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Write the images of several files into one store; images that it already holds are skipped.

    Args:
        files: opened by `formats.open_reader`, or readers of your own.
        fingerprint: identity of the detector; what the files tell of it if left out.
        class_names: names of the classes; those in the files if left out.
        resume: continue an interrupted conversion, or add images to a store.
        progress: called with how much has been read so far and in all, in the unit of the first file.
    Raises:
        DataError: no file, one of another layout or width than the first, a damaged entry, or a label without a name.
        BoxError: a box outside its image.
        StoreError: the folder already holds a store, or one with other features.
    """
    if not files:
        raise DataError("no file of region features was given to convert.")
    first = files[0]
    fingerprints = [file.fingerprint if fingerprint is None else fingerprint for file in files]
    for file, found in zip(files[1:], fingerprints[1:], strict=True):
        _check_same_kind(first, fingerprints[0], file, found)
    names = {
        "classes": tuple(class_names) or first.class_names,
        "attributes": tuple(attribute_names) or first.attribute_names,
    }
    lacking = {"has_boxes": first.has_boxes, "has_sizes": first.has_sizes}
    settings: dict[str, Any] = {"layout": first.layout, **{name: False for name, has in lacking.items() if not has}}
    if fingerprints[0] in KINDS:
        settings["features"] = fingerprints[0]
    total, finished = sum(file.total for file in files), 0
    regions = existing = repeated = clipped = 0
    with StoreWriter(
        store,
        feature_size=first.feature_size,
        fingerprint=fingerprints[0],
        class_names=names["classes"],
        attribute_names=names["attributes"],
        dtype=dtype,
        settings=settings,
        may_differ=("features",),  # which earlier versions did not write
        resume=resume,
    ) as writer:
        before = len(writer)
        awaited = set(writer)  # images that the store held, until they come
        for file in files:
            for image in file.images(skip=writer):
                if image.image_id in awaited:
                    awaited.remove(image.image_id)
                    existing += 1
                elif image.image_id in writer:
                    repeated += 1
                else:
                    assert image.regions is not None, "a reader skips only what it is asked to skip"
                    checked, cut = _check_regions(file, image, image.regions, names)
                    writer.add(image.image_id, checked)
                    regions, clipped = regions + len(checked), clipped + cut
                    if (len(writer) - before) % _COMMIT_EVERY == 0:
                        writer.commit()
                if progress is not None:
                    progress(finished + image.position, total)
            finished += file.total
        images = len(writer) - before
    return ConversionReport(images=images, regions=regions, existing=existing, repeated=repeated, clipped=clipped)


def _check_same_kind(first: RegionReader, fingerprint: str, other: RegionReader, found: str) -> None:
    """Refuse a file whose features do not belong into one store with those of the first."""
    for what, here, there in (
        ("the layout", first.layout, other.layout),
        ("features of width", first.feature_size, other.feature_size),
        ("the fingerprint", fingerprint, found),
        ("the class names", first.class_names, other.class_names),
        ("the attribute names", first.attribute_names, other.attribute_names),
    ):
        if here != there:
            raise DataError(
                f"{first.path} has {what} {str(here)[:80]}, {other.path} {str(there)[:80]}: "
                "one store holds features of one kind. Convert them separately."
            )


def _check_regions(
    file: RegionReader, image: ImageRegions, regions: RegionArray, names: Mapping[str, Sequence[str]]
) -> tuple[RegionArray, int]:
    """The regions of one image with their boxes clipped to it, after checks of boxes and labels; and how many boxes
    were clipped."""
    for field, lowest in _LOWEST_LABELS.items():
        labels = getattr(regions, field)
        if labels is None or not labels.size:
            continue
        low, high = int(labels.min()), int(labels.max())
        if not lowest <= low <= high <= _HIGHEST_LABEL:
            raise damaged_file(
                file.path, image.where, f"has {field} from {low} to {high}; expected {lowest} to {_HIGHEST_LABEL}"
            )
        if names[field] and high >= len(names[field]):
            raise DataError(
                f"{file.path}: image {image.image_id!r} has {field} up to {high}, but there are only "
                f"{len(names[field])} names. Give the list that belongs to the file."
            )
    boxes, clipped = _clip_boxes(file, image, regions)
    return replace(regions, boxes=boxes), clipped


def _clip_boxes(file: RegionReader, image: ImageRegions, regions: RegionArray) -> tuple[NDArray[np.float32], int]:
    width, height = regions.size
    limits = np.array([width, height, width, height], np.float32)
    outside = np.maximum(regions.boxes - limits, -regions.boxes)
    if outside.size and outside.max() > OUTSIDE:
        raise BoxError(
            f"{file.path}, {image.where}: a box of image {image.image_id!r} leaves the image of {width} x {height} by "
            f"{outside.max():.1f} pixels. {file.box_hint}"
        )
    clipped = int((outside > 0).any(1).sum())
    return np.clip(regions.boxes, 0, limits) if clipped else regions.boxes, clipped
