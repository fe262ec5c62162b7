"""Annotated images as batches for the detector."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from visling import runtime
from visling.data.annotations.instances import InstanceRecord, Instances
from visling.errors import ConfigError, DataError, nearest
from visling.train.layout import fit_layout
from visling.types import IGNORE
from visling.vision.images import read_image
from visling.vision.region_detector import RegionDetector, ScaledImage
from visling.vision.trainable import Truth

_T = TypeVar("_T")
_R = TypeVar("_R")

Picture = NDArray[np.uint8]
"""(H, W, 3) RGB pixels."""

_BATCHES_SORTED_TOGETHER = 16
_BATCHES_LOADED_AHEAD = 2


class Samples:
    """Annotated images: read, scaled for a detector, and kept in memory while there is room."""

    def __init__(self, folder: Path, instances: Instances, detector: RegionDetector, *, cache_bytes: int) -> None:
        self.folder, self.records = folder, instances.records
        self.unreadable: list[tuple[Path, str]] = []
        self._bad: set[int] = set()
        self._room = cache_bytes
        self._cache: dict[int, tuple[ScaledImage, Truth]] = {}
        self._scale = detector.scale
        self._classes = {name: number for number, name in enumerate(detector.class_names)}
        self._attributes = {name: number for number, name in enumerate(detector.attribute_names)}
        self.shapes = np.array([1.0 if one.size is None else one.size[1] / one.size[0] for one in self.records])
        """Heights over widths as annotated; 1 where they are not known."""

    def __len__(self) -> int:
        return len(self.records)

    def check(self) -> None:
        """Raise `DataError` unless there are images and the detector knows all names."""
        if not self.records:
            raise DataError("the annotations list no image: there is nothing to train on or to score.")
        if not any((self.folder / record.file_name).is_file() for record in self.records):
            raise DataError(
                f"none of the {len(self.records)} annotated images is in {self.folder}; the first should be "
                f"{self.records[0].file_name}."
            )
        for record in self.records:
            for name in record.categories:
                if name not in self._classes:
                    raise DataError(
                        f"image {record.id} has an object of class {name!r}, unknown to the detector. "
                        f"{nearest(name, self._classes)}"
                    )
            for name in (name for names in record.attributes for name in names or ()):
                if self._attributes and name not in self._attributes:
                    raise DataError(
                        f"image {record.id} has attribute {name!r}, unknown to the detector. "
                        f"{nearest(name, self._attributes)}"
                    )

    def refuse(self) -> NoReturn:
        """Raise the `DataError` of a folder in which hardly any image can be read."""
        readable = sum(self.original(index) is not None for index in range(len(self)))
        raise DataError(
            f"{f'only {readable}' if readable else 'none'} of the {len(self)} images in {self.folder} can be read; the "
            f"first that cannot: {self.unreadable[0][1]}"
        )

    def original(self, index: int) -> tuple[Picture, Truth] | None:
        """Pixels and objects of one image; None if it cannot be used, which `unreadable` records."""
        record = self.records[index]
        if index in self._bad:
            return None
        path = self.folder / record.file_name
        try:
            picture = read_image(path)
            size = (picture.shape[1], picture.shape[0])
            if record.size is not None and record.size != size:
                raise DataError(
                    f"{path} is {size[0]} x {size[1]} pixels, but annotated as {record.size[0]} x {record.size[1]}."
                )
        except DataError as error:
            self._bad.add(index)
            self.unreadable.append((path, str(error)))
            return None
        return picture, self._build_truth(record)

    def classes(self, index: int) -> NDArray[np.int64]:
        """Class numbers of one image's objects, crowds included."""
        return np.array([self._classes[name] for name in self.records[index].categories], np.int64)

    def scaled(self, index: int) -> tuple[ScaledImage, Truth] | None:
        """One image as the detector reads it, with its objects; None if it cannot be used."""
        if index in self._cache:
            return self._cache[index]
        sample = self.original(index)
        if sample is None:
            return None
        picture, truth = sample
        small = self._scale(picture)
        if small.pixels.nbytes <= self._room:
            self._room -= small.pixels.nbytes
            self._cache[index] = small, truth
        return small, truth

    def _build_truth(self, record: InstanceRecord) -> Truth:
        attributes = np.zeros((len(record.categories), len(self._attributes)), np.bool_)
        for row, names in enumerate(record.attributes):
            attributes[row, [self._attributes[name] for name in names or () if self._attributes]] = True
        numbers = np.array([self._classes[name] for name in record.categories], np.int64)
        return Truth(
            boxes=record.boxes,
            classes=np.where(np.array(record.crowd, np.bool_), IGNORE, numbers),
            attributes=attributes,
            has_attributes=np.array([names is not None for names in record.attributes], np.bool_),
        )


def mirror(image: ScaledImage, truth: Truth) -> tuple[ScaledImage, Truth]:
    """An image with its boxes, left and right exchanged."""
    width = image.size[0]
    boxes = truth.boxes[:, [2, 1, 0, 3]] * np.array([-1, 1, -1, 1], np.float32) + np.array(
        [width, 0, width, 0], np.float32
    )
    mirrored = replace(image, pixels=np.ascontiguousarray(image.pixels[:, ::-1]))
    return mirrored, replace(truth, boxes=boxes)


