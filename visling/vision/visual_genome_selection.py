"""Which proposals become regions: the selection of the PyTorch ports, and that of the original extraction.

Shapes   R proposals of one image, best first, C classes without the background, K regions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visling import boxes as box_ops
from visling.vision import ops


def select_across_classes(boxes: Tensor, scores: Tensor, thresholds: Sequence[float], least: int, most: int) -> Tensor:
    """Proposals that survive suppression by all others, whatever their class, best first.

    Thresholds are tried in turn until at least `least` survive, of which the best `most` are kept. If none leaves
    enough, the last one's survivors are taken; the port stops with an error there, or returns the previous image's
    regions.

    Args:
        boxes: (R, 4).
        scores: (R,) probability of the best class.
    Returns:
        (K,) int64.
    Source:
        transformers research projects, visual_bert/modeling_frcnn.py, do_nms; airsplay/py-bottom-up-attention,
        demo/detectron2_mscoco_proposal_maxnms.py.
    """
    kept = scores.new_zeros(0, dtype=torch.int64)
    for threshold in thresholds:
        kept = ops.nms(boxes, scores, threshold)[:most]
        if len(kept) >= least:
            break
    return kept


def select_by_class(
    boxes: Tensor, probs: Tensor, *, threshold: float, min_confidence: float, least: int, most: int
) -> Tensor:
    """Proposals that survive the suppression of at least one class with enough confidence.

    A proposal's confidence is its largest probability among the classes in which it survived. If at least `least` and
    at most `most` reach `min_confidence`, they keep the order of the proposals; else the `least` or `most` most
    confident ones are taken, best first.

    Args:
        boxes: (R, 4) pixel corners of the original image; both end pixels belong to a box.
        probs: (R, C).
    Returns:
        (K,) int64.
    Source:
        peteanderson80/bottom-up-attention, tools/generate_tsv.py.
    """
    over = box_ops.iou(boxes, boxes, inclusive=True) > threshold
    # Classes whose probabilities are all below those of enough regions rarely decide anything: they are left out first.
    likely = probs.amax(1).sort(descending=True).values[: 2 * least]
    floor = min(min_confidence, float(likely[-1])) if len(likely) else min_confidence
    confidence = _survive_by_class(over, probs, floor)
    if int((confidence > 0).sum()) < least:
        confidence = _survive_by_class(over, probs, 0.0)
    sure = (confidence >= min_confidence).nonzero()[:, 0]
    if least <= len(sure) <= most:
        return sure
    return confidence.argsort(descending=True, stable=True)[: least if len(sure) < least else most]


def _survive_by_class(over: Tensor, probs: Tensor, floor: float) -> Tensor:
    """(R,) largest probability with which each proposal survives in any class; 0 where it is below the floor.

    Args:
        over: (R, R) bool: pairs of which one must go.
        probs: (R, C).
    """
    scores = probs.T[(probs >= floor).any(0)]
    confidence = probs.new_zeros(len(probs))
    if len(scores):
        confidence = torch.where(ops.suppress_by_score(over, scores), scores, 0.0).amax(0)
    return torch.where(confidence >= floor, confidence, 0.0)
