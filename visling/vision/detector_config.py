"""What a detector is built from: sizes, vocabulary, thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from visling.errors import ConfigError
from visling.vision.resnet import STRIDE, check_sizes


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Size of a ResNet as backbone."""

    blocks: tuple[int, ...] = (3, 4, 6)
    """Bottlenecks of the three stages that run over the image: those of ResNet-50; ResNet-101 has (3, 4, 23). The stage
    that runs over regions has three at every depth."""
    stem_size: int = 64
    """Channels of the first convolution."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Width inside the bottlenecks of each of the four stages."""

    def __post_init__(self) -> None:
        check_sizes(self.blocks, self.stem_size, self.widths)


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Size, vocabulary and thresholds of a detector."""

    class_names: tuple[str, ...] = ("object",)
    """Object classes; the background is added after them."""
    attribute_names: tuple[str, ...] = ()
    """Attributes, any number of which an object may have; empty = no attribute head."""
    long_side: int = 128
    """Images are scaled to this many pixels on their longer side."""
    stem_stride: Literal[2, 4] = 4
    """Stride of the first convolution; 4 is faster."""
    channels: tuple[int, ...] = (48, 96, 128)
    """Width of each level of the backbone; each level halves the resolution."""
    blocks: tuple[int, ...] = (1, 1, 1)
    """Residual blocks of each level."""
    stride: int = 4
    """Pixels per cell of the feature map that anchors and pooling use."""
    resnet: ResNetConfig | None = None
    """A ResNet in place of the small backbone that `stem_stride`, `channels` and `blocks` describe; None = the small
    one."""
    anchor_sizes: tuple[float, ...] = (16.0, 24.0, 36.0)
    """Sides of the square anchors at each cell, in input pixels."""
    anchor_ratios: tuple[float, ...] = (1.0,)
    """Heights over widths; every size is combined with every ratio at equal area."""
    proposal_size: int = 64
    """Channels of the proposal head."""
    pool_size: int = 7
    """Side of the grid that each region is pooled to."""
    feature_size: int = 128
    """F: width of the region feature."""
    class_specific_boxes: bool = False
    """Refine boxes separately for each class, instead of one refinement for all."""

    anchor_positive: float = 0.6
    """Anchors with at least this IoU with an object are positive, and so is the best anchor of each object."""
    anchor_negative: float = 0.3
    """Anchors below this IoU with every object are negative; those between are left out."""
    anchor_samples: int = 64
    """Anchors per image in the proposal loss, at most half of them positive."""
    region_positive: float = 0.5
    """Regions with at least this IoU belong to the object, others to the background."""
    region_samples: int = 32
    """Regions per image in the region losses, at most half of them positive."""
    attribute_weight: float = 4.0
    """Weight of the attribute loss, which is a mean over all attributes and therefore small."""

    candidates: int = 192
    """Best anchors per image that enter non-maximum suppression."""
    proposal_threshold: float = 0.7
    """IoU above which the weaker of two proposals is dropped."""
    proposals: int = 48
    """Proposals per image that reach the region head."""
    final_threshold: float = 0.5
    """IoU above which the weaker of two detections is dropped."""
    suppress_across_classes: bool = True
    """Whether detections of different classes suppress one another, which gives one region per object, as region
    features should."""
    min_confidence: float = 0.3
    """Detections below this class probability are dropped, unless `min_regions` asks for them."""
    min_regions: int = 0
    """This many of the best detections are kept whatever their confidence."""
    max_regions: int = 36
    """Most regions per image."""
    max_attributes: int = 4
    """K: most attributes kept per region."""
    min_attribute_confidence: float = 0.5
    """Attributes below this probability are dropped."""

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built."""
        strides = [self.stem_stride * 2**level for level in range(len(self.channels))]
        if len(self.channels) != len(self.blocks):
            raise ConfigError(
                f"channels and blocks describe the same levels: found {len(self.channels)} and {len(self.blocks)} "
                "values."
            )
        if self.resnet is not None and self.stride != STRIDE:
            raise ConfigError(f"the feature map of a ResNet has stride {STRIDE}; found stride {self.stride}.")
        if self.resnet is None and self.stride not in strides:
            raise ConfigError(
                f"stride {self.stride} is not the stride of a level; choose one of {strides} or change channels."
            )
        if not self.class_names:
            raise ConfigError("class_names is empty: a detector needs at least one class.")
        if not self.anchor_sizes or not self.anchor_ratios:
            raise ConfigError("anchor_sizes and anchor_ratios need at least one value each.")
        if self.min_regions > self.max_regions:
            raise ConfigError(f"min_regions ({self.min_regions}) exceeds max_regions ({self.max_regions}).")
        if self.max_regions > self.proposals:
            raise ConfigError(
                f"max_regions ({self.max_regions}) exceeds proposals ({self.proposals}): raise proposals."
            )
        for names in (self.class_names, self.attribute_names):
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ConfigError(f"names must differ; found {repeated} more than once.")
