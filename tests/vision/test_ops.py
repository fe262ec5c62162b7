"""Pooling and suppression against plain loops and recorded values."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from visling import boxes as box_ops
from visling.vision import ops


def naive_roi_align(features: Tensor, box: list[float], output: int, scale: float, ratio: int, aligned: bool) -> Tensor:
    """Mean of bilinear samples, one at a time, in double precision."""
    plane = features.double().numpy()
    height, width = plane.shape[1:]
    x1, y1, x2, y2 = (value * scale - (0.5 if aligned else 0.0) for value in box)
    wide, high = x2 - x1, y2 - y1
    if not aligned:
        wide, high = max(wide, 1.0), max(high, 1.0)
    across, down = (ratio or max(1, math.ceil(wide / output))), (ratio or max(1, math.ceil(high / output)))
    result = np.zeros((plane.shape[0], output, output))
    for row in range(output):
        for column in range(output):
            for i in range(down):
                for j in range(across):
                    y = y1 + (row + (i + 0.5) / down) * high / output
                    x = x1 + (column + (j + 0.5) / across) * wide / output
                    result[:, row, column] += naive_sample(plane, x, y, width, height) / (down * across)
    return torch.from_numpy(result).float()


def naive_sample(plane: np.ndarray, x: float, y: float, width: int, height: int) -> np.ndarray:
    if x < -1 or y < -1 or x > width or y > height:
        return np.zeros(plane.shape[0])
    x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
    left, top = int(x), int(y)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    a, b = x - left, y - top
    upper = (1 - a) * plane[:, top, left] + a * plane[:, top, right]
    lower = (1 - a) * plane[:, bottom, left] + a * plane[:, bottom, right]
    return np.asarray((1 - b) * upper + b * lower)


BOXES = [
    [3.0, 2.0, 30.0, 41.5],
    [-20.0, -6.0, 25.0, 18.0],
    [10.0, 10.0, 10.0, 10.0],
    [60.0, 30.0, 200.0, 90.0],
    [0.0, 0.0, 68.0, 44.0],
    [400.0, 9.0, 500.0, 20.0],
]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 2])
def test_roi_align_equals_loops(ratio: int, aligned: bool) -> None:
    features = torch.randn(2, 3, 11, 17)
    boxes = torch.tensor(BOXES)
    image = torch.tensor([1, 0, 1, 1, 0, 0])
    found = ops.roi_align(features, boxes, image, output_size=3, scale=0.25, sampling_ratio=ratio, aligned=aligned)
    expected = torch.stack(
        [
            naive_roi_align(features[i], box, 3, 0.25, ratio, aligned)
            for i, box in zip(image.tolist(), BOXES, strict=True)
        ]
    )
    assert_close(found, expected, rtol=0, atol=2e-6)


def test_roi_align_equals_the_recorded_operator(golden: Path) -> None:
    """VL-BERT's own kernel: sampling ratio 1, not aligned."""
    inputs = load_file(golden / "vlbert/fast_rcnn/inputs.safetensors")
    outputs = load_file(golden / "vlbert/fast_rcnn/outputs_dilated.safetensors")
    found = ops.roi_align(
        outputs["body4"],
        inputs["boxes"][0, :2],
        torch.zeros(2, dtype=torch.long),
        output_size=14,
        scale=1 / 16,
        sampling_ratio=1,
        aligned=False,
    )
    assert_close(found, outputs["roi_align"], rtol=1e-5, atol=2e-5)
    other = ops.roi_align(
        outputs["body4"],
        inputs["boxes"][0, :2],
        torch.zeros(2, dtype=torch.long),
        output_size=14,
        scale=1 / 16,
        sampling_ratio=1,
        aligned=True,
    )
    assert not torch.allclose(other, outputs["roi_align"], atol=1e-3)


def test_roi_align_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(2, 3, 9, 9)
    corner = torch.rand(25, 2) * 20
    boxes = torch.cat([corner, corner + torch.rand(25, 2) * 15], 1)
    image = torch.randint(0, 2, (25,))
    whole = ops.roi_align(features, boxes, image, output_size=4, scale=0.25)
    pooled = ops.roi_pool(features, boxes, image, output_size=4, scale=0.25)
    monkeypatch.setattr(ops, "_CHUNK_NUMBERS", 600)
    monkeypatch.setattr(ops, "_CACHED_NUMBERS", 60)
    assert_close(ops.roi_align(features, boxes, image, output_size=4, scale=0.25), whole, rtol=0, atol=1e-6)
    assert torch.equal(ops.roi_pool(features, boxes, image, output_size=4, scale=0.25), pooled)


def test_roi_align_passes_gradients_to_the_features() -> None:
    features = torch.randn(2, 2, 5, 6, dtype=torch.float32, requires_grad=True)
    boxes, image = torch.tensor([[2.0, 1.0, 18.0, 17.0], [0.0, 4.0, 20.0, 12.0]]), torch.tensor([1, 0])
    pooled = ops.roi_align(features, boxes, image, output_size=2, scale=0.25, sampling_ratio=2)
    weights = torch.randn_like(pooled)
    (gradient,) = torch.autograd.grad((pooled * weights).sum(), features)
    step = torch.zeros_like(features)
    step[1, 0, 2, 2] = 1.0
    change = ops.roi_align(features + step, boxes, image, output_size=2, scale=0.25, sampling_ratio=2) - pooled
    assert_close(gradient[1, 0, 2, 2], (change * weights).sum().detach(), rtol=1e-3, atol=1e-4)
    assert gradient[1, 0, 2, 2] != 0


