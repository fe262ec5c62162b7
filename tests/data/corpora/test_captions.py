"""Captions as a model is shown them, and how often."""

from __future__ import annotations

import pytest
from fixtures.corpus_draws import CAPTIONS, LAYOUT, count_draws, expect_shares, sentences_of

from visling.data.annotations.captions import CaptionRecord
from visling.data.corpora.captions import CaptionPairs, SingleCaption, VilbertCaptions
from visling.errors import ConfigError, DataError
from visling.runtime import generator_for
from visling.types import IGNORE


def test_caption_pairs() -> None:
    source = CaptionPairs(CAPTIONS, LAYOUT)
    assert len(source) == 12
    for draw in range(40):
        example = source.example(4, generator_for(0, draw))
        first, second = sentences_of(example)
        assert first == "square two"
        assert example.images == ("image_1",)
        assert example.rows[0].segments.max() == 1
        assert example.labels == {"matched": int(second.startswith("square"))}


def test_half_of_the_second_captions_are_of_another_image() -> None:
    said, labels = count_draws(lambda layout: CaptionPairs(CAPTIONS, layout), 4)
    others = {("square two", record.caption): 0.5 / 9 for record in CAPTIONS if record.images != ("image_1",)}
    expect_shares(said, {("square two", "square one"): 0.25, ("square two", "square three"): 0.25, **others})
    expect_shares(labels, {(1,): 0.5, (0,): 0.5})


@pytest.mark.parametrize("index", [3, 4, 5])
def test_every_sibling_is_drawn_but_never_the_caption_itself(index: int) -> None:
    drawn = {
        sentences_of(example)[1]
        for draw in range(60)
        if (example := CaptionPairs(CAPTIONS, LAYOUT).example(index, generator_for(draw))).labels["matched"]
    }
    assert drawn == {record.caption for record in CAPTIONS[3:6]} - {CAPTIONS[index].caption}


def test_a_lone_caption_gets_a_foreign_second() -> None:
    source = CaptionPairs([*CAPTIONS, CaptionRecord(id="x", images=("lone",), caption="lonely")], LAYOUT)
    assert all(source.example(12, generator_for(draw)).labels["matched"] == 0 for draw in range(30))


def test_one_image_leaves_nothing_to_contrast() -> None:
    for make in (CaptionPairs, SingleCaption):
        with pytest.raises(DataError, match="no other image"):
            make(CAPTIONS[:3], LAYOUT)
    assert len(SingleCaption(CAPTIONS[:3], LAYOUT, false_caption_ratio=None)) == 3


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_single_caption(ratio: float) -> None:
    source = SingleCaption(CAPTIONS, LAYOUT, false_caption_ratio=ratio)
    for draw in range(40):
        example = source.example(0, generator_for(1, draw))
        assert example.images == ("image_0",)
        assert example.labels["matched"] == int(sentences_of(example) == ["circle one"])
    said, labels = count_draws(lambda layout: SingleCaption(CAPTIONS, layout, false_caption_ratio=ratio), 0)
    expect_shares(
        said,
        {
            ("circle one",): 1 - ratio,
            **{(record.caption,): ratio / 9 for record in CAPTIONS if record.images != ("image_0",)},
        },
    )
    expect_shares(labels, {(1,): 1 - ratio, (0,): ratio})


def test_single_caption_without_matching() -> None:
    example = SingleCaption(CAPTIONS, LAYOUT, false_caption_ratio=None).example(0, generator_for(0))
    assert example.labels == {"matched": IGNORE}
    with pytest.raises(ConfigError, match="false_caption_ratio"):
        SingleCaption(CAPTIONS, LAYOUT, false_caption_ratio=1.5)


@pytest.mark.parametrize("keep_above", [True, False])
def test_vilbert_draws_from_the_first_captions_of_the_file(keep_above: bool) -> None:
    records = [CAPTIONS[0], CAPTIONS[3], CAPTIONS[6]]
    pool = ["circle one", "gone", "square one", "triangle one", "more"]
    source = VilbertCaptions(records, LAYOUT, pool=pool, keep_above=keep_above)
    assert len(source) == 3
    for draw in range(40):
        example = source.example(0, generator_for(2, draw))
        assert example.images == ("image_0",)
        assert example.labels["matched"] == ((generator_for(2, draw).random() > 0.5) == keep_above)
        assert sentences_of(example) == ["circle one"] or not example.labels["matched"]
    said, labels = count_draws(lambda layout: VilbertCaptions(records, layout, pool=pool, keep_above=keep_above), 0)
    # As many as there are images, the right one included.
    expect_shares(said, {("circle one",): 1 / 2 + 1 / 6, ("gone",): 1 / 6, ("square one",): 1 / 6})
    expect_shares(labels, {(1,): 1 / 2, (0,): 1 / 2})


def test_vilbert_without_matching() -> None:
    source = VilbertCaptions(CAPTIONS[:1], LAYOUT, matching=False)
    assert all(source.example(0, generator_for(draw)).labels == {"matched": IGNORE} for draw in range(20))
    with pytest.raises(DataError, match="1 captions to draw from for 2 images"):
        VilbertCaptions(CAPTIONS[:2], LAYOUT, pool=["a"])
