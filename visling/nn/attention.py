"""Multi-head attention: queries from one sequence, keys and values from the same or another one.

Letters  B rows, M query positions, N key positions, H heads, A attention width (all heads together), Dx and Dy widths
         of the two sequences.
Masks    (B, N) boolean over keys, True = real; a row without any real key attends to nothing and gets zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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

    def forward(self, x: Tensor, y: Tensor, mask: Tensor, *, capture: bool = False) -> tuple[Tensor, Tensor | None]:
        """Context of every query position.

        Args:
            x: (B, M, Dx) states that attend.
            y: (B, N, Dy) states that are attended to; `x` itself for self-attention, which then projects in one matrix
                product.
            mask: (B, N) bool.
            capture: also return the probabilities (before dropout), at the cost of the slow path.
        Returns:
            (B, M, A), and (B, H, M, N) or None.
        """
        if y is x:
            weight = torch.cat([self.query.weight, self.key.weight, self.value.weight])
            bias = torch.cat([self.query.bias, self.key.bias, self.value.bias])
            query, key, value = F.linear(x, weight, bias).chunk(3, dim=-1)
        else:
            query, key, value = self.query(x), self.key(y), self.value(y)
        return self.mix(query, key, value, mask, capture=capture)

    def mix(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, capture: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Context (B, M, A) of projected queries (B, M, A), keys and values (B, N, A); mask and probabilities as in
        `forward`."""
        query, key, value, mask = self._split(query), self._split(key), self._split(value), mask[:, None, None, :]
        dropout_rate = self.dropout_rate if self.training else 0.0
        probs = None
        if capture:
            probs = probabilities(query, key, mask)
            context = F.dropout(probs, dropout_rate) @ value
        else:
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_rate)
        return context.transpose(1, 2).flatten(2), probs

    def _split(self, states: Tensor) -> Tensor:
        """(B, N, A) -> (B, H, N, A/H)."""
        # No -1 here: it is ambiguous where N is 0.
        return states.view(*states.shape[:2], self.num_heads, states.shape[-1] // self.num_heads).transpose(1, 2)


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
