"""Averaged weights: a second model that follows the one in training, a small step after every update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from visling.shards import complete, fill, local_parts


class WeightAverage:
    """Moving average of a model's trained parameters, which starts at their current values:

    average = momentum x average + (1 - momentum) x model

    Everything else, buffers and frozen parameters, is the model's own. A tensor that the model uses in two places is
    one parameter and is averaged once.

    Source:
        CVLP release, "fine-tuning with momentum".
    """

    def __init__(self, model: nn.Module, momentum: float) -> None:
        self._model, self._weight = model, 1 - momentum
        named = _trained(model)
        self._parameters = list(named.values())
        self._averages = {name: parameter.detach().clone() for name, parameter in named.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the model, in one fused call and without waiting for the device."""
        averages, parameters = local_parts(self._averages.values()), local_parts(self._parameters)
        torch._foreach_lerp_(averages, parameters, self._weight)

    @contextlib.contextmanager
    def in_place_of_model(self) -> Iterator[None]:
        """The model, whose parameters are complete, holds the averaged weights, to be validated or saved, and its own
        again afterwards, bit for bit."""
        parameters = _trained(self._model)
        kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        _fill(parameters, self.state_dict())
        try:
            yield
        finally:
            _fill(parameters, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the name of the parameter; of weights that are spread over processes, every process must
        ask."""
        return {name: complete(average) for name, average in self._averages.items()}

    def load_state_dict(self, averages: Mapping[str, Tensor]) -> None:
        """Continue from saved averages.

        Raises:
            KeyError, RuntimeError: they are those of another model.
        """
        _fill(self._averages, averages)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def _fill(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        fill(target, values[name])
