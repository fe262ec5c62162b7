"""The native store: what goes in comes out, damage is named, interruption costs one batch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from safetensors.numpy import load_file

from visling.errors import BoxError, StoreError
from visling.regions.store import NativeStore, gather
from visling.regions.writer import StoreWriter, merge, subset
from visling.types import RegionArray, RegionStore

F = 5


def regions(seed: int, count: int, *, width: int = F, details: bool = False) -> RegionArray:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 50, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 50, (count, 2))], axis=1).astype(np.float32)
    extra = {}
    if details:
        extra = {
            "classes": rng.integers(0, 9, count).astype(np.int16),
            "class_confidence": rng.random(count).astype(np.float16),
            "attributes": rng.integers(-1, 4, (count, 3)).astype(np.int16),
            "attribute_confidence": rng.random((count, 3)).astype(np.float16),
            "probs": rng.random((count, 9)).astype(np.float16),
        }
    features = rng.standard_normal((count, width)).astype(np.float16)
    return RegionArray(features=features, boxes=boxes, size=(120 + seed, 100 + seed), **extra)


COUNTS = {"scene_000000000042": 3, "b": 0, "a": 7, "z": 1, "COCO_train2014_000000000009": 4, "é": 2}


def write(path: Path, counts: dict[str, int] = COUNTS, *, details: bool = False, **settings: object) -> NativeStore:
    with StoreWriter(path, feature_size=F, fingerprint="det-1", **settings) as writer:  # type: ignore[arg-type]
        for seed, (image_id, count) in enumerate(counts.items()):
            writer.add(image_id, regions(seed, count, details=details))
            writer.commit()
    return NativeStore.open(path)


def assert_same(found: RegionArray, expected: RegionArray) -> None:
    assert found.size == expected.size
    for name in ("features", "boxes", "classes", "class_confidence", "attributes", "attribute_confidence", "probs"):
        a, b = getattr(found, name), getattr(expected, name)
        if b is None:
            assert a is None
        else:
            assert a.dtype == b.dtype
            assert np.array_equal(a, b), name


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("shard_bytes", [2_000_000_000, 100])
def test_round_trip(tmp_path: Path, details: bool, shard_bytes: int) -> None:
    store = write(
        tmp_path,
        details=details,
        shard_bytes=shard_bytes,
        class_names=["x"],
        attribute_names=["y"],
        settings={"boxes": (1, 2)},
    )
    assert isinstance(store, RegionStore)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shard_bytes == 100)
    assert sorted(COUNTS) == store.ids
    assert len(store) == len(COUNTS)
    assert (store.feature_size, store.fingerprint, store.class_names, store.attribute_names) == (
        F,
        "det-1",
        ("x",),
        ("y",),
    )
    assert store.settings == {"boxes": [1, 2]}
    for seed, (image_id, count) in enumerate(COUNTS.items()):
        assert image_id in store
        assert store.count(image_id) == count
        assert_same(store[image_id], regions(seed, count, details=details))
    assert not list(tmp_path.glob("*.part"))
    assert not (tmp_path / "journal.jsonl").exists()
    store.check()


def test_manifest_counts(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["images"], manifest["regions"], manifest["schema"]) == (6, 17, 1)
    assert manifest["shards"][0]["bytes"] == (tmp_path / "shard-00000.safetensors").stat().st_size


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


def test_float32_features(tmp_path: Path) -> None:
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


def test_store_without_any_region(tmp_path: Path) -> None:
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


def test_gather_into_a_buffer(tmp_path: Path) -> None:
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


def test_aliases(tmp_path: Path) -> None:
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


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no region store"):
        NativeStore.open(tmp_path / "absent")
    (tmp_path / "manifest.json").write_text('{"format": "something else"}')
    with pytest.raises(StoreError, match="does not describe a region store"):
        NativeStore.open(tmp_path)


def test_newer_schema_and_damaged_manifest(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "manifest.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"schema": 1', '"schema": 99'), encoding="utf-8")
    with pytest.raises(StoreError, match="schema 99"):
        NativeStore.open(tmp_path)
    file.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(StoreError, match=r"manifest\.json is damaged or truncated"):
        NativeStore.open(tmp_path)


def test_truncated_missing_and_damaged_shards(tmp_path: Path) -> None:
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


def test_an_existing_store_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(StoreError, match="already holds a finished region store"):
        StoreWriter(tmp_path, feature_size=F, fingerprint="det-1")


def test_an_unfinished_store_says_so(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, feature_size=F, fingerprint="det-1")
    writer.add("a", regions(0, 2))
    writer.suspend()
    with pytest.raises(StoreError, match=r"unfinished.*--resume"):
        NativeStore.open(tmp_path)
    with pytest.raises(StoreError, match="resume=True"):
        StoreWriter(tmp_path, feature_size=F, fingerprint="det-1")


def begin(path: Path, **settings: object) -> None:
    """An unfinished store of one image."""
    writer = StoreWriter(path, feature_size=F, fingerprint="det-1", **settings)  # type: ignore[arg-type]
    writer.add("a", regions(0, 2))
    writer.suspend()


@pytest.mark.parametrize(
    "changes", [{"feature_size": F + 1}, {"fingerprint": "det-2"}, {"dtype": "float32"}, {"class_names": ["other"]}]
)
@pytest.mark.parametrize("finished", [True, False])
def test_resuming_with_other_features_is_an_error(tmp_path: Path, changes: dict[str, object], finished: bool) -> None:
    if finished:
        write(tmp_path)
    else:
        begin(tmp_path)
    with pytest.raises(StoreError, match="cannot be resumed"):
        StoreWriter(tmp_path, **{"feature_size": F, "fingerprint": "det-1", "resume": True, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("finished", [True, False])
def test_resuming_with_other_settings_is_an_error(tmp_path: Path, finished: bool) -> None:
    settings = {"settings": {"precision": "fp32", "detector": "here"}, "may_differ": ("detector",)}
    if finished:
        write(tmp_path, **settings)
    else:
        begin(tmp_path, **settings)
    before = contents(tmp_path)
    for changed in ({"precision": "bf16", "detector": "here"}, {"detector": "here"}):
        with pytest.raises(StoreError, match=r"it was made with precision 'fp32', this run has '?(bf16|None)"):
            StoreWriter(
                tmp_path, feature_size=F, fingerprint="det-1", resume=True, settings=changed, may_differ=("detector",)
            )
    assert contents(tmp_path) == before
    moved = {"precision": "fp32", "detector": "there"}
    with StoreWriter(
        tmp_path, feature_size=F, fingerprint="det-1", resume=True, settings=moved, may_differ=("detector",)
    ) as writer:
        writer.add("new", regions(1, 1))
    assert NativeStore.open(tmp_path).settings == {"precision": "fp32", "detector": "here"}, (
        "those of the first run stay"
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("ends", ["at once", "in an error", "in a refused image"])
def test_a_finished_store_to_which_nothing_is_added_stays_as_it_is(tmp_path: Path, ends: str) -> None:
    write(tmp_path / "finished")
    before = contents(tmp_path / "finished")
    for path in (tmp_path / "finished", tmp_path / "new"):
        writer = StoreWriter(path, feature_size=F, fingerprint="det-1", resume=True)
        if ends == "at once":
            writer.close()
            continue
        if ends == "in an error":
            writer.__exit__(StoreError, StoreError("two images of one name"), None)
        else:
            with writer, pytest.raises(StoreError, match=r"must be \(R, 5\)"):
                writer.add("new", regions(0, 2, width=F + 1))
    assert contents(tmp_path / "finished") == before
    assert contents(tmp_path / "new").keys() == (
        set() if ends == "in an error" else {"manifest.json", "index.safetensors"}
    )


def test_an_exception_leaves_a_resumable_folder(tmp_path: Path) -> None:
    def interrupted() -> None:
        with StoreWriter(tmp_path, feature_size=F, fingerprint="det-1") as writer:
            writer.add("a", regions(0, 2))
            raise RuntimeError("out of power")

    with pytest.raises(RuntimeError, match="out of power"):
        interrupted()
    with StoreWriter(tmp_path, feature_size=F, fingerprint="det-1", resume=True) as writer:
        assert "a" in writer
        assert len(writer) == 1
        writer.add("b", regions(1, 3))
    store = NativeStore.open(tmp_path)
    assert_same(store["a"], regions(0, 2))
    assert_same(store["b"], regions(1, 3))


def test_a_finished_store_takes_more_images(tmp_path: Path) -> None:
    write(tmp_path)
    with StoreWriter(tmp_path, feature_size=F, fingerprint="det-1", resume=True) as writer:
        assert all(image_id in writer for image_id in COUNTS)
        writer.add("new", regions(50, 2))
    store = NativeStore.open(tmp_path)
    for seed, (image_id, count) in enumerate(COUNTS.items()):
        assert_same(store[image_id], regions(seed, count))
    assert_same(store["new"], regions(50, 2))
    store.check()


KILLED = """
import os, sys
from pathlib import Path
import visling.regions.writer as module
sys.path.insert(0, {tests!r})
import importlib.util
spec = importlib.util.spec_from_file_location("cases", {this!r})
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
where = sys.argv[1]
writer = module.StoreWriter(Path({path!r}), feature_size=cases.F, fingerprint="det-1", shard_bytes=400)
if where == "after rename":
    unlink = module.StoreWriter._append_journal
    def die(self, entry):
        if "closed" in entry:
            os._exit(9)
        unlink(self, entry)
    module.StoreWriter._append_journal = die
