"""Attention of packed rows, one row after the other: nothing is padded, and the scores of a row stay in the cache.

On a CPU this is faster than attention over padded rows, forward and backward (docs/performance.md); a row is a batched
product over its heads.

Letters  B rows, Kq and Kk packed query and key positions, H heads, E width of a head, A = H x E; M and N query and key
         positions of one row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visling.nn import dropout
from visling.nn.packing import Packing

SHARED_WORK = 4_000_000
"""Multiplications of a row's scores, H x M x N x E, from which several threads share each product."""


def attend_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    x_rows: Packing,
    y_rows: Packing,
    *,
    num_heads: int,
    dropout_rate: float,
) -> Tensor:
    """Context (Kq, A) of packed queries (Kq, A), keys and values (Kk, A); zeros in rows without keys.

    Args:
        x_rows, y_rows: of the queries, and of the keys and values.
        dropout_rate: of the probabilities; 0 = none.
    """
    context: Tensor = _RowAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, x_rows.lengths, y_rows.lengths, num_heads, dropout_rate
    )
    return context


class _RowAttention(torch.autograd.Function):
    """Keeps the probabilities; which of them were dropped is drawn again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_lengths: Sequence[int],
        key_lengths: Sequence[int],
        num_heads: int,
        dropout_rate: float,
    ) -> Tensor:
        keeps = any(ctx.needs_input_grad)
        rows = list(_rows(query_lengths, key_lengths, num_heads))
        unwritten = 0 in key_lengths or sum(query_lengths) < len(query)
        context = torch.zeros_like(query) if unwritten else torch.empty_like(query)
        size = rows[-1][2].stop if rows else 0
        probs = query.new_empty(size if keeps else max((s.stop - s.start for _, _, s in rows), default=0))
        draw = None if dropout_rate == 0.0 else (size, dropout_rate, torch.get_rng_state())
        kept, scale = (None, 1.0) if draw is None else dropout.draw_kept(size, dropout_rate)
        with torch.autocast(query.device.type, enabled=False), _few_threads(rows, query.shape[1] // num_heads):
            for queries, keys, square in rows:
                if keys.start == keys.stop or queries.start == queries.stop:
                    continue
                q, k, v = (_heads(x, at, num_heads) for x, at in ((query, queries), (key, keys), (value, keys)))
                p = probs[square] if keeps else probs[: square.stop - square.start]
                p = p.view(num_heads, q.shape[1], k.shape[1])
                scores = torch.bmm(q, k.transpose(1, 2)).mul_(q.shape[2] ** -0.5)
                torch.softmax(scores, -1, out=p)
                if kept is not None:
                    p = p * kept[square].view(p.shape)
                _heads(context, queries, num_heads).copy_(torch.bmm(p, v))
            if scale != 1.0:
                context.mul_(scale)
        ctx.save_for_backward(query, key, value, probs)
        ctx.rows, ctx.num_heads, ctx.draw = rows, num_heads, draw
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probs = ctx.saved_tensors
        num_heads = ctx.num_heads
        kept, scale = (None, 1.0) if ctx.draw is None else dropout.draw_kept(*ctx.draw)
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        with _few_threads(ctx.rows, query.shape[1] // num_heads):
            for queries, keys, square in ctx.rows:
                if keys.start == keys.stop or queries.start == queries.stop:
                    continue
                q, k, v = (_heads(x, at, num_heads) for x, at in ((query, queries), (key, keys), (value, keys)))
                g = _heads(grad, queries, num_heads) * scale
                p = probs[square].view(num_heads, q.shape[1], k.shape[1])
                mask = None if kept is None else kept[square].view(p.shape)
                used = p if mask is None else p * mask
                _heads(grad_value, keys, num_heads).copy_(torch.bmm(used.transpose(1, 2), g))
                grad_probs = torch.bmm(g, v.transpose(1, 2))
                if mask is not None:
                    grad_probs = grad_probs.mul_(mask)
                grad_scores = torch._softmax_backward_data(grad_probs, p, -1, p.dtype).mul_(q.shape[2] ** -0.5)
                _heads(grad_query, queries, num_heads).copy_(torch.bmm(grad_scores, k))
                _heads(grad_key, keys, num_heads).copy_(torch.bmm(grad_scores.transpose(1, 2), q))
        return grad_query, grad_key, grad_value, None, None, None, None


@contextlib.contextmanager
def _few_threads(rows: Sequence[tuple[slice, slice, slice]], head_size: int) -> Iterator[None]:
    """Compute small rows with one thread: to wake others takes longer than the work that they would take over."""
    threads, work = torch.get_num_threads(), rows[-1][2].stop * head_size if rows else 0
    if threads == 1 or work >= SHARED_WORK * len(rows):
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rows(
    query_lengths: Sequence[int], key_lengths: Sequence[int], num_heads: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Of each row: its queries, its keys, and its probabilities (H x M x N) among those of the batch."""
    squares = (num_heads * m * n for m, n in zip(query_lengths, key_lengths, strict=True))
    spans = (pairwise(accumulate(lengths, initial=0)) for lengths in (query_lengths, key_lengths, squares))
    for queries, keys, square in zip(*spans, strict=True):
        yield slice(*queries), slice(*keys), slice(*square)


def _heads(states: Tensor, row: slice, num_heads: int) -> Tensor:
    """The positions of one row of (K, A), as (H, N, E)."""
    return states[row].view(row.stop - row.start, num_heads, -1).transpose(0, 1)
