"""Words that a vocabulary does not know are counted as they are written, and punctuation is no word."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from visling.data.spelling import SAMPLED, count_spelled, count_spelled_examples
from visling.data.text import TextLayout, Tokenizer
from visling.types import Example, InputSpec

SCENES, BERT = TextLayout(Tokenizer("scenes"), InputSpec(vocabulary="scenes")), TextLayout(Tokenizer(), InputSpec())


@pytest.mark.parametrize(
    ("layout", "text", "words", "unknown"),
    [
        (SCENES, "How many giraffes are there?", 5, {"giraffes": 1}),
        (SCENES, "giraffes, giraffes and a tv!", 5, {"giraffes": 2, "tv": 1}),
        (SCENES, "how many circles are there", 5, {}),
        (BERT, "How many giraffes are on tv?", 6, {}),
        (BERT, "an electrocardiogram", 2, {}),  # pieces of several letters
        (BERT, "what is ᚠᚢ ?", 3, {"[UNK]": 1}),
    ],
)
def test_counts(layout: TextLayout, text: str, words: int, unknown: dict[str, int]) -> None:
    found = count_spelled([layout.row(text, answer=True)], layout.tokenizer)
    assert found.words == words
    assert found.unknown == Counter(unknown)


def test_both_texts_of_a_pair_count_and_shares_add_up() -> None:
    rows = [SCENES.row("a zebra", "the zebra by the lake"), SCENES.row("a red circle")]
    found = count_spelled(rows, SCENES.tokenizer)
    assert (found.words, found.unknown) == (10, {"zebra": 2, "lake": 1})
    assert found.share == 0.3
    assert found.commonest(1) == ["zebra"]
    assert count_spelled([], SCENES.tokenizer).share == 0


@dataclass
class Texts:
    """Examples of one word, longer than a row; remembers which were asked for."""

    length: int
    layout: TextLayout
    seen: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.length

    def example(self, index: int, rng: np.random.Generator) -> Example:
        self.seen.append(index)
        return Example(id=str(index), rows=(self.layout.row("zebra " * 200),), images=())


def test_examples_are_sampled_evenly_and_cut_rows_are_not_counted_twice() -> None:
    layout = TextLayout(Tokenizer("scenes"), InputSpec(vocabulary="scenes"))
    texts = Texts(3 * SAMPLED, layout)
    found = count_spelled_examples([texts], layout)
    assert texts.seen == list(range(0, 3 * SAMPLED, 3))
    assert found.share > 0.9
    assert found.commonest() == ["zebra"]
    assert layout.truncated == 0, "rows that are only counted were counted as cut"
