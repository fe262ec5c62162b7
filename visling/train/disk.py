"""Files that are written as a whole or not at all, whatever interrupts the writer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from visling import damage
from visling.errors import RunError


@contextlib.contextmanager
def explain_failure(path: Path) -> Iterator[None]:
    """Turn errors of writing into a RunError that says what to do; torch and safetensors have their own classes for a
    full disk."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"cannot write to {path}: {error} ({_describe_free_space(path)} free). What was saved before is intact. "
            "Free space or fix permissions."
        ) from error


def _describe_free_space(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    return f"{shutil.disk_usage(path).free / 1e9:.2f} GB"


def write_json(path: Path, values: Any, *, indent: int | None = 2) -> None:
    """Replace a JSON file, which must not hold NaN or infinity.

    Raises:
        RunError: the disk is full or not writable.
    """
    with explain_failure(path.parent), _replace_file(path) as part:
        part.write_text(json.dumps(values, indent=indent, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Contents of a JSON file of a run.

    Raises:
        RunError: it cannot be read, or holds no object.
    """
    try:
        values = damage.parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}. It is damaged: start again in another --out.") from error
    if not isinstance(values, dict):
        raise RunError(f"{path} holds {type(values).__name__}, not a run's settings. Start again in another --out.")
    return values


@contextlib.contextmanager
def _replace_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` in one step, or is deleted on failure."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        flush(part)
        part.replace(path)
        flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


def link_or_copy(source: str, target: str) -> None:
    """Make a file appear at a second place, which may be taken."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
