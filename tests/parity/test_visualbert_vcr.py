"""Questions of VCR and the rows that VisualBERT's own code makes of them (`golden/vcr_io`; its expected.json says how):
pieces, labels, links.

Everything is equal, the release's mistakes included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling import models
from visling.data.annotations.vcr import NUM_CHOICES, VcrData, read_vcr
from visling.data.corpora.vcr import VcrChoices
from visling.data.text import TextLayout, Tokenizer
from visling.tasks.vcr import VCR, VcrConfig
from visling.types import Example, InputSpec

TOKENIZER = Tokenizer()


@pytest.fixture(scope="module")
def data(golden: Path) -> VcrData:
    return read_vcr(golden / "vcr_io" / "train.jsonl", golden)


@pytest.fixture(scope="module", params=["128", "56"])
def recorded(request: pytest.FixtureRequest, golden: Path) -> tuple[int, list[dict[str, Any]]]:
    """Longest row, and each question's eight choices."""
    expected = json.loads((golden / "vcr_io" / "expected.json").read_text(encoding="utf-8"))
    return int(request.param), expected[request.param]


def examples(data: VcrData, most: int, **settings: bool) -> list[Example]:
    source = VcrChoices(
        data.records,
        TextLayout(TOKENIZER, InputSpec(max_tokens=most)),
        objects_from={"0@0": 0, "1@0": 0, "2@0": 0},
        **settings,
    )
    return [source.example(index, np.random.default_rng(0)) for index in range(len(source))]


def told(example: Example) -> dict[str, Any]:
    """An example as it was recorded."""
    (row,) = example.rows
    first, second = " ".join(TOKENIZER.tokens(row.ids)).removeprefix("[CLS] ").removesuffix(" [SEP]").split(" [SEP] ")
    assert row.segments.tolist() == [0] * (len(first.split()) + 2) + [1] * (len(second.split()) + 1)
    return {
        "id": example.id,
        "matched": example.labels["matched"],
        "first": first,
        "second": second,
        "links": sorted(map(list, row.links)),
    }


def test_rows_labels_and_links_are_those_of_the_release(
    data: VcrData, recorded: tuple[int, list[dict[str, Any]]]
) -> None:
    most, expected = recorded
    found = [told(example) for example in examples(data, most, word_links=True)]
    assert len(found) == 24
    for here, there in zip(found, expected, strict=True):
        assert here == there


FIRST_PIECES = {
    "person": {
        "casey",
        "riley",
        "jessie",
        "jackie",
        "avery",
        "jaime",
        "peyton",
        "kerry",
        "jody",
        "kendall",
        "sky",
        "frankie",
        "pat",
        "quinn",
    },
    "dog": {"dog"},
    "car": {"car"},
    "pottedplant": {"pot"},
    "tvmonitor": {"tv", "##mon"},  # where a choice begins that has lost its front
}
"""Class -> pieces at which a link to an object of it may stand."""


def test_links_to_pieces_stand_at_the_names(data: VcrData, recorded: tuple[int, list[dict[str, Any]]]) -> None:
    """As many links as the release has, but each at the first piece of its name, where the release's have drifted to
    the left."""
    most, expected = recorded
    objects = {record.images: record.objects for record in data.records}
    drifted = 0
    for example, there in zip(examples(data, most), expected, strict=True):
        (row,) = example.rows
        pieces = TOKENIZER.tokens(row.ids)
        assert [region for _, region in row.links] == [region for _, region in there["links"]]
        for (at, region), (recorded_at, _) in zip(row.links, there["links"], strict=True):
            assert pieces[at] in FIRST_PIECES[objects[example.images][region]]
            drifted += at != recorded_at
    assert drifted > 20


@pytest.mark.parametrize("phase", ["answer", "rationale"])
def test_the_task_lays_out_the_rows_of_the_corpus(
    data: VcrData, recorded: tuple[int, list[dict[str, Any]]], phase: Any
) -> None:
    """Fine-tuning reads what pre-training reads: ids, segments and links of each choice, here four rows at a time."""
    most, _ = recorded
    shown = examples(data, most)
    task = VCR(VcrConfig(**models.spec("visualbert").tasks["vcr"], phase=phase))
    layout = TextLayout(TOKENIZER, InputSpec(max_tokens=most))
    start = 0 if phase == "answer" else NUM_CHOICES
    for number, record in enumerate(data.records):
        example = task.example(record, layout, np.random.default_rng(0))
        first = 2 * NUM_CHOICES * number + start
        there = shown[first : first + NUM_CHOICES]
        assert [one.labels["matched"] for one in there].index(1) == example.labels["choice"]
        for row, one in zip(example.rows, there, strict=True):
            (expected,) = one.rows
            assert expected.words is not None
            assert row.words is not None
            for ours, theirs in (
                (row.ids, expected.ids),
                (row.segments, expected.segments),
                (row.words, expected.words),
            ):
                assert ours.tolist() == theirs.tolist()
            assert sorted(row.links) == sorted(expected.links)
