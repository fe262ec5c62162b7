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
    cut_pixels: bool = True
    """Where features are computed from pixels while training: cut hidden regions out of the pictures (VL-BERT's
    release), or leave the pictures whole and let the model replace the features computed from them
    (`encoder.masks_features`). Those of overlapping regions and of the whole image then still show what is hidden."""
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
class MaskedRegions:
    """What masking does to the regions of several images."""

    chosen: NDArray[np.bool_]
    """(S, R) regions to predict."""
    hidden: NDArray[np.bool_]
    """(S, R) feature hidden."""
    replaced: NDArray[np.bool_]
    """(S, R) gets the feature of a random region."""
    donors: tuple[list[str], NDArray[np.int64]]
    """Image and region whose feature each replaced one gets, row by row."""
    overlapping: NDArray[np.bool_]
    """(S, R) overlaps a chosen region, as every chosen one overlaps itself; all False where nothing reads it."""


def count_numbers(masking: RegionMasking) -> int:
    """Random numbers that each region takes: one that decides what becomes of it, and, where features are replaced,
    the example and the region that its feature would come from."""
    return 3 if masking.random else 1


def mask_regions(
    boxes: NDArray[np.float32],
    real: NDArray[np.bool_],
    masking: RegionMasking,
    numbers: NDArray[np.float64],
    *,
    pool: Sequence[str] = (),
    count: Callable[[Sequence[str]], NDArray[np.int64]] | None = None,
) -> MaskedRegions:
    """Choose regions of several images at once.

    The first number of a region decides whether it is chosen and what becomes of it. An image without any region hides
    the feature that was to be taken from it.

    Args:
        boxes: (S, R, 4) pixel corners.
        real: (S, R).
        numbers: in [0, 1), `count_numbers` of each real region, region by region.
        pool: image of every training example; read if `masking.random` is not 0.
        count: numbers of regions of images of the pool.
    Raises:
        ConfigError: random features without a pool.
    Source:
        ViLBERT, VL-BERT and LXMERT releases (`random_region`, `random_mask_region`, `random_feat`), which draw region
        by region, an example and a region of it right after the number that decides.
    """
    if masking.random and (not pool or count is None):
        raise ConfigError(
            "region masking: random features are taken from the images of other examples. "
            "Give their ids as `pool`, or set random=0."
        )
    each = np.ones((*real.shape, count_numbers(masking)))
    each[real] = numbers.reshape(-1, each.shape[-1])
    chosen = real & (each[..., 0] < masking.rate)
    share = each[..., 0] / max(masking.rate, 1e-9)
    hidden = chosen & (share < masking.hide)
    replaced = chosen & ~hidden & (share < masking.hide + masking.random)
    donors: tuple[list[str], NDArray[np.int64]] = [], np.empty(0, np.int64)
    if count is not None and replaced.any():
        examples = (each[replaced][:, 1] * len(pool)).astype(np.int64)
        images = [pool[example] for example in examples.tolist()]
        counts = count(images)
        empty = np.zeros_like(replaced)
        empty[replaced] = counts == 0
        hidden, replaced = hidden | empty, replaced & ~empty
        usable = counts > 0
        donors = (
            [image for image, some in zip(images, usable.tolist(), strict=True) if some],
            (each[replaced][:, 2] * counts[usable]).astype(np.int64),
        )
    overlapping = np.zeros_like(real)
    if (masking.hide_overlapping or masking.whole == "unflagged") and chosen.any():
        overlapping, covered = _find_overlapping(boxes, real, chosen, hidden, masking.overlap)
        if masking.hide_overlapping:
            kept = ~covered[replaced]
            donors = [image for image, stays in zip(donors[0], kept.tolist(), strict=True) if stays], donors[1][kept]
            hidden, replaced = hidden | covered, replaced & ~covered
    return MaskedRegions(chosen=chosen, hidden=hidden, replaced=replaced, donors=donors, overlapping=overlapping)


def _find_overlapping(
    boxes: NDArray[np.float32],
    real: NDArray[np.bool_],
    chosen: NDArray[np.bool_],
    hidden: NDArray[np.bool_],
    overlap: float,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Regions (S, R) that overlap a chosen one, and those that overlap a hidden one; hidden ones are chosen."""
    rows, places = np.nonzero(chosen)
    corners = torch.from_numpy(np.asarray(boxes, np.float64))
    close = geometry.iou(corners[rows, places][:, None], corners[rows], inclusive=True)[:, 0].numpy() > overlap
    close &= real[rows]
    firsts = np.flatnonzero(np.diff(rows, prepend=-1))
    found = []
    for near in (close, close & hidden[rows, places][:, None]):
        every = np.zeros_like(real)
        every[rows[firsts]] = np.logical_or.reduceat(near, firsts)
        found.append(every)
    return found[0], found[1]


def hide_pixels(image: Tensor, boxes: NDArray[np.float32], hidden: NDArray[np.bool_]) -> Tensor:
    """A copy of an image in which the hidden regions are cut out, before any feature is computed from it.

    Zero is the mean colour once an image is normalised. Regions that overlap a hidden one, the whole image among them,
    see the hole too.

    Args:
        image: (3, H, W) normalised.
        boxes: (R, 4) corners in pixels of this image, after it was resized and flipped; the pixels of both corners
            belong to a box.
        hidden: (R,) of `MaskedRegions.hidden`; the whole image is never a hidden region.
    Source:
        VL-BERT release, end to end (`MASK_RAW_PIXELS`).
    """
    cut = image.clone()
    for x1, y1, x2, y2 in np.asarray(boxes, np.float64)[hidden].astype(np.int64):  # towards zero, as int() does
        cut[:, max(y1, 0) : max(y2 + 1, 0), max(x1, 0) : max(x2 + 1, 0)] = 0
    return cut
