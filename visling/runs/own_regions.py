"""Regions of one's own images: the files that tables name are found, checked and given to a detector."""

from __future__ import annotations

import difflib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from PIL import Image

from visling import runtime
from visling.data.annotations.problems import Place, Problems
from visling.data.annotations.tables import ImageNames
from visling.errors import CheckpointError, Conflicts, DataError, StoreError
from visling.pretrained.description import find_model
from visling.regions.files import JOURNAL, MANIFEST
from visling.regions.store import NativeStore
from visling.runs.extraction import Target, on_main
from visling.vision.detectors import load_detector
from visling.vision.extract import Progress, extract
from visling.vision.image_files import find_images
from visling.vision.images import SUFFIXES, read_image
from visling.vision.region_detector import RegionDetector

_RENAME = "Regions are stored under the name without folder and suffix: rename one of the files, in the table too."


def _carried_detector(init: Path | None) -> Path:
    """The detector that a model folder or run folder carries.

    Raises:
        CheckpointError: none is given, it is no model, or it carries none.
    """
    mend = (
        "Name one with --detector, or regions that exist with --store. A detector of photographs is trained by "
        "`visling detect train`; released features are read by `visling regions convert`."
    )
    if init is None:
        raise CheckpointError(f"images need a detector, and no model that carries one is named with --init. {mend}")
    folder = find_model(init) / "detector"
    if not folder.is_dir():
        raise CheckpointError(f"{init} carries no detector, so raw images cannot be turned into regions. {mend}")
    return folder


def prepare_regions(
    images: ImageNames,
    folder: Path,
    detector: Path | None,
    target: Path,
    problems: Problems,
    *,
    init: Path | None,
    device: str = "auto",
    progress: Progress | None = None,
) -> None:
    """Write the regions of the named images into a store, or add those that it lacks; all processes wait for the main
    one.

    Args:
        folder: of the images.
        detector: folder; None = the one that `init` carries.
        target: store.
        problems: what is wrong with the tables that name the images.
        init: model folder or run folder.
        progress: called with (images done, images in all).
    Raises:
        DataError: there are problems, or images that are missing, unreadable, or not told apart by their names.
        CheckpointError, StoreError: the detector cannot be read, or the store is of another one.
        VislingError: both; nothing has been extracted.
    """
    on_main(
        lambda: _add_regions(images, folder, detector, target, problems, init=init, device=device, progress=progress)
    )


def _add_regions(
    images: ImageNames,
    folder: Path,
    detector: Path | None,
    target: Path,
    problems: Problems,
    *,
    init: Path | None,
    device: str,
    progress: Progress | None,
) -> None:
    conflicts = Conflicts()
    files: dict[str, Path] = {}
    with conflicts.collect():
        files = find_files(images, folder, problems)
    with conflicts.collect():
        detector = _carried_detector(init) if detector is None else detector
        if conflicts.errors or not _holds(target, files):
            model = load_detector(detector, device=runtime.pick_device(device))
            conflicts.refuse()
            _extract(files, detector, model, target, progress=progress)
    conflicts.refuse()


def _holds(target: Path, images: Iterable[str]) -> bool:
    """Whether a store is finished and has all images."""
    return (target / MANIFEST).exists() and set(images) <= set(NativeStore.open(target).ids)


def _extract(
    files: Mapping[str, Path], detector: Path, model: RegionDetector, target: Path, *, progress: Progress | None
) -> None:
    begun = (target / MANIFEST).exists() or (target / JOURNAL).exists()
    if target.is_dir() and any(target.iterdir()) and not begun:
        raise StoreError(f"{target} holds other files than regions. Use another --out, or remove it.")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"cannot write the regions to {target}: {error}. Use another --out, or fix permissions."
        ) from error
    settings = {"detector": str(detector.resolve()), "precision": "fp32"}
    # The fingerprint says whether a detector that moved is the same.
    with Target(path=target, detector=model, settings=settings, may_differ=("detector",)).open(target) as writer:
        report = extract(files.values(), model, writer, progress=progress)
    if report.unreadable:
        listed = "".join(f"\n- {reason}" for _, reason in report.unreadable[:10])
        raise DataError(
            f"{len(report.unreadable)} of {len(files)} images cannot be read. Replace them, or remove their rows; the "
            f"regions of the others are kept.{listed}"
        )


