"""Folders of numpy files of region features: every layout, its traps, and what can be wrong with a file."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.errors import DataError
from visling.regions.formats import open_reader
from visling.regions.formats.base import RegionReader, convert_regions
from visling.regions.store import NativeStore

F = 6
"""Feature width."""


class Harmful:
    """Would make a folder when it is unpickled by Python's own reader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def make_features(count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(count).random((count, F), np.float32)


def make_boxes(count: int) -> np.ndarray[Any, Any]:
    corners = np.sort(np.random.default_rng(count).uniform(0, 90, (count, 2, 2)), axis=1)
    return corners.reshape(count, 4).astype(np.float32)


def make_info(count: int, **changes: Any) -> dict[str, Any]:
    info = {
        "bbox": make_boxes(count), "num_boxes": count, "objects": np.arange(count), "image_width": 100,
        "image_height": 90, "cls_prob": np.full((count, 4), 0.125, np.float32),
    }  # fmt: skip
    return info | changes


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, content, allow_pickle=True)
    return path


def write_mmf(folder: Path, name: str, count: int = 3, **changes: Any) -> None:
    save(folder / f"{name}.npy", make_features(count))
    save(folder / f"{name}_info.npy", make_info(count, **changes))


def write_visualbert(path: Path, count: int = 3) -> None:
    np.savez(path, box_features=make_features(count), max_conf=np.ones(count), cls_boxes=make_boxes(count))


def read_all(reader: RegionReader) -> dict[str, Any]:
    return {image.image_id: image.regions for image in reader.images()}


def test_folders_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for place, name in (("val", "b"), ("val/deep", "z"), ("train", "COCO_train2014_000000000009"), (".", "x")):
        write_mmf(tmp_path / place, name)
    (tmp_path / "README.txt").write_text("of another kind")
    (tmp_path / "val" / "up").symlink_to(tmp_path)
    reader = open_reader(tmp_path)
    assert (reader.layout, reader.total, reader.feature_size) == ("mmf-npy", 4, F)
    assert reader.notes == ("the probability of the background is what those of the classes leave of 1",)
    images = list(reader.images(skip={"b"}))
    assert [image.image_id for image in images] == ["COCO_train2014_000000000009", "b", "z", "x"]
    assert [image.position for image in images] == [1, 2, 3, 4]
    assert [image.regions is None for image in images] == [False, True, False, False]
    regions = images[0].regions
    assert regions is not None
    assert regions.size == (100, 90)
    np.testing.assert_array_equal(regions.boxes, make_boxes(3))
    assert regions.classes is not None
    assert regions.classes.tolist() == [0, 1, 2]
    assert regions.probs is not None
    assert regions.probs[0].tolist() == [0.125] * 4 + [0.5], "the background is what the others leave"


def test_features_without_boxes_are_whole_images(tmp_path: Path) -> None:
    for name in ("COCO_val2014_000000000042", "COCO_val2014_000000000073"):
        save(tmp_path / "fc6" / f"{name}.npy", make_features(100))
    reader = open_reader(tmp_path / "fc6")
    assert (reader.layout, reader.has_boxes, reader.has_sizes, reader.notes) == ("pythia-fc6-npy", False, False, ())
    convert_regions([reader], tmp_path / "store")
    image = NativeStore.open(tmp_path / "store")["42"]
    assert (len(image), image.size, image.boxes.tolist()) == (100, (1, 1), [[0, 0, 1, 1]] * 100)


def test_the_kind_of_the_features_is_recognised(tmp_path: Path) -> None:
    save(tmp_path / "fc6" / "COCO_val2014_000000000042.npy", np.zeros((100, 2048), np.float32))
    assert open_reader(tmp_path / "fc6").fingerprint == "detectron-100"
    save(tmp_path / "other" / "COCO_val2014_000000000042.npy", np.zeros((99, 2048), np.float32))
    assert open_reader(tmp_path / "other").fingerprint == "pythia-fc6-npy"


