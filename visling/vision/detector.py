"""Faster R-CNN with classes and attributes, small enough to be trained from scratch in minutes; or on a ResNet.

Paper    Ren et al. 2015 (arXiv 1506.01497); attributes as in Anderson et al. 2018 (arXiv 1707.07998), section 3.1.
Differs  One feature map without a pyramid; attributes are independent (sigmoid), because an object has several; the
         final boxes are pooled a second time, so that feature, class and attributes describe the box that is reported.
Shapes   B images, A anchors of an image, R regions of an image, C classes, K attributes kept per region, F region
         feature width. Boxes are pixel corners of the network's input, unless a name states another system.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from visling import config as configs
from visling import runtime
from visling.checkpoints.files import add_tensors
from visling.errors import CheckpointError, ConfigError
from visling.runtime import Precision
from visling.types import Loss, RegionArray
from visling.vision import images as pixels
from visling.vision import ops
from visling.vision.anchors import (
    base_anchors,
    cell_centres,
    clip_boxes,
    decode_boxes,
    has_area,
)
from visling.vision.backbones import Backbone, ResNetBackbone, SmallBackbone
from visling.vision.detector_config import DetectorConfig as DetectorConfig
from visling.vision.detector_losses import (
    REFINEMENT_SCALE,
    attribute_loss,
    pad_truths,
    proposal_loss,
    region_loss,
    sample_targets,
)
from visling.vision.detectors import load_detector
from visling.vision.region_detector import ScaledImage
from visling.vision.trainable import TrainableDetector, Truth

_FORMAT = "visling detector 1"
"""What `config.json` says that it describes."""

_LEAST_SIDE = 0.99
"""Of a detected region, in pixels of the original: one, less what rounding takes."""


class _ProposalOutput(NamedTuple):
    """Output of the proposal network."""

    logits: Tensor
    """(B, A)."""
    deltas: Tensor
    """(B, A, 4)."""
    anchors: Tensor
    """(A, 4)."""
    inside: Tensor
    """(B, A) bool: the anchor's centre lies in the unpadded image."""


class _RegionOutput(NamedTuple):
    """Output of the region head for N regions."""

    features: Tensor
    """(N, F)."""
    classes: Tensor
    """(N, C + 1) logits, background last."""
    deltas: Tensor
    """(N, 1 or C, 4)."""
    attributes: Tensor
    """(N, attributes) logits."""


