"""Texts, with or without an image, that have one label or several: files of one's own, and those of Hateful Memes.

Files    {split}.jsonl, {split}.json (a list of objects), or {split}.csv and {split}.tsv with a header, in the folder or
         in its folder classification/.
Fields   id (otherwise the number of the row), image or img (none for texts alone), text or question, sentence, caption,
         text2 (a second text), and label (one) or labels (several; in tables joined by "|"). Other names are given as
         `FieldNames`. A file without any label is a hidden split.
Images   Known by the stem of their file name: "img/01235.png" is 01235.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from visling.data.annotations.files import read_json, read_json_lines
from visling.errors import DataError
from visling.image_ids import from_file_name
from visling.types import Record

SEPARATOR = "|"
"""Between the labels of one example in tables and submissions."""

_FOLDERS = (".", "classification")
_TABLES = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (".jsonl", ".json", *_TABLES)

_Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, for messages, and its fields."""


@dataclass(frozen=True, kw_only=True)
class LabelledText(Record):
    """A text, its image if it has one, and its labels."""

    text: str
    """May be empty where there is an image."""
    second: str | None
    """A second text."""
    labels: tuple[str, ...] | None
    """One label, or any number of them if `several`; None = unknown."""
    several: bool
    """Whether the file gives lists of labels."""


@dataclass(frozen=True, kw_only=True)
class FieldNames:
    """Names of the fields of a file; the first of each that the file has is read."""

    id: tuple[str, ...] = ("id",)
    image: tuple[str, ...] = ("image", "img")
    text: tuple[str, ...] = ("text", "question", "sentence", "caption")
    second: tuple[str, ...] = ("text2",)
    label: tuple[str, ...] = ("label", "labels")
    required: frozenset[str] = frozenset()
    """Those of the above that the file must have, since someone has named them."""


def find_classification(root: Path, split: str) -> Path:
    """The file of a split.

    Raises:
        DataError: there is none (names the files that are present), or several.
    """
    folders = [root / folder for folder in _FOLDERS]
    matching = [file for folder in folders for suffix in _SUFFIXES if (file := folder / f"{split}{suffix}").is_file()]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise DataError(
            f"split {split!r} is in several files: {', '.join(map(str, matching))}. Keep one of them, or give the "
            "folder of the one that is meant."
        )
    present = sorted(
        str(file.relative_to(root))
        for folder in folders
        if folder.is_dir()
        for file in folder.iterdir()
        if file.suffix in _SUFFIXES
    )
    raise DataError(
        f"no file of split {split!r} in {root} or {root / 'classification'}: expected {split}.jsonl, .json, .csv or "
        f".tsv; found {', '.join(present) or 'no file of these kinds'}. Check the folder and the split."
    )


def read_classification(path: Path, names: FieldNames | None = None) -> list[LabelledText]:
    """Examples of a file in its order.

    Raises:
        DataError: the file or a row cannot be read, a field is missing or holds something else, an id comes twice, only
            some rows have an image, a label or an id, or some have one label and others a list; names the row.
    """
    rows = list(_read_rows(path))
    present = {name: None for _, row in rows for name in row}
    found = _find_fields(path, list(present), names or FieldNames()) if rows else {}
    for what in ("id", "image"):
        _refuse_gaps(rows, found.get(what), what)
    in_table = path.suffix in _TABLES
    several = [_gives_list(row, found, in_table) for _, row in rows]
    labelled = [several_labels is not None for several_labels in several]
    if any(labelled) and not all(labelled):
        where = rows[labelled.index(False)][0]
        raise DataError(
            f"{where}: no label in field {found['label']!r}; {sum(labelled)} of {len(rows)} rows have one. "
            "Label all rows, or none in a hidden split."
        )
    if len(kinds := {kind for kind in several if kind is not None}) > 1:
        where = rows[several.index(not several[0])][0]
        raise DataError(
            f"{where}: field {found['label']!r} holds {'one label' if several[0] else 'a list'}, in the rows before it "
            f"{'a list' if several[0] else 'one label'}. Give a list in every row, or in none."
        )
    records: dict[str, LabelledText] = {}
    places: dict[str, str] = {}
    for number, (where, row) in enumerate(rows, start=1):
        record = _read_record(row, where, found, number=number, several=kinds == {True}, in_table=in_table)
        if record.id in records:
            raise DataError(f"{where}: id {record.id!r} is that of {places[record.id]} too. Every row needs its own.")
        records[record.id], places[record.id] = record, where
    return list(records.values())


