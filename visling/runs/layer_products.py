"""Matrix products of layers and heads, in operations, for so many positions.

Counted  Two operations for each multiplication and addition; products only. Backward takes two products for each of the
         forward pass: one for the gradient of the weights, one for that of the states, which inputs do not have.
Letters  B rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

Counts = NDArray[np.int64]
"""A number of positions for each row."""


@dataclass(frozen=True, kw_only=True)
class Products:
    """Operations of matrix products."""

    linear: int = 0
    """Of states with weights."""
    attention: int = 0
    """Of queries with keys, and of probabilities with values."""

    def __add__(self, other: Products) -> Products:
        return Products(linear=self.linear + other.linear, attention=self.attention + other.attention)

    def times(self, factor: int) -> Products:
        """So many times as much."""
        return Products(linear=self.linear * factor, attention=self.attention * factor)

    @property
    def total(self) -> int:
        """Both kinds."""
        return self.linear + self.attention


@dataclass(frozen=True, kw_only=True)
class Needed:
    """Products of a forward and of a backward pass."""

    forward: Products = field(default_factory=Products)
    backward: Products = field(default_factory=Products)

    def __add__(self, other: Needed) -> Needed:
        return Needed(forward=self.forward + other.forward, backward=self.backward + other.backward)

    @property
    def step(self) -> Products:
        """Forward and backward."""
        return self.forward + self.backward

    def times(self, factor: int) -> Needed:
        """So many times as much."""
        return Needed(forward=self.forward.times(factor), backward=self.backward.times(factor))

    def without_gradient(self) -> Needed:
        """The forward pass alone."""
        return Needed(forward=self.forward)


def weights(positions: int, inputs: int, outputs: int) -> Needed:
    """States with one matrix, forward and backward."""
    return with_gradient(Products(linear=2 * positions * inputs * outputs))


def with_gradient(products: Products) -> Needed:
    """Backward takes two products for each."""
    return Needed(forward=products, backward=products.times(2))


def attend(queries: Counts, keys: Counts, width: int, *, products: int = 2) -> Products:
    """Products of all queries of a row with all its keys, as wide as all heads together."""
    return Products(attention=2 * products * width * int((queries * keys).sum()))


def attention_block(width: int, context: int, attention: int, queries: Counts, keys: Counts) -> Products:
    """Queries, keys, values, their attention and the output projection, forward."""
    of_queries, of_keys = int(queries.sum()) * width, int(keys.sum()) * context
    return Products(linear=4 * attention * (of_queries + of_keys)) + attend(queries, keys, attention)


def feed_forward(positions: int, width: int, inner: int) -> Products:
    """Two matrices, forward."""
    return Products(linear=4 * positions * width * inner)


def layer(sizes: Any, read: Counts, length: Counts) -> Products:
    """A Transformer layer for `read` of `length` positions, forward.

    Args:
        sizes: a config with `hidden_size` and `intermediate_size`.
    """
    width = sizes.hidden_size
    return attention_block(width, width, width, read, length) + feed_forward(
        int(read.sum()), width, sizes.intermediate_size
    )


def stream(sizes: Any, number: int, length: Counts, read: Counts) -> Needed:
    """So many layers of one stream, the last of them for `read` (B,) of `length` (B,) positions."""
    if not number or not read.any():
        return Needed()
    return with_gradient(layer(sizes, length, length).times(number - 1) + layer(sizes, read, length))


def head_products(head: nn.Module, positions: int) -> Needed:
    """A head multiplies each state that it reads once with each of its matrices."""
    numbers = sum(matrix.numel() for matrix in head.parameters() if matrix.dim() == 2)
    return with_gradient(Products(linear=2 * positions * numbers))
