"""Text without images as pre-training examples (VL-BERT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visling.data.annotations.passages import Passages, find_passages, has_passages
from visling.data.corpora.base import CorpusContext, TextReader, Typical
from visling.data.text import TextLayout
from visling.errors import DataError
from visling.types import Example, TextRow


class PlainText:
    """Text without an image: a passage, with those that follow while it is short, cut to the longest row.

    Cutting comes before masking here and after it in the release, which shows the model the same: draws are
    made word by word, for the cut ones last.

    Args:
        min_words: words, punctuation counted, below which the next passage is appended; the first follows
            the last.
        max_tokens: word pieces kept, special tokens included; None = as many as the model reads.
        special_tokens: whether rows begin with [CLS] and end with [SEP].
    Source:
        VL-BERT release, `general_corpus.py` (64 and 64, no special tokens).
    """

    def __init__(
        self,
        passages: Sequence[str],
        layout: TextLayout,
        *,
        min_words: int = 64,
        max_tokens: int | None = None,
        special_tokens: bool = False,
    ) -> None:
        self.passages, self.layout, self.min_words, self.special_tokens = passages, layout, min_words, special_tokens
        self.max_tokens = layout.spec.max_tokens if max_tokens is None else max_tokens
        if not passages:
            raise DataError("a text corpus needs a passage; found none.")

    def __len__(self) -> int:
        return len(self.passages)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Passage `index` and what follows it; nothing is drawn."""
        ids: list[NDArray[np.int64]] = []
        numbers: list[NDArray[np.int64]] = []
        words, at = 0, index
        while not ids or words < self.min_words:
            pieces, word_numbers = self.layout.tokenizer.pieces(self.passages[at])
            ids.append(pieces)
            numbers.append(word_numbers + words)
            words += int(word_numbers[-1]) + 1 if len(pieces) else 0
            at = (at + 1) % len(self.passages)
            if at == index and not words:
                raise DataError(
                    "the text corpus has no word that the tokenizer can read: every passage is empty after cleaning."
                )
        room = self.max_tokens - 2 * self.special_tokens
        row, row_words = np.concatenate(ids)[:room], np.concatenate(numbers)[:room]
        if self.special_tokens:
            tokens = self.layout.tokenizer
            row, row_words = np.array([tokens.cls, *row, tokens.sep]), np.array([-1, *row_words, -1])
        return Example(id=str(index), rows=(TextRow(ids=row, segments=np.zeros_like(row), words=row_words),), images=())


def _read_passages(roots: Sequence[tuple[Path, str]], context: CorpusContext) -> PlainText:
    """All files of the corpus, one after the other."""
    passages = Passages([file for root in roots for file in find_passages(*root)])
    context.note(passages.paths[0].parent, {"lines without a word": passages.empty})
    return PlainText(passages, context.layout, special_tokens=context.corpus.special_tokens)


READERS: Mapping[str, TextReader] = {
    "text": TextReader(
        shows="sentences or documents without images, in a batch of their own (VL-BERT)",
        read=_read_passages,
        present=has_passages,
        settings=frozenset({"special_tokens"}),
        typical=Typical(tokens=64, images=0),
    ),
}
