"""Images -> regions -> store: resumable, and not stopped by damaged files."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from visling.errors import DataError
from visling.runtime import Precision
from visling.types import RegionArray
from visling.vision.images import SUFFIXES, read_image
from visling.vision.region_detector import RegionDetector

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""

FEW_CLASSES = 100
"""Up to this many classes, class distributions are small compared with the features and are kept by default."""

_READERS = 2
"""Decoding threads; Pillow releases the interpreter lock while it decodes."""

_COMMIT_EVERY = 512
"""Images between two commits: the most that an interruption costs."""

_AHEAD = 4
"""Batches' worth of images that are decoded ahead, and that wait for others of their size."""


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
class ExtractionReport:
    """What became of the images."""

    done: int
    """Images whose regions were written."""
    skipped_existing: int
    """Images that the store already held."""
    unreadable: tuple[tuple[Path, str], ...]
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


def find_images(folder: Path) -> list[Path]:
    """All files below a folder whose names end like images, sorted.

    Raises:
        DataError: the folder does not exist or holds none.
    """
    if not folder.is_dir():
        raise DataError(f"no image folder {folder}. Check the path.")
    # os.walk, unlike Path.rglob in Python 3.11 and 3.12, follows links to folders; data sets on shared disks often have
    # them.
    files = sorted(
        Path(base) / name
        for base, _, names in os.walk(folder, followlinks=True)
        for name in names
        if is_image_name(name)
    )
    if not files:
        raise DataError(f"no image in {folder} or below it; image names end in {', '.join(sorted(SUFFIXES))}.")
    return files


def list_images(places: Iterable[Path]) -> list[Path]:
    """Image files, and those below folders, in the order given.

    Raises:
        DataError: a folder holds no image, a place does not exist, none was given, or two files share a stem.
    """
    paths = [path for place in places for path in ([place] if place.is_file() else find_images(place))]
    _check_stems(paths)
    return paths


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image; hidden files do not count."""
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def extract(
    images: Iterable[Path] | Path,
    detector: RegionDetector,
    writer: RegionWriter,
    *,
    batch_size: int = 32,
    precision: Precision = "fp32",
    probs: bool | None = None,
    progress: Progress | None = None,
    limit: int | None = None,
    boxes: BoxSource | None = None,
    keep_detected: bool = False,
) -> ExtractionReport:
    """Write the regions of every image under its file stem; images that the writer holds are skipped.

    Only images of equal size share a batch, so that the features of an image do not depend on the others in it. The
    detector is put into evaluation mode and runs where its weights are.

    Args:
        images: files, or a folder that is searched with all its subfolders.
        probs: whether to keep the class distribution of every region, background last; None = if the detector has at
            most 100 classes.
        limit: stop after this many images, existing and unreadable ones included.
        boxes: where features are taken, in place of the detector's own regions and in the given order. Images that are
            not listed are left out; one that is listed without a box has no region.
        keep_detected: put the given boxes behind the detected regions.
    Raises:
        DataError: two files share a stem, the folder holds no image, or the list is empty; none of the images is listed
            with boxes, or one of them has another size than its boxes were drawn on.
    """
    paths = find_images(images) if isinstance(images, Path) else [Path(path) for path in images]
    _check_stems(paths)
    paths = paths[:limit]
    given = None if boxes is None else _Boxes(boxes, paths)
    unlisted = 0
    if given is not None:
        unlisted = len(paths) - len(given.listed)
        paths = given.listed
    waiting = [path for path in paths if path.stem not in writer]
    keep_probs = len(detector.class_names) <= FEW_CLASSES if probs is None else probs
    detector.eval()
    unreadable: list[tuple[Path, str]] = []
    done = regions = without = uncommitted = 0
    for batch in _group_by_size(waiting, batch_size, unreadable):
        pictures = [pixels for _, pixels in batch]
        if given is None:
            found = detector.detect(pictures, precision=precision)
        else:
            found = detector.regions_at(pictures, [given.take(*one) for one in batch], precision=precision)
            if keep_detected:
                found = list(map(_join_regions, detector.detect(pictures, precision=precision), found))
        for (path, _), detected in zip(batch, found, strict=True):
            writer.add(path.stem, detected if keep_probs else dataclasses.replace(detected, probs=None))
            regions += len(detected)
            without += not len(detected)
        done += len(batch)
        uncommitted += len(batch)
        if uncommitted >= _COMMIT_EVERY:
            writer.commit()
            uncommitted = 0
        if progress is not None:
            progress(len(paths) - len(waiting) + done + len(unreadable), len(paths))
    writer.commit()
    if progress is not None:
        progress(len(paths), len(paths))
    return ExtractionReport(
        done=done,
        skipped_existing=len(paths) - len(waiting),
        unreadable=tuple(unreadable),
        regions=regions,
        without_regions=without,
        unlisted=unlisted,
        clipped=0 if given is None else given.clipped,
        empty=0 if given is None else given.empty,
    )


class _Boxes:
    """Given boxes of the listed images among `paths`, cut to their images; counts what was cut or left out."""

    def __init__(self, source: BoxSource, paths: list[Path]) -> None:
        self._source = source
        self.listed = [path for path in paths if source.find(path.stem) is not None]
        if not self.listed:
            raise DataError(
                f"none of the {len(paths)} images has boxes, not even {paths[0].name}. Images are found by their file "
                "name, or the number that it ends in: give the annotations of these images."
            )
        self.clipped = self.empty = 0

    def take(self, path: Path, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixel corners (N, 4) of an image."""
        found = self._source.find(path.stem)
        assert found is not None
        (boxes, size), own = found, (picture.shape[1], picture.shape[0])
        if size is not None and size != own:
            raise DataError(
                f"{path} has {own[0]} x {own[1]} pixels, but its boxes were drawn on {size[0]} x {size[1]}. "
                "Give the pictures that were annotated, not scaled copies."
            )
        within = boxes.clip(0, np.array([*own, *own], np.float32))
        kept = (within[:, 2:] > within[:, :2]).all(1)
        self.clipped += int((within != boxes).any(1)[kept].sum())
        self.empty += int((~kept).sum())
        return within[kept]