def find_files(images: ImageNames, folder: Path, problems: Problems) -> dict[str, Path]:
    """The file of every named image, by its id.

    A name is an absolute path, a path below the folder, or the end of one; or such a path with more folders before it,
    as in a table that was written for a folder above. Its suffix may be left out.

    Raises:
        DataError: there are problems; names all images that are missing, damaged, or not told apart, too.
    """
    below: dict[str, list[Path]] = defaultdict(list)
    for path in find_images(folder):
        below[path.stem].append(path)
    found: dict[str, dict[Path, Place]] = defaultdict(dict)
    missing: dict[str, Place] = {}
    for image, names in images.places.items():
        for name, place in names.items():
            fitting = _fitting(name, folder, below.get(image, []))
            if not fitting:
                missing[name] = place
            elif len(fitting) > 1:
                either = f"{name!r} may be {fitting[0]} or {fitting[1]}"
                problems.add(place, either, f"Name its folder. {_RENAME}", kind="either of two files")
            else:
                found[image].setdefault(fitting[0].resolve(), place)
    for paths in found.values():
        if len(paths) > 1:
            (one, place), (two, other), *_ = paths.items()
            problems.add(other, f"{two} has the name of {one}, which {place} names", _RENAME, kind="one name")
        for path, place in paths.items():
            if reason := _why_unreadable(path):
                problems.add(place, reason, "Replace the file, or remove the row.", kind="unreadable")
    mend = _guess(missing, len(images.places), folder, below) if missing else ""
    for name, place in missing.items():
        problems.add(place, f"no image {name!r} in {folder}", mend, kind="no image")
    problems.refuse()
    return {image: next(iter(paths)) for image, paths in found.items()}


def _fitting(name: str, folder: Path, namesakes: list[Path]) -> list[Path]:
    """The files that a name may mean.

    Args:
        namesakes: files below the folder with the same stem.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    direct = folder / path  # an absolute path stands for itself
    if direct.is_file():
        return [direct]
    if Path(name).is_absolute():
        spellings = ((Path(f"{direct}{suffix}"), Path(f"{direct}{suffix.upper()}")) for suffix in sorted(SUFFIXES))
        return [next(file for file in pair if file.is_file()) for pair in spellings if any(map(Path.is_file, pair))]
    named = [
        file
        for file in namesakes
        if file.name == path.name or (path.suffix.lower() not in SUFFIXES and file.stem == path.name)
    ]
    within = path.parent.parts
    ending = [file for file in named if _ends_in(file.parent.parts, within)]
    return ending or [file for file in named if _ends_in(within, file.relative_to(folder).parent.parts)]


def _ends_in(parts: tuple[str, ...], end: tuple[str, ...]) -> bool:
    return parts[len(parts) - len(end) :] == end


def _why_unreadable(path: Path) -> str:
    """Why a file is no image, as far as its beginning tells; empty if it looks like one."""
    try:
        with Image.open(path):
            return ""
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        try:
            read_image(path)
        except DataError as error:
            return str(error).partition(". Replace")[0]
    return ""


def _guess(missing: Mapping[str, Place], images: int, folder: Path, below: Mapping[str, list[Path]]) -> str:
    """What to do about missing images: another folder that has the first of them, or the most similar name."""
    name, place = next(iter(missing.items()))
    near = [folder.absolute().parent, place.path.absolute().parent]
    nearby = [
        candidate
        for base in dict.fromkeys(near)
        for candidate in [base, *_list_folders(base)]
        if candidate != folder.absolute()
    ]
    last = PurePosixPath(name.replace("\\", "/")).name
    has_it = next((one for one in nearby if any(os.path.isfile(one / part) for part in (name, last))), None)
    lacking = f"{len(missing)} of {images} images are missing." if len(missing) > 1 else "Check the name."
    if has_it is not None:
        return f"{lacking} Did you mean the folder {has_it}?"
    known = [path.name for paths in below.values() for path in paths]
    close = difflib.get_close_matches(last, known, 1, 0.8) if len(known) < 10_000 else []
    return f"{lacking} Did you mean {close[0]!r}?" if close else f"{lacking} Name their folder with --images."


def _list_folders(base: Path) -> list[Path]:
    """The folders in a folder; none where it may not be listed. `os.path` takes what may not be looked into, such as
    lost+found, for absent, where methods of a path would raise."""
    try:
        return sorted(path for path in base.iterdir() if os.path.isdir(path))
    except OSError:
        return []


def check_ids(images: ImageNames, store: NativeStore) -> None:
    """Check that a store has the named images under these very ids; only a plain number may stand for a name that ends
    in it, as in stores of COCO.

    Raises:
        DataError: names the images that it lacks, and those that its ids do not tell apart.
    """
    known, problems = frozenset(store.ids), Problems()
    for image, names in images.places.items():
        (name, place), *others = names.items()
        folders = {PurePosixPath(other.replace("\\", "/")).parent for other in names} - {PurePosixPath(".")}
        if image not in known and not (image.isdecimal() and image in store):
            close = difflib.get_close_matches(image, store.ids, 1, 0.8) if len(known) < 10_000 else []
            guess = f"Did you mean {close[0]!r}?" if close else f"Its images are {', '.join(store.ids[:3])}, ..."
            problems.add(place, f"image {name!r} has no regions in {store.path}", guess, kind="no regions")
        elif len(folders) > 1 and others:
            (other, second), *_ = others
            same = f"{other!r} has the name of {name!r}, which {place} names"
            problems.add(second, same, _RENAME, kind="one name")
    problems.refuse()
