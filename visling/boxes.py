"""The only place where boxes change form.

Corners are x1, y1, x2, y2; pixels have their origin at the top left corner of the image; unit corners are divided by
width and height.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visling.errors import BoxError


def _size(boxes: Tensor, size: Tensor) -> Tensor:
    """Width, height, width, height, broadcast to the boxes of each row."""
    size = size.to(boxes.dtype)
    return torch.cat([size, size], dim=-1).reshape(*size.shape[:-1], *([1] * (boxes.dim() - size.dim())), 4)


def to_unit(boxes: Tensor, size: Tensor) -> Tensor:
    """Pixel corners -> unit corners, clipped to the image.

    Args:
        boxes: (..., R, 4) pixel corners.
        size: (..., 2) image width and height in pixels.
    Raises:
        BoxError: a size is not positive.
    """
    if not bool((size > 0).all()):
        raise BoxError(f"image sizes must be positive; found {size.min().item():g}. Give width and height in pixels.")
    return (boxes / _size(boxes, size)).clamp(0.0, 1.0)


def to_pixels(boxes: Tensor, size: Tensor) -> Tensor:
    """Unit corners (..., R, 4) -> pixel corners of images of width and height `size` (..., 2)."""
    return boxes * _size(boxes, size)


def whole_image(size: Tensor) -> Tensor:
    """Unit corners (S, 1, 4) of the box that ends at the last pixel, 0, 0, w - 1, h - 1, in images of width and height
    `size` (S, 2).

    Source:
        VL-BERT release, the box that stands for the whole image.
    """
    return torch.cat([torch.zeros_like(size), 1 - 1 / size], dim=-1)[:, None]


def check_unit(boxes: Tensor, where: str) -> None:
    """Raise `BoxError` unless all boxes are unit corners; `where` names them in the message."""
    if boxes.numel() and not (boxes.max() <= 1 + 1e-5 and boxes.min() >= -1e-5):  # written so that NaN is refused too
        raise BoxError(
            f"boxes of {where} must be unit corners in [0, 1]; found {boxes.min().item():g} to {boxes.max().item():g}. "
            "If they are pixels, use boxes.to_unit(boxes, size)."
        )


def corners_to_xywh(boxes: Tensor) -> Tensor:
    """x1, y1, x2, y2 -> left, top, width, height (COCO annotation form)."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def xywh_to_corners(boxes: Tensor) -> Tensor:
    """left, top, width, height (COCO annotation form) -> x1, y1, x2, y2."""
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)


def corners_to_centre(boxes: Tensor) -> Tensor:
    """x1, y1, x2, y2 -> centre x, centre y, width, height."""
    extent = boxes[..., 2:] - boxes[..., :2]
    return torch.cat([boxes[..., :2] + extent / 2, extent], dim=-1)


def centre_to_corners(boxes: Tensor) -> Tensor:
    """centre x, centre y, width, height -> x1, y1, x2, y2."""
    half = boxes[..., 2:] / 2
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], dim=-1)


def area(boxes: Tensor, *, inclusive: bool = False) -> Tensor:
    """(..., 4) corners -> (...) area; `inclusive` counts both end pixels (x2 - x1 + 1). Inverted boxes have none."""
    extent = (boxes[..., 2:] - boxes[..., :2] + float(inclusive)).clamp(min=0)
    return extent[..., 0] * extent[..., 1]


def iou(first: Tensor, second: Tensor, *, inclusive: bool = False) -> Tensor:
    """Intersection over union of every pair.

    Args:
        first: (..., M, 4) corners.
        second: (..., N, 4) corners of the same form.
        inclusive: count both end pixels, as Caffe-era code does.
    Returns:
        (..., M, N) in [0, 1]; 0 where both boxes are empty.
    """
    # One coordinate at a time: ten times as fast for many pairs as corners in the innermost axis.
    left, top, right, bottom = (side[..., :, None] for side in first.unbind(-1))
    other_left, other_top, other_right, other_bottom = (side[..., None, :] for side in second.unbind(-1))
    width = (torch.minimum(right, other_right) - torch.maximum(left, other_left) + float(inclusive)).clamp(min=0)
    height = (torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top) + float(inclusive)).clamp(min=0)
    shared = width * height
    union = area(first, inclusive=inclusive)[..., :, None] + area(second, inclusive=inclusive)[..., None, :] - shared
    return shared / union.clamp(min=torch.finfo(union.dtype).tiny)


def locate(boxes: Tensor) -> Tensor:
    """Five-number location: unit corners and share of the image covered.

    Args:
        boxes: (..., 4) unit corners.
    Returns:
        (..., 5).
    Source:
        ViLBERT section 2.2 (spatial position).
    """
    return torch.cat([boxes, area(boxes)[..., None]], dim=-1)


def spatial_six(boxes: Tensor) -> Tensor:
    """Six-number location: unit corners, width, height.

    Args:
        boxes: (..., 4) unit corners.
    Returns:
        (..., 6).
    Source:
        BAN's and VisualBERT's Flickr30K features (`spatial_features`).
    """
    return torch.cat([boxes, boxes[..., 2:] - boxes[..., :2]], dim=-1)
