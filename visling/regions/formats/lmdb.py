"""Region features in LMDB: a key-value store with one image per entry, read in the order of its keys.

Layouts  What an entry's value is gives the layout; all entries of a file have the same one.
         volta-lmdb                      a row of LXMERT's or VOLTA's TSV file as a dictionary: base64 text, or arrays
                                         under the spellings of VOLTA's HDF5 files (obj_id, obj_conf, attr_id, ...);
                                         or MMF's features of ResNeXt-101 under these spellings
         vilbert-lmdb                    a row of ViLBERT's TSV file as a dictionary of base64 text
         vilbert-multitask-lmdb          the same fields as arrays
         mmf-lmdb                        arrays and, in files of detector regions, boxes and class probabilities; the
                                         key is the path of the image's file of features
         conceptual-captions-lmdb        records of tensorpack: features, class probabilities, boxes, number, height,
                                         width, image id, caption
         volta-conceptual-captions-lmdb  the same with classes and attributes
         Values are pickles, read by the restricted reader, or MessagePack (`tensorpack.py`).
Sources  The releases of VOLTA, ViLBERT (vilbert_beta, vilbert-multi-task) and MMF; tensorpack 0.9.4.
VCR      ViLBERT numbers the images of VCR; `VCR_ImagePath2Id.json` next to the file gives their names back.
Letters  F feature width.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from visling import damage
from visling.errors import ConfigError, DataError, VislingError
from visling.image_ids import from_file_name
from visling.pickles import load_pickle
from visling.regions.formats.base import ImageRegions, RegionReader, damaged_file
from visling.regions.formats.entries import Entry, FieldNames, build_regions, list_notes
from visling.regions.formats.lmdb_pages import LmdbPages
from visling.types import RegionArray

DATA = "data.mdb"
"""The file of an LMDB folder."""
_LISTS = (b"keys", b"__keys__")
"""Entries that list the keys."""

_VOLTA = FieldNames(
    size=("img_w", "img_h"),
    number="num_boxes",
    classes=("objects_id", "obj_id", "objects"),
    class_confidence=("objects_conf", "obj_conf"),
    attributes=("attrs_id", "attr_id"),
    attribute_confidence=("attrs_conf", "attr_conf"),
    probs="cls_prob",
)
_VILBERT = FieldNames(size=("image_w", "image_h"), number="num_boxes", probs="cls_prob")
_LAYOUTS: Mapping[str, FieldNames] = {
    "volta-lmdb": _VOLTA,
    "vilbert-lmdb": _VILBERT,
    "vilbert-multitask-lmdb": _VILBERT,
    "mmf-lmdb": FieldNames(
        boxes="bbox",
        size=("image_width", "image_height"),
        classes=("objects",),
        probs="cls_prob",
        background="absent",
    ),
    "conceptual-captions-lmdb": _VILBERT,
    "volta-conceptual-captions-lmdb": replace(_VOLTA, size=_VILBERT.size),
}
"""Layout -> its fields."""
_RECORDS: Mapping[str, tuple[str, ...]] = {
    "conceptual-captions-lmdb": (
        "features", "cls_prob", "boxes", "num_boxes", "image_h", "image_w", "image_id", "caption",
    ),
    "volta-conceptual-captions-lmdb": (
        "features", "cls_prob", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "attr_scores", "boxes",
        "num_boxes", "image_h", "image_w", "image_id", "caption",
    ),
}  # fmt: skip
"""Layout whose values are lists -> what they hold, in order."""


class RegionLmdb(RegionReader):
    """An LMDB folder or file, read without a lock: nothing is written next to it."""

    def __init__(self, path: str | Path, layout: str | None = None) -> None:
        super().__init__(path)
        self.total = self._count_images()
        first, self.layout = next(self._read_entries(), (None, ""))
        if first is None:
            raise DataError(f"{self.path} holds no image.")
        if layout not in (None, self.layout):
            raise DataError(f"{self.path} has the layout {self.layout}; expected {layout}.")
        self._names = _LAYOUTS[self.layout]
        self.has_boxes = first.find(self._names.boxes) is not None
        size = self._names.size
        self.has_sizes = size is not None and first.find(*size) is not None
        self._vcr_names = _read_vcr_names(self.path)
        self.notes = list_notes(self._names, has_boxes=self.has_boxes, has_sizes=self.has_sizes)
        self.feature_size = self._find_feature_size()

    def images(self, skip: Container[str] = ()) -> Iterator[ImageRegions]:
        """Image by image, in the order of the keys.

        Raises:
            DataError: an entry that cannot be decoded or is not of the layout; says which.
        """
        for position, (entry, layout) in enumerate(self._read_entries(), 1):
            if layout != self.layout:
                raise DataError(
                    f"{self.path}, {entry.where} has the layout {layout}, the first entry {self.layout}. A file "
                    "holds entries of one layout: make two of it, or download it again."
                )
            name = self._find_name(entry)
            regions = None if name in skip else self._build(entry, self.feature_size)
            yield ImageRegions(name, regions, position, entry.where)

    def _build(self, entry: Entry, feature_size: int | None) -> RegionArray:
        return build_regions(entry, self._names, feature_size, has_boxes=self.has_boxes)

    def _find_feature_size(self) -> int:
        for entry, layout in self._read_entries():
            if layout == self.layout and len(regions := self._build(entry, None)):
                return int(regions.features.shape[1])
        raise DataError(f"{self.path} holds no region: every image has 0 boxes.")

    def _find_name(self, entry: Entry) -> str:
        """Image id of an entry."""
        # The key is a path where MMF's features were packed, by its own script or by VOLTA's.
        name = entry.read_text(entry.find("img_id", "image_id", "feature_path") or "image_id")
        return self._vcr_names.get(name, from_file_name(name))

    # The file

    def _count_images(self) -> int:
        """Number of images, after a check that the file is whole."""
        with self._open() as pages:
            found = self._file.stat().st_size
            if found < pages.needed:
                raise DataError(
                    f"{self._file} is truncated: found {found} bytes, expected {pages.needed}. Download it again. (A "
                    "file that LMDB's own programs read whole is rewritten without its unused end by `mdb_copy -c`.)"
                )
            return int(pages.entries) - sum(key in pages for key in _LISTS)

    @property
    def _file(self) -> Path:
        return self.path / DATA if self.path.is_dir() else self.path

    @contextmanager
    def _open(self) -> Iterator[LmdbPages]:
        """The file, opened; what is wrong with its pages is a `DataError`."""
        try:
            with self._file.open("rb") as file:
                yield LmdbPages(file)
        except VislingError:
            raise
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.path} cannot be read as LMDB: {error}. It is truncated or damaged: download it again."
            ) from error

    def _read_items(self) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values in the order of the keys."""
        with self._open() as pages:
            for key, value in pages:
                if key not in _LISTS:
                    yield key, value

    def _read_entries(self) -> Iterator[tuple[Entry, str]]:
        """Entries with the layout that each has."""
        for key, value in self._read_items():
            where = f"entry {key.decode('utf-8', 'backslashreplace')}"
            content = _decode(value, f"{self.path}, {where}")
            if isinstance(content, list | tuple):
                layout = next((name for name, fields in _RECORDS.items() if len(fields) == len(content)), None)
                fields = {} if layout is None else dict(zip(_RECORDS[layout], content, strict=True))
            elif isinstance(content, dict):
                fields = {_decode_name(name): value for name, value in content.items()}
                layout = _find_layout(fields)
            else:
                layout = None
            if layout is None:
                held = (
                    f"a list of {len(content)} values"
                    if isinstance(content, list | tuple)
                    else f"the fields {', '.join(sorted(map(str, content)))}"
                    if isinstance(content, dict)
                    else f"a value of type {type(content).__name__}"
                )
                raise damaged_file(
                    self.path, where, f"holds {held}; expected features and boxes as in {', '.join(_LAYOUTS)}"
                )
            yield Entry(path=self.path, where=where, fields=fields), layout


