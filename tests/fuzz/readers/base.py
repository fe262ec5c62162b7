"""What is said of a reader."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visling.data.annotations.tables import Table

ARRAYS_MEMORY = 1 << 30
"""Bytes for what is packed: the readers unpack up to 2^28 bytes of an image or of arrays, and copy them."""


@dataclass(frozen=True, slots=True)
class Reader:
    """A reader and its sample."""

    name: str
    """Unique; "what it reads, which layout"."""
    write: Callable[[Path], None]
    """Puts the files of the sample into an empty folder."""
    read: Callable[[Path], None]
    """Reads the folder, and asserts what is promised of the value."""
    kind: str = ""
    """What the file is, for mutations; as its suffix says if left out."""
    writes: bool = False
    """Whether it writes into the folder, as resuming does."""
    least_memory: int = 0
    """Bytes that it may ask for whatever the size of the file, where its limit is documented; 0 = the common one."""

    @property
    def group(self) -> str:
        """What it reads."""
        return self.name.partition(",")[0]


def writes_json(name: str, content: Any) -> Callable[[Path], None]:
    """Writer of one JSON file."""
    return lambda folder: save(folder / name, json.dumps(content).encode())


def writes_lines(name: str, *rows: Any) -> Callable[[Path], None]:
    """Writer of one file of JSON lines."""
    return lambda folder: save(folder / name, "".join(json.dumps(row) + "\n" for row in rows).encode())


def writes_pickle(name: str, content: Any) -> Callable[[Path], None]:
    """Writer of one pickle."""
    return lambda folder: save(folder / name, pickle.dumps(content, 2))


def writes_text(name: str, text: str) -> Callable[[Path], None]:
    """Writer of one text file."""
    return lambda folder: save(folder / name, text.encode())


def writes_all(*writers: Callable[[Path], None]) -> Callable[[Path], None]:
    """Writer of what several write."""

    def write(folder: Path) -> None:
        for one in writers:
            one(folder)

    return write


def save(file: Path, content: bytes) -> None:
    """Write a file, and its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def read_table(file: Path, parse: Callable[[Table], Any]) -> Any:
    """Records of a table of one's own, whose problems are raised together."""
    table = Table(file)
    records = parse(table)
    table.problems.refuse()
    return records
