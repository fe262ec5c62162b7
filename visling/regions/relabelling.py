"""Label noise: a copy of a store in which the detector is wrong about a share of the regions.

Their class, attribute and class distribution are replaced; features, boxes and confidences stay, so that a model sees
the same images and only what it learns to predict about them differs.

Letters  R regions of an image, K attributes kept per region, C columns of the class distribution.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visling.errors import StoreError
from visling.regions.copying import Progress, change
from visling.regions.store import NativeStore
from visling.runtime import generator_for
from visling.types import RegionArray


def replace_labels(
    store: NativeStore,
    share: float,
    path: str | Path,
    *,
    seed: int = 0,
    resume: bool = False,
    progress: Progress | None = None,
) -> NativeStore:
    """A copy of a store in which a share of all regions has other labels.

    Each region is chosen with probability `share` by numbers that depend on the seed and the image id alone: a larger
    share relabels the same regions and more. A chosen one gets a class drawn evenly from all others, and the
    probabilities of the two are exchanged in its class distribution. It gets another first attribute too; a region
    without attributes stays without. The manifest's settings say `label_noise` and `label_noise_seed`.

    Args:
        share: from 0 to 1.
        resume: continue an interrupted copy.
    Raises:
        StoreError: a share outside of that, a store without classes or with fewer than two, or `path` already holds a
            store.
    """
    if not 0 <= share <= 1:
        raise StoreError(f"label noise is a share of the regions from 0 to 1; found {share:g}.")
    names = {"classes": len(store.class_names), "attributes": len(store.attribute_names)}
    if "classes" not in store.fields:
        raise StoreError(
            f"{store.path} holds no classes of regions, which label noise replaces. Extract regions with a detector "
            "that names them."
        )
    for field, number in names.items():
        if field in store.fields and number < 2:
            raise StoreError(
                f"{store.path} holds {field} of regions and names {number} of them: label noise puts another one in "
                "the place of each. Extract regions with a detector that names two or more."
            )

    def relabel(image_id: str, regions: RegionArray) -> RegionArray:
        draws = generator_for(seed, zlib.crc32(image_id.encode())).random((len(regions), 3))
        chosen = draws[:, 0] < share
        changed: dict[str, Any] = {}
        assert regions.classes is not None
        old = regions.classes
        new = changed["classes"] = _draw_others(old, chosen, draws[:, 1], names["classes"])
        if regions.probs is not None:
            changed["probs"] = _exchange_columns(regions.probs, old, new)
        if regions.attributes is not None and len(regions):
            kept = regions.attributes.reshape(len(regions), -1)  # a store with one per region may keep them as (R,)
            other = _draw_others(kept[:, 0], chosen, draws[:, 2], names["attributes"])
            changed["attributes"] = _exchange_entries(kept, kept[:, 0], other).reshape(regions.attributes.shape)
        return replace(regions, **changed)

    return change(
        store,
        path,
        relabel,
        settings={"label_noise": share, "label_noise_seed": seed},
        resume=resume,
        progress=progress,
    )


def _draw_others(
    labels: NDArray[Any], chosen: NDArray[np.bool_], draws: NDArray[np.float64], number: int
) -> NDArray[Any]:
    """The labels (R,), those that are chosen replaced by one of the others, each equally likely; -1, no label, stays.

    Args:
        draws: (R,) numbers in [0, 1).
        number: of labels, counted from 0.
    """
    steps = 1 + (draws * (number - 1)).astype(np.int64)
    return np.where(chosen & (labels >= 0), (labels + steps) % number, labels).astype(labels.dtype)


def _exchange_columns(probs: NDArray[Any], one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """Class distributions (R, C) in which the probabilities of two classes (R,) of each row are exchanged. The
    background, if they have it, is the last column, which no class names."""
    exchanged, rows = probs.copy(), np.arange(len(probs))
    exchanged[rows, one], exchanged[rows, other] = probs[rows, other], probs[rows, one]
    return exchanged


def _exchange_entries(attributes: NDArray[Any], first: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """Attributes (R, K) with another one in front; where it was among the rest, the old one takes its place."""
    exchanged = np.where(attributes == other[:, None], first[:, None], attributes)
    exchanged[:, 0] = other
    return exchanged
