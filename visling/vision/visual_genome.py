"""The Visual Genome detector, whose regions most released models read: Faster R-CNN with attributes on a ResNet.

Paper    Anderson et al. 2018 (arXiv 1707.07998), section 3.1; Ren et al. 2015 (arXiv 1506.01497).
Releases peteanderson80/bottom-up-attention (Caffe), whose weights MILVLG/bottom-up-attention.pytorch and
         airsplay/py-bottom-up-attention ported; the latter's are `unc-nlp/frcnn-vg-finetuned` on the hub, read by
         transformers' research projects (visual_bert/modeling_frcnn.py).
Differs  One network for all of them: the background and "no attribute" come last, and objectness is one logit (see
         `visual_genome_weights`). What the ports and the original do differently with its outputs is configuration.
         Regions of a batch do not depend on the other pictures in it where all have one scaled size. The port's known
         errors are not copied: boxes divided by another picture's size, a picture without enough regions that gets
         another picture's, real classes in padding.
Shapes   B images, A anchors of an image, R regions of an image, N regions of a batch, C classes, K attributes, F region
         feature width. Boxes are pixel corners of the scaled picture unless a name states another system.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from visling import config as configs
from visling import runtime
from visling.checkpoints import files
from visling.checkpoints.keymap import KeyMap, rename
from visling.errors import CheckpointError, ConfigError
from visling.runtime import Precision
from visling.types import Loss, RegionArray
from visling.vision import ops, visual_genome_images, visual_genome_training
from visling.vision.anchors import base_anchors, caffe_anchors, cell_centres, clip_boxes, decode_boxes
from visling.vision.region_detector import ScaledImage
from visling.vision.resnet import (
    HEAD_BLOCKS,
    STRIDE,
    Bottleneck,
    FrozenNorm,
    build_stage,
    build_trunk,
    feature_map,
    fold_norms,
    freeze_parts,
    initialise,
)
from visling.vision.trainable import TrainableDetector, Truth
from visling.vision.visual_genome_config import BLOCKS, VisualGenomeConfig
from visling.vision.visual_genome_selection import select_across_classes, select_by_class

FORMAT = "visling visual-genome detector 1"
"""What `config.json` says that it describes."""

_CPU_CHUNK, _CHUNK = 16, 256
"""Regions that pass through the last stage together, on a CPU and elsewhere: what its caches, and memory, hold. 64 take
a fifth more time on a CPU than 16."""


_CPU_PICTURES, _PICTURES = 1, 8
"""Pictures whose feature maps are computed together, on a CPU, where more would only take memory, and elsewhere."""


class Backbone(NamedTuple):
    """The residual network, its norms folded into its convolutions."""

    stem: nn.Module
    stages: Iterable[nn.Module]
    head: nn.Module


class Proposals(NamedTuple):
    """Output of the proposal network."""

    logits: Tensor
    """(B, anchors per cell, H, W) objectness."""
    shifts: Tensor
    """(B, 4 x anchors per cell, H, W)."""


class RegionOutput(NamedTuple):
    """Output of the region head."""

    features: Tensor
    """(N, F)."""
    classes: Tensor
    """(N, C + 1) logits, background last."""
    attributes: Tensor
    """(N, K + 1) logits, "no attribute" last; 0 wide without an attribute head."""
    shifts: Tensor
    """(N, C or 1, 4)."""


class ProposalNetwork(nn.Module):
    """Whether each anchor holds an object, and how it moves to fit it."""

    def __init__(self, channels: int, hidden_size: int, anchors: int) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(channels, hidden_size, 3, padding=1)
        self.objectness = nn.Conv2d(hidden_size, anchors, 1)
        self.shift = nn.Conv2d(hidden_size, 4 * anchors, 1)

    def forward(self, features: Tensor) -> Proposals:
        """(B, channels, H, W) -> logits and shifts of every anchor."""
        states = functional.relu(self.hidden(features))
        return Proposals(self.objectness(states).float(), self.shift(states).float())


class RegionPredictor(nn.Module):
    """Class, refined box and attribute of a region; the attribute depends on the class."""

    def __init__(self, feature_size: int, classes: int, attributes: int, *, class_specific_boxes: bool) -> None:
        super().__init__()
        self.classify = nn.Linear(feature_size, classes + 1)
        self.refine = nn.Linear(feature_size, 4 * (classes if class_specific_boxes else 1))
        self.has_attributes = attributes > 0
        if self.has_attributes:
            self.class_embedding = nn.Embedding(classes + 1, feature_size // 8)
            self.describe = nn.Linear(feature_size + feature_size // 8, feature_size // 4)
            self.attribute = nn.Linear(feature_size // 4, attributes + 1)

    def forward(self, features: Tensor, known: Tensor | None = None) -> RegionOutput:
        """(N, F) -> the logits and shifts of N regions.

        Args:
            known: (N,) classes that the attributes depend on, C for the background; None = the likeliest.
        """
        classes = self.classify(features).float()
        attributes = classes.new_zeros(len(features), 0)
        if self.has_attributes:
            # the background is a class here
            embedded = self.class_embedding(classes.argmax(-1) if known is None else known)
            hidden = functional.relu(self.describe(torch.cat([features, embedded], dim=-1)))
            attributes = self.attribute(hidden).float()
        return RegionOutput(features, classes, attributes, self.refine(features).float().unflatten(1, (-1, 4)))


class VisualGenomeDetector(TrainableDetector):
    """Pictures in; regions with feature, class, attribute and box out."""

    config: VisualGenomeConfig

    def __init__(self, config: VisualGenomeConfig) -> None:
        super().__init__()
        self.config = config
        self._folded: tuple[tuple[tuple[int, int], ...], Backbone] | None = None
        """Memory and version of every tensor of the network, and the network with folded norms that has these."""
        widths = [config.width * 2**stage for stage in range(4)]
        self.stem, self.stages = build_trunk(config.stem_size, widths[:3], BLOCKS[config.depth], [FrozenNorm] * 4)
        stride, dilation = (1, 2) if config.dilated_head else (2, 1)
        self.head = build_stage(config.channels, widths[3], blocks=HEAD_BLOCKS, stride=stride, dilation=dilation)
        anchors = caffe_anchors if config.inclusive_boxes else base_anchors
        # In the state dict, because those of the weights' file differ from the formula's.
        self.register_buffer("base_anchors", anchors(config.anchor_sizes, config.anchor_ratios))
        self.base_anchors: Tensor
        self.propose = ProposalNetwork(config.channels, config.proposal_size, len(self.base_anchors))
        self.predict = RegionPredictor(
            config.feature_size,
            len(config.class_names),
            len(config.attribute_names),
            class_specific_boxes=config.class_specific_boxes,
        )
        self._initialise()
        nn.Module.to(self, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _initialise(self) -> None:
        """Random weights whose outputs stay small at every depth, for tests and trials without the released ones."""
        initialise(self)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.constant_(module.expand.norm.weight, 0.2)
        for layer in (self.propose.objectness, self.propose.shift, self.predict.classify, self.predict.refine):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.base_anchors.device

    @property
    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights."""
        digest = hashlib.sha256(json.dumps(configs.to_dict(self.config), sort_keys=True).encode())
        # Nothing reads the counters, and files of one release differ in them.
        weights = {name: value for name, value in self.state_dict().items() if not name.endswith("num_batches_tracked")}
        files.add_tensors(digest, weights)
        return digest.hexdigest()

    def scale(self, image: NDArray[Any]) -> ScaledImage:
        """The picture at the size of the configuration, in float32."""
        return visual_genome_images.scale(image, self.config)

    @torch.no_grad()
    def detect_scaled(self, images: Sequence[ScaledImage], *, precision: Precision = "fp32") -> list[RegionArray]:
        """Regions of each picture.

        Selection "port" has the most confident first; selection "original" keeps the order of its released features,
        which is that of the proposals where their number is neither raised nor lowered.
        """
        if not images:
            return []
        size = visual_genome_images.scaled_sizes(images).to(self.device)
        to_original = visual_genome_images.boxes_to_original(images, self.config).to(self.device)
        found = []
        with runtime.autocast(self.device, precision):
            backbone = self.fold()
            features = self.run_trunk(backbone, self.prepare(images))
            proposals = self.select_proposals(self.propose(features), size, to_original)
            for row, (image, (boxes, _)) in enumerate(zip(images, proposals, strict=True)):
                output = self.run_head(backbone, features[row], boxes)
                chosen, corners = self._select_regions(output, boxes, size[row], to_original[row])
                regions = RegionOutput(*(value[chosen] for value in output))
                found.append(self._to_array(regions, corners[chosen], image))
        return found

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
        to_original = visual_genome_images.boxes_to_original(images, self.config).to(self.device)
        found = []
        with runtime.autocast(self.device, precision):
            backbone = self.fold()
            features = self.run_trunk(backbone, self.prepare(images))
            for row, (image, own) in enumerate(zip(images, boxes, strict=True)):
                corners = torch.from_numpy(np.asarray(own, np.float32).reshape(-1, 4)).to(self.device)
                output = self.run_head(backbone, features[row], corners / to_original[row])
                found.append(self._to_array(output, corners, image))
        return found

    def freeze(self, stages: int) -> None:
        """Freeze the first convolution, then stages; norms are always frozen.

        Raises:
            ConfigError: more stages than there are.
        """
        freeze_parts((self.stem, *self.stages, self.head), stages)

    def row_names(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the rows of the heads that predict classes, boxes of each class, and attributes."""
        classes, attributes = self.class_names, self.attribute_names
        rows = {"classify.weight": (*classes, ""), "classify.bias": (*classes, "")}
        if self.config.class_specific_boxes:
            rows |= {"refine.weight": classes, "refine.bias": classes}
        if self.predict.has_attributes:
            rows["class_embedding.weight"] = (*classes, "")
            rows |= {"attribute.weight": (*attributes, ""), "attribute.bias": (*attributes, "")}
        return {f"predict.{name}": names for name, names in rows.items()}

    def losses_scaled(self, images: Sequence[ScaledImage], truths: Sequence[Truth]) -> Loss:
        """Losses of proposals, classes, boxes and attributes, as `visual_genome_training` sums them."""
        return visual_genome_training.losses(self, images, truths)

    def save(self, directory: Path, *, half: bool = False) -> None:
        """Write `config.json` and `model.safetensors`.

        Args:
            half: round convolutions, matrices and embeddings to half precision, in this detector and in the file, which
                halves it.
        """
        if half:
            with torch.no_grad():
                for parameter in self.parameters():
                    if parameter.dim() > 1:
                        parameter.copy_(parameter.half())
        small = {name for name, value in self.named_parameters() if half and value.dim() > 1}
        weights = {name: value.half() if name in small else value for name, value in self.state_dict().items()}
        directory.mkdir(parents=True, exist_ok=True)
        files.write_tensors(weights, directory / "model.safetensors")
        content = {"format": FORMAT, "fingerprint": self.fingerprint, **self.store_settings}
        content["config"] = configs.to_dict(self.config)
        (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def fold(self) -> Backbone:
        """The residual network as it is evaluated; computed again only after its weights have changed or moved."""
        parts = nn.ModuleDict({"stem": self.stem, "stages": self.stages, "head": self.head})
        tensors = [*parts.parameters(), *parts.buffers()]
        if any(tensor.is_inference() for tensor in tensors):  # their changes are not counted
            return _fold(parts)
        # PyTorch counts every change in place, but those by way of `.data`, which nothing here makes.
        state = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if self._folded is None or self._folded[0] != state:
            self._folded = state, _fold(parts)
        return self._folded[1]

    def train(self, mode: bool = True) -> Self:
        """Training gives up the copy that predicts."""
        if mode:
            self._folded = None
        return super().train(mode)

    def prepare(self, images: Sequence[ScaledImage]) -> Tensor:
        """Input of the network, (B, 3, h, w)."""
        return visual_genome_images.to_batch(images, self.config, self.device)

    def run_trunk(self, backbone: Backbone, images: Tensor) -> Tensor:
        """Feature map of the whole pictures, (B, channels, h / 16, w / 16)."""
        pieces = torch.split(images, _CPU_PICTURES if images.device.type == "cpu" else _PICTURES)
        caffe_pool = self.config.caffe_pool
        return torch.cat(
            [feature_map(backbone.stem, backbone.stages, piece, caffe_pool=caffe_pool) for piece in pieces]
        )

    def select_proposals(self, output: Proposals, size: Tensor, to_original: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Boxes (R, 4) and logits (R,) of the best distinct proposals of each picture, best first.

        Args:
            size: (B, 4) width, height, width, height of the pictures without padding.
            to_original: (B, 4) factors that bring corners back to the original pictures.
        """
        config = self.config
        anchors, logits, shifts = self.list_anchors(output)
        if config.filter_first:
            boxes = self._move_boxes(shifts, anchors, size[:, None])
            logits = logits.masked_fill(~self._is_large(boxes, to_original), -torch.inf)
        best, at = (value[:, : config.candidates] for value in logits.sort(dim=1, descending=True, stable=True))
        boxes = self._move_boxes(shifts.gather(1, at[..., None].expand(-1, -1, 4)), anchors[at], size[:, None])
        keep = ops.suppress(
            boxes,
            config.proposal_threshold,
            real=best.isfinite() & self._is_large(boxes, to_original),
            inclusive=config.inclusive_boxes,
            most=config.proposals,
        )
        return [(own[kept], logit[kept]) for own, logit, kept in zip(boxes, best, keep, strict=True)]

    def list_anchors(self, output: Proposals) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors (A, 4) of all cells, their logits (B, A) and their shifts (B, A, 4)."""
        height, width = output.logits.shape[2:]
        corners = cell_centres(height, width, STRIDE, self.device) - STRIDE / 2
        anchors = (corners.repeat(1, 2)[:, None] + self.base_anchors).flatten(0, 1)
        logits = output.logits.permute(0, 2, 3, 1).flatten(1)  # anchors of a cell innermost
        shifts = torch.unflatten(output.shifts, 1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
        return anchors, logits, shifts / shifts.new_tensor(self.config.proposal_box_scale)

    def pool(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Cells of each region of a picture: (channels, H, W) and (R, 4) -> (R, channels, P, P)."""
        image = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return ops.roi_pool(features[None], boxes, image, output_size=self.config.pool_size, scale=1 / STRIDE)

    def run_head(self, backbone: Backbone, features: Tensor, boxes: Tensor) -> RegionOutput:
        """Feature, class, attribute and box shift of each region of a picture.

        Args:
            features: (channels, H, W).
            boxes: (R, 4).
        """
        pooled = torch.split(self.pool(features, boxes), _CPU_CHUNK if features.device.type == "cpu" else _CHUNK)
        output: RegionOutput = self.predict(torch.cat([backbone.head(piece).float().mean((2, 3)) for piece in pooled]))
        return output

    def _move_boxes(self, shifts: Tensor, base: Tensor, size: Tensor) -> Tensor:
        """Boxes (..., 4) moved by their shifts and cut to the picture, whose last pixel ends an inclusive box."""
        inclusive = self.config.inclusive_boxes
        return clip_boxes(decode_boxes(shifts, base, inclusive=inclusive), size - float(inclusive))

    def _is_large(self, boxes: Tensor, to_original: Tensor) -> Tensor:
        """Which proposals (B, A, 4) are large enough."""
        sides = boxes[..., 2:] - boxes[..., :2]
        if self.config.inclusive_boxes:
            return (sides + 1 >= self.config.min_side / to_original[:, None, 2:]).all(-1)
        return (sides > self.config.min_side).all(-1)

    def _select_regions(
        self, output: RegionOutput, proposals: Tensor, size: Tensor, to_original: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which proposals of a picture become regions, (K,), and the box of every one in the original picture, (R, 4).

        Args:
            size, to_original: (4,) of the picture, as in `select_proposals`.
        """
        config = self.config
        probs = output.classes.softmax(-1)[:, :-1]
        scores, best = probs.max(-1)
        boxes = proposals
        if config.boxes == "refined":
            shifts = output.shifts[
                torch.arange(len(best), device=best.device), best if config.class_specific_boxes else 0
            ]
            boxes = self._move_boxes(shifts / shifts.new_tensor(config.box_scale), proposals, size)
        if config.selection == "original":
            chosen = select_by_class(
                proposals * to_original,
                probs,
                threshold=config.thresholds[0],
                min_confidence=config.min_confidence,
                least=config.min_regions,
                most=config.max_regions,
            )
        else:
            chosen = select_across_classes(boxes, scores, config.thresholds, config.min_regions, config.max_regions)
        return chosen, boxes * to_original

    def _to_array(self, output: RegionOutput, boxes: Tensor, image: ScaledImage) -> RegionArray:
        """Regions of a picture, in the given order, with boxes (R, 4) of the original."""
        probs = output.classes.softmax(-1)
        confidence, classes = probs[:, :-1].max(-1)
        arrays: dict[str, NDArray[Any] | None] = dict.fromkeys(("attributes", "attribute_confidence"))
        if self.predict.has_attributes:
            # The original leaves a share to "no attribute"; the port removes it before the softmax.
            logits = output.attributes if self.config.count_no_attribute else output.attributes[:, :-1]
            share, attributes = logits.softmax(-1)[:, : len(self.attribute_names)].max(-1)
            arrays["attributes"] = attributes[:, None].cpu().numpy().astype(np.int16)
            arrays["attribute_confidence"] = share[:, None].cpu().numpy()
        return RegionArray(
            features=output.features.float().cpu().numpy(),
            boxes=boxes.cpu().numpy(),
            size=image.size,
            classes=classes.cpu().numpy().astype(np.int16),
            class_confidence=confidence.cpu().numpy(),
            probs=probs.cpu().numpy(),
            **arrays,
        )


def _fold(parts: nn.ModuleDict) -> Backbone:
    folded = fold_norms(parts)
    return Backbone(folded["stem"], list(folded["stages"].children()), folded["head"])


def load(directory: Path, content: Mapping[str, Any]) -> VisualGenomeDetector:
    """The detector of a folder, on the CPU.

    Args:
        content: of `config.json`.
    Raises:
        CheckpointError: the weights are missing or damaged, or do not belong to the configuration.
    """
    weights = files.read(directory / "model.safetensors")
    try:
        detector = VisualGenomeDetector(configs.from_dict(VisualGenomeConfig, content["config"]))
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{directory / 'config.json'} was written by another version: {error}") from error
    _OWN_KEYS.load(weights, {"detector": detector})
    return detector


_OWN_KEYS = KeyMap((rename("**", "detector.**"),))
"""A detector's own folder has its own names."""
