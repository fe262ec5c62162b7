"""VisualBERT's network for VCR: against a slow composition under the release's names, what is frozen, what reaches a
feature, pictures, names in files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from visling import config as configs
from visling.errors import CheckpointError, ConfigError, DataError
from visling.types import Pixels, Regions
from visling.vision import ops
from visling.vision.pictures import PictureFiles
from visling.vision.resnet import Bottleneck, FrozenNorm
from visling.vision.vcr_network import (
    BLACK,
    KEYS,
    MEAN_RGB,
    STD_RGB,
    VcrNetwork,
    VcrNetworkConfig,
    prepare_image,
)

SMALL = VcrNetworkConfig(
    blocks=(1, 2, 1), stem_size=6, widths=(4, 5, 6, 7), mask_channels=3, num_classes=5, class_size=4, feature_size=9,
    dropout_rate=0.0, picture_width=64, picture_height=32,
)  # fmt: skip
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
Scene = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def lively(config: VcrNetworkConfig = SMALL) -> VcrNetwork:
    """A network whose norms are not the identity, as if trained."""
    network = VcrNetwork(config)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(1.0, 0.1)
                module.bias.normal_(0.2, 0.1)
                module.running_mean.normal_(0.0, 0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.6, 1.4)  # type: ignore[union-attr]
    return network


def scene() -> Scene:
    """Two images, three and one real regions: boxes, which are real, classes, instance masks."""
    boxes = torch.tensor(
        [
            [[0.0, 0.0, 79.0, 47.0], [5.2, 5.0, 30.7, 40.0], [40.0, 8.0, 41.0, 9.0]],
            [[3.0, 3.0, 300.0, 44.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
        ]
    )
    mask = torch.tensor([[True, True, True], [True, False, False]])
    classes = torch.tensor([[0, 4, 2], [1, 0, 0]])
    return torch.randn(2, 3, 48, 80), boxes, mask, classes, (torch.rand(2, 3, 14, 14) < 0.6).float()


# ---------------------------------------------------------------------------------- slowly, under the release's names


class Slow:
    """The release's network step by step, from tensors under its names."""

    def __init__(self, tensors: Mapping[str, Tensor], *, training: bool) -> None:
        self.tensors, self.training = tensors, training
        self.measured: dict[str, tuple[Tensor, Tensor]] = {}
        """Norm -> mean and variance of the batch."""

    def norm(self, states: Tensor, name: str) -> Tensor:
        mean, variance = self.tensors[f"{name}.running_mean"], self.tensors[f"{name}.running_var"]
        if self.training:
            mean, variance = states.mean((0, 2, 3)), states.var((0, 2, 3), unbiased=False)
            self.measured[name] = mean, states.var((0, 2, 3), unbiased=True)
        scale = self.tensors[f"{name}.weight"] / (variance + 1e-5).sqrt()
        return (states - mean[:, None, None]) * scale[:, None, None] + self.tensors[f"{name}.bias"][:, None, None]

    def bottleneck(self, states: Tensor, name: str, stride: int) -> Tensor:
        """torchvision's bottleneck with the stride moved to the first convolution."""
        weight = {number: self.tensors[f"{name}.conv{number}.weight"] for number in (1, 2, 3)}
        inner = functional.relu(self.norm(functional.conv2d(states, weight[1], stride=stride), f"{name}.bn1"))
        inner = functional.relu(self.norm(functional.conv2d(inner, weight[2], padding=1), f"{name}.bn2"))
        inner = self.norm(functional.conv2d(inner, weight[3]), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in self.tensors:
            shortcut = functional.conv2d(states, self.tensors[f"{name}.downsample.0.weight"], stride=stride)
            states = self.norm(shortcut, f"{name}.downsample.1")
        return functional.relu(inner + states)

    def stage(self, states: Tensor, name: str, stride: int) -> Tensor:
        block = 0
        while f"{name}.{block}.conv1.weight" in self.tensors:
            states = self.bottleneck(states, f"{name}.{block}", stride if block == 0 else 1)
            block += 1
        return states

    def __call__(self, images: Tensor, boxes: Tensor, mask: Tensor, classes: Tensor, instances: Tensor) -> Tensor:
        """(K, F), region after region."""
        states = functional.conv2d(images, self.tensors["detector.backbone.0.weight"], stride=2, padding=3)
        states = functional.relu(self.norm(states, "detector.backbone.1"))
        states = functional.max_pool2d(states, 3, stride=2, padding=1)
        for at, stride in ((4, 1), (5, 2), (6, 2)):
            states = self.stage(states, f"detector.backbone.{at}", stride)
        pooled = []
        for row, region in mask.nonzero().tolist():
            cells = align(states[row].detach().double().numpy(), boxes[row, region].tolist())
            shape = self.mask_map(instances[row, region].double().numpy() - 0.5)
            cells[: len(shape)] += shape
            pooled.append(torch.from_numpy(cells).float())
        maps = self.stage(torch.stack(pooled), "detector.after_roi_align.0", 1).mean((2, 3))
        named = self.tensors["detector.object_embed.weight"][classes[mask]]
        weight, bias = (self.tensors[f"detector.obj_downsample.1.{end}"] for end in ("weight", "bias"))
        return functional.relu(torch.cat([maps, named], 1) @ weight.T + bias)

    def mask_map(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """3 x 3 windows at every other cell of a mask, which is surrounded by zeros."""
        weight, bias = (self.tensors[f"detector.mask_upsample.{end}"].double().numpy() for end in ("weight", "bias"))
        padded = np.pad(values, 1)
        found = np.zeros((len(weight), 7, 7))
        for channel in range(len(weight)):
            for y in range(7):
                for x in range(7):
                    window = padded[2 * y : 2 * y + 3, 2 * x : 2 * x + 3]
                    found[channel, y, x] = (window * weight[channel, 0]).sum() + bias[channel]
        return found


def align(plane: NDArray[np.float64], box: list[float]) -> NDArray[np.float64]:
    """RoIAlign to 7 x 7 at 1/16 as it was first released: as many samples as a bin has cells, no shift by half a
    cell."""
    x1, y1, x2, y2 = (value / 16 for value in box)
    wide, high = max(x2 - x1, 1.0), max(y2 - y1, 1.0)
    across, down = math.ceil(wide / 7), math.ceil(high / 7)
    found = np.zeros((len(plane), 7, 7))
    for row in range(7):
        for column in range(7):
            samples = [
                sample(plane, x1 + (column + (j + 0.5) / across) * wide / 7, y1 + (row + (i + 0.5) / down) * high / 7)
                for i in range(down)
                for j in range(across)
            ]
            found[:, row, column] = np.mean(samples, axis=0)
    return found


def sample(plane: NDArray[np.float64], x: float, y: float) -> NDArray[np.float64]:
    height, width = plane.shape[1:]
    if not (-1 <= x <= width and -1 <= y <= height):
        return np.zeros(len(plane))
    x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
    left, top = min(int(x), width - 2), min(int(y), height - 2)
    a, b = x - left, y - top
    corners = plane[:, top : top + 2, left : left + 2]
    return np.asarray(np.einsum("cyx,y,x->c", corners, [1 - b, b], [1 - a, a]))


def official(network: VcrNetwork) -> dict[str, Tensor]:
    return KEYS["official"].invert({f"extractor.{name}": tensor for name, tensor in network.state_dict().items()})


@pytest.mark.parametrize("training", [True, False])
def test_features_are_those_of_the_slow_composition(training: bool) -> None:
    network, given = lively().train(training), scene()
    before = {name: tensor.clone() for name, tensor in official(network).items()}
    slow = Slow(before, training=training)
    expected = slow(*given)
    features, maps = network(*given)
    mask = given[2]
    assert features.shape == (2, 3, SMALL.feature_size)
    assert maps.shape == (4, 28)
    assert_close(features[mask], expected, **CLOSE)
    assert bool((features[~mask] == 0).all())
    assert bool((expected > 0).any(1).all())
    after = official(network)
    norms = {name.removesuffix(".running_mean") for name in before if name.endswith(".running_mean")}
    assert slow.measured.keys() == (norms if training else set())
    for name in norms:
        own = before[f"{name}.running_mean"], before[f"{name}.running_var"]
        measured = slow.measured.get(name, own)
        for kind, old, new in zip(("running_mean", "running_var"), own, measured, strict=True):
            assert_close(after[f"{name}.{kind}"], 0.9 * old + 0.1 * new, **CLOSE)


MUTATIONS: Mapping[str, Callable[[VcrNetwork], object]] = {
    "stride in the 3 x 3 window": lambda network: _move_stride(network.get_submodule("stages.1.0")),
    "a map of half the size": lambda network: _stride(network.get_submodule("head.0")),
    "no mask": lambda network: network.masks.weight.data.zero_(),
    "frozen norms": lambda network: [norm.eval() for norm in network.modules() if isinstance(norm, nn.BatchNorm2d)],
    "another class": lambda network: network.classes.weight.data.copy_(network.classes.weight.data.roll(1, 0)),
}


def _move_stride(block: nn.Module) -> None:
    assert isinstance(block, Bottleneck)
    stride, block.reduce.convolution.stride = block.reduce.convolution.stride, (1, 1)
    block.convolve.convolution.stride = stride


def _stride(block: nn.Module) -> None:
    assert isinstance(block, Bottleneck)
    assert block.shortcut is not None
    block.reduce.convolution.stride = block.shortcut.convolution.stride = (2, 2)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_network_is_noticed(mutation: str) -> None:
    network, given = lively().train(), scene()
    expected = Slow(official(network), training=True)(*given)
    MUTATIONS[mutation](network)
    with pytest.raises(AssertionError):
        assert_close(network(*given)[0][given[2]], expected, **CLOSE)


@pytest.mark.parametrize("change", [{"aligned": True}, {"sampling_ratio": 1}, {"scale": 1 / 15}])
def test_another_pooling_is_noticed(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    network, given = lively().eval(), scene()
    expected = Slow(official(network), training=False)(*given)
    real = ops.roi_align
    monkeypatch.setattr(ops, "roi_align", lambda *arguments, **options: real(*arguments, **(options | change)))
    with pytest.raises(AssertionError):
        assert_close(network(*given)[0][given[2]], expected, **CLOSE)


# ----------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("training", [True, False])
def test_padding_does_not_reach_a_region(training: bool) -> None:
    network, (images, boxes, mask, classes, instances) = lively().train(training), scene()
    features, _ = network(images, boxes, mask, classes, instances)
    other = ~mask
    boxes[other], classes[other], instances[other] = 7.0, 3, 0.2
    assert torch.equal(network(images, boxes, mask, classes, instances)[0], features)
    wider = [functional.pad(tensor, (0,) * 2 * (tensor.dim() - 2) + (0, 2)) for tensor in (boxes, mask, classes)]
    wide, _ = network(images, *wider, functional.pad(instances, (0, 0, 0, 0, 0, 2)))
    assert_close(wide[:, :3], features, **CLOSE)


def test_mask_and_class_change_their_own_region_alone() -> None:
    network, (images, boxes, mask, classes, instances) = lively().eval(), scene()
    features, _ = network(images, boxes, mask, classes, instances)
    erased, renamed = instances.clone(), classes.clone()
    erased[0, 1] = 0.0
    renamed[0, 1] = 3
    for masked, named in ((erased, classes), (instances, renamed)):
        changed, _ = network(images, boxes, mask, named, masked)
        differs = ~torch.isclose(changed, features, **CLOSE).all(-1)
        assert differs.tolist() == [[False, True, False], [False, False, False]]


def test_one_image_may_have_several_rows() -> None:
    network, (images, boxes, mask, classes, instances) = lively().eval(), scene()
    row = torch.tensor([1, 1])
    shared, _ = network(images, boxes, mask, classes, instances, row)
    spelled, _ = network(images[row], boxes, mask, classes, instances)
    assert_close(shared, spelled, **CLOSE)


def test_images_without_regions_have_no_features() -> None:
    images, boxes, mask, classes, instances = scene()
    features, maps = lively().train()(images, boxes, torch.zeros_like(mask), classes, instances)
    assert features.shape == (2, 3, 9)
    assert maps.shape == (0, 28)
    assert not bool(features.any())


def test_frozen_stages_stay_as_they_are() -> None:
    """Weights and statistics; the last stage and what is not the ResNet's are trained."""
    network = lively(replace(SMALL, frozen_stages=4)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network(*scene())[0].square().sum().backward()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not {name for name in changed if name.startswith(("stem.", "stages."))}
    trained = {name for name in before if not name.startswith(("stem.", "stages.", "classifier."))}
    assert changed == trained
    assert all(isinstance(norm, FrozenNorm) for norm in network.stages.modules() if isinstance(norm, nn.BatchNorm2d))


def test_all_of_it_is_trained_by_default_but_the_classifier() -> None:
    network = lively().train()
    network(*scene())[0].square().sum().backward()
    without = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert without == {"classifier.weight", "classifier.bias"}
    assert all(bool(p.grad.abs().max() > 0) for p in network.parameters() if p.grad is not None)


# --------------------------------------------------------------------------------------------------- regions of a batch


def batch(*, corner: Tensor | None = None, masks: Tensor | None = None, classes: Tensor | None = None) -> Any:
    """Two regions of a picture of 40 x 24 on a canvas of 64 x 32."""
    regions = Regions(
        features=torch.zeros(1, 2, 0),
        boxes=torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.5, 1.0]]]),
        mask=torch.ones(1, 2, dtype=torch.bool),
        size=torch.tensor([[80.0, 48.0]]),
    )
    pixels = Pixels(
        images=torch.randn(1, 3, 32, 64), size=torch.tensor([[24, 40]]), row=torch.tensor([0]), corner=corner,
        classes=classes, masks=masks,
    )  # fmt: skip
    return regions, pixels


