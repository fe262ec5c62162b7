"""Phrase localisation against recorded results of the four conventions for several boxes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.metrics.phrases import RANKS, MatchRule, first_rank, phrase_scores, right_boxes

RULES = {
    "any_box": MatchRule(),
    "union_box": MatchRule(target="union_box"),
    "union_box_plus1": MatchRule(target="union_box", inclusive=True),
    "first_box_plus1": MatchRule(target="first_box", inclusive=True),
}


@pytest.fixture(scope="module")
def recorded(golden: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((golden / "metrics" / "flickr30k_entities.json").read_text(encoding="utf-8"))
    content["phrases"] = [phrase for phrase in content["phrases"] if phrase["gt_boxes_xyxy"]]
    return content


def right(phrase: dict[str, Any], rule: MatchRule) -> np.ndarray:
    return right_boxes(phrase["proposals_xyxy"], phrase["gt_boxes_xyxy"], rule)


def test_matching_proposals(recorded: dict[str, Any]) -> None:
    for phrase in recorded["phrases"]:
        for name, rule in (("match_any", RULES["any_box"]), ("match_union", RULES["union_box"])):
            assert np.flatnonzero(right(phrase, rule)).tolist() == phrase[name], phrase["phrase_id"]


@pytest.mark.parametrize("name", RULES)
def test_recall_and_upper_bound(recorded: dict[str, Any], name: str) -> None:
    assert set(recorded["expected"]) == set(RULES)
    ranks, reachable = [], []
    for phrase in recorded["phrases"]:
        matching = right(phrase, RULES[name])
        ranks.append(first_rank(matching[np.argsort(-np.array(phrase["scores"]), kind="stable")]))
        reachable.append(bool(matching.any()))
    found, wanted = phrase_scores(ranks, reachable), recorded["expected"][name]
    assert found.phrases == wanted["phrases"]
    assert found.upper_bound == pytest.approx(wanted["upper_bound"], abs=1e-9)
    for most in RANKS:
        assert found.recall[most] == pytest.approx(wanted[f"recall_at_{most}"], abs=1e-9)
        assert round(found.recall[most] * found.phrases) == wanted[f"hits_at_{most}"]


def test_pairs_of_boxes(golden: Path) -> None:
    pairs = json.loads((golden / "visualbert_tasks" / "flickr" / "expected.json").read_text(encoding="utf-8"))["iou"]
    assert {pair["match"] for pair in pairs} == {True, False}
    for pair in pairs:
        assert right_boxes([pair["a"]], [pair["b"]]).tolist() == [pair["match"]], pair


def test_an_overlap_of_exactly_one_half() -> None:
    box, half = [0, 0, 10, 10], [0, 0, 10, 5]
    assert right_boxes([half], [box]).tolist() == [True]
    assert right_boxes([half], [box], replace(RULES["any_box"], strict=True)).tolist() == [False]
    # Both end pixels counted: 66 of 121.
    assert right_boxes([half], [box], MatchRule(inclusive=True, strict=True)).tolist() == [True]
    assert str(MatchRule()) == "any_box, IoU >= 0.5"
    assert str(MatchRule(target="first_box", inclusive=True, strict=True)) == "first_box, IoU with +1 > 0.5"


def test_nothing_to_choose_from() -> None:
    assert right_boxes(np.zeros((0, 4)), [[1, 1, 2, 2]]).shape == (0,)
    assert first_rank(np.array([], bool)) is None
    scores = phrase_scores([None, 2], [False, True])
    assert scores.recall == {1: 0.0, 5: 0.5, 10: 0.5}
    assert scores.upper_bound == 0.5
