"""Reading JSON, JSON lines and lists of annotation files, with errors that name the file and the line."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from visling import damage
from visling.errors import DataError, VislingError
from visling.image_ids import from_file_name

_PRINTABLE = re.compile(r"[!-~]")
"""ASCII characters that are neither blanks nor control characters nor accents: nearly every text has one."""


def has_words(text: str) -> bool:
    """Whether anything is left of a text once BERT's tokeniser has removed blanks, control characters and accents."""
    return _PRINTABLE.search(text) is not None or any(
        character.isprintable()
        and not character.isspace()
        and character != "\ufffd"
        and not unicodedata.category(character).startswith("M")
        for character in text
    )


def is_split(name: str, split: str) -> bool:
    """Whether the name of a part of a data set is this split, with or without a year: "train2014" is "train",
    "trainval2014" is not."""
    return re.fullmatch(re.escape(split) + r"(\d{4})?", name) is not None


def the_one(matching: list[Path], pattern: str, root: Path, seen: list[Path]) -> Path:
    """The single file among those that match.

    Raises:
        DataError: none matches (names the files that are present), or several do.
    """
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise DataError(
            f"several files under {root} match {pattern}: {', '.join(file.name for file in matching)}. "
            "Name the split in full, with its year."
        )
    present = ", ".join(sorted(file.name for file in seen)) or "no file of this kind"
    raise DataError(
        f"no file {pattern} under {root} or its annotation folders; found {present}. Check the folder and the split."
    )


class Layout:
    """A context in which the entries of a file are taken apart: what goes wrong there because an entry is not of the
    layout becomes a `DataError` that says which one, and what it lacks or holds.

    Example:
        with Layout(path, "question") as at:
            for at.entry, row in enumerate(rows):
                ...

    Args:
        unit: what `entry` names.
    """

    def __init__(self, path: Path, unit: str = "entry") -> None:
        self.path, self.unit = path, unit
        self.entry: Any = None
        """Number or name of the entry at hand; None = the file as a whole."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, damage.LAYOUT) and not isinstance(error, VislingError):
            where = "it" if self.entry is None else f"{self.unit} {self.entry!s:.80}"
            raise DataError(
                f"{self.path}: {where} {damage.describe_layout(error)[:300]}. The file is damaged or of another "
                "layout: compare it with the official one, or download it again."
            ) from error


def optional_text(value: Any) -> str:
    """A field that must be a text; empty for null.

    Raises:
        TypeError: it is something else.
    """
    if value is None or isinstance(value, str):
        return value or ""
    raise TypeError(f"{value!r:.60}, where a text is expected")


def plain_id(value: Any) -> str:
    """An id, which must be a text or a whole number, as a text.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise TypeError(f"{value!r:.60}, where an id is expected")


def read_json(path: Path) -> Any:
    """Contents of a JSON annotation file.

    Raises:
        DataError: the file is missing, truncated or not JSON; names the position.
    """
    try:
        return damage.parse_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"no annotation file {path}. Check the path.") from error
    except ValueError as error:
        where = "somewhere"
        if isinstance(error, json.JSONDecodeError):
            where = f"line {error.lineno}, character {error.pos}"
        elif isinstance(error, UnicodeDecodeError):
            where = f"byte {error.start}"
        raise DataError(
            f"{path} is truncated or not JSON: {error} ({where} of {path.stat().st_size} bytes). Download it again."
        ) from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a text file with their numbers from 1. Only line feeds end a line: captions hold other characters that
    Python treats as line ends.

    Raises:
        DataError: the file is missing, or a line is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield (
                    number,
                    line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8"),
                )
    except FileNotFoundError as error:
        raise DataError(f"no annotation file {path}. Check the path.") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: line {number}, byte {error.start}: {error.reason}. "
            "Convert it, or download it again."
        ) from error


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a file with one JSON object per line, with their line numbers from 1; blank lines are skipped.

    Raises:
        DataError: the file is missing or truncated, or a line holds something else.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = damage.parse_json(line)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number} is not a JSON object: {error}. "
                "The file may be truncated: copy or download it again."
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number} is a JSON {type(row).__name__}; "
                "expected one object per line, as in the official files."
            )
        yield number, row


def read_ids(path: Path) -> frozenset[str]:
    """Image ids of a list with one per line; names of image files are accepted too.

    Raises:
        DataError: the file is missing or not UTF-8.
    """
    return frozenset(from_file_name(line.strip()) for _, line in read_lines(path) if line.strip())


def entries(content: Any, name: str, keys: tuple[str, ...], path: Path) -> list[dict[str, Any]]:
    """The list `name` of a COCO-style file, each entry with the given keys.

    Raises:
        DataError: the list or a key is missing.
    """
    listed = content.get(name) if isinstance(content, dict) else None
    if not isinstance(listed, list):
        kind = (
            f"an object with {', '.join(content) or 'nothing'}"
            if isinstance(content, dict)
            else f"a {type(content).__name__}"
        )
        raise DataError(f"{path} must be an object with a list {name!r}; found {kind}.")
    for number, entry in enumerate(listed):
        if not isinstance(entry, dict):
            raise DataError(
                f"{path}: entry {number} of {name!r} must be an object; found a {type(entry).__name__}. Remove it."
            )
        if lacking := [key for key in keys if key not in entry]:
            has = ", ".join(entry) or "nothing"
            raise DataError(
                f"{path}: entry {number} of {name!r} lacks {', '.join(map(repr, lacking))}; found {has}. "
                "Complete it, or remove it."
            )
    return listed


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must be a text.

    Raises:
        DataError: it is missing, empty or something else.
    """
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: field {name!r} must be a text that is not empty; found {value!r}.")
    return value
