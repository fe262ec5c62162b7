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

from visling.data.batches.masking import RegionMasking, mask_regions
from visling.errors import StoreError
from visling.regions.store import NativeStore
from visling.types import IGNORE, RegionArray, RegionStore, Slots

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
    rngs: Sequence[np.random.Generator],
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
        rngs: generator of each region row.
        store, pool: where the features of random regions come from, and the image of every training example.
        max_regions: most regions per image.
    """
    shown = Shown(chosen=np.zeros_like(real), hidden=np.zeros_like(real), overlapping=np.zeros_like(real))

    def count(image: str) -> int:
        return min(len(store[image]), max_regions)

    for row, (rng, number) in enumerate(zip(rngs, real.sum(1), strict=True)):
        masked = mask_regions(boxes[row, :number], masking, rng, pool=pool, count=count)
        for place, image, region in masked.replaced:
            features[row, place] = store[image].features[region]
        shown.chosen[row, :number], shown.hidden[row, :number] = masked.chosen, masked.hidden
        shown.overlapping[row, :number] = masked.overlapping
    features[shown.hidden] = 0
    return shown


def whole_image(
    features: NDArray[Any],
    real: NDArray[np.bool_],
    shown: Shown | None,
    kind: Literal["visible", "unflagged"],
    slots: int,
) -> NDArray[np.float32]:
    """Whole-image feature (S, F) of features (S, R, F) as masking left them; see `RegionMasking.whole`."""
    counted = real if shown is None else real & ~shown.hidden
    if kind == "visible":
        number = counted.sum(1, dtype=np.float32)
        if shown is not None:
            number += np.float32(VISIBLE_SHARE) * shown.hidden.any(1)
    else:
        number = np.float32(slots) - (0 if shown is None else shown.overlapping.sum(1, dtype=np.float32))
        number = np.where(number > 0, number, np.float32(1))
    total = np.where(counted[..., None], features, features.dtype.type(0)).sum(1, dtype=np.float32)
    mean: NDArray[np.float32] = total / np.where(number > 0, number, np.float32(1))[:, None]
    return mean


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


def detected(name: str, images: Sequence[RegionArray], slots: Slots) -> Tensor:
    """What the detector predicted for the regions at the slots, as the `Targets` field `name`; labels of free slots are
    IGNORE, numbers 0.

    Of several attributes per region the first counts, which is the most confident one.

    Args:
        images: regions of each batch row.
        slots: (B, Q).
    Returns:
        (B, Q), or (B, Q, C) for `region_probs`.
    Raises:
        StoreError: the store lacks the field.
    """
    field, what = DETECTED[name]
    at, mask = slots.at.numpy(), slots.mask.numpy()
    arrays = [getattr(image, field) for image in images]
    if any(array is None for array in arrays):
        raise StoreError(
            f"the region store holds no {what}, from which {name} is computed. Extract or convert regions with them, "
            "or choose region losses that the store can answer."
        )
    if field.startswith("attribute"):
        arrays = [array if array.ndim == 1 else array[:, 0] for array in arrays]
    labels = np.issubdtype(arrays[0].dtype, np.integer)
    values = np.full((*at.shape, *arrays[0].shape[1:]), IGNORE if labels else 0, np.int64 if labels else np.float32)
    for row, array in enumerate(arrays):
        values[row, mask[row]] = array[at[row, mask[row]]]
    if labels:
        values[values < 0] = IGNORE
    return torch.from_numpy(values)
