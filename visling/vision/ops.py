"""Region pooling and non-maximum suppression in plain PyTorch: no compiled extension, any device.

Shapes   B images, C channels, H x W feature map, N regions, P output side.
Source   RoIAlign: He et al. 2017 (arXiv 1703.06870), section 3. RoIPool: Girshick 2015 (arXiv 1504.08083), section 2.1.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from visling import boxes as box_ops

_CHUNK_NUMBERS = 2**24
"""Most numbers in one intermediate tensor (64 MiB in float32)."""

_CACHED_NUMBERS = 2**18
"""Numbers of an intermediate tensor that stays in the processor's cache (1 MiB in float32)."""

_OUTSIDE = -4.0
"""Coordinate outside grid_sample's unit square, where every map reads zero."""

_BLOCK = 512
"""Boxes decided together in non-maximum suppression; bounds the IoU matrix at _BLOCK x N."""


def roi_align(
    features: Tensor,
    boxes: Tensor,
    image: Tensor,
    *,
    output_size: int,
    scale: float,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Bilinear average of the feature map in a grid of bins over each box, in float32.

    Args:
        features: (B, C, H, W).
        boxes: (N, 4) pixel corners of the network's input; no gradient flows into them.
        image: (N,) int64 index of each box's feature map.
        scale: feature cells per pixel (1 / stride).
        sampling_ratio: sample points per bin and axis; 0 = as many as cells in a bin, rounded up.
        aligned: shift by half a cell, so that a cell's value lies at its centre; without it, as in the first release of
            the operator, regions are at least one cell wide and high.
    Returns:
        (N, C, P, P).
    """
    images, channels, height, width = features.shape
    if not len(boxes):
        return features.new_zeros(0, channels, output_size, output_size, dtype=torch.float32)
    with torch.no_grad():
        corners = boxes.float() * scale - (0.5 if aligned else 0.0)
        across, across_count = _sample_axis(
            corners[:, 0], corners[:, 2], width, output_size, sampling_ratio, aligned
        )  # (N, P * S), (N,)
        down, down_count = _sample_axis(corners[:, 1], corners[:, 3], height, output_size, sampling_ratio, aligned)
        # Every image gets the same number of places, so that one call samples all of them; regions fill the first ones.
        rank, most = _rank_in_image(image, images)
        points = across.new_full((images, most, down.shape[1], across.shape[1], 2), _OUTSIDE)
        points[image, rank] = torch.stack(
            [across[:, None, :].expand(-1, down.shape[1], -1), down[:, :, None].expand(-1, -1, across.shape[1])], dim=-1
        )
    pieces = []
    for piece in torch.split(
        points, max(1, _CHUNK_NUMBERS // (images * channels * down.shape[1] * across.shape[1])), dim=1
    ):
        sampled = functional.grid_sample(
            features.float(), piece.flatten(1, 2), padding_mode="zeros", align_corners=False
        )
        sampled = torch.unflatten(sampled, 2, (piece.shape[1], -1))  # (B, C, most, P * S, P * S)
        if down.shape[1] > output_size or across.shape[1] > output_size:
            sampled = torch.unflatten(torch.unflatten(sampled, 3, (output_size, -1)), 5, (output_size, -1)).sum((4, 6))
        pieces.append(sampled.transpose(1, 2))
    places = torch.cat(pieces, dim=1).flatten(0, 1)
    chosen = image * most + rank
    pooled = places if len(chosen) == len(places) and bool((chosen.diff() > 0).all()) else places[chosen]
    return pooled if sampling_ratio == 1 else pooled / (across_count * down_count)[:, None, None, None]


def _sample_axis(
    low: Tensor, high: Tensor, cells: int, bins: int, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Sample points of each region along one axis in grid_sample's coordinates, (N, bins * S), and their number per
    bin, (N,)."""
    extent = high - low
    if not aligned:
        extent = extent.clamp(min=1.0)
    each = extent / bins
    count = torch.full_like(low, sampling_ratio) if sampling_ratio else each.ceil().clamp(min=1.0)
    step = torch.arange(sampling_ratio or int(count.max()), device=low.device)
    number = torch.arange(bins, device=low.device)
    at = (
        low[:, None, None] + (number[:, None] + ((step + 0.5) / count[:, None])[:, None, :]) * each[:, None, None]
    )  # (N, bins, S)
    # Points more than one cell outside the map count as zero; nearer ones take the border's value.
    real = (at >= -1.0) & (at <= cells) & (step < count[:, None])[:, None, :]
    unit = (2.0 * at.clamp(0.0, cells - 1.0) + 1.0) / cells - 1.0
    return torch.where(real, unit, _OUTSIDE).flatten(1), count


def _rank_in_image(image: Tensor, images: int) -> tuple[Tensor, int]:
    """Number of each region among those of its image, and the most regions of an image."""
    counts = torch.bincount(image, minlength=images)
    order = image.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - starts[image[order]]
    return rank, int(counts.max())


def roi_pool(features: Tensor, boxes: Tensor, image: Tensor, *, output_size: int, scale: float) -> Tensor:
    """Maximum of the feature map in a grid of whole-cell bins over each box; 0 in empty bins.

    The maximum of a bin is that of four windows in its corners whose sides are the largest powers of two that fit; the
    maxima of all windows of one size are computed once for the whole map.

    Args:
        features: (B, C, H, W).
        boxes: (N, 4) pixel corners of the network's input, both end pixels included.
        image: (N,) int64 index of each box's feature map.
        scale: feature cells per pixel (1 / stride).
    Returns:
        (N, C, P, P), channels last.
    """
    channels, height, width = features.shape[1:]
    scaled = boxes.float() * scale
    corners = torch.where(scaled < 0, (scaled - 0.5).ceil(), (scaled + 0.5).floor()).long()  # half away from zero
    left, right = _divide_axis(corners[:, 0], corners[:, 2], width, output_size)  # (N, P)
    top, bottom = _divide_axis(corners[:, 1], corners[:, 3], height, output_size)
    region, down, across = ((top < bottom)[:, :, None] & (left < right)[:, None, :]).nonzero(as_tuple=True)  # real bins
    top, bottom, left, right = top[region, down], bottom[region, down], left[region, across], right[region, across]
    tall, broad = _log2(bottom - top), _log2(right - left)
    place, image = (region * output_size + down) * output_size + across, image[region]
    pooled = features.new_zeros(len(boxes) * output_size**2, channels)
    cells = features.permute(0, 2, 3, 1)  # (B, H, W, C)
    for rows in sorted(set(tall.tolist())):
        strips = _window_maxima(cells, rows, dim=1)
        for columns in sorted(set(broad[tall == rows].tolist())):
            windows = _window_maxima(strips, columns, dim=2)
            flat = windows.flatten(0, 2)
            fitting = ((tall == rows) & (broad == columns)).nonzero()[:, 0]
            for at in torch.split(fitting, max(1, _CACHED_NUMBERS // channels)):
                first = image[at] * windows.shape[1]
                corner = [
                    flat[(first + y) * windows.shape[2] + x]
                    for y in (top[at], bottom[at] - 2**rows)
                    for x in (left[at], right[at] - 2**columns)
                ]
                pooled.index_copy_(0, place[at], functools.reduce(torch.maximum, corner))
    return torch.unflatten(pooled, 0, (len(boxes), output_size, output_size)).permute(0, 3, 1, 2)


def _divide_axis(low: Tensor, high: Tensor, cells: int, bins: int) -> tuple[Tensor, Tensor]:
    """First cell of each bin and the one after its last, both (N, bins)."""
    each = (high - low + 1).clamp(min=1).float() / bins
    number = torch.arange(bins, device=low.device)
    start = (number * each[:, None]).floor().long() + low[:, None]
    stop = ((number + 1) * each[:, None]).ceil().long() + low[:, None]
    return start.clamp(0, cells), stop.clamp(0, cells)


def _log2(numbers: Tensor) -> Tensor:
    """Largest exponents whose powers of two are at most these positive whole numbers."""
    return torch.frexp(numbers.float()).exponent.long() - 1


def _window_maxima(cells: Tensor, exponent: int, dim: int) -> Tensor:
    """Maximum over the windows of 2**exponent cells along an axis; the window's first cell is its place."""
    for power in range(exponent):
        length = cells.shape[dim] - 2**power
        cells = torch.maximum(cells.narrow(dim, 0, length), cells.narrow(dim, 2**power, length))
    return cells


def suppress(
    boxes: Tensor,
    threshold: float,
    *,
    real: Tensor | None = None,
    classes: Tensor | None = None,
    inclusive: bool = False,
    most: int | None = None,
) -> Tensor:
    """Which boxes survive greedy non-maximum suppression, for many images at once.

    A box is dropped when its IoU with a surviving earlier box exceeds the threshold. Blocks of boxes are decided by
    iterating that definition to its fixed point, which is the greedy result.

    Args:
        boxes: (B, N, 4) corners, best first.
        real: (B, N) bool; padding neither survives nor suppresses.
        classes: (B, N) int64; boxes of different classes do not suppress each other. None = all of one class.
        inclusive: count both end pixels, as Caffe-era code does.
        most: keep only so many of an image, the best ones; what follows them need not be looked at.
    Returns:
        (B, N) bool.
    """
    count = boxes.shape[1]
    keep = real.clone() if real is not None else torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        over = box_ops.iou(boxes[:, start:stop], boxes[:, start:], inclusive=inclusive) > threshold  # (B, b, N - start)
        if classes is not None:
            over &= classes[:, start:stop, None] == classes[:, None, start:]
        survivors = _survive(keep[:, start:stop], over[:, :, : stop - start])
        keep[:, start:stop] = survivors
        keep[:, stop:] &= ~(over[:, :, stop - start :] & survivors[:, :, None]).any(1)
        if most is not None and bool((keep[:, :stop].sum(1) >= most).all()):
            break
    return keep if most is None else keep & (keep.cumsum(1) <= most)


def suppress_by_score(over: Tensor, scores: Tensor) -> Tensor:
    """Which boxes survive greedy non-maximum suppression under each of many scores.

    Args:
        over: (N, N) bool: pairs of boxes of which only one may survive.
        scores: (C, N); equal ones keep the boxes' order.
    Returns:
        (C, N) bool.
    """
    count = len(over)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    chunk = max(1, _CHUNK_NUMBERS // max(count, 1) ** 2)
    for piece, kept in zip(torch.split(scores, chunk), torch.split(keep, chunk), strict=True):
        order = piece.argsort(dim=1, descending=True, stable=True)
        ranked = over[order[:, :, None], order[:, None, :]]
        kept.scatter_(1, order, _survive(torch.ones_like(kept), ranked))
    return keep


def _survive(candidates: Tensor, over: Tensor) -> Tensor:
    """The candidates (B, n) without those that overlap, by `over` (B, n, n), an earlier one that survives."""
    earlier = over.triu(1).float()
    survivors = candidates
    while True:
        again = candidates & (torch.bmm(survivors[:, None].float(), earlier)[:, 0] == 0)
        if torch.equal(again, survivors):
            return survivors
        survivors = again


def nms(
    boxes: Tensor, scores: Tensor, threshold: float, *, classes: Tensor | None = None, inclusive: bool = False
) -> Tensor:
    """Indices of the boxes that survive non-maximum suppression, best first; equal scores keep their order.

    Args:
        boxes: (N, 4) corners.
        scores: (N,).
        classes: (N,) int64; boxes of different classes do not suppress each other. None = all of one class.
        inclusive: count both end pixels, as Caffe-era code does.
    Returns:
        (K,) int64.
    """
    order = scores.argsort(descending=True, stable=True)
    ranked_classes = None if classes is None else classes[order][None]
    return order[suppress(boxes[order][None], threshold, classes=ranked_classes, inclusive=inclusive)[0]]
