"""The detector learns a toy set, keeps its promises on odd images, and loads what it saved."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.bars import draw_bars
from safetensors.torch import load_file, save_file

from visling.errors import CheckpointError, ConfigError
from visling.types import IGNORE, RegionArray
from visling.vision.backbones import SmallBackbone
from visling.vision.detector import Detector, DetectorConfig
from visling.vision.trainable import Truth

TINY = DetectorConfig(
    class_names=("wide", "tall"),
    attribute_names=("red", "blue", "bright"),
    long_side=48,
    channels=(8, 12),
    blocks=(0, 1),
    anchor_sizes=(12.0,),
    proposal_size=8,
    pool_size=3,
    feature_size=16,
    anchor_samples=16,
    region_samples=12,
    candidates=40,
    proposals=12,
    max_regions=8,
    min_confidence=0.05,
    max_attributes=2,
)


SCENES = [draw_bars(seed, 16) for seed in range(16)]


@pytest.fixture(scope="module")
def trained() -> tuple[Detector, list[float]]:
    torch.manual_seed(0)
    detector = Detector(TINY)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-2)
    values = []
    for _ in range(70):
        loss = detector.losses([image for image, _ in SCENES], [truth for _, truth in SCENES])
        optimizer.zero_grad()
        loss.value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        values.append(float(loss.value.detach()))
    return detector.eval(), values


def test_the_loss_falls_and_the_toy_set_is_found(trained: tuple[Detector, list[float]]) -> None:
    detector, values = trained
    assert values[-1] < 0.25 * values[0], values[:: len(values) // 5]
    right = 0
    for (_, truth), regions in zip(SCENES, detector.detect([image for image, _ in SCENES]), strict=True):
        for box, label, holds in zip(truth.boxes, truth.classes, truth.attributes, strict=True):
            near = np.abs(regions.boxes - box).max(1) < 3.0
            assert regions.classes is not None
            assert regions.attributes is not None
            hit = np.flatnonzero(near & (regions.classes == label))
            right += bool(len(hit)) and set(regions.attributes[hit[0]][regions.attributes[hit[0]] >= 0]) == set(
                np.flatnonzero(holds)
            )
    assert right >= 29, f"{right} of 32 objects with class, box and attributes"


def test_regions_keep_the_promises_of_their_fields(trained: tuple[Detector, list[float]]) -> None:
    detector, _ = trained
    for regions in detector.detect([image for image, _ in SCENES[:4]]):
        count = len(regions)
        assert regions.features.shape == (count, 16)
        assert (regions.features >= 0).all()
        assert regions.boxes.shape == (count, 4)
        assert regions.boxes.dtype == np.float32
        assert regions.size == (48, 48)
        assert (regions.boxes[:, 2:] > regions.boxes[:, :2]).all()
        assert regions.boxes.min() >= 0
        assert regions.boxes.max() <= 48
        assert regions.attributes is not None
        assert regions.attribute_confidence is not None
        assert regions.attributes.shape == regions.attribute_confidence.shape == (count, 2)
        assert ((regions.attributes >= 0) == (regions.attribute_confidence >= 0.5)).all()
        assert regions.class_confidence is not None
        assert (np.diff(regions.class_confidence) <= 0).all()


def test_equal_images_are_detected_alike_in_any_batch(trained: tuple[Detector, list[float]]) -> None:
    detector, _ = trained
    images = [image for image, _ in SCENES[:5]]
    for alone, together in zip((detector.detect([image])[0] for image in images), detector.detect(images), strict=True):
        same(alone, together, tolerance=1e-4)


def same(first: RegionArray, second: RegionArray, tolerance: float = 0.0) -> None:
    for name in ("features", "boxes", "class_confidence", "attribute_confidence"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), rtol=0, atol=tolerance, err_msg=name)
    for name in ("classes", "attributes"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


def test_boxes_come_back_in_the_pixels_of_the_given_image(trained: tuple[Detector, list[float]]) -> None:
    detector, _ = trained
    image = SCENES[0][0]
    small, large = detector.detect([image])[0], detector.detect([image.repeat(3, 0).repeat(3, 1)])[0]
    assert large.size == (144, 144)
    best = small.boxes[0] * 3
    assert np.abs(large.boxes - best).max(1).min() < 6.0


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 97)])
def test_odd_images_are_no_problem(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    detector = Detector(dataclasses.replace(TINY, min_confidence=0.99)).eval()
    image = np.full((*shape, 3), 200, np.uint8)
    together = detector.detect([image, SCENES[0][0]])
    assert len(together[0]) == 0
    assert together[0].features.shape == (0, 16)
    assert together[0].size == (shape[1], shape[0])
    insisting = Detector(dataclasses.replace(TINY, min_confidence=0.99, min_regions=1)).eval()
    regions = insisting.detect([image])[0]
    assert len(regions) <= 1
    assert (regions.boxes[:, 2:] <= np.array(shape[::-1])).all()
    assert detector.detect([]) == []


def test_min_and_max_regions_bound_the_count() -> None:
    torch.manual_seed(2)
    image = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    for least, most in ((0, 8), (3, 8), (3, 3)):
        detector = Detector(
            dataclasses.replace(TINY, min_confidence=1.0, min_regions=least, max_regions=most, final_threshold=0.9)
        ).eval()
        assert len(detector.detect([image])[0]) == least
    free = Detector(dataclasses.replace(TINY, min_confidence=0.0, max_regions=5, final_threshold=0.95)).eval()
    assert len(free.detect([image])[0]) == 5


def test_images_without_objects_and_objects_without_attributes_are_trained_on() -> None:
    torch.manual_seed(0)
    detector = Detector(TINY)
    image, truth = SCENES[0]
    nothing = Truth(
        boxes=np.zeros((0, 4), np.float32),
        classes=np.zeros(0, np.int64),
        attributes=np.zeros((0, 3), bool),
        has_attributes=np.zeros(0, bool),
    )
    loss = detector.losses([image, image], [nothing, nothing])
    assert torch.isfinite(loss.value)
    assert {
        name: int(count) for name, (_, count) in loss.parts.items() if name in ("proposal_box", "box", "attribute")
    } == dict.fromkeys(("proposal_box", "box", "attribute"), 0)
    untold = dataclasses.replace(truth, has_attributes=np.array([False, False]))
    parts = detector.losses([image], [untold]).parts
    assert int(parts["attribute"][1]) == 0
    assert int(parts["box"][1]) > 0


def test_crowds_are_neither_objects_nor_background() -> None:
    """A crowd over the whole image leaves no anchor and no region to learn from inside it."""
    torch.manual_seed(0)
    detector = Detector(dataclasses.replace(TINY, anchor_negative=0.001, anchor_positive=0.001, region_positive=0.001))
    image, _ = SCENES[0]
    crowd = Truth(
        boxes=np.array([[0, 0, 48, 48]], np.float32),
        classes=np.array([IGNORE]),
        attributes=np.zeros((1, 3), bool),
        has_attributes=np.array([False]),
    )
    parts = detector.losses([image], [crowd]).parts
    assert int(parts["proposal_box"][1]) <= 1  # the forced best anchor is not an object either
    assert int(parts["class"][1]) == 0
    assert int(parts["box"][1]) == 0


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    for settings in (
        TINY,
        dataclasses.replace(
            TINY, class_specific_boxes=True, stem_stride=2, stride=4, channels=(8, 8, 12), blocks=(0, 0, 1)
        ),
    ):
        detector = Detector(settings)
        detector.losses([image for image, _ in SCENES[:6]], [truth for _, truth in SCENES[:6]]).value.backward()  # type: ignore[no-untyped-call]
        still = [
            name
            for name, parameter in detector.named_parameters()
            if parameter.grad is None or not parameter.grad.abs().sum() > 0
        ]
        assert not still


def test_saved_and_loaded_detectors_are_equal(trained: tuple[Detector, list[float]], tmp_path: Path) -> None:
    detector, _ = trained
    detector.save(tmp_path / "run" / "model")
    for folder in (tmp_path / "run" / "model", tmp_path / "run"):
        loaded = Detector.load(folder)
        assert loaded.config == detector.config
        assert loaded.fingerprint == detector.fingerprint
        assert not loaded.training
        same(loaded.detect([SCENES[0][0]])[0], detector.detect([SCENES[0][0]])[0])


def test_the_fingerprint_distinguishes_weights_and_settings(
    trained: tuple[Detector, list[float]], tmp_path: Path
) -> None:
    detector, _ = trained
    detector.save(tmp_path)
    other = Detector.load(tmp_path)
    with torch.no_grad():
        other.embed.bias[3] += 1e-3
    assert other.fingerprint != detector.fingerprint
    twin = Detector.load(tmp_path)
    twin.config = dataclasses.replace(detector.config, min_confidence=0.2)
    assert twin.fingerprint != detector.fingerprint


def test_loading_is_strict(trained: tuple[Detector, list[float]], tmp_path: Path) -> None:
    detector, _ = trained
    with pytest.raises(CheckpointError, match=r"is not a detector: no config.json"):
        Detector.load(tmp_path)
    detector.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = weights.pop("embed.bias")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing.*embed\.bias"):
        Detector.load(tmp_path)
    save_file({**weights, "embed.bias": kept[:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"embed\.bias: \(15,\), expected \(16,\)"):
        Detector.load(tmp_path)
    save_file({**weights, "embed.bias": kept, "extra": kept.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected \['extra'\]"):
        Detector.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        Detector.load(tmp_path)
    detector.save(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["config"]["strid"] = content["config"].pop("stride")
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"another version.*'strid'.*'stride'"):
        Detector.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="does not describe a detector"):
        Detector.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        Detector.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 16}, "stride 16 is not the stride of a level"),
        ({"blocks": (1,)}, "channels and blocks"),
        ({"class_names": ()}, "at least one class"),
        ({"min_regions": 9}, "exceeds max_regions"),
        ({"max_regions": 13}, "exceeds proposals"),
        ({"attribute_names": ("red", "red")}, "more than once"),
        ({"anchor_sizes": ()}, "at least one value"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **change)


def test_the_feature_map_has_the_promised_stride() -> None:
    for stem, channels, stride in ((4, (4, 6, 8), 4), (4, (4, 6, 8), 8), (2, (4, 6, 8), 8), (2, (4, 6, 8), 2)):
        backbone = SmallBackbone(channels=channels, blocks=(0, 0, 0), stem_stride=stem, stride=stride)
        assert backbone.multiple == stem * 4
        assert backbone(torch.zeros(2, 3, 32, 48)).shape == (2, backbone.channels, 32 // stride, 48 // stride)


def test_half_precision_finds_the_same_objects(trained: tuple[Detector, list[float]]) -> None:
    detector, _ = trained
    exact, rough = (detector.detect([SCENES[0][0]], precision=precision)[0] for precision in ("fp32", "bf16"))
    assert rough.features.dtype == np.float32
    assert np.abs(rough.boxes[:2] - exact.boxes[:2]).max() < 2.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = Detector(TINY).losses([image for image, _ in SCENES[:3]], [truth for _, truth in SCENES[:3]])
    assert loss.value.dtype == torch.float32
    assert loss.value.isfinite()


def test_features_at_detected_boxes_are_those_of_the_detector(trained: tuple[Detector, list[float]]) -> None:
    """Also in another order, and next to an image without boxes."""
    detector, _ = trained
    images = [image for image, _ in SCENES[:3]]
    detected = detector.detect(images)
    again = detector.regions_at(images, [regions.boxes[::-1].copy() for regions in detected])
    for first, second in zip(detected, again, strict=True):
        np.testing.assert_array_equal(second.boxes, first.boxes[::-1])
        assert second.size == first.size
        np.testing.assert_allclose(second.features, first.features[::-1], atol=1e-4)
        np.testing.assert_array_equal(second.classes, first.classes[::-1])  # type: ignore[index]
    none, alone = detector.regions_at(images[:2], [np.zeros((0, 4), np.float32), detected[1].boxes])
    assert (len(none), none.features.shape, none.boxes.shape) == (0, (0, 16), (0, 4))
    same(alone, detected[1], tolerance=1e-4)
    assert detector.regions_at([], []) == []