class DetectionBatches:
    """Epochs of (images, truths) pairs for `train.engine.fit`, in an order that depends on (seed, epoch) alone.

    Images of similar shape are batched together, so that little is padded; a thread loads them ahead. Unreadable images
    are left out. A batch without any image left is skipped, and the epoch repeats its first batches at the end, so that
    all processes read the same number of batches.

    Args:
        batch_size: images per batch and process; fewer if there are fewer images.
        accumulation: batches per update.
        flip_rate: probability that an image is mirrored.
        started_by: number of processes that started the run, whose global batches these processes share; None = it
            starts with these.
        rank, world_size: this process's share; None asks the process group.
    Raises:
        ConfigError: fewer images than processes.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        seed: int,
        accumulation: int = 1,
        flip_rate: float = 0.0,
        started_by: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.samples, self.seed, self.flip_rate = samples, seed, flip_rate
        self.rank = runtime.rank() if rank is None else rank
        self.world_size = runtime.world_size() if world_size is None else world_size
        started_by = started_by or self.world_size
        if len(samples) < started_by * accumulation:
            raise ConfigError(
                f"{len(samples)} images for {started_by} processes and {accumulation} batches per update: each needs "
                "one. Use fewer processes, or less accumulation."
            )
        asked = {"images": min(batch_size, len(samples) // (started_by * accumulation))}
        sizes, self.accumulation = fit_layout(asked, accumulation, started_by, self.world_size)
        self.batch_size = sizes["images"]
        self._epoch = self._next = self._count = 0

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration reads."""
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch, self._next, self._count = value, 0, 0

    def __len__(self) -> int:
        """Batches of an epoch in this process."""
        return len(self.samples) // self.global_size * self.accumulation

    @property
    def global_size(self) -> int:
        """Images of an update."""
        return self.batch_size * self.world_size * self.accumulation

    def __iter__(self) -> Iterator[tuple[list[ScaledImage], list[Truth]]]:
        groups = self._group_images()
        with ThreadPoolExecutor(1) as pool:
            while self._count < len(self):
                start, count = self._next, self._count
                for number, pairs in load_ahead(pool, range(start, len(groups)), lambda at: self._load(groups[at])):
                    self._next = number + 1
                    if pairs:
                        self._count += 1
                        yield [image for image, _ in pairs], [truth for _, truth in pairs]
                    if self._count == len(self):
                        return
                if start == 0 and self._count == count:
                    self.samples.refuse()
                self._next = 0

    def state_dict(self) -> dict[str, Any]:
        """Position: the next batch of the epoch, how many were handed out and how many make an update, and what the
        order depends on."""
        position = {"next": self._next, "batches": self._count, "accumulation": self.accumulation}
        return {"epoch": self._epoch, **position, **self._describe_order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to the position of a `state_dict`: the next iteration begins with the batch that would have come next.
        A position between two updates is also one of other processes.

        Raises:
            ConfigError: the state belongs to another seed, number of images or of images per update.
        """
        for name, value in self._describe_order().items():
            if state.get(name) != value:
                raise ConfigError(
                    f"cannot resume the images: {name} was {state.get(name)!r}, now it is {value!r}. "
                    "Resume with the same data and settings, or start a new run."
                )
        self._epoch = int(state["epoch"])
        self._next, self._count = (
            int(state[name]) * self.accumulation // int(state["accumulation"]) for name in ("next", "batches")
        )

    def _describe_order(self) -> dict[str, int]:
        return {"seed": self.seed, "images": len(self.samples), "global_batch": self.global_size}

    def _group_images(self) -> list[list[int]]:
        """The epoch's image numbers, this process's shares of each global batch."""
        order = runtime.generator_for(self.seed, self._epoch).permutation(len(self.samples))
        size, stride = self.global_size, self.world_size * self.accumulation
        chunk = _BATCHES_SORTED_TOGETHER * size
        shapes = self.samples.shapes
        order = np.concatenate(
            [part[shapes[part].argsort(kind="stable")] for part in np.split(order, range(chunk, len(order), chunk))]
        )
        starts = range(0, len(order) - size + 1, size)
        shares = range(self.rank, stride, self.world_size)
        return [order[start : start + size][share::stride].tolist() for start in starts for share in shares]

    def _load(self, indices: list[int]) -> list[tuple[ScaledImage, Truth]]:
        """The readable images of a batch, some of them mirrored."""
        loaded = []
        for index in indices:
            sample = self.samples.scaled(index)
            if sample is not None:
                rate = self.flip_rate
                flips = rate > 0 and runtime.generator_for(self.seed, self._epoch, index).random() < rate
                loaded.append(mirror(*sample) if flips else sample)
        return loaded


def load_ahead(pool: ThreadPoolExecutor, items: Iterable[_T], load: Callable[[_T], _R]) -> Iterator[tuple[_T, _R]]:
    """Each item with what `load` returns for it; the pool's threads load the next ones meanwhile."""
    waiting: deque[tuple[_T, Future[_R]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(load, item)))
        if len(waiting) > _BATCHES_LOADED_AHEAD:
            ready, future = waiting.popleft()
            yield ready, future.result()
    for ready, future in waiting:
        yield ready, future.result()
