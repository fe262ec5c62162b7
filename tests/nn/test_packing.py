"""Packed rows: what is packed, what fills up, what is read, and that packed computation equals padded computation."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from visling.nn.packing import Packing, add_counts, count_with_one_more, mark_read, read_joint
from visling.types import EVERYTHING, NOTHING, POOLED, Reads, Regions, Slots, Text

MASK = torch.tensor(
    [
        [True, True, False, True],  # a joint sequence: tokens, padding, regions
        [False, False, False, False],
        [True, True, True, True],
        [False, True, False, False],
    ]
)
REAL, PLACES = 8, [0, 1, 3, 8, 9, 10, 11, 13]
"""How many positions are real, and where, counted row by row."""
NO_REGIONS = torch.zeros(3, 0, dtype=torch.bool)
"""The mask of a batch without any region."""


def padded(*, width: tuple[int, ...] = (3,), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*MASK.shape, *width, dtype=dtype)


def masked(states: Tensor, mask: Tensor) -> Tensor:
    """Zeros where the mask is False."""
    return states.masked_fill(~mask.view(*mask.shape, *[1] * (states.dim() - mask.dim())), 0)


# ------------------------------------------------------------------------------------------------------ pack and unpack


@pytest.mark.parametrize("width", [(), (3,), (2, 3)])
@pytest.mark.parametrize("count", [None, REAL])
def test_real_positions_are_packed_in_order_and_laid_out_again(width: tuple[int, ...], count: int | None) -> None:
    rows, states = Packing.of(MASK, count), padded(width=width)
    packed = rows.pack(states)
    assert rows.at.tolist() == PLACES
    assert rows.row.tolist() == [0, 0, 0, 2, 2, 2, 2, 3]
    assert rows.lengths == [3, 0, 4, 1]
    assert torch.equal(packed, states[MASK])
    assert torch.equal(rows.unpack(packed), masked(states, MASK))
    assert torch.equal(rows.unpack_real(packed), masked(states, MASK))
    assert rows.places[rows.at].tolist() == list(range(REAL))


@pytest.mark.parametrize("count", [REAL + 1, REAL + 5, MASK.numel() - 1])
def test_padding_fills_up_behind_what_is_real(count: int) -> None:
    rows, states = Packing.of(MASK, count), padded()
    assert rows.at[:REAL].tolist() == PLACES
    assert len(set(rows.at.tolist())) == len(rows.at) == count
    assert rows.lengths == [3, 0, 4, 1]
    assert torch.equal(rows.pack(states)[:REAL], states[MASK])
    assert torch.equal(rows.unpack(rows.pack(states))[MASK], states[MASK])
    assert torch.equal(rows.unpack_real(rows.pack(states)), masked(states, MASK))
    assert rows.in_order


@pytest.mark.parametrize("count", [MASK.numel(), 2 * MASK.numel()])
def test_all_positions_stay_where_they_are(count: int) -> None:
    rows, states = Packing.of(MASK, count), padded()
    assert rows.pack(states).data_ptr() == states.data_ptr()
    assert torch.equal(rows.unpack(rows.pack(states)), states)
    assert torch.equal(rows.unpack_real(rows.pack(states)), masked(states, MASK))
    assert rows.places.tolist() == list(range(MASK.numel()))
    assert not rows.in_order  # padding lies between


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float16, torch.float64])
def test_any_type_is_packed(kind: torch.dtype) -> None:
    states = (padded() * 10).to(kind)
    rows = Packing.of(MASK)
    assert torch.equal(rows.unpack(rows.pack(states)), masked(states, MASK))


def test_without_padding_nothing_is_moved() -> None:
    rows, states = Packing.of(torch.ones(2, 3, dtype=torch.bool)), torch.randn(2, 3, 4)
    assert rows.full
    assert rows.in_order
    assert rows.pack(states).data_ptr() == states.data_ptr()
    assert rows.unpack(rows.pack(states)).data_ptr() == states.data_ptr()
    assert not Packing.of(MASK).full
    assert Packing.of(MASK).in_order


@pytest.mark.parametrize("mask", [NO_REGIONS, torch.zeros(3, 2, dtype=torch.bool), torch.zeros(0, 4, dtype=torch.bool)])
@pytest.mark.parametrize("count", [None, 0])
def test_nothing_real(mask: Tensor, count: int | None) -> None:
    rows = Packing.of(mask, count)
    packed = rows.pack(torch.ones(*mask.shape, 5))
    assert packed.shape == (0, 5)
    assert rows.lengths == [0] * len(mask)
    assert torch.equal(rows.unpack(packed), torch.zeros(*mask.shape, 5))


def test_a_batch_without_columns_is_shared_and_read() -> None:
    rows = Packing.of(NO_REGIONS)
    shared, shared_rows = rows.share(torch.zeros(0, 5), torch.tensor([2, 0]), None)
    assert shared.shape == (0, 5)
    assert shared_rows.mask.shape == (2, 0)
    chosen, most = mark_read((), NO_REGIONS)
    assert most == 0
    assert rows.read(chosen, most).take(torch.zeros(0, 5)).shape == (0, 5)


# -------------------------------------------------------------------------------------------------------------- sharing


@pytest.mark.parametrize("shared_count", [None, 12, 14, 20])
@pytest.mark.parametrize("count", [None, REAL + 3, MASK.numel()])
def test_shared_rows_are_repeated(count: int | None, shared_count: int | None) -> None:
    rows, states, row = Packing.of(MASK, count), padded(), torch.tensor([2, 2, 1, 0, 3])
    shared, shared_rows = rows.share(rows.pack(states), row, shared_count)
    assert torch.equal(shared_rows.mask, MASK[row])
    assert len(shared) == len(shared_rows.at) == (shared_count or 12)
    assert torch.equal(shared_rows.unpack_real(shared), masked(states[row], MASK[row]))


def test_rows_one_to_one_are_shared_as_they_are() -> None:
    rows = Packing.of(MASK)
    packed = rows.pack(padded())
    shared, shared_rows = rows.share(packed, None, None)
    assert shared is packed
    assert shared_rows is rows


# --------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("count", [None, REAL, REAL + 4])
def test_real_positions_that_are_read_are_taken(count: int | None) -> None:
    chosen = torch.tensor([[True, False, True, True], [True] * 4, [False] * 4, [False, True, False, True]])
    rows, states, read = Packing.of(MASK, count), padded(), chosen & MASK
    packed, reading = rows.pack(states), rows.read(chosen, 5)
    assert torch.equal(reading.rows.mask, read)
    assert reading.rows.lengths == [2, 0, 0, 1]
    assert torch.equal(reading.take(packed)[:3], states[read])
    assert torch.equal(reading.rows.unpack(reading.take(packed))[read], states[read])
    assert len(reading.rows.at) == (3 if count is None else 5)  # the host cannot count what it has not seen


def test_all_is_read_without_a_copy() -> None:
    rows = Packing.of(MASK)
    packed = rows.pack(padded())
    assert rows.read_all().take(packed) is packed
    assert rows.read_all().rows is rows


def slots(at: list[list[int]], mask: list[list[bool]], taken: list[int] | None = None) -> Slots:
    return Slots(at=torch.tensor(at), mask=torch.tensor(mask), taken=None if taken is None else torch.tensor(taken))


ONE = slots([[3], [0], [1], [0]], [[True], [False], [True], [True]])
TWO = slots(
    [[1, 3], [0, 0], [1, 2], [0, 0]], [[True, True], [False, False], [True, True], [False, False]], [0, 1, 4, 5]
)


@pytest.mark.parametrize(
    ("which", "first", "marked", "most"),
    [
        (None, None, [[1, 1, 1, 1]] * 4, 16),
        ((), None, [[0, 0, 0, 0]] * 4, 0),
        ((), [0, 3, 1, 2], [[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]], 4),
        ((ONE,), None, [[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]], 4),
        ((TWO,), None, [[0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], 4),
        ((ONE, TWO), [0, 0, 0, 0], [[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]], 12),
    ],
)
def test_marks(which: tuple[Slots, ...] | None, first: list[int] | None, marked: list[list[int]], most: int) -> None:
    found, bound = mark_read(which, MASK, first=None if first is None else torch.tensor(first))
    assert found.int().tolist() == marked
    assert bound == most
    assert bound >= found.sum()


JOINT = torch.cat([MASK, torch.tensor([[True, True], [False, False], [True, False], [True, True]])], dim=1)
"""Four tokens, and one region with the whole image behind it."""
PICKED = slots([[0], [0], [0], [0]], [[True], [True], [False], [True]])


@pytest.mark.parametrize(
    ("reads", "answer_at", "read"),
    [
        (EVERYTHING, None, [[1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0], [0, 1, 0, 0, 1, 1]]),
        (NOTHING, None, [[0, 0, 0, 0, 0, 0]] * 4),
        (POOLED, None, [[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]),
        (POOLED, [3, 0, 2, 1], [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]),
        (
            Reads(pooled=False, text=(TWO,), regions=(PICKED,), whole=False),
            [3, 0, 2, 1],
            [[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]],
        ),
        (
            Reads(pooled=False, text=(), regions=None, whole=True),
            None,
            [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]],
        ),
    ],
)
@pytest.mark.parametrize("filled", [False, True])
def test_what_is_read_of_a_joint_sequence(
    reads: Reads, answer_at: list[int] | None, read: list[list[int]], filled: bool
) -> None:
    rows, states = Packing.of(JOINT, JOINT.numel() if filled else None), torch.randn(*JOINT.shape, 2)
    reading = read_joint(
        reads,
        rows,
        num_tokens=4,
        num_regions=1,
        answer_at=None if answer_at is None else torch.tensor(answer_at),
    )
    assert reading.rows.mask.int().tolist() == read
    found = reading.rows.unpack_real(reading.take(rows.pack(states)))
    assert torch.equal(found, masked(states, torch.tensor(read, dtype=torch.bool)))


def test_reads_join() -> None:
    text = Reads(pooled=False, text=(ONE,), regions=(), whole=False)
    both = text | Reads(text=(TWO,), regions=(PICKED,), whole=False)
    assert both == Reads(pooled=True, text=(ONE, TWO), regions=(PICKED,), whole=False)
    assert text | EVERYTHING == EVERYTHING
    assert text | NOTHING == text


def test_counts_of_joint_sequences_add_up_where_the_host_knows_them() -> None:
    def text(count: int | None, row: Tensor | None = None, shared: int | None = None) -> Text:
        ids = torch.zeros(MASK.shape, dtype=torch.int64)
        return Text(ids=ids, mask=MASK, segments=ids, row=row, count=count, shared=shared)

    def regions(count: int | None, row: Tensor | None = None, shared: int | None = None) -> Regions:
        return Regions(
            features=torch.zeros(4, 4, 2),
            boxes=torch.zeros(4, 4, 4),
            mask=MASK,
            size=torch.ones(4, 2),
            row=row,
            count=count,
            shared=shared,
        )

    row, six = torch.arange(4), torch.tensor([0, 0, 1, 2, 3, 3])
    assert add_counts(text(9), regions(8)) == 17
    assert add_counts(text(9), regions(8), extra=2) == 25
    assert add_counts(text(9), None, extra=1) == 13
    assert add_counts(text(9), regions(8, row, 11)) == 20
    assert add_counts(text(9, six, 15), regions(18), extra=1) == 15 + 18 + 6
    for tokens, seen in [
        (text(None), regions(8)),
        (text(9), regions(None)),
        (text(9, row), regions(8)),
        (text(9), regions(8, row)),
        (text(None), None),
    ]:
        assert add_counts(tokens, seen) is None


def test_one_more_in_each_row_where_the_host_knows_the_rest() -> None:
    assert count_with_one_more(9, 4) == 13
    assert count_with_one_more(None, 4) is None


# ------------------------------------------------------------------------------------------------------------ gradients


def shared_and_read(states: Tensor, weight: Tensor, *, count: int | None) -> Tensor:
    """What a model does with packed states: pack, a layer, share rows out, read some, lay them out."""
    rows = Packing.of(MASK, count)
    packed = torch.tanh(rows.pack(states) @ weight)
    shared, shared_rows = rows.share(packed, torch.tensor([0, 2, 2, 1]), None if count is None else count + 3)
    chosen, most = mark_read((ONE, TWO), shared_rows.mask, first=torch.zeros(4, dtype=torch.int64))
    reading = shared_rows.read(chosen, most)
    return reading.rows.unpack_real(reading.take(shared) @ weight)


def padded_and_masked(states: Tensor, weight: Tensor) -> Tensor:
    """The same on all positions, with everything masked that is padding or not read."""
    row = torch.tensor([0, 2, 2, 1])
    shared = torch.tanh(states @ weight)[row]
    chosen = mark_read((ONE, TWO), MASK[row], first=torch.zeros(4, dtype=torch.int64))[0]
    return masked(shared @ weight, chosen & MASK[row])


@pytest.mark.parametrize("count", [None, REAL, REAL + 3, MASK.numel()])
def test_values_and_gradients_equal_masked_computation_on_all_positions(count: int | None) -> None:
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    states = padded(dtype=torch.float64).requires_grad_()
    paths: list[Callable[[Tensor, Tensor], Tensor]] = [
        functools.partial(shared_and_read, count=count),
        padded_and_masked,
    ]
    found = []
    for path in paths:
        output = path(states, weight)
        found.append((output, *torch.autograd.grad(output.sin().sum(), (states, weight))))
    for packed, expected in zip(*found, strict=True):
        assert_close(packed, expected)
    assert not found[0][1][~MASK].any()
    assert gradcheck(functools.partial(shared_and_read, count=count), (states, weight))


@pytest.mark.parametrize("count", [None, REAL + 3])
def test_what_fills_up_has_no_gradient_where_it_is_masked(count: int | None) -> None:
    """A mean over real positions, as models take it of regions."""
    states = padded(dtype=torch.float64).requires_grad_()
    rows = Packing.of(MASK, count)
    mean = masked(rows.unpack(F.gelu(rows.pack(states))), MASK).sum(1)
    mean.square().sum().backward()
    assert states.grad is not None
    assert not states.grad[~MASK].any()
    assert states.grad[MASK].all()
