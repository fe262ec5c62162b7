"""Genuine rows of a released TSV file equal values that were decoded independently, from the file to the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.regions.formats import open_reader
from visling.regions.formats.base import convert_regions
from visling.regions.store import NativeStore
from visling.types import RegionArray

FOLDER = "coco_butd_obj36"


@pytest.fixture(scope="session")
def genuine(golden: Path) -> Path:
    """The folder of genuine rows: in that of `--golden` if it has one."""
    return golden / FOLDER if (golden / FOLDER).is_dir() else Path(__file__).parents[1] / "golden" / FOLDER


@pytest.fixture(scope="session")
def decoded(genuine: Path) -> dict[str, dict[str, Any]]:
    return {entry["img_id"]: entry for entry in json.loads((genuine / "decoded_summary.json").read_text())}


def find_tsv(genuine: Path) -> Path:
    (file,) = genuine.glob("*.tsv")
    return file


def compare(image: RegionArray, entry: dict[str, Any], tolerance: float) -> None:
    assert len(image) == entry["num_boxes"]
    assert image.size == (entry["img_w"], entry["img_h"])
    assert image.classes is not None
    assert image.attributes is not None
    assert image.classes.tolist() == entry["objects_id"]
    assert image.attributes.reshape(-1).tolist() == entry["attrs_id"]
    np.testing.assert_allclose(image.boxes[:3], entry["boxes_first3"], rtol=1e-6)
    np.testing.assert_allclose(image.features[0, :5], entry["feature_row0_first5"], rtol=tolerance, atol=1e-6)
    np.testing.assert_allclose(image.features.sum(dtype=np.float64), entry["feature_sum"], rtol=tolerance)
    assert image.class_confidence is not None
    np.testing.assert_allclose(image.class_confidence[:3], entry["objects_conf_first3"], rtol=tolerance)


def test_rows_equal_the_decoded_values(genuine: Path, decoded: dict[str, dict[str, Any]]) -> None:
    reader = open_reader(find_tsv(genuine))
    assert (reader.layout, reader.feature_size) == ("lxmert-obj36", 2048)
    images = list(reader.images())
    assert [image.image_id for image in images] == list(decoded)
    for image in images:
        assert image.regions is not None
        compare(image.regions, decoded[image.image_id], 1e-6)


def test_rows_are_as_the_extraction_leaves_them(genuine: Path) -> None:
    """Facts of these features that another column, type or order would break."""
    for _, regions, _, _ in open_reader(find_tsv(genuine)).images():
        assert regions is not None
        assert regions.classes is not None
        assert regions.attributes is not None
        assert regions.class_confidence is not None
        assert regions.features.min() >= 0
        gap = np.array(regions.size) - regions.boxes[:, 2:].max(axis=0)
        assert ((gap > 0) & (gap < 1)).all(), "boxes end within the last pixel"
        assert 0 <= regions.classes.min() <= regions.classes.max() < 1600
        assert 0 <= regions.attributes.min() <= regions.attributes.max() < 400
        assert (np.diff(regions.class_confidence) > 0).any(), "regions are not in the order of their confidence"


def test_rows_reach_the_store(genuine: Path, decoded: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    convert_regions([open_reader(find_tsv(genuine))], tmp_path / "store")
    store = NativeStore.open(tmp_path / "store")
    assert store.ids == sorted(decoded)
    for image_id in store.ids:
        compare(store[image_id], decoded[image_id], 2**-11)  # half precision has 11 bits
