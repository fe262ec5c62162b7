"""Training losses of a two-stage detector, whatever its network: proposals, classes, boxes, attributes.

Paper    Ren et al. 2015 (arXiv 1506.01497), sections 3.1.2 and 3.2; attributes as in Anderson et al. 2018 (arXiv
         1707.07998), section 3.1.
Shapes   B images, A anchors of an image, N truth boxes of an image (padded), R candidate regions of an image, S regions
         sampled per image, C classes, K attributes. Boxes are pixel corners of the network's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from visling.types import IGNORE, Loss
from visling.vision.anchors import encode_boxes, sample_anchors, sample_regions
from visling.vision.trainable import Truth

REFINEMENT_SCALE = (10.0, 10.0, 5.0, 5.0)
"""Factors that bring region refinements to unit size (released detectors' `bbox_reg_weights`)."""


class PaddedTruths(NamedTuple):
    """Objects of a batch. Padding has an empty box, which overlaps nothing, and class IGNORE."""

    boxes: Tensor
    """(B, N, 4)."""
    classes: Tensor
    """(B, N)."""
    attributes: Tensor
    """(B, N, K) float: 1 = the object has it."""
    annotated: Tensor
    """(B, N) bool: whether the object's attributes were annotated."""


def pad_truths(truths: Sequence[Truth], scale: Tensor, *, num_attributes: int) -> PaddedTruths:
    """The objects of a batch on the device of `scale`.

    Args:
        scale: (B, 4) factors from the network's input to the original pixels of the truth.
    """
    most = max(1, *(len(truth.classes) for truth in truths)) if truths else 1
    boxes = np.zeros((len(truths), most, 4), np.float32)
    classes = np.full((len(truths), most), IGNORE, np.int64)
    attributes = np.zeros((len(truths), most, num_attributes), np.float32)
    annotated = np.zeros((len(truths), most), np.bool_)
    for row, truth in enumerate(truths):
        count = len(truth.classes)
        boxes[row, :count], classes[row, :count] = truth.boxes, truth.classes
        attributes[row, :count], annotated[row, :count] = truth.attributes, truth.has_attributes
    arrays = (boxes, classes, attributes, annotated)
    moved = [torch.from_numpy(array).to(scale.device, non_blocking=True) for array in arrays]
    return PaddedTruths(moved[0] / scale[:, None], moved[1], moved[2], moved[3])


def proposal_loss(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    inside: Tensor,
    truths: PaddedTruths,
    *,
    positive: float,
    negative: float,
    count: int,
) -> Loss:
    """Losses of the proposal network: is there an object at an anchor, and where.

    Args:
        logits: (B, A).
        deltas: (B, A, 4).
        anchors: (A, 4).
        inside: (B, A) bool: which anchors may be trained on.
        positive: IoU from which an anchor belongs to an object.
        negative: IoU below which it is background; those between are left out.
        count: most anchors per image.
    """
    with torch.no_grad():
        sample = sample_anchors(
            anchors, inside, truths.boxes, truths.classes, positive=positive, negative=negative, count=count
        )
        row, anchor = sample.positive.nonzero(as_tuple=True)
        wanted = encode_boxes(truths.boxes[row, sample.owner[row, anchor]], anchors[anchor])
    objectness = functional.binary_cross_entropy_with_logits(logits, sample.positive.float(), reduction="none")
    shift = functional.smooth_l1_loss(deltas[row, anchor], wanted, beta=1 / 9, reduction="none").sum(-1)
    return Loss.mean("objectness", objectness, sample.chosen) + Loss.mean("proposal_box", shift)


class RegionTargets(NamedTuple):
    """Regions on which the region head trains, and what it should say of them."""

    regions: Tensor
    """(B * S, 4)."""
    image: Tensor
    """(B * S,) image of each."""
    label: Tensor
    """(B * S,) class from 0, C for the background, IGNORE for padding."""
    has_object: Tensor
    """(B * S,) bool."""
    shift: Tensor
    """(B * S, 4) from the region to its object, in units of the refinement; anything without object."""
    attributes: Tensor
    """(B * S, K) float, of the object."""
    annotated: Tensor
    """(B * S,) bool: there is an object, and its attributes were annotated."""


@torch.no_grad()
def sample_targets(
    candidates: Tensor, real: Tensor, truths: PaddedTruths, *, background: int, positive: float, count: int
) -> RegionTargets:
    """Regions of each image, at random, with what is to be predicted.

    Args:
        candidates: (B, R, 4) proposals; the truth boxes are added to them.
        real: (B, R) bool.
        background: C, the label of regions without object.
        positive: IoU from which a region belongs to an object.
        count: most regions per image.
    """
    regions, owner, overlap, real = sample_regions(
        candidates, real, truths.boxes, truths.classes, positive=positive, count=count
    )  # (B, S, ...)
    rows = torch.arange(len(regions), device=regions.device)[:, None].expand_as(owner)
    found = real & (overlap >= positive)
    label = torch.where(found, truths.classes[rows, owner], background)
    label = torch.where(real, label, IGNORE).flatten()
    has_object = label.ne(IGNORE) & found.flatten()
    shift = encode_boxes(truths.boxes[rows, owner], regions).flatten(0, 1) * regions.new_tensor(REFINEMENT_SCALE)
    return RegionTargets(
        regions=regions.flatten(0, 1),
        image=rows.flatten(),
        label=label,
        has_object=has_object,
        shift=shift,
        attributes=truths.attributes[rows, owner].flatten(0, 1),
        annotated=has_object & truths.annotated[rows, owner].flatten(),
    )


def region_loss(classes: Tensor, deltas: Tensor, targets: RegionTargets) -> Loss:
    """Losses of class and box.

    Args:
        classes: (B * S, C + 1) logits, background last.
        deltas: (B * S, 1 or C, 4): one refinement for all classes, or one for each.
    """
    losses = functional.cross_entropy(classes, targets.label, ignore_index=IGNORE, reduction="none")
    shift = deltas[:, 0]
    if deltas.shape[1] > 1:
        of = targets.label.clamp(0, deltas.shape[1] - 1)
        shift = deltas[torch.arange(len(of), device=of.device), of]
    wrong = functional.smooth_l1_loss(shift, targets.shift, reduction="none").sum(-1)
    return Loss.mean("class", losses, targets.label.ne(IGNORE)) + Loss.mean("box", wrong, targets.has_object)


def attribute_loss(logits: Tensor, targets: RegionTargets) -> Loss:
    """Loss of independent attributes, a mean over regions and attributes.

    Args:
        logits: (B * S, K).
    """
    losses = functional.binary_cross_entropy_with_logits(logits, targets.attributes, reduction="none")
    return Loss.mean("attribute", losses, targets.annotated[:, None].expand_as(losses))


def exclusive_attribute_loss(logits: Tensor, targets: RegionTargets) -> Loss:
    """Loss of attributes that share one softmax: cross-entropy with equal shares for the attributes of an object, a
    mean over the objects that have any.

    Args:
        logits: (B * S, K + 1), "no attribute" last, which nothing teaches.
    Source:
        MILVLG/bottom-up-attention.pytorch, bua/d2/modeling/roi_heads.py.
    """
    shares = targets.attributes / targets.attributes.sum(-1, keepdim=True).clamp(min=1)
    losses = -(shares * logits.log_softmax(-1)[:, :-1]).sum(-1)
    return Loss.mean("attribute", losses, targets.annotated & targets.attributes.any(-1))
