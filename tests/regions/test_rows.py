"""Regions of one image as rows: what the writer refuses, and what it converts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fixtures.region_stores import F, assert_same, regions

from visling.errors import BoxError, StoreError
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.types import RegionArray


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": np.zeros((2, F + 1), np.float16)}, StoreError, r"must be \(R, 5\); found \(2, 6\)"),
        ({"features": np.full((2, F), np.nan, np.float16)}, StoreError, "not finite"),
        ({"boxes": np.zeros((1, 4), np.float32)}, StoreError, r"\(2, 4\)"),
        ({"boxes": np.array([[0, 0, 5, 5], [9, 9, 3, 12]], np.float32)}, BoxError, "x2 >= x1"),
        ({"boxes": np.array([[0, 0, 0.5, 0.5], [0.1, 0.2, 1, 1]], np.float32)}, BoxError, "boxes.to_pixels"),
        ({"boxes": np.array([[0, 0, 5, 5], [0, 0, np.inf, 5]], np.float32)}, BoxError, "finite"),
        ({"size": (0, 10)}, BoxError, "0 x 10"),
        ({"classes": np.zeros(2, np.int16)}, StoreError, "same fields"),
        ({"classes": np.zeros(3, np.int16)}, StoreError, "must have 2 rows"),
    ],
)
def test_wrong_arrays_are_refused_and_leave_no_trace(
    tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    good = regions(0, 2)
    with StoreWriter(tmp_path, feature_size=F, fingerprint="x") as writer:
        writer.add("good", good)
        fields = {"features": good.features, "boxes": good.boxes, "size": good.size, **changes}
        with pytest.raises(error, match=message):
            writer.add("bad", RegionArray(**fields))  # type: ignore[arg-type]
        with pytest.raises(StoreError, match="already in"):
            writer.add("good", good)
        with pytest.raises(StoreError, match="cannot be an image id"):
            writer.add("a\nb", good)
        writer.add("after", regions(1, 3))
    store = NativeStore.open(tmp_path)
    assert store.ids == ["after", "good"]
    assert_same(store["after"], regions(1, 3))


def test_fewer_attributes_are_padded(tmp_path: Path) -> None:
    def with_attributes(count: int) -> RegionArray:
        return RegionArray(
            features=np.zeros((1, F), np.float16),
            boxes=np.array([[0, 0, 9, 9]], np.float32),
            size=(10, 10),
            attributes=np.full((1, count), 2, np.int16),
            attribute_confidence=np.ones((1, count), np.float16),
        )

    with StoreWriter(tmp_path, feature_size=F, fingerprint="x") as writer:
        writer.add("two", with_attributes(2))
        writer.add("one", with_attributes(1))
        with pytest.raises(StoreError, match="attributes of image 'three'"):
            writer.add("three", with_attributes(3))
    one = NativeStore.open(tmp_path)["one"]
    assert one.attributes is not None
    assert one.attribute_confidence is not None
    assert one.attributes.tolist() == [[2, -1]]
    assert one.attribute_confidence.tolist() == [[1, 0]]


def test_features_beyond_float16_are_kept_in_float32(tmp_path: Path) -> None:
    array = RegionArray(
        features=np.full((1, F), 1e6, np.float32), boxes=np.array([[0, 0, 9, 9]], np.float32), size=(10, 10)
    )
    with (
        StoreWriter(tmp_path / "half", feature_size=F, fingerprint="x") as writer,
        pytest.raises(StoreError, match="--dtype float32"),
    ):
        writer.add("a", array)
    with StoreWriter(tmp_path / "full", feature_size=F, fingerprint="x", dtype="float32") as writer:
        writer.add("a", array)
    assert NativeStore.open(tmp_path / "full")["a"].features.dtype == np.float32


def test_features_without_boxes_or_size_are_those_of_a_whole_image(tmp_path: Path) -> None:
    boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (3, 1))
    array = RegionArray(features=np.ones((3, F), np.float16), boxes=boxes, size=(1, 1))
    with StoreWriter(tmp_path, feature_size=F, fingerprint="x") as writer:
        writer.add("a", array)
    assert_same(NativeStore.open(tmp_path)["a"], array)
