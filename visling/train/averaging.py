"""Averaged weights: a second model that follows the one in training, a small step after every update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """Moving average of a model's trained parameters, which starts at their current values:

    average = momentum x average + (1 - momentum) x model

    Everything else, buffers and frozen parameters, is the model's own. A tensor that the model uses in two places is
    one parameter and is averaged once.

    Source:
        CVLP release, "fine-tuning with momentum".
    """

    def __init__(self, model: nn.Module, momentum: float) -> None:
        self._weight = 1 - momentum
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._names = list(named)
        self._parameters: list[Tensor] = list(named.values())
        self._averages = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the model, in one fused call and without waiting for the device."""
        torch._foreach_lerp_(self._averages, self._parameters, self._weight)

    @contextlib.contextmanager
    def in_place_of_model(self) -> Iterator[None]:
        """The model holds the averaged weights, to be validated or saved, and its own again afterwards, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            kept = average.clone()
            average.copy_(parameter)
            parameter.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the name of the parameter."""
        return dict(zip(self._names, self._averages, strict=True))

    @torch.no_grad()
    def load_state_dict(self, averages: Mapping[str, Tensor]) -> None:
        """Continue from saved averages.

        Raises:
            KeyError, RuntimeError: they are those of another model.
        """
        for name, average in zip(self._names, self._averages, strict=True):
            average.copy_(averages[name])
