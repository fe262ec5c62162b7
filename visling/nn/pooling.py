"""From many states to one, or to those at chosen positions.

Letters  B rows, N positions, P slots of a row, K slots of the batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from visling.types import Slots


class FirstTokenPooler(nn.Module):
    """BERT's summary of a row: the first state through a linear layer and tanh; other releases use another
    activation."""

    def __init__(self, hidden_size: int, *, activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.activation = activation

    def forward(self, states: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)."""
        return self.activation(self.dense(states[:, 0]))


def take(states: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
    """States (B, N, D) at the chosen positions of the whole batch, (K, D), and which of them are real, (K,)."""
    first = torch.arange(0, states.shape[0] * states.shape[1], states.shape[1], device=states.device)  # of every row
    at, mask = (slots.at + first[:, None]).flatten(), slots.mask.flatten()
    if slots.taken is None:
        return states.flatten(0, 1)[at], mask
    return states.flatten(0, 1)[at[slots.taken]], mask[slots.taken]


def put_back(values: Tensor, slots: Slots) -> Tensor:
    """What was computed of `take`n states (K, D) as (B, P, D); zeros at slots that were not taken."""
    if slots.taken is not None:
        values = values.new_zeros(slots.mask.numel(), values.shape[1]).index_copy(0, slots.taken, values)
    return values.view(*slots.mask.shape, *values.shape[1:])


def gather(states: Tensor, at: Tensor) -> Tensor:
    """States (B, N, D) at positions (B, P) -> (B, P, D), or at one position per row (B,) -> (B, D)."""
    if at.dim() == 1:
        return gather(states, at[:, None])[:, 0]
    return torch.take_along_dim(states, at[..., None], dim=1)
