"""What a pre-training objective is: a loss over what an encoder returned, with its own head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from visling.errors import ConfigError
from visling.types import EVERYTHING, Batch, Dims, Encoded, Loss, Reads, Targets


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

    A subclass builds its own head in `__init__(dims, style, words)`: widths of the encoder, style name of the head,
    word embeddings to tie to.
    """

    needs: ClassVar[frozenset[str]]
    """`Targets` fields that must be present; masking and collate fill what is asked for."""

    @abstractmethod
    def __init__(self, dims: Dims, style: str, words: nn.Embedding) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, step: PretrainStep) -> Loss:
        """The loss of one step."""

    @abstractmethod
    def count(self, batch: Batch, targets: Targets) -> Mapping[str, Tensor]:
        """What the terms of the loss of this batch divide by, by name; known before anything is computed."""

    def after_update(self) -> None:
        """Called after every optimiser update; only momentum copies and queues do something here."""

    def after_skip(self) -> None:
        """Called in place of `after_update` where an update was left out: forget what forward kept for it."""

    def reads(self) -> frozenset[str]:
        """`needs`, or more where they depend on settings."""
        return self.needs

    def reads_of_encoded(self, batch: Batch, targets: Targets) -> Reads:
        """What the loss of this batch reads of the encoder's states."""
        return EVERYTHING

    def check(self, targets: Targets) -> None:
        """Raise `ConfigError` if the batch lacks a target that this objective reads."""
        missing = sorted(name for name in self.reads() if getattr(targets, name) is None)
        if missing:
            raise ConfigError(
                f"{type(self).__name__} needs the targets {', '.join(missing)}, which the batch lacks. "
                "Ask the loader for them: masking makes token and region slots, the pair source makes `matched`."
            )


Over = Literal["chosen", "rows"]
"""What a loss is averaged over. chosen: all chosen positions of the batch. rows: those of each row first, then the rows
that have any."""

ROW_SHARE = 1e-4
"""Added to both counts of an average over rows (VL-BERT release, its NORM_IN_BATCH_FIRST switches)."""


def average(name: str, values: Tensor, mask: Tensor, *, over: Over = "chosen", count: Tensor | None = None) -> Loss:
    """Mean of `values` where `mask` holds; exactly zero (with a gradient of zero) where nothing is chosen.

    Args:
        values: (B, P).
        mask: (B, P) bool.
        count: scalar to divide the sum by instead of the number of chosen positions; 0 counts as 1. Only with `over`
            chosen.
    """
    if over == "chosen" and count is None:
        return Loss.mean(name, values, mask)
    kept = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
    if over == "rows":
        assert count is None, "an average over rows has counts of its own"
        total = (kept.sum(1) / (mask.sum(1) + ROW_SHARE)).sum()
        return Loss.ratio(name, total, count_chosen(mask, over), added=ROW_SHARE)
    assert count is not None
    return Loss.ratio(name, kept.sum(), count)


def count_chosen(mask: Tensor, over: Over) -> Tensor:
    """What `average` divides by: the chosen positions of `mask` (B, P), or the rows that have any; scalar int64."""
    return mask.sum() if over == "chosen" else mask.any(1).sum()
