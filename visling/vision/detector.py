"""Faster R-CNN with classes and attributes, small enough to be trained from scratch in minutes.

Paper    Ren et al. 2015 (arXiv 1506.01497); attributes as in Anderson et al. 2018 (arXiv 1707.07998), section 3.1.
Differs  One feature map without a pyramid; attributes are independent (sigmoid), because an object has several; the
         final boxes are pooled a second time, so that feature, class and attributes describe the box that is reported.
Shapes   B images, A anchors of an image, N truth boxes of an image (padded), R regions of an image, S regions sampled
         for training, C classes, K attributes kept per region, F region feature width. Boxes are pixel corners of the
         network's input, unless a name states another system.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from visling.errors import CheckpointError, ConfigError
from visling.runtime import Precision
from visling.types import IGNORE, Loss, RegionArray
from visling.vision import images as pixels
from visling.vision import ops
from visling.vision.anchors import (
    base_anchors,
    cell_centres,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    has_area,
    sample_anchors,
    sample_regions,
)
from visling.vision.backbones import SmallBackbone
from visling.vision.detector_config import DetectorConfig as DetectorConfig
from visling.vision.detectors import load_detector
from visling.vision.region_detector import RegionDetector, ScaledImage

_FORMAT = "visling detector 1"
"""What `config.json` says that it describes."""

_REFINEMENT_SCALE = (10.0, 10.0, 5.0, 5.0)
"""Factors that bring region refinements to unit size (released detectors' `bbox_reg_weights`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Annotated objects of one image."""

    boxes: NDArray[np.float32]
    """(N, 4) pixel corners of the original image."""
    classes: NDArray[np.int64]
    """(N,) class, or IGNORE for areas in which nothing should be learnt (crowds)."""
    attributes: NDArray[np.bool_]
    """(N, attributes) which of them the object has."""
    has_attributes: NDArray[np.bool_]
    """(N,) whether the object's attributes were annotated."""


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


class Detector(RegionDetector):
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
        digest = hashlib.sha256(json.dumps(configs.to_dict(self.config), sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def feature_size(self) -> int:
        """F."""
        return self.config.feature_size

    @property
    def class_names(self) -> tuple[str, ...]:
        """Object classes, without the background."""
        return self.config.class_names

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Attributes; empty without an attribute head."""
        return self.config.attribute_names

    def limit_regions(self, least: int | None = None, most: int | None = None) -> None:
        """Change `min_regions` and `max_regions` of the configuration, and with them the fingerprint.

        Raises:
            ConfigError: numbers that the detector cannot keep.
        """
        changes = {"min_regions": least, "max_regions": most}
        chosen: dict[str, Any] = {name: number for name, number in changes.items() if number is not None}
        self.config = dataclasses.replace(self.config, **chosen)

    def losses(self, images: Sequence[NDArray[np.uint8]], truths: Sequence[Truth]) -> Loss:
        """Sum of the proposal, class, box and attribute losses of a batch of RGB images (H, W, 3) with their
        objects."""
        batch, size, scale = self._prepare_images([self.scale(image) for image in images])
        boxes, classes, attributes, has_attributes = self._pad_truths(truths, scale)
        features = self.backbone(batch)
        proposals = self._run_proposals(features, size)
        loss = self._proposal_loss(proposals, boxes, classes)

        config, background = self.config, len(self.config.class_names)
        with torch.no_grad():
            candidates, real = self._select_proposals(proposals, size)
            regions, owner, overlap, real = sample_regions(
                candidates, real, boxes, classes, positive=config.region_positive, count=config.region_samples
            )  # (B, S, ...)
            rows = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(owner)
            positive = real & (overlap >= config.region_positive)
            label = torch.where(positive, classes[rows, owner], background)
            label = torch.where(real, label, IGNORE).flatten()
            has_object = label.ne(IGNORE) & positive.flatten()
        output = self._run_head(features, regions.flatten(0, 1), rows.flatten())
        losses = functional.cross_entropy(output.classes, label, ignore_index=IGNORE, reduction="none")
        loss += Loss.mean("class", losses, label.ne(IGNORE))

        shift = output.deltas[:, 0]
        if config.class_specific_boxes:
            shift = output.deltas[torch.arange(len(label), device=label.device), label.clamp(0, background - 1)]
        wanted = encode_boxes(boxes[rows, owner], regions).flatten(0, 1) * regions.new_tensor(_REFINEMENT_SCALE)
        loss += Loss.mean("box", functional.smooth_l1_loss(shift, wanted, reduction="none").sum(-1), has_object)
        if self.describe is not None:
            annotated = has_object & has_attributes[rows, owner].flatten()
            target = attributes[rows, owner].flatten(0, 1)
            losses = functional.binary_cross_entropy_with_logits(output.attributes, target, reduction="none")
            mask = annotated[:, None].expand_as(losses)
            loss += Loss.mean("attribute", losses, mask).scaled(config.attribute_weight)
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
            shift = shift / proposals.new_tensor(_REFINEMENT_SCALE)
            boxes = clip_boxes(decode_boxes(shift, proposals[real]), size[rows[real]])

            scores = torch.full(real.shape, -1.0, device=self.device).masked_scatter_(real, score)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            corners = (
                torch.zeros_like(proposals)
                .masked_scatter_(real[..., None], boxes)
                .gather(1, order[..., None].expand(-1, -1, 4))
            )
            classes = torch.zeros_like(order).masked_scatter_(real, best).gather(1, order)
            valid = (scores >= 0) & has_area(corners)
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

    def _pad_truths(self, truths: Sequence[Truth], scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes (B, N, 4) in input pixels, classes (B, N), attributes (B, N, ...) and whether they were annotated.

        Padding has an empty box, which overlaps nothing, and class IGNORE.
        """
        most = max(1, *(len(truth.classes) for truth in truths)) if truths else 1
        boxes = np.zeros((len(truths), most, 4), np.float32)
        classes = np.full((len(truths), most), IGNORE, np.int64)
        attributes = np.zeros((len(truths), most, len(self.config.attribute_names)), np.float32)
        annotated = np.zeros((len(truths), most), np.bool_)
        for row, truth in enumerate(truths):
            count = len(truth.classes)
            boxes[row, :count], classes[row, :count] = truth.boxes, truth.classes
            attributes[row, :count], annotated[row, :count] = truth.attributes, truth.has_attributes
        arrays = (boxes, classes, attributes, annotated)
        moved = [torch.from_numpy(array).to(self.device, non_blocking=True) for array in arrays]
        return moved[0] / scale[:, None], moved[1], moved[2], moved[3]

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

    def _proposal_loss(self, proposals: _ProposalOutput, boxes: Tensor, classes: Tensor) -> Loss:
        config = self.config
        with torch.no_grad():
            sample = sample_anchors(
                proposals.anchors,
                proposals.inside,
                boxes,
                classes,
                positive=config.anchor_positive,
                negative=config.anchor_negative,
                count=config.anchor_samples,
            )
            row, anchor = sample.positive.nonzero(as_tuple=True)
            wanted = encode_boxes(boxes[row, sample.owner[row, anchor]], proposals.anchors[anchor])
        objectness = functional.binary_cross_entropy_with_logits(
            proposals.logits, sample.positive.float(), reduction="none"
        )
        shift = functional.smooth_l1_loss(proposals.deltas[row, anchor], wanted, beta=1 / 9, reduction="none").sum(-1)
        return Loss.mean("objectness", objectness, sample.chosen) + Loss.mean("proposal_box", shift)

    def _run_head(self, features: Tensor, regions: Tensor, image: Tensor) -> _RegionOutput:
        pooled = ops.roi_align(
            features, regions, image, output_size=self.config.pool_size, scale=1 / self.config.stride, sampling_ratio=1
        )
        # Pooling hides how large a region is, but "large" is an attribute: its size is a further input.
        extent = ((regions[:, 2:] - regions[:, :2]).clamp(min=1) / self.config.stride).log()
        states = functional.relu(self.embed(torch.cat([pooled.flatten(1), extent], dim=1)))
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