def test_the_dictionaries_of_vilbert_are_read(tmp_path: Path) -> None:
    """Its script drops a region from `objects` instead of the background: the classes are those of `cls_prob`."""
    probs = np.eye(5, dtype=np.float32)[[3, 0, 1]]
    probs[1] = [0.5, 0, 0, 0.25, 0.25]
    info = make_info(3, features=make_features(3), image_id="a", cls_prob=probs)
    save(tmp_path / "a.npy", info)
    save(tmp_path / "b.npy", info | {"objects": np.array([0, 1])})
    reader = open_reader(tmp_path)
    assert reader.layout == "vilbert-multitask-npy"
    images = read_all(reader)
    assert images["a"].classes.tolist() == [0, 1, 2]
    assert images["b"].classes.tolist() == [2, 2, 0]
    np.testing.assert_array_equal(images["b"].probs, np.roll(probs, -1, axis=1))


def test_archives_are_read(tmp_path: Path) -> None:
    count = 3
    info = {
        "objects_id": np.arange(count), "objects_conf": np.full(count, 0.5, np.float32),
        "attrs_id": np.arange(count) + 7, "attrs_conf": np.full(count, 0.25, np.float32),
    }  # fmt: skip
    arrays = {"x": make_features(count), "bbox": make_boxes(count), "num_bbox": count, "image_h": 90, "image_w": 100}
    (tmp_path / "milvlg").mkdir()
    np.savez_compressed(tmp_path / "milvlg" / "a.npz", info=np.array(info), **arrays)
    np.savez_compressed(tmp_path / "milvlg" / "b.npz", **arrays)
    reader = open_reader(tmp_path / "milvlg")
    images = read_all(reader)
    assert reader.layout == "milvlg-npz"
    assert images["a"].size == images["b"].size == (100, 90)
    assert (images["a"].classes.tolist(), images["a"].attributes.tolist()) == ([0, 1, 2], [7, 8, 9])
    assert images["b"].classes is None


def test_the_archives_of_visualbert_keep_the_name_of_the_image(tmp_path: Path) -> None:
    write_visualbert(tmp_path / "dev-850-0-img0.png.npz")
    write_visualbert(tmp_path / "COCO_train2014_000000000009.jpg.npz", count=0)
    reader = open_reader(tmp_path)
    images = read_all(reader)
    assert (reader.layout, reader.has_sizes) == ("visualbert-npz", False)
    assert reader.notes == ("the size of an image is that of the smallest image that holds all of its boxes",)
    assert list(images) == ["COCO_train2014_000000000009", "dev-850-0-img0"]
    regions = images["dev-850-0-img0"]
    assert regions.size == tuple(np.ceil(make_boxes(3)[:, 2:].max(axis=0)).astype(int)), "the boxes fit in"
    assert regions.class_confidence.tolist() == [1, 1, 1]
    assert len(images["COCO_train2014_000000000009"]) == 0


def test_the_file_of_one_image_is_read(tmp_path: Path) -> None:
    write_mmf(tmp_path, "a")
    write_mmf(tmp_path, "b")
    assert list(read_all(open_reader(tmp_path / "b.npy"))) == ["b"]
    with pytest.raises(DataError, match=r"a_info\.npy.*lacks the field features"):
        open_reader(tmp_path / "a_info.npy")


