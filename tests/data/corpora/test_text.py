"""Text without images as a model is shown it."""

from __future__ import annotations

import pytest
from fixtures.corpus_draws import LAYOUT, TOKENIZER

from visling.data.corpora.text import PlainText
from visling.errors import DataError
from visling.runtime import generator_for


def test_plain_text_takes_following_passages_until_it_is_long_enough() -> None:
    passages = ["one two three", "four , five", "six"]
    source = PlainText(passages, LAYOUT, min_words=5)
    rows = [source.example(index, generator_for(0)).rows[0] for index in range(3)]
    assert [TOKENIZER.decode(row.ids) for row in rows] == [
        "one two three four , five",
        "four , five six one two three",
        "six one two three four , five",
    ]
    for row in rows:
        assert row.words is not None
        assert row.words.tolist() == list(range(len(row.ids))), "words are numbered through"
        assert set(row.segments.tolist()) == {0}
        assert not {TOKENIZER.cls, TOKENIZER.sep} & set(row.ids.tolist())
    example = PlainText(passages, LAYOUT, min_words=0, max_tokens=2).example(0, generator_for(0))
    assert (TOKENIZER.decode(example.rows[0].ids), example.images, dict(example.labels)) == ("one two", (), {})
    assert len(PlainText(["alone"], LAYOUT).example(0, generator_for(0)).rows[0].ids) == 64, (
        "behind the last passage comes the first"
    )
    assert len(PlainText(["word " * 500], LAYOUT).example(0, generator_for(0)).rows[0].ids) == LAYOUT.spec.max_tokens


def test_plain_text_between_special_tokens() -> None:
    source = PlainText(["one two three"], LAYOUT, min_words=0, max_tokens=4, special_tokens=True)
    row = source.example(0, generator_for(0)).rows[0]
    assert row.ids.tolist() == [TOKENIZER.cls, *TOKENIZER.encode("one two"), TOKENIZER.sep]
    assert row.words is not None
    assert row.words.tolist() == [-1, 0, 1, -1], "special tokens are never masked"
    assert row.segments.tolist() == [0] * 4


def test_empty_text() -> None:
    with pytest.raises(DataError, match="found none"):
        PlainText([], LAYOUT)
    with pytest.raises(DataError, match="every passage is empty"):
        PlainText(["\u200b", "\u0000"], LAYOUT).example(1, generator_for(0))
