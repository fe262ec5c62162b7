"""Writing the native store: what goes in comes out, and an interruption costs one batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from fixtures.region_stores import COUNTS, F, assert_same, regions, write

from visling.errors import StoreError
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.types import RegionArray, RegionStore


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("shard_bytes", [2_000_000_000, 100])
def test_what_is_written_is_read_back(tmp_path: Path, details: bool, shard_bytes: int) -> None:
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


def test_the_manifest_has_the_counts(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["images"], manifest["regions"], manifest["schema"]) == (6, 17, 1)
    assert manifest["shards"][0]["bytes"] == (tmp_path / "shard-00000.safetensors").stat().st_size


def test_an_existing_store_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(StoreError, match="already holds a finished region store"):
        StoreWriter(tmp_path, feature_size=F, fingerprint="det-1")


def begin_store(path: Path, **settings: object) -> None:
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
        begin_store(tmp_path)
    with pytest.raises(StoreError, match="cannot be resumed"):
        StoreWriter(tmp_path, **{"feature_size": F, "fingerprint": "det-1", "resume": True, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("finished", [True, False])
def test_resuming_with_other_settings_is_an_error(tmp_path: Path, finished: bool) -> None:
    settings = {"settings": {"precision": "fp32", "detector": "here"}, "may_differ": ("detector",)}
    if finished:
        write(tmp_path, **settings)
    else:
        begin_store(tmp_path, **settings)
    before = read_contents(tmp_path)
    for changed in ({"precision": "bf16", "detector": "here"}, {"detector": "here"}):
        with pytest.raises(StoreError, match=r"it was made with precision 'fp32', this run has '?(bf16|None)"):
            StoreWriter(
                tmp_path, feature_size=F, fingerprint="det-1", resume=True, settings=changed, may_differ=("detector",)
            )
    assert read_contents(tmp_path) == before
    moved = {"precision": "fp32", "detector": "there"}
    with StoreWriter(
        tmp_path, feature_size=F, fingerprint="det-1", resume=True, settings=moved, may_differ=("detector",)
    ) as writer:
        writer.add("new", regions(1, 1))
    assert NativeStore.open(tmp_path).settings == {"precision": "fp32", "detector": "here"}, (
        "those of the first run stay"
    )


def read_contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("ends", ["at once", "in an error", "in a refused image"])
def test_a_finished_store_to_which_nothing_is_added_stays_as_it_is(tmp_path: Path, ends: str) -> None:
    write(tmp_path / "finished")
    before = read_contents(tmp_path / "finished")
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
    assert read_contents(tmp_path / "finished") == before
    assert read_contents(tmp_path / "new").keys() == (
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


IMAGES = 20
KILLED = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
from fixtures.region_stores import F, regions
from visling.regions.writer import StoreWriter

path, where, images = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
writer = StoreWriter(path, feature_size=F, fingerprint="det-1", shard_bytes=400)
if where == "after rename":
    append = StoreWriter._append_journal
    def die(self, entry):
        if "closed" in entry:
            os._exit(9)
        append(self, entry)
    StoreWriter._append_journal = die
if where == "while closing":
    dumps = json.dumps
    def die(value, **settings):
        if "__metadata__" in value:
            os._exit(9)
        return dumps(value, **settings)
    json.dumps = die
for number in range(images):
    writer.add(f"image_{number}", regions(number, number % 4, details=True))
    if where.isdigit() and number == int(where):
        for file in writer._files.values():
            file.flush()
        os._exit(9)
    if number % 3 == 2:
        writer.commit()
"""
"""Writes a store and dies by itself on the way."""


@pytest.mark.parametrize("where", ["7", "19", "after rename", "while closing"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, where: str) -> None:
    def fill(writer: StoreWriter) -> None:
        for number in range(IMAGES):
            if f"image_{number}" not in writer:
                writer.add(f"image_{number}", regions(number, number % 4, details=True))
        writer.close()

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fill(StoreWriter(whole, feature_size=F, fingerprint="det-1", shard_bytes=400))
    command = [sys.executable, "-c", KILLED, str(killed), where, str(IMAGES)]
    folders = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": folders}, capture_output=True, text=True, timeout=120, check=False
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


def test_a_store_is_closed_again_after_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StoreWriter(tmp_path, feature_size=F, fingerprint="det-1")
    writer.add("a", regions(0, 2, details=True))

    def half(source: BinaryIO, target: BinaryIO, length: int) -> None:
        target.write(source.read(3))
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", half)
        with pytest.raises(StoreError, match=r"no space left.*What was committed is kept"):
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


def test_an_interrupted_conversion_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    """Then the layout named the features."""
    begun = StoreWriter(tmp_path, feature_size=F, fingerprint="lxmert-obj36")
    begun.add("a", regions(0, 2))
    begun.suspend()
    with StoreWriter(tmp_path, feature_size=F, fingerprint="bottom-up-36", resume=True) as writer:
        writer.add("b", regions(1, 2))
    assert NativeStore.open(tmp_path).fingerprint == "lxmert-obj36"
    with pytest.raises(StoreError, match="fingerprint is 'lxmert-obj36', this run's is 'vg-frcnn-36'"):
        StoreWriter(tmp_path, feature_size=F, fingerprint="vg-frcnn-36", resume=True)


def test_numbers_that_are_not_finite_are_refused_in_every_field(tmp_path: Path) -> None:
    good = regions(0, 2, details=True)
    for name in ("class_confidence", "attribute_confidence", "probs"):
        values = np.array(getattr(good, name))
        values.flat[1] = np.nan
        with (
            StoreWriter(tmp_path / name, feature_size=F, fingerprint="x") as writer,
            pytest.raises(StoreError, match=f"{name} of image 'a' holds numbers that are not finite"),
        ):
            writer.add("a", replace(good, **{name: values}))


@pytest.mark.parametrize("read_only", [True, False])
def test_half_precision_is_rounded_as_numpy_does(tmp_path: Path, read_only: bool) -> None:
    values = np.random.default_rng(0).normal(size=(500, F)).astype(np.float32)
    values[:, 0] = np.logspace(-9, 4.8, 500)  # subnormal numbers, too
    values[0] = [65504, -65504, 65503.9, 2.0**-25, 0.1]
    values.setflags(write=not read_only)
    boxes = np.tile(np.array([0, 0, 9, 9], np.float32), (500, 1))
    with StoreWriter(tmp_path, feature_size=F, fingerprint="x") as writer:
        writer.add("a", RegionArray(features=values, boxes=boxes, size=(10, 10)))
    np.testing.assert_array_equal(NativeStore.open(tmp_path)["a"].features, values.astype(np.float16))
