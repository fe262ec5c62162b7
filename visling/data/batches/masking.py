"""Which word pieces and which regions are hidden from the model in pre-training.

Letters  T word pieces of a row, P chosen ones, R regions of an image, H and W its height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling import boxes as geometry
from visling.data.text import Tokenizer
from visling.data.text_arrays import TextRows
from visling.draws import Draws, GivenDraws, Stream
from visling.errors import ConfigError
from visling.types import TextRow


def _check_shares(what: str, shares: Mapping[str, float]) -> None:
    for name, value in shares.items():
        if not 0 <= value <= 1 + 1e-9:
            raise ConfigError(f"{what}: {name} must lie in [0, 1]; found {value:g}.")


@dataclass(frozen=True, kw_only=True)
class TokenMasking:
    """How word pieces are chosen and what replaces them (BERT; the five systems share the numbers)."""

    rate: float = 0.15
    """Probability that a piece (a word, if `whole_word`) is chosen."""
    mask: float = 0.8
    """Share of the chosen that become [MASK]."""
    random: float = 0.1
    """Share of the chosen that become an entry drawn evenly from the whole vocabulary; the rest stay as they are."""
    whole_word: bool = False
    """Choose words and treat all their pieces alike (VL-BERT); VisualBERT, ViLBERT and LXMERT choose pieces."""
    in_turn: bool = False
    """Replay draws of a release (`GivenDraws`) in its order, word by word (VL-BERT) or piece by piece: one number
    decides, and where it says random, each piece draws its entry right after it. Numbers that nothing is to be equal to
    are drawn all at once, which is faster: each piece is masked, replaced and kept with the same probabilities."""
    mismatched: bool = True
    """Whether hidden words of a text that does not belong to its image are predicted. All releases predict them except
    ViLBERT's multi-task one, whose `objective` 1 hides them all the same and predicts none."""

    def __post_init__(self) -> None:
        _check_shares(
            "token masking",
            {"rate": self.rate, "mask": self.mask, "random": self.random, "mask + random": self.mask + self.random},
        )


