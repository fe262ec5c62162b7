"""Files of `torch.save` with region features: both forms, the memory they take, and what can be wrong with one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from visling.errors import DataError
from visling.regions.formats import open_reader
from visling.regions.formats.base import convert_regions
from visling.regions.store import NativeStore

F = 6
"""Feature width."""
FORMS = [pytest.param(True, id="zip"), pytest.param(False, id="older")]


class Harmful:
    """Would make a folder when it is unpickled by Python's own reader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def make_image(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    corners = (90 * torch.rand(count, 2, 2, generator=generator)).sort(dim=1).values
    return torch.rand(count, F, generator=generator), corners.reshape(count, 4), torch.rand(count, generator=generator)


def save(path: Path, content: Any, new: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=new)
    return path


def read_all(path: Path) -> Mapping[str, Any]:
    return {image.image_id: image.regions for image in open_reader(path).images()}


@pytest.mark.parametrize("new", FORMS)
def test_both_forms_are_read(tmp_path: Path, new: bool) -> None:
    names = {"dev-850-0-img0.png": 3, "dev-850-0-img1.png.npz": 5, "COCO_train2014_000000000009.jpg": 0}
    path = save(tmp_path / "features_dev_150.th", {name: make_image(count) for name, count in names.items()}, new)
    reader = open_reader(path)
    assert (reader.layout, reader.feature_size, reader.total) == ("visualbert-th", F, 3)
    assert (reader.has_boxes, reader.has_sizes) == (True, False)
    images = list(reader.images())
    assert [image.image_id for image in images] == ["dev-850-0-img0", "dev-850-0-img1", "COCO_train2014_000000000009"]
    assert [image.position for image in images] == [1, 2, 3]
    for image, count in zip(images, names.values(), strict=True):
        features, boxes, confidence = (part.numpy() for part in make_image(count))
        assert image.regions is not None
        np.testing.assert_array_equal(image.regions.features, features)
        np.testing.assert_array_equal(image.regions.boxes, boxes)
        np.testing.assert_array_equal(image.regions.class_confidence, confidence)
        assert image.regions.size == (tuple(np.ceil(boxes[:, 2:].max(axis=0)).astype(int)) if count else (1, 1))
    convert_regions([reader], tmp_path / "store")
    assert NativeStore.open(tmp_path / "store").count("9") == 0


@pytest.mark.parametrize("new", FORMS)
def test_tensors_may_share_numbers_and_have_other_types(tmp_path: Path, new: bool) -> None:
    features, boxes, confidence = make_image(4)
    content = {
        "a": (features[:2], boxes[:2], confidence[:2]),
        "b": (features[2:], boxes[2:], confidence[2:]),
        "c": (features.double(), boxes.half(), confidence.double()),
        "d": tuple(part.numpy() for part in make_image(4)),
    }
    images = read_all(save(tmp_path / "x.th", content, new))
    np.testing.assert_array_equal(np.concatenate([images["a"].features, images["b"].features]), features)
    np.testing.assert_array_equal(images["b"].boxes, boxes[2:])
    np.testing.assert_array_equal(images["c"].features, features)
    np.testing.assert_array_equal(images["d"].features, features)
    turned = {"a": (features.reshape(F, 4).T, boxes, confidence)}
    with pytest.raises(DataError, match=r"image a, cannot be read: a tensor of \(4, 6\) is stored with steps"):
        open_reader(save(tmp_path / "turned.th", turned, new))


