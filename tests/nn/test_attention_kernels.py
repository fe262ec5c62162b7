"""Every kernel of attention against the formula written out: values, gradients, rows with nothing in them, dropout,
half precision; and which kernel is chosen."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures.attention_ways import fix_dropout
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from visling.nn import attention_kernels as kernels
from visling.nn.attention import Attention
from visling.nn.attention_kernels import Kernel, attend_padded, choose_kernel
from visling.nn.packing import Packing
from visling.nn.row_attention import attend_by_row

HEADS, WIDTH = 2, 6
KERNELS: Mapping[str, Kernel] = {"rows": attend_by_row, "padded": attend_padded}
"""Those of a CPU."""

Lengths = tuple[int, ...]
SHAPES: Mapping[str, tuple[Lengths, Lengths]] = {
    "cross": ((3, 1, 4), (2, 5, 3)),
    "itself": ((3, 1, 4), (3, 1, 4)),
    "rows without keys": ((3, 2, 4), (0, 5, 0)),
    "rows without queries": ((0, 2, 0, 1), (3, 5, 1, 2)),
    "rows without either": ((0, 2, 0), (0, 5, 1)),
    "no keys": ((3, 2), (0, 0)),
    "no queries": ((0, 0), (3, 2)),
    "nothing": ((0, 0), (0, 0)),
    "no rows": ((), ()),
}
"""Queries and keys of each row."""


def rows_of(lengths: Lengths, *, fillers: int = 0) -> Packing:
    """Rows of these lengths, whose real positions are scattered as in joint sequences, and so much packed padding."""
    longest = max(lengths, default=0) + 2
    scores = torch.rand(len(lengths), longest)
    mask = scores.argsort(1).argsort(1) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    return Packing.of(mask, sum(lengths) + fillers if fillers else None)


def inputs(x_rows: Packing, y_rows: Packing, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    return (
        torch.randn(len(x_rows.at), WIDTH, dtype=dtype),
        torch.randn(len(y_rows.at), WIDTH, dtype=dtype),
        torch.randn(len(y_rows.at), WIDTH, dtype=dtype),
    )


def spans(lengths: list[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def by_hand(query: Tensor, key: Tensor, value: Tensor, x_rows: Packing, y_rows: Packing, scale: float = 1.0) -> Tensor:
    """The formula of Vaswani et al., one row and one head at a time; `scale` stands in for dropout."""
    size = WIDTH // HEADS
    context = query * 0.0
    for queries, keys in zip(spans(x_rows.lengths), spans(y_rows.lengths), strict=True):
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            scores = query[queries, part] @ key[keys, part].T / math.sqrt(size)
            context[queries, part] = scores.softmax(-1) * scale @ value[keys, part]
    return context


def attend(kernel: Kernel, x_rows: Packing, y_rows: Packing, rate: float = 0.0) -> Callable[..., Tensor]:
    return functools.partial(kernel, x_rows=x_rows, y_rows=y_rows, num_heads=HEADS, dropout_rate=rate)


def with_gradients(function: Callable[..., Tensor], given: tuple[Tensor, ...], real: int) -> list[Tensor]:
    """Context of the first `real` queries, and gradients of a sum over it."""
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    context = function(*leaves)[:real]
    total = (context * torch.linspace(-1, 2, WIDTH)).sin().sum()
    return [context, *torch.autograd.grad(total, leaves, materialize_grads=True)]  # rows may have nothing to read


# ------------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("fillers", [0, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients_equal_the_formula(kernel: str, shape: str, fillers: int) -> None:
    x_rows, y_rows = (rows_of(lengths, fillers=fillers) for lengths in SHAPES[shape])
    given, real = inputs(x_rows, y_rows), sum(SHAPES[shape][0])
    found = with_gradients(attend(KERNELS[kernel], x_rows, y_rows), given, real)
    expected = with_gradients(lambda q, k, v: by_hand(q, k, v, x_rows, y_rows), given, real)
    for ours, written in zip(found, expected, strict=True):
        assert_close(ours, written)
    with torch.no_grad():
        assert_close(attend(KERNELS[kernel], x_rows, y_rows)(*given)[:real], expected[0])


@pytest.mark.parametrize("shape", ["cross", "rows without keys", "rows without queries"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_those_of_the_function(kernel: str, shape: str) -> None:
    x_rows, y_rows = (rows_of(lengths) for lengths in SHAPES[shape])
    given = [tensor.requires_grad_() for tensor in inputs(x_rows, y_rows)]
    assert gradcheck(attend(KERNELS[kernel], x_rows, y_rows), given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_what_is_trained_has_a_gradient(kernel: str) -> None:
    x_rows, y_rows = (rows_of(lengths) for lengths in SHAPES["cross"])
    query, key, value = inputs(x_rows, y_rows)
    key.requires_grad_()
    attend(KERNELS[kernel], x_rows, y_rows)(query, key, value).sum().backward()
    assert key.grad is not None
    assert query.grad is value.grad is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_fills_up_is_finite_and_is_not_read(kernel: str) -> None:
    x_rows, y_rows = (rows_of(lengths, fillers=3) for lengths in SHAPES["cross"])
    query, key, value = inputs(x_rows, y_rows)
    context = attend(KERNELS[kernel], x_rows, y_rows)(query, key, value)
    assert context.isfinite().all()
    key[-3:], value[-3:] = 1e3, -1e3
    assert torch.equal(attend(KERNELS[kernel], x_rows, y_rows)(query, key, value), context)


def test_captured_attention_equals_the_kernels() -> None:
    x_rows, y_rows = (rows_of(lengths) for lengths in SHAPES["rows without keys"])
    given = inputs(x_rows, y_rows)
    block = Attention(query_size=WIDTH, context_size=WIDTH, attention_size=WIDTH, num_heads=HEADS, dropout_rate=0.0)
    context, probs = block.mix(*given, x_rows, y_rows, capture=True)
    assert probs is not None
    assert_close(context, by_hand(*given, x_rows, y_rows))
    assert probs.shape == (3, HEADS, *(x_rows.mask.shape[1], y_rows.mask.shape[1]))
    assert not probs.masked_select(~y_rows.mask[:, None, None, :]).any()


# -------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("kernel", [*KERNELS, "captured"])
@pytest.mark.parametrize("shape", ["cross", "rows without keys"])
def test_dropout_acts_on_the_probabilities(kernel: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_dropout(monkeypatch, lambda rate: 1 - rate)
    x_rows, y_rows = (rows_of(lengths) for lengths in SHAPES[shape])
    given, real = inputs(x_rows, y_rows), sum(SHAPES[shape][0])
    block = Attention(query_size=WIDTH, context_size=WIDTH, attention_size=WIDTH, num_heads=HEADS, dropout_rate=0.3)

    def captured(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return block.mix(query, key, value, x_rows, y_rows, capture=True)[0]

    function = captured if kernel == "captured" else attend(KERNELS[kernel], x_rows, y_rows, 0.3)
    found = with_gradients(function, given, real)
    expected = with_gradients(lambda q, k, v: by_hand(q, k, v, x_rows, y_rows, scale=0.7), given, real)
    for ours, written in zip(found, expected, strict=True):
        assert_close(ours, written)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_probability_is_dropped_or_scaled(kernel: str) -> None:
    """The values of one head are unit vectors, so that the context is the row of probabilities after dropout."""
    rate, size, rows = 0.3, 16, 64
    mask = torch.ones(rows, size, dtype=torch.bool)
    packing = Packing.of(mask)
    query, key = torch.randn(2, rows * size, size).unbind()
    value = torch.eye(size).repeat(rows, 1)
    function = functools.partial(KERNELS[kernel], x_rows=packing, y_rows=packing, num_heads=1)
    probs = function(query, key, value, dropout_rate=0.0)
    dropped = function(query, key, value, dropout_rate=rate)
    kept = dropped != 0
    assert_close(dropped[kept], probs[kept] / (1 - rate), rtol=2e-4, atol=1e-6)
    count = kept.numel()
    assert abs(kept.sum().item() - (1 - rate) * count) < 5 * math.sqrt(count * rate * (1 - rate))
    assert not torch.equal(function(query, key, value, dropout_rate=rate), dropped)
    assert torch.equal(function(query, key, value, dropout_rate=0.0), probs)


def test_the_backward_pass_of_rows_uses_what_was_dropped() -> None:
    x_rows, y_rows = (rows_of(lengths) for lengths in SHAPES["cross"])

    def seeded(*given: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attend(attend_by_row, x_rows, y_rows, 0.4)(*given)

    assert gradcheck(seeded, [tensor.requires_grad_() for tensor in inputs(x_rows, y_rows)])


# ------------------------------------------------------------------------------------------------- precision and choice


@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision_by_autocast_is_near_single_precision(kernel: str) -> None:
    mask = torch.arange(12) < torch.tensor([12, 3, 7])[:, None]
    rows, given = Packing.of(mask), torch.randn(3, 22, 16)
    function = functools.partial(KERNELS[kernel], x_rows=rows, y_rows=rows, num_heads=2, dropout_rate=0.0)
    found = []
    for half in (True, False):
        leaf = given.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            projected = F.linear(leaf, torch.eye(16))
            context = function(*projected.unbind())
        assert context.dtype == (torch.bfloat16 if half else torch.float32)
        found.append((context.float(), *torch.autograd.grad(context.float().sin().sum(), leaf)))
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, atol=0.03 * expected.abs().max().item(), rtol=0)


def chosen(length: int, width: int, **options: Any) -> Kernel:
    rows = Packing.of(torch.ones(4, length, dtype=torch.bool))
    return choose_kernel(torch.zeros(4 * length, width), rows, rows, num_heads=12, dropout_rate=0.0, **options)


def test_one_thread_pads_little_work_and_takes_much_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert chosen(9, 96) is attend_padded  # the demo: a call per row would cost more than the padding
    assert chosen(40, 96) is chosen(60, 768) is attend_by_row
    limit = math.isqrt(kernels.WORK_OF_A_ROW // 768)
    assert chosen(limit, 768) is attend_padded
    assert chosen(limit + 1, 768) is attend_by_row


def test_the_choice_goes_by_the_average_row() -> None:
    def over(lengths: Lengths, longest: int) -> Kernel:
        rows = Packing.of(torch.arange(longest) < torch.tensor(lengths)[:, None])
        return choose_kernel(torch.zeros(len(rows.at), 768), rows, rows, num_heads=12, dropout_rate=0.0)

    assert over((30, 30), 30) is over((30, 30), 300) is attend_by_row  # padding is no work
    assert over((30, *[1] * 20), 30) is attend_padded
    assert over((), 5) is over((0, 0), 5) is attend_padded


def test_where_the_host_counts_rows_nothing_asks_the_device_for_them() -> None:
    mask = torch.ones(4, 60, dtype=torch.bool)
    for rows in (Packing.of(mask, 240), Packing.of(F.pad(mask, (0, 1)), 242)):
        for x_rows, y_rows in ((rows, rows), (Packing.of(mask), rows), (rows, Packing.of(mask))):
            query = torch.zeros(len(x_rows.at), 768)
            assert choose_kernel(query, x_rows, y_rows, num_heads=12, dropout_rate=0.0) is attend_padded


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_different_length_go_to_their_kernel_on_a_gpu(dtype: torch.dtype, grad: bool) -> None:
    """In half precision and inference: the kernel knows nothing else."""
    query: Any = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    mask = torch.tensor([[True, False], [True, True]])
    for rows in (Packing.of(mask), Packing.of(mask, 4)):
        with torch.set_grad_enabled(grad):
            found = [choose_kernel(query, rows, rows, num_heads=2, dropout_rate=rate) for rate in (0.0, 0.1)]
        fits = not grad and dtype == torch.bfloat16
        assert found == [kernels.attend_lengths if fits else attend_padded, attend_padded]


def test_a_compiler_gets_padded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen(60, 768) is attend_padded


def test_the_kernel_for_lengths_drops_nothing() -> None:
    rows = rows_of((3, 2))
    with pytest.raises(AssertionError, match="drops nothing"):
        kernels.attend_lengths(*inputs(rows, rows), rows, rows, num_heads=HEADS, dropout_rate=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fillers", [0, 5])
@pytest.mark.parametrize("shape", ["cross", "itself", "rows without keys", "rows without queries"])
def test_the_kernel_for_lengths_equals_padded_rows(shape: str, fillers: int) -> None:
    x_rows, y_rows = (rows_of(lengths, fillers=fillers) for lengths in SHAPES[shape])
    x_rows, y_rows = (Packing(rows.mask.cuda(), rows.at.cuda(), bounded=rows.bounded) for rows in (x_rows, y_rows))
    query, key, value = (
        torch.randn(len(rows.at), 64, device="cuda", dtype=torch.bfloat16) for rows in (x_rows, y_rows, y_rows)
    )
    with torch.no_grad():
        assert choose_kernel(query, x_rows, y_rows, num_heads=HEADS, dropout_rate=0.0) is kernels.attend_lengths
        found, expected = (
            kernel(query, key, value, x_rows, y_rows, num_heads=HEADS, dropout_rate=0.0)
            for kernel in (kernels.attend_lengths, attend_padded)
        )
    real = sum(SHAPES[shape][0])
    assert_close(found[:real], expected[:real], atol=2e-2, rtol=2e-2)
    assert found.isfinite().all()


def test_small_rows_are_computed_by_one_thread_and_the_others_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of small rows are too short to be shared; those of long rows are shared."""
    threads, seen = torch.get_num_threads(), []
    softmax = torch.softmax

    def spy(*given: Any, **named: Any) -> Tensor:
        seen.append(torch.get_num_threads())
        return softmax(*given, **named)

    monkeypatch.setattr(torch, "softmax", spy)
    try:
        torch.set_num_threads(2)
        for lengths in ((9, 7), (300, 280)):
            rows = rows_of(lengths)
            query = torch.randn(len(rows.at), 64, requires_grad=True)
            attend_by_row(query, query, query, rows, rows, num_heads=2, dropout_rate=0.1).sum().backward()
            assert torch.get_num_threads() == 2
        assert seen == [1, 1, 2, 2]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("threads", "lengths", "width", "way"),
    [
        (2, (9, 7), 8, "rows"),
        (4, (9, 7), 8, "rows"),
        (2, (9, 9), 8, "padded"),  # without any padding the padded form costs nothing
        (2, (300, 300), 64, "padded"),
        (5, (99, 100), 64, "padded"),
        (5, (299, 300), 64, "rows"),  # a row is enough for all of them
    ],
)
def test_several_threads_take_padded_rows_row_by_row(
    threads: int, lengths: tuple[int, ...], width: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows = Packing.of(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
    found = choose_kernel(torch.zeros(len(rows.at), width), rows, rows, num_heads=1, dropout_rate=0.0)
    assert found is (attend_by_row if way == "rows" else attend_padded)
