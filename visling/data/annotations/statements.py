"""Statements about images: files of one JSON object per line, and NLVR2 (Suhr, Zhou et al. 2019).

NLVR2    {split}.json, also in nlvr2/, in data/ and in its folders balanced/ and unbalanced/ ("balanced_dev"). Fields
         that are read: identifier, sentence, label ("True" or "False"; none for hidden splits). An identifier has four
         fields, split-set-pair-sentence ("dev-850-0-1"); the first three and "-img0" or "-img1" name the left and the
         right image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visling.data.annotations.files import read_json_lines, text_field
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
    """Statements of a file in its order.

    Raises:
        DataError: a line is not JSON or lacks a field, a label is not True or False, or an identifier has another
            form or occurs twice.
    """
    records: dict[str, Nlvr2Record] = {}
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        identifier = text_field(row, "identifier", where)
        match = _IDENTIFIER.fullmatch(identifier)
        if match is None:
            raise DataError(
                f"{where}: identifier {identifier!r} is not of the form SPLIT-SET-PAIR-SENTENCE, as in NLVR2. "
                "Files of NLVR v1 have two fields: put them in a folder of the split's name."
            )
        if identifier in records:
            raise DataError(f"{where}: identifier {identifier!r} comes twice. Remove the copy.")
        images = (f"{match['pair']}-img0", f"{match['pair']}-img1")
        records[identifier] = Nlvr2Record(
            id=identifier, images=images, sentence=text_field(row, "sentence", where), label=_read_label(row, where)
        )
    return list(records.values())


def nlvr2_group(identifier: str) -> str:
    """The group of the official consistency score: the identifier without its pair, so all pairs of one sentence of
    one set."""
    split, image_set, _, sentence = identifier.rsplit("-", 3)
    return f"{split}-{image_set}--{sentence}"


def _read_label(row: Mapping[str, Any], where: str) -> bool | None:
    value = row.get("label")
    if value is None:
        return None
    if not isinstance(value, str) or value.lower() not in ("true", "false"):
        raise DataError(
            f'{where}: label {value!r} is unknown; expected "True" or "False", or no label for a hidden split.'
        )
    return value.lower() == "true"
