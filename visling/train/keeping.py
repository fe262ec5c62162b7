"""Which models a run keeps, and when they are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from visling.train.averaging import WeightAverage
from visling.train.config import TrainConfig
from visling.train.state import RunFolder
from visling.train.weights import save_weights


class KeptModels:
    """The models that `config.keep` and `config.average` ask for.

    Args:
        folder: of the run; None = nothing is kept.
        write: writes the model as it stands into the folder it is given; None = its weights alone.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        config: TrainConfig,
        model: nn.Module,
        average: WeightAverage | None,
        write: Callable[[Path], None] | None,
    ) -> None:
        self._folder, self._config, self._average = folder, config, average
        self._write = (lambda at: save_weights(at, model)) if write is None else write
        self._last_at = -1  # step at which the last weights were written

    def keep_best(self) -> None:
        """The weights are the best so far."""
        if self._folder is not None and "best" in self._config.keep:
            self._folder.save_model(self._folder.model, self._write)

    def keep_average(self) -> None:
        """The averaged weights are the best so far."""
        if self._folder is not None and self._average is not None:
            with self._average.in_place_of_model():
                self._folder.save_model(self._folder.averaged, self._write)

    def keep_last(self, step: int) -> None:
        """Keep the weights of a step as the last ones, once."""
        if self._folder is None or self._last_at == step:
            return
        if "best" not in self._config.keep:
            self._folder.save_model(self._folder.model, self._write)
        elif "last" in self._config.keep:
            self._folder.save_model(self._folder.models / "last", self._write)
        self._last_at = step

    @property
    def keeps_epochs(self) -> bool:
        """Whether the weights after every epoch are kept."""
        return self._folder is not None and "epochs" in self._config.keep

    def keep_epoch(self, epoch: int) -> None:
        """Keep the weights after an epoch, counted from 1."""
        assert self._folder is not None
        self._folder.save_model(self._folder.models / f"epoch-{epoch:04d}", self._write)
