"""Rows of a question with its choices, given word by word with the objects that words name.

Shapes   T word pieces of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from visling.data.text import NamedWord, TextLayout, Tokenizer
from visling.errors import DataError
from visling.types import TextRow

Cut = Literal["front", "shared", "longer", "second"]
"""How a row that is too long is shortened: `cut_front`, `cut_shared`, `cut_longer` or `cut_second`."""
Order = Literal["question_first", "answer_first", "one_sentence"]
"""`[CLS] question [SEP] choice [SEP]`, the same with the two exchanged, or `[CLS] question choice [SEP]` in one
segment."""
Links = Literal["none", "first_piece", "every_piece"]
"""Which pieces of a name are linked to the object that it names."""


@dataclass(frozen=True, slots=True)
class NamedPieces:
    """Word pieces of a text that was given word by word."""

    ids: NDArray[np.int64]
    """(T,)."""
    words: NDArray[np.int64]
    """(T,) number of the word, where punctuation within a given word counts as a word of its own."""
    owners: NDArray[np.int64]
    """(T,) number of the given word."""
    objects: NDArray[np.int64]
    """(T,) object that the given word names, -1 = none."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, kept: slice) -> NamedPieces:
        return NamedPieces(self.ids[kept], self.words[kept], self.owners[kept], self.objects[kept])

    def __add__(self, other: NamedPieces) -> NamedPieces:
        """One text after the other; words are counted on."""
        words, owners = self.words.max(initial=-1) + 1, self.owners.max(initial=-1) + 1
        return NamedPieces(
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.words, other.words + words]),
            np.concatenate([self.owners, other.owners + owners]),
            np.concatenate([self.objects, other.objects]),
        )

    def named(self, links: Links) -> list[tuple[int, int]]:
        """(piece, object) of the pieces that are linked."""
        if links == "none":
            return []
        first = np.diff(self.owners, prepend=-1) != 0
        chosen = (self.objects >= 0) & (first | (links == "every_piece"))
        return [(int(at), int(self.objects[at])) for at in np.flatnonzero(chosen)]


def split_words(tokenizer: Tokenizer, text: Sequence[NamedWord]) -> NamedPieces:
    """Pieces of a text, each word split by itself.

    Raises:
        DataError: no word has a piece.
    """
    pieces = [tokenizer.pieces(word) for word, _ in text]
    owners = np.repeat(np.arange(len(pieces)), [len(ids) for ids, _ in pieces])
    if not len(owners):
        raise DataError(f"a text is empty: found {[word for word, _ in text]}, expected at least one word.")
    before = np.cumsum([0, *(int(words[-1]) + 1 if len(words) else 0 for _, words in pieces[:-1])])
    objects = np.array([-1 if item is None else item for _, item in text], np.int64)
    return NamedPieces(
        np.concatenate([ids for ids, _ in pieces]),
        np.concatenate([words for _, words in pieces]) + before[owners],
        owners,
        objects[owners],
    )


def lay_out_choices(
    layout: TextLayout,
    parts: Sequence[Sequence[NamedWord]],
    choices: Sequence[Sequence[NamedWord]],
    *,
    cut: Cut,
    links: Links,
    separated: bool = False,
    order: Order = "question_first",
) -> tuple[TextRow, ...]:
    """A row for each choice; links are (token, object) pairs.

    Args:
        parts: the question, or the question and its answer.
        separated: whether [SEP] stands between the parts (ViLBERT).
    Raises:
        DataError: a text without any word piece.
    """
    context = [split_words(layout.tokenizer, part) for part in parts]
    if separated:
        end = np.array([layout.tokenizer.sep]), np.zeros(1, np.int64), np.zeros(1, np.int64), np.full(1, -1)
        context = [*(part + NamedPieces(*end) for part in context[:-1]), context[-1]]
    seconds = [split_words(layout.tokenizer, choice) for choice in choices]
    limit = layout.spec.max_tokens - (2 if order == "one_sentence" else 3)
    layout.truncated += sum(sum(map(len, context)) + len(second) > limit for second in seconds)
    return tuple(
        _lay_out_row(layout, first, second, links, order) for first, second in _shorten(context, seconds, cut, limit)
    )


