"""What a pre-training objective is: a loss over what an encoder returned, with its own head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from visling.errors import ConfigError
from visling.types import Batch, Dims, Encoded, Loss, Targets


@dataclass(frozen=True, slots=True)
class PretrainStep:
    """One forward pass, as every objective sees it."""

    model: nn.Module
    """The encoder itself: contrastive objectives run it again on other inputs."""
    batch: Batch
    encoded: Encoded
    targets: Targets


class Objective(nn.Module, ABC):
    """A loss over encoder states. Pre-training is an encoder plus a list of weighted objectives.

    A subclass builds its own head in `__init__(dims, style, words)`: widths of the encoder, style name of the head, word embeddings to tie to.
    """

    needs: ClassVar[frozenset[str]]
    """`Targets` fields that must be present; masking and collate fill what is asked for."""

    @abstractmethod
    def __init__(self, dims: Dims, style: str, words: nn.Embedding) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, step: PretrainStep) -> Loss:
        """The loss of one step."""

    def after_update(self) -> None:
        """Called after every optimiser update; only slowly following networks and queues do something here."""

    def check(self, targets: Targets) -> None:
        """Raise `ConfigError` if a target that this objective reads was not made."""
        missing = sorted(name for name in self.needs if getattr(targets, name) is None)
        if missing:
            raise ConfigError(
                f"{type(self).__name__} needs the targets {', '.join(missing)}, which the batch lacks. "
                "Ask the loader for them: masking makes token and region slots, the pair source makes `matched`."
            )
