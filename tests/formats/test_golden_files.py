"""Every sample of a released layout, read by its reader, equals the recorded arrays.

A folder of samples (`tests/golden/feature_files`; another one with `--golden DIR`) holds small files of a few images,
and `expected.npz` with the arrays of image i under "i/field", fields and class distributions as their releases have
them: the background first. How long these arrays are is read from the recording. A file that no row of `SAMPLES` names
fails a test, as does a row without a file.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from visling.image_ids import canonical
from visling.regions.formats import open_reader
from visling.regions.formats.base import ImageRegions

RECORDED = {
    "boxes": "boxes",
    "features": "features",
    "classes": "objects_id",
    "class_confidence": "objects_conf",
    "attributes": "attrs_id",
    "attribute_confidence": "attrs_conf",
    "probs": "cls_prob",
}
"""Field of a region array -> its name in the recording."""

BOXES = ("boxes", "features")
LABELS = (*BOXES, "classes", "class_confidence", "attributes", "attribute_confidence")
PROBS = (*BOXES, "probs")
MMF = (*BOXES, "classes", "probs")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sample file, or files of one layout."""

    pattern: str
    """Of its name."""
    layout: str
    """As which it is recognised."""
    fields: tuple[str, ...]
    """What the layout holds; everything else is None."""
    holds: Literal["all", "some", "one"] = "all"
    """How many of the recorded images it holds."""
    sorted_by: Literal["recording", "name", "key"] = "recording"
    """Order of its images: that of the recording, that of their names, or any (keys of its own)."""
    ids: Literal["names", "numbers", "positions", "own"] = "names"
    """names: the recorded ids; numbers: their numbers; positions: the recorded index as eight digits; own: others."""
    sizes: bool = True
    """Whether it holds the sizes of the images, or what they follow from."""
    shortened: bool = False
    """Whether it holds the first regions of an image only."""
    sorted_by_probs: bool = False
    """Whether its regions are read in descending order of their most probable class."""
    companions: tuple[str, ...] = ()
    """Patterns of files that belong to it and are not read by themselves."""
    background: Literal["first", "absent"] = "first"
    """Whether the layout's class distributions have a background; where they have none, it is what is left of 1."""
    rename: Mapping[str, str] | None = None
    """Companions that lie in the folder under another file's name -> the released name, which the reader looks for."""


SAMPLES = (
    Sample(pattern="butd_6_fields.tsv", layout="bottom-up-attention", fields=BOXES, ids="numbers", shortened=True),
    Sample(pattern="lxmert_obj36_style.tsv", layout="lxmert-obj36", fields=LABELS),
    Sample(pattern="volta_13_fields.tsv", layout="volta-tsv", fields=(*LABELS, "probs")),
    Sample(pattern="trainval2014_*.zip", layout="vlbert-json", fields=BOXES, ids="numbers"),
    Sample(
        pattern="*_frcnn.zip",
        layout="vlbert-cc-json",
        fields=PROBS,
        ids="positions",
        sorted_by_probs=True,
        companions=("*_frcnn.json",),
    ),
    Sample(
        pattern="updn_fixed36_style.hdf5",
        layout="updn-hdf5",
        fields=BOXES,
        ids="numbers",
        companions=("updn_fixed36_style_imgid2idx.pkl",),
    ),
    Sample(
        pattern="ban_adaptive.hdf5",
        layout="ban-hdf5",
        fields=BOXES,
        ids="numbers",
        shortened=True,
        rename={"updn_fixed36_style_imgid2idx.pkl": "ban_adaptive_imgid2idx.pkl"},
    ),
    Sample(pattern="volta_per_image_groups.h5", layout="volta-hdf5", fields=LABELS, sorted_by="name"),
    Sample(
        pattern="unsupervised_visualbert.h5",
        layout="unsupervised-visualbert-hdf5",
        fields=LABELS,
        companions=("unsupervised_visualbert.json",),
    ),
    Sample(pattern="volta_base64.lmdb", layout="volta-lmdb", fields=LABELS, sorted_by="key"),
    Sample(
        pattern="vilbert_mt_arrays.lmdb",
        layout="vilbert-multitask-lmdb",
        fields=BOXES,
        sorted_by="key",
        ids="numbers",
    ),
    Sample(pattern="mmf.lmdb", layout="mmf-lmdb", fields=MMF, sorted_by="key", ids="own", background="absent"),
    Sample(
        pattern="*[0-9].npy",
        layout="mmf-npy",
        fields=MMF,
        holds="one",
        companions=("*_info.npy",),
        background="absent",
    ),
    Sample(pattern="vilbert_single_dict.npy", layout="vilbert-multitask-npy", fields=MMF, holds="one", ids="own"),
    Sample(pattern="milvlg.npz", layout="milvlg-npz", fields=LABELS, holds="one", ids="own"),
    Sample(
        pattern="features_*_150.th",
        layout="visualbert-th",
        fields=(*BOXES, "class_confidence"),
        holds="some",
        ids="own",
        sizes=False,
    ),
)
"""A layout is one row. (HDF5 lists the groups of a file by their names, LMDB its entries by their keys.)"""

