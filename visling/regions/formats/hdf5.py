"""Region features in HDF5 files, read image by image: a file may be larger than memory.

Layouts  updn-hdf5      `image_features` (N, R, F), `image_bb` (N, R, 4), `spatial_features` (N, R, 6); the ids of the
                        rows in NAME_imgid2idx.pkl
         ban-hdf5       the same with the regions of all images one after another, and `pos_boxes` (N, 2), the first row
                        of an image and the one behind its last
         volta-hdf5     a group per image, named by its id: `features`, `boxes`, `obj_id`, `obj_conf`, `attr_id`,
                        `attr_conf`, `img_w`, `img_h`
         unsupervised-visualbert-hdf5
                        `features` (N, R, F), `boxes`, `objects_id`, `objects_conf`, `attrs_id`, `attrs_conf`; ids and
                        sizes of the rows in NAME.json
Sources  hengyuan-hu's bottom-up-attention-vqa, BAN (VQA, Flickr30K; also VisualBERT), VOLTA, Unsupervised VisualBERT.
         Boxes are pixel corners of the original image; the first four spatial features are the same corners in unit
         coordinates.
Letters  N images, R regions of an image, F feature width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from visling import damage
from visling.errors import DataError, VislingError
from visling.pickles import read_pickle
from visling.regions.formats.base import ImageRegions, RegionReader, damaged_file
from visling.types import RegionArray

_IDS_SUFFIX = "_imgid2idx.pkl"
"""Ends the name of a table image id -> row; the file's own name without its ending begins it."""
_LEAST_BYTES, _TIMES_THE_FILE = 1 << 26, 50
"""Most bytes that a dataset may claim: so many, or so many times the size of the file. Features shrink by a half."""
_BOXES_APART = 1e-3
"""Pixels by which a box and its unit corners, multiplied by the image's size, may differ: both were rounded to
float32."""


class RegionHdf5(RegionReader):
    """An HDF5 file of region features."""

    def __init__(self, path: str | Path, layout: str | None = None) -> None:
        super().__init__(path)
        if not self.path.is_file():
            raise DataError(f"{self.path} is a folder; expected an HDF5 file of region features.")
        with _explain_damage(self.path, "cannot be opened as an HDF5 file of region features"):
            self._entries = _open_entries(self.path, layout)
            self.layout = self._entries.layout
            self.notes = self._entries.notes
            self.total = len(self._entries.image_ids)
            self.feature_size = self._entries.find_feature_size()

    def images(self, skip: Container[str] = ()) -> Iterator[ImageRegions]:
        """Image by image: in the order of the rows, groups in that of their names.

        Raises:
            DataError: an entry that was cut off or is not of the layout; says which.
        """
        for number, image_id in enumerate(self._entries.image_ids):
            where = self._entries.where(number)
            with _explain_damage(self.path, f"{where}, cannot be read"):
                regions = None if image_id in skip else self._entries.decode(number)
            yield ImageRegions(image_id, regions, number + 1, where)


@contextmanager
def _explain_damage(path: Path, what: str) -> Iterator[None]:
    """Turn what HDF5's library and its reader in Python raise on damaged files into a `DataError`."""
    try:
        yield
    except VislingError:
        raise
    except (*damage.LAYOUT, RuntimeError, OSError, AssertionError) as error:
        raise DataError(
            f"{path}, {what} ({error}). It is truncated, damaged or of another kind: download it again."
        ) from error


