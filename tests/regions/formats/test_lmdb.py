"""LMDB files of region features: every layout, its traps, and what can be wrong with a file."""

from __future__ import annotations

import base64
import collections
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.errors import DataError
from visling.regions.formats import open_reader
from visling.regions.formats.base import RegionReader, convert_regions
from visling.regions.store import NativeStore

lmdb = pytest.importorskip("lmdb")

F, C = 6, 5
"""Feature width and classes without the background."""


class Harmful:
    """Would make a folder when it is unpickled by Python's own reader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def write_lmdb(path: Path, values: Mapping[str, Any], *, keys: bytes = b"keys", pickled: bool = True) -> Path:
    """A folder as the releases write it, with the list of its keys."""
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), pickle.dumps(value, 2) if pickled else value)
        transaction.put(keys, pickle.dumps([key.encode() for key in values]))
    (path / "lock.mdb").unlink()
    return path


def make_arrays(count: int, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 90, (count, 2, 2)), axis=1)
    probs = rng.dirichlet(np.ones(C + 1), count)
    return {
        "features": rng.random((count, F), np.float32),
        "boxes": corners.reshape(count, 4).astype(np.float32),
        "cls_prob": probs.astype(np.float32),
    }


def encode(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array)).decode()


def make_vilbert_row(name: str, count: int = 3, **changes: Any) -> dict[str, Any]:
    """A row of ViLBERT's TSV files, as Python 3.6 pickles it."""
    arrays = make_arrays(count)
    row = {
        "image_id": name, "image_w": "100", "image_h": "90", "num_boxes": str(count), "boxes": encode(arrays["boxes"]),
        "features": encode(arrays["features"]), "cls_prob": None,
    }  # fmt: skip
    return collections.OrderedDict(row | changes)


def make_multitask_row(name: str, count: int = 3, **changes: Any) -> dict[str, Any]:
    arrays = make_arrays(count)
    row = {
        "image_id": name, "image_h": 90, "image_w": 100, "num_boxes": count, "boxes": arrays["boxes"],
        "features": arrays["features"],
    }  # fmt: skip
    return row | changes


def make_mmf_row(path: str, count: int = 3, **changes: Any) -> dict[str, Any]:
    arrays = make_arrays(count)
    row = {
        "feature_path": path, "features": arrays["features"], "image_height": 90, "image_width": 100,
        "num_boxes": count, "objects": np.arange(count), "cls_prob": arrays["cls_prob"][:, 1:],
        "bbox": arrays["boxes"],
    }  # fmt: skip
    return row | changes


def read_all(reader: RegionReader) -> dict[str, Any]:
    return {image.image_id: image.regions for image in reader.images()}


def test_rows_of_vilbert_are_read(tmp_path: Path) -> None:
    arrays = make_arrays(3)
    with_probs = make_vilbert_row("9", cls_prob=encode(arrays["cls_prob"]))
    reader = open_reader(write_lmdb(tmp_path / "a.lmdb", {"9": with_probs, "10": with_probs | {"image_id": "10"}}))
    assert (reader.layout, reader.feature_size, reader.total, reader.unit) == ("vilbert-lmdb", F, 2, "images")
    assert (reader.has_boxes, reader.has_sizes) == (True, True)
    images = read_all(reader)
    assert list(images) == ["10", "9"], "the order of the keys"
    assert images["9"].size == (100, 90)
    np.testing.assert_array_equal(images["9"].boxes, arrays["boxes"])
    np.testing.assert_array_equal(images["9"].features, arrays["features"])
    np.testing.assert_array_equal(images["9"].probs, np.roll(arrays["cls_prob"], -1, axis=1))  # background last
    assert images["9"].classes is None


