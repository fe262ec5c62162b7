"""Reading the native store: one image, several at once, aliases, damage that is named."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from fixtures.region_stores import F, write

from visling.errors import StoreError
from visling.regions.store import NativeStore, count_regions, gather, take
from visling.types import RegionArray


class Plain:
    """A store that only knows single images."""

    def __init__(self, store: NativeStore) -> None:
        self.store, self.feature_size, self.fingerprint = store, store.feature_size, store.fingerprint

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.store

    def __getitem__(self, image_id: str) -> RegionArray:
        return self.store[image_id]

    def __len__(self) -> int:
        return len(self.store)


def test_a_store_may_have_no_region(tmp_path: Path) -> None:
    store = write(tmp_path, {"a": 0, "b": 0})
    assert len(store["a"]) == 0
    found = store.gather(["a", "b"])
    assert found["features"].shape == (2, 1, F)
    assert not found["mask"].any()
    assert len(write(tmp_path / "none", {})) == 0


@pytest.mark.parametrize("shard_bytes", [2_000_000_000, 100])
def test_gather_equals_the_images_one_by_one(tmp_path: Path, shard_bytes: int) -> None:
    store = write(tmp_path, shard_bytes=shard_bytes)
    asked = ["a", "b", "z", "a", "COCO_train2014_000000000009"]
    for most in (None, 5, 1):
        found = store.gather(asked, most)
        longest = min(7, most or 7)
        assert found["features"].shape == (5, longest, F)
        assert found["features"].dtype == np.float16
        for row, image_id in enumerate(asked):
            alone = store[image_id]
            real = min(len(alone), longest)
            assert found["mask"][row].tolist() == [True] * real + [False] * (longest - real)
            assert np.array_equal(found["features"][row, :real], alone.features[:real])
            assert np.array_equal(found["boxes"][row, :real], alone.boxes[:real])
            assert not found["features"][row, real:].any()
            assert not found["boxes"][row, real:].any()
            assert found["size"][row].tolist() == list(alone.size)


def test_gather_fills_a_buffer_that_is_large_enough(tmp_path: Path) -> None:
    store = write(tmp_path)
    buffer = np.full(1000, 7, np.float16)
    found = store.gather(["z", "a"], buffer=buffer)
    assert np.shares_memory(found["features"], buffer)
    assert np.array_equal(found["features"], store.gather(["z", "a"])["features"])
    assert not np.shares_memory(store.gather(["z", "a"], buffer=buffer[:3])["features"], buffer)


def test_gather_of_any_store_equals_the_native_one(tmp_path: Path) -> None:
    store = write(tmp_path)

    images = ["a", "b", "z", "a"]
    counts = [len(store[image_id]) for image_id in images]
    orders = (None, [None, *(np.arange(count)[::-1] for count in counts[1:])])
    for most, order in itertools.product((None, 2), orders):
        plain, native = (gather(source, images, most, order=order) for source in (Plain(store), store))
        for name in native:
            assert np.array_equal(plain[name], native[name]), name
        last = store["a"].features if order is None else store["a"].features[::-1]
        assert np.array_equal(native["features"][3][native["mask"][3]], last[:most])
    assert count_regions(Plain(store), images).tolist() == count_regions(store, images).tolist() == counts


@pytest.mark.parametrize("shard_bytes", [2_000_000_000, 100])
def test_single_regions_are_taken_from_any_store(tmp_path: Path, shard_bytes: int) -> None:
    store = write(tmp_path, shard_bytes=shard_bytes)

    images = [image_id for image_id in store.ids if len(store[image_id])]
    owners = np.array([0, 1, 1, 0, len(images) - 1])
    regions = np.array([len(store[images[owner]]) - 1 for owner in owners])
    for field in store.fields:
        expected = np.stack(
            [getattr(store[images[at]], field)[region] for at, region in zip(owners, regions, strict=True)]
        )
        for source in (store, Plain(store)):
            found = take(source, field, images, owners, regions)
            assert found is not None
            assert found.dtype == expected.dtype
            assert np.array_equal(found, expected)
            none = take(source, field, images, owners[:0], regions[:0])
            assert none is not None
            assert none.shape == (0, *expected.shape[1:])
    assert take(store, "nonsense", images, owners, regions) is None
    assert {"features", "boxes"} <= store.fields.keys()


def test_images_are_found_by_unique_aliases(tmp_path: Path) -> None:
    store = write(tmp_path)
    assert "42" in store
    assert 9 in store
    assert np.array_equal(store["9"].features, store["COCO_train2014_000000000009"].features)
    assert "43" not in store


def test_missing_image_names_the_nearest(tmp_path: Path) -> None:
    store = write(tmp_path)
    with pytest.raises(
        StoreError, match=r"'scene_000000000041' is not in region store .*6 images.*'scene_000000000042'"
    ):
        store["scene_000000000041"]
    both = write(tmp_path / "two", {"x_5": 1, "y_5": 1})
    with pytest.raises(StoreError, match=r"ambiguous.*'x_5', 'y_5'"):
        both["5"]


def test_truncated_missing_and_damaged_shards_are_named(tmp_path: Path) -> None:
    store = write(tmp_path)
    shard = tmp_path / "shard-00000.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(StoreError, match=f"truncated: found {len(content) - 1} bytes, expected {len(content)}"):
        NativeStore.open(tmp_path)
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    damaged = NativeStore.open(tmp_path)
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors is damaged: SHA-256"):
        damaged.check()
    shard.unlink()
    with pytest.raises(StoreError, match="lacks shard-00000"):
        NativeStore.open(tmp_path)
    del store
