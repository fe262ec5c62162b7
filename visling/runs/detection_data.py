"""Images with boxes as batches for the detector."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visling import runtime
from visling.data.annotations.instances import InstanceRecord, Instances
from visling.errors import DataError, nearest
from visling.recipes.detectors import DetectConfig
from visling.train.state import State
from visling.types import IGNORE
from visling.vision.detector import DetectorConfig, Truth
from visling.vision.images import fit, read_image

Picture = NDArray[np.uint8]
"""(H, W, 3) RGB pixels."""


Batch = tuple[int, int, list[int]]
"""Epoch, number in the epoch, sample numbers."""


class Samples:
    """Annotated images: read, scaled and kept in memory while there is room."""

    def __init__(self, folder: Path, instances: Instances, config: DetectorConfig, *, cache_bytes: int) -> None:
        self.folder, self.records, self.config = folder, instances.records, config
        self.unreadable: list[tuple[Path, str]] = []
        self._bad: set[int] = set()
        self._room = cache_bytes
        self._cache: dict[int, tuple[Picture, Truth]] = {}
        self._classes = {name: number for number, name in enumerate(config.class_names)}
        self._attributes = {name: number for number, name in enumerate(config.attribute_names)}

    def __len__(self) -> int:
        return len(self.records)

    def check(self) -> None:
        """Raise `DataError` unless there are images and all names are the detector's."""
        if not self.records:
            raise DataError("the annotations list no image: there is nothing to learn or to score.")
        if not any((self.folder / record.file_name).is_file() for record in self.records):
            raise DataError(
                f"none of the {len(self.records)} annotated images is in {self.folder}; the first should be {self.records[0].file_name}."
            )
        for record in self.records:
            for name in record.categories:
                if name not in self._classes:
                    raise DataError(
                        f"image {record.id} has an object of class {name!r}, unknown to the detector. {nearest(name, self._classes)}"
                    )
            for name in (name for names in record.attributes for name in names or ()):
                if self._attributes and name not in self._attributes:
                    raise DataError(
                        f"image {record.id} has attribute {name!r}, unknown to the detector. {nearest(name, self._attributes)}"
                    )

    def original(self, index: int) -> tuple[Picture, Truth] | None:
        """Pixels and objects of one image; None if it cannot be used, which is noted."""
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
        return picture, self._truth(record)

    def classes(self, index: int) -> NDArray[np.int64]:
        """Class numbers of one image's objects, crowds included."""
        return np.array([self._classes[name] for name in self.records[index].categories], np.int64)

    def load(self, batch: Batch, seed: int, flip_rate: float) -> list[tuple[Picture, Truth]]:
        """The usable samples of a batch, scaled to the detector's input."""
        epoch, _, indices = batch
        loaded = []
        for index in indices:
            sample = self._scaled(index)
            if sample is not None:
                mirror = flip_rate > 0 and runtime.generator_for(seed, epoch, index).random() < flip_rate
                loaded.append(_mirrored(*sample) if mirror else sample)
        return loaded

    def batches(self, seed: int, state: State, training: DetectConfig) -> Iterator[Batch]:
        """Batches without end, from where the state stands; images of similar shape come together, so that little is
        padded."""
        count = min(training.batch_size, len(self))
        shapes = np.array([1.0 if record.size is None else record.size[1] / record.size[0] for record in self.records])
        epoch, skip = state.epoch, state.batch
        while True:
            rng = runtime.generator_for(seed, epoch)
            order = rng.permutation(len(self))
            pool = 16 * count
            order = np.concatenate(
                [part[shapes[part].argsort(kind="stable")] for part in np.split(order, range(pool, len(self), pool))]
            )
            groups = [order[start : start + count].tolist() for start in range(0, len(self) - count + 1, count)]
            for number in range(skip, len(groups)):
                yield epoch, number, groups[number]
            epoch, skip = epoch + 1, 0
            if len(self._bad) == len(self):
                raise DataError(
                    f"none of the {len(self)} images in {self.folder} can be read; the first: {self.unreadable[0][1]}"
                )

    def _scaled(self, index: int) -> tuple[Picture, Truth] | None:
        if index in self._cache:
            return self._cache[index]
        sample = self.original(index)
        if sample is None:
            return None
        picture, truth = sample
        small = fit(picture, self.config.long_side)
        factor = np.array([small.shape[1] / picture.shape[1], small.shape[0] / picture.shape[0]] * 2, np.float32)
        sample = small, replace(truth, boxes=truth.boxes * factor)
        if small.nbytes <= self._room:
            self._room -= small.nbytes
            self._cache[index] = sample
        return sample

    def _truth(self, record: InstanceRecord) -> Truth:
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


def _mirrored(picture: Picture, truth: Truth) -> tuple[Picture, Truth]:
    width = picture.shape[1]
    boxes = truth.boxes[:, [2, 1, 0, 3]] * np.array([-1, 1, -1, 1], np.float32) + np.array(
        [width, 0, width, 0], np.float32
    )
    return np.ascontiguousarray(picture[:, ::-1]), replace(truth, boxes=boxes)
