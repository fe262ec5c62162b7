"""Regions of images by one process or many: each writes a store of its own share, and the first one joins them.

    OUT/                      the store, once all is done
    OUT/parts/part-00001/     the share of process 1 until then: a store like any other
    OUT/unreadable.txt        images that could not be read, with the reason

Which process takes an image follows from its id alone, so that neither another order nor more images change it. What
any part or the store itself holds is not extracted again, whatever number of processes wrote it.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from visling import runtime
from visling.errors import DataError, StoreError, VislingError
from visling.regions.files import MANIFEST, PARTS, committed_ids
from visling.regions.writer import StoreWriter
from visling.train.exchange import from_main, gather
from visling.vision.extract import BoxSource, ExtractionReport, Progress, Timings, extract
from visling.vision.image_files import ImageFile
from visling.vision.region_detector import RegionDetector

UNREADABLE = "unreadable.txt"
"""File of a store that lists the images that could not be read."""

_COMMIT_EVERY = 1024
"""Images between two commits when parts are joined."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The store that is written, and what it says about its features."""

    path: Path
    detector: RegionDetector
    dtype: Literal["float16", "float32"] = "float16"
    settings: Mapping[str, Any]
    may_differ: Sequence[str] = ()
    """See `StoreWriter`."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """The detector's, which reads all of its weights."""
        return self.detector.fingerprint

    def open(self, path: Path) -> StoreWriter:
        """Writer of the store or a part of it, which is continued if it has been begun."""
        return StoreWriter(
            path,
            feature_size=self.detector.feature_size,
            fingerprint=self.fingerprint,
            class_names=self.detector.class_names,
            attribute_names=self.detector.attribute_names,
            dtype=self.dtype,
            settings={**self.settings, **self.detector.store_settings},
            may_differ=self.may_differ,
            resume=True,
        )


def on_main(work: Callable[[], object]) -> None:
    """Let the main process do something while the others wait; an error of it is raised by all of them."""
    problem: tuple[type[VislingError], str] | None = None
    if runtime.is_main():
        try:
            work()
        except VislingError as error:
            problem = (type(error), str(error))
    runtime.wait_for_all()
    problem = from_main(problem)
    if problem is not None:
        kind, message = problem
        raise kind(message)


def is_in_share(image_id: str, part: tuple[int, int], process: tuple[int, int]) -> bool:
    """Whether an image is for this process of this run.

    Args:
        part: number of the run, from 1, and count of runs.
        process: number of the process, from 0, and count of processes of this run.
    """
    rest, run = divmod(zlib.crc32(image_id.encode("utf-8")), part[1])
    return run == part[0] - 1 and rest % process[1] == process[0]


def extract_to_store(
    images: Sequence[ImageFile],
    target: Target,
    *,
    part: tuple[int, int] = (1, 1),
    boxes: BoxSource | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> ExtractionReport:
    """Write the regions of images into a store, together with the other processes of this run; what it holds already is
    kept.

    Args:
        images: the same in all processes.
        part: number, from 1, and count of separate runs that share the images, each into a store of its own.
        settings: of `vision.extract.extract`.
    Returns:
        What all processes did, in the main process; elsewhere what this one did.
    Raises:
        StoreError: the store or a part of it was begun with another detector or other settings, or the parts are not
            all in one folder.
        DataError: see `extract`; or no image could be read.
    """
    process = runtime.rank(), runtime.world_size()
    own = target.path / PARTS / f"part-{runtime.rank():05d}" if runtime.world_size() > 1 else target.path
    on_main(lambda: _check_begun(target))
    stores = [target.path, *_list_parts(target.path)]
    existing = frozenset().union(*(committed_ids(store) for store in stores if store != own))
    gather(None)  # nobody writes before all have read
    with target.open(own) as writer:
        report = extract(
            images,
            target.detector,
            writer,
            boxes=boxes,
            progress=progress,
            is_mine=lambda image_id: is_in_share(image_id, part, process),
            existing=existing,
            **settings,
        )
        runtime.wait_for_all()  # one may have had much more to do than another
        reports = gather(report)
        if runtime.is_main():
            report = _join_reports(reports)
        if not report.done + report.skipped_existing and runtime.world_size() == 1:
            _refuse_unreadable(report)
    names = gather(own.name)
    on_main(lambda: _finish(target, report, names if runtime.world_size() > 1 else []))
    return report


def _check_begun(target: Target) -> None:
    """Check that this run may continue what the folder holds, before it does anything else."""
    for store in (target.path, *_list_parts(target.path)):
        target.open(store)


def _list_parts(path: Path) -> list[Path]:
    """Parts of a store that were begun and are not joined yet."""
    folder = path / PARTS
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _finish(target: Target, report: ExtractionReport, names: Sequence[str]) -> None:
    """Join the parts, and list what could not be read.

    Args:
        names: of the parts that the processes of this run wrote.
    """
    missing = [name for name in names if not (target.path / PARTS / name / MANIFEST).is_file()]
    if missing:
        raise StoreError(
            f"{len(missing)} of {len(names)} parts are not in {target.path / PARTS}: {', '.join(missing)}. The "
            "machines do not share this folder. Copy the parts of all of them next to each other and join them with "
            "`visling regions merge`; give machines that share no folder a --part each, next time."
        )
    if not report.done + report.skipped_existing:
        _refuse_unreadable(report)
    _join_parts(target)
    listed = "".join(f"{image}\t{reason}\n" for image, reason in report.unreadable)
    file = target.path / UNREADABLE
    if listed:
        file.write_text(listed, encoding="utf-8", errors="surrogateescape")
    else:
        file.unlink(missing_ok=True)


def _join_parts(target: Target) -> None:
    """Copy the parts into the store and remove them. Interrupted, it is continued by the next run into this folder."""
    parts = _list_parts(target.path)
    if not parts:
        return
    with target.open(target.path) as writer:
        for part in parts:
            store = target.open(part).close()  # also finishes one that an earlier run with more processes left
            for number, image_id in enumerate(store.ids):
                if image_id not in writer:
                    writer.add(image_id, store[image_id])
                if number % _COMMIT_EVERY == 0:
                    writer.commit()
    shutil.rmtree(target.path / PARTS)


def _join_reports(reports: Sequence[ExtractionReport]) -> ExtractionReport:
    """What all processes did; all of them counted the same unlisted images."""
    counts = (
        "done",
        "skipped_existing",
        "unreadable",
        "regions",
        "without_regions",
        "clipped",
        "empty",
        "first_of_several",
    )
    first, *others = reports
    joined: dict[str, Any] = {name: getattr(first, name) for name in counts}
    for report in others:
        for name in counts:
            joined[name] += getattr(report, name)
    seconds = {
        field.name: sum(getattr(report.timings, field.name) for report in reports)
        for field in dataclasses.fields(Timings)
    }
    elapsed = max(report.timings.elapsed for report in reports)
    return dataclasses.replace(first, **joined, timings=Timings(**{**seconds, "elapsed": elapsed}))


def _refuse_unreadable(report: ExtractionReport) -> None:
    if report.unreadable:
        listed = "".join(f"\n- {reason}" for _, reason in report.unreadable[:10])
        raise DataError(f"none of {len(report.unreadable)} images can be read.{listed}")
