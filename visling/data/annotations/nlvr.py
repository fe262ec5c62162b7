"""NLVR v1's files: sentences about drawn images (Suhr et al. 2017)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visling.data.annotations.files import read_json_lines, text_field
from visling.errors import ConfigError, DataError
from visling.runtime import generator_for
from visling.types import Record

NLVR_LABELS = ("false", "true")
"""By class index: 1 = the sentence is true."""

PICTURES = 6
"""Orders of its three boxes in which each example was drawn."""

_IDENTIFIER = re.compile(r"(?P<presentation>\d+)-\d+")

PICTURE_NAME = re.compile(r"[a-z]\w*-(?P<presentation>\d+)-\d+-[0-5]")


@dataclass(frozen=True, kw_only=True)
class NlvrRecord(Record):
    """One sentence about one picture."""

    sentence: str
    label: bool | None
    """None where the file has none."""
    identifier: str
    """"N-M" of the official files; shared by the six pictures of an example."""
    presentation: str
    """Pictures and sentences that were shown together: the first field of the identifier; for other pictures the image
    id."""
    official: bool
    """Whether the record counts in the official numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Two sets of records without a presentation in common."""

    train: list[NlvrRecord]
    held: list[NlvrRecord]
    shared: tuple[str, ...]
    """Sentences that occur in both nevertheless (writers repeat each other), in alphabetical order."""


def read_nlvr(
    root: Path, split: str, *, pictures: Sequence[int] | None = None, statements: bool = True, held_out: float = 0.2
) -> list[NlvrRecord]:
    """One record per picture of the official file, then the extra statements.

    Args:
        split: name of the folder and file; with ".train" or ".held" at its end, that part of its presentations.
        pictures: orders K of the boxes; None = those that the split's picture folder holds, or all six without it.
        statements: whether the extra statements next to the official file are read.
        held_out: share of the presentations in the part ".held".
    Raises:
        DataError: neither kind of file is present, a line is not JSON or lacks a field, a label is not true or false,
            or an id comes twice.
        ConfigError: a picture number other than 0 to 5.
    """
    split, _, part = split.partition(".")
    if part:
        if part not in ("train", "held"):
            raise ConfigError(f"a split has the parts train and held; found {split}.{part}.")
        parts = hold_out(
            read_nlvr(root, split, pictures=pictures, statements=statements, held_out=held_out), held_out, seed=0
        )
        return parts.train if part == "train" else parts.held
    pictures = orders_present(root / split / "images") if pictures is None else pictures
    if not pictures or not set(pictures) <= set(range(PICTURES)):
        raise ConfigError(f"pictures are numbered 0 to {PICTURES - 1}; found {list(pictures)}.")
    official = root / split / f"{split}.json"
    extra = [
        path
        for path in (root / split / "statements.json", root / "statements" / f"{split}.json")
        if statements and path.exists()
    ]
    records = read_nlvr_pictures(official, split, pictures) if official.exists() else []
    for path in extra:
        records += read_nlvr_statements(path)
    if not records:
        below = f" It lies in {root / 'nlvr'}: give that folder." if (root / "nlvr" / split).is_dir() else ""
        raise DataError(
            f"no statements of split {split!r} in {root}: expected {official} or "
            f"{root / 'statements' / f'{split}.json'}.{below}"
        )
    check_unique(records, root)
    return records


def hold_out(records: Sequence[NlvrRecord], share: float, seed: int) -> Parts:
    """Hold out whole presentations: a random split of records would put orders of the same boxes on both sides.

    Args:
        share: of the presentations, in (0, 1); at least one is held out and at least one remains.
    Raises:
        ConfigError: the share is not in (0, 1), or there are fewer than two presentations.
    """
    names = sorted({record.presentation for record in records})
    if not 0 < share < 1 or len(names) < 2:
        raise ConfigError(
            f"cannot hold out a share of {share} of {len(names)} presentations: "
            "expected a share between 0 and 1 and at least 2."
        )
    number = min(max(round(share * len(names)), 1), len(names) - 1)
    chosen = {names[index] for index in generator_for(seed).permutation(len(names))[:number]}
    train = [record for record in records if record.presentation not in chosen]
    held = [record for record in records if record.presentation in chosen]
    shared = {record.sentence for record in train} & {record.sentence for record in held}
    return Parts(train=train, held=held, shared=tuple(sorted(shared)))


def orders_present(folder: Path) -> tuple[int, ...]:
    """Orders K of which the folder holds at least one picture; drawn sets may have fewer than six. All six if it holds
    none."""
    stems = (path.stem for path in folder.glob("**/*.png"))
    return tuple(sorted({int(stem[-1]) for stem in stems if PICTURE_NAME.fullmatch(stem)})) or tuple(range(PICTURES))


def read_nlvr_pictures(path: Path, split: str, pictures: Sequence[int]) -> list[NlvrRecord]:
    records = []
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        identifier = text_field(row, "identifier", where)
        match = _IDENTIFIER.fullmatch(identifier)
        if match is None:
            raise DataError(
                f"{where}: identifier {identifier!r} is not of the form N-M, as in NLVR v1. "
                "Files of NLVR2 have four fields: use the task nlvr2."
            )
        for picture in pictures:
            name = f"{split}-{identifier}-{picture}"
            records.append(
                NlvrRecord(
                    id=name,
                    images=(name,),
                    sentence=text_field(row, "sentence", where),
                    label=_read_label(row, where),
                    identifier=identifier,
                    presentation=match["presentation"],
                    official=True,
                )
            )
    return records


def read_nlvr_statements(path: Path) -> list[NlvrRecord]:
    records = []
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        identifier, image = text_field(row, "identifier", where), text_field(row, "image", where)
        match = PICTURE_NAME.fullmatch(image)
        records.append(
            NlvrRecord(
                id=f"statement-{identifier}",
                images=(image,),
                sentence=text_field(row, "sentence", where),
                label=_read_label(row, where),
                identifier=identifier,
                presentation=match["presentation"] if match else image,
                official=False,
            )
        )
    return records


def _read_label(row: Mapping[str, Any], where: str) -> bool | None:
    value = row.get("label")
    if value is None:
        return None
    if not isinstance(value, str) or value not in NLVR_LABELS:
        raise DataError(
            f"{where}: label {value!r} is unknown; "
            'expected "true" or "false" in lower case, or no label for a hidden split.'
        )
    return bool(value == "true")


def check_unique(records: Sequence[NlvrRecord], root: Path) -> None:
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise DataError(
                f"identifier {record.identifier!r} comes twice in the statements of {root}. Remove the copy."
            )
        seen.add(record.id)
