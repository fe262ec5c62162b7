"""Region stores, finished and unfinished."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from fuzz.promises import check_regions
from fuzz.readers.base import Reader

from visling.regions.checking import find_problems
from visling.regions.files import committed_ids
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.types import RegionArray

_WIDTH = 3


def _draw(seed: int, count: int) -> RegionArray:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 50, (count, 2))
    return RegionArray(
        features=rng.standard_normal((count, _WIDTH)).astype(np.float16),
        boxes=np.concatenate([corner, corner + 10], axis=1).astype(np.float32),
        size=(120, 100),
        classes=rng.integers(0, 9, count).astype(np.int16),
        class_confidence=rng.random(count).astype(np.float16),
        attributes=rng.integers(-1, 4, (count, 2)).astype(np.int16),
        attribute_confidence=rng.random((count, 2)).astype(np.float16),
        probs=np.full((count, 4), 0.25, np.float16),
    )


def _write(folder: Path) -> None:
    path = folder / "store"
    with StoreWriter(
        path,
        feature_size=_WIDTH,
        fingerprint="det-1",
        class_names=["a", "b", "c"],
        settings={"layout": "x"},
        shard_bytes=300,
    ) as writer:
        for seed, (image, count) in enumerate({"a": 3, "COCO_train2014_000000000009": 0, "b": 5, "é": 2}.items()):
            writer.add(image, _draw(seed, count))
            writer.commit()


def _read(folder: Path) -> None:
    store = NativeStore.open(folder / "store")
    for image in store.ids:
        assert isinstance(image, str)
        check_regions(store[image], store.feature_size)
    gathered = store.gather(store.ids, 4)
    assert gathered["features"].shape[2] == store.feature_size
    for _, regions in store.scan():
        check_regions(regions, store.feature_size)
    first = store.ids[:1]
    store.take("features", first, np.zeros(len(first), np.int64), np.zeros(len(first), np.int64))
    for block in store.feature_blocks(64):
        assert block.shape[1] == store.feature_size
    store.highest("classes")
    store.find_detector()
    list(find_problems(store))


def _read_ids(folder: Path) -> None:
    assert all(isinstance(image, str) for image in committed_ids(folder / "store"))


def _write_journal(folder: Path) -> None:
    writer = StoreWriter(folder / "store", feature_size=_WIDTH, fingerprint="det-1")
    for seed, image in enumerate("abc"):
        writer.add(image, _draw(seed, 2))
        writer.commit()
    writer.suspend()


def _read_journal(folder: Path) -> None:
    committed_ids(folder / "store")
    with StoreWriter(folder / "store", feature_size=_WIDTH, fingerprint="det-1", resume=True) as writer:
        assert all(isinstance(image, str) for image in writer)


READERS = (
    Reader("stores, whole", _write, _read),
    Reader("stores, ids alone", _write, _read_ids),
    Reader("stores, unfinished", _write_journal, _read_journal, writes=True),
)
