"""The layouts of feature files, by content. A reader's module is imported when a file asks for it: some need optional
packages."""

from __future__ import annotations

import codecs
import importlib
import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from visling.errors import ConfigError, DataError, nearest
from visling.regions.formats.base import RegionReader, find_file

_HEAD = 4096
"""Bytes at the front of a file by which it is recognised."""

_NUMBERED_JSON = re.compile(r"\d+\.json")

_SIGNATURES = {
    b"PK\x03\x04": "a zip archive of other files (released text files come zipped: unpack them first)",
    b"\x1f\x8b": "a gzip archive (unpack it first)",
}
"""First bytes of a file -> what it is, for messages."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of file: its layouts, how it is recognised, and who reads it."""

    module: str
    """Module that offers `READER`, a subclass of `RegionReader`."""
    layouts: tuple[str, ...]
    """Names of the layouts that the reader knows."""
    description: str
    """What such a file is, for messages."""
    recognises: Callable[[Path], bool]
    """Whether a path is such a file, judged without the reader's module."""


def _is_tab_separated(path: Path) -> bool:
    if not path.is_file():
        return False
    line = _read_head(path).lstrip().partition(b"\n")[0]
    return b"\0" not in line and (b"\t" in line or path.suffix == ".tsv")


def _is_hdf5(path: Path) -> bool:
    return path.is_file() and _read_head(path).startswith(b"\x89HDF\r\n\x1a\n")


def _is_zipped_json(path: Path) -> bool:
    if path.is_dir():
        return any(_NUMBERED_JSON.fullmatch(entry.name) for entry in path.iterdir())
    return _NUMBERED_JSON.fullmatch(PurePosixPath(_read_first_member(path)).name) is not None


def _is_lmdb(path: Path) -> bool:
    file = path / "data.mdb" if path.is_dir() else path
    return file.is_file() and (path.is_dir() or _read_head(file)[16:20] == b"\xde\xc0\xef\xbe")


def _is_numpy(path: Path) -> bool:
    if path.is_dir():
        return any(name.lower().endswith((".npy", ".npz")) for _, _, names in os.walk(path) for name in names)
    return _read_head(path).startswith(b"\x93NUMPY") or _read_first_member(path).endswith(".npy")


def _is_torch(path: Path) -> bool:
    if path.is_dir():
        return False
    magic = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    return _read_head(path)[2:].startswith(magic) or _read_first_member(path).endswith("/data.pkl")


def _read_first_member(path: Path) -> str:
    """Name of the first member of a zip archive that is no folder; empty for other files."""
    head, start = _read_head(path), 0
    while head.startswith(b"PK\x03\x04", start) and start + 30 <= len(head):
        packed, _, length, extra = struct.unpack_from("<2L2H", head, start + 18)
        name = head[start + 30 : start + 30 + length].decode("utf-8", "replace")
        if not name.endswith("/"):
            return name
        start += 30 + length + extra + packed
    return ""


FORMATS: tuple[Format, ...] = (
    Format(
        module="visling.regions.formats.tsv",
        layouts=("bottom-up-attention", "vilbert-tsv", "lxmert-obj36", "volta-tsv"),
        description="tab-separated text, one image per line",
        recognises=_is_tab_separated,
    ),
    Format(
        module="visling.regions.formats.hdf5",
        layouts=("updn-hdf5", "ban-hdf5", "volta-hdf5", "unsupervised-visualbert-hdf5"),
        description="an HDF5 file",
        recognises=_is_hdf5,
    ),
    Format(
        module="visling.regions.formats.zipped_json",
        layouts=("vlbert-json", "vlbert-cc-json"),
        description="a zip archive or a folder of JSON files, one per image",
        recognises=_is_zipped_json,
    ),
    Format(
        module="visling.regions.formats.lmdb",
        layouts=(
            "volta-lmdb",
            "vilbert-lmdb",
            "vilbert-multitask-lmdb",
            "mmf-lmdb",
            "conceptual-captions-lmdb",
            "volta-conceptual-captions-lmdb",
        ),
        description="LMDB: a folder with data.mdb, or that file",
        recognises=_is_lmdb,
    ),
    Format(
        module="visling.regions.formats.numpy_files",
        layouts=("mmf-npy", "pythia-fc6-npy", "vilbert-multitask-npy", "milvlg-npz", "visualbert-npz"),
        description="a folder of .npy or .npz files, one image each",
        recognises=_is_numpy,
    ),
    Format(
        module="visling.regions.formats.torch_files",
        layouts=("visualbert-th",),
        description="a file of torch.save",
        recognises=_is_torch,
    ),
)
"""The first that recognises a path reads it."""


