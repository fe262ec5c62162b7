"""The Visual Genome detector without a recording: selections, given boxes, its folder, its switches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visling.errors import CheckpointError, ConfigError
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.vision import visual_genome
from visling.vision.detectors import load_detector
from visling.vision.extract import extract
from visling.vision.visual_genome import Backbone, VisualGenomeDetector
from visling.vision.visual_genome_config import VisualGenomeConfig, original_settings

CLASSES, ATTRIBUTES = tuple(map("class {}".format, range(5))), tuple(map("attribute {}".format, range(3)))


def tiny(**changes: Any) -> VisualGenomeConfig:
    sizes: dict[str, Any] = {
        "depth": 50, "stem_size": 4, "width": 2, "proposal_size": 6, "anchor_sizes": (16.0, 32.0),
        "pool_size": 4, "proposals": 20, "candidates": 60, "short_side": 64, "long_side": 100, "min_regions": 4,
        "max_regions": 8,
    }  # fmt: skip
    return VisualGenomeConfig(class_names=CLASSES, attribute_names=ATTRIBUTES, **{**sizes, **changes})


def build(**changes: Any) -> VisualGenomeDetector:
    return VisualGenomeDetector(tiny(**changes)).eval()


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.mark.parametrize("half", [False, True])
def test_a_saved_detector_finds_the_same_regions(tmp_path: Path, half: bool) -> None:
    detector = build()
    detector.save(tmp_path / "saved", half=half)
    loaded = load_detector(tmp_path / "saved")
    assert isinstance(loaded, VisualGenomeDetector)
    assert loaded.config == detector.config
    assert loaded.fingerprint == detector.fingerprint
    images = pictures((50, 70))
    for found, expected in zip(loaded.detect(images), detector.detect(images), strict=True):
        for field in dataclasses.fields(found):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))


def test_a_folder_in_half_precision_has_half_the_bytes(tmp_path: Path) -> None:
    for half in (False, True):
        build(width=16).save(tmp_path / str(half), half=half)
    whole, halved = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("False", "True"))
    assert halved < 0.6 * whole


@pytest.mark.parametrize(
    "change",
    [
        {"channel_order": "RGB"},
        {"boxes": "proposals"},
        {"resize": "factor"},
        {"short_side": 80},
        {"thresholds": (0.5,)},
        {"count_no_attribute": True},
        {"max_regions": 9},
        {"selection": "original"},
    ],
)
def test_the_fingerprint_depends_on_every_switch(change: dict[str, Any]) -> None:
    detector = build()
    before = detector.fingerprint
    detector.config = dataclasses.replace(detector.config, **change)
    assert detector.fingerprint != before


def test_the_fingerprint_depends_on_the_weights_and_not_on_counters() -> None:
    detector = build()
    before = detector.fingerprint
    detector.state_dict()["stem.norm.num_batches_tracked"].fill_(7)
    assert detector.fingerprint == before
    detector.state_dict()["head.1.expand.norm.running_mean"][0] += 0.01
    assert detector.fingerprint != before


def test_limits_change_the_number_of_regions() -> None:
    detector = build(thresholds=(1.0,))
    (image,) = pictures((60, 60))
    detector.limit_regions(3, 5)
    assert len(detector.detect([image])[0]) == 5
    detector.limit_regions(most=4)
    assert len(detector.detect([image])[0]) == 4
    with pytest.raises(ConfigError, match="max_regions is 21; expected 1 to 20"):
        detector.limit_regions(most=21)
    with pytest.raises(ConfigError, match=r"min_regions \(9\) and max_regions \(4\)"):
        detector.limit_regions(least=9)
    assert detector.config.max_regions == 4


def test_features_with_other_limits_are_of_no_known_kind() -> None:
    detector = build()
    detector.kind = "vg-frcnn-36"
    detector.limit_regions(4, 8)
    assert detector.store_settings == {"features": "vg-frcnn-36"}, "those it has"
    detector.limit_regions(most=7)
    assert detector.store_settings == {}


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (2, 2000)])
@pytest.mark.parametrize("original", [False, True])
def test_a_picture_of_one_line_has_features(size: tuple[int, int], original: bool) -> None:
    settings = original_settings(4, 8) | {"short_side": 64, "long_side": 100, "proposals": 20} if original else {}
    detector = build(**settings)
    (image,) = pictures(size)
    assert 1 in detector.scale(image).pixels.shape
    (found,) = detector.detect([image])
    assert np.isfinite(found.features).all()
    (given,) = detector.regions_at([image], [np.array([[0, 0, size[1], size[0]]], np.float32)])
    assert given.features.any()


def change_in_place(detector: VisualGenomeDetector) -> None:
    detector.state_dict()["stages.0.0.expand.norm.weight"].mul_(1.5)


def load_others(detector: VisualGenomeDetector) -> None:
    detector.load_state_dict({name: value * 1.1 for name, value in detector.state_dict().items()})


def replace_a_tensor(detector: VisualGenomeDetector) -> None:
    convolution = detector.head.get_submodule("0.reduce.convolution")
    assert isinstance(convolution, torch.nn.Conv2d)
    convolution.weight = torch.nn.Parameter(torch.randn(16, 32, 1, 1))


def train_a_step(detector: VisualGenomeDetector) -> None:
    optimizer = torch.optim.AdamW(detector.parameters(), lr=0.01)
    detector.head[0](torch.rand(1, 32, 4, 4)).sum().backward()
    optimizer.step()


def round_to_half(detector: VisualGenomeDetector, folder: Path) -> None:
    detector.save(folder, half=True)


@pytest.mark.parametrize("change", [change_in_place, load_others, replace_a_tensor, train_a_step, round_to_half])
def test_folded_norms_are_kept_until_a_weight_changes(
    tmp_path: Path, change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = build()
    folds: list[int] = []
    fold = visual_genome._fold

    def count_and_fold(parts: torch.nn.ModuleDict) -> Backbone:
        folds.append(1)
        return fold(parts)

    monkeypatch.setattr(visual_genome, "_fold", count_and_fold)
    regions = torch.rand(2, 32, 4, 4)
    with torch.no_grad():
        before = detector.fold().head(regions)
        assert detector.fold().head(regions).equal(before)
        assert len(folds) == 1
    change(detector, *([tmp_path / "saved"] if change is round_to_half else []))
    with torch.no_grad():
        torch.testing.assert_close(detector.fold().head(regions), detector.head(regions), rtol=1e-4, atol=1e-5)
        image = torch.rand(1, 3, 40, 40) * 255
        plain = Backbone(detector.stem, detector.stages, detector.head)
        expected = detector.run_trunk(plain, image)
        found = detector.run_trunk(detector.fold(), image)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert len(folds) == 2


def test_training_gives_up_the_folded_copy() -> None:
    detector = build()
    with torch.no_grad():
        kept = detector.fold()
        assert detector.eval().fold() is kept
        assert detector.train().eval().fold() is not kept


def test_weights_whose_changes_are_not_counted_are_folded_each_time() -> None:
    with torch.inference_mode():
        detector = build()
        assert detector.fold() is not detector.fold()


def test_regions_of_a_batch_of_equal_sizes_are_those_of_single_pictures() -> None:
    for settings in ({}, original_settings(4, 8) | {"short_side": 64, "long_side": 100, "proposals": 20}):
        detector = build(**settings)
        images = pictures((50, 70), (50, 70))
        together = detector.detect(images)
        for image, found in zip(images, together, strict=True):
            (alone,) = detector.detect([image])
            np.testing.assert_allclose(found.boxes, alone.boxes, rtol=1e-4, atol=1e-3)
            np.testing.assert_array_equal(found.classes, alone.classes)
            np.testing.assert_allclose(found.features, alone.features, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{}, original_settings(4, 8) | {"short_side": 64, "long_side": 100, "proposals": 20}]
)
def test_given_boxes_have_the_features_of_regions_found_there(settings: dict[str, Any]) -> None:
    detector = build(**{**settings, "boxes": "proposals"})
    images = pictures((47, 70), (70, 47))
    for image, found in zip(images, [detector.detect([one])[0] for one in images], strict=True):
        (given,) = detector.regions_at([image], [found.boxes])
        np.testing.assert_array_equal(given.boxes, found.boxes)
        np.testing.assert_allclose(given.features, found.features, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(given.classes, found.classes)
        np.testing.assert_array_equal(given.attributes, found.attributes)


def test_no_boxes_and_no_pictures_give_no_regions() -> None:
    detector = build()
    (found,) = detector.regions_at(pictures((40, 40)), [np.zeros((0, 4), np.float32)])
    assert len(found) == 0
    assert found.features.shape == (0, detector.feature_size)
    assert detector.detect([]) == []
    assert detector.regions_at([], []) == []


def test_a_detector_without_attributes_names_none() -> None:
    detector = VisualGenomeDetector(dataclasses.replace(tiny(), attribute_names=())).eval()
    (found,) = detector.detect(pictures((40, 40)))
    assert found.attributes is None
    assert found.attribute_confidence is None


def test_distributions_end_with_the_background() -> None:
    detector = build()
    with torch.no_grad():
        detector.predict.classify.bias[-1] = 50.0
    (found,) = detector.detect(pictures((40, 40)))
    assert found.probs is not None
    assert found.probs.shape[1] == len(CLASSES) + 1
    np.testing.assert_allclose(found.probs[:, -1], 1.0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(found.class_confidence), 0.0, atol=1e-6)


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    detector = build()
    detector.save(tmp_path / "saved")
    file = tmp_path / "saved/model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_detector(tmp_path / "saved")
    file.unlink()
    with pytest.raises(CheckpointError, match="no weight file"):
        load_detector(tmp_path / "saved")
    build(width=3).save(tmp_path / "other")
    (tmp_path / "other/model.safetensors").rename(file)
    with pytest.raises(CheckpointError, match="shape differs"):
        load_detector(tmp_path / "saved")


def test_a_folder_of_pictures_becomes_a_store(tmp_path: Path) -> None:
    """Of different sizes, one of them damaged: extraction takes the detector as any other."""
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(pictures((40, 60), (60, 40), (40, 60))):
        Image.fromarray(image).save(tmp_path / f"photos/photo_{number}.png")
    (tmp_path / "photos/broken.png").write_bytes(b"no picture")
    detector = build()
    identity = detector.fingerprint
    with StoreWriter(tmp_path / "store", feature_size=detector.feature_size, fingerprint=identity) as writer:
        report = extract(tmp_path / "photos", detector, writer)
    assert (report.done, len(report.unreadable)) == (3, 1)
    store = NativeStore.open(tmp_path / "store")
    assert store.fingerprint == identity
    found = store["photo_1"]
    (expected,) = detector.detect(pictures((40, 60), (60, 40))[1:])
    assert found.size == (40, 60)
    np.testing.assert_array_equal(found.classes, expected.classes)
    np.testing.assert_array_equal(found.attributes, expected.attributes)
    np.testing.assert_allclose(found.features, expected.features, rtol=1e-3, atol=1e-3)


def test_half_precision_changes_features_little() -> None:
    detector = build(boxes="proposals")
    (image,) = pictures((50, 70))
    boxes = [np.array([[0, 0, 70, 50], [10, 5, 40, 45]], np.float32)]
    (whole,) = detector.regions_at([image], boxes)
    (half,) = detector.regions_at([image], boxes, precision="bf16")
    assert half.features.dtype == np.float32
    assert 0 < np.abs(half.features - whole.features).max() < 0.05 * np.abs(whole.features).max()
    (found,) = detector.detect([image], precision="bf16")
    assert len(found) >= detector.config.min_regions
