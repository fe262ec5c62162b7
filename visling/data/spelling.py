"""How much of a text a vocabulary does not know: words that it spells out letter by letter, or cannot write at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from visling.data.batches.examples import Source
from visling.data.text import TextLayout, Tokenizer
from visling.types import TextRow

SAMPLED = 2000
"""Examples, evenly spread over a source, whose words are counted."""


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """Words of a text, and those that a vocabulary does not know."""

    words: int
    """Counted, punctuation left out."""
    unknown: Counter[str]
    """How often each word that it spells out occurs; "[UNK]" stands for all that it cannot write."""

    @property
    def share(self) -> float:
        """Share of the words that the vocabulary does not know."""
        return sum(self.unknown.values()) / self.words if self.words else 0.0

    def commonest(self, most: int = 5) -> list[str]:
        """The unknown words that occur most often."""
        return [word for word, _ in self.unknown.most_common(most)]


def count_spelled(rows: Iterable[TextRow], tokenizer: Tokenizer) -> Spelling:
    """Count the words of rows of word pieces.

    A word is spelled out if it is written in two or more pieces of one character each.
    """
    words, unknown = 0, Counter[str]()
    for row in rows:
        if row.words is None:
            continue
        for number in range(int(row.words.max(initial=-1)) + 1):
            ids = row.ids[row.words == number]
            pieces = [piece.removeprefix("##") for piece in tokenizer.tokens(ids)]
            word = "[UNK]" if tokenizer.unk in ids else "".join(pieces)
            if not any(character.isalnum() for character in word):
                continue
            words += 1
            if word == "[UNK]" or (len(pieces) > 1 and all(len(piece) == 1 for piece in pieces)):
                unknown[word] += 1
    return Spelling(words=words, unknown=unknown)


def count_spelled_examples(sources: Sequence[Source], layout: TextLayout) -> Spelling:
    """Count the words of a sample of examples that a layout lays out."""
    rows: list[TextRow] = []
    truncated = layout.truncated
    for source in sources:
        for index in range(0, len(source), max(1, len(source) // SAMPLED)):
            rows += source.example(index, np.random.default_rng(index)).rows
    layout.truncated = truncated  # counts the rows that are trained on
    return count_spelled(rows, layout.tokenizer)
