"""Dropout whose random numbers cost little.

A CPU draws random numbers one after the other, and one number for each element takes longer than all else that dropout
does. Here one number serves four elements, and what was kept is drawn again in the backward pass instead of
being stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_LEVELS = 2**16
"""Values of the 16 bits that decide about an element; a rate is rounded to them."""


def draw_kept(size: int, rate: float, state: Tensor | None = None) -> tuple[Tensor, float]:
    """Which of `size` elements dropout keeps, (size,) bool, and the factor that makes up for the others.

    Drawn from PyTorch's generator of the CPU. The rate is rounded to a multiple of 2**-16; the factor follows the
    rounded one, so the mean is exact.

    Args:
        state: what `torch.get_rng_state` returned before an earlier draw, which is then repeated.
    """
    dropped, generator = round(rate * _LEVELS), None
    if state is not None:
        generator = torch.Generator()
        generator.set_state(state)
    bits = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    kept = bits.view(torch.int16)[:size] >= dropped - _LEVELS // 2
    return kept, _LEVELS / (_LEVELS - dropped) if dropped < _LEVELS else 0.0


def drop(states: Tensor, rate: float, *, training: bool) -> Tensor:
    """dropout(states)."""
    if not training or rate == 0.0:
        return states
    if not _draws_bits(states):
        return F.dropout(states, rate)
    kept, scale = draw_kept(states.numel(), rate)
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
        ctx.rate, ctx.state, ctx.dtype = rate, torch.get_rng_state(), states.dtype
        kept, scale = draw_kept(states.numel(), rate)
        return torch.add(residual, states * kept.view(states.shape), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        kept, scale = draw_kept(grad.numel(), ctx.rate, ctx.state)
        return grad, (grad * kept.view(grad.shape)).mul_(scale).to(ctx.dtype), None
