"""Regions of an image in another order than the store's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visling.errors import StoreError
from visling.regions.store import gather
from visling.types import RegionArray, RegionStore


def take_regions(image: RegionArray, chosen: NDArray[np.int64] | slice) -> RegionArray:
    """The chosen regions of an image, every field in their order."""
    fields = {name: getattr(image, name) for name in _PER_REGION}
    return dataclasses.replace(image, **{name: values[chosen] for name, values in fields.items() if values is not None})


class ByConfidence:
    """A view of a region store in which the most confident regions of every image come first.

    A region is as confident as the highest share of its class distribution, or, in a store without distributions, as
    its class; ties keep the store's order. Orders are cached, so a view is made for one batch and discarded.

    Source:
        VL-BERT release, `conceptual_captions.py`: by the maximum class score, background included.
    """

    def __init__(self, store: RegionStore) -> None:
        self.store = store
        self.feature_size, self.fingerprint = store.feature_size, store.fingerprint
        self._orders: dict[str, NDArray[np.int64]] = {}

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, image_id: str) -> RegionArray:
        """The regions of an image, every field in the new order.

        Raises:
            StoreError: no such image, or the store holds no confidence.
        """
        return take_regions(self.store[image_id], self._sort_image(image_id))

    def gather(self, image_ids: Sequence[str], max_regions: int | None = None) -> dict[str, NDArray[Any]]:
        """As `store.gather`: the `max_regions` most confident regions of each image."""
        gathered = gather(self.store, image_ids)
        counts = gathered["mask"].sum(1)
        most = max(
            int(counts.max(initial=0)) if max_regions is None else min(int(counts.max(initial=0)), max_regions), 1
        )
        order = np.broadcast_to(np.arange(gathered["mask"].shape[1]), gathered["mask"].shape).copy()
        for row, (image_id, count) in enumerate(zip(image_ids, counts, strict=True)):
            order[row, :count] = self._sort_image(image_id)
        sorted_fields = {
            name: np.take_along_axis(gathered[name], order[:, :most, None], axis=1) for name in ("features", "boxes")
        }
        return {**gathered, **sorted_fields, "mask": gathered["mask"][:, :most]}

    def _sort_image(self, image_id: str) -> NDArray[np.int64]:
        if image_id not in self._orders:
            image = self.store[image_id]
            scores = image.class_confidence if image.probs is None else image.probs.max(axis=1)
            if scores is None:
                raise StoreError(
                    "the preset reads the most confident regions first, but the region store holds neither class "
                    f"distributions nor confidences (image {image_id!r}). Extract regions with them, "
                    "or keep the store's order with --set encoder.region_order=store."
                )
            self._orders[image_id] = np.argsort(-scores.astype(np.float32), kind="stable")
        return self._orders[image_id]


_PER_REGION = tuple(field.name for field in dataclasses.fields(RegionArray) if field.name != "size")
