"""VCR's accuracies: those that the official script prints for recorded scores, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.errors import DataError
from visling.metrics.vcr import VcrScores, read_submission, submission_scores, vcr_scores, write_submission


@pytest.fixture(scope="module")
def recorded(golden: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((golden / "metrics" / "vcr.json").read_text(encoding="utf-8"))
    return found


def labels_of(recorded: dict[str, Any]) -> list[tuple[int, int]]:
    return list(zip(recorded["answer_labels"], recorded["rationale_labels"], strict=True))


def compare(scores: VcrScores, recorded: dict[str, Any]) -> None:
    found = {"q_a": scores.answer.value, "qa_r": scores.rationale.value, "q_ar": scores.joint.value}
    assert found == pytest.approx(recorded["expected"], abs=1e-9)
    assert scores.joint.count == len(recorded["annot_ids"])


def submission_of(recorded: dict[str, Any]) -> str:
    given = zip(recorded["answer_probs"], recorded["rationale_probs_conditioned_on_each_answer"], strict=True)
    return write_submission(dict(zip(recorded["annot_ids"], given, strict=True)))


def test_accuracies_equal_the_official_script(recorded: dict[str, Any]) -> None:
    rationales = recorded["rationale_probs_given_true_answer"]
    compare(vcr_scores(recorded["answer_probs"], rationales, labels_of(recorded)), recorded)


def test_accuracies_of_the_submission_file_are_the_same(recorded: dict[str, Any]) -> None:
    text = submission_of(recorded)
    assert len(text.splitlines()) == 1 + len(recorded["annot_ids"])
    assert {len(line.split(",")) for line in text.splitlines()} == {1 + 4 + 16}
    assert text.startswith("annot_id,answer_0,answer_1,answer_2,answer_3,rationale_conditioned_on_a0_0,")
    labels = dict(zip(recorded["annot_ids"], labels_of(recorded), strict=True))
    compare(submission_scores(text, labels), recorded)


def test_the_first_of_equal_scores_is_chosen() -> None:
    scores = vcr_scores([[1, 1, 0, 0]] * 2, [[0, 2, 2, 0]] * 2, [(0, 1), (1, 2)])
    assert (scores.answer.value, scores.rationale.value, scores.joint.value) == (0.5, 0.5, 0.5)


def test_both_must_be_right_for_the_same_question() -> None:
    scores = vcr_scores(np.eye(4)[[0, 1]], np.eye(4)[[3, 2]], [(0, 0), (0, 2)])
    assert (scores.answer.value, scores.rationale.value, scores.joint.value) == (0.5, 0.5, 0.0)


def test_what_is_refused(recorded: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="scores of 1 answers and of 1 rationales for 2 labels"):
        vcr_scores([[1, 0, 0, 0]], [[1, 0, 0, 0]], [(0, 0), (0, 0)])
    header, first, *rest = submission_of(recorded).splitlines()
    with pytest.raises(DataError, match="lacks the columns rationale_conditioned_on_a3_3: expected a CSV file"):
        read_submission(header.rpartition(",")[0] + "\n" + first)
    with pytest.raises(DataError, match="not all numbers"):
        read_submission(f"{header}\n{first.rpartition(',')[0]},high\n")
    with pytest.raises(DataError, match=f"has '{recorded['annot_ids'][0]}' twice"):
        read_submission("\n".join([header, first, first]))
    labels = dict(zip(recorded["annot_ids"], labels_of(recorded), strict=True))
    with pytest.raises(DataError, match=f"1 are in one of the two only, first '{recorded['annot_ids'][0]}'"):
        submission_scores("\n".join([header, *rest]), labels)
