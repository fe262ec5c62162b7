"""Residual networks of bottlenecks, whose last stage runs over regions: the part that all trained extractors share.

Paper    He et al. 2016 (arXiv 1512.03385).
Releases jackroos/VL-BERT, `common/backbone/resnet/resnet.py`; uclanlp/visualbert, `utils/detector.py`.
Shapes   B images, H x W pixels, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Self, TypeVar

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from visling.checkpoints.keymap import Rule, drop, fresh, rename
from visling.errors import ConfigError

STRIDE = 16
"""Pixels per cell of the feature map that regions are pooled from."""
EXPANSION = 4
"""Output channels of a bottleneck as a multiple of its width."""
HEAD_BLOCKS = 3
"""Bottlenecks of the last stage, at every depth."""
MEAN_RGB, STD_RGB = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's colours in [0, 1], by which torchvision's networks are trained."""


class FrozenNorm(nn.BatchNorm2d):
    """Batch normalisation whose weights and statistics never change, not even in training."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)


Network = TypeVar("Network", bound=nn.Module)

Norm = type[nn.BatchNorm2d]
"""`FrozenNorm`, or `nn.BatchNorm2d`, which is trained and normalises a training batch by its own statistics."""


class NormedConvolution(nn.Module):
    """A convolution followed by a norm."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        dilation: int = 1,
        norm: Norm = FrozenNorm,
    ) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            inputs, outputs, kernel, stride, padding=dilation * (kernel // 2), dilation=dilation, bias=False
        )
        self.norm = norm(outputs)

    def forward(self, states: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        normed: Tensor = self.norm(self.convolution(states))
        return normed


class Bottleneck(nn.Module):
    """Three convolutions, narrow in the middle, with a shortcut around them."""

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        norm: Norm = FrozenNorm,
        stride_in_window: bool = False,
    ) -> None:
        super().__init__()
        outputs = EXPANSION * width
        # The Caffe networks have the stride in the first convolution (VL-BERT's `IMAGE_STRIDE_IN_1x1`, VisualBERT's
        # `_load_resnet_imagenet`), torchvision's in the 3 x 3 window.
        first, second = (1, stride) if stride_in_window else (stride, 1)
        self.reduce = NormedConvolution(inputs, width, stride=first, norm=norm)
        self.convolve = NormedConvolution(width, width, kernel=3, stride=second, dilation=dilation, norm=norm)
        self.expand = NormedConvolution(width, outputs, norm=norm)
        self.shortcut = (
            NormedConvolution(inputs, outputs, stride=stride, norm=norm) if stride > 1 or inputs != outputs else None
        )

    def forward(self, states: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        carried = states if self.shortcut is None else self.shortcut(states)
        states = functional.relu(self.reduce(states))
        states = functional.relu(self.convolve(states))
        return functional.relu(self.expand(states) + carried)


def build_stage(
    inputs: int,
    width: int,
    *,
    blocks: int,
    stride: int,
    dilation: int = 1,
    norm: Norm = FrozenNorm,
    stride_in_window: bool = False,
) -> nn.Sequential:
    """Bottlenecks of one width; the first one has the stride."""
    first = Bottleneck(inputs, width, stride=stride, dilation=dilation, norm=norm, stride_in_window=stride_in_window)
    later = (Bottleneck(EXPANSION * width, width, dilation=dilation, norm=norm) for _ in range(blocks - 1))
    return nn.Sequential(first, *later)


def build_trunk(
    stem_size: int,
    widths: Sequence[int],
    blocks: Sequence[int],
    norms: Iterable[Norm],
    *,
    stride_in_window: bool = False,
) -> tuple[NormedConvolution, nn.ModuleList]:
    """The first convolution and the three stages that run over the whole image.

    Args:
        widths, blocks: of these stages.
        norms: of the first convolution and of each stage.
        stride_in_window: whether a stage's stride is in its first 3 x 3 window.
    """
    first, *kinds = norms
    stem = NormedConvolution(3, stem_size, kernel=7, stride=2, norm=first)
    stages, inputs = nn.ModuleList(), stem_size
    for number, (width, count, norm) in enumerate(zip(widths, blocks, kinds, strict=True)):
        stages.append(
            build_stage(
                inputs,
                width,
                blocks=count,
                stride=2 if number else 1,
                norm=norm,
                stride_in_window=stride_in_window,
            )
        )
        inputs = EXPANSION * width
    return stem, stages


def initialise(network: nn.Module) -> None:
    """He et al.'s random convolutions."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def feature_map(stem: nn.Module, stages: Iterable[nn.Module], images: Tensor, *, caffe_pool: bool = False) -> Tensor:
    """Feature map of the whole image: (B, 3, H, W) -> (B, C, H / 16, W / 16), sides rounded up.

    Args:
        caffe_pool: the windows of the pooling begin at the border, not one cell before it, and the last one may reach
            beyond the other border.
    """
    states = functional.relu(stem(images))
    height, width = states.shape[2:]
    if caffe_pool and min(height, width) < 2:  # the first window needs two cells; zeros change no maximum after a ReLU
        states = functional.pad(states, (0, max(2 - width, 0), 0, max(2 - height, 0)))
    states = functional.max_pool2d(
        states, kernel_size=3, stride=2, padding=0 if caffe_pool else 1, ceil_mode=caffe_pool
    )
    for stage in stages:
        states = stage(states)
    return states


def fold_norms(network: Network) -> Network:
    """A copy in evaluation mode in which every norm is part of the convolution before it: the same function up to
    rounding, with half the passes over memory.
    """
    tensors = [*network.parameters(), *network.buffers()]
    folded = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors}).eval()
    for parent in list(folded.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NormedConvolution):
                setattr(parent, name, fuse_conv_bn_eval(child.convolution, child.norm))
    return folded


def freeze_parts(parts: Sequence[nn.Module], stages: int) -> None:
    """Freeze the first of the parts of a backbone: their weights receive no gradient.

    Raises:
        ConfigError: more than there are.
    """
    if not 0 <= stages <= len(parts):
        raise ConfigError(
            f"frozen_stages counts the parts of the backbone from the pixels on: found {stages}, expected 0 to "
            f"{len(parts)}."
        )
    for part in parts[:stages]:
        part.requires_grad_(False)


def check_sizes(blocks: Sequence[int], stem_size: int, widths: Sequence[int], frozen_stages: int = 0) -> None:
    """Refuse sizes that make no network.

    Raises:
        ConfigError: a number of blocks or widths that is not that of the stages, a size below 1, or more frozen parts
            than there are.
    """
    if len(blocks) != 3 or len(widths) != 4:
        raise ConfigError(
            f"an extractor has 3 stages before regions are pooled and 1 after: found {len(blocks)} numbers of "
            f"blocks, expected 3, and {len(widths)} widths, expected 4."
        )
    if min(blocks) < 1 or min(stem_size, *widths) < 1:
        raise ConfigError(f"blocks {blocks}, stem_size {stem_size} and widths {widths} must be at least 1.")
    if not 0 <= frozen_stages <= 5:
        raise ConfigError(
            f"frozen_stages counts the first convolution and four stages: found {frozen_stages}, expected 0 to 5."
        )


TORCHVISION = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("downsample.0", "downsample.1"))
DETECTRON2 = (
    ("conv1", "conv1.norm"),
    ("conv2", "conv2.norm"),
    ("conv3", "conv3.norm"),
    ("shortcut", "shortcut.norm"),
)
"""Names of a bottleneck's convolutions, each with its norm: of the narrow ones in order, and of the shortcut."""


def map_network(
    stem: tuple[str, str],
    stages: Sequence[str],
    *,
    bottleneck: Sequence[tuple[str, str]] = TORCHVISION,
    part: str = "extractor",
) -> tuple[Rule, ...]:
    """Rules of a key map for every tensor of the network.

    Args:
        stem: name of the first convolution and of its norm in the file.
        stages: name of each of the four stages in the file.
        bottleneck: names within a bottleneck in the file, in the order of `TORCHVISION`.
        part: our name of the module that has the network's `stem`, `stages` and `head`.
    """
    convolution, norm = stem
    rules = [
        rename(f"{convolution}.weight", f"{part}.stem.convolution.weight"),
        rename(f"{norm}.*", f"{part}.stem.norm.*"),
    ]
    for theirs, ours in zip(stages, ("stages.0", "stages.1", "stages.2", "head"), strict=True):
        for (convolution, norm), name in zip(bottleneck, ("reduce", "convolve", "expand", "shortcut"), strict=True):
            rules += [
                rename(f"{theirs}.*.{convolution}.weight", f"{part}.{ours}.*.{name}.convolution.weight"),
                rename(f"{theirs}.*.{norm}.*", f"{part}.{ours}.*.{name}.norm.*"),
            ]
    return tuple(rules)


PLAIN_NETWORK: tuple[Rule, ...] = (
    *map_network(("conv1", "bn1"), ["layer1", "layer2", "layer3", "layer4"]),
    drop("fc.**", "classifies the whole image"),
    fresh("extractor.**.num_batches_tracked", "older files lack this counter; nothing reads it"),
)
"""Rules of a key map for a plain ResNet under torchvision's names."""
