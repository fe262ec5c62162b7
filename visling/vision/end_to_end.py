"""VL-BERT's own region extractor, trained jointly with the Transformer: pixels and boxes in, a feature per region out.

Paper    Su et al. 2020 (arXiv 1908.08530), section 3.2: Fast R-CNN (Girshick 2015, arXiv 1504.08083) on a ResNet (He et
         al. 2016, arXiv 1512.03385).
Release  jackroos/VL-BERT, `common/fast_rcnn.py` and `common/backbone/resnet/resnet.py`.
Differs  Batch normalisation is always frozen, as in every released configuration (`IMAGE_FROZEN_BN`). Networks of depth
         18 and 34, and the class of a region as a further input, are in no released configuration and are omitted.
         Geometry and projection are the encoder's (`models/vlbert.py`).
Shapes   B images, H x W pixels, C channels, S rows of regions, N regions of a row (padded), K real regions of the
         batch, F region feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from visling.boxes import to_pixels, whole_image
from visling.checkpoints.keymap import KeyMap, Rule, drop, tie
from visling.errors import ConfigError, DataError
from visling.types import MaskGrid, Pixels, Regions
from visling.vision import ops
from visling.vision.resnet import (
    EXPANSION,
    HEAD_BLOCKS,
    PLAIN_NETWORK,
    STRIDE,
    FrozenNorm,
    build_stage,
    build_trunk,
    check_sizes,
    feature_map,
    initialise,
    map_network,
)

POOL_SIZE = 14
"""Side of the grid that each region is pooled to."""
MEAN_BGR = (102.9801, 115.9465, 122.7717)
"""Mean colour that is subtracted, blue first, as the Caffe networks expect (release, `NETWORK.PIXEL_MEANS`)."""


@dataclass(frozen=True, kw_only=True)
class ExtractorConfig:
    """Size of the network and of its input images. Defaults: the release, ResNet-101."""

    kind: Literal["vlbert"] = "vlbert"
    """Which network this is, of those in `vision/extractors.py`."""
    blocks: tuple[int, ...] = (3, 4, 23)
    """Bottlenecks of the first three stages, which run over the whole image; the last one, which runs over regions,
    always has three."""
    stem_size: int = 64
    """Channels of the first convolution."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Width inside the bottlenecks of each of the four stages."""
    dilated: bool = True
    """Whether the last stage keeps the grid and dilates its windows (release, `IMAGE_C5_DILATED`) or halves the
    grid."""
    frozen_stages: int = 2
    """How many parts from the front are frozen: the first convolution, then the four stages (release,
    `IMAGE_FROZEN_BACKBONE_STAGES`: its numbers 1 and 2)."""
    shorter_side: int = 600
    """Pixels of the shorter side of an image, unless the longer one becomes too long."""
    longer_side: int = 1000
    """Most pixels of the longer side; 1200 in VCR."""

    def __post_init__(self) -> None:
        check_sizes(self.blocks, self.stem_size, self.widths, self.frozen_stages)
        if not 0 < self.shorter_side <= self.longer_side:
            raise ConfigError(
                f"shorter_side must be positive and at most longer_side; found {self.shorter_side} and "
                f"{self.longer_side}."
            )

    @property
    def feature_size(self) -> int:
        """F."""
        return EXPANSION * self.widths[-1]

    @property
    def mask_grid(self) -> MaskGrid:
        """Masks of objects, as large as the maps that they multiply."""
        return MaskGrid(size=POOL_SIZE if self.dilated else POOL_SIZE // 2, inclusive=True)

    @property
    def whole_image(self) -> bool:
        """The whole image is no region: `RegionExtractor.describe` adds its feature."""
        return False

    @property
    def canvas(self) -> None:
        """Pictures are padded to the largest of a batch."""

    def picture_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of what the network sees of an image of this size."""
        return fitted_size(width, height, self.shorter_side, self.longer_side)

    def build(self) -> RegionExtractor:
        """The network, randomly initialised."""
        return RegionExtractor(self)

    def prepare(self, image: NDArray[np.uint8], *, mirrored: bool) -> Tensor:
        """`prepare_image`."""
        return prepare_image(image, self, mirrored=mirrored)


PRESETS: Mapping[str, ExtractorConfig] = {
    "resnet50": ExtractorConfig(blocks=(3, 4, 6)),
    "resnet101": ExtractorConfig(),  # cfgs/pretrain/*_e2e_*.yaml and cfgs/refcoco, base and large
    "resnet101_vcr": ExtractorConfig(longer_side=1200),  # cfgs/vcr
    "resnet152": ExtractorConfig(blocks=(3, 8, 36)),
}
"""Depths of the release; the released files have ResNet-101."""


class RegionExtractor(nn.Module):
    """A ResNet up to stride 16 over the image, RoIAlign, its last stage over every region, and the mean over the
    grid."""

    def __init__(self, config: ExtractorConfig) -> None:
        super().__init__()
        self.config = config
        *widths, last = config.widths
        self.stem, self.stages = build_trunk(config.stem_size, widths, config.blocks, [FrozenNorm] * 4)
        stride, dilation = (1, 2) if config.dilated else (2, 1)
        self.head = build_stage(EXPANSION * widths[-1], last, blocks=HEAD_BLOCKS, stride=stride, dilation=dilation)
        initialise(self)
        for part in (self.stem, *self.stages, self.head)[: config.frozen_stages]:
            part.requires_grad_(False)

    def forward(
        self, images: Tensor, boxes: Tensor, mask: Tensor, instances: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        """One feature per region; zeros on padding.

        Args:
            images: (B, 3, H, W) of `prepare`, with the pixels of masked regions cut out if there are any
                (`data.batches.masking.hide_pixels`).
            boxes: (S, N, 4) pixel corners in these images.
            mask: (S, N) bool.
            instances: (S, N, 14, 14) shape of the object within its box, which multiplies the last maps; ones where an
                object has none (VCR).
            image: (S,) int64 which image each row of boxes lies in; None = one to one.
        Returns:
            (S, N, F).
        Raises:
            DataError: `instances` differ in size from the last maps.
        """
        features = self.feature_map(images)  # (B, C, H / 16, W / 16)
        row = mask.nonzero()[:, 0]
        owner = row if image is None else image[row]  # (K,)
        pooled = ops.roi_align(
            features, boxes[mask], owner, output_size=POOL_SIZE, scale=1 / STRIDE, sampling_ratio=1, aligned=False
        )
        maps: Tensor = self.head(pooled.to(features.dtype))  # (K, F, 14, 14), or 7 x 7 if not dilated
        if instances is not None:
            if instances.shape[-2:] != maps.shape[-2:]:
                raise DataError(
                    f"instance masks are {instances.shape[-2]} x {instances.shape[-1]}, but the maps that they "
                    f"multiply are {maps.shape[-2]} x {maps.shape[-1]}. Draw them at that size, and leave `dilated` on."
                )
            maps = maps * instances[mask][:, None].to(maps.dtype)
        described = maps.new_zeros(*mask.shape, maps.shape[1])
        described[mask] = maps.mean((2, 3))
        return described

    def describe(self, regions: Regions, pixels: Pixels) -> tuple[Regions, None]:
        """The regions of a batch with features computed from its pixels, that of the whole image among them, under the
        masks of the objects that they show; there is no loss."""
        boxes = torch.cat([regions.boxes, whole_image(regions.size)], dim=1)  # (S, R + 1, 4)
        mask = torch.cat([regions.mask, regions.mask.new_ones(len(regions.mask), 1)], dim=1)
        size = pixels.size[pixels.row].flip(-1)  # width and height of the scaled image
        masks = pixels.masks
        if masks is not None:
            masks = functional.pad(masks, (0, 0, 0, 0, 0, 1), value=True)  # that of the whole image is full
        features = self(pixels.images, to_pixels(boxes, size), mask, masks, image=pixels.row)
        return replace(regions, features=features[:, :-1], whole=features[:, -1]), None

    def count(self, regions: Regions) -> Mapping[str, Tensor]:
        """There is no loss, and nothing that it divides by."""
        return {}

    def feature_map(self, images: Tensor) -> Tensor:
        """Feature map of the whole image: (B, 3, H, W) -> (B, C, H / 16, W / 16), sides rounded up."""
        return feature_map(self.stem, self.stages, images)

    def prepare(self, images: Sequence[NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
        """Normalised batch of RGB images, (H, W, 3) each.

        Returns:
            (B, 3, H, W), blue first, mean colour 0, padded with 0 on the right and below; and (B, 2) width and height
            of each image in it, by which unit corners are multiplied.
        Source:
            Release, `data/transforms`.
        """
        device = self.stem.convolution.weight.device
        prepared = [prepare_image(image, self.config) for image in images]
        sizes = [image.shape[:0:-1] for image in prepared]
        size = torch.tensor(sizes, dtype=torch.float32, device=device).view(-1, 2)
        height, width = (max((image.shape[side] for image in prepared), default=0) for side in (1, 2))
        batch = torch.zeros(len(images), 3, height, width, device=device)
        for row, image in zip(batch, prepared, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        return batch, size


def prepare_image(image: NDArray[np.uint8], config: ExtractorConfig, *, mirrored: bool = False) -> Tensor:
    """(3, H, W) of an RGB image (H', W', 3) as the network reads it: scaled, mirrored if asked, blue first, mean colour
    0.

    Source:
        Release, `data/transforms`, in this order.
    """
    size = fitted_size(image.shape[1], image.shape[0], config.shorter_side, config.longer_side)
    scaled = np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    blue_first = scaled[:, ::-1, ::-1] if mirrored else scaled[..., ::-1]
    return torch.from_numpy(blue_first.copy()).permute(2, 0, 1).float() - torch.tensor(MEAN_BGR)[:, None, None]


def fitted_size(width: int, height: int, shorter: int, longer: int) -> tuple[int, int]:
    """Width and height after the shorter side is scaled to `shorter`, or to less where the longer one would exceed
    `longer`; cut to whole pixels."""
    low, high = min(width, height), max(width, height)
    side = max(1, int(longer * low / high)) if high / low * shorter > longer else shorter
    other = min(longer, int(side * high / low))
    return (side, other) if width < height else (other, side)


def _map_network(backbone: str, head: str) -> tuple[Rule, ...]:
    """Rules for every tensor of the network; in a file its last stage has a prefix of its own."""
    stages = [f"{backbone}layer{number}" for number in (1, 2, 3)]
    return map_network((f"{backbone}conv1", f"{backbone}bn1"), [*stages, head])


def _tie_copies(copy: str, original: str) -> tuple[Rule, ...]:
    """Rules for the last stage's second copy: the release registers it under two names, so files hold it twice."""
    convolutions = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3"}
    pairs = [
        (f"{block}.{conv}", f"{block}.{norm}") for block in range(HEAD_BLOCKS) for conv, norm in convolutions.items()
    ]
    names = [
        name
        for conv, norm in (*pairs, ("0.downsample.0", "0.downsample.1"))
        for name in (
            f"{conv}.weight",
            *(f"{norm}.{entry}" for entry in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        )
    ]
    return tuple(tie(f"{copy}.{name}", f"{original}.{name}", part="extractor") for name in names)


_PREFIX = "image_feature_extractor."
_ENCODER, _TASK = "the encoder's: models/vlbert.py", "a task's"

KEYS: Mapping[str, KeyMap] = {
    "official": KeyMap(
        (
            *_map_network(f"{_PREFIX}backbone.", f"{_PREFIX}roi_head_feature_extractor"),
            *_tie_copies(f"{_PREFIX}head.0", f"{_PREFIX}roi_head_feature_extractor"),
            drop(f"{_PREFIX}obj_downsample.**", _ENCODER),
            drop("vlbert.**", _ENCODER),
            drop("object_linguistic_embeddings.weight", _ENCODER),
            drop("object_mask_word_embedding.weight", _ENCODER),
            drop("aux_text_visual_embedding.weight", _ENCODER),
            drop("final_mlp.**", _TASK),
            drop("cnn_loss_reg.**", _TASK),
        )
    ),
    "resnet": KeyMap(PLAIN_NETWORK),
}
"""Rules for part "extractor": of files trained end to end ("official"), and of the plain ResNet from which such
training starts ("resnet")."""
