"""Region features as tab-separated text: one image a line, no header, arrays as base64 of little-endian numbers.

Layouts  Told apart by the number of columns, which also says whether width or height comes first.
         bottom-up-attention  image id, width, height, number of boxes, boxes, features
         lxmert-obj36         image id, height, width, class ids, class confidences, attribute ids, attribute confidences, number of boxes, boxes,
                              features
Sources  Bottom-up attention (Anderson et al. 2018) and LXMERT's release. Boxes are pixel corners of the original image.
Letters  R regions of an image, F feature width.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from visling.errors import BoxError, DataError
from visling.regions.writer import StoreWriter
from visling.types import RegionArray

OUTSIDE = 1.0
"""Pixels by which a box may leave its image: it is cut to the image. A box further out belongs to another image, or to
another layout."""

_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "bottom-up-attention": ("id", "width", "height", "number", "boxes", "features"),
    "lxmert-obj36": (
        "id", "height", "width", "classes", "class_confidence", "attributes", "attribute_confidence", "number", "boxes", "features",
    ),
}  # fmt: skip
_LABELS: Mapping[str, str] = {
    "classes": "<i8",
    "class_confidence": "<f4",
    "attributes": "<i8",
    "attribute_confidence": "<f4",
}
_MOST_LABELS = np.iinfo(np.int16).max
"""A store keeps ids in 16 bits."""
_COMMIT_EVERY = 256
"""Images between two points from which an interrupted import goes on."""


@dataclass(frozen=True, kw_only=True)
class TsvReport:
    """What an import did."""

    images: int
    """Written now."""
    regions: int
    """Of the images written now."""
    existing: int
    """Images that the store held before."""
    repeated: int
    """Lines left out because their image had come before; the first line of an image counts."""


class RegionTsv:
    """A file of region features, read from front to back.

    Raises:
        DataError: the file is missing, of another layout, or none of its lines has a region.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(
                f"no file {self.path} of region features. Check the path; released files come zipped: unpack them first."
            )
        first = next(self._lines(), None)
        if first is None:
            raise DataError(f"{self.path} is empty; expected one image a line.")
        count = first[1].count(b"\t") + 1
        self.layout = next((name for name, columns in _COLUMNS.items() if len(columns) == count), "")
        """Name of the layout."""
        if not self.layout:
            known = ", ".join(f"{len(columns)} ({name})" for name, columns in _COLUMNS.items())
            raise DataError(
                f"{self.path} has {count} tab-separated columns; expected {known}. Is it a file of region features?"
            )
        self.feature_size = self._width()
        """F, as the first image with a region has it."""

    def images(self, skip: Container[str] = ()) -> Iterator[tuple[str, RegionArray | None, int]]:
        """Image by image: its id, its regions, and how many bytes of the file have been read.

        Args:
            skip: images whose lines are not decoded; their regions are None.
        Raises:
            DataError: a line that was cut off or is not of the layout; says which.
            BoxError: a box outside its image.
        """
        for number, line, end in self._lines():
            fields = self._fields(number, line)
            name = self._text(number, fields, "id")
            yield name, None if name in skip else self._regions(number, name, fields), end

    def _lines(self) -> Iterator[tuple[int, bytes, int]]:
        """Number from 1, content and end of every line that is not blank."""
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                end += len(line)
                if line.strip():
                    yield number, line.rstrip(b"\r\n"), end

    def _fields(self, number: int, line: bytes) -> dict[str, bytes]:
        columns, found = _COLUMNS[self.layout], line.split(b"\t")
        if len(found) != len(columns):
            raise self._broken(number, f"has {len(found)} columns; expected {len(columns)} ({', '.join(columns)})")
        return dict(zip(columns, found, strict=True))

    def _width(self) -> int:
        for number, line, _ in self._lines():
            fields = self._fields(number, line)
            if regions := self._count(number, fields, "number"):
                size, rest = divmod(len(self._bytes(number, fields, "features")), 4 * regions)
                if rest or not size:
                    raise self._broken(
                        number,
                        f"holds {size * 4 * regions + rest} bytes of features for {regions} boxes, which is no whole width",
                    )
                return size
        raise DataError(f"{self.path} holds no region: every line has 0 boxes.")

    def _regions(self, number: int, name: str, fields: Mapping[str, bytes]) -> RegionArray:
        width, height = (self._count(number, fields, side) for side in ("width", "height"))
        count = self._count(number, fields, "number")
        boxes = self._array(number, fields, "boxes", "<f4", (count, 4))
        features = self._array(number, fields, "features", "<f4", (count, self.feature_size))
        labels = {
            label: self._array(number, fields, label, kind, (count,))
            for label, kind in _LABELS.items()
            if label in fields
        }
        for label in ("classes", "attributes"):
            if count and label in labels and not 0 <= labels[label].min() <= labels[label].max() <= _MOST_LABELS:
                raise self._broken(
                    number, f"has {label} from {labels[label].min()} to {labels[label].max()}; expected ids from 0 on"
                )
        return RegionArray(
            features=features, boxes=self._within(number, name, boxes, width, height), size=(width, height), **labels
        )

    def _within(
        self, number: int, name: str, boxes: NDArray[np.float32], width: int, height: int
    ) -> NDArray[np.float32]:
        """Boxes cut to the image."""
        limits = np.array([width, height, width, height], np.float32)
        out = np.maximum(boxes - limits, -boxes)
        if boxes.size and out.max() > OUTSIDE:
            raise BoxError(
                f"{self.path}, line {number}: a box of image {name!r} leaves the image of {width} x {height} by {out.max():.1f} pixels. "
                f"The layout {self.layout} has {' before '.join(side for side in _COLUMNS[self.layout] if side in ('width', 'height'))}: "
                "does the file have the columns the other way round?"
            )
        inside: NDArray[np.float32] = np.clip(boxes, 0, limits)
        return inside

    def _text(self, number: int, fields: Mapping[str, bytes], column: str) -> str:
        try:
            text = fields[column].decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise self._broken(number, f"has a column {column} that is not text ({error})") from error
        if not text:
            raise self._broken(number, f"has an empty column {column}")
        return text

    def _count(self, number: int, fields: Mapping[str, bytes], column: str) -> int:
        text = self._text(number, fields, column)
        if not text.isdecimal():
            raise self._broken(number, f"has {text[:40]!r} in the column {column}; expected a whole number")
        return int(text)

    def _bytes(self, number: int, fields: Mapping[str, bytes], column: str) -> bytes:
        try:
            return base64.b64decode(fields[column], validate=True)
        except binascii.Error as error:
            raise self._broken(number, f"has a column {column} that is not base64 ({error})") from error

    def _array(
        self, number: int, fields: Mapping[str, bytes], column: str, kind: str, shape: tuple[int, ...]
    ) -> NDArray[Any]:
        content, expected = self._bytes(number, fields, column), int(np.prod(shape)) * np.dtype(kind).itemsize
        if len(content) != expected:
            raise self._broken(
                number,
                f"holds {len(content)} bytes of {column}; expected {expected} ({' x '.join(map(str, shape))} of {np.dtype(kind).name})",
            )
        return np.frombuffer(content, kind).reshape(shape)

    def _broken(self, number: int, what: str) -> DataError:
        return DataError(
            f"{self.path}, line {number}, {what}. The file is truncated, damaged or of another layout: fetch it again."
        )


