"""Regions that are at hand, in place of a store on disk."""

from __future__ import annotations

from collections.abc import Sequence

from visling.types import RegionArray


class GivenRegions:
    """A region store of the images at hand, numbered from 0."""

    def __init__(self, regions: Sequence[RegionArray], fingerprint: str) -> None:
        self.regions, self.fingerprint = regions, fingerprint
        self.feature_size = int(regions[0].features.shape[1])

    def __contains__(self, image_id: str) -> bool:
        return True

    def __getitem__(self, image_id: str) -> RegionArray:
        return self.regions[int(image_id)]

    def __len__(self) -> int:
        return len(self.regions)