def test_the_spelling_of_voltas_hdf5_is_read(tmp_path: Path) -> None:
    arrays, count = make_arrays(2), 2
    row = {
        "img_id": "1159344", "img_h": np.int64(90), "img_w": np.array(100), "features": arrays["features"],
        "boxes": arrays["boxes"], "obj_id": np.arange(count), "obj_conf": np.ones(count, np.float32),
        "attr_id": np.arange(count) + 7, "attr_conf": np.zeros(count, np.float16),
    }  # fmt: skip
    reader = open_reader(write_lmdb(tmp_path / "a.lmdb", {"1159344": row}))
    regions = read_all(reader)["1159344"]
    assert reader.layout == "volta-lmdb"
    assert regions.size == (100, 90)
    assert (regions.classes.tolist(), regions.attributes.tolist()) == ([0, 1], [7, 8])
    assert (regions.class_confidence.tolist(), regions.attribute_confidence.tolist()) == ([1, 1], [0, 0])


def test_features_of_mmf_in_voltas_spelling_are_read(tmp_path: Path) -> None:
    """Of ResNeXt-101: base64 and arrays in one entry, no id, no background, and MMF's number of boxes."""
    arrays, probs = make_arrays(3), np.zeros((3, 1600), np.float32)
    probs[:, 4] = 0.75
    row = {
        "feature_path": "val/4385058960", "features": encode(arrays["features"]).encode(), "img_h": 90, "img_w": 100,
        "num_boxes": 2, "objects": np.array([4, 4, 4]), "cls_prob": probs, "boxes": encode(arrays["boxes"]).encode(),
    }  # fmt: skip
    reader = open_reader(write_lmdb(tmp_path / "a.lmdb", {"val/4385058960": row}))
    regions = read_all(reader)["4385058960"]
    assert reader.layout == "volta-lmdb"
    np.testing.assert_array_equal(regions.boxes, arrays["boxes"])
    assert regions.classes.tolist() == [4, 4, 4]
    assert regions.probs.shape == (3, 1601)
    assert regions.probs[0, [4, 1600]].tolist() == [0.75, 0.25]


def test_a_number_of_mmf_is_not_the_number_of_rows(tmp_path: Path) -> None:
    rows = {"val/a": make_mmf_row("val/a", num_boxes=1), "train/7": make_mmf_row("train/7", count=0)}
    images = read_all(open_reader(write_lmdb(tmp_path / "a.lmdb", rows)))
    assert {name: len(regions) for name, regions in images.items()} == {"7": 0, "a": 3}
    rows = {"1": make_multitask_row("1", num_boxes=2)}
    assert len(read_all(open_reader(write_lmdb(tmp_path / "b.lmdb", rows)))["1"]) == 3


def test_the_background_that_mmf_removed_is_what_is_left(tmp_path: Path) -> None:
    probs = make_arrays(3)["cls_prob"]
    regions = read_all(open_reader(write_lmdb(tmp_path / "a.lmdb", {"x": make_mmf_row("x")})))["x"]
    np.testing.assert_allclose(regions.probs, np.roll(probs, -1, axis=1), rtol=0, atol=1e-6)
    best = {"cls_prob": np.array([0.5, 0.25, 0.75], np.float32)}  # of the best class alone
    regions = read_all(open_reader(write_lmdb(tmp_path / "b.lmdb", {"x": make_mmf_row("x", **best)})))["x"]
    assert regions.probs is None
    assert regions.class_confidence.tolist() == [0.5, 0.25, 0.75]


def test_the_background_that_mmf_kept_is_no_class(tmp_path: Path) -> None:
    """Its switch --background counts the background as class 0, in 1,601 columns."""
    probs = np.zeros((3, 1601), np.float32)
    probs[[0, 1, 2], [1, 1600, 0]] = 0.75
    probs[2, 8] = 0.25
    row = make_mmf_row("x", objects=np.array([1, 1600, 0]), cls_prob=probs)
    regions = read_all(open_reader(write_lmdb(tmp_path / "a.lmdb", {"x": row})))["x"]
    assert regions.classes.tolist() == [0, 1599, 7]
    assert regions.probs[:, -1].tolist() == [0, 0, 0.75]


