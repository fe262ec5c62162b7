"""Texts, with or without an image, that have one label or several: files of one's own, and those of Hateful Memes.

Files    As in `tables`; of an official layout {split}.jsonl, .json, .csv or .tsv, in the folder or in its folder
         classification/.
Fields   id (otherwise the number of the row), image or img (none for texts alone), text or question, sentence, caption,
         text2 (a second text), and label (one) or labels (several; in tables joined by "|"). Other names are given as
         `FieldNames`. A file without any label is a hidden split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from visling.data.annotations.problems import Place
from visling.data.annotations.tables import FILL_IN, SEPARATOR, Row, Table, find_table
from visling.types import Record


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
    """The file of a split, in a folder or its folder classification/; see `find_table`."""
    return find_table(root, split, "classification")


def read_classification(path: Path, names: FieldNames | None = None) -> list[LabelledText]:
    """Examples of a file in its order.

    Raises:
        DataError: see `labelled_texts`.
    """
    table = Table(path)
    records = labelled_texts(table, names)
    table.problems.refuse()
    return records


def labelled_texts(table: Table, names: FieldNames | None = None) -> list[LabelledText]:
    """Examples of a table in its order.

    Problems: the file or a row cannot be read, a field is missing or holds something else, an id comes twice, only some
    rows have an image, a label or an id, or some have one label and others a list.
    """
    names = FieldNames() if names is None else names
    found = _find_fields(table, names)
    ids = table.ids(found.get("id", ""))
    several = _check_labels(table, found)
    image_field, text_field, second_field = (found.get(what, "") for what in ("image", "text", "second"))
    with_images = sum(not row.lacks(image_field) for row in table.rows)
    records = []
    for row, identifier in zip(table.rows, ids, strict=True):
        if row.lacks(image_field) and with_images:
            row.problem(
                f"no image in field {image_field!r}; {with_images} of {len(table.rows)} rows have one",
                "All rows of a file have one, or none has.",
            )
        elif row.lacks(image_field) and row.lacks(text_field):
            row.problem("neither a text nor an image", FILL_IN)
        records.append(
            LabelledText(
                id=identifier,
                images=() if row.lacks(image_field) else (row.image(image_field),),
                text=row.text(text_field, optional=True),
                second=row.text(second_field, optional=True) or None,
                labels=_read_labels(row, found.get("label"), several=several),
                several=several,
            )
        )
    return records


def _find_fields(table: Table, names: FieldNames) -> dict[str, str]:
    """What is meant -> the field of this file that holds it; what the file lacks is left out."""
    found = {}
    for field in fields(names):
        if field.name == "required":
            continue
        accepted = getattr(names, field.name)
        if field.name in names.required:
            table.require(*accepted)
        if (name := table.find(accepted)) is not None:
            found[field.name] = name
    if table.fields and "text" not in found and "image" not in found:
        table.problems.add(
            Place(table.path),
            f"neither a text ({', '.join(names.text)}) nor an image ({', '.join(names.image)}); its fields are "
            f"{', '.join(table.fields)}",
            "Rename them, or name them with --set task_settings.text_field=FIELD.",
        )
    return found


def _check_labels(table: Table, found: Mapping[str, str]) -> bool:
    """Whether the rows have lists of labels; reports rows that differ from the first, or have none where others do."""
    name = found.get("label")
    if name is None:
        return False
    kinds = [_gives_list(row, name) for row in table.rows]
    labelled = sum(kind is not None for kind in kinds)
    several = next((kind for kind in kinds if kind is not None), False)
    spoken = {True: "a list", False: "one label"}
    for row, kind in zip(table.rows, kinds, strict=True):
        if kind is None and labelled:
            row.problem(
                f"no label in field {name!r}; {labelled} of {len(table.rows)} rows have one",
                "Label all rows, or none in a hidden split.",
            )
        elif kind is not None and kind != several:
            row.problem(
                f"field {name!r} holds {spoken[kind]}, in the rows before it {spoken[several]}",
                "Give a list in every row, or in none.",
            )
    return several


def _gives_list(row: Row, name: str) -> bool | None:
    """Whether a row has a list of labels; None = it has no label."""
    if row.table.in_cells and name == "labels":
        return True
    value = row.values.get(name)
    return None if value is None or value == "" else isinstance(value, list)


def _read_labels(row: Row, name: str | None, *, several: bool) -> tuple[str, ...] | None:
    value = None if name is None else row.values.get(name)
    if several and row.table.in_cells:
        value = [label for part in (value or "").split(SEPARATOR) if (label := part.strip())]
    if value is None or value == "":
        return None
    listed: Sequence[Any] = value if isinstance(value, list) else [value]
    for label in listed:
        if not isinstance(label, (str, int)) or not str(label).strip():
            row.problem(f"field {name!r} must hold texts or whole numbers as labels; found {label!r}", FILL_IN)
            return None
        if isinstance(value, list) and SEPARATOR in str(label):
            row.problem(
                f"field {name!r}: label {label!r} holds {SEPARATOR!r}, which separates the labels of an example",
                "Use another mark.",
            )
    return tuple(dict.fromkeys(str(label).strip() for label in listed))
