"""Dropout whose random numbers cost little.

A CPU draws random numbers one after the other, and one number for each element takes longer than all else that dropout
does. Here one number serves four elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_LEVELS = 2**16
"""Values of the 16 bits that decide about an element; a rate is rounded to them."""


def draw_kept(size: int, rate: float, device: torch.device) -> tuple[Tensor, float]:
    """Which of `size` elements dropout keeps, (size,) bool, and the factor that makes up for the others.

    Drawn from the generator of the device. The rate is rounded to a multiple of 2**-16; the factor follows the rounded
    one, so the mean is exact.
    """
    dropped = round(rate * _LEVELS)
    bits = torch.empty(-(-size // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
    kept = bits.view(torch.int16)[:size] >= dropped - _LEVELS // 2
    return kept, _LEVELS / (_LEVELS - dropped) if dropped < _LEVELS else 0.0


def drop(states: Tensor, rate: float, *, training: bool) -> Tensor:
    """dropout(states)."""
    if not training or rate == 0.0:
        return states
    if not _draws_bits(states):
        return F.dropout(states, rate)
    kept, scale = draw_kept(states.numel(), rate, states.device)
    return states * kept.view(states.shape) * scale


def add_dropped(residual: Tensor, states: Tensor, rate: float, *, training: bool) -> Tensor:
    """residual + dropout(states), of one shape."""
    if not training or rate == 0.0:
        return residual + states
    if not _draws_bits(states):
        return residual + F.dropout(states, rate)
    total: Tensor = _AddDropped.apply(residual, states, rate)  # type: ignore[no-untyped-call]
    return total


def _draws_bits(states: Tensor) -> bool:
    """Whether `draw_kept` decides: a GPU draws in parallel, and a compiler has its own generator."""
    return states.device.type == "cpu" and not torch.compiler.is_compiling()


class Dropout(nn.Dropout):
    """`nn.Dropout` by `drop`."""

    def forward(self, input: Tensor) -> Tensor:
        return drop(input, self.p, training=self.training)


class _AddDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, states: Tensor, rate: float) -> Tensor:
        kept, scale = draw_kept(states.numel(), rate, states.device)
        kept = kept.view(states.shape)
        ctx.save_for_backward(kept)
        ctx.scale, ctx.dtype = scale, states.dtype
        return torch.add(residual, states * kept, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (kept,) = ctx.saved_tensors
        return grad, (grad * kept).mul_(ctx.scale).to(ctx.dtype), None
