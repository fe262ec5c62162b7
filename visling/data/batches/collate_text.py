"""The text side of a batch: rows cut, masked and padded, with the pieces to predict.

Letters  B batch rows, T tokens, P slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling.data.batches.masking import TokenMasking, mask_rows
from visling.data.batches.slots import slots_of_grid
from visling.data.text import Tokenizer
from visling.data.text_arrays import TextRows
from visling.draws import Draws
from visling.errors import DataError
from visling.types import Example, InputSpec, Text


class TextCollator:
    """Text rows of many examples as tensors; see `Collator` for its settings."""

    def __init__(self, spec: InputSpec, tokenizer: Tokenizer, masking: TokenMasking | None) -> None:
        self.spec, self.tokenizer, self.masking = spec, tokenizer, masking

    def __call__(
        self,
        rows: TextRows,
        examples: Sequence[Example],
        draws: Draws,
        mismatched: NDArray[np.bool_],
        kept: NDArray[np.int64] | None,
    ) -> tuple[Text, dict[str, Any], TextRows]:
        """Text, its targets, and the rows as they were laid out, cut to `kept` (B,) pieces.

        Raises:
            DataError: a row longer than `spec.max_tokens`, or an answer slot or a task in some rows only.
        """
        self._check_lengths(rows, examples)
        pieces, chosen = self._mask_pieces(rows, draws, mismatched)
        if kept is not None:
            rows, stays = rows.cut(kept)
            pieces, chosen = pieces[stays], chosen[stays]
        mask = np.arange(int(rows.lengths.max())) < rows.lengths[:, None]
        ids = np.full(mask.shape, self.tokenizer.pad, np.int64)
        ids[mask] = pieces
        segments = np.zeros(mask.shape, np.int64)
        segments[mask] = rows.segments
        text = Text(
            ids=torch.from_numpy(ids),
            mask=torch.from_numpy(mask),
            segments=torch.from_numpy(segments),
            answer_at=_stack_places("an answer slot", rows.answer_at),
            task=_stack_places("a task", rows.task),
        )
        return text, {} if self.masking is None else _token_targets(rows, mask, chosen), rows

    def _check_lengths(self, rows: TextRows, examples: Sequence[Example]) -> None:
        longest = int(rows.lengths.max())
        if longest > self.spec.max_tokens:
            example = examples[int(rows.lengths.argmax()) * len(examples) // len(rows)]
            raise DataError(
                f"a row of example {example.id!r} has {longest} pieces, the model takes {self.spec.max_tokens}: "
                "lay it out with TextLayout."
            )

    def _mask_pieces(
        self, rows: TextRows, draws: Draws, mismatched: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Pieces of all rows, one after the other, as the model reads them, and which of them are predicted."""
        if self.masking is None:
            return rows.ids, np.zeros(len(rows.ids), bool)
        pieces, chosen = mask_rows(rows, self.masking, self.tokenizer, draws)
        if not self.masking.mismatched:
            chosen &= ~np.repeat(mismatched, rows.lengths)
        return pieces, chosen


def _stack_places(what: str, places: Sequence[int | None]) -> Tensor | None:
    """(B,), or None where no row has one."""
    given = [place for place in places if place is not None]
    if given and len(given) != len(places):
        raise DataError(
            f"{len(given)} of {len(places)} rows have {what}: one batch holds rows with one or rows without."
        )
    return torch.tensor(given, dtype=torch.int64) if given else None


def _token_targets(rows: TextRows, mask: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> dict[str, Any]:
    """Slots of the chosen pieces and what stood there; `chosen` runs over the real pieces of (B, T)."""
    grid = np.zeros(mask.shape, bool)
    grid[mask] = chosen
    slots = slots_of_grid(grid)
    original = np.zeros(slots.mask.shape, np.int64)
    original[slots.mask.numpy()] = rows.ids[chosen]
    return {"token_slots": slots, "token_ids": torch.from_numpy(original)}