def _shorten(
    context: Sequence[NamedPieces], seconds: Sequence[NamedPieces], cut: Cut, limit: int
) -> list[tuple[NamedPieces, NamedPieces]]:
    """Context and choice of each row, together at most `limit` pieces."""
    if cut == "shared":
        lengths, kept = cut_shared([len(part) for part in context], [len(second) for second in seconds], limit)
        first = _join([part[:length] for part, length in zip(context, lengths, strict=True)])
        return [(first, second[:length]) for second, length in zip(seconds, kept, strict=True)]
    first, rows = _join(context), []
    for second in seconds:
        if cut == "front":
            from_first, from_second = cut_front(len(first), len(second), limit)
            rows.append((first[from_first:], second[from_second:]))
        else:
            before, after = (cut_longer if cut == "longer" else cut_second)(len(first), len(second), limit)
            rows.append((first[:before], second[:after]))
    return rows


def _join(parts: Sequence[NamedPieces]) -> NamedPieces:
    joined = parts[0]
    for part in parts[1:]:
        joined = joined + part
    return joined


def _lay_out_row(layout: TextLayout, first: NamedPieces, second: NamedPieces, links: Links, order: Order) -> TextRow:
    """The row of one choice."""
    if order == "one_sentence":
        text = first + second
        special = np.array([-1])
        cls, sep = (np.array([piece]) for piece in (layout.tokenizer.cls, layout.tokenizer.sep))
        return TextRow(
            ids=np.concatenate([cls, text.ids, sep]),
            segments=np.zeros(len(text) + 2, np.int64),
            words=np.concatenate([special, text.words, special]),
            links=tuple((1 + at, item) for at, item in text.named(links)),
            task=layout.task_token,
        )
    if order == "answer_first":
        first, second = second, first
    linked = [(1 + at, item) for at, item in first.named(links)]
    linked += [(2 + len(first) + at, item) for at, item in second.named(links)]
    return replace(layout.join((first.ids, first.words), (second.ids, second.words)), links=tuple(linked))


def cut_front(first: int, second: int, limit: int) -> tuple[int, int]:
    """Pieces that the context and the choice lose at their front: the choice as many as needed, then the context.

    Source:
        VisualBERT release, see `TextLayout.named`.
    """
    excess = max(first + second - limit, 0)
    from_second = min(excess, second)
    return excess - from_second, from_second


def cut_shared(parts: Sequence[int], choices: Sequence[int], limit: int) -> tuple[list[int], list[int]]:
    """Pieces that each part of the context and each choice keep: a choice loses its end while it is longer than the
    context, else the context does, its first part as long as that has more than one piece.

    All choices have one context, cut to what the longest of them needs.

    Source:
        VL-BERT release, `vcr/data/datasets/vcr.py`, where the choices are cut one after the other.
    """
    context, kept = list(parts), []
    for choice in choices:
        while sum(context) + choice > limit:
            if choice > sum(context):
                choice -= 1
            else:
                context[0 if context[0] > 1 else -1] -= 1
        kept.append(choice)
    return context, kept


def cut_longer(first: int, second: int, limit: int) -> tuple[int, int]:
    """Pieces that the context and the choice keep: the longer loses its end, the choice if both are equal.

    Source:
        ViLBERT's first release, which by mistake goes on with the context that earlier choices have cut.
    """
    while first + second > limit:
        if first > second:
            first -= 1
        else:
            second -= 1
    return first, second


def cut_second(first: int, second: int, limit: int) -> tuple[int, int]:
    """Pieces that the context and the choice keep: the choice loses its end; the context only what is more than the
    limit without one piece of the choice.

    Source:
        ViLBERT's multi-task release, which stops where the context alone is too long.
    """
    first = min(first, limit - 1)
    return first, min(second, limit - first)
