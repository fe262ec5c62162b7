"""New stores from existing ones: some images of a store, the images of several, all images with changed regions. Rows
are copied in large pieces, so that memory stays small; an interrupted copy resumes."""

from __future__ import annotations

import heapq
import itertools
import shutil
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from visling.errors import StoreError
from visling.feature_kinds import name_today
from visling.regions.files import DETECTOR
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter, shorten
from visling.types import RegionArray

_COMMIT_BYTES = 1 << 28
"""Copied between two commits: the most that an interruption costs."""

Progress = Callable[[int, int], None]
"""Called with images done and in all."""


def subset(
    store: NativeStore,
    image_ids: Iterable[str],
    path: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> NativeStore:
    """A new store with some images of another, under the same ids.

    Args:
        image_ids: exact ids, or aliases that are unique in the store.
        resume: continue an interrupted copy, or add images to a store.
    Raises:
        StoreError: an image is missing, or `path` already holds a store.
    """
    _copy([(store, sorted({store.resolve(image_id) for image_id in image_ids}))], path, resume, progress)
    return NativeStore.open(path)


def merge(
    stores: Sequence[NativeStore],
    path: str | Path,
    *,
    join: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> NativeStore:
    """A new store with the images of several.

    Args:
        join: an image of several stores gets the regions of all, in the order of the stores; else it is refused.
        resume: continue an interrupted copy, or add images to a store.
    Raises:
        StoreError: no store, stores of different features, an image in two of them (with `join`: of different sizes),
            or `path` already holds a store.
    """
    if not stores:
        raise StoreError("nothing to merge: give at least one region store.")
    # A store without regions, such as the part of a process that got no image, does not know its optional fields.
    first = next((store for store in stores if store.manifest["regions"]), stores[0])
    for other in stores:
        _check_same_features(first, other)
    listed = heapq.merge(*(store.ids for store in stores))
    shared = {one for one, next_one in itertools.pairwise(listed) if one == next_one}
    if shared and not join:
        one = min(shared)
        holders = " and ".join(str(store.path) for store in stores if one in store.ids)
        raise StoreError(
            f"image {one!r} is in {holders}: a merged store holds every image once. Take it out of one of them "
            "with `visling regions subset`, or put its regions behind one another with --join."
        )
    _copy([(store, store.ids) for store in stores], path, resume, progress, shared)
    return NativeStore.open(path)


def change(
    store: NativeStore,
    path: str | Path,
    convert: Callable[[str, RegionArray], RegionArray],
    *,
    settings: Mapping[str, Any],
    resume: bool = False,
    progress: Progress | None = None,
) -> NativeStore:
    """A new store with all images of another, whose regions are changed on the way.

    Args:
        convert: the regions to store of an image, by its id and what the store holds; the features stay those of the
            same detector.
        settings: added to those of the store.
        resume: continue an interrupted copy.
    Raises:
        StoreError: `path` already holds a store, or regions that cannot be stored.
    """
    _copy([(store, store.ids)], path, resume, progress, convert=convert, settings=settings)
    return NativeStore.open(path)


def _copy(
    parts: Sequence[tuple[NativeStore, Sequence[str]]],
    path: str | Path,
    resume: bool,
    progress: Progress | None,
    shared: Container[str] = (),
    convert: Callable[[str, RegionArray], RegionArray] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write images of stores of the same features into one.

    Args:
        shared: images that several of the stores hold, whose regions are joined.
        convert, settings: see `change`.
    """
    first = parts[0][0]
    kept = next((store.path / DETECTOR for store, _ in parts if (store.path / DETECTOR).is_dir()), None)
    moved = {} if kept is None else {"detector": str((Path(path) / DETECTOR).resolve())}
    total = sum(len(image_ids) for _, image_ids in parts)
    done = copied = 0
    with StoreWriter(
        path,
        feature_size=first.feature_size,
        fingerprint=first.fingerprint,
        class_names=first.class_names,
        attribute_names=first.attribute_names,
        dtype=first.manifest["dtype"],
        settings={**first.settings, **moved, **(settings or {})},
        resume=resume,
    ) as writer:
        if kept is not None:
            shutil.copytree(kept, writer.path / DETECTOR, dirs_exist_ok=True)
        for number, (store, image_ids) in enumerate(parts):
            row_bytes = sum(field.row_bytes for field in store.fields.values())
            missing = [image_id for image_id in image_ids if image_id not in writer]
            done += len(image_ids) - len(missing)
            # The stores before this one have written the images that they share with it.
            later = [other for other, _ in parts[number + 1 :]]
            for image_id, regions in store.scan(missing):
                if image_id in shared:
                    regions = _join(regions, later, image_id)
                if convert is not None:
                    regions = convert(image_id, regions)
                writer.add(image_id, regions)
                done, copied = done + 1, copied + len(regions) * row_bytes
                if copied >= _COMMIT_BYTES:
                    writer.commit()
                    copied = 0
                if progress is not None:
                    progress(done, total)


def _join(regions: RegionArray, later: Iterable[NativeStore], image_id: str) -> RegionArray:
    """Regions of an image with those that other stores hold of it under the same id."""
    for other in later:
        if image_id not in other or other.resolve(image_id) != image_id:
            continue
        more = other[image_id]
        if more.size != regions.size:
            raise StoreError(
                f"image {image_id!r} has {regions.size[0]} x {regions.size[1]} pixels in one store and "
                f"{more.size[0]} x {more.size[1]} in {other.path}: its regions cannot be joined. Extract both from the "
                "same pictures."
            )
        regions = regions.join(more)
    return regions


def _check_same_features(first: NativeStore, other: NativeStore) -> None:
    keys = ["feature_size", "dtype", "class_names", "attribute_names", *["fields"] * bool(other.manifest["regions"])]
    described = [
        {"fingerprint": name_today(store.fingerprint), **{key: store.manifest[key] for key in keys}}
        for store in (first, other)
    ]
    for key, value in described[0].items():
        if value != described[1][key]:
            raise StoreError(
                f"stores {first.path} and {other.path} cannot be merged: {key.replace('_', ' ')} "
                f"{shorten(value)} and {shorten(described[1][key])} differ. "
                "Extract both with the same detector and settings."
            )
    if (one := first.settings.get("precision")) != (two := other.settings.get("precision")):
        raise StoreError(
            f"stores {first.path} and {other.path} cannot be merged: their features were computed in {one} "
            f"and {two}. Extract both with the same --precision."
        )
