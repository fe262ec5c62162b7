"""Faithful to the original extraction: the fast selection against plain loops written from the Caffe code's rules."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from visling.vision import visual_genome_images
from visling.vision.anchors import caffe_anchors
from visling.vision.resnet import Bottleneck, NormedConvolution
from visling.vision.visual_genome import VisualGenomeDetector
from visling.vision.visual_genome_config import VisualGenomeConfig, original_settings
from visling.vision.visual_genome_selection import select_across_classes, select_by_class

Array = NDArray[np.float64]

CAFFE_ANCHORS = [
    (-38, -16, 53, 31), (-84, -40, 99, 55), (-176, -88, 191, 103), (-360, -184, 375, 199), (-24, -24, 39, 39),
    (-56, -56, 71, 71), (-120, -120, 135, 135), (-248, -248, 263, 263), (-14, -36, 29, 51), (-36, -80, 51, 95),
    (-80, -168, 95, 183), (-168, -344, 183, 359),
]  # fmt: skip


def build(least: int, most: int, **changes: Any) -> VisualGenomeDetector:
    settings = original_settings(least, most) | {
        "short_side": 96, "long_side": 140, "candidates": 150, "proposals": 40, "depth": 50, "stem_size": 4, "width": 2,
        "proposal_size": 6, "pool_size": 4, "anchor_sizes": (32.0, 64.0), "box_scale": (1.0, 1.0, 1.0, 1.0),
    }  # fmt: skip
    names = tuple(map("class {}".format, range(6))), tuple(map("attribute {}".format, range(3)))
    config = VisualGenomeConfig(class_names=names[0], attribute_names=names[1], **{**settings, **changes})
    detector = VisualGenomeDetector(config).eval()
    with torch.no_grad():  # distinct scores, and boxes that overlap in every degree
        for layer, spread in ((detector.propose.objectness, 0.5), (detector.propose.shift, 0.3)):
            nn.init.normal_(layer.weight, std=spread)
        # Classes and attributes that depend on how a region differs from the mean of all.
        every = dataclasses.replace(config, min_regions=40, max_regions=40)
        detector.config, own = every, detector.config
        features = torch.from_numpy(detector.detect([picture(75, 101)])[0].features)
        detector.config = own
        mean = features.mean(0)
        spread = float((features - mean).norm(dim=1).mean())
        for linear in (detector.predict.classify, detector.predict.describe):
            weight = torch.randn(len(linear.weight), len(mean)) * 1.5 / spread
            linear.weight[:, : len(mean)] = weight
            linear.bias = nn.Parameter(-weight @ mean)
        nn.init.normal_(detector.predict.attribute.weight)
    return detector


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------------------ the slow composition
def half_even(value: float) -> int:
    below = math.floor(value)
    if value - below != 0.5:
        return math.floor(value + 0.5)
    return below if below % 2 == 0 else below + 1


def resize_as_opencv(image: Array, factor: float) -> Array:
    """Bilinear, half-pixel centres, places from the factor and not from the rounded size."""
    height, width = image.shape[:2]
    rows, columns = half_even(height * factor), half_even(width * factor)

    def place(at: int, last: int) -> tuple[int, int, float]:
        source = (at + 0.5) / factor - 0.5
        low = math.floor(source)
        if low < 0:
            return 0, 0, 0.0
        if low >= last:
            return last, last, 0.0
        return low, low + 1, source - low

    out = np.zeros((rows, columns, 3))
    for y in range(rows):
        top, bottom, down = place(y, height - 1)
        for x in range(columns):
            left, right, across = place(x, width - 1)
            upper = image[top, left] * (1 - across) + image[top, right] * across
            lower = image[bottom, left] * (1 - across) + image[bottom, right] * across
            out[y, x] = upper * (1 - down) + lower * down
    return out


def iou(first: Array, second: Array) -> float:
    """Both end pixels count."""
    width = min(first[2], second[2]) - max(first[0], second[0]) + 1
    height = min(first[3], second[3]) - max(first[1], second[1]) + 1
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (first, second)]
    return float(shared / (sum(areas) - shared))


def suppress(boxes: Array, scores: Array, threshold: float) -> list[int]:
    kept: list[int] = []
    for at in np.argsort(-scores, kind="stable"):
        if all(iou(boxes[other], boxes[at]) <= threshold for other in kept):
            kept.append(int(at))
    return kept


def propose(logits: Array, shifts: Array, anchors: Array, size: tuple[int, int], factor: float, config: Any) -> Array:
    """Proposals of a map (A, H, W) of logits and (4A, H, W) of shifts; width and height `size`."""
    boxes, scores = [], []
    for y in range(logits.shape[1]):
        for x in range(logits.shape[2]):
            for number, anchor in enumerate(anchors):
                x1, y1, x2, y2 = anchor + 16 * np.array([x, y, x, y])
                width, height = x2 - x1 + 1, y2 - y1 + 1
                dx, dy, dw, dh = shifts[4 * number : 4 * number + 4, y, x]
                centre_x, centre_y = x1 + width / 2 + dx * width, y1 + height / 2 + dy * height
                width, height = (
                    side * math.exp(min(d, math.log(1000 / 16))) for side, d in ((width, dw), (height, dh))
                )
                corners = [centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2]
                limits = [size[0] - 1, size[1] - 1] * 2
                box = np.array([min(max(corner, 0), limit) for corner, limit in zip(corners, limits, strict=True)])
                if min(box[2] - box[0] + 1, box[3] - box[1] + 1) >= 16 * factor:
                    boxes.append(box)
                    scores.append(logits[number, y, x])
    order = np.argsort(-np.array(scores), kind="stable")[: config.candidates]
    ranked = np.array(boxes)[order]
    return ranked[suppress(ranked, -np.arange(len(ranked), dtype=float), 0.7)[: config.proposals]]


def pool(features: Array, box: Array, size: int) -> Array:
    x1, y1, x2, y2 = (math.floor(side / 16 + 0.5) for side in box)
    width, height = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    out = np.zeros((len(features), size, size))
    for row in range(size):
        top, bottom = y1 + row * height // size, y1 - (-(row + 1) * height // size)
        for column in range(size):
            left, right = x1 + column * width // size, x1 - (-(column + 1) * width // size)
            cells = features[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
            if cells.shape[1] and cells.shape[2]:
                out[:, row, column] = cells.max((1, 2))
    return out


def run_unit(unit: NormedConvolution, states: torch.Tensor) -> torch.Tensor:
    norm = unit.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    states = functional.conv2d(
        states,
        unit.convolution.weight,
        None,
        unit.convolution.stride,
        unit.convolution.padding,
        unit.convolution.dilation,
    )
    spread = (norm.running_var + 1e-5).sqrt()
    mean, spread, weight, bias = (v[:, None, None] for v in (norm.running_mean, spread, norm.weight, norm.bias))
    return (states - mean) / spread * weight + bias


def run_blocks(stage: nn.Module, states: torch.Tensor) -> torch.Tensor:
    for block in stage.children():
        assert isinstance(block, Bottleneck)
        states = run_block(block, states)
    return states


def run_block(block: Bottleneck, states: torch.Tensor) -> torch.Tensor:
    carried = states if block.shortcut is None else run_unit(block.shortcut, states)
    for unit in (block.reduce, block.convolve):
        states = run_unit(unit, states).relu()
    return (run_unit(block.expand, states) + carried).relu()


def select(dets: Array, probs: Array, least: int, most: int) -> list[int]:
    """`probs` with the background last."""
    confidence = np.zeros(len(dets))
    for number in range(probs.shape[1] - 1):
        for at in suppress(dets, probs[:, number], 0.3):
            confidence[at] = max(confidence[at], probs[at, number])
    kept = [at for at in range(len(dets)) if confidence[at] >= 0.2]
    ranked = [int(at) for at in np.argsort(-confidence, kind="stable")]
    if len(kept) < least:
        return ranked[:least]
    return ranked[:most] if len(kept) > most else kept


@torch.no_grad()
def compose(detector: VisualGenomeDetector, image: NDArray[np.uint8]) -> dict[str, Array]:
    """The whole extraction of one picture, step by step."""
    config = detector.config
    height, width = image.shape[:2]
    factor = config.short_side / min(height, width)
    if half_even(factor * max(height, width)) > config.long_side:
        factor = config.long_side / max(height, width)
    blob = resize_as_opencv(image[:, :, ::-1].astype(float) - np.array([102.9801, 115.9465, 122.7717]), factor)
    states = torch.from_numpy(blob.transpose(2, 0, 1)[None]).float()
    states = run_unit(detector.stem, states).relu()
    states = functional.max_pool2d(states, 3, 2, 0, ceil_mode=True)
    for stage in detector.stages:
        states = run_blocks(stage, states)
    hidden = detector.propose.hidden(states).relu()
    logits, shifts = (
        layer(hidden)[0].double().numpy() for layer in (detector.propose.objectness, detector.propose.shift)
    )
    size = blob.shape[1], blob.shape[0]
    rois = propose(logits, shifts, detector.base_anchors.double().numpy(), size, factor, config)
    regions = torch.from_numpy(np.stack([pool(states[0].numpy(), box, config.pool_size) for box in rois])).float()
    regions = run_blocks(detector.head, regions)
    features = regions.mean((2, 3))
    classes = detector.predict.classify(features)
    embedded = detector.predict.class_embedding(classes.argmax(1))
    described = detector.predict.describe(torch.cat([features, embedded], 1)).relu()
    attributes = detector.predict.attribute(described).softmax(1).numpy()
    probs = classes.softmax(1).numpy()
    chosen = select(rois / factor, probs, config.min_regions, config.max_regions)
    return {
        "boxes": rois[chosen] / factor,
        "features": features.numpy()[chosen],
        "classes": probs[chosen, :-1].argmax(1),
        "class_confidence": probs[chosen, :-1].max(1),
        "attributes": attributes[chosen, :-1].argmax(1)[:, None],
        "attribute_confidence": attributes[chosen, :-1].max(1)[:, None],
        "probs": probs[chosen],
    }


@pytest.mark.parametrize(("least", "most"), [(12, 12), (1, 40), (2, 5)])
@pytest.mark.parametrize("size", [(75, 101), (143, 77), (40, 133)])
def test_regions_equal_those_of_the_slow_composition(least: int, most: int, size: tuple[int, int]) -> None:
    detector = build(least, most)
    image = picture(*size)
    (found,) = detector.detect([image])
    expected = compose(detector, image)
    assert len(found) == len(expected["boxes"])
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-3, atol=2e-3, err_msg=name)


@pytest.mark.parametrize(
    "change",
    [
        {"resize": "sides"},
        {"inclusive_boxes": False},
        {"filter_first": False},
        {"boxes": "refined"},
        {"selection": "port"},
        {"count_no_attribute": False},
        {"channel_order": "RGB"},
        {"min_side": 0.0},
        {"thresholds": (0.9,)},
        {"min_confidence": 0.9},
    ],
)
def test_each_switch_matters(change: dict[str, Any]) -> None:
    detector = build(1, 40)
    images = [picture(75, 101), picture(143, 77)]
    faithful = detector.detect(images)
    detector.config = dataclasses.replace(detector.config, **change)
    other = detector.detect(images)

    def same(name: str) -> bool:
        pairs = [(getattr(one, name), getattr(two, name)) for one, two in zip(faithful, other, strict=True)]
        return all(len(one) == len(two) and np.allclose(one, two, atol=1e-6) for one, two in pairs)

    assert not all(map(same, ("boxes", "features", "attribute_confidence")))


def test_boxes_end_at_the_last_pixel_of_the_scaled_picture() -> None:
    """As in the released features: 499.5 in a picture of 500 x 333 pixels scaled by 1000 / 500."""
    detector = build(40, 40, short_side=600, long_side=1000)
    (found,) = detector.detect([picture(333, 500)])
    assert found.boxes[:, 2].max() == pytest.approx(499.5)
    assert found.boxes[:, 3].max() <= (round(333 * 600 / 333) - 1) / (600 / 333) + 1e-3


def test_anchors_are_caffes() -> None:
    assert caffe_anchors((64, 128, 256, 512), (0.5, 1.0, 2.0)).tolist() == [list(map(float, a)) for a in CAFFE_ANCHORS]


@pytest.mark.parametrize(
    ("size", "scaled"),
    [((500, 375), (800, 600)), ((1000, 500), (1000, 500)), ((640, 427), (899, 600)), ((30, 300), (100, 1000)),
     ((499, 300), (998, 600))],
)  # fmt: skip
def test_sides_after_scaling_as_the_original(size: tuple[int, int], scaled: tuple[int, int]) -> None:
    config = dataclasses.replace(build(10, 40).config, short_side=600, long_side=1000)
    pixels = visual_genome_images.scale(picture(size[1], size[0]), config).pixels
    assert pixels.shape[1::-1] == scaled


@pytest.mark.parametrize(
    ("size", "scaled"),
    [((500, 375), (1067, 800)), ((640, 640), (800, 800)), ((400, 1000), (533, 1333)), ((5, 3000), (2, 1333)),
     ((1, 5000), (1, 1333))],
)  # fmt: skip
def test_sides_after_scaling_as_the_port(size: tuple[int, int], scaled: tuple[int, int]) -> None:
    config = VisualGenomeConfig(class_names=("object",))
    pixels = visual_genome_images.scale(picture(size[1], size[0]), config).pixels
    assert pixels.shape[1::-1] == scaled
    assert pixels.dtype == np.float32


def test_scaling_interpolates_as_pytorch_does() -> None:
    image = picture(37, 53)
    config = VisualGenomeConfig(class_names=("object",), short_side=80, long_side=133)
    found = torch.from_numpy(visual_genome_images.scale(image, config).pixels)
    whole = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = functional.interpolate(whole, tuple(found.shape[:2]), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected[0].permute(1, 2, 0), rtol=0, atol=1e-3)


def random_boxes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    corner = torch.rand(count, 2) * 60
    return torch.cat([corner, corner + 5 + torch.rand(count, 2) * 50], 1), (torch.randn(count, 7) * 2).softmax(1)


@pytest.mark.parametrize(("least", "most"), [(0, 50), (45, 50), (1, 3), (60, 60)])
def test_selection_by_class_equals_plain_loops(least: int, most: int) -> None:
    boxes, probs = random_boxes(50)
    found = select_by_class(boxes, probs[:, :-1], threshold=0.3, min_confidence=0.2, least=least, most=most)
    assert found.tolist() == select(boxes.double().numpy(), probs.numpy(), least, most)


def test_thresholds_are_tried_in_turn() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 6], [50, 50, 60, 60]])  # IoU 0.8, 0.6, 0.75
    scores = torch.tensor([0.9, 0.8, 0.7, 0.95])
    tried = [
        select_across_classes(boxes, scores, thresholds, least, 4).tolist()
        for thresholds, least in (((0.5, 0.78, 0.9), 1), ((0.5, 0.78, 0.9), 3), ((0.5, 0.78, 0.9), 4), ((0.5,), 4))
    ]
    assert tried == [[3, 0], [3, 0, 2], [3, 0, 1, 2], [3, 0]]
    assert select_across_classes(boxes, scores, (0.9,), 1, 2).tolist() == [3, 0]
    assert select_across_classes(boxes[:0], scores[:0], (0.9,), 1, 2).tolist() == []
