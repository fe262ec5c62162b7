"""Region features in files of `torch.save`: a dictionary from image to (features, boxes, confidence).

Layout   visualbert-th   Keys are names of image files, at times with ".npz" behind. Boxes are pixel corners; the size
         of the image is not held.
Source   VisualBERT's release (`features_{train,dev,test1,test2}_150.th` of NLVR2, `coco_features_{train,val}_150.th`).
Files    Both forms of `torch.save`: the zip archive that it writes since version 1.6, and the sequence of pickles
         followed by raw numbers that was written before, as the release was. The pickle, which lists tensors by name
         and shape, is decoded by the restricted reader; the numbers are read image by image. A file of any size so
         takes the memory of its list and of one image.
Letters  R regions of an image, F feature width.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from visling import damage
from visling.errors import DataError
from visling.image_ids import from_file_name
from visling.pickles import load_pickle
from visling.regions.formats.base import ImageRegions, RegionReader, damaged_file
from visling.regions.formats.entries import Entry, FieldNames, build_regions, list_notes
from visling.types import RegionArray

_LAYOUT = "visualbert-th"
_NAMES = FieldNames(class_confidence=("confidence",))
_FIELDS = ("features", "boxes", "confidence")
"""What an image's tuple holds, in order."""

_ZIP = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a member of a zip archive: the lengths of its name and of what follows it."""
_COUNT_BYTES = 8
"""In front of the numbers of each storage in the older form: how many they are."""


class _Storage(NamedTuple):
    """Numbers in the file that tensors are cut from."""

    key: str
    dtype: np.dtype[Any]
    length: int
    """How many numbers."""


class _Tensor(NamedTuple):
    """Where the numbers of a tensor are."""

    storage: _Storage
    start: int
    """First number in the storage."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _place_tensor(storage: _Storage, start: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> _Tensor:
    return _Tensor(storage, start, tuple(shape), tuple(strides))


def _place_storage(reference: Any) -> _Storage:
    """Storage of a reference: "storage", type, key, device, count, and in the older form a view of another storage."""
    kind, dtype, key, _, count, *view = reference
    if kind != "storage" or not isinstance(dtype, np.dtype) or any(part is not None for part in view):
        raise ValueError("it refers to data in a form that is not known")
    return _Storage(str(key), dtype, int(count))


_TORCH: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _place_tensor,
    ("torch._utils", "_rebuild_tensor"): _place_tensor,
    ("torch", "FloatStorage"): np.dtype("<f4"),
    ("torch", "DoubleStorage"): np.dtype("<f8"),
    ("torch", "HalfStorage"): np.dtype("<f2"),
    ("torch", "LongStorage"): np.dtype("<i8"),
    ("torch", "IntStorage"): np.dtype("<i4"),
}
"""Names of torch that tensors need -> what stands for them here: no code of torch is called."""


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """A file of `torch.save`: its content with places instead of numbers."""

    content: Any
    find_start: Callable[[BinaryIO, _Storage], int] = field(repr=False)
    """Where the numbers of a storage begin in the file."""

    def read(self, file: BinaryIO, tensor: _Tensor) -> NDArray[Any]:
        """The numbers of a tensor.

        Raises:
            ValueError: they are not in the file, or not in one piece.
        """
        storage, count = tensor.storage, math.prod(tensor.shape)
        if min(tensor.start, *tensor.shape, 0) < 0 or tensor.start + count > storage.length:
            raise ValueError(f"a tensor of {tensor.shape} is larger than its storage of {storage.length} numbers")
        expected, steps = 1, []
        for size in reversed(tensor.shape):
            steps.append(expected)
            expected *= size
        if count > 1 and tensor.strides != tuple(reversed(steps)):
            raise ValueError(f"a tensor of {tensor.shape} is stored with steps of {tensor.strides}, not row by row")
        size = storage.dtype.itemsize
        file.seek(self.find_start(file, storage) + tensor.start * size)
        content = file.read(count * size)
        if len(content) != count * size:
            raise ValueError("its numbers are cut off")
        return np.frombuffer(content, storage.dtype).reshape(tensor.shape)


