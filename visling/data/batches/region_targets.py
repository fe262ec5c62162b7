"""Regions of a batch as pre-training shows them, and the targets about them.

Letters  B batch rows, S region rows, R regions, Q region slots, F feature width, C detector classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling.data.batches.masking import RegionMasking, count_numbers, mask_regions
from visling.draws import Draws, Stream
from visling.errors import StoreError
from visling.regions.store import NativeStore, Orders, count_regions, take
from visling.types import IGNORE, RegionStore, Slots

VISIBLE_SHARE = 1e-5
"""Added to the number of visible regions once some are hidden (VL-BERT release, whole-image feature)."""

DETECTED = {
    "region_probs": ("probs", "class distributions"),
    "region_classes": ("classes", "classes"),
    "region_attributes": ("attributes", "attributes"),
    "region_weights": ("class_confidence", "confidences of classes"),
    "attribute_weights": ("attribute_confidence", "confidences of attributes"),
}
"""Region target -> field of the store, and what it holds."""

REGION_TARGETS = frozenset({"class_slots", "feature_slots", "region_features", *DETECTED})
"""`Targets` fields that are computed from regions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What masking did to the regions of a batch."""

    chosen: NDArray[np.bool_]
    """(S, R) regions to predict."""
    hidden: NDArray[np.bool_]
    """(S, R) feature hidden."""
    overlapping: NDArray[np.bool_]
    """(S, R) overlaps a chosen region, itself included; all False where nothing reads it."""


def hide_regions(
    features: NDArray[Any],
    boxes: NDArray[np.float32],
    real: NDArray[np.bool_],
    masking: RegionMasking,
    draws: Draws,
    *,
    store: RegionStore,
    pool: Sequence[str],
    max_regions: int,
) -> Shown:
    """Choose regions and change their features in place.

    Args:
        features: (S, R, F).
        boxes: (S, R, 4) pixel corners.
        real: (S, R).
        draws: of N examples, each of which has S / N images side by side.
        store, pool: where the features of random regions come from, and the image of every training example.
        max_regions: most regions per image.
    """

    def count(images: Sequence[str]) -> NDArray[np.int64]:
        return np.minimum(count_regions(store, images), max_regions)

    counts = real.reshape(len(draws), -1).sum(1) * count_numbers(masking)
    masked = mask_regions(boxes, real, masking, draws.flat(Stream.REGIONS, counts), pool=pool, count=count)
    images, regions = masked.donors
    if images:
        features[masked.replaced] = take(store, "features", images, np.arange(len(images)), regions)
    features[masked.hidden] = 0
    return Shown(chosen=masked.chosen, hidden=masked.hidden, overlapping=masked.overlapping)


def whole_image(
    features: NDArray[Any],
    real: NDArray[np.bool_],
    shown: Shown | None,
    kind: Literal["visible", "unflagged"],
    slots: int,
) -> NDArray[np.float32]:
    """Whole-image feature (S, F) of features (S, R, F) as masking left them, 0 where they are hidden or padding; see
    `RegionMasking.whole`."""
    total: NDArray[np.float32] = _sum_regions(torch.from_numpy(features)).numpy()
    total /= count_averaged(real, shown, kind, slots)[:, None]
    return total


def count_averaged(
    real: NDArray[np.bool_], shown: Shown | None, kind: Literal["visible", "unflagged"], slots: int
) -> NDArray[np.float32]:
    """(S,) by what the sum of an image's features is divided to get that of the whole image."""
    if kind == "visible":
        number = (real if shown is None else real & ~shown.hidden).sum(1, dtype=np.float32)
        if shown is not None:
            number += np.float32(VISIBLE_SHARE) * shown.hidden.any(1)
    else:
        number = np.float32(slots) - (0 if shown is None else shown.overlapping.sum(1, dtype=np.float32))
    return np.where(number > 0, number, np.float32(1))


_SUMMED_TOGETHER = 4
"""Images that are converted to float32 at a time: no more than fits into a core's cache."""


def _sum_regions(features: Tensor) -> Tensor:
    """(S, R, F) half or float -> (S, F) float32. Summing halves themselves takes ten times as long."""
    total = torch.empty(features.shape[0], features.shape[2])
    wide = torch.empty(min(_SUMMED_TOGETHER, len(features)), *features.shape[1:])
    for first in range(0, len(features), _SUMMED_TOGETHER):
        part = features[first : first + _SUMMED_TOGETHER]
        torch.sum(wide[: len(part)].copy_(part), 1, out=total[first : first + len(part)])
    return total


def check_labels(store: NativeStore, target: str, number: int) -> None:
    """Refuse a store with labels beyond a table of `number` entries, before they reach a loss.

    Args:
        target: a target that is a label, `region_classes` or `region_attributes`.
    Raises:
        StoreError: names an image and its label.
    """
    field, what = DETECTED[target]
    highest = store.highest(field)
    if highest is not None and highest[1] >= number:
        image, label = highest
        raise StoreError(
            f"region store {store.path}: image {image!r} has a region with label {label} among its {what}, "
            f"but there are {number} of them, counted from 0. "
            f"Extract its regions again, or give region_losses the number of {what} that the detector knows."
        )


def detected(name: str, store: RegionStore, image_ids: Sequence[str], order: Orders, slots: Slots) -> Tensor:
    """What the detector predicted for the regions at the slots, as the `Targets` field `name`; labels of free slots are
    IGNORE, numbers 0.

    Of several attributes per region the first counts, which is the most confident one.

    Args:
        image_ids: of each batch row.
        order: see `store.gather`.
        slots: (B, Q).
    Returns:
        (B, Q), or (B, Q, C) for `region_probs`.
    Raises:
        StoreError: the store lacks the field.
    """
    field, what = DETECTED[name]
    at, mask = slots.at.numpy(), slots.mask.numpy()
    owners, regions = np.nonzero(mask)[0], at[mask]
    if order is not None:
        chosen = [order[owner] for owner in owners.tolist()]
        pairs = zip(chosen, regions.tolist(), strict=True)
        regions = np.array([region if own is None else own[region] for own, region in pairs], np.int64)
    found = take(store, field, image_ids, owners, regions)
    if found is None:
        raise StoreError(
            f"the region store holds no {what}, from which {name} is computed. Extract or convert regions with them, "
            "or choose region losses that the store can answer."
        )
    if field.startswith("attribute") and found.ndim > 1:
        found = found[:, 0]
    labels = np.issubdtype(found.dtype, np.integer)
    values = np.full((*at.shape, *found.shape[1:]), IGNORE if labels else 0, np.int64 if labels else np.float32)
    values[mask] = found
    if labels:
        values[values < 0] = IGNORE
    return torch.from_numpy(values)