def mask_tokens(
    row: TextRow, masking: TokenMasking, tokenizer: Tokenizer, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Hide some pieces of a row; special tokens and the answer slot are never chosen.

    Returns:
        ids: (T,) what the model reads.
        at: (P,) chosen positions, ascending; possibly none.
        original_ids: (P,) the original ids there.
    Source:
        All releases: one uniform draw decides whether a piece is chosen and what replaces it; random entries include
            special and unused ones.
    """
    ids, chosen = mask_rows(TextRows.pack([row]), masking, tokenizer, GivenDraws([rng]))
    at = np.flatnonzero(chosen)
    return ids, at, row.ids[at]


def mask_rows(
    rows: TextRows, masking: TokenMasking, tokenizer: Tokenizer, draws: Draws
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """`mask_tokens` for many rows at once.

    Args:
        draws: of the examples, which have equally many rows each, one after the other.
    Returns:
        ids: the pieces of all rows, one after the other, as the model reads them.
        chosen: as long, True = chosen.
    """
    maskable = _find_maskable(rows, tokenizer)
    if masking.in_turn and draws.replayed:
        return _mask_in_turn(rows, maskable, masking, tokenizer, draws)
    if masking.whole_word:
        numbers, spare = _draw_words(rows, draws)
    else:
        numbers, spare = _draw_rows(draws, rows.lengths), None
    chosen = (numbers < masking.rate) & maskable
    original = rows.ids[chosen]
    share = numbers[chosen] / masking.rate if masking.rate else numbers[chosen]
    # Given that a draw means "random", its position within that interval is again uniform and picks the entry; pieces
    # of one word need numbers of their own.
    within = (share - masking.mask) / max(masking.random, 1e-9) if spare is None else spare[chosen]
    entries = (within * tokenizer.size).astype(np.int64).clip(0, tokenizer.size - 1)
    ids = rows.ids.copy()
    ids[chosen] = np.where(
        share < masking.mask, tokenizer.mask, np.where(share < masking.mask + masking.random, entries, original)
    )
    return ids, chosen


def _draw_rows(draws: Draws, counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """`counts` (B,) numbers of each row, one after the other."""
    return draws.flat(Stream.TOKENS, counts.reshape(len(draws), -1).sum(1))


def _draw_words(rows: TextRows, draws: Draws) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One number per word, spread over its pieces (P,), and one number per piece (P,)."""
    words = _word_numbers(rows)
    # Special tokens (word -1) read an additional number, that of word `count`.
    counts = np.maximum.reduceat(words, rows.starts) + 1
    drawn = counts + 1 + rows.lengths
    numbers = _draw_rows(draws, drawn)
    begins = np.cumsum(drawn) - drawn
    of_word = np.where(words < 0, np.repeat(counts, rows.lengths), words)
    pieces = np.repeat(begins + counts + 1, rows.lengths) + rows.places
    return numbers[np.repeat(begins, rows.lengths) + of_word], numbers[pieces]


def _word_numbers(rows: TextRows) -> NDArray[np.int64]:
    if rows.words is None:
        raise ConfigError(
            "whole-word masking needs rows that know their words: make them with TextLayout, or set whole_word=false."
        )
    return rows.words


def _mask_in_turn(
    rows: TextRows, maskable: NDArray[np.bool_], masking: TokenMasking, tokenizer: Tokenizer, draws: Draws
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """`mask_rows` in the order of draws of VL-BERT (`random_word_wwm`), VisualBERT, ViLBERT and LXMERT
    (`random_word`)."""
    ids, chosen = rows.ids.copy(), np.zeros(len(rows.ids), bool)
    group, rngs = len(rows) // len(draws), draws.generators(Stream.TOKENS)
    for number, (start, length) in enumerate(zip(rows.starts.tolist(), rows.lengths.tolist(), strict=True)):
        rng = rngs[number // group]
        at = start + np.flatnonzero(maskable[start : start + length])
        # Pieces of one word are neighbours.
        units = (
            np.split(at, np.flatnonzero(np.diff(_word_numbers(rows)[at])) + 1)
            if masking.whole_word and len(at)
            else at[:, None]
        )
        for places in units:
            draw = rng.random()
            if draw >= masking.rate:
                continue
            share = draw / masking.rate
            chosen[places] = True
            if share < masking.mask:
                ids[places] = tokenizer.mask
            elif share < masking.mask + masking.random:
                for place in places:
                    ids[place] = rng.integers(tokenizer.size)
    return ids, chosen


def _find_maskable(rows: TextRows, tokenizer: Tokenizer) -> NDArray[np.bool_]:
    maskable: NDArray[np.bool_]
    if rows.words is not None:
        maskable = rows.words >= 0
    else:
        maskable = ~np.isin(rows.ids, (tokenizer.pad, tokenizer.cls, tokenizer.sep))
    slots = [start + slot for start, slot in zip(rows.starts.tolist(), rows.answer_at, strict=True) if slot is not None]
    maskable[slots] = False
    return maskable


@dataclass(frozen=True, kw_only=True)
class RegionMasking:
    """Which regions are chosen to be predicted, and what replaces their features. Boxes always stay."""

    rate: float = 0.15
    """Probability that a region is chosen."""
    hide: float = 0.9
    """Share of the chosen whose feature becomes zeros."""
    random: float = 0.0
    """Share of the chosen that get the feature of a random region of the image of a random example (LXMERT); the rest
    stay as they are."""
    learned: bool = False
    """Say in `regions.hidden` which features are hidden, for models that put a learned vector in their place
    (VL-BERT)."""
    hide_overlapping: bool = False
    """Hide also every region that overlaps a hidden one by more than `overlap`; nothing is predicted about it unless it
    was chosen (12-in-1 paper)."""
    overlap: float = 0.4
    """Intersection over union, with both end pixels counted, above which two regions overlap."""
    whole: Literal["model", "visible", "unflagged"] = "model"
    """The whole-image feature. model: left to the model, which averages the features as they are (first ViLBERT
    release). visible: mean of those that are not hidden (VL-BERT). unflagged: their sum over the number of
    `whole_slots` that overlap no chosen region (multi-task ViLBERT)."""
    whole_slots: int = 36
    """Region slots of the multi-task ViLBERT release, padding included."""
    labels: Literal["chosen", "all"] = "chosen"
    """Regions whose class and attribute are predicted: all in LXMERT's release. Features are predicted for the chosen
    ones only."""
    mismatched: bool = True
    """Whether anything is predicted about the regions of a pair that does not match; see `TokenMasking.mismatched`."""

    def __post_init__(self) -> None:
        shares = {
            "rate": self.rate,
            "hide": self.hide,
            "random": self.random,
            "hide + random": self.hide + self.random,
            "overlap": self.overlap,
        }
        _check_shares("region masking", shares)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedImage:
    """What masking does to the regions of one image."""

    chosen: NDArray[np.bool_]
    """(R,) regions to predict."""
    hidden: NDArray[np.bool_]
    """(R,) feature hidden."""
    replaced: tuple[tuple[int, str, int], ...]
    """Region, and the image and region whose feature it gets."""
    overlapping: NDArray[np.bool_]
    """(R,) overlaps a chosen region, as every chosen one overlaps itself; all False where nothing reads it."""


def mask_regions(
    boxes: NDArray[np.float32],
    masking: RegionMasking,
    rng: np.random.Generator,
    *,
    pool: Sequence[str] = (),
    count: Callable[[str], int] | None = None,
) -> MaskedImage:
    """Choose regions of one image.

    One number per region decides whether it is chosen and what becomes of it; where it says random, the example and the
    region are drawn right after it. A drawn image without any region hides the feature instead.

    Args:
        boxes: (R, 4) pixel corners.
        pool: image of every training example; read if `masking.random` is not 0.
        count: number of regions of an image of the pool.
    Raises:
        ConfigError: random features without a pool.
    Source:
        ViLBERT, VL-BERT and LXMERT releases (`random_region`, `random_mask_region`, `random_feat`).
    """
    if masking.random and (not pool or count is None):
        raise ConfigError(
            "region masking: random features are taken from the images of other examples. "
            "Give their ids as `pool`, or set random=0."
        )
    number = len(boxes)
    if masking.random:
        assert count is not None
        chosen, hidden, replaced = _choose_in_turn(number, masking, rng, pool, count)
    else:
        draws = rng.random(number)  # the same numbers as if drawn one by one
        chosen = draws < masking.rate
        hidden, replaced = chosen & (draws / max(masking.rate, 1e-9) < masking.hide), ()
    overlapping = np.zeros(number, bool)
    if (masking.hide_overlapping or masking.whole == "unflagged") and chosen.any():
        corners = torch.from_numpy(np.asarray(boxes, np.float64))
        close = (geometry.iou(corners, corners, inclusive=True) > masking.overlap).numpy()
        overlapping = np.logical_or.reduce(close[chosen])
        if masking.hide_overlapping and hidden.any():
            hidden = hidden | np.logical_or.reduce(close[hidden])
            replaced = tuple(entry for entry in replaced if not hidden[entry[0]])
    return MaskedImage(chosen=chosen, hidden=hidden, replaced=replaced, overlapping=overlapping)


def _choose_in_turn(
    number: int, masking: RegionMasking, rng: np.random.Generator, pool: Sequence[str], count: Callable[[str], int]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], tuple[tuple[int, str, int], ...]]:
    chosen, hidden = np.zeros(number, bool), np.zeros(number, bool)
    replaced: list[tuple[int, str, int]] = []
    for region in range(number):
        draw = rng.random()
        if draw >= masking.rate:
            continue
        share = draw / masking.rate
        chosen[region], hidden[region] = True, share < masking.hide
        if masking.hide <= share < masking.hide + masking.random:
            image = pool[int(rng.integers(len(pool)))]
            regions = count(image)
            if regions:
                replaced.append((region, image, int(rng.integers(regions))))
            else:
                hidden[region] = True
    return chosen, hidden, tuple(replaced)


def hide_pixels(image: Tensor, boxes: NDArray[np.float32], hidden: NDArray[np.bool_]) -> Tensor:
    """A copy of an image in which the hidden regions are cut out, before any feature is computed from it.

    Zero is the mean colour once an image is normalised. Regions that overlap a hidden one, the whole image among them,
    see the hole too.

    Args:
        image: (3, H, W) normalised.
        boxes: (R, 4) corners in pixels of this image, after it was resized and flipped; the pixels of both corners
            belong to a box.
        hidden: (R,) `MaskedImage.hidden`; the whole image is never a hidden region.
    Source:
        VL-BERT release, end to end (`MASK_RAW_PIXELS`).
    """
    cut = image.clone()
    for x1, y1, x2, y2 in np.asarray(boxes, np.float64)[hidden].astype(np.int64):  # towards zero, as int() does
        cut[:, max(y1, 0) : max(y2 + 1, 0), max(x1, 0) : max(x2 + 1, 0)] = 0
    return cut
