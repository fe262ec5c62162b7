"""Images -> regions -> store: resumable, and not stopped by damaged files."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from visling.errors import DataError
from visling.runtime import Precision
from visling.types import RegionArray
from visling.vision.image_batches import ImageBatches, LoadedImage
from visling.vision.image_files import ImageFile, as_images, check_ids, find_images
from visling.vision.region_detector import RegionDetector

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""

FEW_CLASSES = 100
"""Up to this many classes, class distributions are small compared with the features and are kept by default."""


class RegionWriter(Protocol):
    """Where regions go, such as `regions.writer.StoreWriter`."""

    def __contains__(self, image_id: str, /) -> bool: ...
    def add(self, image_id: str, regions: RegionArray) -> None: ...
    def commit(self) -> None: ...


class BoxSource(Protocol):
    """Boxes to take features at, such as `data.annotations.boxes.GivenBoxes`."""

    def find(self, image_id: str, /) -> tuple[NDArray[np.float32], tuple[int, int] | None] | None:
        """Pixel corners (N, 4) of an image, and its width and height where they are known; None for an image that is
        not listed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the time of an extraction went, in seconds. Those of several processes are added up, but for `elapsed`."""

    elapsed: float = 0.0
    """From the first image to the last; of several processes the longest."""
    total: float = 0.0
    """The same, added up. Of it:"""
    waiting: float = 0.0
    """for images that were not decoded and scaled yet,"""
    network: float = 0.0
    """in the detector,"""
    writing: float = 0.0
    """writing and committing."""
    reading: float = 0.0
    """Of the background threads: reading and decoding files,"""
    scaling: float = 0.0
    """and scaling images."""


@dataclass(frozen=True, kw_only=True)
class ExtractionReport:
    """What became of the images."""

    done: int
    """Images whose regions were written."""
    skipped_existing: int
    """Images whose regions were there already."""
    unreadable: tuple[tuple[ImageFile, str], ...]
    """Files that are not images, or damaged ones, with the reason."""
    regions: int
    """Regions written."""
    without_regions: int
    """Images among `done` that have none."""
    unlisted: int = 0
    """Images that the given boxes do not list, left out."""
    clipped: int = 0
    """Given boxes that reached beyond their image and were cut to it."""
    empty: int = 0
    """Given boxes without area in their image, left out."""
    first_of_several: int = 0
    """Animated images and files of several pages, of which the first frame was taken."""
    timings: Timings = Timings()


def extract(
    images: Iterable[Path | ImageFile] | Path,
    detector: RegionDetector,
    writer: RegionWriter,
    *,
    batch_size: int | None = None,
    precision: Precision = "fp32",
    probs: bool | None = None,
    progress: Progress | None = None,
    limit: int | None = None,
    boxes: BoxSource | None = None,
    keep_detected: bool = False,
    workers: int | None = None,
    is_mine: Callable[[str], bool] = lambda image_id: True,
    existing: Container[str] = frozenset(),
) -> ExtractionReport:
    """Write the regions of every image under its id, a path's being its file stem; images that the writer holds are
    skipped.

    Only images of equal scaled size share a batch, so that the features of an image do not depend on the others in it.
    Every batch is committed: an interruption costs no more than one. The detector is put into evaluation mode and runs
    where its weights are.

    Args:
        images: image files (`image_files.list_images`), or a folder that is searched with all its subfolders.
        batch_size: images per step; None = as many as have some million pixels at the size that the detector reads.
        probs: whether to keep the class distribution of every region, background last; None = if the detector has at
            most 100 classes.
        limit: stop after this many images, existing and unreadable ones included.
        boxes: where features are taken, in place of the detector's own regions and in the given order. Images that are
            not listed are left out; one that is listed without a box has no region.
        keep_detected: put the given boxes behind the detected regions.
        workers: threads that decode and scale; None = as suits the device.
        is_mine: which images this process takes; the report counts only those, but for `unlisted`.
        existing: images that are stored elsewhere and skipped, too.
    Raises:
        DataError: two images share an id, the folder holds no image, or the list is empty; none of the images is listed
            with boxes, or one of them has another size than its boxes were drawn on.
    """
    files = as_images(find_images(images) if isinstance(images, Path) else images)
    check_ids(files)
    files = files[:limit]
    given = None if boxes is None else _Boxes(boxes, files)
    unlisted = 0
    if given is not None:
        unlisted = len(files) - len(given.listed)
        files = given.listed
    files = [image for image in files if is_mine(image.id)]
    rest = [image for image in files if image.id not in writer and image.id not in existing]
    keep_probs = len(detector.class_names) <= FEW_CLASSES if probs is None else probs
    detector.eval()
    batches = ImageBatches(
        rest, detector.scale, batch_size=batch_size, workers=workers, device=detector.device.type
    )  # fmt: skip
    done = regions = without = 0
    waiting = network = writing = 0.0
    start = last = time.perf_counter()
    for batch in batches:
        got = time.perf_counter()
        found = _run_detector(detector, batch, given, keep_detected=keep_detected, precision=precision)
        detected = time.perf_counter()
        for loaded, own in zip(batch, found, strict=True):
            writer.add(loaded.image.id, own if keep_probs else dataclasses.replace(own, probs=None))
            regions += len(own)
            without += not len(own)
        writer.commit()
        done += len(batch)
        if progress is not None:
            progress(len(files) - len(rest) + done + len(batches.unreadable), len(files))
        written = time.perf_counter()
        waiting, network, writing = waiting + got - last, network + detected - got, writing + written - detected
        last = written
    end = time.perf_counter()
    if progress is not None:
        progress(len(files), len(files))
    return ExtractionReport(
        done=done,
        skipped_existing=len(files) - len(rest),
        unreadable=tuple(batches.unreadable),
        regions=regions,
        without_regions=without,
        unlisted=unlisted,
        clipped=0 if given is None else given.clipped,
        empty=0 if given is None else given.empty,
        first_of_several=batches.first_of_several,
        timings=Timings(
            elapsed=end - start,
            total=end - start,
            waiting=waiting + end - last,
            network=network,
            writing=writing,
            reading=batches.reading,
            scaling=batches.scaling,
        ),
    )


def _run_detector(
    detector: RegionDetector,
    batch: list[LoadedImage],
    given: _Boxes | None,
    *,
    keep_detected: bool,
    precision: Precision,
) -> list[RegionArray]:
    """Regions of a batch: detected, at given boxes, or both."""
    images = [loaded.scaled for loaded in batch]
    if given is None:
        return detector.detect_scaled(images, precision=precision)
    found = detector.regions_at_scaled(images, [given.take(one) for one in batch], precision=precision)
    if keep_detected:
        found = list(map(RegionArray.join, detector.detect_scaled(images, precision=precision), found))
    return found


class _Boxes:
    """Given boxes of the listed ones among images, cut to their images; counts what was cut or left out."""

    def __init__(self, source: BoxSource, images: list[ImageFile]) -> None:
        self._source = source
        self.listed = [image for image in images if source.find(image.id) is not None]
        if not self.listed:
            raise DataError(
                f"none of the {len(images)} images has boxes, not even {images[0]}. Images are found by their file "
                "name, or the number that it ends in: give the annotations of these images."
            )
        self.clipped = self.empty = 0

    def take(self, loaded: LoadedImage) -> NDArray[np.float32]:
        """Pixel corners (N, 4) of an image."""
        found = self._source.find(loaded.image.id)
        assert found is not None
        (boxes, size), own = found, loaded.scaled.size
        if size is not None and size != own:
            raise DataError(
                f"{loaded.image} has {own[0]} x {own[1]} pixels, but its boxes were drawn on {size[0]} x {size[1]}. "
                "Give the pictures that were annotated, not scaled copies."
            )
        within = boxes.clip(0, np.array([*own, *own], np.float32))
        kept = (within[:, 2:] > within[:, :2]).all(1)
        self.clipped += int((within != boxes).any(1)[kept].sum())
        self.empty += int((~kept).sum())
        return within[kept]
