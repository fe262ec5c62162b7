"""Scores of detected boxes: mean average precision, recall, attributes.

Source   Everingham et al. 2010 (PASCAL VOC), all-point interpolation as since 2010; crowds as in COCO: they need not be
         found, and detections on them are not counted.
Shapes   D detections and N objects of one image; boxes are pixel corners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from visling import boxes as box_ops


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectedBoxes:
    """What a detector found in one image."""

    boxes: NDArray[np.floating]
    """(D, 4)."""
    classes: NDArray[np.integer]
    """(D,)."""
    scores: NDArray[np.floating]
    """(D,) confidence of the class."""
    attributes: NDArray[np.integer] | None = None
    """(D, K) attribute numbers, -1 = none."""
    attribute_scores: NDArray[np.floating] | None = None
    """(D, K)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrueBoxes:
    """What is in one image."""

    boxes: NDArray[np.floating]
    """(N, 4)."""
    classes: NDArray[np.integer]
    """(N,)."""
    ignored: NDArray[np.bool_] | None = None
    """(N,) crowds: need not be found, and detections on them are not counted."""
    attributes: NDArray[np.bool_] | None = None
    """(N, attributes): which of them each object has."""


@dataclass(frozen=True, kw_only=True)
class DetectionScores:
    """Scores over a set of images."""

    mean_ap: float
    """Mean over the classes that occur of the average precision; NaN without any object."""
    ap: dict[int, float]
    """Average precision of each class that occurs."""
    objects_by_class: dict[int, int]
    """Objects counted of each class that occurs."""
    recall: float
    """Share of objects found with the right class."""
    recall_any_class: float
    """Share of objects found, whatever the class."""
    attribute_accuracy: float | None
    """Of the objects found with the right class, share whose set of attributes is exactly right; None without
    attributes."""
    attribute_mean_ap: float | None
    """Mean over attributes of the average precision of boxes carrying the attribute; None without attributes."""
    objects: int
    """Objects counted."""
    detections: int
    """Detections given."""


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Detections of all classes in order of their confidence, and what those down to each of them are worth."""

    confidence: NDArray[np.float64]
    """(D,), falling."""
    precision: NDArray[np.float64]
    """(D,) share of the detections so far that are right in place and class."""
    recall: NDArray[np.float64]
    """(D,) share of the objects that they have found."""

    @property
    def best(self) -> int | None:
        """Place of the highest F1, the harmonic mean of precision and recall; None without a right detection."""
        if not len(self.recall) or self.recall[-1] == 0:
            return None
        return int(np.argmax(2 * self.precision * self.recall / np.maximum(self.precision + self.recall, 1e-12)))


def match(
    boxes: NDArray[np.floating],
    scores: NDArray[np.floating],
    truth: NDArray[np.floating],
    *,
    ignored: NDArray[np.bool_] | None = None,
    threshold: float = 0.5,
) -> NDArray[np.int64]:
    """Object of each detection (D,): the number of the object, -1 = a false positive, -2 = on an ignored object.

    Detections choose in order of their score; each takes the free object of largest IoU, at least `threshold`. A
    detection without one that overlaps an ignored object by at least `threshold` is not counted.
    """
    result = np.full(len(boxes), -1, np.int64)
    if not len(truth) or not len(boxes):
        return result
    overlap = box_ops.iou(
        torch.from_numpy(np.asarray(boxes, np.float64)), torch.from_numpy(np.asarray(truth, np.float64))
    ).numpy()
    free = np.ones(len(truth), np.bool_) if ignored is None else ~ignored
    for detection in np.argsort(-np.asarray(scores), kind="stable"):
        allowed = np.where(free, overlap[detection], -1.0)
        best = int(allowed.argmax())
        if allowed[best] >= threshold:
            result[detection] = best
            free[best] = False
        elif ignored is not None and (overlap[detection][ignored] >= threshold).any():
            result[detection] = -2
    return result


def average_precision(scores: NDArray[np.floating], correct: NDArray[np.bool_], objects: int) -> float:
    """Area under the precision-recall curve, precision made non-increasing from the right; NaN when there is nothing to
    find."""
    if objects == 0:
        return float("nan")
    order = np.argsort(-np.asarray(scores), kind="stable")
    hits = np.asarray(correct, np.bool_)[order].cumsum()
    precision = hits / np.arange(1, len(hits) + 1)
    recall = np.concatenate([[0.0], hits / objects])
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall) * highest).sum())


def score(
    detections: Sequence[DetectedBoxes], truths: Sequence[TrueBoxes], *, threshold: float = 0.5
) -> DetectionScores:
    """All scores at one IoU threshold; both sequences hold the same images in the same order."""
    ap: dict[int, float] = {}
    count: dict[int, int] = {}
    found = 0
    for number in sorted({int(c) for truth in truths for c in truth.classes[_mask_counted(truth)]}):
        ap[number], hits, count[number] = _average_precision_of(_select_class(detections, truths, number), threshold)
        found += hits
    objects = sum(count.values())
    _, anywhere, _ = _average_precision_of(list(zip(detections, truths, strict=True)), threshold)
    accuracy, attribute_ap = _score_attributes(detections, truths, threshold)
    return DetectionScores(
        mean_ap=float(np.mean(list(ap.values()))) if ap else float("nan"),
        ap=ap,
        objects_by_class=count,
        recall=found / objects if objects else float("nan"),
        recall_any_class=anywhere / objects if objects else float("nan"),
        attribute_accuracy=accuracy,
        attribute_mean_ap=attribute_ap,
        objects=objects,
        detections=sum(len(d.classes) for d in detections),
    )


def precision_recall(
    detections: Sequence[DetectedBoxes], truths: Sequence[TrueBoxes], *, threshold: float = 0.5
) -> PrecisionRecall:
    """The curve of the detections of all classes together: each is right if it finds an object of its class."""
    classes = [one.classes for one in detections] + [one.classes for one in truths]
    matched = [
        _match_all(_select_class(detections, truths, number), threshold)
        for number in sorted({int(number) for own in classes for number in own})
    ]
    scores = np.concatenate([one[0] for one in matched]) if matched else np.zeros(0)
    correct = np.concatenate([one[1] for one in matched]) if matched else np.zeros(0, np.bool_)
    order = np.argsort(-scores, kind="stable")
    hits = correct[order].cumsum()
    return PrecisionRecall(
        confidence=scores[order].astype(np.float64),
        precision=hits / np.arange(1, len(hits) + 1),
        recall=hits / max(sum(one[2] for one in matched), 1),
    )


def _average_precision_of(pairs: Sequence[tuple[DetectedBoxes, TrueBoxes]], threshold: float) -> tuple[float, int, int]:
    """Average precision, objects found and objects, all regardless of class."""
    scores, correct, objects = _match_all(pairs, threshold)
    return average_precision(scores, correct, objects), int(correct.sum()), objects


def _match_all(
    pairs: Sequence[tuple[DetectedBoxes, TrueBoxes]], threshold: float
) -> tuple[NDArray[np.floating], NDArray[np.bool_], int]:
    """Score of each detection that counts, whether it is right, and the number of objects, all regardless of class."""
    scores, correct, objects = [], [], 0
    for detected, truth in pairs:
        objects += int(_mask_counted(truth).sum())
        matched = match(detected.boxes, detected.scores, truth.boxes, ignored=truth.ignored, threshold=threshold)
        scores.append(detected.scores[matched != -2])
        correct.append(matched[matched != -2] >= 0)
    if not pairs:
        return np.zeros(0), np.zeros(0, np.bool_), 0
    return np.concatenate(scores), np.concatenate(correct), objects


def _score_attributes(
    detections: Sequence[DetectedBoxes], truths: Sequence[TrueBoxes], threshold: float
) -> tuple[float | None, float | None]:
    """Share of attribute sets that are exactly right, and mean average precision over attributes."""
    right = compared = 0
    pairs = [
        (d, t) for d, t in zip(detections, truths, strict=True) if t.attributes is not None and d.attributes is not None
    ]
    for detected, truth in pairs:
        for number in np.unique(truth.classes):
            named, objects = np.flatnonzero(detected.classes == number), np.flatnonzero(truth.classes == number)
            ignored = None if truth.ignored is None else truth.ignored[objects]
            matched = match(
                detected.boxes[named],
                detected.scores[named],
                truth.boxes[objects],
                ignored=ignored,
                threshold=threshold,
            )
            for detection, own in zip(named, matched, strict=True):
                if own >= 0 and detected.attributes is not None and truth.attributes is not None:
                    compared += 1
                    right += set(detected.attributes[detection][detected.attributes[detection] >= 0]) == set(
                        np.flatnonzero(truth.attributes[objects[own]])
                    )
    each = []
    for attribute in range(pairs[0][1].attributes.shape[1] if pairs and pairs[0][1].attributes is not None else 0):
        ap, _, objects_with = _average_precision_of(
            [(_select_attribute(d, attribute), _select_true(t, _mask_attribute(t, attribute))) for d, t in pairs],
            threshold,
        )
        if objects_with:
            each.append(ap)
    return (right / compared if compared else None), (float(np.mean(each)) if each else None)


def _mask_counted(truth: TrueBoxes) -> NDArray[np.bool_]:
    return np.ones(len(truth.classes), np.bool_) if truth.ignored is None else ~truth.ignored


def _select_class(
    detections: Sequence[DetectedBoxes], truths: Sequence[TrueBoxes], number: int
) -> list[tuple[DetectedBoxes, TrueBoxes]]:
    """Detections and objects of one class, image by image."""
    return [
        (_select_detected(d, d.classes == number), _select_true(t, t.classes == number))
        for d, t in zip(detections, truths, strict=True)
    ]


def _select_detected(detected: DetectedBoxes, chosen: NDArray[np.bool_]) -> DetectedBoxes:
    return DetectedBoxes(boxes=detected.boxes[chosen], classes=detected.classes[chosen], scores=detected.scores[chosen])


def _select_true(truth: TrueBoxes, chosen: NDArray[np.bool_]) -> TrueBoxes:
    ignored = None if truth.ignored is None else truth.ignored[chosen]
    return TrueBoxes(boxes=truth.boxes[chosen], classes=truth.classes[chosen], ignored=ignored)


def _mask_attribute(truth: TrueBoxes, attribute: int) -> NDArray[np.bool_]:
    assert truth.attributes is not None
    chosen: NDArray[np.bool_] = truth.attributes[:, attribute].astype(np.bool_)
    return chosen if truth.ignored is None else chosen | truth.ignored


def _select_attribute(detected: DetectedBoxes, attribute: int) -> DetectedBoxes:
    """Detections that carry the attribute, scored by its confidence."""
    assert detected.attributes is not None
    holds = detected.attributes == attribute
    chosen = holds.any(1)
    values = detected.attribute_scores if detected.attribute_scores is not None else np.ones(holds.shape)
    scores = np.where(holds, values, 0.0).max(1, initial=0.0)[chosen]
    return DetectedBoxes(boxes=detected.boxes[chosen], classes=detected.classes[chosen], scores=scores)