OTHER = ("README.md", "expected.npz")


@pytest.fixture(scope="session")
def samples(golden: Path) -> Path:
    """The folder of samples: that of `--golden`, or `feature_files` in it."""
    folder = golden if (golden / "expected.npz").is_file() else golden / "feature_files"
    if not (folder / "expected.npz").is_file():
        pytest.fail(f"neither {golden} nor {folder} holds samples of feature files (expected.npz)")
    return folder


@pytest.fixture(scope="session")
def recorded(samples: Path) -> Mapping[str, NDArray[Any]]:
    with np.load(samples / "expected.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def find_sample(samples: Path, sample: Sample, folder: Path) -> Path:
    """The file of a row; it is copied if its companions must be renamed first."""
    found = sorted(path for path in samples.iterdir() if fnmatch(path.name, sample.pattern))
    assert len(found) == 1, f"expected one file {sample.pattern} in {samples}, found {found}"
    if sample.rename is None:
        return found[0]
    for name, released in sample.rename.items():
        shutil.copy(samples / name, folder / released)
    return Path(shutil.copy(found[0], folder))


def expected_regions(sample: Sample, arrays: Mapping[str, NDArray[Any]], image: int) -> dict[str, NDArray[Any]]:
    """Recorded arrays of an image by the field of a region array, in the order in which they are read."""
    probs = arrays[f"{image}/cls_prob"]
    order: Any = slice(None)
    if sample.sorted_by_probs:
        order = sorted(range(len(probs)), key=lambda row: -probs[row].max())
    regions = {field: arrays[f"{image}/{RECORDED[field]}"][order] for field in sample.fields}
    if "probs" in regions and sample.background == "absent":
        rest = np.clip(1 - regions["probs"].sum(axis=1, keepdims=True), 0, 1)
        regions["probs"] = np.concatenate([regions["probs"], rest], axis=1)
    elif "probs" in regions:
        regions["probs"] = np.concatenate([regions["probs"][:, 1:], regions["probs"][:, :1]], axis=1)
    return regions


def expected_id(sample: Sample, arrays: Mapping[str, NDArray[Any]], image: int) -> str:
    name = str(arrays[f"{image}/img_id"])
    if sample.ids == "positions":
        return f"{image:08d}"
    if sample.ids == "numbers":
        return str(int("".join(filter(str.isdigit, canonical(name)))))
    return name


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.pattern)
def test_a_sample_equals_the_recording(
    samples: Path, recorded: Mapping[str, NDArray[Any]], sample: Sample, tmp_path: Path
) -> None:
    reader = open_reader(find_sample(samples, sample, tmp_path))
    assert reader.layout == sample.layout
    images = list(reader.images())
    assert images[-1].position == reader.total
    numbers = [find_number(sample, recorded, image) for image in images]
    assert len(set(numbers)) == len(numbers), "an image was read twice"
    every = [int(key.partition("/")[0]) for key in recorded if key.endswith("/img_id")]
    assert {"all": len(numbers) == len(every), "one": len(numbers) == 1, "some": numbers}[sample.holds], numbers
    if sample.sorted_by == "recording":
        assert numbers == sorted(numbers)
    elif sample.sorted_by == "name":
        assert [image.image_id for image in images] == sorted(image.image_id for image in images)
    for number, image in zip(numbers, images, strict=True):
        compare(sample, recorded, number, image)


