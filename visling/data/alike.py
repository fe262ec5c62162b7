"""Images that look alike: the nearest ones by the mean feature of their regions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from visling.types import RegionStore

_ROWS = 1024
"""Images that are compared with all others at a time."""


def nearest_images(store: RegionStore, images: Sequence[str], count: int) -> dict[str, tuple[str, ...]]:
    """Image -> the `count` images whose mean region features are nearest to its own, the nearest first; equally near
    ones in the order of the list.

    Args:
        images: different ids of the store.
    Source:
        ViLBERT section 3.2 (retrieval: the 100 nearest images by visual features); the release ships the result.
    """
    means = np.stack([_average_regions(store, image) for image in images])  # (I, F)
    lengths = (means**2).sum(1)
    found: dict[str, tuple[str, ...]] = {}
    for start in range(0, len(images), _ROWS):
        rows = slice(start, start + _ROWS)
        distances = lengths[rows, None] - 2 * means[rows] @ means.T + lengths  # squared
        distances[np.arange(len(distances)), np.arange(start, start + len(distances))] = np.inf
        order = np.argsort(distances, axis=1, kind="stable")[:, : min(count, len(images) - 1)]
        found |= {images[start + at]: tuple(images[other] for other in row) for at, row in enumerate(order.tolist())}
    return found


def _average_regions(store: RegionStore, image: str) -> NDArray[np.float32]:
    """(F,) zeros for an image without a region."""
    features = store[image].features
    if not len(features):
        return np.zeros(store.feature_size, np.float32)
    mean: NDArray[np.float32] = features.mean(0, dtype=np.float32)
    return mean
