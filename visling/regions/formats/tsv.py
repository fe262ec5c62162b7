"""Region features as tab-separated text: one image per line, no header, arrays as base64 of little-endian numbers.

Layouts  The number of columns gives the layout, which also says whether width or height comes first.
         bottom-up-attention   6  image id, width, height, number of boxes, boxes, features
         vilbert-tsv           7  the same, then class probabilities
         lxmert-obj36         10  image id, height, width, class ids, class confidences, attribute ids, attribute
                                  confidences, number of boxes, boxes, features
         volta-tsv            13  the same, then class probabilities, scores of attributes, scores of classes
Sources  Bottom-up attention (Anderson et al. 2018); the releases of ViLBERT (Conceptual Captions, VCR), LXMERT and
         VOLTA. Boxes are pixel corners of the original image. VOLTA's last two columns are not read: they hold scores
         before regression, or in some files the ids once more.
Letters  R regions of an image, F feature width, C classes.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visling.errors import DataError
from visling.regions.formats.base import ImageRegions, RegionReader, damaged_file
from visling.regions.formats.base64_arrays import decode_array, measure_rows
from visling.regions.formats.entries import LONGEST_COUNT
from visling.types import RegionArray

_BOTTOM_UP = ("id", "width", "height", "number", "boxes", "features")
_LXMERT = (
    "id", "height", "width", "classes", "class_confidence", "attributes", "attribute_confidence", "number", "boxes",
    "features",
)  # fmt: skip
_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "bottom-up-attention": _BOTTOM_UP,
    "vilbert-tsv": (*_BOTTOM_UP, "probs"),
    "lxmert-obj36": _LXMERT,
    "volta-tsv": (*_LXMERT, "probs", "attribute_scores", "class_scores"),
}
"""Layout -> its columns."""
_LABELS: Mapping[str, str] = {
    "classes": "<i8",
    "class_confidence": "<f4",
    "attributes": "<i8",
    "attribute_confidence": "<f4",
}
"""Columns with one number per region and their types."""
_READ_BYTES = 1 << 20
"""Read at a time: a line of 36 regions has 400 KB, and is put together from as few pieces as possible."""


class RegionTsv(RegionReader):
    """A text file of region features, read from front to back."""

    unit = "bytes"

    def __init__(self, path: str | Path, layout: str | None = None) -> None:
        super().__init__(path)
        if not self.path.is_file():
            raise DataError(f"{self.path} is a folder; expected a text file of region features.")
        self.total = self.path.stat().st_size
        self.layout = self._find_layout(layout)
        self._columns = _COLUMNS[self.layout]
        first, second = (column for column in self._columns if column in ("width", "height"))
        self.box_hint = (
            f"The layout {self.layout} has {first} before {second}: are the columns of the file the other way round?"
        )
        self.feature_size, self._probs_size = self._find_widths()

    def images(self, skip: Container[str] = ()) -> Iterator[ImageRegions]:
        """Image by image, in the order of the file.

        Raises:
            DataError: a line that was cut off or is not of the layout; says which.
        """
        for line in self._split_lines():
            name = line.read_text("id")
            regions = None if name in skip else self._decode_regions(line)
            yield ImageRegions(name, regions, line.end, line.where)

    def _find_layout(self, wanted: str | None) -> str:
        content = next((content for _, content, _ in self._read_lines()), None)
        if content is None:
            raise DataError(f"{self.path} is empty; expected one image per line.")
        count = content.count(b"\t") + 1
        layouts = {name: columns for name, columns in _COLUMNS.items() if wanted in (None, name)}
        for name, columns in layouts.items():
            if len(columns) == count:
                return name
        expected = ", ".join(f"{len(columns)} ({name})" for name, columns in layouts.items())
        raise DataError(
            f"{self.path} has {count} tab-separated columns; expected {expected}. Is it a file of region features?"
        )

    def _find_widths(self) -> tuple[int, int]:
        """Width of a region's feature and of its class probabilities (0: the layout has none), as the first line with
        regions has them."""
        for line in self._split_lines():
            if line.read_count("number"):
                return line.measure_rows("features"), line.measure_rows("probs") if "probs" in self._columns else 0
        raise DataError(f"{self.path} holds no region: every line has 0 boxes.")

    def _read_lines(self) -> Iterator[tuple[int, bytes, int]]:
        """Number from 1, content, and last byte in the file of every line that is not blank."""
        end = 0
        with self.path.open("rb", buffering=_READ_BYTES) as file:
            for number, content in enumerate(file, 1):
                end += len(content)
                if not content.isspace():
                    yield number, content, end

    def _split_lines(self) -> Iterator[_Line]:
        """Lines split into the columns of the layout."""
        for number, content, end in self._read_lines():
            fields = _split_fields(content)
            if len(fields) != len(self._columns):
                raise damaged_file(
                    self.path,
                    f"line {number}",
                    f"has {len(fields)} columns; expected {len(self._columns)} ({', '.join(self._columns)})",
                )
            yield _Line(path=self.path, number=number, fields=dict(zip(self._columns, fields, strict=True)), end=end)

    def _decode_regions(self, line: _Line) -> RegionArray:
        count = line.read_count("number")
        probs = None
        if "probs" in line.fields:
            # Caffe's classes: the background is column 0.
            probs = np.roll(line.read_array("probs", "<f4", (count, self._probs_size)), -1, axis=1)
        return RegionArray(
            boxes=line.read_array("boxes", "<f4", (count, 4)),
            features=line.read_array("features", "<f4", (count, self.feature_size)),
            size=(line.read_count("width"), line.read_count("height")),
            probs=probs,
            **{name: line.read_array(name, dtype, (count,)) for name, dtype in _LABELS.items() if name in line.fields},
        )


def _split_fields(content: bytes) -> list[memoryview]:
    """Columns of a line without its end; nothing is copied."""
    view = memoryview(content)
    fields, start = [], 0
    while (tab := content.find(b"\t", start)) >= 0:
        fields.append(view[start:tab])
        start = tab + 1
    end = len(content)
    while end > start and content[end - 1] in b"\r\n":
        end -= 1
    fields.append(view[start:end])
    return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """One line of a file, decoded column by column; what cannot be decoded is a `DataError` that names the line."""

    path: Path
    number: int
    """From 1."""
    fields: Mapping[str, memoryview]
    """By column."""
    end: int
    """Bytes of the file up to the end of the line."""

    @property
    def where(self) -> str:
        return f"line {self.number}"

    def damaged(self, what: str) -> DataError:
        return damaged_file(self.path, self.where, what)

    def read_text(self, column: str) -> str:
        try:
            text = str(self.fields[column], "utf-8").strip()
        except UnicodeDecodeError as error:
            raise self.damaged(f"has a column {column} that is not text ({error})") from error
        if not text:
            raise self.damaged(f"has an empty column {column}")
        return text

    def read_count(self, column: str) -> int:
        text = self.read_text(column)
        if not (text.isascii() and text.isdecimal() and len(text) <= LONGEST_COUNT):
            raise self.damaged(f"has {text[:40]!r} in the column {column}; expected a whole number")
        return int(text)

    def read_array(self, column: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        try:
            return decode_array(column, self.fields[column], dtype, shape)
        except ValueError as error:
            raise self.damaged(str(error)) from error

    def measure_rows(self, column: str) -> int:
        """Width of an array of float32 with one row per region."""
        try:
            return measure_rows(column, self.fields[column], self.read_count("number"))
        except ValueError as error:
            raise self.damaged(str(error)) from error


READER = RegionTsv