def find_number(sample: Sample, arrays: Mapping[str, NDArray[Any]], image: ImageRegions) -> int:
    """The recorded image that an image of a sample is: the one of its id, or of its features where ids are others."""
    numbers = [int(key.partition("/")[0]) for key in arrays if key.endswith("/img_id")]
    if sample.ids != "own":
        found = [number for number in numbers if expected_id(sample, arrays, number) == image.image_id]
    else:
        assert image.regions is not None
        features = image.regions.features
        found = [number for number in numbers if np.array_equal(arrays[f"{number}/features"], features)]
    assert len(found) == 1, f"{image.image_id} is the recorded image {found or 'of no number'}"
    return found[0]


def compare(sample: Sample, arrays: Mapping[str, NDArray[Any]], number: int, image: ImageRegions) -> None:
    regions = image.regions
    assert regions is not None
    count = len(regions)
    whole = int(arrays[f"{number}/num_boxes"])
    assert 0 < count <= whole if sample.shortened else count == whole, f"{count} regions of {whole}"
    if sample.sizes:
        assert regions.size == (int(arrays[f"{number}/img_w"]), int(arrays[f"{number}/img_h"]))
    expected = expected_regions(sample, arrays, number)
    for field in RECORDED:
        found = getattr(regions, field)
        if field not in sample.fields:
            assert found is None, f"{sample.pattern} has {field}, which its row does not say"
            continue
        assert found is not None, f"{sample.pattern} has no {field}"
        np.testing.assert_array_equal(found, expected[field][:count], err_msg=f"image {number}, {field}")


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.pattern)
def test_images_that_are_skipped_are_not_decoded(samples: Path, sample: Sample, tmp_path: Path) -> None:
    reader = open_reader(find_sample(samples, sample, tmp_path))
    first, *others = [image.image_id for image in reader.images()]
    skipped, *read = reader.images(skip={first})
    assert (skipped.image_id, skipped.regions) == (first, None)
    assert [image.image_id for image in read] == others
    assert all(image.regions is not None for image in read)


def test_every_file_is_read(samples: Path) -> None:
    for path in sorted(samples.iterdir()):
        rows = [sample for sample in SAMPLES if fnmatch(path.name, sample.pattern)]
        companions = [sample for sample in SAMPLES if any(fnmatch(path.name, name) for name in sample.companions)]
        assert len(rows) + bool(companions) + (path.name in OTHER) == 1, f"{path.name} belongs to no row, or to several"


def test_a_changed_number_is_noticed(samples: Path, recorded: Mapping[str, NDArray[Any]], tmp_path: Path) -> None:
    """The comparison can fail: one feature, one box, one probability, the background in another column."""
    sample = next(sample for sample in SAMPLES if sample.layout == "volta-tsv")
    image = next(iter(open_reader(find_sample(samples, sample, tmp_path)).images()))
    compare(sample, recorded, 0, image)
    for field in sample.fields:
        key = f"0/{RECORDED[field]}"
        changed = recorded[key].copy()
        changed[0] = np.nextafter(changed[0], np.float32(9)) if changed.dtype == np.float32 else changed[0] + 1
        with pytest.raises(AssertionError, match=f"image 0, {field}"):
            compare(sample, {**recorded, key: changed}, 0, image)
    rolled = np.roll(recorded["0/cls_prob"], 1, axis=1)
    with pytest.raises(AssertionError, match="image 0, probs"):
        compare(sample, {**recorded, "0/cls_prob": rolled}, 0, image)