def test_features_of_mmf_without_boxes_are_read(tmp_path: Path) -> None:
    row = {"feature_path": "a", "features": make_arrays(3)["features"]}
    reader = open_reader(write_lmdb(tmp_path / "a.lmdb", {"a": row}))
    regions = read_all(reader)["a"]
    assert (reader.has_boxes, reader.has_sizes) == (False, False)
    assert regions.size == (1, 1)
    assert regions.boxes.tolist() == [[0, 0, 1, 1]] * 3
    mixed = open_reader(write_lmdb(tmp_path / "b.lmdb", {"a": row, "b": make_mmf_row("b")}))
    with pytest.raises(DataError, match=r"entry b, has bbox, unlike the first image"):
        read_all(mixed)
    mixed = open_reader(write_lmdb(tmp_path / "c.lmdb", {"a": make_mmf_row("a"), "b": row}))
    with pytest.raises(DataError, match="entry b, lacks the field bbox; it has feature_path, features"):
        read_all(mixed)


def make_record(count: int = 3, **changes: Any) -> dict[str, Any]:
    """A record of Conceptual Captions: numbers are text in it."""
    arrays = make_arrays(count)
    record = {
        "features": arrays["features"], "cls_prob": arrays["cls_prob"], "boxes": arrays["boxes"],
        "num_boxes": str(count), "image_h": "90", "image_w": "100", "image_id": "3141592653", "caption": "a café",
    }  # fmt: skip
    return record | changes


