"""Region features as one or two numpy files per image, in a folder and its sub-folders.

Layouts  What the first file holds gives the layout; all files of a folder have the same one.
         mmf-npy                `<name>.npy`, the features, and `<name>_info.npy`, a dictionary with the rest
         pythia-fc6-npy         `<name>.npy`, the features alone: no boxes
         vilbert-multitask-npy  `<name>.npy`, a dictionary with everything
         milvlg-npz             `<name>.npz`: x, bbox, num_bbox, image_h, image_w and a dictionary `info`
         visualbert-npz         `<image file>.npz`: box_features, max_conf, cls_boxes; no size of the image
         Dictionaries are pickled arrays of objects, read by the restricted reader.
Sources  The releases of MMF, Pythia, ViLBERT (vilbert-multi-task), MILVLG (bottom-up-attention.pytorch) and VisualBERT.
Letters  R regions of an image, F feature width.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from visling.errors import DataError
from visling.image_ids import from_file_name
from visling.pickles import read_array, read_arrays
from visling.regions.formats.base import ImageRegions, RegionReader
from visling.regions.formats.entries import Entry, FieldNames, build_regions, list_notes
from visling.types import RegionArray

SUFFIXES = (".npy", ".npz")
_ZIP = b"PK\x03\x04"
_INFO = "_info.npy"
"""End of the name of MMF's second file."""

_MMF = FieldNames(
    boxes="bbox",
    size=("image_width", "image_height"),
    classes=("objects",),
    probs="cls_prob",
    background="absent",
)
_LAYOUTS: Mapping[str, FieldNames] = {
    "mmf-npy": _MMF,
    "pythia-fc6-npy": FieldNames(),
    "vilbert-multitask-npy": FieldNames(
        boxes="bbox", size=("image_width", "image_height"), classes=("objects",), probs="cls_prob"
    ),
    "milvlg-npz": FieldNames(
        features="x",
        boxes="bbox",
        size=("image_w", "image_h"),
        classes=("objects_id", "objects"),
        class_confidence=("objects_conf",),
        attributes=("attrs_id",),
        attribute_confidence=("attrs_conf",),
        probs="cls_prob",
        background="absent",
    ),
    "visualbert-npz": FieldNames(features="box_features", boxes="cls_boxes", class_confidence=("max_conf",)),
}
"""Layout -> its fields."""


class RegionArrays(RegionReader):
    """A folder of numpy files, one image after another in the order of their names; or the file of one image."""

    def __init__(self, path: str | Path, layout: str | None = None) -> None:
        super().__init__(path)
        files = self._walk()
        first = next(files, None)
        if first is None:
            raise DataError(f"{self.path} holds no file of features ({', '.join(SUFFIXES)}).")
        self.total = 1 + sum(1 for _ in files)
        self.layout = self._read(first)[1]
        if layout not in (None, self.layout):
            raise DataError(f"{first} has the layout {self.layout}; expected {layout}.")
        self._names = _LAYOUTS[self.layout]
        self.has_boxes = self.layout != "pythia-fc6-npy"
        self.has_sizes = self._names.size is not None
        self.notes = list_notes(self._names, has_boxes=self.has_boxes, has_sizes=self.has_sizes)
        self.feature_size = self._find_feature_size()

    def images(self, skip: Container[str] = ()) -> Iterator[ImageRegions]:
        """Image by image, folder by folder in the order of their names.

        Raises:
            DataError: a file that cannot be decoded or is not of the layout; says which.
        """
        for position, file in enumerate(self._walk(), 1):
            # A released name may keep the image's suffix: "dev-850-0-img0.png.npz".
            name = from_file_name(from_file_name(file.name))
            regions = None if name in skip else self._decode(file, self.feature_size)
            yield ImageRegions(name, regions, position, self._describe(file))

    def _decode(self, file: Path, feature_size: int | None) -> RegionArray:
        entry, layout = self._read(file)
        if layout != self.layout:
            raise DataError(
                f"{file} has the layout {layout}, the first file of {self.path} {self.layout}. Convert files of "
                "different layouts separately; a file of features and the one with its boxes lie in one folder."
            )
        return build_regions(entry, self._names, feature_size, has_boxes=self.has_boxes)

    def _find_feature_size(self) -> int:
        for file in self._walk():
            if len(regions := self._decode(file, None)):
                return int(regions.features.shape[1])
        raise DataError(f"{self.path} holds no region: every image has 0 boxes.")

    def _walk(self) -> Iterator[Path]:
        """Files of the images; a folder's names are the most that is held in memory."""
        if self.path.is_file():
            yield self.path
        else:
            yield from _walk_folder(self.path, ())

    def _describe(self, file: Path) -> str:
        return f"file {file.relative_to(self.path) if file != self.path else file.name}"

    def _read(self, file: Path) -> tuple[Entry, str]:
        """The fields of an image and the layout that they have."""
        fields: dict[str, Any]
        layout = None
        with file.open("rb") as opened:
            is_archive = opened.read(len(_ZIP)) == _ZIP
        if is_archive:
            fields = dict(read_arrays(file))
            if {"x", "bbox"} <= fields.keys():
                layout = "milvlg-npz"
                if "info" in fields:
                    fields = _read_dictionary(fields.pop("info"), file) | fields
            elif {"box_features", "cls_boxes"} <= fields.keys():
                layout = "visualbert-npz"
        else:
            array = read_array(file)
            info = file.with_name(file.name.removesuffix(".npy") + _INFO)
            if array.dtype.hasobject:
                fields, layout = _read_dictionary(array, file), "vilbert-multitask-npy"
            elif info.exists():
                fields, layout = _read_dictionary(read_array(info), info) | {"features": array}, "mmf-npy"
            else:
                fields, layout = {"features": array}, "pythia-fc6-npy"
        entry = Entry(path=self.path, where=self._describe(file), fields=fields)
        if layout is None:
            raise entry.damaged(
                f"holds {', '.join(sorted(fields)) or 'no array'}; expected x and bbox (milvlg-npz), or box_features "
                "and cls_boxes (visualbert-npz)"
            )
        return entry, layout


def _walk_folder(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """Files of images in a folder and below it, sorted; links that lead back up are not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as listing:
        names = sorted((entry.name, entry.is_dir()) for entry in listing)
    files = {name for name, is_folder in names if not is_folder}
    for name, is_folder in names:
        if is_folder:
            yield from _walk_folder(folder / name, (*above, real))
        elif name.lower().endswith(SUFFIXES) and not (
            name.endswith(_INFO) and name.removesuffix(_INFO) + ".npy" in files
        ):
            yield folder / name


def _read_dictionary(array: Any, file: Path) -> dict[str, Any]:
    """The dictionary that an array of objects without dimensions holds."""
    content = array.item() if array.dtype.hasobject and array.ndim == 0 else None
    if not isinstance(content, dict):
        raise DataError(
            f"{file} holds an array of {array.dtype.name} and shape {array.shape}; expected a dictionary as a single "
            "object. It is of another layout: files of features and of their boxes belong into one folder."
        )
    return {str(name): value for name, value in content.items()}


READER = RegionArrays
