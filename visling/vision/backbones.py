"""Backbones: an image in, one feature map and its stride out.

Shapes   B images, H x W pixels (multiples of `multiple`), s the stride.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Backbone(nn.Module, ABC):
    """A network from pixels to one feature map."""

    stride: int
    """Pixels per cell of the feature map."""
    multiple: int
    """Height and width of the input must be multiples of this number of pixels."""
    channels: int
    """Channels of the feature map."""

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
