"""Faster R-CNN with classes and attributes, small enough to be trained from scratch in minutes.

Paper    Ren et al. 2015 (arXiv 1506.01497); attributes as in Anderson et al. 2018 (arXiv 1707.07998), section 3.1.
Differs  One feature map without a pyramid; attributes are independent (sigmoid), because a drawn or photographed object
         has several; the final boxes are pooled a second time, so that feature, class and attributes describe the box
         that is reported.
Shapes   B images, A anchors of an image, N truth boxes of an image (padded), R regions of an image, C classes, K
         attributes kept per region, F region feature width. Boxes are pixel corners of the network's input unless a
         name says otherwise.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from visling import boxes as box_ops
from visling import config as configs
from visling import runtime
from visling.errors import CheckpointError, ConfigError
from visling.runtime import Precision
from visling.types import IGNORE, Loss, RegionArray
from visling.vision import images as pixels
from visling.vision import ops
from visling.vision.backbones import SmallBackbone

_LARGEST_GROWTH = math.log(1000.0 / 16.0)
"""Bound on predicted log width and height changes, so that no untrained box overflows (detectron's value)."""

_FORMAT = "visling detector 1"
"""What `config.json` says it is."""


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Size, vocabulary and thresholds of a detector."""

    class_names: tuple[str, ...] = ("object",)
    """Object classes; the background is added behind them."""
    attribute_names: tuple[str, ...] = ()
    """Attributes, any number of which may hold of one object; empty = no attribute head."""
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
    """Anchors with at least this IoU learn to propose; the best anchor of each object always does."""
    anchor_negative: float = 0.3
    """Anchors below this IoU with every object learn to reject; those between are left out."""
    anchor_samples: int = 64
    """Anchors per image in the proposal loss, at most half of them positive."""
    region_positive: float = 0.5
    """Regions with at least this IoU belong to the object, others to the background."""
    region_samples: int = 32
    """Regions per image in the region losses, at most half of them positive."""
    attribute_weight: float = 4.0
    """Weight of the attribute loss, which is a mean over all attributes and therefore small."""

    candidates: int = 192
    """Best anchors per image that enter suppression."""
    proposal_threshold: float = 0.7
    """IoU above which the weaker of two proposals is dropped."""
    proposals: int = 48
    """Proposals per image that reach the region head."""
    final_threshold: float = 0.5
    """IoU above which the weaker of two detections is dropped."""
    suppress_across_classes: bool = True
    """Whether detections of different classes suppress one another: one region per object, as region features want
    it."""
    min_confidence: float = 0.3
    """Detections below this class probability are dropped, unless `min_regions` asks for them."""
    min_regions: int = 0
    """The best detections kept whatever their confidence."""
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
                f"channels and blocks describe the same levels: found {len(self.channels)} and {len(self.blocks)} values."
            )
        if self.stride not in strides:
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
            if len(set(names)) != len(names):
                raise ConfigError(
                    f"names must differ; found {sorted({name for name in names if names.count(name) > 1})} more than once."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Annotated objects of one image."""

    boxes: NDArray[np.float32]
    """(N, 4) pixel corners of the image as given."""
    classes: NDArray[np.int64]
    """(N,) class, or IGNORE for areas in which nothing should be learnt (crowds)."""
    attributes: NDArray[np.bool_]
    """(N, attributes) which hold."""
    has_attributes: NDArray[np.bool_]
    """(N,) whether the object's attributes were annotated."""


class _Proposals(NamedTuple):
    """Output of the proposal network."""

    logits: Tensor
    """(B, A)."""
    deltas: Tensor
    """(B, A, 4)."""
    anchors: Tensor
    """(A, 4)."""
    inside: Tensor
    """(B, A) bool: the anchor's centre lies in the unpadded image."""


class _Regions(NamedTuple):
    """Output of the region head for N regions."""

    features: Tensor
    """(N, F)."""
    classes: Tensor
    """(N, C + 1) logits, background last."""
    deltas: Tensor
    """(N, 1 or C, 4)."""
    attributes: Tensor
    """(N, attributes) logits."""


def encode_boxes(boxes: Tensor, base: Tensor) -> Tensor:
    """Centre shift in units of the base box and log growth that turn `base` (..., 4) into `boxes` (..., 4)."""
    target, start = box_ops.corners_to_centre(boxes), box_ops.corners_to_centre(base)
    extent = start[..., 2:].clamp(min=1e-3)
    return torch.cat(
        [(target[..., :2] - start[..., :2]) / extent, (target[..., 2:].clamp(min=1e-3) / extent).log()], dim=-1
    )


def decode_boxes(deltas: Tensor, base: Tensor) -> Tensor:
    """Inverse of `encode_boxes`; growth is bounded."""
    start = box_ops.corners_to_centre(base)
    extent = start[..., 2:]
    centre = start[..., :2] + deltas[..., :2] * extent
    return box_ops.centre_to_corners(
        torch.cat([centre, extent * deltas[..., 2:].clamp(max=_LARGEST_GROWTH).exp()], dim=-1)
    )


class Detector(nn.Module):
    """Images in; regions with feature, box, class and attributes out."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = SmallBackbone(
            channels=config.channels, blocks=config.blocks, stem_stride=config.stem_stride, stride=config.stride
        )
        num_anchors = len(config.anchor_sizes) * len(config.anchor_ratios)
        self.propose = nn.Sequential(
            nn.Conv2d(self.backbone.channels, config.proposal_size, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(config.proposal_size, num_anchors * 5, 1),
        )
        pooled = self.backbone.channels * config.pool_size**2
        self.embed = nn.Linear(pooled + 2, config.feature_size)
        self.classify = nn.Linear(config.feature_size, len(config.class_names) + 1)
        self.regress = nn.Linear(
            config.feature_size, 4 * (len(config.class_names) if config.class_specific_boxes else 1)
        )
        self.describe = nn.Linear(config.feature_size, len(config.attribute_names)) if config.attribute_names else None
        nn.init.kaiming_normal_(self.embed.weight, nonlinearity="relu")
        for layer in (self.propose[2], self.regress):
            nn.init.normal_(layer.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.register_buffer("base_anchors", _base_anchors(config), persistent=False)
        self.base_anchors: Tensor
        nn.Module.to(self, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embed.weight.device

    @property
    def fingerprint(self) -> str:
        """SHA-256 over configuration and weights: the identity of the features this detector makes."""
        digest = hashlib.sha256(json.dumps(configs.to_dict(self.config), sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def losses(self, images: Sequence[NDArray[np.uint8]], truths: Sequence[Truth]) -> Loss:
        """Sum of the proposal, class, box and attribute losses of a batch of RGB images (H, W, 3) with their
        objects."""
        batch, size, scale = self._prepare(images)
        boxes, classes, attributes, has_attributes = self._collate(truths, scale)
        features = self.backbone(batch)
        proposals = self._propose(features, size)
        loss = self._proposal_loss(proposals, boxes, classes)

        with torch.no_grad():
            candidates, real = self._select(proposals, size)
            regions, owner, overlap, real = self._sample_regions(candidates, real, boxes, classes)  # (B, S, ...)
            rows = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(owner)
            positive = real & (overlap >= self.config.region_positive)
            label = torch.where(positive, classes[rows, owner], len(self.config.class_names))
            label = torch.where(real, label, IGNORE).flatten()
            learnt = label.ne(IGNORE) & positive.flatten()
        output = self._describe(features, regions.flatten(0, 1), rows.flatten())
        losses = functional.cross_entropy(output.classes, label, ignore_index=IGNORE, reduction="none")
        loss += Loss.mean("class", losses, label.ne(IGNORE))

        shift = output.deltas[:, 0]
        if self.config.class_specific_boxes:
            shift = output.deltas[
                torch.arange(len(label), device=label.device), label.clamp(0, len(self.config.class_names) - 1)
            ]
        wanted = encode_boxes(boxes[rows, owner], regions).flatten(0, 1) * self._region_scale(regions)
        loss += Loss.mean("box", functional.smooth_l1_loss(shift, wanted, reduction="none").sum(-1), learnt)
        if self.describe is not None:
            told = learnt & has_attributes[rows, owner].flatten()
            target = attributes[rows, owner].flatten(0, 1)
            losses = functional.binary_cross_entropy_with_logits(output.attributes, target, reduction="none")
            loss += Loss.mean("attribute", losses, told[:, None].expand_as(losses)).scaled(self.config.attribute_weight)
        return loss

    @torch.no_grad()
    def detect(self, images: Sequence[NDArray[np.uint8]], *, precision: Precision = "fp32") -> list[RegionArray]:
        """Regions of each RGB image (H, W, 3), most confident first, boxes in the pixels of the image as given.

        Images of different sizes are padded to one another, which changes the features near a padded border a little;
        group equal sizes where results must not depend on the grouping. The module should be in evaluation mode. Class
        distributions end with the background.
        """
        if not images:
            return []
        config = self.config
        batch, size, scale = self._prepare(images)
        with runtime.autocast(self.device, precision):
            features = self.backbone(batch)
            proposals, real = self._select(self._propose(features, size), size)
            rows = torch.arange(len(images), device=self.device)[:, None].expand_as(real)
            first = self._describe(features, proposals[real], rows[real])
            score, best = first.classes.softmax(-1)[:, :-1].max(-1)
            shift = (
                first.deltas[torch.arange(len(best), device=self.device), best]
                if config.class_specific_boxes
                else first.deltas[:, 0]
            )
            boxes = _clip(decode_boxes(shift / self._region_scale(proposals[real]), proposals[real]), size[rows[real]])

            scores = torch.full(real.shape, -1.0, device=self.device).masked_scatter_(real, score)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            corners = (
                torch.zeros_like(proposals)
                .masked_scatter_(real[..., None], boxes)
                .gather(1, order[..., None].expand(-1, -1, 4))
            )
            named = torch.zeros_like(order).masked_scatter_(real, best).gather(1, order)
            valid = (scores >= 0) & _has_area(corners)
            keep = ops.suppress(
                corners, config.final_threshold, real=valid, classes=None if config.suppress_across_classes else named
            )
            rank = keep.cumsum(1)
            keep &= ((scores >= config.min_confidence) | (rank <= config.min_regions)) & (rank <= config.max_regions)
            final = self._describe(features, corners[keep], rows[keep])
        counts = keep.sum(1).tolist()
        return self._regions(final, corners[keep] * scale[rows[keep]], images, counts)

    def save(self, directory: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, directory / "model.safetensors")
        content = {"format": _FORMAT, "fingerprint": self.fingerprint, "config": configs.to_dict(self.config)}
        (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, *, device: torch.device | str = "cpu") -> Detector:
        """The detector saved in a folder, in evaluation mode; a training folder with a `model` folder inside will do.

        Raises:
            CheckpointError: a file is missing or damaged, or weights and configuration do not fit.
        """
        if not (directory / "config.json").is_file() and (directory / "model" / "config.json").is_file():
            directory = directory / "model"
        try:
            content: Any = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            weights = load_file(directory / "model.safetensors")
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{directory} is not a detector: no {Path(error.filename or 'model.safetensors').name}. "
                "Give the folder that training wrote, with config.json and model.safetensors."
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{directory / 'config.json'} is damaged: {error}. Copy or train the detector again."
            ) from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{directory / 'model.safetensors'} is damaged: {error}. Copy or train the detector again."
            ) from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise CheckpointError(
                f"{directory / 'config.json'} does not describe a detector: format is {found!r}, expected {_FORMAT!r}."
            )
        try:
            detector = cls(configs.from_dict(DetectorConfig, content["config"]))
        except (ConfigError, KeyError) as error:
            raise CheckpointError(f"{directory / 'config.json'} was written by another version: {error}") from error
        detector._fill(weights, directory / "model.safetensors")
        return detector.to(device).eval()

    def _fill(self, weights: dict[str, Tensor], file: Path) -> None:
        own = self.state_dict()
        missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        wrong = [
            f"{name}: {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ]
        if missing or unexpected or wrong:
            parts = [
                f"missing {missing[:3]}" * bool(missing),
                f"unexpected {unexpected[:3]}" * bool(unexpected),
                f"wrong shape {wrong[:3]}" * bool(wrong),
            ]
            counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(wrong)} of another shape"
            raise CheckpointError(
                f"{file} does not fit its config.json ({counts}): {'; '.join(part for part in parts if part)}. The two files must be of one training."
            )
        self.load_state_dict(weights)

    def _prepare(self, images: Sequence[NDArray[np.uint8]]) -> tuple[Tensor, Tensor, Tensor]:
        """Padded batch; (B, 4) width, height, width, height of each scaled image; (B, 4) factors from scaled to given
        pixels."""
        fitted = [pixels.fit(image, self.config.long_side) for image in images]
        size = torch.tensor([image.shape[1::-1] * 2 for image in fitted], dtype=torch.float32)
        given = torch.tensor([image.shape[1::-1] * 2 for image in images], dtype=torch.float32)
        return (
            pixels.to_batch(fitted, self.backbone.multiple, self.device),
            size.to(self.device),
            (given / size).to(self.device),
        )

    def _collate(self, truths: Sequence[Truth], scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes (B, N, 4) in input pixels, classes (B, N), attributes (B, N, ...) and whether they are known, padded.

        Padding has an empty box, which overlaps nothing, and class IGNORE.
        """
        most = max(1, *(len(truth.classes) for truth in truths)) if truths else 1
        boxes = np.zeros((len(truths), most, 4), np.float32)
        classes = np.full((len(truths), most), IGNORE, np.int64)
        attributes = np.zeros((len(truths), most, len(self.config.attribute_names)), np.float32)
        known = np.zeros((len(truths), most), np.bool_)
        for row, truth in enumerate(truths):
            count = len(truth.classes)
            boxes[row, :count], classes[row, :count] = truth.boxes, truth.classes
            attributes[row, :count], known[row, :count] = truth.attributes, truth.has_attributes
        arrays = (boxes, classes, attributes, known)
        moved = [torch.from_numpy(array).to(self.device, non_blocking=True) for array in arrays]
        return moved[0] / scale[:, None], moved[1], moved[2], moved[3]

    def _propose(self, features: Tensor, size: Tensor) -> _Proposals:
        output = self.propose(features).float()
        batch, _, height, width = output.shape
        output = output.permute(0, 2, 3, 1).reshape(batch, -1, 5)  # anchors innermost
        stride = self.config.stride
        y, x = torch.meshgrid(
            torch.arange(height, device=output.device), torch.arange(width, device=output.device), indexing="ij"
        )
        centres = (torch.stack([x, y], dim=-1).flatten(0, 1) + 0.5) * stride  # (cells, 2)
        anchors = (centres.repeat(1, 2)[:, None] + self.base_anchors).flatten(0, 1)
        inside = (centres < size[:, None, :2] + stride / 2).all(-1).repeat_interleave(len(self.base_anchors), dim=1)
        return _Proposals(output[..., 0], output[..., 1:], anchors, inside)

    def _select(self, proposals: _Proposals, size: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, R, 4) of the best distinct proposals and which of them are real."""
        config = self.config
        logits = proposals.logits.masked_fill(~proposals.inside, -torch.inf)
        best, at = logits.topk(min(config.candidates, logits.shape[1]), dim=1)
        deltas = proposals.deltas.gather(1, at[..., None].expand(-1, -1, 4))
        boxes = _clip(decode_boxes(deltas, proposals.anchors[at]), size[:, None])
        keep = ops.suppress(boxes, config.proposal_threshold, real=best.isfinite() & _has_area(boxes))
        first = keep.int().sort(dim=1, descending=True, stable=True).indices[:, : config.proposals]
        return boxes.gather(1, first[..., None].expand(-1, -1, 4)), keep.gather(1, first)

    def _proposal_loss(self, proposals: _Proposals, boxes: Tensor, classes: Tensor) -> Loss:
        config = self.config
        with torch.no_grad():
            overlap = box_ops.iou(boxes, proposals.anchors)  # (B, N, A)
            best, owner = overlap.max(1)
            # The best anchor of every object learns it, however small the overlap, so that no object goes without.
            forced = ((overlap == overlap.amax(2, keepdim=True)) & (overlap > 0.05)).any(1)
            counted = classes.gather(1, owner).ne(IGNORE) | (best < config.anchor_negative)
            positive = ((best >= config.anchor_positive) | forced) & counted & proposals.inside
            negative = (best < config.anchor_negative) & ~forced & proposals.inside
            chosen_positive = _sample(positive, config.anchor_samples // 2)
            chosen = chosen_positive | _sample(negative, config.anchor_samples, less=chosen_positive.sum(1))
            row, anchor = chosen_positive.nonzero(as_tuple=True)
            wanted = encode_boxes(boxes[row, owner[row, anchor]], proposals.anchors[anchor])
        objectness = functional.binary_cross_entropy_with_logits(
            proposals.logits, chosen_positive.float(), reduction="none"
        )
        shift = functional.smooth_l1_loss(proposals.deltas[row, anchor], wanted, beta=1 / 9, reduction="none").sum(-1)
        return Loss.mean("objectness", objectness, chosen) + Loss.mean("proposal_box", shift)

    def _sample_regions(
        self, candidates: Tensor, real: Tensor, boxes: Tensor, classes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training regions of each image: boxes (B, S, 4), best object (B, S), its IoU (B, S), and which are real (B,
        S).

        The objects themselves are among the candidates, so that the region head learns from the first step on.
        """
        config = self.config
        candidates = torch.cat([boxes, candidates], dim=1)
        real = torch.cat([classes.ne(IGNORE), real], dim=1)
        overlap, owner = box_ops.iou(boxes, candidates).max(1)  # (B, N + R)
        positive = real & (overlap >= config.region_positive)
        chosen_positive = _sample(positive, config.region_samples // 2)
        chosen = chosen_positive | _sample(real & ~positive, config.region_samples, less=chosen_positive.sum(1))
        count = min(config.region_samples, chosen.shape[1])
        at = chosen.int().sort(dim=1, descending=True, stable=True).indices[:, :count]
        return (
            candidates.gather(1, at[..., None].expand(-1, -1, 4)),
            owner.gather(1, at),
            overlap.gather(1, at),
            chosen.gather(1, at),
        )

    def _describe(self, features: Tensor, regions: Tensor, image: Tensor) -> _Regions:
        pooled = ops.roi_align(
            features, regions, image, output_size=self.config.pool_size, scale=1 / self.config.stride, sampling_ratio=1
        )
        # Pooling hides how large a region is, and "large" is an attribute: the head is told.
        extent = ((regions[:, 2:] - regions[:, :2]).clamp(min=1) / self.config.stride).log()
        states = functional.relu(self.embed(torch.cat([pooled.flatten(1), extent], dim=1)))
        attributes = states.new_zeros(len(states), 0) if self.describe is None else self.describe(states)
        deltas = self.regress(states).float().unflatten(1, (-1, 4))
        return _Regions(states.float(), self.classify(states).float(), deltas, attributes.float())

    def _region_scale(self, regions: Tensor) -> Tensor:
        """Factors (10, 10, 5, 5) that bring region refinements to unit size (released detectors'
        `bbox_reg_weights`)."""
        return regions.new_tensor((10.0, 10.0, 5.0, 5.0))

    def _regions(
        self, output: _Regions, boxes: Tensor, images: Sequence[NDArray[np.uint8]], counts: list[int]
    ) -> list[RegionArray]:
        """Regions of the whole batch, split by image."""
        config = self.config
        probs = output.classes.softmax(-1)
        confidence, classes = probs[:, :-1].max(-1)
        kept = min(config.max_attributes, len(config.attribute_names))
        likely, attributes = output.attributes.sigmoid().topk(kept, dim=1)
        sure = likely >= config.min_attribute_confidence
        values = (
            output.features,
            boxes,
            classes,
            confidence,
            torch.where(sure, attributes, -1),
            torch.where(sure, likely, 0.0),
            probs,
        )
        arrays = [[piece.numpy() for piece in torch.split(value.cpu(), counts)] for value in values]
        results = []
        for image, (features, corners, named, sureness, described, believed, distributions) in zip(
            images, zip(*arrays, strict=True), strict=True
        ):
            order = np.argsort(-sureness, kind="stable")
            results.append(
                RegionArray(
                    features=features[order],
                    boxes=corners[order],
                    size=(image.shape[1], image.shape[0]),
                    classes=named[order].astype(np.int16),
                    class_confidence=sureness[order],
                    attributes=described[order].astype(np.int16),
                    attribute_confidence=believed[order],
                    probs=distributions[order],
                )
            )
        return results


def _base_anchors(config: DetectorConfig) -> Tensor:
    """(sizes x ratios, 4) corners around the origin, sizes outermost."""
    sides = [
        (size / math.sqrt(ratio), size * math.sqrt(ratio))
        for size in config.anchor_sizes
        for ratio in config.anchor_ratios
    ]
    return torch.tensor([[-width / 2, -height / 2, width / 2, height / 2] for width, height in sides])


def _clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Corners moved into images of (..., 4) width, height, width, height."""
    return torch.minimum(boxes.clamp(min=0), size)


def _has_area(boxes: Tensor) -> Tensor:
    return ((boxes[..., 2:] - boxes[..., :2]) > 0.01).all(-1)


def _sample(mask: Tensor, count: int, *, less: Tensor | None = None) -> Tensor:
    """At most `count` (minus `less` of each row, (B,)) of the true places of each row (B, A), at random."""
    order = torch.rand(mask.shape, device=mask.device).masked_fill_(~mask, -1.0)
    best, at = order.topk(min(count, mask.shape[1]), dim=1)
    allowed = best >= 0
    if less is not None:
        allowed &= torch.arange(best.shape[1], device=mask.device) < count - less[:, None]
    return torch.zeros_like(mask).scatter_(1, at, allowed)
