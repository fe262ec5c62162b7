"""JSON files of gigabytes, entry by entry: no more of a file is in memory than a window around the entry that is read.

A file may come in chunks: `train_all_questions/train_all_questions_0.json` to `..._9.json` are one object.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from visling.errors import DataError

WINDOW = 1 << 20
"""Bytes that are read at a time."""
LONGEST = 1 << 26
"""Characters of the longest entry; an entry without an end would otherwise fill the memory."""

_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_NEAR = 16
"""Characters before the end of the window in which an error may come from the cut: half a number, half an escape."""


def list_chunks(path: Path) -> list[Path]:
    """The file itself, or the chunks `{name}_*.json` of a folder, 10 after 9.

    Raises:
        DataError: a folder without a chunk.
    """
    if not path.is_dir():
        return [path]
    chunks = sorted(path.glob(f"{path.name}_*.json"), key=lambda file: (len(file.name), file.name))
    if not chunks:
        raise DataError(f"{path} holds no chunk {path.name}_*.json. Unpack it again.")
    return chunks


def stream_object(path: Path) -> Iterator[tuple[str, Any]]:
    """Keys and values of a file that is one JSON object, in its order; a repeated key comes as often as it is there.

    Raises:
        DataError: the file is missing, truncated, not JSON, or not an object.
    """
    with _open(path) as file:
        window = _Window(path, file)
        window.open("{", "an object of entries by id")
        more = window.peek() != "}"
        while more:
            key = window.read_value()
            if not isinstance(key, str):
                raise window.describe_damage(f"expected a text as the id of an entry; found {key!r}")
            window.take(":")
            yield key, window.read_value()
            more = window.take(",}") == ","
        window.close("}")


def stream_list(path: Path) -> Iterator[Any]:
    """Values of a file that is one JSON list.

    Raises:
        DataError: the file is missing, truncated, not JSON, or not a list.
    """
    with _open(path) as file:
        window = _Window(path, file)
        window.open("[", "a list of entries")
        more = window.peek() != "]"
        while more:
            yield window.read_value()
            more = window.take(",]") == ","
        window.close("]")


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise DataError(f"no annotation file {path}. Check the path.") from error


class _Window:
    """The part of a text file that is in memory, and the place in it up to which it has been read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at = "", 0
        self.dropped = 0
        """Characters of the file before the window."""
        self.ended = False

    def open(self, bracket: str, what: str) -> None:
        """Enter the list or object that the file must be."""
        found = self.peek()
        if found and found != bracket:
            kind = {"{": "an object", "[": "a list"}.get(found, f"something that begins with {found!r}")
            raise DataError(f"{self.path} must be {what}; found {kind}.")
        self.take(bracket)

    def close(self, bracket: str) -> None:
        """Leave it, where it was empty, and see that nothing follows."""
        if self.text[self.at - 1 : self.at] != bracket:
            self.take(bracket)
        if self.peek():
            raise self.describe_damage("something follows the end of the JSON value")

    def peek(self) -> str:
        """The next character that is no blank; empty at the end of the file."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            assert blank is not None
            self.at = blank.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self._grow()

    def take(self, allowed: str) -> str:
        """Read one of these characters."""
        found = self.peek()
        if not found or found not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise self.describe_damage(f"expected {expected}; found {found or 'the end of the file'!r}")
        self.at += 1
        return found

    def read_value(self) -> Any:
        """Read one JSON value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # A text that is cut is reported at its first character, everything else where the cut is.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _NEAR
                if self.ended or not cut:
                    raise self.describe_damage(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested without end
                raise self.describe_damage(str(error)) from error
            else:
                if end < len(self.text) or self.ended:  # a number at the end of the window may have more digits
                    self.at = end
                    return value
            if len(self.text) - self.at > LONGEST:
                raise self.describe_damage(f"an entry is longer than {LONGEST} characters")
            self._grow()

    def _grow(self) -> None:
        """Read on, and drop what has been read; twice as much each time for an entry that is longer than the window."""
        kept = self.text[self.at :]
        content = self.file.read(max(WINDOW, len(kept)))
        self.ended = not content
        try:
            more = self.decoder.decode(content, final=self.ended)
        except UnicodeDecodeError as error:
            raise self.describe_damage(f"not UTF-8 text ({error.reason})", len(self.text)) from error
        self.dropped += self.at
        self.text, self.at = kept + more, 0

    def describe_damage(self, what: str, at: int | None = None) -> DataError:
        """The error for a file that is not what it should be.

        Args:
            at: place in the window; None = the one up to which it has been read.
        """
        place = self.dropped + (self.at if at is None else at)
        return DataError(
            f"{self.path} is truncated or not JSON: {what} (character {place}, of {self.path.stat().st_size} bytes). "
            "Download it again."
        )