def import_regions(
    files: Sequence[str | Path],
    store: str | Path,
    *,
    fingerprint: str | None = None,
    class_names: Sequence[str] = (),
    attribute_names: Sequence[str] = (),
    dtype: Literal["float16", "float32"] = "float16",
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TsvReport:
    """Write the images of several files into one store; images that it holds are skipped.

    Args:
        fingerprint: identity of the detector, which the files do not say; the name of the layout if left out.
        resume: go on with an interrupted import, or add images to a store.
        progress: called with the bytes read so far and in all.
    Raises:
        DataError: a file is missing, of another layout or width than the first, a line is damaged, or a label has no
            name.
        BoxError: a box outside its image.
        StoreError: the folder holds a store already, or one of other features.
    """
    opened = [RegionTsv(file) for file in files]
    if not opened:
        raise DataError("no file of region features was given to import.")
    first = opened[0]
    for other in opened[1:]:
        for what, here, there in (
            ("the layout", first.layout, other.layout),
            ("features of width", first.feature_size, other.feature_size),
        ):
            if here != there:
                raise DataError(
                    f"{first.path} has {what} {here}, {other.path} {there}: one store holds features of one kind. Import them apart."
                )
    total, begun = sum(file.path.stat().st_size for file in opened), 0
    names = {"classes": class_names, "attributes": attribute_names}
    seen: set[str] = set()
    regions = existing = repeated = 0
    with StoreWriter(
        store,
        feature_size=first.feature_size,
        fingerprint=first.layout if fingerprint is None else fingerprint,
        class_names=class_names,
        attribute_names=attribute_names,
        dtype=dtype,
        settings={"layout": first.layout},
        resume=resume,
    ) as writer:
        before = len(writer)
        for file in opened:
            for name, found, end in file.images(skip=writer):
                if name in seen:
                    repeated += 1
                elif found is None:
                    existing += 1
                else:
                    _check_labels(file.path, name, found, names)
                    writer.add(name, found)
                    regions += len(found)
                    if (len(writer) - before) % _COMMIT_EVERY == 0:
                        writer.commit()
                seen.add(name)
                if progress is not None:
                    progress(begun + end, total)
            begun += file.path.stat().st_size
        images = len(writer) - before
    return TsvReport(images=images, regions=regions, existing=existing, repeated=repeated)


def _check_labels(path: Path, image: str, regions: RegionArray, names: Mapping[str, Sequence[str]]) -> None:
    """Refuse labels beyond the names, where names are given."""
    for kind, known in names.items():
        labels = getattr(regions, kind)
        if known and labels is not None and len(labels) and labels.max() >= len(known):
            raise DataError(
                f"{path}: image {image!r} has {kind} up to {labels.max()}, but {len(known)} names were given. Give the list it belongs to."
            )


def read_names(path: str | Path) -> tuple[str, ...]:
    """Names of classes or attributes in the order of their ids, one a line; of synonyms with commas between them the
    first.

    Raises:
        DataError: the file is missing or not text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the names in {path}: {error}. Expected a text file with one name a line."
        ) from error
    return tuple(line.partition(",")[0].strip() for line in lines)
