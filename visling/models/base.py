"""What every model family offers: an encoder from `Batch` to `Encoded`, and a description of its presets, inputs, heads
and released layouts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from visling.checkpoints.keymap import KeyMap
from visling.types import Batch, Dims, Encoded, InputSpec


class Encoder(nn.Module, ABC):
    """Text and regions in, states out. No head, no loss, no file."""

    config: Any
    """The family's config that built it."""
    dims: Dims
    """Widths of its outputs."""

    @property
    @abstractmethod
    def word_embeddings(self) -> nn.Embedding:
        """The word table, for heads that are tied to it."""

    @abstractmethod
    def forward(self, batch: Batch, *, capture: bool = False) -> Encoded:
        """States of every real position.

        Args:
            capture: also return attention maps and the hidden states of every layer; slower, same values.
        """

    def fit_features(self, features: Tensor) -> None:
        """Called once with a sample of region features (N, F) when training starts from fresh weights: statistics are
        measured here."""

    def after_text_weights(self) -> None:
        """Called once after BERT's text weights are loaded: tables that start as copies of text tables are filled
        here."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One family, for those who build, load or feed it by name."""

    config: type
    """Config class."""
    build: Callable[[Any], Encoder]
    """Config -> encoder with fresh weights."""
    presets: Mapping[str, Any]
    """Name -> config; every family has "tiny" for tests."""
    inputs: Callable[[Any], InputSpec]
    """Config -> what collate must deliver."""
    layout: str
    """The family's main released layout."""
    head_styles: Mapping[tuple[str, str], str]
    """(layout, head kind) -> style in `nn.heads`; "matching" is the two-way classifier of the pre-training pairs."""
    keys: Mapping[str, KeyMap]
    """Released layout -> key map; "bert" starts from BERT's text weights."""
