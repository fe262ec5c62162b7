"""Files of a region store: their names, manifest, journal, and arrays in safetensors layout."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from visling import damage
from visling.errors import StoreError

SCHEMA = 1
"""Version of the folder's layout; raised when older code could no longer read it."""

FORMAT = "visling regions"
"""What a manifest says it describes."""

MANIFEST, JOURNAL, INDEX = "manifest.json", "journal.jsonl", "index.safetensors"
"""File names: a finished store has a manifest, an unfinished one a journal."""

DETECTOR = "detector"
"""Folder of the detector, in stores of which no other place has it."""

PARTS = "parts"
"""Folder of the stores that several processes write, until they are joined."""

BOXES = "pixel corners x1 y1 x2 y2 of the original image"
"""What a manifest says about the boxes."""

HEADER_BYTES = 4096
"""Reserved for the safetensors header at the front of a shard, so that closing a shard does not copy its features."""

_DTYPES = {"float32": "F32", "float16": "F16", "int16": "I16", "int32": "I32", "int64": "I64", "uint8": "U8"}
"""NumPy's name of a type -> that of safetensors."""
_KNOWN = {code: known for known, code in _DTYPES.items()}
"""The other way round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """How one array is stored: its type and the width of a row (0 = one number per region)."""

    dtype: str
    width: int

    @property
    def row_bytes(self) -> int:
        """Size of one region's entry."""
        return int(np.dtype(self.dtype).itemsize) * max(self.width, 1)

    def shape(self, rows: int) -> tuple[int, ...]:
        """Shape of the array for a number of regions."""
        return (rows, self.width) if self.width else (rows,)


class Placement(NamedTuple):
    """Where the regions of an image lie in a store."""

    first_row: int
    """Counted over all shards."""
    regions: int
    """How many the image has."""
    width: int
    """Of the image, in pixels."""
    height: int


def shard_name(number: int) -> str:
    """File name of a finished shard."""
    return f"shard-{number:05d}.safetensors"


def part_name(number: int, field: str) -> str:
    """File name of one field of a shard that is still growing; `*` for those of all fields."""
    return f"shard-{number:05d}.{field}.part"


