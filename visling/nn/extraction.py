"""What an encoder sees of a batch whose region features a jointly trained extractor computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from visling.types import Batch, FeatureExtractor, Loss


def extract_features(extractor: nn.Module | None, batch: Batch) -> tuple[Batch, Loss | None]:
    """The batch with features computed from its pixels, and the extractor's own loss, if it has one.

    Args:
        extractor: a `FeatureExtractor`; None = the features of the batch.
    """
    if extractor is None or batch.regions is None:
        return batch, None
    assert batch.pixels is not None, "an extractor needs a batch with pixels"
    regions, loss = cast(FeatureExtractor, extractor).describe(batch.regions, batch.pixels)
    return replace(batch, regions=regions), loss


def count_extracted(extractor: nn.Module | None, batch: Batch) -> Mapping[str, Tensor]:
    """What the terms of the extractor's own loss of this batch divide by, by name."""
    if extractor is None or batch.regions is None:
        return {}
    return cast(FeatureExtractor, extractor).count(batch.regions)
