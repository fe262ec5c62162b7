"""Region features as tab-separated text: one image per line, no header, arrays as base64 of little-endian numbers.

Layouts  The number of columns gives the layout, which also says whether width or height comes first.
         bottom-up-attention  image id, width, height, number of boxes, boxes, features
         lxmert-obj36         image id, height, width, class ids, class confidences, attribute ids, attribute
                              confidences, number of boxes, boxes, features
Sources  Bottom-up attention (Anderson et al. 2018) and LXMERT's release. Boxes are pixel corners of the original image.
Letters  R regions of an image, F feature width.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visling.errors import DataError
from visling.regions.formats.base import ImageRegions, RegionReader, damaged_file
from visling.types import RegionArray

_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "bottom-up-attention": ("id", "width", "height", "number", "boxes", "features"),
    "lxmert-obj36": (
        "id",
        "height",
        "width",
        "classes",
        "class_confidence",
        "attributes",
        "attribute_confidence",
        "number",
        "boxes",
        "features",
    ),
}
"""Layout -> its columns."""
_LABELS: Mapping[str, str] = {
    "classes": "<i8",
    "class_confidence": "<f4",
    "attributes": "<i8",
    "attribute_confidence": "<f4",
}
"""Columns with one number per region and their types."""


class RegionTsv(RegionReader):
    """A text file of region features, read from front to back."""

    unit = "bytes"

    def __init__(self, path: str | Path, layout: str | None = None) -> None:
        super().__init__(path)
        if not self.path.is_file():
            raise DataError(f"{self.path} is a folder; expected a text file of region features.")
        self.total = self.path.stat().st_size
        self.layout = self._find_layout(layout)
        first, second = (column for column in _COLUMNS[self.layout] if column in ("width", "height"))
        self.box_hint = (
            f"The layout {self.layout} has {first} before {second}: are the columns of the file the other way round?"
        )
        self.feature_size = self._find_feature_size()

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

    def _find_feature_size(self) -> int:
        for line in self._split_lines():
            if regions := line.read_count("number"):
                length = len(line.read_bytes("features"))
                size, rest = divmod(length, 4 * regions)
                if rest or not size:
                    raise line.damaged(
                        f"holds {length} bytes of features for {regions} boxes, which is not a whole width"
                    )
                return size
        raise DataError(f"{self.path} holds no region: every line has 0 boxes.")

    def _read_lines(self) -> Iterator[tuple[int, bytes, int]]:
        """Number from 1, content, and last byte in the file of every line that is not blank."""
        end = 0
        with self.path.open("rb") as file:
            for number, content in enumerate(file, 1):
                end += len(content)
                if content.strip():
                    yield number, content.rstrip(b"\r\n"), end

    def _split_lines(self) -> Iterator[_Line]:
        """Lines split into the columns of the layout."""
        columns = _COLUMNS[self.layout]
        for number, content, end in self._read_lines():
            fields = content.split(b"\t")
            if len(fields) != len(columns):
                raise damaged_file(
                    self.path,
                    f"line {number}",
                    f"has {len(fields)} columns; expected {len(columns)} ({', '.join(columns)})",
                )
            yield _Line(path=self.path, number=number, fields=dict(zip(columns, fields, strict=True)), end=end)

    def _decode_regions(self, line: _Line) -> RegionArray:
        count = line.read_count("number")
        return RegionArray(
            boxes=line.read_array("boxes", "<f4", (count, 4)),
            features=line.read_array("features", "<f4", (count, self.feature_size)),
            size=(line.read_count("width"), line.read_count("height")),
            **{name: line.read_array(name, dtype, (count,)) for name, dtype in _LABELS.items() if name in line.fields},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """One line of a file, decoded column by column; what cannot be decoded is a `DataError` that names the line."""

    path: Path
    number: int
    """From 1."""
    fields: Mapping[str, bytes]
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
            text = self.fields[column].decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise self.damaged(f"has a column {column} that is not text ({error})") from error
        if not text:
            raise self.damaged(f"has an empty column {column}")
        return text

    def read_count(self, column: str) -> int:
        text = self.read_text(column)
        if not text.isdecimal():
            raise self.damaged(f"has {text[:40]!r} in the column {column}; expected a whole number")
        return int(text)

    def read_bytes(self, column: str) -> bytes:
        try:
            return base64.b64decode(self.fields[column], validate=True)
        except binascii.Error as error:
            raise self.damaged(f"has a column {column} that is not base64 ({error})") from error

    def read_array(self, column: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        content, expected = self.read_bytes(column), int(np.prod(shape)) * np.dtype(dtype).itemsize
        if len(content) != expected:
            raise self.damaged(
                f"holds {len(content)} bytes of {column}; expected {expected} "
                f"({' x '.join(map(str, shape))} of {np.dtype(dtype).name})"
            )
        return np.frombuffer(content, dtype).reshape(shape)


READER = RegionTsv
