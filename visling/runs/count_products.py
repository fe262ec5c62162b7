"""Operations and memory of one training step, counted while it runs.

Counted  Matrix products, convolutions and attention, forward and backward: two operations for each multiplication and
         addition. Everything else is left out. Attention is counted as the fused kernels do it, which keep no
         probabilities; the products that they compute again in the backward pass do not count.
Memory   What autograd keeps for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from visling.types import Batch, Targets


@dataclass(frozen=True, kw_only=True)
class Traced:
    """One step, counted."""

    flops: int
    kept: int
    """Bytes that the forward pass keeps for the backward pass, without parameters."""


def trace(
    model: nn.Module,
    step: Callable[[Batch, Targets], Tensor],
    batches: list[tuple[Batch, Targets]],
    *,
    precision: str = "fp32",
) -> Traced:
    """Count forward and backward of one micro-step, which may hold several batches.

    Args:
        step: loss of a batch.
        precision: fp32, or bf16 (or auto) as autocast keeps it on a CPU.
    """
    own = {parameter.untyped_storage()._cdata for parameter in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # The tensor too: another one may take the place of a freed storage.
            kept[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    with MatrixProducts() as products:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"),
        ):
            loss = torch.stack([step(batch, targets) for batch, targets in batches]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    return Traced(flops=products.flops, kept=sum(size for _, size in kept.values()))


class MatrixProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the operations of all matrix products that are called within it.

    Attributes:
        linear: of two matrices, as states with weights, and of convolutions.
        attention: of batches of matrices and of the fused kernels, as queries with keys.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear = self.attention = 0

    @property
    def flops(self) -> int:
        """Of all."""
        return self.linear + self.attention

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in _LINEAR or (packet is _aten.matmul and args[1].dim() == 2):
            count: Callable[..., int] = _LINEAR.get(packet, _count_product)
            self.linear += count(*args)
        elif packet in _ATTENTION:
            self.attention += _ATTENTION[packet](*args)
        return func(*args, **(kwargs or {}))


def _count_product(a: Tensor, b: Tensor, *_: Any) -> int:
    """(..., M, K) times (..., K, N)."""
    return 2 * a.numel() * b.shape[-1]


def _count_linear(states: Tensor, weight: Tensor, *_: Any) -> int:
    """(..., K) with (N, K)."""
    return 2 * states.numel() * weight.shape[0]


def _count_added_product(_: Tensor, a: Tensor, b: Tensor, *__: Any) -> int:
    return _count_product(a, b)


def _count_convolution(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *_: Any,
) -> int:
    """(B, C, H, W) with (O, C / groups, K, L): each output sums over a window."""
    sides = zip(images.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    places = math.prod(
        (side + 2 * border - apart * (kernel - 1) - 1) // step + 1 for side, kernel, step, border, apart in sides
    )
    return 2 * len(images) * places * weight.numel()


def _count_convolution_backward(grad: Tensor, images: Tensor, weight: Tensor, *others: Any) -> int:
    """The forward product once for each gradient that is asked for, of input and weight."""
    asked: list[bool] = others[-1]
    return sum(asked[:2]) * 2 * grad.numel() // grad.shape[1] * weight.numel()


def _count_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """(..., M, E) with (..., N, E), then with (..., N, V)."""
    return 2 * query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _count_attention_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any) -> int:
    return 2 * _count_attention(query, key, value)


_aten = torch.ops.aten
_LINEAR: Mapping[Any, Callable[..., int]] = {
    _aten.linear: _count_linear,  # in inference mode, which does not take it apart
    _aten.mm: _count_product,
    _aten.addmm: _count_added_product,
    _aten.addmm_: _count_added_product,
    _aten.convolution: _count_convolution,
    _aten.convolution_backward: _count_convolution_backward,
}
_ATTENTION: Mapping[Any, Callable[..., int]] = {
    _aten.matmul: _count_product,  # in inference mode, and so the next
    _aten.scaled_dot_product_attention: _count_attention,
    _aten.bmm: _count_product,
    _aten.baddbmm: _count_added_product,
    _aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_attention_backward,
}
