"""Files of a region store: manifest, journal and shards of tensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visling.errors import StoreError

SCHEMA = 1
"""Version of the folder's layout; raised when older code could no longer read it."""

FORMAT = "visling regions"

BOXES = "pixel corners x1 y1 x2 y2 of the original image"

HEADER = 4096
"""Bytes kept free for the safetensors header at the front of a shard, so that closing a shard does not copy its
features."""

CHUNK = 1 << 24

_DTYPES = {"float32": "F32", "float16": "F16", "int16": "I16", "int32": "I32", "int64": "I64", "uint8": "U8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """How one array is stored: its type and the width of a row (0 = one number per region)."""

    dtype: str
    width: int

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize) * max(self.width, 1)

    def shape(self, rows: int) -> tuple[int, ...]:
        return (rows, self.width) if self.width else (rows,)


def read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    if not file.is_file():
        if (path / "journal.jsonl").exists():
            raise StoreError(
                f"region store {path} is unfinished: its writing was interrupted. Run the same command again with --resume."
            )
        raise StoreError(
            f"no region store at {path}: expected a folder with manifest.json. Check the path, or extract regions first."
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{file} is damaged or truncated ({error}). Copy the folder again or extract anew.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{file} does not describe a region store: expected format {FORMAT!r}. Check the path.")
    if manifest.get("schema") != SCHEMA:
        raise StoreError(
            f"region store {path} has schema {manifest.get('schema')}; this version reads schema {SCHEMA}. Update visling or extract anew."
        )
    return manifest


def read_journal(file: Path) -> list[dict[str, Any]]:
    """Complete entries; a torn last line is what the interruption cut, and is removed from the file."""
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) != len(content):
        os.truncate(file, len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except json.JSONDecodeError as error:
        raise StoreError(
            f"{file} is damaged ({error}): the folder cannot be resumed. Delete it and start again."
        ) from error


def journal_line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode("utf-8") + b"\n"


def plain_field(field: Field) -> dict[str, Any]:
    return {"dtype": field.dtype, "width": field.width}


def tensor_entry(field: Field, rows: int, start: int) -> dict[str, Any]:
    return {
        "dtype": _DTYPES[field.dtype],
        "shape": list(field.shape(rows)),
        "data_offsets": [start, start + field.row_bytes * rows],
    }


def describe_file(file: Path) -> dict[str, Any]:
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256_of(file)}


def sha256_of(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def write_whole(file: Path, content: bytes) -> None:
    """Write a file so that it is there completely or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as target:
        target.write(content)
        target.flush()
        os.fsync(target.fileno())
    temporary.replace(file)


def write_tensor_file(file: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """A safetensors file of arrays, widest types first."""
    header, parts, length = {}, [], 0
    for name, array in tensors.items():
        content = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": _DTYPES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [length, length + len(content)],
        }
        parts.append(content)
        length += len(content)
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text = text.ljust(-(-len(text) // 8) * 8)
    write_whole(file, len(text).to_bytes(8, "little") + text + b"".join(parts))


def tensor_header(file: Path) -> tuple[dict[str, Any], int]:
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        return json.loads(source.read(length)), 8 + length


def tensor_metadata(file: Path) -> dict[str, str]:
    metadata: dict[str, str] = tensor_header(file)[0].get("__metadata__", {})
    return metadata


def read_tensors(file: Path) -> dict[str, NDArray[Any]]:
    """Arrays of a safetensors file as read-only views of the mapped file."""
    header, start = tensor_header(file)
    types = {code: dtype for dtype, code in _DTYPES.items()}
    mapped = np.memmap(file, dtype=np.uint8, mode="r")
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            low, high = entry["data_offsets"]
            # A plain array over the mapping: indexing a memmap subclass costs several microseconds more.
            arrays[name] = (
                np.asarray(mapped[start + low : start + high]).view(types[entry["dtype"]]).reshape(entry["shape"])
            )
    return arrays
