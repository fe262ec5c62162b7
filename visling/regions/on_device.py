"""Region features that live on the device: batches carry the numbers of their rows, and the features are taken there.

Nothing but a few bytes per region is then copied from the host for each batch, and no disk is read after the start.

    table = load_features(store, device)
    batch, targets = Collator(FeatureRows(store), ...)(examples, draws)
    batch, targets = table.fill(batch.to(device), targets.to(device))

Row 0 holds zeros, the feature of padding and of hidden regions: masking writes row numbers just as it writes features.

Letters  M regions of the store, S region rows, R regions, F feature width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling.errors import ConfigError
from visling.regions.store import NativeStore, Orders
from visling.types import Batch, RegionArray, Targets

ROOM = 0.8
"""Share of a GPU's free memory that features may take; model, gradients and moments need the rest."""

_COPY_BYTES = 1 << 28
"""Read from the store and copied to the device at a time."""


class DeviceFeatures:
    """The features of a store in one tensor on the device; comes from `load_features`.

    Args:
        rows: (M + 1, F), the first of them zeros.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def fill(self, batch: Batch, targets: Targets) -> tuple[Batch, Targets]:
        """A batch and its targets on the device, made of `FeatureRows`, with the features that the rows mean."""
        if batch.regions is None:
            return batch, targets
        whole = batch.regions.whole
        regions = dataclasses.replace(
            batch.regions,
            features=self._take(batch.regions.features),
            whole=None if whole is None else self._average(whole),
        )
        if targets.region_features is not None:
            targets = dataclasses.replace(targets, region_features=self._take(targets.region_features))
        return dataclasses.replace(batch, regions=regions), targets

    def _take(self, numbers: Tensor) -> Tensor:
        """(S, R, 1) row numbers -> (S, R, F)."""
        return self.rows[numbers[..., 0]]

    def _average(self, whole: Tensor) -> Tensor:
        """What `describe_average` describes, (S, F) float32."""
        total = self.rows[whole[:, 1:].long()].sum(1, dtype=torch.float32)
        return total / whole[:, :1].float().clamp(min=torch.finfo(torch.float32).tiny)  # 0 in a row of padding


def describe_average(numbers: NDArray[np.int64], divisor: NDArray[np.float32]) -> NDArray[np.float64]:
    """A whole-image feature as the sum of rows (S, R, 1) over a divisor (S,): (S, 1 + R), the divisor first."""
    return np.concatenate([divisor[:, None], numbers[..., 0]], axis=1, dtype=np.float64)


class FeatureRows:
    """A view of a native store whose features are one number wide: that of their row in `DeviceFeatures`. The features
    of single images (`rows[image_id]`) are those of the store."""

    def __init__(self, store: NativeStore) -> None:
        self.store = store
        self.feature_size, self.fingerprint = store.feature_size, store.fingerprint

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, image_id: str) -> RegionArray:
        return self.store[image_id]

    def gather(
        self, image_ids: Sequence[str], max_regions: int | None = None, *, order: Orders = None
    ) -> dict[str, NDArray[Any]]:
        """See `store.gather`; features are (S, R, 1) row numbers."""
        return self.store.gather(image_ids, max_regions, order=order, numbered=True)

    def take(
        self, field: str, image_ids: Sequence[str], owners: NDArray[np.int64], regions: NDArray[np.int64]
    ) -> NDArray[Any] | None:
        """See `store.take`; features are (N, 1) row numbers."""
        if field == "features":
            return self.store.number_rows(image_ids, owners, regions)[:, None] + 1
        return self.store.take(field, image_ids, owners, regions)

    def count_regions(self, image_ids: Sequence[str]) -> NDArray[np.int64]:
        """See `store.count_regions`."""
        return self.store.count_regions(image_ids)


def load_features(store: NativeStore, device: torch.device) -> DeviceFeatures:
    """The features of a whole store on the device, in the store's own precision.

    Raises:
        ConfigError: they are larger than what `ROOM` leaves of the GPU's memory.
    """
    regions, dtype = int(store.manifest["regions"]), getattr(torch, store.fields["features"].dtype)
    needed = (regions + 1) * store.fields["features"].row_bytes
    if device.type == "cuda" and needed > ROOM * (free := torch.cuda.mem_get_info(device)[0]):
        raise ConfigError(
            f"the features of {store.path} take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of the GPU's memory are "
            f"free, of which they may take {ROOM:.0%}. Leave them on the disk: --set store_on_device=false."
        )
    rows = torch.zeros(regions + 1, store.feature_size, dtype=dtype, device=device)
    start = 1
    for block in store.feature_blocks(_COPY_BYTES):
        rows[start : start + len(block)] = torch.from_numpy(block).to(device)
        start += len(block)
    return DeviceFeatures(rows)
