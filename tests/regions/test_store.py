"""Reading the native store: one image, several at once, aliases, damage that is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fixtures.region_stores import F, write

from visling.errors import StoreError
from visling.regions.store import NativeStore, gather
from visling.types import RegionArray


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

    class Plain:
        feature_size, fingerprint = store.feature_size, store.fingerprint

        def __contains__(self, image_id: str) -> bool:
            return image_id in store

        def __getitem__(self, image_id: str) -> RegionArray:
            return store[image_id]

        def __len__(self) -> int:
            return len(store)

    for most in (None, 2):
        plain, native = gather(Plain(), ["a", "b", "z"], most), store.gather(["a", "b", "z"], most)
        for name in native:
            assert np.array_equal(plain[name], native[name]), name


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
