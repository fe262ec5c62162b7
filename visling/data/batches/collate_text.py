"""The text side of a batch: rows cut, masked and padded, with the pieces to predict.

Letters  B batch rows, T tokens, P slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling.data.batches.masking import TokenMasking, mask_rows
from visling.data.batches.slots import slots_of_grid
from visling.data.text import Tokenizer
from visling.draws import Draws, Stream
from visling.errors import ConfigError, DataError
from visling.types import Example, InputSpec, Text, TextRow


class TextCollator:
    """Text rows of many examples as tensors; see `Collator` for its settings."""

    def __init__(self, spec: InputSpec, tokenizer: Tokenizer, masking: TokenMasking | None, multiple: int) -> None:
        if multiple < 1:
            raise ConfigError(f"text_multiple must be at least 1; found {multiple}.")
        self.spec, self.tokenizer, self.masking, self.multiple = spec, tokenizer, masking, multiple

    def __call__(
        self,
        examples: Sequence[Example],
        draws: Draws,
        mismatched: NDArray[np.bool_],
        kept: NDArray[np.int64] | None,
    ) -> tuple[Text, dict[str, Any], Sequence[TextRow]]:
        """Text, its targets, and the rows as they were laid out, cut to `kept` (B,) pieces.

        Raises:
            DataError: a row longer than `spec.max_tokens`, or an answer slot or a task in some rows only.
        """
        rows: Sequence[TextRow] = [row for example in examples for row in example.rows]
        lengths = np.array([len(row.ids) for row in rows])
        self._check_lengths(examples, lengths)
        pieces, chosen = self._mask_pieces(rows, lengths, draws, mismatched)
        if kept is not None:
            stays = np.concatenate([_keep_ends(length, keep) for length, keep in zip(lengths, kept, strict=True)])
            rows = [_cut_row(row, int(keep)) for row, keep in zip(rows, kept, strict=True)]
            pieces, chosen, lengths = pieces[stays], chosen[stays], kept
        longest = int(lengths.max())
        width = max(min(-(-longest // self.multiple) * self.multiple, self.spec.max_tokens), longest)
        mask = np.arange(width) < lengths[:, None]
        ids = np.full(mask.shape, self.tokenizer.pad, np.int64)
        ids[mask] = pieces
        segments = np.zeros(mask.shape, np.int64)
        segments[mask] = np.concatenate([row.segments for row in rows])
        text = Text(
            ids=torch.from_numpy(ids),
            mask=torch.from_numpy(mask),
            segments=torch.from_numpy(segments),
            answer_at=_stack_places("an answer slot", [row.answer_at for row in rows]),
            task=_stack_places("a task", [row.task for row in rows]),
        )
        return text, {} if self.masking is None else _token_targets(rows, mask, chosen), rows

    def _check_lengths(self, examples: Sequence[Example], lengths: NDArray[np.int64]) -> None:
        longest = int(lengths.max())
        if longest > self.spec.max_tokens:
            example = examples[int(lengths.argmax()) // len(examples[0].rows)]
            raise DataError(
                f"a row of example {example.id!r} has {longest} pieces, the model takes {self.spec.max_tokens}: "
                "lay it out with TextLayout."
            )

    def _mask_pieces(
        self,
        rows: Sequence[TextRow],
        lengths: NDArray[np.int64],
        draws: Draws,
        mismatched: NDArray[np.bool_],
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Pieces of all rows, one after the other, as the model reads them, and which of them are predicted."""
        if self.masking is None:
            return np.concatenate([row.ids for row in rows]), np.zeros(int(lengths.sum()), bool)
        group, rngs = len(rows) // len(draws), draws.generators(Stream.TOKENS)
        owners = [rngs[number // group] for number in range(len(rows))]
        pieces, chosen = mask_rows(rows, self.masking, self.tokenizer, owners)
        if not self.masking.mismatched:
            chosen &= ~np.repeat(mismatched, lengths)
        return pieces, chosen


def _stack_places(what: str, places: Sequence[int | None]) -> Tensor | None:
    """(B,), or None where no row has one."""
    given = [place for place in places if place is not None]
    if given and len(given) != len(places):
        raise DataError(
            f"{len(given)} of {len(places)} rows have {what}: one batch holds rows with one or rows without."
        )
    return torch.tensor(given, dtype=torch.int64) if given else None


def _token_targets(rows: Sequence[TextRow], mask: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> dict[str, Any]:
    """Slots of the chosen pieces and what stood there; `chosen` runs over the real pieces of (B, T)."""
    grid = np.zeros(mask.shape, bool)
    grid[mask] = chosen
    slots = slots_of_grid(grid)
    original = np.zeros(slots.mask.shape, np.int64)
    original[slots.mask.numpy()] = np.concatenate([row.ids for row in rows])[chosen]
    return {"token_slots": slots, "token_ids": torch.from_numpy(original)}


def _keep_ends(length: int, kept: int) -> NDArray[np.bool_]:
    """(length) which positions of a text are kept: the first ones and the last, its [SEP]."""
    stays = np.arange(length) < kept - 1
    stays[-1] = True
    return stays


def _cut_row(row: TextRow, kept: int) -> TextRow:
    """The row with its first pieces and its last."""
    if kept == len(row.ids):
        return row
    stays = _keep_ends(len(row.ids), kept)
    return dataclasses.replace(
        row,
        ids=row.ids[stays],
        segments=row.segments[stays],
        words=None if row.words is None else row.words[stays],
        links=tuple(link for link in row.links if link[0] < kept - 1),
        phrases=tuple(at for at in row.phrases if at < kept - 1),
    )
