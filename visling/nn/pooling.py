"""From many states to one, or to the chosen ones.

Letters  B rows, N positions, P slots, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class FirstTokenPooler(nn.Module):
    """BERT's summary of a row: the first state through a linear layer and tanh; other releases use another activation."""

    def __init__(self, hidden_size: int, *, activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.activation = activation

    def forward(self, states: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)."""
        return self.activation(self.dense(states[:, 0]))


def gather(states: Tensor, at: Tensor) -> Tensor:
    """States (B, N, D) at positions (B, P) -> (B, P, D), or at one position per row (B,) -> (B, D)."""
    if at.dim() == 1:
        return gather(states, at[:, None])[:, 0]
    return torch.take_along_dim(states, at[..., None], dim=1)
