"""What a run folder holds: run.json, log.jsonl, evaluation_*.json and details_*.jsonl, finished or not.

Nothing here is an error but a folder that is absent: whatever a run lacks, or what cannot be read, is listed in
`RunFiles.missing`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from visling import damage
from visling.errors import RunError, StoreError
from visling.regions.store import NativeStore
from visling.types import RegionStore

_SPLITS = ("test", "testdev", "test_dev", "val", "valid", "validation", "dev")
"""Splits in the order in which they represent a run; others follow by name."""


@dataclass(kw_only=True)
class RunFiles:
    """The contents of a run folder, and what it lacks."""

    path: Path
    about: Mapping[str, Any] = field(default_factory=dict)
    """run.json."""
    train: list[Mapping[str, Any]] = field(default_factory=list)
    """Records of kind "train" in log.jsonl, in the order of the file."""
    valid: list[Mapping[str, Any]] = field(default_factory=list)
    """Records of kind "valid"."""
    events: list[str] = field(default_factory=list)
    """Messages of kind "event"."""
    evaluations: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Split -> its evaluation; the split that represents the run comes first."""
    details: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    """Split -> one row per example."""
    missing: list[str] = field(default_factory=list)
    """What is absent or unreadable, in words."""

    @classmethod
    def read(cls, path: Path) -> RunFiles:
        """Read a run folder.

        Raises:
            RunError: no such folder.
        """
        if not path.is_dir():
            raise RunError(
                f"no run folder {path}. Give the folder that holds run.json, as printed when the training began."
            )
        run = cls(path=path)
        run.about = run._read_object(path / "run.json", "no run.json: model, task and configuration are unknown")
        run._read_log(path / "log.jsonl")
        for file in _by_split(path, "evaluation_*.json"):
            evaluation = run._read_object(file, "")
            if evaluation:
                run.evaluations[_split_of(file)] = evaluation
        for file in _by_split(path, "details_*.jsonl"):
            run.details[_split_of(file)] = list(run._read_lines(file))
        if run.about and run.about.get("status") != "finished":
            last = f"; its last record is step {run.train[-1].get('step', '?')}" if run.train else ""
            run.missing.append(f"the run has not finished{last}")
        if not run.evaluations:
            run.missing.append("no evaluation yet: there are no test scores")
        return run

    def add_baseline(self, other: RunFiles) -> None:
        """Show another run's scores as a column next to this one's."""
        for split, evaluation in self.evaluations.items():
            if split in other.evaluations:
                baselines = {**as_mapping(evaluation.get("baselines")), other.path.name: other.evaluations[split]}
                self.evaluations[split] = {**evaluation, "baselines": baselines}
            else:
                self.missing.append(f"{other.path.name} has not been evaluated on {split}: it has no column there")

    def image_folder(self) -> Path | None:
        """The folder of images that the run names."""
        return _as_path(self.about.get("images"))

    def open_store(self) -> RegionStore | None:
        """The region store that the run names; None if it names none, or if it cannot be opened."""
        path = _as_path(self.about.get("valid_store") or self.about.get("store"))
        if path is None:
            return None
        try:
            return NativeStore.open(path)
        except (StoreError, OSError):
            self.missing.append("the region store of this run cannot be opened: images are shown without regions")
            return None

    def training_seconds(self) -> float | None:
        """How long the run trained: by its log, or else from its start to its end."""
        seconds = as_number(self.train[-1].get("seconds")) if self.train else None
        if seconds is None:
            begin, end = _as_moment(self.about.get("started")), _as_moment(self.about.get("finished"))
            seconds = end - begin if begin is not None and end is not None else None
        return seconds

    def _read_log(self, file: Path) -> None:
        if not file.exists():
            self.missing.append("no log.jsonl: there are no curves")
        for entry in self._read_lines(file):
            if entry.get("kind") == "train":
                self.train.append(entry)
            elif entry.get("kind") == "valid":
                self.valid.append(entry)
            elif entry.get("kind") == "event":
                self.events.append(str(entry.get("message", "")))

    def _read_object(self, file: Path, absent: str) -> Mapping[str, Any]:
        if not file.exists():
            self.missing.append(absent)
            return {}
        try:
            value = damage.parse_json(file.read_text(encoding="utf-8", errors="replace"))
        except ValueError:
            value = None
        if not isinstance(value, dict):
            self.missing.append(f"{file.name} cannot be read: it is not a complete JSON object")
            return {}
        return value

    def _read_lines(self, file: Path) -> Iterator[Mapping[str, Any]]:
        """The JSON objects of a file, one a line; a killed run leaves half a line, which is reported and left out."""
        broken = 0
        if file.exists():
            with file.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    try:
                        value = damage.parse_json(line) if line.strip() else {}
                    except ValueError:
                        value = None
                    if not isinstance(value, dict):
                        broken += 1
                    elif value:
                        yield value
        if broken:
            self.missing.append(f"{file.name}: {broken} incomplete {'line' if broken == 1 else 'lines'} left out")


def as_number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def as_mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object, or an empty one in place of anything else."""
    return value if isinstance(value, Mapping) else {}


def score_value(cell: Any) -> float | None:
    """The number of a score, which is written as a number or as {"value": ..., "count": ...}."""
    return as_number(cell.get("value") if isinstance(cell, Mapping) else cell)


def _by_split(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder, the one of the split that represents a run first."""

    def rank(file: Path) -> tuple[int, str]:
        split = _split_of(file)
        return (_SPLITS.index(split) if split in _SPLITS else len(_SPLITS), split)

    return sorted(folder.glob(pattern), key=rank)


def _split_of(file: Path) -> str:
    return file.stem.partition("_")[2]


def _as_path(value: Any) -> Path | None:
    return Path(value) if isinstance(value, str) and value else None


def _as_moment(value: Any) -> float | None:
    """Seconds of a time written as ISO 8601 or as a number."""
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            return None
    return as_number(value)