def read_manifest(path: Path) -> dict[str, Any]:
    """Manifest of the store in a folder.

    Raises:
        StoreError: no store there, an unfinished or damaged one, or one of another schema.
    """
    file = path / MANIFEST
    if not file.is_file():
        if (path / JOURNAL).exists() or (path / PARTS).is_dir():
            raise StoreError(
                f"region store {path} is unfinished: writing it was interrupted. "
                "Run the same command again with --resume."
            )
        raise StoreError(
            f"no region store at {path}: expected a folder with {MANIFEST}. Check the path, or extract regions first."
        )
    try:
        manifest = damage.parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(
            f"{file} is damaged or truncated ({error}). Copy the folder again or repeat the extraction."
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{file} does not describe a region store: expected format {FORMAT!r}. Check the path.")
    if manifest.get("schema") != SCHEMA:
        raise StoreError(
            f"region store {path} has schema {manifest.get('schema')}; this version reads schema {SCHEMA}. "
            "Update visling or repeat the extraction."
        )
    return manifest


def recover_journal(file: Path) -> Iterator[dict[str, Any]]:
    """Complete entries of a journal; a last line that an interruption cut short is removed from the file.

    Raises:
        StoreError: an entry is damaged.
    """
    end = 0
    with file.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                os.truncate(file, end)
                return
            end += len(line)
            yield _parse_entry(file, line)


def _parse_entry(file: Path, line: bytes) -> dict[str, Any]:
    """An entry of a journal."""
    try:
        entry = damage.parse_json(line)
    except ValueError as error:
        raise explain_journal(file, error) from error
    if not isinstance(entry, dict):
        raise explain_journal(file, f"an entry is a {type(entry).__name__}")
    return entry


def explain_journal(file: Path, what: object) -> StoreError:
    """The error for a journal that cannot be read."""
    return StoreError(f"{file} is damaged ({what}): the folder cannot be resumed. Delete it and start again.")


def committed_ids(path: Path) -> frozenset[str]:
    """Ids of the images in a folder's store, finished or not; none without a store. Nothing is changed.

    Raises:
        StoreError: the store is damaged.
    """
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        try:
            return frozenset(decode_ids(read_tensors(locate_file(path, manifest["index"]))["ids"]))
        except FileNotFoundError as error:
            raise explain_store(path, f"it lacks {error.filename}") from error
        except StoreError:
            raise
        except damage.LAYOUT as error:
            raise explain_store(path, error) from error
    file = path / JOURNAL
    if not file.is_file():
        return frozenset()
    content = file.read_bytes()
    entries = [_parse_entry(file, line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    try:
        return frozenset(check_id(image_id) for entry in entries for image_id, *_ in entry.get("images", ()))
    except damage.LAYOUT as error:
        raise explain_journal(file, error) from error


def check_id(image_id: Any) -> str:
    """An image id as a file holds it.

    Raises:
        TypeError: it is no text.
    """
    if not isinstance(image_id, str):
        raise TypeError(f"{image_id!r:.80} is no image id")
    return image_id


def decode_ids(numbers: NDArray[Any]) -> list[str]:
    """The ids of an index: UTF-8, a line each."""
    joined = numbers.tobytes().decode("utf-8")
    return joined.split("\n") if joined else []


def explain_store(path: Path, what: object) -> StoreError:
    """The error for a store that is not what its manifest says."""
    return StoreError(f"region store {path} is damaged: {what}. Copy the folder again or repeat the extraction.")


def locate_file(path: Path, entry: Any) -> Path:
    """The file that an entry of a manifest names, which lies in the store's folder.

    Raises:
        StoreError: the entry does not name a file of the folder, or not its size and digest.
    """
    kinds = {"file": str, "bytes": int, "sha256": str}
    if not isinstance(entry, dict) or not all(type(entry.get(name)) is kind for name, kind in kinds.items()):
        raise explain_store(
            path, f"its manifest lists {entry!r:.80} where a file with its size and SHA-256 is expected"
        )
    name = entry["file"]
    if Path(name).name != name or "\\" in name or "\0" in name:
        raise explain_store(path, f"its manifest names {name!r:.80}, which is no file of the folder")
    return path / str(name)


def encode_entry(entry: Mapping[str, Any]) -> bytes:
    """One line of a journal."""
    return json.dumps(entry, separators=(",", ":")).encode("utf-8") + b"\n"


def describe_file(file: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file, as the manifest lists them."""
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": hash_file(file)}


def hash_file(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def write_atomically(file: Path, *parts: bytes | memoryview) -> None:
    """Write a file so that it is either complete or absent, whatever interrupts the writing."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as target:
        for part in parts:
            target.write(part)
        target.flush()
        os.fsync(target.fileno())
    temporary.replace(file)


# Arrays in safetensors layout: the length of a header in eight bytes, the header as JSON, then the numbers. The store
# maps them itself: a shard grows by rows and is larger than memory.


def describe_tensor(dtype: str, shape: tuple[int, ...], start: int) -> dict[str, Any]:
    """Entry of the header for an array of contiguous numbers that begins at byte `start` behind the header."""
    length = int(np.dtype(dtype).itemsize) * math.prod(shape)
    return {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, start + length]}


def encode_header(entries: Mapping[str, Any], size: int | None = None) -> bytes:
    """Length and header, padded with spaces to `size` bytes in all, else to a multiple of eight."""
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    length = -(-len(text) // 8) * 8 if size is None else size - 8
    assert len(text) <= length, "the header outgrew the space reserved for it"
    return length.to_bytes(8, "little") + text.ljust(length)


def write_tensors(file: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays atomically, in the order given; widest types first keep all of them aligned."""
    header, parts, start = {}, [], 0
    for name, array in tensors.items():
        header[name] = describe_tensor(str(array.dtype), array.shape, start)
        parts.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        start += array.nbytes
    write_atomically(file, encode_header(header), *parts)


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Header of a file of arrays, and the byte at which the numbers begin.

    Raises:
        StoreError: the file has no such header, or an array of it is not in the file.
    """
    with file.open("rb") as source:
        size = source.seek(0, os.SEEK_END)
        source.seek(0)
        length = int.from_bytes(source.read(8), "little")
        if length > size - 8:
            raise _explain_header(file, f"it claims a header of {length} bytes, the file has {size}")
        content = source.read(length)
    try:
        header = damage.parse_json(content)
        for name, entry in header.items():
            if name != "__metadata__":
                _check_entry(name, entry, size - 8 - length)
    except damage.LAYOUT as error:
        raise _explain_header(file, error) from error
    return header, 8 + length


def _explain_header(file: Path, what: object) -> StoreError:
    return StoreError(f"{file} is damaged: {what}. Copy the file again or repeat the extraction.")


def _check_entry(name: str, entry: Any, size: int) -> None:
    """Refuse an array that is not within the `size` bytes of numbers.

    Raises:
        ValueError: it is not; or others of `damage.LAYOUT`.
    """
    shape, (low, high) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in _KNOWN or not all(type(number) is int and number >= 0 for number in (*shape, low, high)):
        raise ValueError(f"its header describes {name!r:.40} as {entry!r:.120}")
    if high > size or high - low != math.prod(shape) * np.dtype(_KNOWN[entry["dtype"]]).itemsize:
        raise ValueError(f"{name!r:.40} of shape {shape!r:.60} lies in bytes {low} to {high} of {size}")


def load_rows(file: Path, name: str, first: int, rows: int) -> NDArray[Any]:
    """Some rows of an array of a file, read without mapping it: what was read before does not stay in memory."""
    header, start = read_header(file)
    entry = header[name]
    dtype = np.dtype(_KNOWN[entry["dtype"]])
    shape = (rows, *entry["shape"][1:])
    if not 0 <= first <= first + rows <= entry["shape"][0]:
        raise _explain_header(
            file, f"rows {first} to {first + rows} of {name} are asked for, it has {entry['shape'][0]}"
        )
    at = start + entry["data_offsets"][0] + first * dtype.itemsize * math.prod(shape[1:])
    return np.fromfile(file, dtype, math.prod(shape), offset=at).reshape(shape)


def read_tensors(file: Path) -> dict[str, NDArray[Any]]:
    """Arrays of a file as read-only views of the mapped file.

    Raises:
        StoreError: see `read_header`.
    """
    header, start = read_header(file)
    mapped = np.memmap(file, dtype=np.uint8, mode="r")
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            low, high = entry["data_offsets"]
            # A plain array over the mapping: indexing a memmap subclass costs several microseconds more.
            numbers = np.asarray(mapped[start + low : start + high])
            arrays[name] = numbers.view(_KNOWN[entry["dtype"]]).reshape(entry["shape"])
    return arrays
