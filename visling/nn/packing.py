"""Packed rows: the real positions of a batch one after the other, without the padding between them.

A batch comes padded, (B, N, ...). Whatever treats every position alike (linear layers, norms, GELU) runs on the packed
form (K, ...), so padding costs nothing and it does not matter which rows share a batch. Attention alone needs to know
where each row begins and ends.

Letters  B rows, N positions of a padded row, K packed positions, D width, P slots of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visling.types import Reads, Regions, Slots, Text


class Packing:
    """Where the packed positions of a batch lie in its padded rows.

    Args:
        mask: (B, N) bool, True = real. Rows come in order and so do the positions of a row.
        at: (K,) int64 places of the packed positions, counted row by row (row * N + position).
        bounded: the host gave the number of packed positions, and some may be padding.
    """

    def __init__(self, mask: Tensor, at: Tensor, *, bounded: bool = False) -> None:
        self.mask, self.at, self.bounded = mask, at, bounded
        # Not cached properties: those of Python 3.11 take a lock, which no compiler understands
        self._places: Tensor | None = None
        self._lengths: list[int] | None = None

    @classmethod
    def of(cls, mask: Tensor, count: int | None = None) -> Packing:
        """The packing of the real positions of `mask` (B, N).

        Args:
            count: number of packed positions, at least that of the real ones, so that nothing waits for the device and
                shapes repeat; padding fills what is left, at the end. None = as many as are real; a compiler, which
                cannot count them, gets all.
        """
        flat = mask.flatten()
        takes_all = torch.compiler.is_compiling() and (count is None or count >= len(flat))
        if takes_all or (count is None and not len(flat)):  # there is nothing to count
            return cls(mask, torch.arange(len(flat), device=mask.device))
        if count is None:
            return cls(mask, flat.nonzero()[:, 0])
        return cls(mask, flat.int().argsort(descending=True, stable=True)[:count], bounded=True)

    @property
    def full(self) -> bool:
        """Whether every position is packed in its place: packed and padded form are the same."""
        return not self.bounded and len(self.at) == self.mask.numel()

    @property
    def lengths(self) -> list[int]:
        """Real positions of each row, as numbers: waits for the device, once."""
        if self._lengths is None:
            self._lengths = self.mask.sum(1).tolist()
        return self._lengths

    @property
    def places(self) -> Tensor:
        """(B * N,) int64: where each position is found among the packed ones; 0 for those that are not packed."""
        if self._places is None:
            self._places = torch.zeros(self.mask.numel(), dtype=torch.int64, device=self.at.device)
            self._places[self.at] = torch.arange(len(self.at), device=self.at.device)
        return self._places

    @property
    def row(self) -> Tensor:
        """(K,) int64: the row of each packed position."""
        return self.at // self.mask.shape[1]

    def pack(self, padded: Tensor) -> Tensor:
        """(B, N, ...) -> (K, ...)."""
        flat = padded.flatten(0, 1)
        if self.full:
            return flat
        return flat.index_select(0, self.at)

    def unpack(self, packed: Tensor) -> Tensor:
        """(K, ...) -> (B, N, ...); zeros where nothing was packed. What fills up a packing goes to padding."""
        if not self.full:
            # Places differ, so nothing is added up; of the ways to lay rows out this is the fast one.
            packed = packed.new_zeros(self.mask.numel(), *packed.shape[1:]).index_add_(0, self.at, packed)
        return packed.view(*self.mask.shape, *packed.shape[1:])

    def unpack_real(self, packed: Tensor) -> Tensor:
        """(K, ...) -> (B, N, ...); zeros at padding, also where it fills up the packing."""
        padded = self.unpack(packed)
        if not self.bounded and not torch.compiler.is_compiling():  # nothing but real positions was packed
            return padded
        return padded.where(self.mask.view(*self.mask.shape, *[1] * (padded.dim() - 2)), 0.0)

    def share(self, packed: Tensor, row: Tensor | None, count: int | None = None) -> tuple[Tensor, Packing]:
        """States of rows (S, N) as the rows of a batch read them, and their packing.

        Args:
            packed: (K, ...).
            row: (B,) int64 row of each batch row; None = one to one.
            count: packed positions of the batch rows; see `of`.
        """
        if row is None:
            return packed, self
        shared = Packing.of(self.mask[row], count)
        return shared.pack(self.unpack(packed)[row]), shared

    def read(self, chosen: Tensor, most: int) -> Reading:
        """The packed positions where `chosen` (B, N) holds, which are at most `most`."""
        rows = Packing.of(chosen & self.mask, min(most, len(self.at)) if self.bounded else None)
        return Reading(index=self.places[rows.at], rows=rows)

    def read_all(self) -> Reading:
        """All packed positions."""
        return Reading(index=None, rows=self)


@dataclass(frozen=True, slots=True)
class Reading:
    """Packed positions whose new states are read after a layer; it computes no others."""

    index: Tensor | None
    """(Q,) int64 their places among the packed positions; None = all."""
    rows: Packing
    """Where they lie in the padded rows."""

    def take(self, packed: Tensor) -> Tensor:
        """(K, ...) -> (Q, ...)."""
        return packed if self.index is None else packed.index_select(0, self.index)


def mark_read(slots: Sequence[Slots] | None, mask: Tensor, *, first: Tensor | None = None) -> tuple[Tensor, int]:
    """Which positions of `mask` (B, N) are read, (B, N) bool, and a bound of how many these are.

    Args:
        slots: positions that are read; None = all.
        first: (B,) int64 one more position of each row; None = none.
    """
    rows, length = mask.shape
    if slots is None:
        return torch.ones_like(mask), rows * length
    marked, most = mask.new_zeros(rows, length + 1), 0
    for each in slots:
        marked.scatter_(1, torch.where(each.mask, each.at, length), True)  # free slots mark the spare column
        most += each.mask.numel() if each.taken is None else len(each.taken)
    if first is not None:
        marked.scatter_(1, first[:, None], True)
        most += rows
    return marked[:, :length], most


def read_joint(reads: Reads, rows: Packing, *, num_tokens: int, num_regions: int, answer_at: Tensor | None) -> Reading:
    """What is read of a joint sequence: the tokens, the regions, and what stands behind them, the whole image first.

    Args:
        answer_at: (B,) int64 position that is read for `pooled`; None = the first.
    """
    text, regions, behind = rows.mask.tensor_split((num_tokens, num_tokens + num_regions), dim=1)
    first = (text.new_zeros(len(text), dtype=torch.int64) if answer_at is None else answer_at) if reads.pooled else None
    read_text, most_text = mark_read(reads.text, text, first=first)
    read_regions, most_regions = mark_read(reads.regions, regions)
    read_behind = torch.zeros_like(behind)
    read_behind[:, :1].fill_(reads.whole)
    chosen = torch.cat([read_text, read_regions, read_behind], dim=1)
    return rows.read(chosen, most_text + most_regions + (len(behind) if reads.whole else 0))


def count_with_one_more(count: int | None, rows: int) -> int | None:
    """A number of packed positions, if it is known, with one more in each of so many rows."""
    return None if count is None else count + rows


def add_counts(text: Text, regions: Regions | None, *, extra: int = 0) -> int | None:
    """Packed positions of joint sequences, where the batch bounds them: those of the tokens, of the regions, and
    `extra` more in each row; None where it does not."""
    rows = len(text.mask if text.row is None else text.row)
    counts = [part.count if part.row is None else part.shared for part in (text, regions) if part is not None]
    known = [count for count in counts if count is not None]
    return sum(known) + extra * rows if len(known) == len(counts) else None
