"""HDF5 files of region features: what is computed, what is refused. The released samples are in `tests/formats`."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from visling.errors import DataError
from visling.regions.formats import open_reader
from visling.regions.formats.base import convert_regions
from visling.regions.formats.hdf5 import RegionHdf5, compute_size
from visling.regions.store import NativeStore

F = 3
SIZES = ((40, 20), (31, 57), (640, 427))
"""Widths and heights of three images."""


def draw_boxes(number: int, count: int) -> Any:
    width, height = SIZES[number]
    corners = np.array([0, 0, width / 2, height / 3]) + np.arange(count)[:, None]
    return corners.astype(np.float32)


def normalise(number: int, boxes: Any) -> Any:
    width, height = SIZES[number]
    unit = boxes / np.array([width, height, width, height], np.float32)
    return np.concatenate([unit, unit[:, 2:] - unit[:, :2]], axis=1).astype(np.float32)


def draw_features(number: int, count: int) -> Any:
    return (100 * number + np.arange(count)[:, None] + np.arange(F) / 10).astype(np.float32)


def write_adaptive(path: Path, counts: tuple[int, ...] = (2, 0, 3), **changes: Any) -> Path:
    """A file of BAN's layout and its table of ids; a dataset of None is left out."""
    boxes = [draw_boxes(number, count) for number, count in enumerate(counts)]
    ends = np.cumsum(counts)
    datasets = {
        "image_features": np.concatenate([draw_features(number, count) for number, count in enumerate(counts)]),
        "image_bb": np.concatenate(boxes),
        "spatial_features": np.concatenate([normalise(number, boxes[number]) for number in range(len(counts))]),
        "pos_boxes": np.stack([ends - counts, ends], axis=1).astype(np.int32),
    }
    write_datasets(path, datasets | changes)
    write_ids(path, {9: 0, 7: 1, 8: 2})
    return path


def write_fixed(path: Path, **changes: Any) -> Path:
    """A file of hengyuan-hu's layout and its table of ids."""
    boxes = [draw_boxes(number, 2) for number in range(3)]
    datasets = {
        "image_features": np.stack([draw_features(number, 2) for number in range(3)]),
        "image_bb": np.stack(boxes),
        "spatial_features": np.stack([normalise(number, boxes[number]) for number in range(3)]),
    }
    write_datasets(path, datasets | changes)
    write_ids(path, {9: 0, 7: 1, 8: 2})
    return path


def write_described(path: Path, described: Any = None, **changes: Any) -> Path:
    """A file of Unsupervised VisualBERT's layout and its list of images."""
    datasets: dict[str, Any] = {
        "features": np.stack([draw_features(number, 2) for number in range(3)]),
        "boxes": np.stack([draw_boxes(number, 2) for number in range(3)]),
    }
    for name in ("objects", "attrs"):
        datasets |= {f"{name}_id": np.arange(6).reshape(3, 2), f"{name}_conf": np.full((3, 2), 0.5, np.float32)}
    write_datasets(path, datasets | changes)
    images = [{"img_id": f"i{number}", "img_w": w, "img_h": h} for number, (w, h) in enumerate(SIZES)]
    path.with_suffix(".json").write_text(json.dumps(images if described is None else described))
    return path


def write_groups(path: Path, **changes: Any) -> Path:
    """A file of VOLTA's layout; `changes` are of its second image."""
    with h5py.File(path, "w") as file:
        for number, (width, height) in enumerate(SIZES):
            datasets: dict[str, Any] = {"features": draw_features(number, 2), "boxes": draw_boxes(number, 2)}
            datasets |= {"obj_id": np.array([1, 2]), "obj_conf": np.array([0.5, 0.25], np.float32)}
            datasets |= {"attr_id": np.array([3, 4]), "attr_conf": np.array([0.5, 0.25], np.float32)}
            datasets |= {"img_w": width, "img_h": height} | (changes if number == 1 else {})
            for name, values in datasets.items():
                if values is not None:
                    file[f"i{number}/{name}"] = values
    return path


def write_datasets(path: Path, datasets: dict[str, Any]) -> None:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            if values is not None:
                file[name] = values


def write_ids(path: Path, rows: Any) -> None:
    path.with_name(f"{path.stem}_imgid2idx.pkl").write_bytes(pickle.dumps(rows, protocol=2))


