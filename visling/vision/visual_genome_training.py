"""The training loss of the Visual Genome detector, to fine-tune it on boxes of one's own.

Papers   Ren et al. 2015 (arXiv 1506.01497), section 3; Anderson et al. 2018 (arXiv 1707.07998), section 3.1.
Differs  Anchors count if their centre lies in the picture; objectness is one logit (see `visual_genome_weights`). As
         many proposals are sampled from as in prediction.
Shapes   B images, A anchors of an image, R proposals of an image (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from visling.types import IGNORE, Loss
from visling.vision import ops, visual_genome_images
from visling.vision.detector_losses import (
    REFINEMENT_SCALE,
    exclusive_attribute_loss,
    pad_truths,
    proposal_loss,
    region_loss,
    sample_targets,
)
from visling.vision.region_detector import ScaledImage
from visling.vision.resnet import STRIDE, feature_map
from visling.vision.trainable import Truth

if TYPE_CHECKING:
    from visling.vision.visual_genome import VisualGenomeDetector

_ANCHOR_POSITIVE, _ANCHOR_NEGATIVE, _ANCHORS = 0.7, 0.3, 256
"""IoU from which an anchor belongs to an object, below which it is background, and anchors per image (Ren et al.,
section 3.1.2 and 3.1.3)."""
_REGION_POSITIVE, _REGIONS = 0.5, 128
"""IoU from which a region belongs to an object, and regions per image (Girshick 2015, arXiv 1504.08083, 2.3; here of
one image, not two)."""
_ATTRIBUTE_WEIGHT = 0.2
"""MILVLG/bottom-up-attention.pytorch, bua/d2/config.py."""


def losses(detector: VisualGenomeDetector, images: Sequence[ScaledImage], truths: Sequence[Truth]) -> Loss:
    """Sum of the proposal, class, box and attribute losses of a batch of pictures with their objects."""
    config = detector.config
    size = visual_genome_images.scaled_sizes(images).to(detector.device)
    to_original = visual_genome_images.boxes_to_original(images, config).to(detector.device)
    padded = pad_truths(truths, to_original, num_attributes=len(config.attribute_names))
    # Where both end pixels belong to a box, it is compared with the truth one pixel further.
    end = to_original.new_tensor([0.0, 0.0, 1.0, 1.0]) * float(config.inclusive_boxes)

    # The modules themselves, not the copy with folded norms that predicts.
    features = feature_map(detector.stem, detector.stages, detector.prepare(images), caffe_pool=config.caffe_pool)
    output = detector.propose(features)
    anchors, logits, shifts = detector.list_anchors(output)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    inside = ((centres >= 0) & (centres < size[:, None, :2])).all(-1)  # (B, A)
    loss = proposal_loss(
        logits,
        shifts,
        anchors + end,
        inside,
        padded,
        positive=_ANCHOR_POSITIVE,
        negative=_ANCHOR_NEGATIVE,
        count=_ANCHORS,
    )
    with torch.no_grad():
        found = [boxes for boxes, _ in detector.select_proposals(output, size, to_original)]
        real = torch.arange(max(map(len, found)), device=detector.device) < torch.tensor(
            [[len(boxes)] for boxes in found], device=detector.device
        )
        candidates = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)  # (B, R, 4)
    background = len(config.class_names)
    targets = sample_targets(
        candidates + end, real, padded, background=background, positive=_REGION_POSITIVE, count=_REGIONS
    )
    known = torch.where(targets.label == IGNORE, background, targets.label)
    pooled = ops.roi_pool(
        features, targets.regions - end, targets.image, output_size=config.pool_size, scale=1 / STRIDE
    )
    regions = detector.predict(detector.head(pooled).mean((2, 3)), known)
    units = regions.shifts.new_tensor(REFINEMENT_SCALE) / regions.shifts.new_tensor(config.box_scale)
    loss += region_loss(regions.classes, regions.shifts * units, targets)
    if config.attribute_names:
        loss += exclusive_attribute_loss(regions.attributes, targets).scaled(_ATTRIBUTE_WEIGHT)
    return loss