class RegionTensors(RegionReader):
    """A file of tensors by image."""

    has_sizes = False
    notes = list_notes(_NAMES, has_boxes=True, has_sizes=False)

    def __init__(self, path: str | Path, layout: str | None = None) -> None:
        super().__init__(path)
        if not self.path.is_file():
            raise DataError(f"{self.path} is a folder; expected a file of torch.save.")
        self.layout = layout or _LAYOUT
        with self.path.open("rb") as file:
            is_zip = file.read(len(_ZIP)) == _ZIP
            file.seek(0)
            self._saved = _open_archive(self.path) if is_zip else _open_sequence(self.path, file)
        content = self._saved.content
        if not isinstance(content, dict) or not content:
            raise DataError(
                f"{self.path} holds {'an empty dictionary' if content == {} else type(content).__name__}; expected a "
                "dictionary from the names of images to (features, boxes, confidence)."
            )
        self._images: Mapping[Any, Any] = content
        self.total = len(content)
        self.feature_size = self._find_feature_size()

    def images(self, skip: Container[str] = ()) -> Iterator[ImageRegions]:
        """Image by image, in the order of the dictionary.

        Raises:
            DataError: an entry that was cut off or is not of the layout; says which.
        """
        with self.path.open("rb") as file:
            for position, (key, value) in enumerate(self._images.items(), 1):
                name = from_file_name(from_file_name(str(key)))
                regions = None if name in skip else self._decode(file, str(key), value, self.feature_size)
                yield ImageRegions(name, regions, position, f"image {key}")

    def _find_feature_size(self) -> int:
        with self.path.open("rb") as file:
            for key, value in self._images.items():
                if len(regions := self._decode(file, str(key), value, None)):
                    return int(regions.features.shape[1])
        raise DataError(f"{self.path} holds no region: every image has 0 boxes.")

    def _decode(self, file: BinaryIO, key: str, value: Any, feature_size: int | None) -> RegionArray:
        where = f"image {key}"
        if (
            not isinstance(value, tuple | list)
            or len(value) != len(_FIELDS)
            or not all(isinstance(part, _Tensor | np.ndarray) for part in value)
        ):
            raise damaged_file(
                self.path,
                where,
                f"holds {'a tensor' if isinstance(value, _Tensor) else type(value).__name__}; expected three tensors "
                f"({', '.join(_FIELDS)}). Is it a file of weights?",
            )
        try:
            arrays = [self._saved.read(file, part) if isinstance(part, _Tensor) else part for part in value]
        except (ValueError, KeyError, OSError, struct.error) as error:
            raise damaged_file(self.path, where, f"cannot be read: {error}") from error
        entry = Entry(path=self.path, where=where, fields=dict(zip(_FIELDS, arrays, strict=True)))
        return build_regions(entry, _NAMES, feature_size)


def _open_archive(path: Path) -> _Saved:
    """A file of torch 1.6 or later: a zip archive of one pickle and one member per storage."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            found = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(found) != 1:
                raise DataError(f"{path} is a zip archive without the one data.pkl of torch.save.")
            folder = found[0].removesuffix("data.pkl")
            order = members.get(f"{folder}byteorder")
            if order is not None and archive.read(order) != b"little":
                raise DataError(f"{path} was written by a big-endian machine, which is not supported.")
            if members[found[0]].compress_type != zipfile.ZIP_STORED:
                raise DataError(f"{path} has a compressed data.pkl, which torch.save does not write.")
            pickled = archive.read(found[0])
    except DataError:
        raise
    except damage.ZIP as error:
        raise DataError(f"{path} is not a whole zip archive: {error}. It is truncated: download it again.") from error
    content = load_pickle(pickled, str(path), names=_TORCH, load_persistent=_place_storage)
    prefix = f"{folder}data/"
    offsets = {
        name.removeprefix(prefix): (member.header_offset, member.file_size)
        for name, member in members.items()
        if name.startswith(prefix) and member.compress_type == zipfile.ZIP_STORED
    }

    def find_start(file: BinaryIO, storage: _Storage) -> int:
        if storage.key not in offsets:
            raise ValueError(f"the archive has no uncompressed member {prefix}{storage.key}")
        start, size = offsets[storage.key]
        if size != storage.length * storage.dtype.itemsize:
            raise ValueError(f"the member {prefix}{storage.key} has {size} bytes for {storage.length} numbers")
        file.seek(start)
        name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        return int(start + _LOCAL_HEADER.size + name_bytes + extra_bytes)

    return _Saved(content=content, find_start=find_start)


def _open_sequence(path: Path, file: BinaryIO) -> _Saved:
    """A file of an older torch: pickles of a magic number, a version, the machine, the content and the list of
    storages; then the numbers of each storage in the order of the list."""
    storages: dict[str, _Storage] = {}

    def keep_storage(reference: Any) -> _Storage:
        storage = _place_storage(reference)
        return storages.setdefault(storage.key, storage)

    place = str(path)
    _, version, machine = (load_pickle(file, place) for _ in range(3))
    if not isinstance(machine, dict) or machine.get("little_endian") is not True or version != 1001:
        raise DataError(f"{path} is a file of torch.save in version {version} of {machine}, which is not supported.")
    content = load_pickle(file, place, names=_TORCH, load_persistent=keep_storage)
    keys = load_pickle(file, place)
    if not isinstance(keys, list) or {str(key) for key in keys} != storages.keys():
        raise DataError(f"{path} lists other tensors than it holds. It is damaged: download it again.")
    starts, position = {}, file.tell()
    for key in map(str, keys):
        starts[key] = position + _COUNT_BYTES
        position = starts[key] + storages[key].length * storages[key].dtype.itemsize
    size = path.stat().st_size
    if size < position:
        raise DataError(f"{path} is truncated: found {size} bytes, expected {position}. Download it again.")

    def find_start(file: BinaryIO, storage: _Storage) -> int:
        start = starts[storage.key]
        file.seek(start - _COUNT_BYTES)
        count = int.from_bytes(file.read(_COUNT_BYTES), "little")
        if count != storage.length:
            raise ValueError(f"{count} numbers lie where {storage.length} are expected")
        return start

    return _Saved(content=content, find_start=find_start)


READER = RegionTensors
