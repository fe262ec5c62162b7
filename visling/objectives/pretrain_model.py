"""An encoder with weighted pre-training objectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Protocol, cast

from torch import nn

from visling.objectives.base import Objective, PretrainStep
from visling.types import Batch, Loss, Pixels, Regions, Targets


class FeatureExtractor(Protocol):
    """A module that computes the regions' features from the pixels of a batch."""

    def describe(self, regions: Regions, pixels: Pixels) -> Regions:
        """The regions with features computed from the pixels."""
        ...


class PretrainModel(nn.Module):
    """An encoder with its pre-training objectives; the loss is the weighted sum of theirs.

    Args:
        extractor: a `FeatureExtractor` that is trained jointly; None = the features of the batch.
    """

    def __init__(
        self,
        encoder: nn.Module,
        objectives: Mapping[str, Objective],
        weights: Mapping[str, float],
        extractor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.extractor = extractor
        self.objectives = nn.ModuleDict(dict(objectives))
        self.weights = dict(weights)

    def all_objectives(self) -> Iterator[Objective]:
        """The objectives, in their order."""
        for objective in self.objectives.children():
            assert isinstance(objective, Objective)
            yield objective

    def after_update(self) -> None:
        """Tell every objective that the optimiser has moved the weights."""
        for objective in self.all_objectives():
            objective.after_update()

    def forward(self, batch: Batch, targets: Targets) -> Loss:
        """Weighted sum of the objectives' losses on one batch; in training, one of weight 0 is not computed."""
        batch = self.seen(batch)
        step = PretrainStep(model=self.encoder, batch=batch, encoded=self.encoder(batch), targets=targets)
        losses: list[Loss] = [objective(step).scaled(self.weights[name]) for name, objective in self._active()]
        return sum(losses[1:], start=losses[0])

    def seen(self, batch: Batch) -> Batch:
        """The batch as the encoder reads it: with features computed from its pixels, if there is an extractor."""
        if self.extractor is None or batch.regions is None:
            return batch
        assert batch.pixels is not None, "an extractor needs a batch with pixels"
        return dataclasses.replace(
            batch, regions=cast(FeatureExtractor, self.extractor).describe(batch.regions, batch.pixels)
        )

    def _active(self) -> Iterator[tuple[str, nn.Module]]:
        return (
            (name, objective) for name, objective in self.objectives.items() if self.weights[name] or not self.training
        )