class _Entries(ABC):
    """What a file of one layout holds, by the number of the image in the file."""

    layout: str
    fields: Mapping[str, str]
    """Field of a region array -> dataset."""
    notes: tuple[str, ...] = ()
    """As `RegionReader.notes`."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self.file = file
        self.image_ids: Sequence[str] = ()

    @classmethod
    @abstractmethod
    def recognises(cls, file: Any) -> bool:
        """Whether an open file is of this layout, by the names in it."""

    @abstractmethod
    def find_feature_size(self) -> int: ...

    @abstractmethod
    def where(self, number: int) -> str:
        """Place of an image in the file, for messages."""

    @abstractmethod
    def decode(self, number: int) -> RegionArray: ...

    def damaged(self, number: int, what: str) -> DataError:
        return damaged_file(self.path, self.where(number), what)

    def read(self, number: int, dataset: Any, rows: Any = ()) -> NDArray[Any]:
        """A part of a dataset."""
        check_dataset(self.path, dataset)
        try:
            return np.asarray(dataset[rows])
        except (OSError, RuntimeError) as error:
            raise self.damaged(number, f"has {dataset.name} that cannot be read ({error})") from error


def check_dataset(path: Path, dataset: Any) -> None:
    """Refuse a dataset that claims more than a file of this size can hold, whose numbers lie in other files, or that
    holds no numbers.

    Raises:
        DataError: it does.
    """
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{path} has a {type(dataset).__name__} where numbers are expected. Download it again.")
    if dataset.is_virtual or dataset.external or dataset.file.filename != str(path):
        raise DataError(
            f"{path} takes {dataset.name} from other files, which is not followed. Join them into one file."
        )
    if dataset.dtype.kind not in "fiu":
        raise DataError(f"{path} has {dataset.name} of type {dataset.dtype}; expected numbers. Download it again.")
    most = max(_LEAST_BYTES, _TIMES_THE_FILE * path.stat().st_size)
    if dataset.nbytes > most:
        raise DataError(
            f"{path} claims {dataset.nbytes} bytes of {dataset.name} {dataset.shape}, more than {most}. It is damaged: "
            "download it again."
        )


class _Rows(_Entries):
    """Arrays that hold one image per row."""

    def __init__(self, path: Path, file: Any) -> None:
        super().__init__(path, file)
        self.check_names()

    def check_names(self) -> None:
        """Refuse a file without one of the datasets."""
        for name in self.fields.values():
            if name not in self.file:
                raise DataError(
                    f"{self.path} has no dataset {name}; the layout {self.layout} has "
                    f"{', '.join(self.fields.values())}."
                )
            check_dataset(self.path, self.file[name])

    def check_shapes(self, dimensions: int, widths: Mapping[str, int]) -> None:
        """Refuse datasets that do not have the same images and regions as the features.

        Args:
            dimensions: of the features.
            widths: of a region's entry in the other datasets; 0 = one number.
        """
        features = self.file[self.fields["features"]]
        if features.ndim != dimensions or not features.shape[-1]:
            raise DataError(
                f"{self.path} has {features.name[1:]} of shape {features.shape}; the layout {self.layout} has "
                f"{dimensions} dimensions, the last of which is the width of a feature."
            )
        for field, name in self.fields.items():
            expected = features.shape[:-1] + ((widths[field],) if widths.get(field) else ())
            if field != "features" and self.file[name].shape != expected:
                raise DataError(
                    f"{self.path} has {name} of shape {self.file[name].shape} and {self.fields['features']} of "
                    f"{features.shape}; expected {expected}. The file is damaged or of another layout."
                )

    def find_feature_size(self) -> int:
        size = int(self.file[self.fields["features"]].shape[-1])
        if not self.file[self.fields["boxes"]].size:
            raise DataError(f"{self.path} holds no region.")
        return size

    def where(self, number: int) -> str:
        return f"row {number}"

    def decode_rows(self, number: int, rows: Any) -> dict[str, NDArray[Any]]:
        """Arrays of one image by field."""
        return {field: self.read(number, self.file[name], rows) for field, name in self.fields.items()}


class _UpDown(_Rows):
    """The same number of regions in every image."""

    layout = "updn-hdf5"
    fields: Mapping[str, str] = {"features": "image_features", "boxes": "image_bb", "spatial": "spatial_features"}
    dimensions = 3
    notes = ("the sizes of the images follow exactly from their boxes, in pixels and in unit coordinates",)

    def __init__(self, path: Path, file: Any) -> None:
        super().__init__(path, file)
        self.check_shapes(self.dimensions, {"boxes": 4, "spatial": 6})
        self.image_ids = _read_id_map(path, self.count_images())

    @classmethod
    def recognises(cls, file: Any) -> bool:
        return "image_features" in file and "pos_boxes" not in file

    def count_images(self) -> int:
        return int(self.file["image_features"].shape[0])

    def find_rows(self, number: int) -> Any:
        """Where the regions of an image are."""
        return number

    def decode(self, number: int) -> RegionArray:
        arrays = self.decode_rows(number, self.find_rows(number))
        boxes = arrays["boxes"].astype(np.float32, copy=False)
        size = compute_size(boxes, arrays["spatial"][:, :4])
        if size is None:
            raise self.damaged(number, "has boxes and spatial features that are not those of one image")
        return RegionArray(features=arrays["features"], boxes=boxes, size=size)


class _Ban(_UpDown):
    """As many regions in an image as the detector found."""

    layout = "ban-hdf5"
    dimensions = 2

    def check_names(self) -> None:
        """Refuse a file without one of the datasets, or with ranges that are not of its rows."""
        super().check_names()
        check_dataset(self.path, self.file["pos_boxes"])
        ranges, total = np.asarray(self.file["pos_boxes"]), self.file["image_features"].shape[0]
        path = self.path
        if ranges.ndim != 2 or ranges.shape[1] != 2:
            raise DataError(f"{path} has pos_boxes of shape {ranges.shape}; expected a first and a last row per image.")
        wrong = (ranges[:, 0] < 0) | (ranges[:, 1] < ranges[:, 0]) | (ranges[:, 1] > total)
        if wrong.any():
            row = int(wrong.argmax())
            raise damaged_file(path, f"row {row}", f"has pos_boxes {ranges[row].tolist()} in a file of {total} regions")
        self._ranges = ranges

    @classmethod
    def recognises(cls, file: Any) -> bool:
        return "pos_boxes" in file

    def count_images(self) -> int:
        return len(self._ranges)

    def find_rows(self, number: int) -> Any:
        first, end = self._ranges[number].tolist()
        return slice(first, end)


class _UnsupervisedVisualBert(_Rows):
    """Rows described by a JSON list."""

    layout = "unsupervised-visualbert-hdf5"
    fields: Mapping[str, str] = {
        "features": "features",
        "boxes": "boxes",
        "classes": "objects_id",
        "class_confidence": "objects_conf",
        "attributes": "attrs_id",
        "attribute_confidence": "attrs_conf",
    }

    def __init__(self, path: Path, file: Any) -> None:
        super().__init__(path, file)
        self.check_shapes(3, {"boxes": 4})
        described = _read_descriptions(path, int(file["features"].shape[0]))
        self.image_ids = [image_id for image_id, _ in described]
        self._sizes = [size for _, size in described]

    @classmethod
    def recognises(cls, file: Any) -> bool:
        return "features" in file and "objects_id" in file

    def decode(self, number: int) -> RegionArray:
        arrays = self.decode_rows(number, number)
        arrays["boxes"] = arrays["boxes"].astype(np.float32, copy=False)
        return RegionArray(size=self._sizes[number], **arrays)


class _VoltaGroups(_Entries):
    """A group per image."""

    layout = "volta-hdf5"
    fields: Mapping[str, str] = {
        "features": "features",
        "boxes": "boxes",
        "classes": "obj_id",
        "class_confidence": "obj_conf",
        "attributes": "attr_id",
        "attribute_confidence": "attr_conf",
    }

    def __init__(self, path: Path, file: Any) -> None:
        super().__init__(path, file)
        self.image_ids = list(file)

    @classmethod
    def recognises(cls, file: Any) -> bool:
        first = next(iter(file), None)
        return first is not None and isinstance(file[first], h5py.Group) and "features" in file[first]

    def find_feature_size(self) -> int:
        for number in range(len(self.image_ids)):
            features = self.find_dataset(number, "features")
            if features.ndim == 2 and features.size:
                return int(features.shape[1])
        raise DataError(f"{self.path} holds no region: every image has 0 boxes.")

    def where(self, number: int) -> str:
        return f"image {self.image_ids[number]}"

    def find_dataset(self, number: int, name: str) -> Any:
        group = self.file[self.image_ids[number]]
        if not isinstance(group, h5py.Group):
            raise self.damaged(number, "is an array; expected a group per image")
        if name not in group:
            raise self.damaged(number, f"has no {name}; found {', '.join(group)}")
        return group[name]

    def decode(self, number: int) -> RegionArray:
        arrays = {field: self.read(number, self.find_dataset(number, name)) for field, name in self.fields.items()}
        count = len(arrays["features"]) if arrays["features"].ndim == 2 else 0
        for field, name in self.fields.items():
            expected = (count, 4) if field == "boxes" else (count,)
            if field != "features" and arrays[field].shape != expected:
                raise self.damaged(number, f"has {name} of shape {arrays[field].shape}; expected {expected}")
        arrays["boxes"] = arrays["boxes"].astype(np.float32, copy=False)
        return RegionArray(size=(self.read_side(number, "img_w"), self.read_side(number, "img_h")), **arrays)

    def read_side(self, number: int, name: str) -> int:
        side = self.read(number, self.find_dataset(number, name))
        if side.size != 1 or side.dtype.kind not in "iu":
            raise self.damaged(number, f"has {name} {side!r}; expected a whole number")
        return int(side.item())


_LAYOUTS: Sequence[type[_Entries]] = (_UpDown, _Ban, _VoltaGroups, _UnsupervisedVisualBert)


def compute_size(boxes: NDArray[Any], unit: NDArray[Any]) -> tuple[int, int] | None:
    """Width and height of the image whose boxes are given in pixels and in unit coordinates; 1 x 1 without boxes.

    Each side is the quotient of the largest corner in pixels and the same corner in unit coordinates, rounded: a side
    is a whole number, and both corners are exact to one part in 10 million, so that the result is exact for any image.

    Args:
        boxes: (R, 4), pixel corners.
        unit: (R, 4), unit corners.
    Returns:
        None if the two do not belong together.
    """
    if not len(boxes):
        return 1, 1
    sides = []
    for x1, x2 in ((0, 2), (1, 3)):
        pixels, shares = boxes[:, [x1, x2]].astype(np.float64), unit[:, [x1, x2]].astype(np.float64)
        largest = np.unravel_index(shares.argmax(), shares.shape)
        if not shares[largest] > 0 or not np.isfinite(pixels).all():
            return None
        side = round(float(pixels[largest] / shares[largest]))
        if np.abs(pixels - shares * side).max() > _BOXES_APART:
            return None
        sides.append(side)
    return sides[0], sides[1]


def _open_entries(path: Path, wanted: str | None) -> _Entries:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(
            f"{path} cannot be opened as an HDF5 file ({error}). It is truncated, damaged or of another kind: "
            "download it again."
        ) from error
    for layout in _LAYOUTS:
        if wanted in (None, layout.layout) and layout.recognises(file):
            return layout(path, file)
    names = ", ".join(list(file)[:8]) or "nothing"
    expected = [layout.layout for layout in _LAYOUTS if wanted in (None, layout.layout)]
    raise DataError(
        f"{path} holds {names}, which is not the layout {' or '.join(expected)} (docs/formats/hdf5.md lists their "
        "datasets). Is it a file of region features?"
    )


def _read_id_map(path: Path, count: int) -> list[str]:
    """Ids of the images by row, from the table next to a file."""
    table = path.with_name(path.stem + _IDS_SUFFIX)
    if not table.is_file():
        others = sorted(other.name for other in path.parent.glob(f"*{_IDS_SUFFIX}"))
        found = f"found {', '.join(others)}, which belong to other files" if others else "found no such table"
        raise DataError(
            f"{path} does not hold the ids of its images; looked for {table.name} next to it, {found}. Copy the table "
            "that was released with the file there, under this name."
        )
    rows = read_pickle(table)
    if not isinstance(rows, dict) or not all(isinstance(row, int | np.integer) for row in rows.values()):
        raise DataError(f"{table} is no table of image ids and rows. Download it again.")
    if sorted(rows.values()) != list(range(count)):
        raise DataError(
            f"{table} has {len(rows)} ids, {path.name} {count} images; expected one id for each row. They are not of "
            "one release: download both again."
        )
    return [_spell_id(table, image_id) for image_id, _ in sorted(rows.items(), key=lambda item: int(item[1]))]


def _spell_id(table: Path, image_id: Any) -> str:
    if not isinstance(image_id, int | str | np.integer):
        raise DataError(f"{table} has {image_id!r} for an image id; expected a number or a name.")
    return str(image_id)


def _read_descriptions(path: Path, count: int) -> list[tuple[str, tuple[int, int]]]:
    """Id and size of every row, from the list next to a file."""
    file = path.with_suffix(".json")
    if not file.is_file():
        raise DataError(
            f"{path} does not hold the ids and sizes of its images; looked for {file.name} next to it. Copy the list "
            "that was released with the file there, under this name."
        )
    try:
        entries = damage.parse_json(file.read_bytes())
        described = [(str(entry["img_id"]), (int(entry["img_w"]), int(entry["img_h"]))) for entry in entries]
    except damage.LAYOUT as error:
        raise DataError(
            f"{file} is no list of img_id, img_w and img_h ({type(error).__name__}: {error}). Download it again."
        ) from error
    if len(described) != count:
        raise DataError(
            f"{file} describes {len(described)} images, {path.name} holds {count}. They are not of one release: "
            "download both again."
        )
    return described


READER = RegionHdf5
