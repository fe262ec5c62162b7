"""A batch together with what it was made of, for whoever explains what a model makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from visling.types import Batch, Example, RegionArray


@dataclass(frozen=True, kw_only=True)
class ShownExamples:
    """Examples that go through a model together."""

    numbers: Sequence[int]
    """Of the records in their data set."""
    records: Sequence[Any]
    """Of the task."""
    examples: Sequence[Example]
    batch: Batch
    """On the model's device, features computed; rows may share texts and regions (`Batch.unshared`)."""
    regions: Sequence[Sequence[RegionArray]]
    """Of each example: the regions of each of its images, as stored; none for a model of the words alone."""