MEASURE = """
import resource, sys
from visling.regions.formats import open_reader
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reader = open_reader(sys.argv[1])
assert sum(len(image.regions) for image in reader.images()) == 150 * reader.total
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("new", FORMS)
def test_a_file_is_not_held_in_memory(tmp_path: Path, new: bool) -> None:
    features, boxes, confidence = torch.rand(150, 1024), torch.rand(150, 4).sort().values, torch.rand(150)
    images = {f"{number}.png": (features.clone(), boxes, confidence) for number in range(150)}
    path = save(tmp_path / "features.th", images, new)
    assert path.stat().st_size > 90e6
    run = [sys.executable, "-c", MEASURE, str(path)]
    kilobytes = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert kilobytes < 30_000, f"{kilobytes} KB for a file of {path.stat().st_size // 1000} KB"


@pytest.mark.parametrize("new", FORMS)
def test_a_truncated_file_is_named(tmp_path: Path, new: bool) -> None:
    path = save(tmp_path / "x.th", {"a": make_image(300), "b": make_image(2)}, new)
    whole = path.read_bytes()
    for length in (len(whole) - 5, len(whole) // 2, 40):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"x\.th (is truncated|is not a whole zip archive|is not read)"):
            open_reader(path)


def test_numbers_in_another_place_are_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "x.th", {"a": make_image(3)}, new=False)
    whole = bytearray(path.read_bytes())
    at = whole.rindex((3).to_bytes(8, "little"))  # the count in front of the confidences
    whole[at] = 2
    path.write_bytes(whole)
    with pytest.raises(DataError, match="image a, cannot be read: 2 numbers lie where 3 are expected"):
        open_reader(path)


@pytest.mark.parametrize("new", FORMS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds an empty dictionary"),
        ([make_image(1)], "holds list; expected a dictionary"),
        ({"encoder.weight": torch.zeros(2, 2)}, "image encoder.weight, holds a tensor; .* Is it a file of weights"),
        ({"a": make_image(1)[:2]}, "image a, holds tuple; expected three tensors"),
        ({"a": (*make_image(3)[:2], make_image(2)[2])}, r"image a, has confidence of shape \(2,\); expected \(3,\)"),
        ({"a": (make_image(2)[0], *make_image(3)[1:])}, r"image a, has features of shape \(2, 6\); expected \(3,"),
        ({"a": (torch.zeros(1, 6), torch.full((1, 4), torch.nan), torch.zeros(1))}, "that are not finite"),
        ({"a": make_image(0)}, "holds no region"),
    ],
)
def test_other_content_is_named(tmp_path: Path, new: bool, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_reader(save(tmp_path / "x.th", content, new))


def test_features_of_another_width_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "x.th", {"a": make_image(1), "b": (torch.zeros(1, 7), *make_image(1)[1:])})
    with pytest.raises(DataError, match="image b, has features of width 7; the first image has 6"):
        read_all(path)


@pytest.mark.parametrize("new", FORMS)
def test_files_that_would_run_code_are_refused(tmp_path: Path, new: bool) -> None:
    for number, content in enumerate(
        (Harmful(tmp_path / "made"), {"a": (*make_image(1)[:2], Harmful(tmp_path / "made"))})
    ):
        path = save(tmp_path / f"{number}.th", content, new)
        with pytest.raises(DataError, match=r"it names (posix|nt)\.mkdir, which no data file needs"):
            open_reader(path)
    path = save(tmp_path / "module.th", torch.nn.Linear(2, 2), new)
    with pytest.raises(DataError, match=r"it names torch\.nn\.modules\.linear\.Linear"):
        open_reader(path)
    assert not (tmp_path / "made").exists()


def test_an_archive_without_its_parts_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "x.th", {"a": make_image(1)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for left_out, message in (("x/data/1", "no uncompressed member x/data/1"), ("x/byteorder", None)):
        with zipfile.ZipFile(tmp_path / "y.th", "w") as archive:
            for name, member in members.items():
                if name != left_out:
                    archive.writestr(name, member)
        if message is None:
            assert list(read_all(tmp_path / "y.th")) == ["a"]
            continue
        with pytest.raises(DataError, match=message):
            open_reader(tmp_path / "y.th")
    with zipfile.ZipFile(tmp_path / "z.th", "w") as archive:
        for name, member in (members | {"x/byteorder": b"big"}).items():
            archive.writestr(name, member)
    with pytest.raises(DataError, match="big-endian"):
        open_reader(tmp_path / "z.th")
    with zipfile.ZipFile(tmp_path / "c.th", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    with pytest.raises(DataError, match=r"compressed data\.pkl, which torch\.save does not write"):
        open_reader(tmp_path / "c.th")


def test_a_folder_and_another_version_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder; expected a file of torch\.save"):
        open_reader(tmp_path, "visualbert-th")
    magic, machine = 0x1950A86A20F9469CFC6C, {"little_endian": True}
    parts = (magic, 1002, machine, {}, [])
    (tmp_path / "x.th").write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    with pytest.raises(DataError, match="in version 1002"):
        open_reader(tmp_path / "x.th")
