"""New stores from existing ones: some images of a store, the images of several. Rows are copied in large pieces, so
that memory stays small; an interrupted copy resumes."""

from __future__ import annotations

import heapq
import itertools
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from visling.errors import StoreError
from visling.feature_kinds import name_today
from visling.regions.files import DETECTOR
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter, shorten

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
    stores: Sequence[NativeStore], path: str | Path, *, resume: bool = False, progress: Progress | None = None
) -> NativeStore:
    """A new store with the images of several.

    Args:
        resume: continue an interrupted copy, or add images to a store.
    Raises:
        StoreError: no store, stores of different features, an image in two of them, or `path` already holds a store.
    """
    if not stores:
        raise StoreError("nothing to merge: give at least one region store.")
    # A store without regions, such as the part of a process that got no image, does not know its optional fields.
    first = next((store for store in stores if store.manifest["regions"]), stores[0])
    for other in stores:
        _check_same_features(first, other)
    for one, next_one in itertools.pairwise(heapq.merge(*(store.ids for store in stores))):
        if one == next_one:
            holders = " and ".join(str(store.path) for store in stores if one in store.ids)
            raise StoreError(
                f"image {one!r} is in {holders}: a merged store holds every image once. Take it out of one of them "
                "with `visling regions subset`."
            )
    _copy([(store, store.ids) for store in stores], path, resume, progress)
    return NativeStore.open(path)


def _copy(
    parts: Sequence[tuple[NativeStore, Sequence[str]]], path: str | Path, resume: bool, progress: Progress | None
) -> None:
    """Write images of stores of the same features into one."""
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
        settings={**first.settings, **moved},
        resume=resume,
    ) as writer:
        if kept is not None:
            shutil.copytree(kept, writer.path / DETECTOR, dirs_exist_ok=True)
        for store, image_ids in parts:
            row_bytes = sum(field.row_bytes for field in store.fields.values())
            missing = [image_id for image_id in image_ids if image_id not in writer]
            done += len(image_ids) - len(missing)
            for image_id, regions in store.scan(missing):
                writer.add(image_id, regions)
                done, copied = done + 1, copied + len(regions) * row_bytes
                if copied >= _COMMIT_BYTES:
                    writer.commit()
                    copied = 0
                if progress is not None:
                    progress(done, total)


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
