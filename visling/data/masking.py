"""Which word pieces are hidden from the model in masked language modelling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visling.data.text import Tokenizer
from visling.errors import ConfigError
from visling.types import TextRow


@dataclass(frozen=True, kw_only=True)
class TokenMasking:
    """How word pieces are chosen and what stands in their place (BERT; the five systems share the numbers)."""

    rate: float = 0.15
    """Probability that a piece (a word, if `whole_word`) is chosen."""
    mask: float = 0.8
    """Share of the chosen that become [MASK]."""
    random: float = 0.1
    """Share of the chosen that become an entry drawn evenly from the whole vocabulary; the rest stay as they are."""
    whole_word: bool = False
    """Choose words and treat all their pieces alike (VL-BERT); VisualBERT, ViLBERT and LXMERT choose pieces."""

    def __post_init__(self) -> None:
        shares = {"rate": self.rate, "mask": self.mask, "random": self.random, "mask + random": self.mask + self.random}
        for name, value in shares.items():
            if not 0 <= value <= 1 + 1e-9:
                raise ConfigError(f"token masking: {name} must lie in [0, 1]; found {value:g}.")


def mask_tokens(
    row: TextRow, masking: TokenMasking, tokenizer: Tokenizer, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Hide some pieces of a row; special tokens and the answer slot are never chosen.

    Returns:
        ids: (T,) what the model reads.
        at: (P,) chosen positions, ascending; possibly none.
        original_ids: (P,) what stood there.
    Source:
        VisualBERT release: one uniform draw decides whether a piece is chosen and what becomes of it; random entries include special and unused
        ones.
    """
    ids, chosen = mask_rows([row], masking, tokenizer, [rng])
    at = np.flatnonzero(chosen)
    return ids, at, row.ids[at]


def mask_rows(
    rows: Sequence[TextRow], masking: TokenMasking, tokenizer: Tokenizer, rngs: Sequence[np.random.Generator]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """`mask_tokens` for many rows at once, each with its own generator.

    Returns:
        ids: the pieces of all rows, one after the other, as the model reads them.
        chosen: as long, True = chosen.
    """
    original = np.concatenate([row.ids for row in rows])
    if masking.whole_word:
        drawn = [_draw_words(row, rng) for row, rng in zip(rows, rngs, strict=True)]
        draws, spare = np.concatenate([pair[0] for pair in drawn]), np.concatenate([pair[1] for pair in drawn])
    else:
        draws = np.concatenate([rng.random(len(row.ids)) for row, rng in zip(rows, rngs, strict=True)])
        spare = None
    chosen = (draws < masking.rate) & _maskable(rows, original, tokenizer)
    share = draws[chosen] / masking.rate if masking.rate else draws[chosen]
    # Given that a draw means "random", where it lies in that interval is uniform again and picks the entry; pieces of one word need numbers of
    # their own.
    within = (share - masking.mask) / max(masking.random, 1e-9) if spare is None else spare[chosen]
    entries = (within * tokenizer.size).astype(np.int64).clip(0, tokenizer.size - 1)
    ids = original.copy()
    ids[chosen] = np.where(share < masking.mask, tokenizer.mask, np.where(share < masking.mask + masking.random, entries, original[chosen]))
    return ids, chosen


def _draw_words(row: TextRow, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One number per word, spread over its pieces, and one number per piece."""
    if row.words is None:
        raise ConfigError("whole-word masking needs rows that know their words: make them with TextLayout, or set whole_word=false.")
    # Special tokens (word -1) read the additional last number.
    draws = rng.random(int(row.words.max(initial=-1)) + 2)
    return draws[row.words], rng.random(len(row.ids))


def _maskable(rows: Sequence[TextRow], ids: NDArray[np.int64], tokenizer: Tokenizer) -> NDArray[np.bool_]:
    numbers = [row.words for row in rows if row.words is not None]
    if len(numbers) == len(rows):
        maskable: NDArray[np.bool_] = np.concatenate(numbers) >= 0
    else:
        maskable = ~np.isin(ids, (tokenizer.pad, tokenizer.cls, tokenizer.sep))
    start = 0
    for row in rows:
        if row.slot is not None:
            maskable[start + row.slot] = False
        start += len(row.ids)
    return maskable
