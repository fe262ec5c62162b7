"""What a detector's training starts from: heads row by name, a plain ResNet, frozen parts, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from visling.errors import CheckpointError, ConfigError
from visling.vision.backbones import ResNetBackbone
from visling.vision.detector import Detector
from visling.vision.detector_config import DetectorConfig, ResNetConfig
from visling.vision.detector_start import read_trainable, start_from_detector, start_from_resnet
from visling.vision.region_detector import RegionDetector

SMALL = DetectorConfig(
    class_names=("cat", "dog", "car"),
    attribute_names=("red", "small"),
    long_side=32,
    channels=(8, 12),
    blocks=(0, 1),
    anchor_sizes=(12.0,),
    proposal_size=8,
    pool_size=3,
    feature_size=16,
    proposals=12,
    max_regions=8,
    class_specific_boxes=True,
)
RESNET = ResNetConfig(blocks=(1, 2, 1), stem_size=4, widths=(2, 3, 4, 5))
ON_RESNET = replace(SMALL, resnet=RESNET, stride=16)


def other_names(config: DetectorConfig, *, attributes: tuple[str, ...] = ("small", "wet")) -> DetectorConfig:
    return replace(config, class_names=("bus", "dog"), attribute_names=attributes)


def test_rows_of_the_same_name_are_kept_and_the_rest_is_taken_whole() -> None:
    trained, new = Detector(SMALL), Detector(other_names(SMALL))
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    report = start_from_detector(new, trained, "trained")
    own, theirs = new.state_dict(), trained.state_dict()
    for kind in ("weight", "bias"):
        classify, old = own[f"classify.{kind}"], theirs[f"classify.{kind}"]
        assert torch.equal(classify[0], before[f"classify.{kind}"][0]), "bus is new"
        assert torch.equal(classify[1:], old[[1, 3]]), "dog and the background"
        assert torch.equal(own[f"regress.{kind}"][4:8], theirs[f"regress.{kind}"][4:8]), "four rows a class"
        assert torch.equal(own[f"regress.{kind}"][:4], before[f"regress.{kind}"][:4])
        assert torch.equal(own[f"describe.{kind}"][0], theirs[f"describe.{kind}"][1])
        assert torch.equal(own[f"describe.{kind}"][1], before[f"describe.{kind}"][1])
    heads = {name for name in own if name.partition(".")[0] in ("classify", "regress", "describe")}
    assert set(report.taken) == set(own) - heads
    assert all(torch.equal(own[name], theirs[name]) for name in report.taken)
    assert (report.rows, report.new_rows) == (("dog", "small"), ("bus", "wet"))
    assert (report.random, report.dropped) == ((), ("cat", "car", "red"))
    text = str(report)
    assert text.startswith("starts from trained\n")
    assert "2 classes and attributes of the same name: dog, small" in text
    assert "2 classes and attributes that it does not know: bus, wet" in text
    assert "dropped     3: cat, car, red" in text


def test_equal_names_take_everything() -> None:
    trained, new = Detector(SMALL), Detector(SMALL)
    report = start_from_detector(new, trained, "trained")
    assert new.fingerprint == trained.fingerprint
    assert (report.random, report.new_rows, report.dropped) == ((), (), ())


def test_what_does_not_fit_stays_random_and_is_listed() -> None:
    trained, new = Detector(SMALL), Detector(replace(other_names(SMALL, attributes=()), feature_size=20))
    report = start_from_detector(new, trained, "trained")
    heads = ("classify.weight", "classify.bias", "regress.weight", "regress.bias")
    assert set(report.random) == {"embed.weight", "embed.bias", *heads}, "no bias without its matrix"
    assert report.rows == ()
    assert {"describe.weight", "describe.bias", "embed.weight"} <= set(report.dropped)
    assert "backbone.levels.0.0.0.weight" in report.taken


def plain_resnet(config: ResNetConfig, *, seed: int = 0) -> dict[str, Tensor]:
    """A ResNet's file under torchvision's names, random."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}

    def add(convolution: str, norm: str, outputs: int, inputs: int, side: int) -> None:
        found[f"{convolution}.weight"] = torch.randn(outputs, inputs, side, side, generator=generator) * 0.2
        for name in ("weight", "running_var"):
            found[f"{norm}.{name}"] = torch.rand(outputs, generator=generator) + 0.5
        for name in ("bias", "running_mean"):
            found[f"{norm}.{name}"] = torch.randn(outputs, generator=generator) * 0.1

    add("conv1", "bn1", config.stem_size, 3, 7)
    inputs = config.stem_size
    for stage, (width, count) in enumerate(zip(config.widths, (*config.blocks, 3), strict=True), 1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            add(f"{at}.conv1", f"{at}.bn1", width, inputs, 1)
            add(f"{at}.conv2", f"{at}.bn2", width, width, 3)
            add(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1)
            if block == 0:
                add(f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, inputs, 1)
            inputs = 4 * width
    found["fc.weight"], found["fc.bias"] = torch.zeros(10, inputs), torch.zeros(10)
    return found


def reference(file: dict[str, Tensor], images: Tensor, *, stages: int) -> Tensor:
    """torchvision's `resnet.py` in functions: the stride is in the 3 x 3 window."""

    def convolve(states: Tensor, convolution: str, norm: str, stride: int = 1) -> Tensor:
        weight = file[f"{convolution}.weight"]
        states = functional.conv2d(states, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, variance, gain, offset = (
            file[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(states, mean, variance, gain, offset)

    states = functional.max_pool2d(convolve(images, "conv1", "bn1", 2).relu(), 3, 2, 1)
    for stage in range(1, stages + 1):
        block = 0
        while (at := f"layer{stage}.{block}") + ".conv1.weight" in file:
            stride = 2 if stage > 1 and block == 0 else 1
            inner = convolve(states, f"{at}.conv1", f"{at}.bn1").relu()
            inner = convolve(inner, f"{at}.conv2", f"{at}.bn2", stride).relu()
            inner = convolve(inner, f"{at}.conv3", f"{at}.bn3")
            carried = states if block else convolve(states, f"{at}.downsample.0", f"{at}.downsample.1", stride)
            states, block = (inner + carried).relu(), block + 1
    return states


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_plain_resnet_fills_the_backbone(tmp_path: Path, suffix: str) -> None:
    file = plain_resnet(RESNET)
    path = tmp_path / f"resnet{suffix}"
    save_file(file, path) if suffix == ".safetensors" else torch.save(file, path)
    detector = Detector(ON_RESNET).eval()
    report = start_from_resnet(detector, path)
    assert isinstance(detector.backbone, ResNetBackbone)
    colours = torch.rand(2, 3, 48, 32)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (colours - mean[:, None, None]) / deviation[:, None, None]
    torch.testing.assert_close(
        detector.backbone(colours * 2 - 1), reference(file, normalised, stages=3), rtol=1e-4, atol=1e-4
    )
    assert set(report.dropped) == {"fc.weight", "fc.bias"}
    assert all(name.startswith("backbone.") for name in report.taken)
    assert {name.partition(".")[0] for name in report.random} == {"propose", "embed", "classify", "regress", "describe"}
    assert "starts from" in str(report)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "resnet.safetensors"
    save_file(plain_resnet(replace(RESNET, blocks=(1, 1, 1))), path)
    with pytest.raises(CheckpointError, match=r"does not fill the backbone(.|\n)*detector.resnet.blocks"):
        start_from_resnet(Detector(ON_RESNET), path)
    with pytest.raises(ConfigError, match="--preset resnet50"):
        start_from_resnet(Detector(SMALL), path)
    with pytest.raises(CheckpointError, match="no weight file"):
        start_from_resnet(Detector(ON_RESNET), tmp_path / "gone.pth")
    with pytest.raises(CheckpointError, match="is not a detector"):
        read_trainable(tmp_path)


def test_a_detector_without_losses_cannot_be_started_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind:
        pass

    monkeypatch.setattr("visling.vision.detector_start.load_detector", lambda folder: Blind())
    with pytest.raises(CheckpointError, match=r"finds regions, but cannot be trained here: Blind"):
        read_trainable(tmp_path)


@pytest.mark.parametrize(("config", "parts"), [(SMALL, 2), (ON_RESNET, 5)], ids=["small", "resnet"])
def test_frozen_parts_do_not_change(config: DetectorConfig, parts: int) -> None:
    detector = Detector(config)
    assert len(detector.backbone.parts) == parts
    detector.freeze(1)
    detector.train()
    frozen, trained = detector.backbone.parts[0], detector.backbone.parts[1]
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert any(parameter.requires_grad for parameter in trained.parameters())
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    statistics = {name: tensor.clone() for name, tensor in trained.state_dict().items() if "running" in name}
    detector.backbone(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())
    changed = any(not torch.equal(trained.state_dict()[name], tensor) for name, tensor in statistics.items())
    assert changed == (config is SMALL), "a ResNet's norms are always frozen"
    assert not frozen.training
    with pytest.raises(ConfigError, match=f"found {parts + 1}, expected 0 to {parts}"):
        detector.freeze(parts + 1)


def test_a_detector_on_a_resnet_keeps_what_it_promises(tmp_path: Path) -> None:
    detector = Detector(replace(ON_RESNET, min_regions=2)).eval()
    detector.save(tmp_path)
    loaded = Detector.load(tmp_path)
    assert isinstance(loaded, RegionDetector)
    assert loaded.config == detector.config
    assert loaded.fingerprint == detector.fingerprint != Detector(ON_RESNET).fingerprint
    image = torch.randint(0, 255, (20, 30, 3), dtype=torch.uint8).numpy()
    regions = loaded.detect([image])[0]
    assert regions.features.shape[1] == SMALL.feature_size
    assert len(regions) >= 2
    empty = Detector(replace(ON_RESNET, min_confidence=1.0)).eval().detect([image])[0]
    assert len(empty) == 0
    with pytest.raises(ConfigError, match="the feature map of a ResNet has stride 16; found stride 4"):
        replace(SMALL, resnet=RESNET)
    with pytest.raises(ConfigError, match="expected 3"):
        ResNetConfig(blocks=(1, 1))


def test_detectors_older_than_the_setting_keep_their_identity() -> None:
    """Stores record this value: it was computed by the version without `resnet`."""
    torch.manual_seed(0)
    detector = Detector(replace(SMALL, class_names=("a",), attribute_names=()))
    with torch.no_grad():
        for value in detector.state_dict().values():
            value.zero_()
    assert detector.fingerprint == OLD_FINGERPRINT


OLD_FINGERPRINT = "e183ce1544604d8e0073c92fafea6570382bd20cafcfed61c5f11bb3c6f9f287"