def pack_message(record: Any) -> bytes:
    """A message as tensorpack 0.9.4 with msgpack-numpy writes it."""
    msgpack = pytest.importorskip("msgpack")

    def encode_array(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            objects = value.dtype.hasobject
            return {
                b"nd": True, b"type": value.dtype.descr if objects else value.dtype.str, b"kind": b"O" * objects,
                b"shape": value.shape, b"data": value.dumps() if objects else value.tobytes(),
            }  # fmt: skip
        assert isinstance(value, np.generic)
        return {b"nd": False, b"type": value.dtype.str, b"data": value.tobytes()}

    packed: bytes = msgpack.packb(record, default=encode_array, use_bin_type=True)
    return packed


@pytest.mark.parametrize("pack", [pack_message, pickle.dumps], ids=["messagepack", "pickle"])
def test_records_of_conceptual_captions_are_read(tmp_path: Path, pack: Any) -> None:
    records = {
        f"{number:08d}": pack(list(make_record(image_id=str(number), count=number + 1).values())) for number in range(3)
    }
    reader = open_reader(write_lmdb(tmp_path / "a.lmdb", records, keys=b"__keys__", pickled=False))
    assert (reader.layout, reader.total) == ("conceptual-captions-lmdb", 3)
    images = read_all(reader)
    assert {name: len(regions) for name, regions in images.items()} == {"0": 1, "1": 2, "2": 3}
    expected = make_arrays(3)
    np.testing.assert_array_equal(images["2"].features, expected["features"])
    np.testing.assert_array_equal(images["2"].boxes, expected["boxes"])
    np.testing.assert_array_equal(images["2"].probs, np.roll(expected["cls_prob"], -1, axis=1))
    assert images["2"].size == (100, 90)


def test_records_of_volta_are_read(tmp_path: Path) -> None:
    record, count = make_record(), 3
    extra = {
        "objects_id": np.arange(count), "objects_conf": np.full(count, 0.5, np.float32),
        "attrs_id": np.arange(count) + 2, "attrs_conf": np.zeros(count, np.float32),
        "attr_scores": np.zeros((count, 401), np.float32),
    }  # fmt: skip
    order = ("features", "cls_prob", *extra, "boxes", "num_boxes", "image_h", "image_w", "image_id", "caption")
    values = [(record | extra)[name] for name in order]
    reader = open_reader(write_lmdb(tmp_path / "a.lmdb", {"00000000": pack_message(values)}, pickled=False))
    assert reader.layout == "volta-conceptual-captions-lmdb"
    regions = read_all(reader)["3141592653"]
    assert (regions.classes.tolist(), regions.attributes.tolist()) == ([0, 1, 2], [2, 3, 4])
    # its own LMDBs of HDF5 files hold dictionaries, one per question: an image occurs several times
    entry = {"img_id": "7", "img_h": np.int64(90), "img_w": np.int64(100), "boxes": record["boxes"]}
    message = pack_message(entry | {"features": record["features"]})
    values = {"00000000": message, "00000001": message}
    reader = open_reader(write_lmdb(tmp_path / "b.lmdb", values, pickled=False))
    assert [image.image_id for image in reader.images()] == ["7", "7"]
    assert reader.layout == "volta-lmdb"


def test_a_record_that_would_run_code_is_refused(tmp_path: Path) -> None:
    harmful = make_record(features=np.array([Harmful(tmp_path / "made")], dtype=object))
    for number, packed in enumerate((pack_message(list(harmful.values())), pickle.dumps(list(harmful.values())))):
        path = write_lmdb(tmp_path / f"{number}.lmdb", {"00000000": packed}, pickled=False)
        with pytest.raises(DataError, match=r"entry 00000000 is not read.*(array of objects|posix\.mkdir)"):
            open_reader(path)
    message = pack_message(list(make_record().values()))
    path = write_lmdb(tmp_path / "cut.lmdb", {"00000000": message[:-9]}, pickled=False)
    with pytest.raises(DataError, match="entry 00000000 is not read as a record of tensorpack"):
        open_reader(path)
    assert not (tmp_path / "made").exists()


def test_images_of_vcr_have_their_names(tmp_path: Path) -> None:
    """The image ids are those of the annotations: file names without folder and suffix."""
    first = "lsmdc_1054_Harry/1054_Harry_Potter_00.01.46.736-00.01.50.168@0.jpg"
    second = "movieclips_Zero/abc@5.jpg"
    rows = {
        "3": make_vilbert_row(first),
        "1000004": make_vilbert_row("1000004"),
        "2000000": make_vilbert_row("2000000"),
    }
    path = write_lmdb(tmp_path / "VCR_gt_resnet101_faster_rcnn_genome.lmdb", rows)
    assert set(read_all(open_reader(path))) == {Path(first).stem, "1000004", "2000000"}
    (tmp_path / "VCR_ImagePath2Id.json").write_text(json.dumps({first: 3, second: 1000004}))
    (tmp_path / "VCR_gt_ImagePath2Id.json").write_text(json.dumps({"movieclips_Zero/x@9.jpg": 2000000}))
    assert set(read_all(open_reader(path))) == {Path(first).stem, "abc@5", "x@9"}
    # numbers of other data sets are not numbers of VCR
    other = write_lmdb(tmp_path / "COCO.lmdb", {"3": make_vilbert_row("3")})
    assert set(read_all(open_reader(other))) == {"3"}
    (tmp_path / "VCR_ImagePath2Id.json").write_text("[1]")
    with pytest.raises(DataError, match=r"VCR_ImagePath2Id\.json is not a table of VCR's images"):
        open_reader(path)


def test_a_folder_without_permission_to_write_is_read(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "a.lmdb", {"1": make_vilbert_row("1")})
    path.chmod(0o555)
    try:
        for source in (path, path / "data.mdb"):
            assert list(read_all(open_reader(source))) == ["1"]
        assert [file.name for file in path.iterdir()] == ["data.mdb"], "no lock is written"
    finally:
        path.chmod(0o755)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    rows = {str(number): make_vilbert_row(str(number), count=40) for number in range(9)}
    path = write_lmdb(tmp_path / "a.lmdb", rows)
    whole = (path / "data.mdb").read_bytes()
    for length in (len(whole) - 4096, len(whole) // 2, 3 * 4096):
        (path / "data.mdb").write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"data\.mdb is truncated: found {length} bytes, expected {len(whole)}"):
            open_reader(path)
    for content in (b"", whole[:100], b"\0" * len(whole)):
        (path / "data.mdb").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.lmdb cannot be read as LMDB"):
            open_reader(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (make_vilbert_row("2", boxes=None), "entry 2, lacks the field boxes; it has features, image_h"),
        (make_vilbert_row("2", image_w=None, image_h=None), "entry 2, lacks the size of the image"),
        (make_vilbert_row("2", image_w="wide"), "entry 2, has 'wide' in the field image_w"),
        (make_vilbert_row("2", num_boxes="4"), "entry 2, says that it has 4 regions, and has 3"),
        (make_vilbert_row("2", boxes="AAAA"), "entry 2, holds 3 bytes of boxes, not a whole number of float32"),
        (make_vilbert_row("2", features="A*=="), "entry 2, has features that are not base64"),
        (
            make_vilbert_row("2", features=encode(np.zeros(19, np.float32))),
            "holds 19 numbers of features for 3 regions",
        ),
        (make_vilbert_row("2", features=encode(np.zeros((3, 5), np.float32))), "has features of width 5; the first"),
        (make_vilbert_row("2", image_id=""), "entry 2, has an empty field image_id"),
        (make_vilbert_row("2", image_id=["2"]), "entry 2, has a field image_id of type list"),
        (make_multitask_row("2"), "entry 2 has the layout vilbert-multitask-lmdb, the first entry vilbert-lmdb"),
        ({"a": 1}, "entry 2, holds the fields a; expected features and boxes"),
        ([1, 2], "entry 2, holds a list of 2 values"),
        ("text", "entry 2, holds a value of type str"),
    ],
)
def test_a_damaged_entry_is_named(tmp_path: Path, row: Any, message: str) -> None:
    reader = open_reader(write_lmdb(tmp_path / "a.lmdb", {"1": make_vilbert_row("1"), "2": row}))
    with pytest.raises(DataError, match=message):
        read_all(reader)