@pytest.mark.parametrize(
    ("write", "layout"),
    [
        (write_fixed, "updn-hdf5"),
        (write_adaptive, "ban-hdf5"),
        (write_described, "unsupervised-visualbert-hdf5"),
        (write_groups, "volta-hdf5"),
    ],
)
def test_every_layout_reaches_the_store(tmp_path: Path, write: Callable[[Path], Path], layout: str) -> None:
    reader = open_reader(write(tmp_path / "x.hdf5"))
    assert isinstance(reader, RegionHdf5)
    assert (reader.layout, reader.feature_size, reader.total, reader.unit) == (layout, F, 3, "images")
    convert_regions([reader], tmp_path / "store", dtype="float32")
    store = NativeStore.open(tmp_path / "store")
    ids = ["9", "7", "8"] if "_imgid2idx" in "".join(path.name for path in tmp_path.iterdir()) else ["i0", "i1", "i2"]
    counts = [2, 0, 3] if layout == "ban-hdf5" else [2, 2, 2]
    for number, (image_id, count) in enumerate(zip(ids, counts, strict=True)):
        image = store[image_id]
        assert image.size == (SIZES[number] if count else (1, 1))
        np.testing.assert_array_equal(image.features, draw_features(number, count))
        np.testing.assert_array_equal(image.boxes, draw_boxes(number, count))


def test_a_file_is_read_image_by_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is larger than memory: no more of a dataset is asked for than one image's part."""
    largest = 0
    read = h5py.Dataset.__getitem__

    def watch(dataset: Any, rows: Any) -> Any:
        nonlocal largest
        part = read(dataset, rows)
        if dataset.name == "/image_features":
            largest = max(largest, len(np.atleast_2d(part)))
        return part

    monkeypatch.setattr(h5py.Dataset, "__getitem__", watch)
    assert len(list(RegionHdf5(write_adaptive(tmp_path / "x.hdf5")).images())) == 3
    assert largest == 3


def test_sizes_follow_from_both_kinds_of_boxes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        size = rng.integers(1, 20000, 2)
        corners = np.sort(rng.random((36, 2, 2)).astype(np.float32), axis=1).reshape(36, 4)
        sides = np.array([*size, *size], np.float32)
        boxes = corners * sides
        assert compute_size(boxes, boxes / sides) == tuple(size)
    assert compute_size(np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32)) == (1, 1)
    assert compute_size(boxes, boxes / sides * np.array([1, 1, 1, 0.99], np.float32)) is None
    assert compute_size(np.zeros((2, 4), np.float32), np.zeros((2, 4), np.float32)) is None
    assert compute_size(np.full((2, 4), np.nan, np.float32), np.ones((2, 4), np.float32)) is None


