"""VL-BERT's region features: a JSON file per image, in a zip archive or in a folder.

Layouts  vlbert-json     `num_boxes`, `image_w`, `image_h`, `boxes` and `features` as base64 of float32: COCO, where the
                         image is named by its number, NAME.zip holding the folder NAME (NAME/42.json)
         vlbert-cc-json  with `classes`, the probabilities of the classes, background first: Conceptual Captions, where
                         it is named by its line in the captions (00000042.json)
Sources  VL-BERT's release, its data sets of VQA and of Conceptual Captions. Boxes are pixel corners of the original
         image. As there, regions with class probabilities are sorted by the largest of them, the background's included.
         `image_box_feature`, which a file may hold, is not read: a store has no feature of the whole image, and VL-BERT
         takes the mean of the regions where it is missing.
Letters  R regions of an image, F feature width, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from visling.errors import DataError
from visling.regions.formats.base import ImageRegions, RegionReader, damaged_file
from visling.regions.formats.base64_arrays import decode_array, measure_rows
from visling.regions.formats.zip_members import list_members, read_member
from visling.types import RegionArray

_PROBS = "classes"
"""Field with the class probabilities: a layout has it in all of its files or in none."""

_WHOLE = "image_box_feature"
"""Field that is not read."""


class _File(NamedTuple):
    """A JSON file that is not read yet."""

    name: str
    """With the folder in front of it."""
    read: Callable[[], bytes]
    """Its content; a `ValueError` where it is damaged."""

    @property
    def image_id(self) -> str:
        return PurePosixPath(self.name).stem


class _Image(NamedTuple):
    """What a JSON file says of its image, arrays still as text."""

    number: int
    size: tuple[int, int]
    boxes: str
    features: str
    probs: str | None
    has_whole: bool
    """Whether it holds a feature of the whole image."""


class ZippedJson(RegionReader):
    """An archive or a folder of JSON files, in its own order (a folder in that of the names)."""

    def __init__(self, path: str | Path, layout: str | None = None) -> None:
        super().__init__(path)
        self.total = self._check_names()
        self.layout, self.feature_size, self._probs_size = self._find_layout(layout)

    def images(self, skip: Container[str] = ()) -> Iterator[ImageRegions]:
        """Image by image.

        Raises:
            DataError: a file that is damaged or not of the layout; says which.
        """
        for number, file in enumerate(self._list_files(), 1):
            regions = None if file.image_id in skip else self._decode_regions(file)
            yield ImageRegions(file.image_id, regions, number, file.name)

    def _list_files(self) -> Iterator[_File]:
        if self.path.is_dir():
            for name in sorted(entry.name for entry in self.path.iterdir() if not _is_hidden(entry.name)):
                yield _File(name, (self.path / name).read_bytes)
            return
        with self.path.open("rb") as archive:
            for member in list_members(self.path):
                if not member.name.endswith("/") and not _is_hidden(member.name):
                    yield _File(member.name, lambda member=member: read_member(archive, member))  # type: ignore[misc]

    def _check_names(self) -> int:
        """Number of files, all of which are JSON and lie in one folder."""
        count, folder = 0, None
        for count, file in enumerate(self._list_files(), 1):  # noqa: B007
            path = PurePosixPath(file.name)
            if path.is_absolute() or ".." in path.parts or "\\" in file.name or path.suffix != ".json":
                raise DataError(
                    f"{self.path} holds {file.name!r}; expected one JSON file per image, in one folder of the archive. "
                    "Remove it, or check where the file comes from."
                )
            folder = path.parent if folder is None else folder
            if path.parent != folder:
                raise DataError(
                    f"{self.path} holds files in {str(folder)!r} and in {str(path.parent)!r}: two layouts are mixed. "
                    "Convert each folder separately."
                )
        if not count:
            raise DataError(f"{self.path} is empty; expected one JSON file per image.")
        return count

    def _find_layout(self, wanted: str | None) -> tuple[str, int, int]:
        """Layout, and widths of a region's feature and of its class probabilities (0: none), as the first file with
        regions has them."""
        for file in self._list_files():
            image = self._parse(file)
            if image.has_whole:
                self.notes = (
                    f"{_WHOLE}, the feature of the whole image, was left out: models take the mean of its regions",
                )
            layout = "vlbert-json" if image.probs is None else "vlbert-cc-json"
            if wanted not in (None, layout):
                raise DataError(
                    f"{self.path} has the layout {layout}, not {wanted}: {file.name} has "
                    f"{'no' if image.probs is None else 'a'} field {_PROBS}."
                )
            if image.number:
                try:
                    probs = 0 if image.probs is None else measure_rows(_PROBS, image.probs, image.number)
                    return layout, measure_rows("features", image.features, image.number), probs
                except ValueError as error:
                    raise self._damaged(file, str(error)) from error
        raise DataError(f"{self.path} holds no region: every file has 0 boxes.")

    def _decode_regions(self, file: _File) -> RegionArray:
        image = self._parse(file)
        if (image.probs is None) != (self._probs_size == 0):
            here, there = ("no field", "one") if image.probs is None else ("a field", "none")
            raise self._damaged(file, f"has {here} {_PROBS}, others have {there}: two layouts are mixed")
        try:
            boxes = decode_array("boxes", image.boxes, "<f4", (image.number, 4))
            features = decode_array("features", image.features, "<f4", (image.number, self.feature_size))
            if image.probs is None:
                return RegionArray(boxes=boxes, features=features, size=image.size)
            probs = decode_array(_PROBS, image.probs, "<f4", (image.number, self._probs_size))
        except ValueError as error:
            raise self._damaged(file, str(error)) from error
        order = np.argsort(probs.max(axis=1, initial=0), kind="stable")[::-1]
        return RegionArray(
            boxes=boxes[order], features=features[order], size=image.size, probs=np.roll(probs[order], -1, axis=1)
        )

    def _parse(self, file: _File) -> _Image:
        try:
            fields = json.loads(file.read())
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(file, f"cannot be read ({error})") from error
        if not isinstance(fields, dict):
            raise self._damaged(file, "holds no JSON object")
        lacking = [name for name in ("num_boxes", "image_w", "image_h", "boxes", "features") if name not in fields]
        if lacking:
            raise self._damaged(file, f"has no field {lacking[0]}; found {', '.join(list(fields)[:8])}")
        if str(named := fields.get("image_id", file.image_id)) != file.image_id:
            raise self._damaged(file, f"says that it is of the image {named!r}")
        count, width, height = (self._read_count(file, fields, name) for name in ("num_boxes", "image_w", "image_h"))
        boxes, features = (self._read_text(file, fields, name) for name in ("boxes", "features"))
        probs = self._read_text(file, fields, _PROBS) if _PROBS in fields else None
        return _Image(count, (width, height), boxes, features, probs, _WHOLE in fields)

    def _read_count(self, file: _File, fields: Mapping[str, Any], name: str) -> int:
        value = fields[name]
        if type(value) is not int or value < 0:
            raise self._damaged(file, f"has {str(value)[:40]!r} in the field {name}; expected a whole number")
        return value

    def _read_text(self, file: _File, fields: Mapping[str, Any], name: str) -> str:
        """Base64 of a field; the release accepts line breaks in it."""
        value = fields[name]
        if not isinstance(value, str):
            raise self._damaged(file, f"has {type(value).__name__} in the field {name}; expected base64")
        return value.replace("\n", "")

    def _damaged(self, file: _File, what: str) -> DataError:
        return damaged_file(self.path, file.name, what)


def _is_hidden(name: str) -> bool:
    """Whether a file is one that operating systems add to folders and archives."""
    parts = PurePosixPath(name).parts
    return parts[:1] == ("__MACOSX",) or parts[-1:] in ((".DS_Store",), ("Thumbs.db",))


READER = ZippedJson
