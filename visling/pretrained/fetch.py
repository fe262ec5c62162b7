"""What the catalogue lists, on this machine: from the hub, from an address, or put there by hand.

Downloads lie in `downloads/NAME` of the data folder (`VISLING_HOME`); what comes from the hub stays in the hub's cache,
which it shares with transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlparse

from visling import runtime
from visling.checkpoints import catalog, hub
from visling.checkpoints.download import download
from visling.checkpoints.entries import (
    HUB,
    AnswerFile,
    FeatureFile,
    Published,
    ReadyAnswer,
    ReleasedDetector,
    ReleasedFile,
)
from visling.errors import CheckpointError

Report = Callable[[str, int, int], None]
"""Called with what is being downloaded, the bytes of it that are here, and all its bytes (0 = unknown)."""


class Fetched(NamedTuple):
    """Something from the catalogue that is here."""

    name: str
    path: Path
    """Its file, or the folder with its files."""


def fetch(
    name: str, *, into: Path | None = None, offline: bool | None = None, report: Report | None = None
) -> list[Fetched]:
    """Bring an entry of the catalogue here; of a set that answers together, all its parts.

    Args:
        into: folder that gets a folder for each entry; None = the data folder, and the hub's cache.
        offline: download nothing; None = follow VISLING_OFFLINE and HF_HUB_OFFLINE.
    Raises:
        CheckpointError: no such entry, or one that cannot be had: see `checkpoints.download` and `checkpoints.hub`.
    """
    entry = catalog.find_entry(name)
    if not isinstance(entry, ReadyAnswer):
        return [Fetched(entry.name, fetch_entry(entry, into=into, offline=offline, report=report))]
    parts: list[Published] = [catalog.find(entry.weights)]
    if entry.answers:
        parts.append(catalog.find_answers(entry.answers))
    if entry.detector:
        parts.append(catalog.find_detector(entry.detector))
    return [Fetched(part.name, fetch_entry(part, into=into, offline=offline, report=report)) for part in parts]


def fetch_entry(
    entry: Published,
    *,
    into: Path | None = None,
    offline: bool | None = None,
    report: Report | None = None,
) -> Path:
    """The file of one entry, or the folder with its files, as `fetch` brings it."""
    folder = (runtime.home() / "downloads" if into is None else into) / entry.name
    if isinstance(entry, ReleasedDetector) and entry.reach == "hub":
        return _fetch_from_hub_or_mirror(entry, folder, into is not None, offline, report)
    if entry.reach == "hub":
        return _fetch_from_hub(entry.name, entry.source.removeprefix(HUB), folder, into is not None, offline, report)
    if entry.reach == "by hand":
        return _find_by_hand(entry.name, entry.source, folder)
    return _download(
        entry.source,
        folder / (entry.file if isinstance(entry, AnswerFile) else _name_file(entry.source)),
        offline,
        report,
        size=None if isinstance(entry, FeatureFile) else entry.size,
        sha256=entry.sha256 if isinstance(entry, ReleasedFile | AnswerFile) else None,
    )


def _fetch_from_hub(
    name: str, repository: str, folder: Path, copied: bool, offline: bool | None, report: Report | None
) -> Path:
    """Folder with the files of a repository: the one that a person has filled, or the hub's."""
    if not copied and _holds_files(folder):
        return folder
    _say(report, repository)
    try:
        return hub.fetch(repository, files=hub.RELEASE_FILES, offline=offline, into=folder if copied else None)
    except CheckpointError as error:
        raise CheckpointError(
            f"cannot fetch {name}. {error} Its files (config.json and the weights) from elsewhere can "
            f"be put into {folder}."
        ) from error


def _fetch_from_hub_or_mirror(
    entry: ReleasedDetector, folder: Path, copied: bool, offline: bool | None, report: Report | None
) -> Path:
    """Folder with the files of a detector on the hub; where the hub does not have them, they come from its mirror."""
    if all((folder / name).is_file() for name in entry.files):
        return folder
    repository = entry.source.removeprefix(HUB)
    _say(report, repository)
    try:
        found = hub.fetch(repository, files=entry.files, offline=offline, into=folder if copied else None)
        missing = [name for name in entry.files if not (found / name).is_file()]
        if not missing:
            return found
        error = CheckpointError(f"{repository} on the hub lacks {', '.join(missing)}.")
    except CheckpointError as refused:
        error = refused
    if not entry.mirror:
        raise error
    try:
        for name in entry.files:
            _download(f"{entry.mirror}{name}", folder / name, offline, report)
    except CheckpointError as second:
        others = [other.name for other in catalog.DETECTORS if other is not entry and other.makes == entry.makes]
        hint = f" The same weights are also listed as {', '.join(others)}." if others else ""
        raise CheckpointError(
            f"cannot fetch the detector {entry.name}. From the hub: {error} From its mirror: {second}{hint} Files from "
            f"elsewhere ({', '.join(entry.files)}) can be put into {folder}."
        ) from second
    return folder


def _find_by_hand(name: str, source: str, folder: Path) -> Path:
    """The folder of something that only a person can download.

    Raises:
        CheckpointError: the folder holds no file; says where the file is published.
    """
    if _holds_files(folder):
        return folder
    raise CheckpointError(
        f"{name} is not downloaded automatically: it is published at {source}. Download it there in a browser and put "
        f"the file into {folder}, or give its path."
    )


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(file.is_file() and not file.name.startswith(".") for file in folder.iterdir())


def _download(
    address: str,
    target: Path,
    offline: bool | None,
    report: Report | None,
    *,
    size: int | None = None,
    sha256: str | None = None,
) -> Path:
    progress = None if report is None else lambda done, total: report(target.name, done, total)
    alone = runtime.is_offline() if offline is None else offline
    return download(address, target, size=size, sha256=sha256, offline=alone, progress=progress)


def _name_file(source: str) -> str:
    return unquote(Path(urlparse(source).path).name)


def _say(report: Report | None, what: str) -> None:
    if report is not None:
        report(what, 0, 0)
