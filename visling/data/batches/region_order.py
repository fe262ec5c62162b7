"""Regions of an image in another order than the store's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visling.errors import StoreError
from visling.regions.store import Orders, count_regions, gather, take
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

    def gather(
        self, image_ids: Sequence[str], max_regions: int | None = None, *, order: Orders = None
    ) -> dict[str, NDArray[Any]]:
        """See `store.gather`; the numbers in `order` count from the most confident region."""
        return gather(self.store, image_ids, max_regions, order=self._compose(image_ids, order))

    def take(
        self, field: str, image_ids: Sequence[str], owners: NDArray[np.int64], regions: NDArray[np.int64]
    ) -> NDArray[Any] | None:
        """See `store.take`; `regions` count from the most confident one."""
        orders = [self._sort_image(image_id) for image_id in image_ids]
        stored = [orders[owner][region] for owner, region in zip(owners.tolist(), regions.tolist(), strict=True)]
        return take(self.store, field, image_ids, owners, np.array(stored, np.int64))

    def count_regions(self, image_ids: Sequence[str]) -> NDArray[np.int64]:
        """See `store.count_regions`."""
        return count_regions(self.store, image_ids)

    def _compose(self, image_ids: Sequence[str], order: Orders) -> list[NDArray[np.int64]]:
        """The store's numbers of the regions that are shown of each image."""
        sorted_ = [self._sort_image(image_id) for image_id in image_ids]
        if order is None:
            return sorted_
        return [own if chosen is None else own[chosen] for own, chosen in zip(sorted_, order, strict=True)]

    def _sort_image(self, image_id: str) -> NDArray[np.int64]:
        if image_id not in self._orders:
            image = self.store[image_id]
            scores = image.class_confidence if image.probs is None else _find_highest(image.probs)
            if scores is None:
                raise StoreError(
                    "the preset reads the most confident regions first, but the region store holds neither class "
                    f"distributions nor confidences (image {image_id!r}). Extract regions with them, "
                    "or keep the store's order with --set encoder.region_order=store."
                )
            self._orders[image_id] = np.argsort(-scores.astype(np.float32), kind="stable")
        return self._orders[image_id]


def _find_highest(probs: NDArray[Any]) -> NDArray[Any]:
    """The highest share of each class distribution, or a number that is higher where that is."""
    # Halves that are not negative are in the order of their bits, which NumPy compares thirty times as fast.
    highest: NDArray[Any] = (probs.view(np.int16) if probs.dtype == np.float16 else probs).max(axis=1)
    return highest


_PER_REGION = tuple(field.name for field in dataclasses.fields(RegionArray) if field.name != "size")
