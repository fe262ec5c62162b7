"""Examples from files of one's own: one for training, one for validation or a share that is held out, and perhaps one
for testing."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from visling.data.annotations.problems import Place, Problems
from visling.data.annotations.tables import ImageNames, Table
from visling.errors import ConfigError, DataError
from visling.tasks.base import Task
from visling.types import Record

TRAIN, VALID, TEST = SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class OwnFiles:
    """The files of a run's examples."""

    train: Path
    valid: Path | float
    """Or the share of the images of `train` whose examples are held out for validation."""
    test: Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.valid, float) and not 0 < self.valid < 1:
            raise ConfigError(
                f"the share that is held out for validation is between 0 and 1; found {self.valid:g}. Use 0.1 for a "
                "tenth of the images."
            )

    @classmethod
    def from_run(cls, known: Mapping[str, Any]) -> Self | None:
        """Those that run.json names; None for a run on a folder of official files."""
        files = known.get("files")
        if files is None:
            return None
        try:
            valid, test = files[VALID], files.get(TEST)
            return cls(
                train=Path(files[TRAIN]),
                valid=valid if isinstance(valid, float) else Path(valid),
                test=None if test is None else Path(test),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"run.json names the files of its examples as {files!r:.200}; expected paths by {', '.join(SPLITS)}. "
                "It was edited or is damaged: give the files again."
            ) from error

    def describe(self) -> dict[str, Any]:
        """For run.json; paths are absolute."""
        files = {TRAIN: self.train, VALID: self.valid, TEST: self.test}
        return {
            split: file if isinstance(file, float) else os.path.abspath(file)
            for split, file in files.items()
            if file is not None
        }

    def read(self, task: Task[Any, Any]) -> OwnRecords:
        """The records of all files.

        Raises:
            DataError: everything that is wrong with the files; or there is nothing to hold out.
        """
        problems = Problems()
        found = self.collect(task, problems)
        problems.refuse()
        if not isinstance(self.valid, float):
            return found
        train, valid = hold_out(found.splits[TRAIN], self.valid, self.train)
        return OwnRecords({**found.splits, TRAIN: train, VALID: valid}, found.images)

    def collect(self, task: Task[Any, Any], problems: Problems) -> OwnRecords:
        """The records of the files as they are, nothing held out, and what is wrong with them."""
        paths = {TRAIN: self.train, VALID: self.valid, TEST: self.test}
        return collect_records(task, {split: path for split, path in paths.items() if isinstance(path, Path)}, problems)

    def read_split(self, task: Task[Any, Any], split: str) -> OwnRecords:
        """The records of one split.

        Raises:
            DataError: see `read_files`, or the run has no such file.
        """
        if split not in SPLITS or (split == TEST and self.test is None):
            known = [TRAIN, VALID, *([TEST] if self.test is not None else [])]
            raise DataError(
                f"no split {split!r}: the model was trained on files of one's own, which are {', '.join(known)}. Name "
                "one of these with --split, or another file with --file."
            )
        if isinstance(self.valid, float) and split != TEST:
            found = self.read(task)
        else:
            path = {TRAIN: self.train, VALID: self.valid, TEST: self.test}[split]
            assert isinstance(path, Path)
            found = read_files(task, {split: path})
        return OwnRecords({split: found.splits[split]}, found.images)


@dataclass(frozen=True)
class OwnRecords:
    """Records of files of one's own."""

    splits: Mapping[str, Sequence[Any]]
    """Split -> records of the task."""
    images: ImageNames


def read_files(task: Task[Any, Any], files: Mapping[str, Path]) -> OwnRecords:
    """The records of files by their split.

    Raises:
        ConfigError: the task reads its official files only.
        DataError: everything that is wrong with the files.
    """
    problems = Problems()
    found = collect_records(task, files, problems)
    problems.refuse()
    return found


def collect_records(task: Task[Any, Any], files: Mapping[str, Path], problems: Problems) -> OwnRecords:
    """The records of files by their split; what is wrong with them, also that one holds no example, is added to the
    problems.

    Raises:
        ConfigError: the task reads its official files only.
    """
    images = ImageNames()
    splits = {}
    for split, path in files.items():
        table, before = Table(path, problems, images), len(problems)
        splits[split] = task.read_table(table)
        if not table.rows and len(problems) == before:
            problems.add(
                Place(path),
                f"the {split} file holds no example" if path.stat().st_size else f"the {split} file is empty",
                "Write an example a line, tables with a header first, or name another file.",
            )
    return OwnRecords(splits, images)


def check_records(task: Task[Any, Any], records: Sequence[Record], place: str) -> None:
    """Refuse examples to be scored that are of another kind than those of training.

    Args:
        place: where they come from.
    Raises:
        DataError: they are; names the place.
    """
    try:
        task.check(records)
    except DataError as error:
        raise DataError(f"{place}, {error}") from error


def hold_out(records: Sequence[Record], share: float, source: Path) -> tuple[Sequence[Record], Sequence[Record]]:
    """Training and validation examples, without an image in common.

    Which images are held out depends on their names, not on the order of the file. Images that an example shows
    together stay together; examples without images are held out one by one.

    Raises:
        DataError: one of the two would be empty, as all examples have an image in common.
    """
    leaders: dict[str, str] = {}

    def leader(name: str) -> str:
        """First name, in alphabetical order, of the images that stay together with this one."""
        passed = []
        while (above := leaders.setdefault(name, name)) != name:
            passed.append(name)
            name = above
        leaders.update(dict.fromkeys(passed, name))  # a shorter way for the next
        return name

    names = [record.images or (record.id,) for record in records]
    for first, *others in names:
        for other in others:
            one, two = sorted((leader(first), leader(other)))
            leaders[two] = one
    groups = [leader(first) for first, *_ in names]
    ordered = sorted(set(groups), key=lambda group: hashlib.sha256(group.encode()).hexdigest())
    held = set(ordered[: min(math.ceil(share * len(ordered)), len(ordered) - 1)])
    train = [record for record, group in zip(records, groups, strict=True) if group not in held]
    valid = [record for record, group in zip(records, groups, strict=True) if group in held]
    if len(ordered) < 2:
        raise DataError(
            f"{source}: the examples cannot be divided into training and validation without an image in common. "
            "Add examples of other images, or name a file with --valid."
        )
    return train, valid
