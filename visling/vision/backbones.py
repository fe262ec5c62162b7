"""Backbones: an image in, one feature map and its stride out.

Shapes   B images, H x W pixels (multiples of `multiple`), s the stride.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from visling.vision.detector_config import ResNetConfig
from visling.vision.resnet import (
    EXPANSION,
    HEAD_BLOCKS,
    MEAN_RGB,
    STD_RGB,
    STRIDE,
    FrozenNorm,
    build_stage,
    build_trunk,
    feature_map,
    freeze_parts,
    initialise,
)


class Backbone(nn.Module, ABC):
    """A network from pixels to one feature map."""

    stride: int
    """Pixels per cell of the feature map."""
    multiple: int
    """Height and width of the input must be multiples of this number of pixels."""
    channels: int
    """Channels of the feature map."""
    _frozen: Sequence[nn.Module] = ()

    @property
    @abstractmethod
    def parts(self) -> Sequence[nn.Module]:
        """What can be frozen, from the pixels on."""

    @abstractmethod
    def region_size(self, pool_size: int) -> int:
        """D: width of a region's state for a grid of pool_size x pool_size cells."""

    @abstractmethod
    def describe(self, pooled: Tensor) -> Tensor:
        """Regions pooled from the feature map (N, channels, pool_size, pool_size) -> their states (N, D)."""

    def freeze(self, stages: int) -> None:
        """Freeze the first parts: their weights receive no gradient, and the statistics of their norms do not change.

        Raises:
            ConfigError: more parts than there are.
        """
        freeze_parts(self.parts, stages)
        self._frozen = tuple(self.parts[:stages])
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, channels, H / stride, W / stride)."""


class Convolution(nn.Sequential):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, padding=0 if kernel == stride else kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class Residual(nn.Module):
    """Two convolutions with a shortcut around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Convolution(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, states: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return functional.relu(states + self.second(self.first(states)))


class SmallBackbone(Backbone):
    """A few convolutions per halving of the resolution; coarser levels are then added to the level of the requested
    stride.

    The coarse levels give each cell a wide view at little cost; the fine one keeps small and touching objects apart.

    Args:
        channels: width of each level; the first has the stem's stride, each further one halves the resolution.
        stem_stride: stride of the first convolution: 2 (3 x 3 windows) or 4 (windows that do not overlap; faster).
        blocks: residual blocks of each level.
        stride: stride of the feature map, a power of two within the levels.
    """

    def __init__(self, *, channels: Sequence[int], blocks: Sequence[int], stem_stride: int, stride: int) -> None:
        super().__init__()
        self.stride, self.multiple = stride, stem_stride * 2 ** (len(channels) - 1)
        self.top = (stride // stem_stride).bit_length() - 1  # index of the level with this stride
        self.channels = channels[self.top]
        entries = [Convolution(3, channels[0], kernel=4 if stem_stride == 4 else 3, stride=stem_stride)]
        entries += [Convolution(inputs, outputs, stride=2) for inputs, outputs in itertools.pairwise(channels)]
        self.levels = nn.ModuleList(
            nn.Sequential(entry, *(Residual(width) for _ in range(count)))
            for entry, width, count in zip(entries, channels, blocks, strict=True)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, self.channels, 1) for width in channels[self.top + 1 :])
        self.merge = Convolution(self.channels, self.channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The levels; what merges them is always trained."""
        return tuple(self.levels)

    def region_size(self, pool_size: int) -> int:
        """All cells of all channels."""
        return self.channels * pool_size**2

    def describe(self, pooled: Tensor) -> Tensor:
        """All cells in one row."""
        return pooled.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, channels, H / stride, W / stride)."""
        states, levels = images.contiguous(memory_format=torch.channels_last), []
        for level in self.levels:
            states = level(states)
            levels.append(states)
        if len(levels) == self.top + 1:
            return states
        coarse: Tensor | None = None
        for lateral, level in zip(reversed(self.lateral), reversed(levels[self.top + 1 :]), strict=True):
            coarse = (
                lateral(level) if coarse is None else lateral(level) + functional.interpolate(coarse, scale_factor=2.0)
            )
        assert coarse is not None
        merged: Tensor = self.merge(levels[self.top] + functional.interpolate(coarse, scale_factor=2.0))
        return merged


class ResNetBackbone(Backbone):
    """A ResNet under torchvision's weights: three stages over the image, the last one over every region, and the mean
    over its grid (He et al. 2016, arXiv 1512.03385, as in section 4.2 of Ren et al. 2015). Batch norms are frozen."""

    stride = multiple = STRIDE

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        *widths, last = config.widths
        self.stem, self.stages = build_trunk(
            config.stem_size, widths, config.blocks, [FrozenNorm] * 4, stride_in_window=True
        )
        self.channels, self._region_size = EXPANSION * widths[-1], EXPANSION * last
        # Without its stride: regions are pooled to the grid that it would leave.
        self.head = build_stage(self.channels, last, blocks=HEAD_BLOCKS, stride=1)
        initialise(self)
        mean, deviation = (torch.tensor(colour)[:, None, None] for colour in (MEAN_RGB, STD_RGB))
        # From [-1, 1] to ImageNet's normalised colours.
        self.register_buffer("gain", 0.5 / deviation, persistent=False)
        self.register_buffer("offset", (0.5 - mean) / deviation, persistent=False)
        self.gain: Tensor
        self.offset: Tensor

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The first convolution, and the four stages."""
        return (self.stem, *self.stages, self.head)

    def region_size(self, pool_size: int) -> int:
        """Channels of the last stage."""
        return self._region_size

    def describe(self, pooled: Tensor) -> Tensor:
        """The last stage, and the mean over the grid."""
        states: Tensor = self.head(pooled).mean((2, 3))
        return states

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, channels, H / 16, W / 16)."""
        images = images * self.gain + self.offset
        return feature_map(self.stem, self.stages, images.contiguous(memory_format=torch.channels_last))
