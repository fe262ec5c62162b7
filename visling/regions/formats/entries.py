"""One image as a file holds it: fields by name, which are arrays or base64 text of little-endian numbers.

A layout says how it spells the fields (`FieldNames`); what is common to all is here: counts that must agree, widths,
sizes as text or numbers, and the column of the background.

Letters  R regions of an image, F feature width, C classes without the background.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from visling.errors import DataError
from visling.regions.formats.base import damaged_file
from visling.regions.formats.base64_arrays import decode_bytes
from visling.types import RegionArray

LONGEST_COUNT = 18
"""Digits of the largest count or side of an image that is read as one."""
UNKNOWN_SIZE = (1, 1)
"""Width and height of an image of which neither size nor boxes are known."""
_CLASSES = 1600
"""Classes of the Visual Genome detectors, without the background."""


@dataclass(frozen=True, kw_only=True)
class FieldNames:
    """How a layout spells the fields of an image; of several spellings the first that an image has is read."""

    features: str = "features"
    boxes: str = "boxes"
    """Pixel corners."""
    size: tuple[str, str] | None = None
    """Width and height in pixels; None if the layout does not hold them."""
    number: str | None = None
    """Number of regions. It is compared where it is text, as in a row of a TSV file: as a number it comes from MMF's
    extraction, which counts the regions whose suppressed score is not zero."""
    classes: tuple[str, ...] = ()
    class_confidence: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    attribute_confidence: tuple[str, ...] = ()
    probs: str | None = None
    background: Literal["first", "absent"] = "first"
    """Column of the background in `probs`, unless there are 1,600 or 1,601 columns, which say it; where it was removed,
    its probability is what the others leave of 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The fields of one image; what cannot be decoded is a `DataError` that says where."""

    path: Path
    where: str
    """Place in the file for messages, such as "entry 42"."""
    fields: Mapping[str, Any]

    def damaged(self, what: str) -> DataError:
        return damaged_file(self.path, self.where, what)

    def find(self, *names: str) -> str | None:
        """The first of several names that the image has a value for."""
        return next((name for name in names if self.fields.get(name) is not None), None)

    def read_text(self, name: str) -> str:
        """A value as text; numbers in decimal."""
        value = self._read_scalar(name)
        try:
            text = (value.decode("utf-8") if isinstance(value, bytes) else str(value)).strip()
        except UnicodeDecodeError as error:
            raise self.damaged(f"has a field {name} that is not text ({error})") from error
        if not text:
            raise self.damaged(f"has an empty field {name}")
        return text

    def read_count(self, name: str) -> int:
        """A whole number, stored as number or as text."""
        text = self.read_text(name).removesuffix(".0")
        if not text.isdecimal() or len(text) > LONGEST_COUNT:
            raise self.damaged(f"has {text[:40]!r} in the field {name}; expected a whole number")
        return int(text)

    def read_rows(self, name: str, count: int | None, width: int | None = None) -> NDArray[Any]:
        """(R, width) numbers.

        Args:
            count: R; None = whatever the field holds, for a known width.
            width: None = whatever the field holds, for a known R.
        """
        rows = self._read_numbers(name, "<f4", "fiu")
        if rows.ndim == 1:  # base64 has no shape
            expected = (-1 if count is None else count, -1 if width is None else width)
            if count == 0 and width is None:
                expected = (0, 0)
            try:
                rows = rows.reshape(expected)
            except ValueError as error:
                raise self.damaged(
                    f"holds {rows.size} numbers of {name} for "
                    f"{'an unknown number of' if count is None else count} regions"
                    + ("" if width is None else f" of width {width}")
                ) from error
        if rows.ndim != 2 or count not in (None, len(rows)) or width not in (None, rows.shape[1]):
            raise self.damaged(
                f"has {name} of shape {rows.shape}; expected "
                f"({'R' if count is None else count}, {'any width' if width is None else width})"
            )
        return rows

    def read_labels(self, name: str, dtype: Literal["<i8", "<f4"], count: int) -> NDArray[Any]:
        """(R,) numbers, one per region."""
        labels = self._read_numbers(name, dtype, "iu" if dtype == "<i8" else "f")
        if labels.shape != (count,):
            raise self.damaged(f"has {name} of shape {labels.shape}; expected ({count},), one per region")
        return labels

    def _read_value(self, name: str) -> Any:
        value = self.fields.get(name)
        if value is None:
            present = ", ".join(sorted(str(name) for name in self.fields if self.fields[name] is not None))
            raise self.damaged(f"lacks the field {name}; it has {present or 'none'}")
        return value

    def _read_scalar(self, name: str) -> Any:
        value = self._read_value(name)
        if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
            value = value.item()
        if not isinstance(value, str | bytes | int | float):
            raise self.damaged(f"has a field {name} of type {type(value).__name__}; expected text or a number")
        return value

    def _read_numbers(self, name: str, dtype: str, kinds: str) -> NDArray[Any]:
        """An array as it is stored, or the flat one that base64 text holds."""
        value = self._read_value(name)
        if isinstance(value, str | bytes):
            try:
                content = decode_bytes(name, value)
            except ValueError as error:
                raise self.damaged(str(error)) from error
            if len(content) % np.dtype(dtype).itemsize:
                raise self.damaged(f"holds {len(content)} bytes of {name}, not a whole number of {np.dtype(dtype)}")
            return np.frombuffer(content, dtype)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            found = value.dtype.name if isinstance(value, np.ndarray) else type(value).__name__
            raise self.damaged(f"has a field {name} of type {found}; expected an array of numbers")
        return np.asarray(value)


def build_regions(entry: Entry, names: FieldNames, feature_size: int | None, *, has_boxes: bool = True) -> RegionArray:
    """The regions of an image.

    Args:
        feature_size: F of the file; None = it is what this image has.
        has_boxes: whether the images of the file have boxes; without them every region is the whole image.
    Raises:
        DataError: a field is missing, cannot be decoded, or has another length or width than the others.
    """
    if has_boxes:
        boxes = entry.read_rows(names.boxes, None, 4).astype(np.float32)
        features = entry.read_rows(names.features, len(boxes))
    else:
        if entry.find(names.boxes):
            raise entry.damaged(f"has {names.boxes}, unlike the first image: is this two layouts in one place?")
        features = _read_features(entry, names.features)
        boxes = None
    count = len(features)
    if not count and not features.shape[1]:
        features = features.reshape(0, feature_size or 0)
    if feature_size not in (None, features.shape[1]):
        raise entry.damaged(f"has features of width {features.shape[1]}; the first image has {feature_size}")
    if names.number and isinstance(entry.fields.get(names.number), str | bytes):
        number = entry.read_count(names.number)
        if number != count:
            raise entry.damaged(f"says that it has {number} regions, and has {count}")
    size = _read_size(entry, names, boxes)
    if boxes is None:
        boxes = np.tile(np.array([0, 0, *size], np.float32), (count, 1))
    labels = _read_labels(entry, names, count)
    return RegionArray(features=features, boxes=boxes, size=size, **labels)


def list_notes(names: FieldNames, *, has_boxes: bool, has_sizes: bool) -> tuple[str, ...]:
    """What is computed because a layout lacks it (`RegionReader.notes`)."""
    notes = []
    if has_boxes and not has_sizes:
        notes.append("the size of an image is that of the smallest image that holds all of its boxes")
    if names.probs is not None and names.background == "absent":
        notes.append("the probability of the background is what those of the classes leave of 1")
    return tuple(notes)


def _read_features(entry: Entry, name: str) -> NDArray[Any]:
    """(R, F) features of an image without boxes: only an array says how many they are."""
    features = entry.fields.get(name)
    count = len(features) if isinstance(features, np.ndarray) and features.ndim == 2 else None
    return entry.read_rows(name, count, None)


def _read_size(entry: Entry, names: FieldNames, boxes: NDArray[np.float32] | None) -> tuple[int, int]:
    """Width and height of the image; if they are unknown, those of the smallest image that holds all boxes."""
    if names.size is not None and entry.find(*names.size):
        return entry.read_count(names.size[0]), entry.read_count(names.size[1])
    if names.size is not None and boxes is not None:
        raise entry.damaged(f"lacks the size of the image ({', '.join(names.size)})")
    if boxes is None or not len(boxes):
        return UNKNOWN_SIZE
    if not np.isfinite(boxes).all():
        raise entry.damaged(f"has {names.boxes} with numbers that are not finite")
    width, height = (max(1, math.ceil(corner)) for corner in boxes[:, 2:].max(axis=0))
    return width, height


def _read_labels(entry: Entry, names: FieldNames, count: int) -> dict[str, NDArray[Any]]:
    """Classes, attributes and class distributions, as far as the image has them."""
    found: dict[str, NDArray[Any]] = {}
    given = entry.fields.get(names.probs) if names.probs else None
    counted = False
    if names.probs and isinstance(given, np.ndarray) and given.ndim == 1:
        # MMF's script for the Faster R-CNN of transformers: the probability of the best class alone.
        found["class_confidence"] = entry.read_labels(names.probs, "<f4", count)
    elif names.probs and given is not None:
        rows = entry.read_rows(names.probs, count)
        # Of Visual Genome's classes the width says it. MMF's switch --background keeps the background as class 0, also
        # in `objects`; VOLTA's LMDBs of MMF's features lack it, unlike its others.
        whole = rows.shape[1] == _CLASSES + 1 or (names.background == "first" and rows.shape[1] != _CLASSES)
        counted = whole and names.background == "absent"
        if whole:
            found["probs"] = np.roll(rows, -1, axis=1)
        else:
            rest = np.clip(1 - rows.sum(axis=1, keepdims=True), 0, 1)
            found["probs"] = np.concatenate([rows, rest], axis=1)
    if name := entry.find(*names.classes):
        classes = entry.fields[name]
        # ViLBERT's script for several tasks drops a region from `objects` where it means to drop the background.
        lacking = isinstance(classes, np.ndarray) and classes.shape == (max(count - 1, 0),) and count > 0
        if "probs" in found and (lacking or counted):
            found["classes"] = found["probs"][:, :-1].argmax(axis=1)
        else:
            found["classes"] = entry.read_labels(name, "<i8", count)
    for field, spellings, dtype in (
        ("class_confidence", names.class_confidence, "<f4"),
        ("attributes", names.attributes, "<i8"),
        ("attribute_confidence", names.attribute_confidence, "<f4"),
    ):
        if name := entry.find(*spellings):
            found[field] = entry.read_labels(name, dtype, count)  # type: ignore[arg-type]
    return found
