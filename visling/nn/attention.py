"""Multi-head attention: queries from one sequence, keys and values from the same or another one.

Letters  B rows, M query positions, N key positions, Kq and Kk packed ones, H heads, A attention width (all heads
         together), Dx and Dy widths of the two sequences.
Rows     States are packed (`nn.packing`); a row without any key attends to nothing and gets zeros.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from visling.nn.attention_kernels import choose_kernel, split_heads
from visling.nn.dropout import drop
from visling.nn.packing import Packing


class Attention(nn.Module):
    """Scaled dot-product attention with its three projections; the output projection belongs to the block around it."""

    def __init__(
        self, *, query_size: int, context_size: int, attention_size: int, num_heads: int, dropout_rate: float
    ) -> None:
        super().__init__()
        assert attention_size % num_heads == 0, (
            f"attention width {attention_size} is not a multiple of {num_heads} heads"
        )
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        # Three matrices, not one: the releases clip gradients per tensor, and their files store them apart.
        self.query = nn.Linear(query_size, attention_size)
        self.key = nn.Linear(context_size, attention_size)
        self.value = nn.Linear(context_size, attention_size)

    def forward(
        self, x: Tensor, y: Tensor, x_rows: Packing, y_rows: Packing, *, capture: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Context of every query position.

        Args:
            x: (Kq, Dx) packed states that attend.
            y: (Kk, Dy) packed states that are attended to.
            capture: also return the probabilities (before dropout), at the cost of the slow path.
        Returns:
            (Kq, A), and padded (B, H, M, N) or None.
        """
        # Three products: to join the matrices would copy them at every call, and a product of their width is no faster.
        return self.mix(self.query(x), self.key(y), self.value(y), x_rows, y_rows, capture=capture)

    def mix(
        self, query: Tensor, key: Tensor, value: Tensor, x_rows: Packing, y_rows: Packing, *, capture: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Context (Kq, A) of projected queries (Kq, A), keys and values (Kk, A); probabilities as in `forward`."""
        dropout_rate = self.dropout_rate if self.training else 0.0
        if capture:
            return self._mix_padded(query, key, value, x_rows, y_rows)
        kernel = choose_kernel(query, x_rows, y_rows, num_heads=self.num_heads, dropout_rate=dropout_rate)
        return kernel(query, key, value, x_rows, y_rows, num_heads=self.num_heads, dropout_rate=dropout_rate), None

    def _mix_padded(
        self, query: Tensor, key: Tensor, value: Tensor, x_rows: Packing, y_rows: Packing
    ) -> tuple[Tensor, Tensor]:
        """The same with the probabilities: written out."""
        split = partial(split_heads, num_heads=self.num_heads)
        query, key, value = split(x_rows.unpack(query)), split(y_rows.unpack(key)), split(y_rows.unpack(value))
        probs = probabilities(query, key, y_rows.mask[:, None, None, :])
        context = drop(probs, self.dropout_rate, training=self.training) @ value
        return x_rows.pack(context.transpose(1, 2).flatten(2)), probs


def probabilities(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the real keys of the scaled dot products; zeros where a row has no real key.

    Args:
        query: (..., M, E).
        key: (..., N, E).
        mask: bool, broadcastable to (..., M, N).
    Returns:
        (..., M, N).
    """
    scores: Tensor = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
    # The lowest finite score, not minus infinity: a row of nothing but padding would be NaN, in its gradient too.
    probs: Tensor = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return probs.masked_fill(~mask, 0.0)
