"""Features at annotated boxes: exactly those, in their order, alone or behind the detected ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visling.data.annotations.boxes import GivenBoxes
from visling.errors import DataError
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.types import RegionArray
from visling.vision.detector import Detector, DetectorConfig
from visling.vision.extract import extract

CONFIG = DetectorConfig(
    long_side=32, channels=(4, 6), blocks=(0, 0), anchor_sizes=(12.0,), proposal_size=4, pool_size=2, feature_size=5,
    candidates=20, proposals=6, max_regions=4, min_regions=2, min_confidence=0.9,
)  # fmt: skip


class Memory(dict[str, RegionArray]):
    """A writer that keeps everything."""

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.keys()

    def add(self, image_id: str, regions: RegionArray) -> None:
        self[image_id] = regions

    def commit(self) -> None:
        pass


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector(CONFIG).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 255, (20, 32, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"COCO_train2014_{number:012d}.png")
    return tmp_path / "images"


def array(*boxes: tuple[float, ...]) -> Any:
    return np.array(boxes, np.float32).reshape(-1, 4)


BOXES = {
    "0": array((20, 2, 30, 18), (1, 1, 9, 9), (20, 2, 30, 18)),
    "1": array(),
    "2": array((-5, 3, 40, 50), (1, 1, 5, 5), (40, 5, 50, 9), (3, 3, 3, 9)),
    "3": array((0, 0, 32, 20)),
}
"""The fourth and fifth image are not listed."""


def test_exactly_the_given_boxes_are_written_in_their_order(folder: Path, detector: Detector) -> None:
    store = Memory()
    report = extract(folder, detector, store, boxes=GivenBoxes(boxes=BOXES), batch_size=2)
    names = [f"COCO_train2014_{number:012d}" for number in range(4)]
    assert sorted(store) == names
    assert (report.done, report.unlisted, report.clipped, report.empty) == (4, 2, 1, 2)
    assert report.regions == sum(map(len, store.values())) == 6
    np.testing.assert_array_equal(store[names[0]].boxes, BOXES["0"])
    np.testing.assert_allclose(store[names[0]].features[0], store[names[0]].features[2], atol=1e-6)
    assert np.abs(store[names[0]].features[0] - store[names[0]].features[1]).max() > 1e-3
    assert len(store[names[1]]) == 0
    assert store[names[1]].features.shape == (0, 5)
    assert store[names[2]].boxes.tolist() == [[0, 3, 32, 20], [1, 1, 5, 5]], "cut to the image"


def test_given_boxes_come_behind_the_detected_regions(folder: Path, detector: Detector) -> None:
    found, given, joined = Memory(), Memory(), Memory()
    extract(folder, detector, found)
    extract(folder, detector, given, boxes=GivenBoxes(boxes=BOXES))
    report = extract(folder, detector, joined, boxes=GivenBoxes(boxes=BOXES), keep_detected=True)
    assert joined.keys() == given.keys()
    assert report.regions == sum(map(len, joined.values()))
    for name, regions in joined.items():
        number = len(found[name])
        assert number >= 2
        for field in ("features", "boxes", "classes", "class_confidence", "probs"):
            first, second, both = (getattr(store[name], field) for store in (found, given, joined))
            np.testing.assert_allclose(both[:number], first, atol=1e-5, err_msg=field)
            np.testing.assert_allclose(both[number:], second, atol=1e-5, err_msg=field)
        assert regions.size == (32, 20)


def test_boxes_of_other_images_and_of_other_sizes_are_refused(folder: Path, detector: Detector) -> None:
    with pytest.raises(DataError, match="none of the 6 images has boxes"):
        extract(folder, detector, Memory(), boxes=GivenBoxes(boxes={"17": BOXES["0"]}))
    scaled = GivenBoxes(boxes={"0": BOXES["0"]}, sizes={"0": (64, 40)})
    with pytest.raises(DataError, match="32 x 20 pixels, but its boxes were drawn on 64 x 40"):
        extract(folder, detector, Memory(), boxes=scaled)


def test_an_interrupted_extraction_resumes(folder: Path, detector: Detector, tmp_path: Path) -> None:
    boxes, whole, store = GivenBoxes(boxes=BOXES), Memory(), tmp_path / "store"
    extract(folder, detector, whole, boxes=boxes, keep_detected=True)

    class Failing(StoreWriter):
        def add(self, image_id: str, regions: RegionArray) -> None:
            if len(self) == 2:
                raise KeyboardInterrupt
            super().add(image_id, regions)

    arguments: dict[str, Any] = {
        "feature_size": 5, "fingerprint": detector.fingerprint, "class_names": ("object",), "attribute_names": (),
        "dtype": "float32",
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt), Failing(store, **arguments) as writer:
        extract(folder, detector, writer, boxes=boxes, keep_detected=True, batch_size=1)
    with StoreWriter(store, **arguments, resume=True) as again:
        report = extract(folder, detector, again, boxes=boxes, keep_detected=True, batch_size=1)
    assert (report.skipped_existing, report.done, report.unlisted) == (2, 2, 2)
    opened = NativeStore.open(store)
    for name, regions in whole.items():
        np.testing.assert_allclose(opened[name].boxes, regions.boxes, atol=1e-4)
        np.testing.assert_allclose(opened[name].features, regions.features, atol=1e-4)
