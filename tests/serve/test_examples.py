"""Annotations as a person would type them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from visling.data.annotations.captions import CaptionRecord
from visling.data.annotations.classification import LabelledText
from visling.data.annotations.entities import EntitiesRecord, Phrase
from visling.data.annotations.statements import Nlvr2Record
from visling.data.annotations.vcr import VcrRecord
from visling.serve.examples import describe_record
from visling.types import Record

VCR = VcrRecord(
    id="1",
    images=("1",),
    objects=("star", "ring", "ring", "star", "moon"),
    question=("how", "does", (4,), "look", "?"),
    answer_choices=(("it", "is", "red", "."), ("it", "is", "blue", ".")),
    rationale_choices=(("it", "is", "left", "of", (1, 2), "."), ("it", "is", "above", (0, 3), ".")),
    answer_label=1,
    rationale_label=0,
    movie="scenes",
    question_number=0,
    metadata=None,
)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (VCR, ("how does the moon look?", ("it is red.", "it is blue."), "it is blue.")),
        (replace(VCR, answer_label=None), ("how does the moon look?", ("it is red.", "it is blue."), None)),
        (replace(VCR, question=("how", "does", (0,), "look", "?")), None),  # which of two stars?
        (replace(VCR, question=("how", "do", (0, 4), "look", "?")), None),
        (replace(VCR, answer_choices=()), None),
        (Nlvr2Record(id="1", images=("1", "2"), sentence="both are red", label=False), ("both are red", (), "false")),
        (CaptionRecord(id="1", images=("1",), caption="a star"), ("a star", (), None)),
        (
            LabelledText(id="1", images=("1",), text="a star", second=None, labels=("yes",), several=False),
            ("a star", (), "yes"),
        ),
        (LabelledText(id="1", images=("1",), text="a", second="b", labels=("yes",), several=False), None),
        (
            EntitiesRecord(
                id="1",
                images=("1",),
                sentence="a star near a red ring .",
                phrases=(
                    Phrase(text="a red ring", chain="2", types=("other",), start=12, stop=22),
                    Phrase(text="a star", chain="1", types=("other",), start=0, stop=6),
                ),
            ),
            ("[a star] near [a red ring] .", (), None),
        ),
        (Record(id="1", images=("1",)), None),
    ],
)
def test_an_annotation_is_typed(record: Record, expected: object) -> None:
    assert describe_record(record) == expected


def test_a_reason_is_typed() -> None:
    asked = "how does the moon look? it is blue."
    choices = ("it is left of the rings.", "it is above the stars.")
    assert describe_record(VCR, rationale=True) == (asked, choices, choices[0])
    assert describe_record(replace(VCR, answer_label=None), rationale=True) is None
