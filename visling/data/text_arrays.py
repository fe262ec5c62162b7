"""Word pieces of many texts, and of many rows laid out for a model, as a few long arrays.

Letters  M texts, B rows, P pieces of all texts or rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visling.types import TextRow

Links = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Texts:
    """Word pieces of many texts, one text after the other."""

    offsets: NDArray[np.int64]
    """(M + 1,): text i has the pieces from offsets[i] to offsets[i + 1]."""
    ids: NDArray[np.signedinteger]
    """(P,)."""
    words: NDArray[np.signedinteger]
    """(P,) number of the word of each piece within its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRows:
    """Rows of word pieces, one after the other; fields are those of `TextRow`."""

    lengths: NDArray[np.int64]
    """(B,) pieces of each row."""
    ids: NDArray[np.int64]
    """(P,)."""
    segments: NDArray[np.int64]
    """(P,)."""
    words: NDArray[np.int64] | None
    """(P,); None if a row does not know its words."""
    answer_at: Sequence[int | None]
    task: Sequence[int | None]
    links: Sequence[Links]
    phrases: Sequence[tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> NDArray[np.int64]:
        """(B,) where each row begins in the long arrays."""
        ends: NDArray[np.int64] = np.cumsum(self.lengths)
        return ends - self.lengths

    @property
    def places(self) -> NDArray[np.int64]:
        """(P,) position of each piece in its row."""
        return count_up(self.lengths)

    @staticmethod
    def pack(rows: Sequence[TextRow]) -> TextRows:
        """The rows of a list."""
        words = [row.words for row in rows if row.words is not None]
        return TextRows(
            lengths=np.array([len(row.ids) for row in rows], np.int64),
            ids=np.concatenate([row.ids for row in rows]),
            segments=np.concatenate([row.segments for row in rows]),
            words=np.concatenate(words) if len(words) == len(rows) else None,
            answer_at=[row.answer_at for row in rows],
            task=[row.task for row in rows],
            links=[row.links for row in rows],
            phrases=[row.phrases for row in rows],
        )

    def row(self, number: int) -> TextRow:
        """One of the rows."""
        stop = int(self.lengths[: number + 1].sum())
        piece = slice(stop - int(self.lengths[number]), stop)
        return TextRow(
            ids=self.ids[piece],
            segments=self.segments[piece],
            words=None if self.words is None else self.words[piece],
            answer_at=self.answer_at[number],
            task=self.task[number],
            links=self.links[number],
            phrases=self.phrases[number],
        )

    def cut(self, kept: NDArray[np.int64]) -> tuple[TextRows, NDArray[np.bool_]]:
        """The rows with their first pieces and their last, `kept` (B,) in all; and which pieces (P,) those are."""
        lengths, places = np.repeat(self.lengths, self.lengths), self.places
        stays = (places < np.repeat(kept, self.lengths) - 1) | (places == lengths - 1)
        limits = (kept - 1).tolist()
        rows = TextRows(
            lengths=kept,
            ids=self.ids[stays],
            segments=self.segments[stays],
            words=None if self.words is None else self.words[stays],
            answer_at=self.answer_at,
            task=self.task,
            links=[
                tuple(link for link in links if link[0] < limit)
                for links, limit in zip(self.links, limits, strict=True)
            ],
            phrases=[
                tuple(at for at in phrases if at < limit) for phrases, limit in zip(self.phrases, limits, strict=True)
            ],
        )
        return rows, stays


def merge_rows(parts: Sequence[TextRows], order: NDArray[np.int64]) -> TextRows:
    """Rows of several parts, without links and phrases, as one: row i of the result is row `order[i]` of the parts
    laid end to end."""
    lengths = np.concatenate([part.lengths for part in parts])
    starts = (np.cumsum(lengths) - lengths)[order]
    lengths = lengths[order]
    pieces = np.repeat(starts, lengths) + count_up(lengths)
    words = [part.words for part in parts if part.words is not None]
    answer_at, task = ([item for part in parts for item in getattr(part, name)] for name in ("answer_at", "task"))
    return TextRows(
        lengths=lengths,
        ids=np.concatenate([part.ids for part in parts])[pieces],
        segments=np.concatenate([part.segments for part in parts])[pieces],
        words=np.concatenate(words)[pieces] if len(words) == len(parts) else None,
        answer_at=[answer_at[at] for at in order.tolist()],
        task=[task[at] for at in order.tolist()],
        links=[()] * len(order),
        phrases=[()] * len(order),
    )


def count_up(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ... below each of the lengths, one after the other."""
    ends = np.cumsum(lengths)
    counted: NDArray[np.int64] = np.arange(int(lengths.sum())) - np.repeat(ends - lengths, lengths)
    return counted
