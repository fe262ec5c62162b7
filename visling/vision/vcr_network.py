"""VisualBERT's own network for VCR, trained jointly with the Transformer: pixels, boxes, classes and masks in, a
feature per region out.

Paper    Li et al. 2019 (arXiv 1908.03557), section 4.2; the network is that of R2C (Zellers et al. 2019, arXiv
         1811.10830), a ResNet-50 (He et al. 2016, arXiv 1512.03385).
Release  uclanlp/visualbert, `utils/detector.py` (`SimpleDetector`) and `dataloaders/box_utils.py`.
Differs  Frozen stages also keep the statistics of their norms. The release freezes weights alone and normalises by the
         statistics of the batch, in the PyTorch of its time even when it evaluates, so that predictions depended on
         what else was in the batch.
Shapes   B images, H x W pixels, C channels, S rows of regions, N regions of a row (padded), K real regions of the
         batch, F region feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from visling.boxes import to_pixels
from visling.checkpoints.keymap import KeyMap, drop, fresh, rename
from visling.errors import ConfigError
from visling.types import Canvas, Loss, MaskGrid, Pixels, Regions
from visling.vision import ops
from visling.vision.resnet import (
    EXPANSION,
    HEAD_BLOCKS,
    MEAN_RGB,
    PLAIN_NETWORK,
    STD_RGB,
    STRIDE,
    FrozenNorm,
    build_stage,
    build_trunk,
    check_sizes,
    feature_map,
    initialise,
    map_network,
)

POOL_SIZE = 7
"""Side of the grid that each region is pooled to; instance masks have twice as many cells."""
BLACK = (-MEAN_RGB[0] / STD_RGB[0], -MEAN_RGB[1] / STD_RGB[1], -MEAN_RGB[2] / STD_RGB[2])
"""Black in normalised colours: the release fills the canvas before it normalises."""
MASK_GRID = MaskGrid(size=2 * POOL_SIZE, inclusive=False)
"""Twice as many cells as the pooled map, which a convolution of stride 2 makes of them."""


@dataclass(frozen=True, kw_only=True)
class VcrNetworkConfig:
    """Size of the network and of its input images. Defaults: the release, ResNet-50, all of it trained."""

    kind: Literal["visualbert"] = "visualbert"
    """Which network this is, of those in `vision/extractors.py`."""
    blocks: tuple[int, ...] = (3, 4, 6)
    """Bottlenecks of the first three stages, which run over the whole image; the last one, which runs over regions,
    always has three."""
    stem_size: int = 64
    """Channels of the first convolution."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Width inside the bottlenecks of each of the four stages."""
    frozen_stages: int = 0
    """How many parts from the front are frozen: the first convolution, then the four stages. 0 where VCR is fine-tuned,
    4 in pre-training (release, `freeze_detector`)."""
    mask_channels: int = 32
    """Channels of the pooled map to which the instance mask is added."""
    num_classes: int = 81
    """Classes of objects: those of COCO, and 0 for the whole image."""
    class_size: int = 128
    """Width of the vector of a region's class."""
    feature_size: int = 512
    """F."""
    dropout_rate: float = 0.1
    """Before the projection to F."""
    class_weight: float = 0.0
    """Weight of the loss that predicts each region's class from its pooled map, which keeps the network a detector
    (release, `cnn_loss_ratio`: 0 in every configuration; the release multiplies by it twice)."""
    picture_width: int = 768
    """Pixels of the canvas that an image is scaled to fit in."""
    picture_height: int = 384

    def __post_init__(self) -> None:
        check_sizes(self.blocks, self.stem_size, self.widths, self.frozen_stages)
        if not 1 <= self.mask_channels <= EXPANSION * self.widths[2]:
            raise ConfigError(
                f"mask_channels are some of the {EXPANSION * self.widths[2]} channels of the pooled map; "
                f"found {self.mask_channels}."
            )
        sizes = {
            name: getattr(self, name)
            for name in ("num_classes", "class_size", "feature_size", "picture_width", "picture_height")
        }
        if wrong := [name for name, size in sizes.items() if size < 1]:
            raise ConfigError(f"{wrong[0]} must be at least 1; found {sizes[wrong[0]]}.")

    @property
    def mask_grid(self) -> MaskGrid:
        """Masks of objects as the network reads them (release, `dataloaders/mask_utils.py`)."""
        return MASK_GRID

    @property
    def whole_image(self) -> bool:
        """The whole image is the first region (release, `add_image_as_a_box`)."""
        return True

    @property
    def canvas(self) -> Canvas:
        """What pictures are laid on."""
        return Canvas(width=self.picture_width, height=self.picture_height, colour=BLACK)

    def picture_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of what the network sees of an image of this size: always those of the canvas."""
        return self.picture_width, self.picture_height

    def build(self) -> VcrNetwork:
        """The network, randomly initialised."""
        return VcrNetwork(self)

    def prepare(self, image: NDArray[np.uint8], *, mirrored: bool) -> Tensor:
        """`prepare_image`."""
        return prepare_image(image, self, mirrored=mirrored)


class VcrNetwork(nn.Module):
    """A ResNet up to stride 16 over the image, RoIAlign, the object's mask added to the pooled map, the last stage over
    every region, the mean over its grid, and a projection of that and the object's class."""

    def __init__(self, config: VcrNetworkConfig) -> None:
        super().__init__()
        self.config = config
        *widths, last = config.widths
        norms = [FrozenNorm if part < config.frozen_stages else nn.BatchNorm2d for part in range(5)]
        self.stem, self.stages = build_trunk(config.stem_size, widths, config.blocks, norms[:4])
        # The last stage keeps the grid, so that 7 x 7 cells are averaged.
        self.head = build_stage(EXPANSION * widths[-1], last, blocks=HEAD_BLOCKS, stride=1, norm=norms[4])
        initialise(self)
        self.masks = nn.Conv2d(1, config.mask_channels, 3, stride=2, padding=1)
        self.classes = nn.Embedding(config.num_classes, config.class_size)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.projection = nn.Linear(EXPANSION * last + config.class_size, config.feature_size)
        self.classifier = nn.Linear(EXPANSION * last, config.num_classes)
        for part in (self.stem, *self.stages, self.head)[: config.frozen_stages]:
            part.requires_grad_(False)

    def forward(
        self,
        images: Tensor,
        boxes: Tensor,
        mask: Tensor,
        classes: Tensor,
        instances: Tensor,
        image: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One feature per region, zeros on padding; and what the network takes each real region for.

        Args:
            images: (B, 3, H, W), normalised.
            boxes: (S, N, 4) pixel corners in these images.
            mask: (S, N) bool.
            classes: (S, N) int64 class of the object; 0 = the whole image.
            instances: (S, N, 14, 14) shape of the object within its box, in [0, 1]; ones where none is known.
            image: (S,) int64 which image each row of boxes lies in; None = one to one.
        Returns:
            (S, N, F), and (K, P), the means of the last maps, from which `classifier` predicts classes.
        """
        row = mask.nonzero()[:, 0]
        if not len(row):  # a batch norm has nothing to measure
            return images.new_zeros(*mask.shape, self.config.feature_size), images.new_zeros(
                0, self.classifier.in_features
            )
        features = feature_map(self.stem, self.stages, images)  # (B, C, H / 16, W / 16)
        owner = row if image is None else image[row]  # (K,)
        pooled = ops.roi_align(features, boxes[mask], owner, output_size=POOL_SIZE, scale=1 / STRIDE, aligned=False).to(
            features.dtype
        )  # (K, C, 7, 7)
        projected, maps = self.project(pooled, classes[mask], instances[mask])
        filled = projected.new_zeros(*mask.shape, self.config.feature_size)
        filled[mask] = projected
        return filled, maps

    def project(self, pooled: Tensor, classes: Tensor, instances: Tensor) -> tuple[Tensor, Tensor]:
        """Features (K, F) of pooled regions (K, C, 7, 7), and the means of their last maps (K, P)."""
        shapes = self.masks(instances[:, None] - 0.5)  # (K, mask_channels, 7, 7)
        pooled = pooled + functional.pad(shapes, (0, 0, 0, 0, 0, pooled.shape[1] - shapes.shape[1]))
        maps = self.head(pooled).mean((2, 3))
        described = torch.cat([maps, self.classes(classes).to(maps.dtype)], dim=-1)
        return functional.relu(self.projection(self.dropout(described))), maps

    def describe(self, regions: Regions, pixels: Pixels) -> tuple[Regions, Loss | None]:
        """The regions of a batch with features computed from its pixels; and, where it is weighted, the loss of the
        class that the network takes each region for.

        Regions whose objects are not known count as the whole image does: class 0, a mask of ones.
        """
        size = pixels.size[pixels.row].flip(-1)  # width and height of the scaled image
        boxes = to_pixels(regions.boxes, size)
        if pixels.corner is not None:
            boxes = boxes + pixels.corner[pixels.row].repeat(1, 2)[:, None]
        shape, cells = regions.mask.shape, MASK_GRID.size
        classes = boxes.new_zeros(shape, dtype=torch.int64) if pixels.classes is None else pixels.classes
        masks = boxes.new_ones(*shape, cells, cells) if pixels.masks is None else pixels.masks.to(boxes.dtype)
        features, maps = self(pixels.images, boxes, regions.mask, classes, masks, image=pixels.row)
        loss = None
        if self.config.class_weight:
            wrong = functional.cross_entropy(self.classifier(maps).float(), classes[regions.mask], reduction="none")
            loss = Loss.mean("extractor_classes", wrong).scaled(self.config.class_weight)
        return replace(regions, features=features), loss

    def count(self, regions: Regions) -> Mapping[str, Tensor]:
        """What the loss of classes divides by, where it is weighted: the regions."""
        return {"extractor_classes": regions.mask.sum()} if self.config.class_weight else {}


def prepare_image(image: NDArray[np.uint8], config: VcrNetworkConfig, *, mirrored: bool = False) -> Tensor:
    """(3, H, W) of an RGB image (H', W', 3) as the network reads it: scaled to fit the canvas, mirrored if asked, and
    normalised.

    Source:
        Release, `resize_image` and `to_tensor_and_normalize`; it never mirrors.
    """
    high, wide = image.shape[:2]
    scale = min(config.picture_width / wide, config.picture_height / high)
    size = max(1, round(wide * scale)), max(1, round(high * scale))
    scaled = np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    shown = scaled[:, ::-1] if mirrored else scaled
    pixels = torch.from_numpy(shown.copy()).permute(2, 0, 1).float() / 255
    mean, deviation = (torch.tensor(colour)[:, None, None] for colour in (MEAN_RGB, STD_RGB))
    return (pixels - mean) / deviation


_BACKBONE, _HEAD = "detector.backbone", "detector.after_roi_align.0"

KEYS: Mapping[str, KeyMap] = {
    "official": KeyMap(
        (
            *map_network((f"{_BACKBONE}.0", f"{_BACKBONE}.1"), [*(f"{_BACKBONE}.{at}" for at in (4, 5, 6)), _HEAD]),
            rename("detector.mask_upsample.*", "extractor.masks.*"),
            rename("detector.object_embed.weight", "extractor.classes.weight"),
            rename("detector.obj_downsample.1.*", "extractor.projection.*"),
            rename("detector.regularizing_predictor.*", "extractor.classifier.*"),
            drop("bert.**", "the encoder's and its heads': models/visualbert.py"),
        )
    ),
    "resnet": KeyMap(
        (
            *PLAIN_NETWORK,
            *(
                fresh(f"extractor.{name}.**", "not in a plain ResNet: random")
                for name in ("masks", "classes", "projection", "classifier")
            ),
        )
    ),
}
"""Rules for part "extractor": of VisualBERT's files for VCR ("official"), and of the plain ResNet, torchvision's on
ImageNet, from which training starts ("resnet")."""
