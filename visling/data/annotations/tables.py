"""Examples of one's own: JSON lines, a JSON list, CSV or TSV, read into rows that know where they stand.

Files      .jsonl: an object a line. .json: a list of objects. .csv, .tsv: a header and a row per example; cells with
           the delimiter, quotes or line breaks in them stand in quotes. A .csv may be separated by semicolons, as
           spreadsheets in many countries write it.
Encoding   UTF-8, with or without a byte order mark; .csv and .tsv also UTF-16 with one.
Lists      A JSON list, or in a cell of a table several values joined by "|".
Images     Named by a file: a path below the folder of the images, or an absolute one; the suffix may be left out. The
           id of an image is the stem of its file, as in region stores.
Problems   Are collected (`Problems`), so that all of them are reported together; until then, a cell that cannot be
           used reads as empty.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from visling import damage
from visling.data.annotations.files import has_words, read_json, read_lines
from visling.data.annotations.problems import Place, Problems
from visling.errors import DataError
from visling.image_ids import from_file_name

SEPARATOR = "|"
"""Between the values of a list in a cell."""

DELIMITERS: Mapping[str, str] = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", ".json", *DELIMITERS)

FILL_IN = "Fill it in, or remove the row."


def find_table(root: Path, split: str, folder: str = "") -> Path:
    """The file of a split: `{split}.jsonl`, .json, .csv or .tsv.

    Args:
        folder: name of a folder in `root` that is also looked into.
    Raises:
        DataError: there is none (names the files that are present), or several.
    """
    folders = [root, *([root / folder] if folder else [])]
    matching = [file for place in folders for suffix in SUFFIXES if (file := place / f"{split}{suffix}").is_file()]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise DataError(
            f"split {split!r} is in several files: {', '.join(map(str, matching))}. Keep one of them, or give the "
            "folder of the one that is meant."
        )
    present = sorted(
        str(file.relative_to(root))
        for place in folders
        if place.is_dir()
        for file in place.iterdir()
        if file.suffix in SUFFIXES
    )
    raise DataError(
        f"no file of split {split!r} in {' or '.join(map(str, folders))}: expected {split}.jsonl, .json, .csv or "
        f".tsv; found {', '.join(present) or 'no file of these kinds'}. Check the folder and the split."
    )


@dataclass
class ImageNames:
    """Images as tables name them, with the first place of each name."""

    places: dict[str, dict[str, Place]] = field(default_factory=dict)
    """Image id -> name as it was written -> where."""

    def add(self, name: str, place: Place) -> str:
        """The id of a named image."""
        image = from_file_name(name)
        self.places.setdefault(image, {}).setdefault(name, place)
        return image


@dataclass(frozen=True)
class Row:
    """One example of a table. Its methods read a field; a value that cannot be used is added to the problems and read
    as empty, and so is a field that the table lacks, which `Table.require` has reported."""

    table: Table
    place: Place
    values: Mapping[str, Any]
    """By field; empty cells are left out."""

    def lacks(self, name: str) -> bool:
        """Whether a field is missing or blank."""
        value = self.values.get(name)
        return value is None or (isinstance(value, str) and not value.strip())

    def text(self, name: str, *, optional: bool = False) -> str:
        """A text with at least one word; empty if it is optional and left out."""
        value = self.values.get(name)
        if value is None or (isinstance(value, str) and not has_words(value)):
            if not optional and name in self.table.fields:
                self.problem(f"no text in field {name!r}", FILL_IN)
            return ""
        if not isinstance(value, str):
            self.problem(f"field {name!r} must be a text; found {value!r}", "Write it in quotes.")
            return ""
        return value.strip()

    def texts(self, name: str) -> tuple[str, ...]:
        """The texts or numbers of a list, or a single one; a field of JSON may hold either."""
        value = self.values.get(name)
        if isinstance(value, str) and self.table.in_cells:
            value = [part for part in value.split(SEPARATOR) if part.strip()]
        listed = value if isinstance(value, list) else [] if value is None else [value]
        usable = [item for item in listed if isinstance(item, (str, int, float)) and not isinstance(item, bool)]
        if len(usable) < len(listed):
            self.problem(
                f"field {name!r} must hold texts or numbers; found {value!r}", "Write texts in quotes, lists in []."
            )
        return tuple(text for item in usable if (text := str(item).strip()))

    def number(self, name: str) -> float:
        """A finite number; 0 if there is none, which is a problem."""
        value = self.values.get(name)
        try:
            number = float("nan" if value is None or isinstance(value, bool) else value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if abs(number) < float("inf"):
            return number
        if name in self.table.fields:
            found = "nothing" if value is None else repr(value)
            self.problem(f"field {name!r} must be a number; found {found}", FILL_IN)
        return 0.0

    def image(self, name: str) -> str:
        """Id of the image whose file is named."""
        value = self.values.get(name)
        if self.lacks(name):
            if name in self.table.fields:
                self.problem(f"no image in field {name!r}", FILL_IN)
            return ""
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            self.problem(f"field {name!r} must be the name of an image file; found {value!r}", FILL_IN)
            return ""
        file = str(value).strip()
        if "://" in file:
            mend = "Download the images, and name their files."
            self.problem(f"{file} is an address, which is not read", mend, kind="addresses")
            return ""
        return self.table.images.add(file, self.place)

    def problem(self, what: str, mend: str, *, kind: str = "") -> None:
        """Report something that is wrong with this row; see `Problems.add`."""
        self.table.problems.add(self.place, what, mend, kind=kind)


@dataclass(frozen=True)
class Table:
    """The rows of a file, and where problems and names of images are collected."""

    path: Path
    problems: Problems = field(default_factory=Problems)
    images: ImageNames = field(default_factory=ImageNames)

    @property
    def in_cells(self) -> bool:
        """Whether values are cells: texts, not JSON values."""
        return self.path.suffix.lower() in DELIMITERS

    @cached_property
    def rows(self) -> Sequence[Row]:
        """All examples, in the order of the file; what cannot be read is added to the problems."""
        try:
            return list(self._read())
        except DataError as error:
            self.problems.add_error(self.path, error)
            return []

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Names that the header or some row has, in their order; none without rows."""
        if not self.rows:
            return ()
        return tuple(dict.fromkeys([*self._header, *(name for row in self.rows for name in row.values)]))

    @cached_property
    def _header(self) -> tuple[str, ...]:
        """Names of a table with cells."""
        if not self.in_cells:
            return ()
        first: list[str] = next((cells for _, cells in self._cells() if cells), [])
        return tuple(name.strip() or f"(column {number})" for number, name in enumerate(first, start=1))

    def find(self, names: Sequence[str]) -> str | None:
        """The first of these fields that the table has."""
        return next((name for name in names if name in self.fields), None)

    def require(self, *names: str) -> str:
        """The first of these fields that the table has; if it has none, a problem, and the first of all."""
        found = self.find(names)
        if found is None and self.fields:
            close = [match for name in names for match in difflib.get_close_matches(name, self.fields, 1, 0.6)]
            guess = f"Did you mean {close[0]!r}? Rename it." if close else "Add it, or rename one of these."
            wanted = " or ".join(map(repr, names))
            self.problems.add(Place(self.path), f"no field {wanted}; it has {', '.join(self.fields)}", guess)
        return names[0] if found is None else found

    def ids(self, name: str = "id") -> list[str]:
        """Ids of the rows by their field, or their numbers from 1 where the table has none; ids that are missing or
        come twice are problems."""
        if name not in self.fields:
            return [str(number) for number in range(1, len(self.rows) + 1)]
        having = sum(not row.lacks(name) for row in self.rows)
        known: dict[str, Place] = {}
        found = []
        for row in self.rows:
            value = row.values.get(name)
            identifier = "" if isinstance(value, bool) or not isinstance(value, (str, int)) else str(value).strip()
            if row.lacks(name):
                row.problem(
                    f"no id in field {name!r}; {having} of {len(self.rows)} rows have one",
                    "All rows of a file have an id, or none has.",
                )
            elif not identifier:
                row.problem(f"field {name!r} must be a text or a whole number; found {value!r}", "Change the id.")
            elif identifier in known:
                same = f"id {identifier!r} is that of {known[identifier]} too"
                row.problem(same, "Every row needs its own.", kind="ids")
            known.setdefault(identifier, row.place)
            found.append(identifier)
        return found

    def _read(self) -> Iterator[Row]:
        suffix = self.path.suffix.lower()
        if not self.path.is_file():
            raise DataError(self._explain_missing())
        if suffix not in SUFFIXES:
            raise DataError(f"{self.path}: {suffix or 'a name without suffix'} is no format of tables. "
                            f"Name a file that ends in {', '.join(SUFFIXES)}.")  # fmt: skip
        if suffix in DELIMITERS:
            yield from self._read_cells()
        elif suffix == ".json":
            content = read_json(self.path)
            if not isinstance(content, list):
                raise DataError(
                    f"{self.path}: must be a list of objects; found a {type(content).__name__}. "
                    "A file with one object a line is named .jsonl."
                )
            for number, values in enumerate(content, start=1):
                place = Place(self.path, "entry", number)
                if isinstance(values, dict):
                    yield Row(self, place, values)
                else:
                    self.problems.add(place, f"must be an object; found a {type(values).__name__}", "Remove it.")
        else:
            yield from self._read_lines()

    def _read_lines(self) -> Iterator[Row]:
        for number, line in read_lines(self.path):
            place = Place(self.path, "line", number)
            try:
                values = damage.parse_json(line) if line.strip() else None
            except ValueError as error:
                self.problems.add(place, f"not a JSON object: {error}", "Write one object a line.")
                continue
            if isinstance(values, dict):
                yield Row(self, place, values)
            elif line.strip():
                self.problems.add(place, f"a JSON {type(values).__name__}, not an object", "Write one object a line.")

    def _explain_missing(self) -> str:
        """That the file is not there, and which similar one is."""
        folder = self.path.parent
        there = (
            sorted(file.name for file in folder.iterdir() if file.suffix.lower() in SUFFIXES) if folder.is_dir() else []
        )
        close = difflib.get_close_matches(self.path.name, there, 1)
        if self.path.is_dir():
            return f"{self.path}: is a folder, not a file. Name a file in it, or give the folder with --data."
        if close:
            return f"{self.path}: no such file. Did you mean {folder / close[0]}?"
        found = f"found {', '.join(there)}" if there else "found no table"
        return f"{self.path}: no such file; in its folder {found}. Check the path."

    def _read_cells(self) -> Iterator[Row]:
        header = self._header
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(f"{self.path}: the header names {', '.join(map(repr, repeated))} twice. Rename one.")
        for number, (place, cells) in enumerate(self._cells()):
            if number and len(cells) != len(header):
                self.problems.add(
                    place, f"{len(cells)} cells; the header names {len(header)}",
                    "Put quotes around cells that hold the delimiter.",
                )  # fmt: skip
            elif number:
                yield Row(self, place, {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()})

    def _cells(self) -> Iterator[tuple[Place, list[str]]]:
        """Rows of cells with the line in which each begins; blank lines are skipped."""
        text = self._decode()
        first = text.partition("\n")[0]
        delimiter = DELIMITERS[self.path.suffix.lower()]
        if delimiter not in first and ";" in first:
            delimiter = ";"
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        begin = 1
        try:
            for cells in reader:
                if cells:
                    yield Place(self.path, "line", begin), cells
                begin = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{self.path}: is not a table: {error}, in the row that begins in line {begin}. "
                "Check the quotes of its cells."
            ) from error

    def _decode(self) -> str:
        """The text of the file.

        Raises:
            DataError: it is not UTF-8; says how it reads in the encoding that spreadsheets write.
        """
        content = self.path.read_bytes()
        marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        try:
            return content.decode("utf-16" if marked else "utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            begin = content.rfind(b"\n", 0, error.start) + 1
            end = content.find(b"\n", error.start)
            shown = content[begin : len(content) if end < 0 else end].decode("cp1252", "replace").strip()
            raise DataError(
                f"{self.path}: is not UTF-8 text: line {line}, byte {error.start}: {error.reason}; as Windows-1252 the "
                f"line reads {shown[:60]!r}. If that is right, convert the file (iconv -f cp1252 -t utf-8), or save it "
                'as "CSV UTF-8".'
            ) from error