def test_boxes_follow_their_picture_on_the_canvas() -> None:
    network = lively().eval()
    masks, classes = torch.rand(1, 2, 14, 14) < 0.5, torch.tensor([[0, 3]])
    regions, pixels = batch(corner=torch.tensor([[24, 5]]), masks=masks, classes=classes)
    found, loss = network.describe(regions, pixels)
    corners = torch.tensor([[[24.0, 5.0, 64.0, 29.0], [34.0, 17.0, 44.0, 29.0]]])
    expected, _ = network(pixels.images, corners, regions.mask, classes, masks.float())
    assert_close(found.features, expected, rtol=0, atol=0)
    assert loss is None
    assert torch.equal(found.boxes, regions.boxes)


def test_regions_without_known_objects_are_whole() -> None:
    network = lively().eval()
    regions, pixels = batch()
    found, _ = network.describe(regions, pixels)
    corners = torch.tensor([[[0.0, 0.0, 40.0, 24.0], [10.0, 12.0, 20.0, 24.0]]])
    whole = torch.zeros(1, 2, dtype=torch.int64)
    expected, _ = network(pixels.images, corners, regions.mask, whole, torch.ones(1, 2, 14, 14))
    assert_close(found.features, expected, rtol=0, atol=0)


def test_the_loss_of_classes_is_weighted_once() -> None:
    network = lively(replace(SMALL, class_weight=0.25)).eval()
    classes = torch.tensor([[0, 3]])
    regions, pixels = batch(classes=classes)
    _, loss = network.describe(regions, pixels)
    _, maps = network(
        pixels.images,
        torch.tensor([[[0.0, 0.0, 40.0, 24.0], [10.0, 12.0, 20.0, 24.0]]]),
        regions.mask,
        classes,
        torch.ones(1, 2, 14, 14),
    )
    chances = (maps @ network.classifier.weight.T + network.classifier.bias).log_softmax(-1)
    expected = -(chances[0, 0] + chances[1, 3]) / 2
    assert loss is not None
    assert_close(loss.value, 0.25 * expected)
    total, count = loss.parts["extractor_classes"]
    assert_close(total / count, expected.detach())
    loss.value.backward()  # type: ignore[no-untyped-call]
    assert network.classifier.weight.grad is not None


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("size", "fitted"), [((80, 20), (64, 16)), ((30, 60), (16, 32)), ((64, 32), (64, 32)), ((10, 7), (46, 32))]
)
def test_pictures_fit_the_canvas(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    """As the release: bilinear to rounded sizes, 0 to 1, normalised; red first."""
    image = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    scaled = np.array(Image.fromarray(image).resize(fitted, Image.Resampling.BILINEAR)) / 255
    expected = (scaled - MEAN_RGB) / STD_RGB
    found = prepare_image(image, SMALL)
    assert found.shape == (3, fitted[1], fitted[0])
    assert_close(found, torch.from_numpy(expected).permute(2, 0, 1).float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(prepare_image(image, SMALL, mirrored=True), found.flip(2))


def test_black_is_what_a_black_picture_becomes() -> None:
    assert_close(prepare_image(np.zeros((4, 4, 3), np.uint8), SMALL)[:, 0, 0], torch.tensor(BLACK))


def test_pictures_are_read_by_id(tmp_path: Path) -> None:
    image = np.random.default_rng(1).integers(0, 256, (16, 40, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    pictures = PictureFiles({"a": tmp_path / "a.png", "b": tmp_path / "b.png"}, SMALL)
    plain, turned = pictures.read(["a", "a"], [False, True])
    assert torch.equal(plain, prepare_image(image, SMALL))
    assert torch.equal(turned, plain.flip(2))
    assert pictures.canvas is not None
    assert (pictures.canvas.width, pictures.canvas.height) == (64, 32)
    with pytest.raises(DataError, match="no image"):
        pictures.read(["b"], [False])


# ---------------------------------------------------------------------------------------------------------------- names


def groups(golden: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((golden / "visualbert_tasks/optimizer_groups.json").read_text())
    return next(described for described in found.values() if described["model"] == "VisualBERTDetector")


def test_names_and_sizes_are_those_of_the_release(golden: Path) -> None:
    """Every parameter of its network, and no other."""
    with torch.device("meta"):
        network = VcrNetwork(VcrNetworkConfig())
    theirs = official(network)
    names = [name for group in groups(golden)["groups"] for name in group["names"] if name.startswith("detector.")]
    buffers = {
        name for name in theirs if name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert theirs.keys() - buffers == set(names)
    assert len(buffers) == 3 * 53
    shapes = {name: tuple(theirs[f"detector.{name}"].shape) for name in (
        "backbone.0.weight", "backbone.6.5.conv2.weight", "after_roi_align.0.2.conv3.weight",
        "after_roi_align.0.0.downsample.0.weight", "object_embed.weight", "mask_upsample.weight",
        "obj_downsample.1.weight", "regularizing_predictor.weight",
    )}  # fmt: skip
    assert shapes == {
        "backbone.0.weight": (64, 3, 7, 7),
        "backbone.6.5.conv2.weight": (256, 256, 3, 3),
        "after_roi_align.0.2.conv3.weight": (2048, 512, 1, 1),
        "after_roi_align.0.0.downsample.0.weight": (2048, 1024, 1, 1),
        "object_embed.weight": (81, 128),
        "mask_upsample.weight": (32, 1, 3, 3),
        "obj_downsample.1.weight": (512, 2176),
        "regularizing_predictor.weight": (81, 2048),
    }


def test_weights_go_out_under_the_names_they_came_in_with() -> None:
    network, other, given = lively().eval(), lively().eval(), scene()
    theirs = official(network)
    coverage = KEYS["official"].load(theirs | {"bert.bert.pooler.dense.bias": torch.zeros(2)}, {"extractor": other})
    assert list(coverage.dropped) == ["bert.bert.pooler.dense.bias"]
    assert torch.equal(other(*given)[0], network(*given)[0])
    with pytest.raises(CheckpointError, match="cover the model"):
        KEYS["official"].load({**theirs, "detector.backbone.7.0.conv1.weight": torch.zeros(1)}, {"extractor": other})


def test_training_starts_from_a_plain_resnet() -> None:
    network, other = lively(), lively()
    places = {"backbone.0": "conv1", "backbone.1": "bn1", "after_roi_align.0": "layer4"}
    places |= {f"backbone.{at}": f"layer{number}" for number, at in ((1, 4), (2, 5), (3, 6))}
    plain = {
        name.replace(f"detector.{theirs}.", f"{ours}."): tensor
        for name, tensor in official(network).items()
        for theirs, ours in places.items()
        if name.startswith(f"detector.{theirs}.") and not name.endswith("num_batches_tracked")
    }
    kept = other.projection.weight.clone()
    KEYS["resnet"].load(plain | {"fc.weight": torch.zeros(10, 28), "fc.bias": torch.zeros(10)}, {"extractor": other})
    for name, tensor in network.state_dict().items():
        if name.startswith(("stem.", "stages.", "head.")) and not name.endswith("num_batches_tracked"):
            assert torch.equal(other.state_dict()[name], tensor), name
    assert torch.equal(other.projection.weight, kept)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("blocks=[3, 4]", "3 stages before regions"),
        ("frozen_stages=6", "expected 0 to 5"),
        ("mask_channels=1025", "some of the 1024 channels"),
        ("picture_height=0", "picture_height must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.override(VcrNetworkConfig(), [setting])