def _join_regions(first: RegionArray, second: RegionArray) -> RegionArray:
    """The regions of two arrays of one image, one after the other."""
    arrays: dict[str, Any] = {
        field.name: np.concatenate([value, getattr(second, field.name)])
        for field in dataclasses.fields(first)
        if isinstance(value := getattr(first, field.name), np.ndarray)
    }
    return dataclasses.replace(first, **arrays)


def _check_stems(paths: list[Path]) -> None:
    if not paths:
        raise DataError("no image was given to extract regions from.")
    repeated = [stem for stem, count in Counter(path.stem for path in paths).items() if count > 1]
    if repeated:
        first, second = [path for path in paths if path.stem == repeated[0]][:2]
        raise DataError(
            f"{len(repeated)} image names occur more than once, for example {first} and {second}. Regions are stored "
            "under the file name without folder and suffix: rename the files, or extract the folders into separate "
            "stores."
        )


def _group_by_size(
    paths: list[Path], batch_size: int, unreadable: list[tuple[Path, str]]
) -> Iterator[list[tuple[Path, NDArray[np.uint8]]]]:
    """Batches of images of equal size; unreadable files are appended to the list.

    Images of rare sizes wait for others of their size, but never more than a few batches' worth of images wait in all.
    """
    groups: dict[tuple[int, ...], list[tuple[Path, NDArray[np.uint8]]]] = {}
    for path, pixels in _decode_ahead(paths, _AHEAD * batch_size):
        if isinstance(pixels, str):
            unreadable.append((path, pixels))
            continue
        group = groups.setdefault(pixels.shape, [])
        group.append((path, pixels))
        if len(group) == batch_size:
            yield groups.pop(pixels.shape)
        elif sum(map(len, groups.values())) > _AHEAD * batch_size:
            yield groups.pop(max(groups, key=lambda shape: len(groups[shape])))
    yield from groups.values()


def _decode_ahead(paths: list[Path], ahead: int) -> Iterator[tuple[Path, NDArray[np.uint8] | str]]:
    """Each file in order with its pixels, or with the reason why it has none; background threads decode ahead."""
    with ThreadPoolExecutor(_READERS) as pool:
        rest = iter(paths)
        running: deque[tuple[Path, Future[NDArray[np.uint8] | str]]] = deque()
        try:
            while True:
                while len(running) < ahead and (path := next(rest, None)) is not None:
                    running.append((path, pool.submit(_try_read, path)))
                if not running:
                    return
                path, future = running.popleft()
                yield path, future.result()
        finally:
            for _, future in running:
                future.cancel()


def _try_read(path: Path) -> NDArray[np.uint8] | str:
    try:
        return read_image(path)
    except DataError as error:
        return str(error)
