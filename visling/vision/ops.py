"""Region pooling and non-maximum suppression in plain PyTorch: no compiled extension, any device.

Shapes   B images, C channels, H x W feature map, N regions, P output side.
Source   RoIAlign: He et al. 2017 (arXiv 1703.06870), section 3. RoIPool: Girshick 2015 (arXiv 1504.08083), section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from visling import boxes as box_ops

_CHUNK_NUMBERS = 2**24
"""Most numbers in one intermediate tensor (64 MiB in float32)."""

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

    Args:
        features: (B, C, H, W).
        boxes: (N, 4) pixel corners of the network's input, both end pixels included.
        image: (N,) int64 index of each box's feature map.
        scale: feature cells per pixel (1 / stride).
    Returns:
        (N, C, P, P).
    """
    channels, height, width = features.shape[1:]
    scaled = boxes.float() * scale
    corners = torch.where(scaled < 0, (scaled - 0.5).ceil(), (scaled + 0.5).floor()).long()  # half away from zero
    across, across_real = _divide_axis(corners[:, 0], corners[:, 2], width, output_size)  # (N, P, K)
    down, down_real = _divide_axis(corners[:, 1], corners[:, 3], height, output_size)
    pooled = features.new_zeros(len(boxes), channels, output_size, output_size)
    pieces, places = [], []
    for index, rows in _split_by_image(
        image, features.shape[0], per_region=output_size * channels * down.shape[2] * width
    ):
        strips = features[index][:, down[rows]].amax(3)  # (C, n, P, W)
        columns = across[rows].flatten(1)[None, :, None].expand(channels, -1, output_size, -1)
        cells = torch.unflatten(strips.gather(3, columns), 3, across.shape[1:]).amax(4)  # (C, n, P, P)
        real = down_real[rows][:, :, None] & across_real[rows][:, None, :]
        pieces.append(torch.where(real, cells, torch.zeros((), dtype=cells.dtype, device=cells.device)).transpose(0, 1))
        places.append(rows)
    return _join_in_order(pieces, places, pooled)


def _divide_axis(low: Tensor, high: Tensor, cells: int, bins: int) -> tuple[Tensor, Tensor]:
    """Cells of each bin, (N, bins, K) with the last one repeated, and whether the bin has any, (N, bins)."""
    each = (high - low + 1).clamp(min=1).float() / bins
    number = torch.arange(bins, device=low.device)
    start = ((number * each[:, None]).floor().long() + low[:, None]).clamp(0, cells)
    stop = (((number + 1) * each[:, None]).ceil().long() + low[:, None]).clamp(0, cells)
    most = max(int((stop - start).max()), 1) if len(low) else 1
    inside = torch.minimum(start[..., None] + torch.arange(most, device=low.device), stop[..., None] - 1)
    return inside.clamp(0, cells - 1), stop > start


def _split_by_image(image: Tensor, images: int, *, per_region: int) -> Iterator[tuple[int, Tensor]]:
    """(image, indices of its regions) in pieces small enough for memory."""
    chunk = max(1, _CHUNK_NUMBERS // per_region)
    order = image.argsort(stable=True)
    for index, rows in enumerate(torch.split(order, torch.bincount(image, minlength=images).tolist())):
        for piece in torch.split(rows, chunk):
            if len(piece):
                yield index, piece


def _join_in_order(pieces: list[Tensor], places: list[Tensor], empty: Tensor) -> Tensor:
    """Pieces joined in the order of the regions; `empty` when there is none."""
    if not pieces:
        return empty
    place = torch.cat(places)
    joined = torch.cat(pieces)
    return joined if bool((place.diff() > 0).all()) else joined[place.argsort()]


def suppress(
    boxes: Tensor,
    threshold: float,
    *,
    real: Tensor | None = None,
    classes: Tensor | None = None,
    inclusive: bool = False,
) -> Tensor:
    """Which boxes survive greedy non-maximum suppression, for many images at once.

    A box is dropped when its IoU with a surviving earlier box exceeds the threshold. Blocks of boxes are decided by
    iterating that definition to its fixed point, which is the greedy result.

    Args:
        boxes: (B, N, 4) corners, best first.
        real: (B, N) bool; padding neither survives nor suppresses.
        classes: (B, N) int64; boxes of different classes do not suppress each other. None = all of one class.
        inclusive: count both end pixels, as Caffe-era code does.
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
        inner = over[:, :, : stop - start].triu(1).float()
        candidates = keep[:, start:stop]
        survivors = candidates
        while True:
            again = candidates & (torch.bmm(survivors[:, None].float(), inner)[:, 0] == 0)
            if torch.equal(again, survivors):
                break
            survivors = again
        keep[:, start:stop] = survivors
        keep[:, stop:] &= ~(over[:, :, stop - start :] & survivors[:, :, None]).any(1)
    return keep


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
