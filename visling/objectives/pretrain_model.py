"""An encoder with weighted pre-training objectives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from visling.nn.extraction import count_extracted, extract_features
from visling.objectives.base import Objective, PretrainStep
from visling.types import NOTHING, Batch, Loss, Targets


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

    def after_skip(self) -> None:
        """Tell every objective that an update was left out."""
        for objective in self.all_objectives():
            objective.after_skip()

    def forward(self, batch: Batch, targets: Targets) -> Loss:
        """Weighted sum of the objectives' losses on one batch, and the extractor's own, if it has one; in training, an
        objective of weight 0 is not computed."""
        batch, own = extract_features(self.extractor, batch)
        step = self.encode(batch, targets)
        losses: list[Loss] = [objective(step).scaled(self.weights[name]) for name, objective in self._active()]
        return sum(losses[1:] if own is None else [*losses[1:], own], start=losses[0])

    def count(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        """What the terms of the loss of a batch divide by, by name."""
        counts = dict(count_extracted(self.extractor, batch))
        for _, objective in self._active():
            assert isinstance(objective, Objective)
            counts.update(objective.count(batch, targets))
        return counts

    def encode(self, batch: Batch, targets: Targets) -> PretrainStep:
        """What the objectives see of a batch: the states that they read."""
        reads = NOTHING
        for _, objective in self._active():
            assert isinstance(objective, Objective)
            reads |= objective.reads_of_encoded(batch, targets)
        encoded = self.encoder(batch, reads=reads)
        return PretrainStep(model=self.encoder, batch=batch, encoded=encoded, targets=targets)

    def _active(self) -> Iterator[tuple[str, nn.Module]]:
        return (
            (name, objective) for name, objective in self.objectives.items() if self.weights[name] or not self.training
        )
