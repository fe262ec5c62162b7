"""Extraction survives bad files and interruption, and an image's regions do not depend on its company."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visling.errors import DataError
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.types import RegionArray
from visling.vision import extract as extraction
from visling.vision.detector import Detector, DetectorConfig
from visling.vision.extract import extract
from visling.vision.image_files import find_images

CONFIG = DetectorConfig(
    class_names=("thing",),
    attribute_names=("red",),
    long_side=32,
    channels=(4, 6),
    blocks=(0, 0),
    anchor_sizes=(12.0,),
    proposal_size=4,
    pool_size=2,
    feature_size=5,
    candidates=20,
    proposals=6,
    max_regions=4,
    min_regions=2,
    min_confidence=0.9,
)


class Memory:
    """A writer that can be made to fail."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.regions: dict[str, RegionArray] = {}
        self.committed: list[str] = []
        self.fail_at = fail_at

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.regions

    def add(self, image_id: str, regions: RegionArray) -> None:
        assert image_id not in self.regions
        if len(self.regions) == self.fail_at:
            raise KeyboardInterrupt
        self.regions[image_id] = regions

    def commit(self) -> None:
        self.committed = list(self.regions)


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector(CONFIG).train()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(14):
        size = (20, 32) if number % 4 == 3 else (32, 32)
        place = tmp_path / "images" / ("a" if number < 7 else "b/c")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(place / f"image_{number}.png")
    return tmp_path / "images"


def test_every_image_is_written_once_and_as_if_alone(folder: Path, detector: Detector) -> None:
    writer, calls = Memory(), []
    report = extract(folder, detector, writer, batch_size=4, progress=lambda done, total: calls.append((done, total)))
    assert (report.done, report.skipped_existing, report.unreadable) == (14, 0, ())
    assert report.regions == sum(map(len, writer.regions.values())) >= 14
    assert sorted(writer.regions) == sorted(f"image_{n}" for n in range(14)) == sorted(writer.committed)
    assert calls[-1] == (14, 14)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert not detector.training
    for path in find_images(folder):
        alone = Memory()
        extract([path], detector, alone)
        for name in ("features", "boxes"):
            np.testing.assert_allclose(
                getattr(alone.regions[path.stem], name), getattr(writer.regions[path.stem], name), atol=1e-4
            )
        with Image.open(path) as image:
            assert alone.regions[path.stem].size == image.size


def test_distributions_over_classes_are_kept_if_they_are_small_or_asked_for(
    folder: Path, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(probs: bool | None = None) -> list[RegionArray]:
        writer = Memory()
        extract(folder, detector, writer, probs=probs)
        return list(writer.regions.values())

    for regions in kept():
        assert regions.probs is not None
        assert regions.class_confidence is not None
        assert regions.probs.shape == (len(regions), 2)  # its one class, then the background
        np.testing.assert_allclose(regions.probs.sum(1), 1.0, atol=1e-5)
        np.testing.assert_allclose(regions.probs[:, :-1].max(1), regions.class_confidence, atol=1e-6)
    assert all(regions.probs is None for regions in kept(probs=False))
    monkeypatch.setattr(extraction, "FEW_CLASSES", 0)
    assert all(regions.probs is None for regions in kept())
    assert all(regions.probs is not None for regions in kept(probs=True))


def test_bad_files_are_reported_and_the_rest_is_done(folder: Path, detector: Detector) -> None:
    whole = (folder / "a" / "image_0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.png").write_text("<html>")
    (folder / "notes.txt").write_text("not looked at")
    (folder / ".hidden.png").write_text("not looked at")
    writer = Memory()
    report = extract(folder, detector, writer, batch_size=3)
    assert report.done == 14
    assert sorted(image.path.name for image, _ in report.unreadable) == ["cut.png", "empty.jpg", "page.png"]
    assert all(reason for _, reason in report.unreadable)


def test_an_interrupted_extraction_resumes(folder: Path, detector: Detector, tmp_path: Path) -> None:
    whole, store = Memory(), tmp_path / "store"
    extract(folder, detector, whole, batch_size=2)

    class Failing(StoreWriter):
        def add(self, image_id: str, regions: RegionArray) -> None:
            if len(self) == 9:
                raise KeyboardInterrupt
            super().add(image_id, regions)

    arguments = {
        "feature_size": 5,
        "fingerprint": detector.fingerprint,
        "class_names": ("thing",),
        "attribute_names": ("red",),
        "dtype": "float32",
    }
    with pytest.raises(KeyboardInterrupt), Failing(store, **arguments) as writer:  # type: ignore[arg-type]
        extract(folder, detector, writer, batch_size=2)
    with StoreWriter(store, **arguments, resume=True) as again:  # type: ignore[arg-type]
        report = extract(folder, detector, again, batch_size=2)
    assert report.skipped_existing >= 8
    assert report.done + report.skipped_existing == 14
    opened = NativeStore.open(store)
    for image_id, regions in whole.regions.items():
        np.testing.assert_allclose(opened[image_id].features, regions.features, atol=1e-4)
        np.testing.assert_allclose(opened[image_id].boxes, regions.boxes, atol=1e-3)


def test_an_interruption_costs_one_batch_at_most(folder: Path, detector: Detector) -> None:
    writer = Memory(fail_at=9)
    with pytest.raises(KeyboardInterrupt):
        extract(folder, detector, writer, batch_size=2)
    assert len(writer.committed) == 8


def test_equal_stems_are_refused_before_any_work(folder: Path, detector: Detector) -> None:
    (folder / "b" / "image_3.jpg").write_bytes((folder / "a" / "image_3.png").read_bytes())
    writer = Memory()
    with pytest.raises(DataError, match=r"1 image names occur more than once.*image_3"):
        extract(folder, detector, writer)
    assert not writer.regions


def test_a_limit_counts_from_the_front(folder: Path, detector: Detector) -> None:
    writer = Memory()
    assert extract(folder, detector, writer, limit=5).done == 5
    report = extract(folder, detector, writer, limit=7)
    assert (report.done, report.skipped_existing) == (2, 5)


def test_nothing_to_extract_is_an_error(tmp_path: Path, detector: Detector) -> None:
    with pytest.raises(DataError, match="no image folder"):
        extract(tmp_path / "absent", detector, Memory())
    with pytest.raises(DataError, match="no image in"):
        extract(tmp_path, detector, Memory())
    with pytest.raises(DataError, match="no image was given"):
        extract([], detector, Memory())