class Detector(TrainableDetector):
    """Images in; regions with feature, box, class and attributes out."""

    config: DetectorConfig

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone: Backbone = (
            SmallBackbone(
                channels=config.channels, blocks=config.blocks, stem_stride=config.stem_stride, stride=config.stride
            )
            if config.resnet is None
            else ResNetBackbone(config.resnet)
        )
        num_anchors = len(config.anchor_sizes) * len(config.anchor_ratios)
        self.propose = nn.Sequential(
            nn.Conv2d(self.backbone.channels, config.proposal_size, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(config.proposal_size, num_anchors * 5, 1),
        )
        self.embed = nn.Linear(self.backbone.region_size(config.pool_size) + 2, config.feature_size)
        self.classify = nn.Linear(config.feature_size, len(config.class_names) + 1)
        self.regress = nn.Linear(
            config.feature_size, 4 * (len(config.class_names) if config.class_specific_boxes else 1)
        )
        self.describe = nn.Linear(config.feature_size, len(config.attribute_names)) if config.attribute_names else None
        nn.init.kaiming_normal_(self.embed.weight, nonlinearity="relu")
        for layer in (self.propose[2], self.regress):
            nn.init.normal_(layer.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.register_buffer("base_anchors", base_anchors(config.anchor_sizes, config.anchor_ratios), persistent=False)
        self.base_anchors: Tensor
        nn.Module.to(self, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device

    @property
    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights: the identity of the features that this detector computes."""
        settings = configs.to_dict(self.config)
        if self.config.resnet is None:
            del settings["resnet"]  # detectors that are older than this setting keep their identity
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        add_tensors(digest, self.state_dict())
        return digest.hexdigest()

    def freeze(self, stages: int) -> None:
        """Freeze the first levels of the small backbone, or the first convolution and stages of a ResNet.

        Raises:
            ConfigError: more stages than there are.
        """
        self.backbone.freeze(stages)

    def row_names(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the rows of the class head, of the attribute head, and of refinements if each class has its own."""
        classes = self.config.class_names
        layers = {"classify": (*classes, "")}
        if self.config.class_specific_boxes:
            layers["regress"] = classes
        if self.describe is not None:
            layers["describe"] = self.config.attribute_names
        return {f"{layer}.{kind}": names for layer, names in layers.items() for kind in ("weight", "bias")}

    def losses_scaled(self, images: Sequence[ScaledImage], truths: Sequence[Truth]) -> Loss:
        """Sum of the proposal, class, box and attribute losses of a batch of pictures with their objects."""
        config = self.config
        batch, size, scale = self._prepare_images(images)
        padded = pad_truths(truths, scale, num_attributes=len(config.attribute_names))
        features = self.backbone(batch)
        proposals = self._run_proposals(features, size)
        loss = proposal_loss(
            *proposals,
            padded,
            positive=config.anchor_positive,
            negative=config.anchor_negative,
            count=config.anchor_samples,
        )
        with torch.no_grad():
            candidates, real = self._select_proposals(proposals, size)
        targets = sample_targets(
            candidates,
            real,
            padded,
            background=len(config.class_names),
            positive=config.region_positive,
            count=config.region_samples,
        )
        output = self._run_head(features, targets.regions, targets.image)
        loss += region_loss(output.classes, output.deltas, targets)
        if self.describe is not None:
            loss += attribute_loss(output.attributes, targets).scaled(config.attribute_weight)
        return loss

    def scale(self, image: NDArray[Any]) -> ScaledImage:
        """The picture scaled so that its longer side has `long_side` pixels."""
        return ScaledImage(pixels=pixels.fit(image, self.config.long_side), size=(image.shape[1], image.shape[0]))

    @torch.no_grad()
    def detect_scaled(self, images: Sequence[ScaledImage], *, precision: Precision = "fp32") -> list[RegionArray]:
        """Regions of each picture, most confident first; class distributions end with the background."""
        if not images:
            return []
        config = self.config
        batch, size, scale = self._prepare_images(images)
        with runtime.autocast(self.device, precision):
            features = self.backbone(batch)
            proposals, real = self._select_proposals(self._run_proposals(features, size), size)
            rows = torch.arange(len(images), device=self.device)[:, None].expand_as(real)
            first = self._run_head(features, proposals[real], rows[real])
            score, best = first.classes.softmax(-1)[:, :-1].max(-1)
            shift = (
                first.deltas[torch.arange(len(best), device=self.device), best]
                if config.class_specific_boxes
                else first.deltas[:, 0]
            )
            shift = shift / proposals.new_tensor(REFINEMENT_SCALE)
            boxes = clip_boxes(decode_boxes(shift, proposals[real]), size[rows[real]])

            scores = torch.full(real.shape, -1.0, device=self.device).masked_scatter_(real, score)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            corners = (
                torch.zeros_like(proposals)
                .masked_scatter_(real[..., None], boxes)
                .gather(1, order[..., None].expand(-1, -1, 4))
            )
            classes = torch.zeros_like(order).masked_scatter_(real, best).gather(1, order)
            # What is thinner than a pixel of the original shows nothing that the picture has.
            sides = (corners[..., 2:] - corners[..., :2]) * scale[:, None, :2]
            valid = (scores >= 0) & (sides >= _LEAST_SIDE).all(-1)
            keep = ops.suppress(
                corners, config.final_threshold, real=valid, classes=None if config.suppress_across_classes else classes
            )
            rank = keep.cumsum(1)
            keep &= ((scores >= config.min_confidence) | (rank <= config.min_regions)) & (rank <= config.max_regions)
            final = self._run_head(features, corners[keep], rows[keep])
        counts = keep.sum(1).tolist()
        found = self._split_regions(final, corners[keep] * scale[rows[keep]], images, counts)
        return [_sort_by_confidence(regions) for regions in found]

    @torch.no_grad()
    def regions_at_scaled(
        self, images: Sequence[ScaledImage], boxes: Sequence[NDArray[Any]], *, precision: Precision = "fp32"
    ) -> list[RegionArray]:
        """Regions of each picture at given boxes instead of detected ones, in their order.

        Args:
            boxes: of each picture, (R, 4) pixel corners of the original within it, with area.
        """
        if not images:
            return []
        batch, _, scale = self._prepare_images(images)
        counts = [len(own) for own in boxes]
        rows = torch.arange(len(images), device=self.device).repeat_interleave(torch.tensor(counts).to(self.device))
        corners = torch.from_numpy(np.concatenate([own.reshape(-1, 4) for own in boxes])).to(self.device, torch.float32)
        with runtime.autocast(self.device, precision):
            final = self._run_head(self.backbone(batch), corners / scale[rows], rows)
        return self._split_regions(final, corners, images, counts)

    def save(self, directory: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, directory / "model.safetensors")
        content = {"format": _FORMAT, "fingerprint": self.fingerprint, "config": configs.to_dict(self.config)}
        (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, *, device: torch.device | str = "cpu") -> Detector:
        """The detector saved in a folder, or in the `model` folder of a training's folder, in evaluation mode.

        Raises:
            CheckpointError: a file is missing or damaged, weights and configuration do not belong together, or the
                folder holds a detector of another kind.
        """
        detector = load_detector(directory, device=device)
        if not isinstance(detector, cls):
            raise CheckpointError(
                f"{directory} holds a detector of another kind, which cannot be used here: {type(detector).__name__}. "
                "Give one that `visling detect train` wrote."
            )
        return detector

    def load_weights(self, weights: Mapping[str, Tensor], file: Path) -> None:
        """Take the weights of a file, all of them.

        Raises:
            CheckpointError: names or shapes that differ from the network's.
        """
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
                f"{file} does not fit its config.json ({counts}): {'; '.join(part for part in parts if part)}. "
                "The two files must come from the same training."
            )
        self.load_state_dict(weights)

    def _prepare_images(self, images: Sequence[ScaledImage]) -> tuple[Tensor, Tensor, Tensor]:
        """Padded batch; (B, 4) width, height, width, height of each scaled image; (B, 4) factors from scaled to
        original pixels."""
        fitted = [image.pixels for image in images]
        size = torch.tensor([image.shape[1::-1] * 2 for image in fitted], dtype=torch.float32)
        original = torch.tensor([image.size * 2 for image in images], dtype=torch.float32)
        return (
            pixels.to_batch(fitted, self.backbone.multiple, self.device),
            size.to(self.device),
            (original / size).to(self.device),
        )

    def _run_proposals(self, features: Tensor, size: Tensor) -> _ProposalOutput:
        output = self.propose(features).float()
        batch, _, height, width = output.shape
        output = output.permute(0, 2, 3, 1).reshape(batch, -1, 5)  # anchors innermost
        stride = self.config.stride
        centres = cell_centres(height, width, stride, output.device)  # (cells, 2)
        anchors = (centres.repeat(1, 2)[:, None] + self.base_anchors).flatten(0, 1)
        inside = (centres < size[:, None, :2] + stride / 2).all(-1).repeat_interleave(len(self.base_anchors), dim=1)
        return _ProposalOutput(output[..., 0], output[..., 1:], anchors, inside)

    def _select_proposals(self, proposals: _ProposalOutput, size: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, R, 4) of the best distinct proposals and which of them are real."""
        config = self.config
        logits = proposals.logits.masked_fill(~proposals.inside, -torch.inf)
        best, at = logits.topk(min(config.candidates, logits.shape[1]), dim=1)
        deltas = proposals.deltas.gather(1, at[..., None].expand(-1, -1, 4))
        boxes = clip_boxes(decode_boxes(deltas, proposals.anchors[at]), size[:, None])
        keep = ops.suppress(boxes, config.proposal_threshold, real=best.isfinite() & has_area(boxes))
        first = keep.int().sort(dim=1, descending=True, stable=True).indices[:, : config.proposals]
        return boxes.gather(1, first[..., None].expand(-1, -1, 4)), keep.gather(1, first)

    def _run_head(self, features: Tensor, regions: Tensor, image: Tensor) -> _RegionOutput:
        pooled = ops.roi_align(
            features, regions, image, output_size=self.config.pool_size, scale=1 / self.config.stride, sampling_ratio=1
        )
        # Pooling hides how large a region is, but "large" is an attribute: its size is a further input.
        extent = ((regions[:, 2:] - regions[:, :2]).clamp(min=1) / self.config.stride).log()
        states = functional.relu(self.embed(torch.cat([self.backbone.describe(pooled), extent], dim=1)))
        attributes = states.new_zeros(len(states), 0) if self.describe is None else self.describe(states)
        deltas = self.regress(states).float().unflatten(1, (-1, 4))
        return _RegionOutput(states.float(), self.classify(states).float(), deltas, attributes.float())

    def _split_regions(
        self, output: _RegionOutput, boxes: Tensor, images: Sequence[ScaledImage], counts: list[int]
    ) -> list[RegionArray]:
        """Regions of the whole batch, split by image, in their order."""
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
        return [
            RegionArray(
                features=features,
                boxes=corners,
                size=image.size,
                classes=best.astype(np.int16),
                class_confidence=score,
                attributes=described.astype(np.int16),
                attribute_confidence=sureness,
                probs=distributions,
            )
            for image, (features, corners, best, score, described, sureness, distributions) in zip(
                images, zip(*arrays, strict=True), strict=True
            )
        ]


def load(directory: Path, content: Mapping[str, Any]) -> Detector:
    """The detector of a folder, on the CPU.

    Args:
        content: of `config.json`.
    Raises:
        CheckpointError: the weights are missing or damaged, or do not belong to the configuration.
    """
    try:
        weights = load_file(directory / "model.safetensors")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} is not a detector: no model.safetensors. "
            "Give the folder that training wrote, with config.json and model.safetensors."
        ) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{directory / 'model.safetensors'} is damaged: {error}. Copy or train the detector again."
        ) from error
    try:
        detector = Detector(configs.from_dict(DetectorConfig, content["config"]))
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{directory / 'config.json'} was written by another version: {error}") from error
    detector.load_weights(weights, directory / "model.safetensors")
    return detector


def _sort_by_confidence(regions: RegionArray) -> RegionArray:
    """The regions, most confident first."""
    assert regions.class_confidence is not None
    order = np.argsort(-regions.class_confidence, kind="stable")
    arrays: dict[str, Any] = {
        field.name: value[order]
        for field in dataclasses.fields(regions)
        if isinstance(value := getattr(regions, field.name), np.ndarray)
    }
    return dataclasses.replace(regions, **arrays)