def test_no_regions_give_an_empty_result() -> None:
    features, none, image = torch.randn(2, 3, 4, 5), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    assert ops.roi_align(features, none, image, output_size=7, scale=0.25).shape == (0, 3, 7, 7)
    assert ops.roi_pool(features, none, image, output_size=7, scale=0.25).shape == (0, 3, 7, 7)
    assert ops.nms(none, torch.zeros(0), 0.5).tolist() == []


@pytest.mark.parametrize("size", [7, 14])
def test_roi_pool_equals_recorded_values(golden: Path, size: int) -> None:
    recorded = np.load(golden / "frcnn/ops.npz")
    regions = torch.from_numpy(recorded["rois"])
    found = ops.roi_pool(
        torch.from_numpy(recorded["roi_feat"]), regions[:, 1:], regions[:, 0].long(), output_size=size, scale=1 / 16
    )
    assert torch.equal(found, torch.from_numpy(recorded[f"roi_pool_{size}_scale_1_16"]))


def test_roi_pool_rounds_halves_away_from_zero() -> None:
    """0.5 -> 1 and 2.5 -> 3 (rounding to even gives 0 and 2), so cells 1 to 3 are pooled."""
    features = torch.arange(6.0)[None, None, None].expand(1, 1, 6, 6).contiguous()
    found = ops.roi_pool(features, torch.tensor([[2.0, 0.0, 10.0, 0.0]]), torch.tensor([0]), output_size=3, scale=0.25)
    assert found[0, 0, 0].tolist() == [1.0, 2.0, 3.0]


def naive_nms(
    boxes: Tensor, scores: Tensor, threshold: float, classes: Tensor | None = None, inclusive: bool = False
) -> list[int]:
    left = scores.argsort(descending=True, stable=True).tolist()
    kept = []
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [
            other
            for other in left
            if float(box_ops.iou(boxes[best : best + 1], boxes[other : other + 1], inclusive=inclusive)) <= threshold
            or (classes is not None and classes[other] != classes[best])
        ]
    return kept


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_suppression_equals_recorded_values(golden: Path, threshold: float) -> None:
    recorded = np.load(golden / "frcnn/ops.npz")
    found = ops.nms(
        torch.from_numpy(recorded["nms_boxes"]), torch.from_numpy(recorded["nms_scores_with_ties"]), threshold
    )
    assert found.tolist() == recorded[f"nms_keep_{threshold}"].tolist()


def test_suppression_at_the_threshold_and_without_area(golden: Path) -> None:
    recorded = np.load(golden / "frcnn/ops.npz")
    found = ops.nms(torch.from_numpy(recorded["nms2_boxes"]), torch.from_numpy(recorded["nms2_scores"]), 0.5)
    assert found.tolist() == recorded["nms2_keep_0.5"].tolist()


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("with_classes", [False, True])
def test_suppression_equals_loops(with_classes: bool, inclusive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_BLOCK", 7)  # several blocks
    corner = torch.randint(0, 12, (60, 2)).float()
    boxes = torch.cat([corner, corner + torch.randint(1, 9, (60, 2))], 1)
    scores = torch.randint(0, 8, (60,)).float()  # ties
    classes = torch.randint(0, 3, (60,)) if with_classes else None
    expected = naive_nms(boxes, scores, 0.35, classes, inclusive)
    assert ops.nms(boxes, scores, 0.35, classes=classes, inclusive=inclusive).tolist() == expected
    assert 5 < len(expected) < 60


def test_suppression_counts_end_pixels_when_asked() -> None:
    """IoU 4/8 without and 10/18 with both end pixels."""
    boxes, scores = torch.tensor([[0.0, 0.0, 1.0, 6.0], [0.0, 2.0, 1.0, 8.0]]), torch.tensor([0.9, 0.8])
    assert ops.nms(boxes, scores, 0.52).tolist() == [0, 1]
    assert ops.nms(boxes, scores, 0.52, inclusive=True).tolist() == [0]


def test_suppression_of_a_chain_keeps_every_other_box() -> None:
    """Each box overlaps only its neighbours: the definition has to be followed from the front, not in one sweep."""
    start = torch.arange(40.0) * 4
    boxes = torch.stack([start, torch.zeros(40), start + 8, torch.full((40,), 5.0)], 1)[None]
    assert ops.suppress(boxes, 0.3).nonzero()[:, 1].tolist() == list(range(0, 40, 2))


def test_padding_neither_survives_nor_suppresses() -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]]).repeat(3, 1)[None]
    assert ops.suppress(boxes, 0.5, real=torch.tensor([[False, True, True]])).tolist() == [[False, True, False]]
