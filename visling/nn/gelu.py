"""A linear layer over GELU that keeps less for the backward pass.

The values after GELU are as wide as those before it, the widest that a layer has. They are computed again instead of
being stored, which costs little beside the products (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def linear_of_gelu(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(states) @ weight.T + bias, with the exact GELU (by erf): (K, I), (D, I) and (D,) -> (K, D)."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler chooses what is kept
        return F.linear(F.gelu(states), weight, bias)
    output: Tensor = _LinearOfGelu.apply(states, weight, bias)  # type: ignore[no-untyped-call]
    return output


class _LinearOfGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        return F.linear(F.gelu(states), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        grad_states = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_states = torch.ops.aten.gelu_backward(grad @ weight.to(grad.dtype), states)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.T @ F.gelu(states).to(grad.dtype)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0).to(weight.dtype)
        return grad_states, grad_weight, grad_bias
