"""Pictures as the Visual Genome detector reads them: scaled as the ports or the original do, in its order of colours.

Shapes   B images, H x W pixels of a picture, h x w pixels of the scaled one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling.vision.region_detector import ScaledImage
from visling.vision.visual_genome_config import VisualGenomeConfig


def scale(image: NDArray[Any], config: VisualGenomeConfig) -> ScaledImage:
    """A picture (H, W, 3) whose shorter side has `short_side` pixels, or whose longer one has `long_side`; float32."""
    height, width = image.shape[:2]
    if config.resize == "factor":
        factor = scale_factor((width, height), config)
        # OpenCV rounds halves to even, and samples with the factor, whatever the rounding.
        sides = max(round(height * factor), 1), max(round(width * factor), 1)
        steps: tuple[Any, Any] = (np.float64(1 / factor),) * 2
    else:
        sides = _round_sides(height, width, config.short_side, config.long_side)
        steps = np.float32(height) / np.float32(sides[0]), np.float32(width) / np.float32(sides[1])
    pixels = torch.from_numpy(np.ascontiguousarray(image))
    for axis, (side, step) in enumerate(zip(sides, steps, strict=True)):
        pixels = _resample(pixels, axis, side, step)
    return ScaledImage(pixels=pixels.numpy(), size=(width, height))


def scale_factor(size: tuple[int, int], config: VisualGenomeConfig) -> float:
    """Factor of both axes of a picture of width and height `size` where `resize` is "factor".

    Source:
        peteanderson80/bottom-up-attention, lib/fast_rcnn/test.py.
    """
    factor = config.short_side / min(size)
    return config.long_side / max(size) if round(factor * max(size)) > config.long_side else factor


def boxes_to_original(images: Sequence[ScaledImage], config: VisualGenomeConfig) -> Tensor:
    """(B, 4) factors that bring box corners of the scaled pictures back to the originals."""
    if config.resize == "factor":
        return torch.tensor([[1 / scale_factor(image.size, config)] * 4 for image in images])
    return torch.tensor([image.size * 2 for image in images], dtype=torch.float32) / scaled_sizes(images)


def scaled_sizes(images: Sequence[ScaledImage]) -> Tensor:
    """(B, 4) width, height, width, height of the scaled pictures."""
    return torch.tensor([image.pixels.shape[1::-1] * 2 for image in images], dtype=torch.float32)


def to_batch(images: Sequence[ScaledImage], config: VisualGenomeConfig, device: torch.device) -> Tensor:
    """(B, 3, h, w) float32 of the network's input, channels last; smaller pictures are padded with 0, the mean colour,
    on the right and below."""
    mean, std = torch.tensor(config.pixel_mean, device=device), torch.tensor(config.pixel_std, device=device)
    height, width = (max(image.pixels.shape[axis] for image in images) for axis in (0, 1))
    batch = torch.zeros(len(images), height, width, 3, device=device)
    for row, image in zip(batch, images, strict=True):
        pixels = torch.from_numpy(image.pixels).to(device, torch.float32)
        if config.channel_order == "BGR":
            pixels = pixels.flip(-1)
        row[: pixels.shape[0], : pixels.shape[1]] = (pixels - mean) / std
    return batch.permute(0, 3, 1, 2)


def _round_sides(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """Height and width after scaling, halves rounded up."""
    factor = short_side / min(height, width)
    sides = (short_side, factor * width) if height < width else (factor * height, short_side)
    shrink = min(long_side / max(sides), 1.0)
    return max(int(sides[0] * shrink + 0.5), 1), max(int(sides[1] * shrink + 0.5), 1)


def _resample(pixels: Tensor, axis: int, side: int, step: Any) -> Tensor:
    """Linear interpolation along an axis, without antialiasing; samples stand at the centres of the new pixels.

    Args:
        step: old pixels per new one, in the precision in which places are computed.
    """
    last = pixels.shape[axis] - 1
    places = ((np.arange(side, dtype=step.dtype) + step.dtype.type(0.5)) * step - step.dtype.type(0.5)).clip(0, last)
    before = torch.from_numpy(places.astype(np.int64))
    share = torch.from_numpy((places - before.numpy()).astype(np.float32))
    first, second = (pixels.index_select(axis, at).float() for at in (before, (before + 1).clamp(max=last)))
    return torch.lerp(first, second, share.reshape(-1, *[1] * (2 - axis)))