def test_boxes_and_spatial_features_of_two_images_are_noticed(tmp_path: Path) -> None:
    boxes = np.stack([draw_boxes(number, 2) for number in range(3)])
    spatial = np.stack([normalise(number, boxes[number]) for number in range(3)])
    spatial[1, 1] = spatial[0, 0]
    with pytest.raises(DataError, match="row 1, has boxes and spatial features that are not those of one image"):
        list(RegionHdf5(write_fixed(tmp_path / "x.hdf5", spatial_features=spatial)).images())


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [
        (write_fixed, {"spatial_features": None}, "has no dataset spatial_features; the layout updn-hdf5 has"),
        (
            write_fixed,
            {"image_bb": np.zeros((3, 3, 4), "f4")},
            r"image_bb of shape \(3, 3, 4\) and image_features of \(3, 2, 3\); expected \(3, 2, 4\)",
        ),
        (write_fixed, {"image_features": np.zeros((6, 3), "f4")}, r"of shape \(6, 3\); the layout updn-hdf5 has 3 dim"),
        (write_adaptive, {"image_bb": np.zeros((4, 4), "f4")}, r"image_bb of shape \(4, 4\)"),
        (write_adaptive, {"pos_boxes": np.zeros((3, 3), "i4")}, r"pos_boxes of shape \(3, 3\); expected"),
        (
            write_adaptive,
            {"pos_boxes": np.array([[0, 2], [2, 2], [2, 6]], "i4")},
            r"row 2, has pos_boxes \[2, 6\] in a file of 5 regions",
        ),
        (write_adaptive, {"pos_boxes": np.array([[0, 2], [2, 1], [2, 5]], "i4")}, r"row 1, has pos_boxes \[2, 1\]"),
        (write_adaptive, {"pos_boxes": np.zeros((2, 2), "i4")}, r"imgid2idx\.pkl has 3 ids, x\.hdf5 2 images"),
        (write_adaptive, {"image_features": None}, "has no dataset image_features"),
        (write_described, {"objects_id": np.zeros((3, 3), "i8")}, r"objects_id of shape \(3, 3\)"),
        (write_described, {"described": []}, r"x\.json describes 0 images, x\.hdf5 holds 3"),
        (write_described, {"described": [{"img_id": 1}]}, "is no list of img_id, img_w and img_h .KeyError: 'img_w'"),
        (write_groups, {"boxes": None}, "image i1, has no boxes; found attr_conf"),
        (write_groups, {"boxes": np.zeros((3, 4), "f4")}, r"image i1, has boxes of shape \(3, 4\); expected \(2, 4\)"),
        (write_groups, {"obj_id": np.array([1])}, r"image i1, has obj_id of shape \(1,\); expected \(2,\)"),
        (write_groups, {"img_w": 40.5}, "image i1, has img_w .*; expected a whole number"),
    ],
)
def test_wrong_datasets_are_named(tmp_path: Path, write: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(RegionHdf5(write(tmp_path / "x.hdf5", **changes)).images())


@pytest.mark.parametrize("write", [write_fixed, write_adaptive])
def test_the_table_of_ids_must_be_the_file_s_own(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    file = write(tmp_path / "x.hdf5")
    table = tmp_path / "x_imgid2idx.pkl"
    for rows, message in [
        ({9: 0, 7: 1}, "has 2 ids, .* 3 images"),
        ({9: 0, 7: 1, 8: 1}, "has 3 ids"),
        ({9: 0, 7: 1, 8: 3}, "expected one id for each row"),
        ([9, 7, 8], "is no table of image ids and rows"),
        ({9: "a"}, "is no table of image ids and rows"),
        ({(9, 1): 0, 7: 1, 8: 2}, r"has \(9, 1\) for an image id"),
    ]:
        table.write_bytes(pickle.dumps(rows))
        with pytest.raises(DataError, match=message):
            RegionHdf5(file)
    table.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(DataError, match=r"names .*system, which no data file needs"):
        RegionHdf5(file)
    table.rename(tmp_path / "val_imgid2idx.pkl")
    with pytest.raises(DataError, match=r"looked for x_imgid2idx\.pkl next to it, found val_imgid2idx\.pkl"):
        RegionHdf5(file)
    (tmp_path / "val_imgid2idx.pkl").unlink()
    with pytest.raises(DataError, match=r"looked for x_imgid2idx\.pkl next to it, found no such table"):
        RegionHdf5(file)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    file = write_described(tmp_path / "x.hdf5")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot be opened as an HDF5 file .*truncated.* download it again"):
        open_reader(file)
    file.with_suffix(".json").unlink()
    file.write_bytes(whole)
    with pytest.raises(DataError, match=r"ids and sizes of its images; looked for x\.json next to it"):
        open_reader(file)
    write_datasets(file, {"weights": np.zeros(3)})
    with pytest.raises(DataError, match="holds weights, which is not the layout updn-hdf5 or ban-hdf5 or volta-hdf5"):
        open_reader(file)
    with pytest.raises(DataError, match=r"holds weights, which is not the layout ban-hdf5 .docs"):
        open_reader(file, "ban-hdf5")
    write_datasets(file, {})
    with pytest.raises(DataError, match="holds nothing"):
        open_reader(file)
    with pytest.raises(DataError, match="is a folder; expected an HDF5 file"):
        open_reader(tmp_path, "ban-hdf5")


def test_files_without_a_region_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no region"):
        RegionHdf5(write_adaptive(tmp_path / "x.hdf5", counts=(0, 0, 0)))
    with h5py.File(tmp_path / "y.hdf5", "w") as file:
        file["i0/features"] = np.zeros((0, F), np.float32)
    with pytest.raises(DataError, match="holds no region: every image has 0 boxes"):
        RegionHdf5(tmp_path / "y.hdf5")
    write_groups(tmp_path / "z.hdf5")
    with h5py.File(tmp_path / "z.hdf5", "a") as file:
        file["z"] = np.zeros(3)
    with pytest.raises(DataError, match="image z, is an array; expected a group per image"):
        list(RegionHdf5(tmp_path / "z.hdf5").images())
