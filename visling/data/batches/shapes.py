"""Few shapes: a batch whose lengths and counts are rounded up, so that compiled and captured steps are reused.

Every size is rounded up to a share of the largest that it can have: the whole, 3/4, 1/2, 3/8, 1/4, ... The numbers of
real positions, which decide how much is computed, are rounded more finely, the more finely the more rows there are:
sums over many rows vary little.

Letters  B batch rows, S region rows, T tokens, R regions, P slots, K slots of the batch that are read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visling.types import IGNORE, Batch, InputSpec, Regions, Slots, Targets, Text

FEWEST_SLOTS = 8
"""Slots of a row are at least this many: fewer save nothing and are one more shape."""

_AT_SLOTS: Mapping[str, tuple[str, ...]] = {
    "token_slots": ("token_ids",),
    "class_slots": ("region_probs", "region_classes", "region_attributes", "region_weights", "attribute_weights"),
    "feature_slots": (),
}
"""Slots of `Targets` -> the fields that have one entry for each of them, (B, P, ...)."""


def round_up(number: int, whole: int, *, steps: int = 2) -> int:
    """The least share of `whole` that is not below `number`, itself rounded up to a whole number.

    Args:
        number: 0 to `whole`.
        steps: shares per doubling, at equal distances; what is added is at most number / steps + 1.
    """
    if not number:
        return 0
    halvings = (whole // number).bit_length() - 1  # the number lies between a half and the whole of what is left
    unit: float = whole / (2 * steps << halvings)
    return math.ceil(unit * math.ceil(number / unit))


def steps_of(rows: int) -> int:
    """Shares per doubling for sums over so many rows: 4 for less than 256, then twice as many for four times the rows,
    as such sums spread by the root of their number."""
    return 1 << max(2, (rows.bit_length() - 1) // 2 - 1)


def give_few_shapes(batch: Batch, targets: Targets, spec: InputSpec) -> tuple[Batch, Targets]:
    """The same examples in a batch of rounded sizes that says how many tokens and regions are real (`Text.count`,
    `Regions.count`); what is added is padding. A batch with pixels is returned as it is: its images have sizes of their
    own.

    Args:
        batch: on the CPU, real tokens and regions first in every row.
        spec: how long a text can be and how many regions an image can have.
    """
    if batch.pixels is not None:
        return batch, targets
    tokens, rows = batch.text.ids.shape[1], len(batch.text.ids if batch.text.row is None else batch.text.row)
    width = round_up(tokens, max(spec.max_tokens, tokens))
    most = 0
    regions = batch.regions
    if regions is not None:
        images = math.ceil(regions.mask.shape[1] / spec.max_regions)  # several, where those of a row are joined
        most = round_up(regions.mask.shape[1], images * spec.max_regions)
    phrases = None if batch.phrases is None else _widen_slots(batch.phrases, width)
    widened = dataclasses.replace(
        batch,
        text=_widen_text(batch.text, width),
        regions=None if regions is None else _widen_regions(regions, most, rows),
        links=None if batch.links is None else _pad(batch.links, {1: width, 2: most}),
        phrases=phrases,
    )
    changed: dict[str, Any] = {}
    for name, positions in (("token_slots", width), ("class_slots", most), ("feature_slots", most)):
        slots = getattr(targets, name)
        if slots is not None:
            changed[name] = _widen_slots(slots, positions)
            for label in _AT_SLOTS[name]:
                changed[label] = _pad_label(getattr(targets, label), {1: changed[name].at.shape[1]})
    if regions is not None:
        changed["region_features"] = _pad_label(targets.region_features, {1: most})
        for label in ("region_scores", "object_classes"):
            changed[label] = _widen_candidates(getattr(targets, label), regions, most)
    if phrases is not None:
        changed["phrase_boxes"] = _pad_label(targets.phrase_boxes, {1: phrases.at.shape[1], 2: most})
    return widened, dataclasses.replace(targets, **changed)


def _count(mask: Tensor) -> int:
    return round_up(int(mask.sum()), mask.numel(), steps=steps_of(len(mask)))


def _widen_text(text: Text, width: int) -> Text:
    mask = _pad(text.mask, {1: width})
    return dataclasses.replace(
        text,
        ids=_pad(text.ids, {1: width}),
        mask=mask,
        segments=_pad(text.segments, {1: width}),
        count=_count(mask),
        shared=None if text.row is None else _count(mask[text.row]),
    )


def _widen_regions(regions: Regions, most: int, rows: int) -> Regions:
    """Regions of `most` columns and, where `rows` text rows share them, of a rounded number of region rows."""
    region_rows = len(regions.mask)
    if regions.row is not None:
        region_rows = round_up(region_rows, max(rows, region_rows))
    both, first = {0: region_rows, 1: most}, {0: region_rows}
    # Of a store on the device, what describes the average has one number for each region and one more
    whole_sizes = first if regions.features.is_floating_point() else {0: region_rows, 1: 1 + most}
    mask = _pad(regions.mask, both)
    return dataclasses.replace(
        regions,
        features=_pad(regions.features, both),
        boxes=_pad(regions.boxes, both),
        mask=mask,
        size=_pad(regions.size, first, value=1.0),
        whole=None if regions.whole is None else _pad(regions.whole, whole_sizes),
        hidden=None if regions.hidden is None else _pad(regions.hidden, both),
        image=None if regions.image is None else _pad(regions.image, both),
        labels=None if regions.labels is None else _pad(regions.labels, both),
        count=_count(mask),
        shared=None if regions.row is None else _count(mask[regions.row]),
    )


def _widen_slots(slots: Slots, positions: int) -> Slots:
    """The slots of rows of `positions`; their numbers double from size to size, as heads cost little."""
    number = max(slots.at.shape[1], min(FEWEST_SLOTS, positions))
    width = round_up(number, max(positions, number), steps=1)
    mask, taken = _pad(slots.mask, {1: width}), slots.taken
    if taken is not None:
        chosen = torch.cat([mask.flatten().nonzero()[:, 0], (~mask).flatten().nonzero()[:, 0]])
        taken = chosen[: round_up(max(int(mask.sum()), 1), len(mask) * positions, steps=1)]
    return Slots(at=_pad(slots.at, {1: width}), mask=mask, taken=taken)


def _widen_candidates(labels: Tensor | None, regions: Regions, most: int) -> Tensor | None:
    """Labels (B, R) of the regions, or (B, R + 1) with one of the whole image."""
    if labels is None:
        return None
    extra = labels.shape[1] - regions.mask.shape[1]
    if not regions.mask.any():
        extra = 1  # of images without a region, the one label is that of the whole image
    return _pad_label(labels, {1: most + extra})


def _pad_label(labels: Tensor | None, sizes: Mapping[int, int]) -> Tensor | None:
    """Padded with IGNORE if they are integers, else with zeros."""
    if labels is None:
        return None
    return _pad(labels, sizes, value=0 if labels.is_floating_point() else IGNORE)


def _pad(tensor: Tensor, sizes: Mapping[int, int], *, value: float = 0) -> Tensor:
    """Padded behind each dimension that is named, to its size; the tensor itself where nothing is missing."""
    shape = [sizes.get(dimension, size) for dimension, size in enumerate(tensor.shape)]
    if shape == [*tensor.shape]:
        return tensor
    array = tensor.numpy()  # whose copies take a fifth of the time of torch's
    padded = np.full(shape, value, array.dtype) if value else np.zeros(shape, array.dtype)
    padded[tuple(map(slice, array.shape))] = array
    return torch.from_numpy(padded)
