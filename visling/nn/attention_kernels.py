"""The ways in which packed rows attend, and which of them is fastest where.

rows      One row after the other (`nn.row_attention`): nothing is padded, and the scores of a row stay in the cache.
padded    Rows padded to the longest and given to PyTorch's fused kernel: few calls, which is what counts where a row is
          little work, and what a compiler or a GPU wants.
lengths   PyTorch's kernel for rows of different length, on GPUs in half precision; it knows no dropout, so it serves
          inference.

Letters  B rows, Kq and Kk packed query and key positions, H heads, E width of a head, A = H x E.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from visling.nn.packing import Packing
from visling.nn.row_attention import SHARED_WORK, attend_by_row

WORK_OF_A_ROW = 100_000
"""Multiplications of a row's scores, H x M x N x E, from which `rows` beats `padded` with one thread, forward and
backward."""
FEW_THREADS = 4
"""Up to so many, and more than one, `rows` always beats `padded` where there is padding: padded calls are many, and
each wakes all threads. Measured with two (benchmarks/attention.py)."""


class Kernel(Protocol):
    """Context (Kq, A) of packed queries (Kq, A), keys and values (Kk, A); zeros in rows without keys."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        x_rows: Packing,
        y_rows: Packing,
        *,
        num_heads: int,
        dropout_rate: float,
    ) -> Tensor: ...


def choose_kernel(query: Tensor, x_rows: Packing, y_rows: Packing, *, num_heads: int, dropout_rate: float) -> Kernel:
    """The fastest way for these rows on this device, by recorded measurement."""
    if torch.compiler.is_compiling():
        return attend_padded
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type == "cuda" and half and dropout_rate == 0.0 and not torch.is_grad_enabled():
        return attend_lengths
    if query.device.type != "cpu" or x_rows.bounded or y_rows.bounded:  # where counts are given, nothing asks for more
        return attend_padded
    threads = torch.get_num_threads()
    if threads > 1 and x_rows.full and y_rows.full:
        return attend_padded
    # One thread computes rows of little work: where there are many, padded rows keep more of them busy.
    least = WORK_OF_A_ROW if threads == 1 else 0 if threads <= FEW_THREADS else SHARED_WORK
    rows = max(len(x_rows.mask), 1)
    work = len(x_rows.at) * len(y_rows.at) * query.shape[1] / rows**2
    return attend_by_row if work >= least else attend_padded


def attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    x_rows: Packing,
    y_rows: Packing,
    *,
    num_heads: int,
    dropout_rate: float,
) -> Tensor:
    """`padded`."""
    context = F.scaled_dot_product_attention(
        split_heads(x_rows.unpack(query), num_heads),
        split_heads(y_rows.unpack(key), num_heads),
        split_heads(y_rows.unpack(value), num_heads),
        attn_mask=y_rows.mask[:, None, None, :],
        dropout_p=dropout_rate,
    )
    return x_rows.pack(context.transpose(1, 2).flatten(2))


def attend_lengths(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    x_rows: Packing,
    y_rows: Packing,
    *,
    num_heads: int,
    dropout_rate: float,
) -> Tensor:
    """`lengths`."""
    assert dropout_rate == 0.0, "this kernel drops nothing"
    q, k, v = (x.view(len(x), num_heads, -1) for x in (query, key, value))
    starts = _starts(x_rows)
    context = varlen_attn(q, k, v, starts, _starts(y_rows), x_rows.mask.shape[1], y_rows.mask.shape[1])
    assert isinstance(context, Tensor)
    # The kernel leaves what fills up a packing unwritten.
    real = torch.arange(len(query), device=query.device) < starts[-1]
    return context.flatten(1).where(real[:, None], 0.0)


def _starts(rows: Packing) -> Tensor:
    """(B + 1,) int32: where each row begins, and the end of the last."""
    return F.pad(rows.mask.sum(1).cumsum(0), (1, 0)).int()


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """(B, N, A) -> (B, H, N, A/H)."""
    # No -1 here: it is ambiguous where N is 0.
    return states.view(*states.shape[:2], num_heads, states.shape[-1] // num_heads).transpose(1, 2)
