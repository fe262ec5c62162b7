"""Batches with images paired with batches of text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader
from visling.data.batches.paired import PairedLoader
from visling.data.corpora.text import PlainText
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError
from visling.types import Example, InputSpec

TOKENIZER = Tokenizer()
SPEC = InputSpec(max_tokens=16)
LAYOUT = TextLayout(TOKENIZER, SPEC)


class Captions:
    """Captions that name their number, and a number drawn for them."""

    def __len__(self) -> int:
        return 7

    def example(self, index: int, rng: np.random.Generator) -> Example:
        return Example(id=str(index), rows=(LAYOUT.row(f"caption {index} {rng.integers(100)}"),), images=())


def paired(prefetch: int = 0, passages: int = 6) -> PairedLoader:
    text = PlainText([f"passage {number}" for number in range(passages)], LAYOUT, min_words=2)
    images, words = (
        Loader(
            source,
            Collator(None, SPEC, TOKENIZER),
            batch_size=2,
            seed=3,
            bucket=1,
            prefetch=prefetch,
            rank=0,
            world_size=1,
        )
        for source in (Captions(), text)
    )
    return PairedLoader(images, words)


def told(items: Sequence[Any]) -> list[tuple[list[str], list[str]]]:
    """What captions and passages say."""
    return [tuple([TOKENIZER.decode(ids) for ids in batch.text.ids] for batch, _ in item) for item in items]  # type: ignore[misc]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_text_goes_on_and_begins_anew(prefetch: int) -> None:
    loader = paired(prefetch, passages=8)
    assert len(loader) == 3
    passages: list[str] = []
    for epoch in range(4):
        loader.epoch = epoch
        for captions, text in told(list(loader)):
            assert all(caption.startswith("caption") for caption in captions)
            assert len(text) == 2
            passages += text
    everything = sorted(f"passage {number}" for number in range(8))
    assert [sorted(passages[begin : begin + 8]) for begin in (0, 8, 16)] == [everything] * 3, (
        "four batches are a pass over the text"
    )
    assert passages[:8] != passages[8:16], "in another order"


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_restart_meets_the_same(prefetch: int) -> None:
    whole = paired(prefetch)
    expected = []
    for epoch in range(2):
        whole.epoch = epoch
        expected += told(list(whole))
    first = paired(prefetch)
    first.epoch = 1
    iterator = iter(first)
    next(iterator)
    state = json.loads(json.dumps(first.state_dict()))
    iterator.close()  # type: ignore[attr-defined]
    again = paired(prefetch)
    again.load_state_dict(state)
    assert again.epoch == 1
    assert told(list(again)) == expected[4:]
    assert told(list(again)) == expected[3:], "the next iteration is the whole epoch"


def test_another_text_is_not_resumed() -> None:
    with pytest.raises(ConfigError, match="cannot resume the loader: examples was 6, now it is 8"):
        paired(passages=8).load_state_dict(paired().state_dict())