def _decode(value: bytes, place: str) -> Any:
    """The content of a value: MessagePack if its first byte begins a list or a dictionary there, else a pickle."""
    first = value[:1]
    if b"\x81" <= first <= b"\x9f" or first in (b"\xdc", b"\xdd", b"\xde", b"\xdf"):
        try:
            from visling.regions.formats.tensorpack import decode_message
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{place} was written by tensorpack, whose records need the package {error.name}. "
                "Install it with pip: visling[formats]."
            ) from error
        return decode_message(value, place)
    return load_pickle(value, place)


def _decode_name(name: Any) -> str:
    return name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)


def _find_layout(fields: Mapping[str, Any]) -> str | None:
    """Layout of a value that is a dictionary."""
    if "img_id" in fields or "img_h" in fields:
        return "volta-lmdb"
    if "feature_path" in fields:
        return "mmf-lmdb"
    if "image_id" in fields:
        return "vilbert-lmdb" if isinstance(fields.get("features"), str | bytes) else "vilbert-multitask-lmdb"
    return None


def _read_vcr_names(path: Path) -> dict[str, str]:
    """Number of an image of VCR -> its image id, from the table next to a file or folder of VCR."""
    folder = path if path.is_dir() else path.parent
    if "vcr" not in folder.name.lower() and "vcr" not in path.name.lower():
        return {}
    names: dict[str, str] = {}
    for place in (folder.parent, folder):
        for table in sorted(place.glob("VCR_*ImagePath2Id.json")):
            try:
                content = damage.parse_json(table.read_text(encoding="utf-8"))
                names.update((str(int(number)), from_file_name(name)) for name, number in content.items())
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{table} is not a table of VCR's images: {error}. Expected paths of images with their numbers; "
                    "download it again, or move it away if the names are not wanted."
                ) from error
    return names


READER = RegionLmdb
