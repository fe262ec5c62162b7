"""Detection scores against cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from visling.metrics.detection import DetectedBoxes, TrueBoxes, average_precision, match, score


def test_average_precision_by_hand() -> None:
    """Right, wrong, right of 3 objects: precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3."""
    value = average_precision(np.array([0.5, 0.9, 0.7]), np.array([True, True, False]), 3)
    assert value == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3)


def test_precision_is_made_to_fall() -> None:
    """Wrong, right, right: the later precision 2/3 counts for both steps."""
    assert average_precision(np.array([0.9, 0.8, 0.7]), np.array([False, True, True]), 2) == pytest.approx(2 / 3)


def test_average_precision_at_the_ends() -> None:
    assert average_precision(np.zeros(0), np.zeros(0, bool), 2) == 0
    assert math.isnan(average_precision(np.array([0.5]), np.array([False]), 0))
    assert average_precision(np.array([0.3, 0.2]), np.array([True, True]), 2) == 1


def boxes(*corners: tuple[float, float, float, float]) -> np.ndarray:
    return np.array(corners, np.float32).reshape(-1, 4)


def test_an_object_is_found_once_and_by_the_surest() -> None:
    truth = boxes((0, 0, 10, 10), (20, 0, 30, 10))
    found = boxes((0, 0, 10, 9), (0, 0, 10, 10), (20, 0, 30, 4.9), (20, 0, 30, 5))
    assert match(found, np.array([0.6, 0.9, 0.8, 0.1]), truth).tolist() == [
        -1,
        0,
        -1,
        1,
    ]  # IoU 0.5 is enough, 0.49 is not


def test_the_free_object_of_largest_overlap_is_taken() -> None:
    truth = boxes((0, 0, 10, 10), (0, 2, 10, 12))
    assert match(boxes((0, 1.9, 10, 12), (0, 1.9, 10, 12)), np.array([0.9, 0.8]), truth).tolist() == [1, 0]


def test_crowds_neither_count_nor_cost() -> None:
    truth, ignored = boxes((0, 0, 10, 10), (20, 0, 30, 10)), np.array([False, True])
    found = boxes((20, 0, 30, 10), (20, 1, 30, 10), (50, 0, 60, 10))
    assert match(found, np.array([0.9, 0.8, 0.7]), truth, ignored=ignored).tolist() == [-2, -2, -1]
    scores = score(
        [DetectedBoxes(boxes=found, classes=np.zeros(3, int), scores=np.array([0.9, 0.8, 0.7]))],
        [TrueBoxes(boxes=truth, classes=np.zeros(2, int), ignored=ignored)],
    )
    assert scores.objects == 1
    assert scores.recall == 0
    right = score(
        [
            DetectedBoxes(
                boxes=boxes((20, 0, 30, 10), (0, 0, 10, 10)), classes=np.zeros(2, int), scores=np.array([0.9, 0.8])
            )
        ],
        [TrueBoxes(boxes=truth, classes=np.zeros(2, int), ignored=ignored)],
    )
    assert right.mean_ap == 1


def test_mean_over_classes_that_occur() -> None:
    """Class 0: one of two found first; class 1: found after a false alarm in another image; class 7 never occurs."""
    a, b, c = (0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)
    truths = [TrueBoxes(boxes=boxes(a, b), classes=np.array([0, 0])), TrueBoxes(boxes=boxes(c), classes=np.array([1]))]
    found = [
        DetectedBoxes(boxes=boxes(a, b, c), classes=np.array([0, 7, 1]), scores=np.array([0.9, 0.8, 0.95])),
        DetectedBoxes(boxes=boxes(c), classes=np.array([1]), scores=np.array([0.5])),
    ]
    scores = score(found, truths)
    assert scores.ap == {0: pytest.approx(0.5), 1: pytest.approx(0.5)}
    assert scores.mean_ap == pytest.approx(0.5)
    assert scores.recall == pytest.approx(2 / 3)
    assert scores.recall_any_class == 1
    assert (scores.objects, scores.detections) == (3, 4)
    assert scores.attribute_accuracy is None
    assert scores.attribute_mean_ap is None


def test_attributes_by_hand() -> None:
    """Of two objects found one has exactly its attributes; a third is missed and does not enter the accuracy, but the
    average precision."""
    a, b, c = (0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)
    truth = TrueBoxes(
        boxes=boxes(a, b, c), classes=np.zeros(3, int), attributes=np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0]], bool)
    )
    found = DetectedBoxes(
        boxes=boxes(a, b),
        classes=np.zeros(2, int),
        scores=np.array([0.9, 0.8]),
        attributes=np.array([[1, 0], [1, -1]]),
        attribute_scores=np.array([[0.7, 0.6], [0.9, 0.0]]),
    )
    scores = score([found], [truth])
    assert scores.attribute_accuracy == pytest.approx(0.5)
    # attribute 0: one right detection of three objects, 1/3; attribute 1: a false alarm (0.9) before the right one
    # (0.7), 1/2; 2 never occurs
    assert scores.attribute_mean_ap == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_wrong_class_keeps_attributes_out_of_the_accuracy() -> None:
    box = boxes((0, 0, 10, 10))
    truth = TrueBoxes(boxes=box, classes=np.array([0]), attributes=np.array([[True]]))
    found = DetectedBoxes(
        boxes=box,
        classes=np.array([1]),
        scores=np.array([0.9]),
        attributes=np.array([[0]]),
        attribute_scores=np.array([[0.9]]),
    )
    assert score([found], [truth]).attribute_accuracy is None


def test_no_image_and_no_object() -> None:
    assert math.isnan(score([], []).mean_ap)
    nothing = DetectedBoxes(boxes=boxes(), classes=np.zeros(0, int), scores=np.zeros(0))
    scores = score([nothing], [TrueBoxes(boxes=boxes((0, 0, 5, 5)), classes=np.array([2]))])
    assert scores.mean_ap == 0
    assert scores.recall == 0
