"""Files of the native store: shards that other readers of safetensors understand, manifests of other kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fixtures.region_stores import F, regions, write
from safetensors.numpy import load_file

from visling.errors import StoreError
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_shards_are_safetensors(tmp_path: Path, rows: int) -> None:
    write(tmp_path, {"a": rows}, details=True)
    loaded = load_file(tmp_path / "shard-00000.safetensors")
    expected = regions(0, rows, details=True)
    assert np.array_equal(loaded["features"], expected.features)
    assert np.array_equal(loaded["boxes"], expected.boxes)
    assert expected.probs is not None
    assert np.array_equal(loaded["probs"], expected.probs)
    assert set(load_file(tmp_path / "index.safetensors")) == {"starts", "counts", "sizes", "ids"}


def test_other_folders_are_not_stores(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no region store"):
        NativeStore.open(tmp_path / "absent")
    (tmp_path / "manifest.json").write_text('{"format": "something else"}')
    with pytest.raises(StoreError, match="does not describe a region store"):
        NativeStore.open(tmp_path)


def test_a_newer_schema_and_a_damaged_manifest_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "manifest.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"schema": 1', '"schema": 99'), encoding="utf-8")
    with pytest.raises(StoreError, match="schema 99"):
        NativeStore.open(tmp_path)
    file.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(StoreError, match=r"manifest\.json is damaged or truncated"):
        NativeStore.open(tmp_path)


def test_an_unfinished_store_says_so(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, feature_size=F, fingerprint="det-1")
    writer.add("a", regions(0, 2))
    writer.suspend()
    with pytest.raises(StoreError, match=r"unfinished.*--resume"):
        NativeStore.open(tmp_path)
    with pytest.raises(StoreError, match="resume=True"):
        StoreWriter(tmp_path, feature_size=F, fingerprint="det-1")
