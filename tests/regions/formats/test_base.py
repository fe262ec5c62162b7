"""The conversion that all layouts share, seen through a layout that the package does not know
(`fixtures/toy_features.py`) and that is not text, not one file, and not read by bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures.toy_features import ToyFolder, write_folder

from visling.errors import BoxError, DataError, StoreError
from visling.names import read_names
from visling.regions.formats.base import ConversionReport, convert_regions
from visling.regions.store import NativeStore

COMMITTED = 256
"""Images between two commits of a conversion."""


def read_contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def rewrite_image(folder: Path, name: str, column: int, value: float) -> None:
    rows = np.load(folder / f"{name}.npy")
    rows[1, column] = value
    np.save(folder / f"{name}.npy", rows)


def rewrite_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | changes))


def test_a_new_reader_is_one_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy", 3)
    shown: list[tuple[int, int]] = []
    report = convert_regions(
        [ToyFolder(folder)], tmp_path / "store", dtype="float32", progress=lambda *now: shown.append(now)
    )
    assert report == ConversionReport(images=3, regions=6, existing=0, repeated=0)
    assert shown == [(1, 3), (2, 3), (3, 3)]
    store = NativeStore.open(tmp_path / "store")
    assert store.ids == ["0", "1", "2"]
    assert (store.fingerprint, store.settings, store.class_names) == ("toy", {"layout": "toy"}, ("cat", "dog"))
    rows, image = np.load(folder / "2.npy"), store["2"]
    assert image.size == (42, 20)
    np.testing.assert_array_equal(image.features, rows[:, 7:])
    np.testing.assert_allclose(image.boxes, rows[:, :4] * [42, 20, 42, 20], rtol=1e-6)
    assert image.probs is not None
    assert image.classes is not None
    np.testing.assert_array_equal(image.probs, rows[:, [5, 6, 4]].astype(np.float16))
    assert image.classes.tolist() == rows[:, 5:7].argmax(1).tolist()


KILLED = """
import os, sys
from fixtures.toy_features import ToyFolder
from visling.regions.formats.base import convert_regions

folder, store, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
convert_regions([ToyFolder(folder)], store, progress=lambda done, total: done == last and os._exit(9))
"""
"""Converts a folder and dies by itself after some images."""


def test_a_killed_conversion_resumes_to_the_same_store(tmp_path: Path) -> None:
    images = COMMITTED + 44
    folder = write_folder(tmp_path / "toy", images)
    convert_regions([ToyFolder(folder)], tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "killed"), str(images - 10)]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 9, done.stderr
    with pytest.raises(StoreError, match="already holds an unfinished region store"):
        convert_regions([ToyFolder(folder)], tmp_path / "killed")
    report = convert_regions([ToyFolder(folder)], tmp_path / "killed", resume=True)
    assert report == ConversionReport(images=44, regions=88, existing=COMMITTED, repeated=0)
    assert read_contents(tmp_path / "killed") == read_contents(tmp_path / "whole")


def test_images_that_the_store_holds_are_not_decoded(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy", 2)
    convert_regions([ToyFolder(folder)], tmp_path / "store")
    (folder / "1.npy").unlink()
    more = write_folder(tmp_path / "more", 3)
    report = convert_regions([ToyFolder(folder), ToyFolder(more)], tmp_path / "store", resume=True)
    assert report == ConversionReport(images=1, regions=2, existing=2, repeated=2)
    (more / "1.npy").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"more, 1\.npy, cannot be read .*\. The file is truncated, damaged or of another"
    ):
        convert_regions([ToyFolder(more)], tmp_path / "other")


def test_names_given_replace_those_in_the_file(tmp_path: Path) -> None:
    reader = ToyFolder(write_folder(tmp_path / "toy", 9))
    convert_regions(
        [reader], tmp_path / "store", class_names=["a", "b", "c"], attribute_names=["d"], fingerprint="mine"
    )
    store = NativeStore.open(tmp_path / "store")
    assert (store.class_names, store.attribute_names, store.fingerprint) == (("a", "b", "c"), ("d",), "mine")
    with pytest.raises(DataError, match="has classes up to 1, but there are only 1 names"):
        convert_regions([reader], tmp_path / "other", class_names=["a"])


def test_boxes_are_clipped_and_those_far_outside_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy", 2)
    rewrite_image(folder, "1", 2, 1 + 0.5 / 41)
    convert_regions([ToyFolder(folder)], tmp_path / "store")
    assert NativeStore.open(tmp_path / "store")["1"].boxes[1, 2] == 41
    rewrite_image(folder, "1", 2, 1 + 2 / 41)
    with pytest.raises(
        BoxError, match=r"toy, 1\.npy: a box of image '1' leaves the image of 41 x 20 by 2\.0 pixels\. Does the file"
    ):
        convert_regions([ToyFolder(folder)], tmp_path / "other")


def test_files_of_two_kinds_do_not_mix(tmp_path: Path) -> None:
    first = ToyFolder(write_folder(tmp_path / "a", 1))
    rewrite_index(write_folder(tmp_path / "b", 1), classes=["cat", "cow"])
    with pytest.raises(DataError, match=r"a has the class names \('cat', 'dog'\), .*b \('cat', 'cow'\)"):
        convert_regions([first, ToyFolder(tmp_path / "b")], tmp_path / "store")
    rewrite_index(tmp_path / "b", classes=["cat"])
    with pytest.raises(DataError, match=r"a has features of width 3, .*b 4: .* Convert them separately"):
        convert_regions([first, ToyFolder(tmp_path / "b")], tmp_path / "store")
    other = ToyFolder(tmp_path / "a")
    other.layout = "toys"
    with pytest.raises(DataError, match=r"a has the layout toy, .*a toys"):
        convert_regions([first, other], tmp_path / "store")
    with pytest.raises(DataError, match="no file of region features was given"):
        convert_regions([], tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_names_are_read_from_vocabulary_files(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("sky,blue sky\ntree\n dog , hound")
    assert read_names(tmp_path / "names.txt") == ("sky", "tree", "dog")
    with pytest.raises(DataError, match="cannot read the names"):
        read_names(tmp_path / "gone.txt")
