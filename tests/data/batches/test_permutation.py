"""Orders that are computed: every number once, another order for every key, no trace of the place in the number."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visling import runtime
from visling.data.batches import permutation
from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader
from visling.data.batches.permutation import InOrder, KeyedOrder, shuffle
from visling.data.text import TextLayout, Tokenizer
from visling.types import Example, InputSpec


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 3000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 99))
def test_every_number_comes_once(count: int, seed: int, epoch: int) -> None:
    order = KeyedOrder(count, seed, epoch)
    assert len(order) == count
    assert np.sort(order[:]).tolist() == list(range(count))


@pytest.mark.parametrize("count", [(1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_every_number_of_many_comes_once(count: int) -> None:
    numbers = KeyedOrder(count, 1)[:]
    assert numbers.dtype == np.int64
    assert np.array_equal(np.sort(numbers), np.arange(count))


def test_a_part_is_a_part_of_the_whole() -> None:
    for order in (KeyedOrder(1000, 5), InOrder(1000)):
        whole = order[:]
        assert np.array_equal(order[130:170], whole[130:170])
        assert np.array_equal(order[990:2000], whole[990:])
        assert len(order[1000:1004]) == 0
    assert InOrder(4)[:].tolist() == [0, 1, 2, 3]


def test_seed_and_epoch_give_other_orders() -> None:
    orders = [KeyedOrder(10_000, seed, epoch)[:] for seed in range(4) for epoch in range(4)]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert (one == other).sum() < 12, "independent orders agree in one place on average"
    assert np.array_equal(orders[5], KeyedOrder(10_000, 1, 1)[:])


def standard_deviations(counts: np.ndarray, freedom: int) -> float:
    """How far the chi-square statistic of counts that should be equal lies above its mean."""
    expected = counts.mean()
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_every_number_is_as_likely_at_every_place() -> None:
    count, keys = 12, 3000
    met = np.zeros((count, count))
    for key in range(keys):
        met[np.arange(count), KeyedOrder(count, 3, key)[:]] += 1
    assert abs(standard_deviations(met, (count - 1) ** 2)) < 4


def test_neighbours_in_a_large_order_know_nothing_of_each_other() -> None:
    count = 10**9
    order = KeyedOrder(count, 1, 2)
    numbers = np.concatenate([order[start : start + 10_000] for start in range(0, count, count // 50)])
    cells = numbers * 30 // count
    assert abs(standard_deviations(np.bincount(cells, minlength=30), 29)) < 4
    assert abs(standard_deviations(np.bincount(cells[:-1] * 30 + cells[1:], minlength=900), 899)) < 4
    assert abs(standard_deviations(np.bincount(numbers % 97, minlength=97), 96)) < 4


def test_the_test_of_randomness_can_fail() -> None:
    numbers = np.arange(500_000) * 7 % 1000
    assert standard_deviations(np.bincount(numbers * 30 // 1000, minlength=30), 29) > 4


def test_orders_of_few_examples_are_those_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that were begun before there were computed orders are resumed in theirs."""
    assert permutation.MOST_LISTED == 16_777_216
    expected = runtime.generator_for(3, 1).permutation(1000)
    monkeypatch.setattr(permutation, "MOST_LISTED", 1000)
    assert np.array_equal(shuffle(1000, 3, 1)[:], expected)
    assert isinstance(shuffle(1001, 3, 1), KeyedOrder)


class Billion:
    """10^9 examples, none of which exists before it is asked for."""

    def __init__(self) -> None:
        self.layout = TextLayout(Tokenizer(), InputSpec())

    def __len__(self) -> int:
        return 10**9

    def example(self, index: int, rng: np.random.Generator) -> Example:
        return Example(id=str(index), rows=(self.layout.row("a cat"),), images=())


@pytest.mark.parametrize("shuffled", [True, False])
def test_a_loader_of_a_billion_examples_starts_and_resumes_at_once(shuffled: bool) -> None:
    source = Billion()
    collator = Collator(None, source.layout.spec, source.layout.tokenizer)

    def batches(epoch: int, first: int, count: int) -> list[list[int]]:
        loader = Loader(
            source, collator, batch_size=8, seed=1, shuffle=shuffled, bucket=4, prefetch=0, rank=1, world_size=2
        )
        loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "batches": first})
        made = loader.batches_with_index()
        return [next(made)[0].tolist() for _ in range(count)]

    last = 10**9 // 16 - 3
    tracemalloc.start()
    whole = batches(3, last, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6, f"{peak / 1e6:.0f} MB"
    assert batches(3, last + 1, 2) == whole[1:]
    assert (whole == batches(2, last, 3)) is not shuffled
    assert len({number for batch in whole for number in batch}) == 3 * 8
