"""Boxes relative to other boxes: anchors on a grid, shifts between boxes, and the boxes that a detector trains on.

Shapes   B images, A anchors of an image, N truth boxes of an image (padded), R candidate regions of an image, S sampled
         regions of an image. Boxes are pixel corners.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visling import boxes as box_ops
from visling.types import IGNORE

_LARGEST_GROWTH = math.log(1000.0 / 16.0)
"""Bound on predicted log width and height changes, so that no untrained box overflows (detectron's value)."""


_CAFFE_CELL = 16
"""Pixels of a cell, and side of the square that anchors are scaled from."""


def base_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """(sizes x ratios, 4) corners around the origin, sizes outermost; a ratio is height over width at equal area."""
    sides = [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for size in sizes for ratio in ratios]
    return torch.tensor([[-width / 2, -height / 2, width / 2, height / 2] for width, height in sides])


def caffe_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """(ratios x sizes, 4) corners around the first cell, ratios outermost, as Caffe's detectors round them.

    Args:
        sizes: square roots of the areas in pixels, up to rounding.
    Source:
        rbgirshick/py-faster-rcnn, lib/rpn/generate_anchors.py.
    """
    sides = [(width, round(width * ratio)) for ratio in ratios for width in [round(_CAFFE_CELL / math.sqrt(ratio))]]
    extents = torch.tensor([[side * size / _CAFFE_CELL for side in pair] for pair in sides for size in sizes])
    centre = (_CAFFE_CELL - 1) / 2
    return torch.cat([centre - (extents - 1) / 2, centre + (extents - 1) / 2], dim=1)


def cell_centres(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    """(height * width, 2) x and y in pixels of the centre of every cell of a feature map, row by row."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return (torch.stack([x, y], dim=-1).flatten(0, 1) + 0.5) * stride


def encode_boxes(boxes: Tensor, base: Tensor) -> Tensor:
    """Centre shift in units of the base box and log growth that turn `base` (..., 4) into `boxes` (..., 4)."""
    target, start = box_ops.corners_to_centre(boxes), box_ops.corners_to_centre(base)
    extent = start[..., 2:].clamp(min=1e-3)
    return torch.cat(
        [(target[..., :2] - start[..., :2]) / extent, (target[..., 2:].clamp(min=1e-3) / extent).log()], dim=-1
    )


def decode_boxes(deltas: Tensor, base: Tensor, *, inclusive: bool = False) -> Tensor:
    """Inverse of `encode_boxes`; growth is bounded.

    Args:
        inclusive: both end pixels belong to a base box, as in Caffe-era code, whose results end one pixel further.
    """
    start = box_ops.corners_to_centre(base + base.new_tensor([0, 0, 1, 1]) if inclusive else base)
    extent = start[..., 2:]
    centre = start[..., :2] + deltas[..., :2] * extent
    return box_ops.centre_to_corners(
        torch.cat([centre, extent * deltas[..., 2:].clamp(max=_LARGEST_GROWTH).exp()], dim=-1)
    )


def clip_boxes(boxes: Tensor, size: Tensor) -> Tensor:
    """Corners moved into images of (..., 4) width, height, width, height."""
    return torch.minimum(boxes.clamp(min=0), size)


def has_area(boxes: Tensor) -> Tensor:
    """Which boxes (..., 4) are more than a hundredth of a pixel wide and high."""
    return ((boxes[..., 2:] - boxes[..., :2]) > 0.01).all(-1)


class AnchorSample(NamedTuple):
    """Anchors on which the proposal network trains."""

    chosen: Tensor
    """(B, A) bool: positive or negative."""
    positive: Tensor
    """(B, A) bool."""
    owner: Tensor
    """(B, A) truth box with the largest overlap."""


def sample_anchors(
    anchors: Tensor, inside: Tensor, boxes: Tensor, classes: Tensor, *, positive: float, negative: float, count: int
) -> AnchorSample:
    """Anchors of each image, at random, at most half of them positive.

    Args:
        anchors: (A, 4).
        inside: (B, A) bool: which lie in the image.
        boxes: (B, N, 4) truth.
        classes: (B, N); IGNORE = nothing is to be learnt in this area.
        positive: IoU from which an anchor is positive.
        negative: IoU below which it is negative; those between are left out.
        count: most anchors per image.
    """
    overlap = box_ops.iou(boxes, anchors)  # (B, N, A)
    best, owner = overlap.max(1)
    # The best anchor of every object is positive, however small the overlap, so that no object goes without.
    forced = ((overlap == overlap.amax(2, keepdim=True)) & (overlap > 0.05)).any(1)
    counted = classes.gather(1, owner).ne(IGNORE) | (best < negative)
    accepted = ((best >= positive) | forced) & counted & inside
    rejected = (best < negative) & ~forced & inside
    chosen_positive = _sample_places(accepted, count // 2)
    chosen = chosen_positive | _sample_places(rejected, count, less=chosen_positive.sum(1))
    return AnchorSample(chosen, chosen_positive, owner)


class RegionSample(NamedTuple):
    """Regions on which the region head trains."""

    boxes: Tensor
    """(B, S, 4)."""
    owner: Tensor
    """(B, S) truth box with the largest overlap."""
    overlap: Tensor
    """(B, S) IoU with it."""
    real: Tensor
    """(B, S) bool; False = padding."""


def sample_regions(
    candidates: Tensor, real: Tensor, boxes: Tensor, classes: Tensor, *, positive: float, count: int
) -> RegionSample:
    """Regions of each image, at random, at most half of them positive.

    The truth boxes themselves are among the candidates, so that the region head learns from the first step on.

    Args:
        candidates: (B, R, 4).
        real: (B, R) bool.
        boxes: (B, N, 4) truth.
        classes: (B, N); IGNORE = padding or an area without anything to learn.
        positive: IoU from which a region belongs to an object.
        count: most regions per image.
    """
    candidates = torch.cat([boxes, candidates], dim=1)
    real = torch.cat([classes.ne(IGNORE), real], dim=1)
    overlap, owner = box_ops.iou(boxes, candidates).max(1)  # (B, N + R)
    accepted = real & (overlap >= positive)
    chosen_positive = _sample_places(accepted, count // 2)
    chosen = chosen_positive | _sample_places(real & ~accepted, count, less=chosen_positive.sum(1))
    at = chosen.int().sort(dim=1, descending=True, stable=True).indices[:, : min(count, chosen.shape[1])]
    return RegionSample(
        candidates.gather(1, at[..., None].expand(-1, -1, 4)),
        owner.gather(1, at),
        overlap.gather(1, at),
        chosen.gather(1, at),
    )


def _sample_places(mask: Tensor, count: int, *, less: Tensor | None = None) -> Tensor:
    """At most `count` (minus `less` of each row, (B,)) of the true places of each row (B, A), at random."""
    order = torch.rand(mask.shape, device=mask.device).masked_fill_(~mask, -1.0)
    best, at = order.topk(min(count, mask.shape[1]), dim=1)
    allowed = best >= 0
    if less is not None:
        allowed &= torch.arange(best.shape[1], device=mask.device) < count - less[:, None]
    return torch.zeros_like(mask).scatter_(1, at, allowed)
