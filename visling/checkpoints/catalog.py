"""The catalogue of what others published and this package can use, by name."""

from __future__ import annotations

from collections.abc import Iterator

from visling.checkpoints.entries import (
    HUB,
    AnswerFile,
    Published,
    ReadyAnswer,
    ReleasedDetector,
    ReleasedFile,
)
from visling.checkpoints.released_parts import ANSWERS, DETECTORS, FEATURES, READY
from visling.checkpoints.released_weights import RELEASED_FILES
from visling.errors import CheckpointError, nearest

__all__ = [
    "ANSWERS",
    "DETECTORS",
    "FEATURES",
    "HUB",
    "READY",
    "RELEASED_FILES",
    "ReleasedFile",
    "entries",
    "find",
    "find_answers",
    "find_detector",
    "find_detector_at",
    "find_entry",
    "find_ready",
]

Entry = ReadyAnswer | Published


def entries() -> Iterator[Entry]:
    """Everything in the catalogue: sets that answer together first, which have the name of their weights where both
    share one."""
    yield from READY
    yield from RELEASED_FILES
    yield from DETECTORS
    yield from ANSWERS
    yield from FEATURES


def find(name: str) -> ReleasedFile:
    """The weight file of this name.

    Raises:
        CheckpointError: no such file is known.
    """
    for release in RELEASED_FILES:
        if release.name == name:
            return release
    raise CheckpointError(
        f"no released file {name!r} in the catalogue. {nearest(name, [release.name for release in RELEASED_FILES])}"
    )


def find_entry(name: str) -> Entry:
    """The entry of this name, of whatever kind.

    Raises:
        CheckpointError: the catalogue has none.
    """
    for entry in entries():
        if entry.name == name:
            return entry
    names = {entry.name for entry in entries()}
    hint = nearest(name, names, otherwise="`visling catalog` lists all names.")
    raise CheckpointError(f"nothing is called {name!r} in the catalogue. {hint}")


def find_ready(name: str) -> ReadyAnswer | None:
    """The set of weights, answers and detector of this name; None if there is none."""
    return next((ready for ready in READY if ready.name == name), None)


def find_detector(name: str) -> ReleasedDetector:
    """The detector of this name.

    Raises:
        CheckpointError: the catalogue has none.
    """
    for detector in DETECTORS:
        if detector.name == name:
            return detector
    raise CheckpointError(f"no detector {name!r} in the catalogue. {nearest(name, [d.name for d in DETECTORS])}")


def find_detector_at(repository: str) -> ReleasedDetector | None:
    """The detector that is published as owner/name on the hub; None if it is not listed."""
    return next((detector for detector in DETECTORS if detector.source == f"{HUB}{repository}"), None)


def find_answers(name: str) -> AnswerFile:
    """The list of answers of this name.

    Raises:
        CheckpointError: the catalogue has none.
    """
    for answers in ANSWERS:
        if answers.name == name:
            return answers
    raise CheckpointError(f"no list of answers {name!r} in the catalogue. {nearest(name, [a.name for a in ANSWERS])}")
