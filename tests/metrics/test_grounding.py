"""Accuracy of referring expressions against the three systems' formulas (`golden/metrics/refer.json`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.metrics.grounding import DESCRIPTIONS, Rule, fits, overlap, referring_hits

RECORDED: dict[Rule, tuple[str, str]] = {
    "mattnet": ("iou_mattnet", "acc_mattnet_ge"),
    "inclusive": ("iou_plus1", "acc_plus1_ge"),
    "strict": ("iou_plus1_vilbert_float32", "acc_plus1_gt"),
}
"""Rule -> recorded overlap and accuracy."""


@pytest.fixture
def recorded(golden: Path) -> Any:
    return json.loads((golden / "metrics" / "refer.json").read_text())


@pytest.mark.parametrize("rule", RECORDED)
def test_overlaps_and_accuracy_are_those_of_the_systems(recorded: Any, rule: Rule) -> None:
    named, accuracy = RECORDED[rule]
    items = recorded["items"]
    for item in items:
        assert abs(float(overlap(item["pred"], item["gt"], rule)) - item[named]) <= 1e-9, item
    hits = referring_hits([item["pred"] for item in items], [item["gt"] for item in items], rule)
    assert sum(hits) / len(hits) == pytest.approx(recorded["expected"][accuracy], abs=1e-9)


def test_the_rules_differ_at_one_half() -> None:
    """10 x 10 and 5 x 10 pixels: exactly one half by MAttNet, more by inclusive pixels."""
    whole, half = (0, 0, 10, 10), (0, 0, 5, 10)
    assert overlap(half, whole) == 0.5
    assert overlap(half, whole, "inclusive") == pytest.approx(66 / 121)
    assert fits(half, whole)
    pixels, most = (0, 0, 9, 9), (0, 0, 9, 4)  # 10 x 10 and 10 x 5 inclusive pixels
    assert overlap(most, pixels, "inclusive") == overlap(most, pixels, "strict") == 0.5
    assert fits(most, pixels, "inclusive")
    assert not fits(most, pixels, "strict")
    assert not fits(most, pixels)


def test_many_boxes_at_once() -> None:
    boxes = np.array([[0, 0, 10, 10], [100, 0, 10, 10], [0, 0, -5, 10]], float)
    for rule in RECORDED:
        assert overlap(boxes, boxes[0], rule).tolist() == [1, 0, 0], rule
        assert overlap(boxes, boxes[0], rule).shape == (3,)


def test_a_sentence_without_candidates_is_a_miss() -> None:
    assert referring_hits([None, (0, 0, 10, 10)], [(0, 0, 10, 10)] * 2) == [0, 1]


def test_every_rule_is_described() -> None:
    assert DESCRIPTIONS.keys() == RECORDED.keys()