if where == "while closing":
    entry = module.json.dumps
    def die(value, **settings):
        if "__metadata__" in value:
            os._exit(9)
        return entry(value, **settings)
    module.json.dumps = die
for number in range(cases.IMAGES):
    writer.add(f"image_{{number}}", cases.regions(number, number % 4, details=True))
    if where.isdigit() and number == int(where):
        for file in writer._files.values():
            file.flush()
        os._exit(9)
    if number % 3 == 2:
        writer.commit()
"""
IMAGES = 20


@pytest.mark.parametrize("where", ["7", "19", "after rename", "while closing"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, where: str) -> None:
    def fill(writer: StoreWriter) -> None:
        for number in range(IMAGES):
            if f"image_{number}" not in writer:
                writer.add(f"image_{number}", regions(number, number % 4, details=True))
        writer.close()

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fill(StoreWriter(whole, feature_size=F, fingerprint="det-1", shard_bytes=400))
    script = KILLED.format(path=str(killed), tests=str(Path(__file__).parent), this=__file__)
    done = subprocess.run(
        [sys.executable, "-c", script, where], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 9, done.stderr
    if where == "7":
        journal = killed / "journal.jsonl"
        journal.write_bytes(journal.read_bytes() + b'{"images":[["torn')
    writer = StoreWriter(killed, feature_size=F, fingerprint="det-1", shard_bytes=400, resume=True)
    if where.isdigit():
        assert len(writer) >= int(where) - int(where) % 3, "no more than the uncommitted batch is lost"
    fill(writer)
    names = sorted(file.name for file in whole.iterdir())
    assert sorted(file.name for file in killed.iterdir()) == names
    assert len(names) > 4
    for name in names:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_closing_again_after_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StoreWriter(tmp_path, feature_size=F, fingerprint="det-1")
    writer.add("a", regions(0, 2, details=True))

    def half(source: BinaryIO, target: BinaryIO, length: int) -> None:
        target.write(source.read(3))
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", half)
        with pytest.raises(OSError, match="no space"):
            writer.close()
    assert_same(writer.close()["a"], regions(0, 2, details=True))


def test_a_part_shorter_than_its_journal_is_an_error(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, feature_size=F, fingerprint="det-1")
    writer.add("a", regions(0, 2))
    writer.suspend()
    part = tmp_path / "shard-00000.boxes.part"
    part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(StoreError, match="truncated: found 28 bytes, expected 32"):
        StoreWriter(tmp_path, feature_size=F, fingerprint="det-1", resume=True)


def test_subset(tmp_path: Path) -> None:
    store = write(tmp_path / "all", details=True)
    part = subset(store, ["z", "9", "z"], tmp_path / "part")
    assert part.ids == ["COCO_train2014_000000000009", "z"]
    assert_same(part["9"], regions(4, 4, details=True))
    assert part.fingerprint == store.fingerprint
    with pytest.raises(StoreError, match="nearest"):
        subset(store, ["absent"], tmp_path / "other")


def test_merge(tmp_path: Path) -> None:
    first = write(tmp_path / "1", {"a": 2, "c": 1})
    second = write(tmp_path / "2", {"b": 3})
    merged = merge([first, second], tmp_path / "both")
    assert merged.ids == ["a", "b", "c"]
    assert np.array_equal(merged["b"].features, second["b"].features)
    with pytest.raises(StoreError, match="already in"):
        merge([first, first], tmp_path / "twice")
    with StoreWriter(tmp_path / "3", feature_size=F, fingerprint="det-2") as writer:
        writer.add("d", regions(0, 1))
    with pytest.raises(StoreError, match="fingerprint 'det-1' and 'det-2' differ"):
        merge([first, NativeStore.open(tmp_path / "3")], tmp_path / "mixed")
    bf16 = write(tmp_path / "4", {"d": 1}, settings={"precision": "bf16"})
    with pytest.raises(StoreError, match=r"computed in None and bf16.*--precision"):
        merge([first, bf16], tmp_path / "mixed")
    with pytest.raises(StoreError, match="nothing to merge"):
        merge([], tmp_path / "nothing")
