"""One word from a photograph to an answer: the names of the catalogue that stand for weights, answers and a detector.

    name -> files (`fetch`) -> model folder in `models/NAME`, detector folder in `detectors/NAME` of the data folder

Both are converted when the name is first used, and found again from then on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from visling import runtime
from visling.checkpoints import catalog
from visling.checkpoints.entries import ReadyAnswer
from visling.checkpoints.files import locked
from visling.errors import CheckpointError
from visling.feature_kinds import describe_kind
from visling.pretrained.convert import convert
from visling.pretrained.fetch import Report, fetch_entry
from visling.vision.visual_genome_conversion import convert_detector


class Prepared(NamedTuple):
    """What a name of the catalogue stands for, ready to be loaded."""

    model: Path
    """Model folder."""
    detector: Path
    """Detector folder."""


def is_ready_name(source: str | Path) -> bool:
    """Whether a text is a name of a set that answers, and not the path of a folder here."""
    return catalog.find_ready(str(source)) is not None and not Path(source).exists()


def is_detector_name(source: str | Path) -> bool:
    """Whether a text is the name of a listed detector, and not the path of a folder here."""
    return any(listed.name == str(source) for listed in catalog.DETECTORS) and not Path(source).exists()


def prepare(
    name: str, *, detector: str | Path | None = None, offline: bool | None = None, report: Report | None = None
) -> Prepared:
    """The model and the detector of a name; fetched and converted if they are not here yet.

    Args:
        detector: folder of a detector to use in place of the listed one.
        offline: download nothing; None = follow VISLING_OFFLINE and HF_HUB_OFFLINE.
        report: called while files are downloaded.
    Raises:
        CheckpointError: something cannot be had, or is not what the catalogue says; or no listed detector makes
            features that fit, and none is given.
    """
    entry = catalog.find_ready(name)
    assert entry is not None, "asked for with `is_ready_name`"
    if detector is None and not entry.detector:
        needed = catalog.find(entry.weights).features
        raise CheckpointError(
            f"{name} reads {describe_kind(needed)}, and no detector here makes such features. {entry.why_no_detector} "
            "To try another detector anyway, name it with --detector and pass --other-features."
        )
    model = runtime.home() / "models" / name
    if not _is_made(model):
        _claim_data_folder()
    # Everything is fetched before anything is converted: what cannot be had is known at once.
    make = None if _is_made(model) else _convert_later(entry, model, offline, report)
    if detector is None:
        detector = prepare_detector(entry.detector, offline=offline, report=report)
    if make is not None:
        _make_once(model, make)
    return Prepared(model, Path(detector))


def prepare_detector(name: str, *, offline: bool | None = None, report: Report | None = None) -> Path:
    """Folder of a listed detector; fetched and converted if it is not here yet.

    Raises:
        CheckpointError: it cannot be had, or is not what the catalogue says.
    """
    entry, folder = catalog.find_detector(name), runtime.home() / "detectors" / name
    if not _is_made(folder):
        _claim_data_folder()
        source = fetch_entry(entry, offline=offline, report=report)
        _make_once(
            folder,
            lambda: convert_detector(source, folder, selection="original", regions=entry.regions, listed=entry),
        )
    return folder


def _convert_later(
    entry: ReadyAnswer, model: Path, offline: bool | None, report: Report | None
) -> Callable[[], object]:
    """Fetch weights and answers; returns what converts them."""
    weights = fetch_entry(catalog.find(entry.weights), offline=offline, report=report)
    answers = []
    if entry.answers:
        listed = catalog.find_answers(entry.answers)
        found = fetch_entry(listed, offline=offline, report=report)
        answers = [found / listed.file if found.is_dir() else found]
    return lambda: convert(weights, model, release=entry.weights, task=entry.task, answers=answers)


def _make_once(folder: Path, make: Callable[[], object]) -> None:
    """Make a folder that another process may be making at the same time."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if not _is_made(folder):
                make()
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder}: {error.strerror or error}. Free space, or use another data folder (VISLING_HOME)."
        ) from error


def _claim_data_folder() -> None:
    """Make sure, before a gigabyte is downloaded, that what is made of it can be written.

    Raises:
        CheckpointError: the data folder cannot be made or written to.
    """
    home = runtime.home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the data folder {home}: {error.strerror or error}. Name another one with VISLING_HOME."
        ) from error


def _is_made(folder: Path) -> bool:
    return (folder / "config.json").is_file()
