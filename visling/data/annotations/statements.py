"""Statements about images: files of one JSON object per line, and NLVR2 (Suhr, Zhou et al. 2019).

NLVR2    {split}.json, also in nlvr2/, in data/ and in its folders balanced/ and unbalanced/ ("balanced_dev"). Fields
         that are read: identifier, sentence, label ("True" or "False"; none for hidden splits). An identifier has four
         fields, split-set-pair-sentence ("dev-850-0-1"); the first three and "-img0" or "-img1" name the left and the
         right image.
LXMERT   Files of the same kind of name in data/nlvr2/ (train, valid, test, hidden) that hold one list. Fields:
         identifier, sent, img0, img1, label (0 or 1; none for hidden splits).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visling.data.annotations.files import read_json, read_json_lines, read_lines, text_field
from visling.data.annotations.tables import FILL_IN, Row, Table
from visling.errors import DataError
from visling.types import Record

_NLVR2_FOLDERS = (".", "nlvr2", "data", "balanced", "data/balanced", "unbalanced", "data/unbalanced")

_IDENTIFIER = re.compile(r"(?P<pair>(?P<split>[a-z]\w*)-(?P<set>\d+)-\d+)-(?P<sentence>\d+)")


@dataclass(frozen=True, kw_only=True)
class Nlvr2Record(Record):
    """One sentence about a left and a right image; the id is the official identifier."""

    sentence: str
    label: bool | None
    """None where the file has none."""


def find_nlvr2(root: Path, split: str) -> Path | None:
    """The file of a split, if a folder has one."""
    return next((file for folder in _NLVR2_FOLDERS if (file := root / folder / f"{split}.json").is_file()), None)


def read_nlvr2(path: Path) -> list[Nlvr2Record]:
    """Statements of an official file, or of LXMERT's, in its order.

    Raises:
        DataError: a line is not JSON or lacks a field, a label is not True or False, or an identifier has another
            form or occurs twice.
    """
    records: dict[str, Nlvr2Record] = {}
    for where, row in _read_rows(path):
        identifier = text_field(row, "identifier", where)
        match = _IDENTIFIER.fullmatch(identifier)
        if match is None:
            raise DataError(
                f"{where}: identifier {identifier!r} is not of the form SPLIT-SET-PAIR-SENTENCE, as in NLVR2. "
                "Files of NLVR v1 have two fields: put them in a folder of the split's name."
            )
        if identifier in records:
            raise DataError(f"{where}: identifier {identifier!r} comes twice. Remove the copy.")
        of_lxmert = "sent" in row
        images = (f"{match['pair']}-img0", f"{match['pair']}-img1")
        records[identifier] = Nlvr2Record(
            id=identifier,
            images=(text_field(row, "img0", where), text_field(row, "img1", where)) if of_lxmert else images,
            sentence=text_field(row, "sent" if of_lxmert else "sentence", where),
            label=_read_label(row, where, of_lxmert=of_lxmert),
        )
    return list(records.values())


def _read_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each statement stands, and its fields."""
    first = next((line.strip() for _, line in read_lines(path) if line.strip()), "")
    if not first.startswith("["):
        for number, row in read_json_lines(path):
            yield f"{path}, line {number}", row
        return
    content = read_json(path)
    if not isinstance(content, list):
        raise DataError(f"{path} must be a list of statements; found a {type(content).__name__}.")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, entry {number} is a {type(row).__name__}; expected an object, as in LXMERT's files."
            )
        yield f"{path}, entry {number}", row


def nlvr2_group(identifier: str) -> str:
    """The group of the official consistency score: the identifier without its pair, so all pairs of one sentence of
    one set."""
    parts = identifier.rsplit("-", 3)
    if len(parts) < 4:  # of one's own file: every pair is a group
        return identifier
    split, image_set, _, sentence = parts
    return f"{split}-{image_set}--{sentence}"


def table_statements(table: Table) -> list[Nlvr2Record]:
    """Statements of a file of one's own. Fields: `image1`, `image2`, `text` (or `sentence`), and `label` (true or
    false, yes or no, 1 or 0), which a file without any label lacks; `id` if there are any."""
    first, second = table.require("image1", "left"), table.require("image2", "right")
    text, label = table.require("text", "sentence"), table.find(("label",))
    having = sum(not row.lacks(label) for row in table.rows) if label is not None else 0
    return [
        Nlvr2Record(
            id=identifier,
            images=(row.image(first), row.image(second)),
            sentence=row.text(text),
            label=_table_label(row, label, having) if label is not None and having else None,
        )
        for row, identifier in zip(table.rows, table.ids(), strict=True)
    ]


def _table_label(row: Row, name: str, having: int) -> bool | None:
    value = row.values.get(name)
    if row.lacks(name):
        row.problem(f"no label in field {name!r}; {having} of {len(row.table.rows)} rows have one", FILL_IN)
        return None
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        row.problem(
            f"field {name!r} must be true or false; found {value!r}",
            "Write true, yes or 1, or false, no or 0. For other labels take the task classification.",
        )
    return label


_LABELS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
"""What a file of one's own may say."""


def _read_label(row: Mapping[str, Any], where: str, *, of_lxmert: bool) -> bool | None:
    value = row.get("label")
    if value is None:
        return None
    if of_lxmert and isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if of_lxmert or not isinstance(value, str) or value.lower() not in ("true", "false"):
        expected = "0 or 1" if of_lxmert else '"True" or "False"'
        raise DataError(f"{where}: label {value!r} is unknown; expected {expected}, or no label for a hidden split.")
    return value.lower() == "true"