def layouts() -> list[str]:
    """Names of all layouts of this package."""
    return sorted(name for known in FORMATS for name in known.layouts)


def open_reader(path: str | Path, layout: str | None = None) -> RegionReader:
    """Reader of a feature file.

    Args:
        layout: name of a layout, or dotted path of a module of your own that offers `READER`; None = recognised by the
            file's content.
    Raises:
        DataError: the file is missing, unknown, damaged, or not of the layout.
        ConfigError: no such layout, or a module that offers no reader.
    """
    path = find_file(path)
    if layout is not None and "." in layout:
        return _import_reader(layout)(path)
    if layout is not None:
        for known in FORMATS:
            if layout in known.layouts:
                return _import_reader(known.module)(path, layout)
        raise ConfigError(
            f"no layout {layout!r} of region features. {nearest(layout, layouts())} "
            "A reader of your own is given as my_package.my_module."
        )
    for known in FORMATS:
        if known.recognises(path):
            return _import_reader(known.module)(path)
    readable = "; ".join(f"{', '.join(known.layouts)} ({known.description})" for known in FORMATS)
    raise DataError(
        f"{path} is not a known file of region features: it is {_describe_content(path)}. Layouts that can be read: "
        f"{readable}. Name one of them (--layout), or give a reader of your own as my_package.my_module."
    )


def open_sources(paths: Sequence[str | Path], layout: str | None = None) -> tuple[list[RegionReader], list[Path]]:
    """Readers of several feature files, or of the files in a folder, and what lies in such a folder besides.

    A folder that is no layout by itself stands for its files, in the order of their names.

    Raises:
        DataError: see `open_reader`; or two layouts, or features of two kinds, one of which is named.
        ConfigError: see `open_reader`.
    """
    readers: list[RegionReader] = []
    left_out: list[Path] = []
    for path in map(Path, paths):
        files, others = _list_files(path, layout)
        readers += [open_reader(file, layout) for file in files]
        left_out += others
    return readers, left_out


def _list_files(path: Path, layout: str | None) -> tuple[list[Path], list[Path]]:
    """Feature files that a path stands for, and files next to them that are none."""
    own = layout is not None and "." in layout
    known = [each for each in FORMATS if layout is None or layout in each.layouts]
    if own or not path.is_dir() or any(each.recognises(path) for each in known):
        return [path], []
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if any(each.recognises(entry) for each in known)]
    return (files, [entry for entry in entries if entry not in files]) if files else ([path], [])


def _import_reader(module: str) -> type[RegionReader]:
    try:
        reader = getattr(importlib.import_module(module), "READER", None)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"no module {module!r} that reads region features. {nearest(module, layouts())} "
                "A reader of your own is given as my_package.my_module."
            ) from error
        raise ConfigError(
            f"the reader {module} needs the package {error.name}, which is not installed. Install it with pip."
        ) from error
    if not (isinstance(reader, type) and issubclass(reader, RegionReader)):
        raise ConfigError(
            f"module {module} offers no reader: expected READER = a subclass of "
            "visling.regions.formats.base.RegionReader."
        )
    return reader


def _read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def _describe_content(path: Path) -> str:
    """What lies at a path, in a few words."""
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        return (
            f"a folder with {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "an empty folder"
        )
    head = _read_head(path)
    if not head.strip():
        return "an empty file"
    for signature, description in _SIGNATURES.items():
        if head.startswith(signature):
            return description
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut off
    except UnicodeDecodeError:
        return f"binary data that begins with {head[:8].hex(' ')}"
    return f"text that begins with {text[:40]!r}"