def _read_rows(path: Path) -> Iterator[_Row]:
    if path.suffix in _TABLES:
        yield from _read_table(path, _TABLES[path.suffix])
    elif path.suffix == ".json":
        content = read_json(path)
        if not isinstance(content, list):
            raise DataError(
                f"{path} must be a list of objects; found a {type(content).__name__}. "
                "A file with one object a line is named .jsonl."
            )
        for number, row in enumerate(content, start=1):
            if not isinstance(row, dict):
                raise DataError(f"{path}, entry {number} must be an object; found a {type(row).__name__}.")
            yield f"{path}, entry {number}", row
    else:
        for number, row in read_json_lines(path):
            yield f"{path}, line {number}", row


def _read_table(path: Path, delimiter: str) -> Iterator[_Row]:
    """Rows of a table; empty cells are left out."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    cells = sum(value is not None for key, value in row.items() if key is not None)
                    cells += len(row.get(None) or ())
                    raise DataError(
                        f"{where} has {cells} cells; the header names {len(reader.fieldnames or ())}. "
                        "Put quotes around cells that hold the delimiter."
                    )
                yield where, {name: value for name, value in row.items() if value.strip()}
    except csv.Error as error:
        raise DataError(f"{path} is not a table: {error}. Check the quotes of its cells.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start}: {error.reason}. Convert it.") from error


def _find_fields(path: Path, present: Sequence[str], names: FieldNames) -> dict[str, str]:
    """What is meant -> the field of this file that holds it; what the file lacks is left out."""
    found = {}
    for field in fields(names):
        if field.name == "required":
            continue
        accepted = getattr(names, field.name)
        name = next((name for name in accepted if name in present), None)
        if name is not None:
            found[field.name] = name
        elif field.name in names.required:
            raise DataError(f"{path} has no field {accepted[0]!r}; it has {', '.join(present)}. Name one of these.")
    if "text" not in found and "image" not in found:
        raise DataError(
            f"{path} has neither a text ({', '.join(names.text)}) nor an image ({', '.join(names.image)}); its fields "
            f"are {', '.join(present)}. Rename them, or name them with --set task_settings.text_field=FIELD."
        )
    return found


def _refuse_gaps(rows: Sequence[_Row], name: str | None, what: str) -> None:
    """Refuse a field that only some rows have."""
    if name is None:
        return
    lacking = [where for where, row in rows if row.get(name) in (None, "")]
    if lacking:
        raise DataError(
            f"{lacking[0]}: no {what} in field {name!r}; {len(rows) - len(lacking)} of {len(rows)} rows have one. "
            f"All rows of a split have {'one' if what == 'image' else 'an id'}, or none has."
        )


def _gives_list(row: Mapping[str, Any], found: Mapping[str, str], in_table: bool) -> bool | None:
    """Whether a row has a list of labels; None = it has no label."""
    name = found.get("label")
    if name is None:
        return None
    if in_table and name == "labels":
        return True
    value = row.get(name)
    return None if value is None or value == "" else isinstance(value, list)


def _read_record(
    row: Mapping[str, Any], where: str, found: Mapping[str, str], *, number: int, several: bool, in_table: bool
) -> LabelledText:
    def get(what: str, kinds: tuple[type, ...], expected: str) -> Any:
        name = found.get(what)
        value = None if name is None else row.get(name)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise DataError(f"{where}: field {name!r} must be {expected}; found {value!r}.")
        return value

    identifier = get("id", (str, int), "a text or a whole number")
    image = get("image", (str, int), "the name of an image file")
    text, second = ((get(what, (str,), "a text") or "").strip() for what in ("text", "second"))
    if not text and image is None:
        raise DataError(f"{where}: neither a text nor an image. Fill one in, or remove the row.")
    labels = None
    if (name := found.get("label")) is not None:
        value = row.get(name)
        if several and in_table:
            value = [label for part in (value or "").split(SEPARATOR) if (label := part.strip())]
        labels = _read_labels(value, f"{where}: field {name!r}")
    return LabelledText(
        id=str(number if identifier is None else identifier),
        images=() if image is None else (from_file_name(str(image)),),
        text=text,
        second=second or None,
        labels=labels,
        several=several,
    )


def _read_labels(value: Any, where: str) -> tuple[str, ...] | None:
    if value is None or value == "":
        return None
    listed = value if isinstance(value, list) else [value]
    for label in listed:
        if not isinstance(label, (str, int)) or not str(label).strip():
            raise DataError(f"{where} must hold texts or whole numbers as labels; found {label!r}.")
        if isinstance(value, list) and SEPARATOR in str(label):
            raise DataError(f"{where}: label {label!r} holds {SEPARATOR!r}, which separates the labels of an example.")
    return tuple(dict.fromkeys(str(label).strip() for label in listed))