def test_two_layouts_in_a_folder_are_refused(tmp_path: Path) -> None:
    write_mmf(tmp_path, "a")
    save(tmp_path / "b.npy", make_features(3))
    with pytest.raises(DataError, match=r"b\.npy has the layout pythia-fc6-npy, the first file of .* mmf-npy"):
        read_all(open_reader(tmp_path))
    save(tmp_path / "0.npy", make_features(3))
    with pytest.raises(DataError, match=r"a\.npy has the layout mmf-npy, the first file of .* pythia-fc6-npy"):
        read_all(open_reader(tmp_path))
    write_visualbert(tmp_path / "-.npz")
    with pytest.raises(DataError, match=r"0\.npy has the layout pythia-fc6-npy, the first file .* visualbert-npz"):
        read_all(open_reader(tmp_path))
    with pytest.raises(DataError, match=r"-\.npz has the layout visualbert-npz; expected milvlg-npz"):
        open_reader(tmp_path, "milvlg-npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": None}, "lacks the field bbox; it has cls_prob, features"),
        ({"bbox": make_boxes(2)}, r"has features of shape \(3, 6\); expected \(2, any width\)"),
        ({"objects": np.arange(4)}, r"has objects of shape \(4,\); expected \(3,\)"),
        ({"image_width": -5}, "has '-5' in the field image_width"),
        ({"image_width": None, "image_height": None}, "lacks the size of the image"),
    ],
)
def test_a_damaged_image_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_mmf(tmp_path, "a")
    write_mmf(tmp_path, "b", **changes)
    with pytest.raises(DataError, match=rf"file b\.npy, {message}"):
        read_all(open_reader(tmp_path))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_mmf(tmp_path, "a")
    whole = (tmp_path / "a.npy").read_bytes()
    for content in (b"", whole[:40], whole[:-4], b"text"):
        (tmp_path / "b.npy").write_bytes(content)
        with pytest.raises(DataError, match=r"b\.npy is not an array that can be read"):
            read_all(open_reader(tmp_path))
    save(tmp_path / "b.npy", np.zeros((2, F + 1), np.float32))
    save(tmp_path / "b_info.npy", make_info(2))
    with pytest.raises(DataError, match=r"b\.npy, has features of width 7; the first image has 6"):
        read_all(open_reader(tmp_path))
    save(tmp_path / "b_info.npy", np.array([1, 2]))
    with pytest.raises(DataError, match=r"b_info\.npy holds an array of int64 and shape \(2,\); expected a dictionary"):
        read_all(open_reader(tmp_path))


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    write_visualbert(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"b\.npz is not a file of arrays that can be read"):
        read_all(open_reader(tmp_path))
    changed = bytearray(whole)
    changed[140] ^= 1  # a digit of an array, against its checksum
    (tmp_path / "b.npz").write_bytes(changed)
    with pytest.raises(DataError, match=r"b\.npz is not a file of arrays that can be read"):
        read_all(open_reader(tmp_path))
    np.savez(tmp_path / "b.npz", weights=np.zeros(3))
    with pytest.raises(DataError, match=r"file b\.npz, holds weights; expected x and bbox"):
        read_all(open_reader(tmp_path))


def test_files_that_would_run_code_are_refused(tmp_path: Path) -> None:
    made = tmp_path / "made"
    save(tmp_path / "info" / "a.npy", make_features(1))
    save(tmp_path / "info" / "a_info.npy", {"bbox": Harmful(made)})
    save(tmp_path / "dictionary" / "a.npy", {"features": [Harmful(made)]})
    (tmp_path / "archive").mkdir()
    np.savez(tmp_path / "archive" / "a.npz", x=make_features(1), bbox=make_boxes(1), info=np.array(Harmful(made)))
    np.savez(tmp_path / "inner.npz", x=np.array([Harmful(made)], dtype=object), bbox=make_boxes(1))
    for path in ("info", "dictionary", "archive", "inner.npz"):
        with pytest.raises(DataError, match=r"it names (posix|nt)\.mkdir, which no data file needs"):
            open_reader(tmp_path / path)
    assert not made.exists()


def test_a_folder_without_images_or_regions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no file of features \(\.npy, \.npz\)"):
        open_reader(tmp_path, "mmf-npy")
    write_mmf(tmp_path, "a", count=0)
    with pytest.raises(DataError, match="holds no region: every image has 0 boxes"):
        open_reader(tmp_path)


def test_other_archives_are_not_taken_for_arrays(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("photos/1.jpg", b"x")
    with pytest.raises(DataError, match="is not a known file of region features: it is a zip archive"):
        open_reader(tmp_path / "a.zip")
