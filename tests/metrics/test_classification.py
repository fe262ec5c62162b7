"""Scores of labels against their plain definitions, by counting and by comparing all pairs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from visling.metrics.classification import auroc, average_precision, label_scores, mid_ranks


def draw(seed: int, *, one_label: bool) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    if not one_label:
        return rng.random((40, 5)) < 0.3, rng.random((40, 5)) < 0.4
    return tuple(np.eye(5, dtype=bool)[rng.integers(0, 5, 40)] for _ in range(2))


@pytest.mark.parametrize("one_label", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_precision_recall_and_f1_by_counting(seed: int, one_label: bool) -> None:
    truth, given = draw(seed, one_label=one_label)
    found = label_scores(truth, given)
    f1s, weights, sums = [], [], [0, 0, 0]
    for label in range(truth.shape[1]):
        right = wrong = missed = 0
        for has, gets in zip(truth[:, label], given[:, label], strict=True):
            right += bool(has and gets)
            wrong += bool(gets and not has)
            missed += bool(has and not gets)
        precision, recall = right / (right + wrong), right / (right + missed)
        assert found.precision[label] == pytest.approx(precision)
        assert found.recall[label] == pytest.approx(recall)
        f1s.append(2 * precision * recall / (precision + recall) if right else 0.0)
        weights.append(right + missed)
        sums = [total + one for total, one in zip(sums, (right, wrong, missed), strict=True)]
    assert found.f1.tolist() == pytest.approx(f1s)
    assert found.true.tolist() == weights
    assert found.macro_f1 == pytest.approx(sum(f1s) / len(f1s))
    assert found.weighted_f1 == pytest.approx(np.average(f1s, weights=weights))
    precision, recall = sums[0] / (sums[0] + sums[1]), sums[0] / (sums[0] + sums[2])
    assert found.micro_f1 == pytest.approx(2 * precision * recall / (precision + recall))
    if one_label:
        assert found.micro_f1 == pytest.approx((truth & given).sum() / len(truth)), "accuracy"


def test_a_label_that_never_occurs_does_not_lower_the_mean() -> None:
    truth = np.array([[True, False, False], [False, True, False]])
    found = label_scores(truth, truth)
    assert found.occurring.tolist() == [True, True, False]
    assert found.macro_f1 == found.weighted_f1 == found.micro_f1 == 1
    missed = label_scores(truth, np.array([[True, False, False], [True, False, False]]))
    assert missed.f1.tolist() == pytest.approx([2 / 3, 0, 0])
    assert missed.macro_f1 == pytest.approx(1 / 3)


def test_nothing_at_all_scores_zero() -> None:
    nothing = np.zeros((3, 2), bool)
    found = label_scores(nothing, nothing)
    assert (found.macro_f1, found.micro_f1, found.weighted_f1) == (0, 0, 0)


@pytest.mark.parametrize("steps", [1000, 4])
def test_the_area_is_the_share_of_pairs_in_order(steps: int) -> None:
    """Few steps: many ties."""
    rng = np.random.default_rng(steps)
    truth, scores = rng.random(50) < 0.4, rng.integers(0, steps, 50) / steps
    pairs = list(itertools.product(scores[truth], scores[~truth]))
    expected = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert auroc(truth, scores) == pytest.approx(expected)
    assert auroc(~truth, -scores) == pytest.approx(expected)
    assert auroc(truth, np.full(50, 0.3)) == 0.5


def test_the_area_needs_both_kinds() -> None:
    scores = np.array([0.1, 0.2])
    assert auroc(np.array([True, True]), scores) is None
    assert auroc(np.array([False, False]), scores) is None


def test_equal_values_share_their_mean_rank() -> None:
    assert mid_ranks(np.array([0.5, 0.1, 0.5, 0.9])).tolist() == [2.5, 1.0, 2.5, 4.0]


@pytest.mark.parametrize("steps", [1000, 4])
def test_average_precision_by_its_thresholds(steps: int) -> None:
    rng = np.random.default_rng(steps)
    truth, scores = rng.random(50) < 0.4, rng.integers(0, steps, 50) / steps
    expected, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        given = scores >= threshold
        precision, recall = (truth & given).sum() / given.sum(), (truth & given).sum() / truth.sum()
        expected += (recall - recall_before) * precision
        recall_before = recall
    assert average_precision(truth, scores) == pytest.approx(expected)
    assert average_precision(truth, truth.astype(float)) == 1
    assert average_precision(np.zeros(3, bool), np.zeros(3)) is None
