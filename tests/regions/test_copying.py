"""Subsets and merged stores: the same regions under the same ids, in little memory, whatever interrupts the copying."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures.region_stores import COUNTS, F, assert_same, regions, write

from visling.errors import StoreError
from visling.regions import store as stores
from visling.regions.copying import merge, subset
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter


@pytest.mark.parametrize("piece", [1, 100, 1 << 25])
@pytest.mark.parametrize("shard_bytes", [100, 2_000_000_000])
def test_a_scan_yields_what_lookups_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, shard_bytes: int
) -> None:
    """However many rows are read at once, and with images that are left out between others."""
    monkeypatch.setattr(stores, "_SCAN_BYTES", piece)
    store = write(tmp_path, details=True, shard_bytes=shard_bytes)
    for wanted in (None, ["z", "scene_000000000042", "b"], []):
        found = dict(store.scan(wanted))
        assert found.keys() == set(COUNTS if wanted is None else wanted)
        for image_id, image in found.items():
            assert_same(image, store[image_id])
    assert [name for name, _ in store.scan()] == list(COUNTS), "in the order of the rows"


def test_copies_are_shown_and_resume(tmp_path: Path) -> None:
    first, second = write(tmp_path / "1", {"a": 2, "c": 1}), write(tmp_path / "2", {"b": 3})
    shown: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        shown.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge([first, second], tmp_path / "both", progress=stop)
    with pytest.raises(StoreError, match="unfinished"):
        NativeStore.open(tmp_path / "both")
    merged = merge([first, second], tmp_path / "both", resume=True, progress=lambda *now: shown.append(now))
    assert shown == [(1, 3), (2, 3), (3, 3)]
    whole = merge([first, second], tmp_path / "whole")
    for file in whole.path.iterdir():
        assert file.read_bytes() == (merged.path / file.name).read_bytes()


def test_regions_of_an_image_in_several_stores_are_joined_in_their_order(tmp_path: Path) -> None:
    """Optional fields too; images that only one of them holds are taken as they are, empty ones as well."""
    stores = [
        write(tmp_path / "1", {"a": 2, "b": 0, "c": 1}, details=True),
        write(tmp_path / "2", {"a": 3, "b": 2, "d": 1}, details=True),
        write(tmp_path / "3", {"a": 1, "e": 1, "d": 2}, details=True),
    ]
    with pytest.raises(StoreError, match=r"image 'a' is in .*1 and .*2 and .*3.*--join"):
        merge(stores, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(stores, tmp_path / "joined", join=True, progress=stop)
    shown: list[tuple[int, int]] = []
    joined = merge(stores, tmp_path / "joined", join=True, resume=True, progress=lambda *now: shown.append(now))
    assert shown[-1] == (9, 9)
    assert {image_id: joined.count(image_id) for image_id in joined.ids} == {"a": 6, "b": 2, "c": 1, "d": 3, "e": 1}
    for image_id in joined.ids:
        held = [store[image_id] for store in stores if image_id in store]
        expected = held[0]
        for more in held[1:]:
            expected = expected.join(more)
        assert_same(joined[image_id], expected)
        np.testing.assert_array_equal(joined[image_id].features, np.concatenate([one.features for one in held]))


def test_images_of_two_sizes_are_not_joined(tmp_path: Path) -> None:
    first = write(tmp_path / "1", {"a": 2})
    with StoreWriter(tmp_path / "2", feature_size=F, fingerprint=first.fingerprint) as writer:
        writer.add("a", dataclasses.replace(regions(0, 1), size=(1000, 900)))
    second = NativeStore.open(tmp_path / "2")
    with pytest.raises(StoreError, match=r"image 'a' has .* 1000 x 900 in .*2: its regions cannot be joined"):
        merge([first, second], tmp_path / "both", join=True)


def test_a_store_of_an_earlier_version_is_merged_with_one_of_today(tmp_path: Path) -> None:
    for number, fingerprint in enumerate(("lxmert-obj36", "bottom-up-36")):
        with StoreWriter(tmp_path / fingerprint, feature_size=F, fingerprint=fingerprint) as writer:
            writer.add(f"image {number}", regions(number, 2))
    found = [NativeStore.open(tmp_path / name) for name in ("lxmert-obj36", "bottom-up-36")]
    assert merge(found, tmp_path / "both").ids == ["image 0", "image 1"]


def test_a_subset_keeps_the_ids_of_its_store(tmp_path: Path) -> None:
    store = write(tmp_path / "all", details=True)
    part = subset(store, ["z", "9", "z"], tmp_path / "part")
    assert part.ids == ["COCO_train2014_000000000009", "z"]
    assert_same(part["9"], regions(4, 4, details=True))
    assert part.fingerprint == store.fingerprint
    with pytest.raises(StoreError, match="nearest"):
        subset(store, ["absent"], tmp_path / "other")


def test_copies_take_along_the_detector_that_lies_in_a_store(tmp_path: Path) -> None:
    """As shares of several machines, moved to one, have it: only their own folders hold the detector."""
    here = tmp_path / "1" / "detector"
    first, second = write(tmp_path / "1", {"a": 2}, settings={"detector": str(here)}), write(tmp_path / "2", {"b": 3})
    here.mkdir()
    (here / "config.json").write_text("{}")
    for number, copied in enumerate((merge([second, first], tmp_path / "both"), subset(first, "a", tmp_path / "part"))):
        found = copied.find_detector()
        assert found == copied.path / "detector", number
        assert (found / "config.json").read_text() == "{}"
        assert copied.settings["detector"] == str(found)
    moved = NativeStore.open((tmp_path / "both").rename(tmp_path / "moved"))
    assert moved.find_detector() == tmp_path / "moved" / "detector"
    assert second.find_detector() is None


def test_only_stores_of_the_same_features_are_merged(tmp_path: Path) -> None:
    first = write(tmp_path / "1", {"a": 2, "c": 1})
    second = write(tmp_path / "2", {"b": 3})
    merged = merge([first, second], tmp_path / "both")
    assert merged.ids == ["a", "b", "c"]
    assert np.array_equal(merged["b"].features, second["b"].features)
    with pytest.raises(StoreError, match=r"image 'a' is in .*1 and .*1: .*`visling regions subset`"):
        merge([first, first], tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    with StoreWriter(tmp_path / "3", feature_size=F, fingerprint="det-2") as writer:
        writer.add("d", regions(0, 1))
    with pytest.raises(StoreError, match="fingerprint 'det-1' and 'det-2' differ"):
        merge([first, NativeStore.open(tmp_path / "3")], tmp_path / "mixed")
    bf16 = write(tmp_path / "4", {"d": 1}, settings={"precision": "bf16"})
    with pytest.raises(StoreError, match=r"computed in None and bf16.*--precision"):
        merge([first, bf16], tmp_path / "mixed")
    with pytest.raises(StoreError, match="nothing to merge"):
        merge([], tmp_path / "nothing")


MANY = """
import resource, sys
import numpy as np
from pathlib import Path
from visling.regions import writer
from visling.types import RegionArray

writer.os.fsync = lambda handle: None
regions = RegionArray(
    features=np.zeros((1, 1), np.float32), boxes=np.array([[0, 0, 9, 9]], np.float32), size=(10, 10)
)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with writer.StoreWriter(Path(sys.argv[1]), feature_size=1, fingerprint="x") as store:
    for number in range(int(sys.argv[2])):
        store.add(f"{number:012d}", regions)
        if number % 256 == 255:
            store.commit()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / int(sys.argv[2]))
"""
"""Writes images of one region; prints the growth of its memory in bytes per image."""


@pytest.mark.slow
def test_a_store_of_millions_of_images_is_written_in_little_memory(tmp_path: Path) -> None:
    """Three million images, as Conceptual Captions has, are to be written in under 1 GB."""
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", MANY, str(tmp_path / "store"), "200000"],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 240