def test_arrays_of_wrong_shapes_are_named(tmp_path: Path) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"bbox": make_arrays(2)["boxes"]}, r"has features of shape \(3, 6\); expected \(2, any width\)"),
        ({"bbox": np.zeros((3, 5), np.float32)}, r"has bbox of shape \(3, 5\); expected \(R, 4\)"),
        ({"objects": np.zeros(4, int)}, r"has objects of shape \(4,\); expected \(3,\)"),
        ({"objects": np.zeros(3, np.float32)}, "has a field objects of type float32"),
        ({"features": [[1.0]] * 3}, "has a field features of type list; expected an array of numbers"),
        ({"cls_prob": np.zeros((2, 5), np.float32)}, r"has cls_prob of shape \(2, 5\)"),
    ]
    for number, (change, message) in enumerate(changes):
        rows = {"1": make_mmf_row("1"), "2": make_mmf_row("2", **change)}
        reader = open_reader(write_lmdb(tmp_path / f"{number}.lmdb", rows))
        with pytest.raises(DataError, match=f"entry 2, {message}"):
            read_all(reader)


def test_a_value_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    for number, value in enumerate((Harmful(folder), make_vilbert_row("1", caption=[Harmful(folder)]))):
        path = write_lmdb(tmp_path / f"{number}.lmdb", {"1": value})
        with pytest.raises(DataError, match=r"entry 1 is not read: it names (posix|nt)\.mkdir.*could execute code"):
            open_reader(path)
    assert not folder.exists()


def test_a_file_without_images_or_regions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no image"):
        open_reader(write_lmdb(tmp_path / "a.lmdb", {}))
    with pytest.raises(DataError, match="holds no region: every image has 0 boxes"):
        open_reader(write_lmdb(tmp_path / "b.lmdb", {"1": make_vilbert_row("1", count=0)}))
    path = write_lmdb(tmp_path / "c.lmdb", {"1": make_vilbert_row("1")})
    with pytest.raises(DataError, match="has the layout vilbert-lmdb; expected mmf-lmdb"):
        open_reader(path, "mmf-lmdb")
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match="cannot be read as LMDB"):
        open_reader(tmp_path / "d", "mmf-lmdb")
    assert not any((tmp_path / "d").iterdir())


def test_an_lmdb_becomes_a_store_and_is_resumed(tmp_path: Path) -> None:
    rows = {f"{number:03d}": make_vilbert_row(str(number), count=number % 4) for number in range(40)}
    path = write_lmdb(tmp_path / "a.lmdb", rows)
    steps: list[tuple[int, int]] = []
    convert_regions([open_reader(path)], tmp_path / "store", progress=lambda *step: steps.append(step))
    assert steps == [(number, 40) for number in range(1, 41)]
    store = NativeStore.open(tmp_path / "store")
    assert {name: store.count(name) for name in store.ids} == {str(number): number % 4 for number in range(40)}
    assert store.settings["layout"] == "vilbert-lmdb"
    again = convert_regions([open_reader(path)], tmp_path / "store", resume=True)
    assert (again.images, again.existing) == (0, 40)
