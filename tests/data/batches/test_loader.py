"""Order, shares of processes, exact resume, and the thread behind it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader
from visling.data.batches.masking import TokenMasking
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError, StoreError
from visling.types import Batch, Example, InputSpec, Targets

TOKENIZER = Tokenizer()
SPEC = InputSpec()
LAYOUT = TextLayout(TOKENIZER, SPEC)


class Sentences:
    """Sentences of many lengths; a drawn number goes into the label."""

    def __init__(self, count: int, broken: Callable[[int], bool] = lambda index: False) -> None:
        self.count, self.broken = count, broken
        self.made = 0

    def __len__(self) -> int:
        return self.count

    def example(self, index: int, rng: np.random.Generator) -> Example:
        if self.broken(index):
            raise StoreError(f"example {index} is broken")
        self.made += 1
        text = " ".join(["cat"] * (1 + index * 7 % 23))
        return Example(
            id=str(index), rows=(LAYOUT.row(text),), images=(), labels={"choice": int(rng.integers(1_000_000))}
        )


def loader(count: int = 50, **settings: Any) -> Loader:
    source = settings.pop("source", None) or Sentences(count)
    collator = Collator(
        None,
        SPEC,
        TOKENIZER,
        masking=settings.pop("masking", TokenMasking()),
    )
    return Loader(source, collator, **{"batch_size": 4, "seed": 1, "bucket": 3, **settings})


def contents(batch: Batch, targets: Targets) -> tuple[Any, ...]:
    assert targets.choice is not None
    assert targets.token_slots is not None
    return batch.text.ids.tolist(), targets.choice.tolist(), targets.token_slots.at.tolist()


def indices(made: Loader) -> list[list[int]]:
    return [list(map(int, index)) for index, _, _ in made.batches_with_index()]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_every_example_once(prefetch: int) -> None:
    made = loader(prefetch=prefetch)
    batches = indices(made)
    assert len(batches) == len(made) == 12
    seen = [index for batch in batches for index in batch]
    assert len(seen) == len(set(seen)) == 48
    assert {len(batch) for batch in batches} == {4}
    made.epoch = 1
    assert indices(made) != batches
    made.epoch = 0
    assert indices(made) == batches


def test_evaluation_keeps_order_and_the_last_batch() -> None:
    made = Loader(Sentences(10), Collator(None, SPEC, TOKENIZER), batch_size=4, seed=1, shuffle=False, drop_last=False)
    assert indices(made) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(made) == 3


def test_index_belongs_to_batch() -> None:
    for index, batch, targets in loader(masking=None, shuffle=True).batches_with_index():
        assert batch.text.mask.sum(1).tolist() == [3 + int(number) * 7 % 23 for number in index]
        assert targets.choice is not None


def test_seed_changes_order_and_randomness() -> None:
    first, second = (loader(seed=seed, shuffle=False) for seed in (1, 2))
    a, b = next(iter(first))[1].choice, next(iter(second))[1].choice
    assert a is not None
    assert b is not None
    assert a.tolist() != b.tolist()
    assert indices(loader(seed=1)) != indices(loader(seed=2))


def test_examples_do_not_depend_on_order_or_batch_size() -> None:
    def by_index(made: Loader) -> dict[int, int]:
        return {
            int(number): int(choice)
            for index, _, targets in made.batches_with_index()
            if targets.choice is not None
            for number, choice in zip(index, targets.choice, strict=True)
        }

    whole = by_index(loader(shuffle=False, drop_last=False))
    for changed in (by_index(loader(batch_size=7)), by_index(loader(bucket=1, prefetch=0))):
        assert changed.items() <= whole.items()
    assert by_index(loader(seed=2, shuffle=False, drop_last=False)) != whole


def test_buckets_cut_padding() -> None:
    def filled(bucket: int) -> float:
        return float(np.mean([batch.text.mask.float().mean().item() for batch, _ in loader(400, bucket=bucket)]))

    assert filled(10) > 0.9
    assert filled(1) < 0.75


def test_batches_of_a_chunk_come_in_mixed_lengths() -> None:
    widths = [batch.text.ids.shape[1] for batch, _ in loader(400, bucket=100)]
    assert widths != sorted(widths)


def test_a_smaller_batch_comes_last_and_is_no_longer_than_others() -> None:
    batches = [(index, batch) for index, batch, _ in loader(49, drop_last=False, bucket=100).batches_with_index()]
    assert [len(index) for index, _ in batches] == [4] * 12 + [1]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_each_global_batch(world: int, shuffle: bool) -> None:
    alone = indices(loader(batch_size=2 * world, shuffle=shuffle))
    shares = [indices(loader(batch_size=2, rank=rank, world_size=world, shuffle=shuffle)) for rank in range(world)]
    assert [sorted(index for part in parts for index in part) for parts in zip(*shares, strict=True)] == [
        sorted(batch) for batch in alone
    ]
    assert {len(share) for share in shares} == {len(alone)}


def divide(world: int, parts: int, **settings: Any) -> list[Loader]:
    """The loaders of processes that share global batches of 12."""
    size = 12 // (world * parts)
    return [
        loader(batch_size=size, accumulation=parts, rank=rank, world_size=world, **settings) for rank in range(world)
    ]


def global_batches(loaders: list[Loader]) -> list[list[int]]:
    """Examples of each global batch in its order, which a process has every so many-th of in each micro-batch."""
    shares = [indices(made) for made in loaders]
    parts = loaders[0].accumulation
    assert {len(share) for share in shares} == {len(loaders[0])} == {len(shares[0]) // parts * parts}
    batches = []
    for first in range(0, len(shares[0]), parts):
        members = [[share[first + part] for share in shares] for part in range(parts)]
        batches.append(
            [index for step in zip(*(one for part in members for one in part), strict=True) for index in step]
        )
    return batches


@pytest.mark.parametrize(("world", "parts"), [(2, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 2), (4, 1), (12, 1), (1, 12)])
@pytest.mark.parametrize("bucket", [1, 3])
def test_a_global_batch_is_the_same_however_it_is_divided(world: int, parts: int, bucket: int) -> None:
    (alone,) = divide(1, 1, bucket=bucket)
    expected = global_batches([alone])
    assert expected == indices(loader(batch_size=12, bucket=bucket))
    assert len(expected) == 50 // 12
    assert global_batches(divide(world, parts, bucket=bucket)) == expected


def test_a_smaller_last_batch_is_divided_too() -> None:
    loaders = divide(2, 3, drop_last=False, bucket=1)
    shares = [indices(made) for made in loaders]
    assert [len(share) for share in shares] == [len(made) for made in loaders] == [13, 13]  # 50 = 4 x 12 + 2
    assert sorted(index for share in shares for batch in share for index in batch) == list(range(50))


def test_another_division_resumes_after_a_global_batch_and_not_within_one() -> None:
    whole = global_batches(divide(1, 1))
    first = divide(1, 3)[0]
    batches = first.batches_with_index()
    for _ in range(6):
        next(batches)
    between = json.loads(json.dumps(first.state_dict()))
    next(batches)
    within = json.loads(json.dumps(first.state_dict()))
    batches.close()  # type: ignore[attr-defined]
    assert (between["batches"], between["updates"]) == (6, 2)
    later = divide(2, 2)
    for made in later:
        made.load_state_dict(between)
        assert made.position == 4
    shares = [indices(made) for made in later]
    assert [sorted(index for share in shares for part in share[at : at + 2] for index in part) for at in (0, 2)] == [
        sorted(batch) for batch in whole[2:]
    ]
    with pytest.raises(ConfigError, match="within a global batch that 1 processes shared out in 3 micro-batches"):
        later[0].load_state_dict(within)
    again = divide(1, 3)[0]
    again.load_state_dict(within)
    assert again.position == 7


def test_evaluation_over_processes_sees_every_example_once() -> None:
    loaders = [loader(14, batch_size=2, rank=rank, world_size=3, shuffle=False, drop_last=False) for rank in range(3)]
    shares = [indices(made) for made in loaders]
    assert [len(share) for share in shares] == [len(made) for made in loaders] == [3, 3, 2]
    assert sorted(index for share in shares for batch in share for index in batch) == list(range(14))


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(8, 60),
    batch_size=st.integers(1, 8),
    bucket=st.integers(1, 5),
    stop=st.integers(0, 20),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    prefetch=st.sampled_from([0, 3]),
)
def test_resume_is_exact(
    count: int, batch_size: int, bucket: int, stop: int, drop_last: bool, shuffle: bool, prefetch: int
) -> None:
    options = {
        "batch_size": batch_size,
        "bucket": bucket,
        "drop_last": drop_last,
        "shuffle": shuffle,
        "prefetch": prefetch,
    }
    whole = loader(count, **options)
    whole.epoch = 3
    expected = [contents(*pair) for pair in whole]
    stop = min(stop, len(expected))
    first = loader(count, **options)
    first.epoch = 3
    given_out = iter(first)
    seen = [contents(*next(given_out)) for _ in range(stop)]
    state = first.state_dict()
    given_out.close()  # type: ignore[attr-defined]
    second = loader(count, **options)
    second.load_state_dict(state)
    assert second.epoch == 3
    assert second.state_dict() == state
    second.epoch = 3
    assert seen + [contents(*pair) for pair in second] == expected
    assert len(list(second)) == len(expected), "a later pass is whole again"


def test_a_state_taken_while_batches_are_ahead_counts_those_handed_out() -> None:
    made = loader(prefetch=8)
    batches = iter(made)
    next(batches)
    time.sleep(0.1)
    assert made.state_dict()["batches"] == 1
    batches.close()  # type: ignore[attr-defined]


def test_another_epoch_forgets_the_position() -> None:
    made = loader()
    made.load_state_dict({**made.state_dict(), "batches": 5})
    made.epoch = 1
    assert len(list(made)) == 12


@pytest.mark.parametrize("changes", [{"seed": 2}, {"count": 51}, {"batch_size": 5}, {"bucket": 2}, {"shuffle": False}])
def test_a_state_of_other_settings_is_refused(changes: dict[str, Any]) -> None:
    state = loader().state_dict()
    with pytest.raises(ConfigError, match="cannot resume the loader"):
        loader(**changes).load_state_dict(state)


def loader_threads() -> int:
    return sum(thread.name == "visling-loader" for thread in threading.enumerate())


def test_exceptions_arrive_in_order_and_end_the_thread() -> None:
    made = loader(source=Sentences(50, broken=lambda index: index == 9), shuffle=False, bucket=1)
    got: list[list[int]] = []
    with pytest.raises(StoreError, match="example 9 is broken"):
        got.extend(index.tolist() for index, _, _ in made.batches_with_index())
    assert got == [[0, 1, 2, 3], [4, 5, 6, 7]], "the batches before the broken one were handed out"
    assert loader_threads() == 0


def test_leaving_early_ends_the_thread() -> None:
    before = loader_threads()
    source = Sentences(10_000)
    for _ in loader(source=source, prefetch=2, bucket=2):
        break
    deadline = time.monotonic() + 5
    while loader_threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loader_threads() == before
    assert source.made < 200, "the queue is bounded"


def test_a_program_that_ends_by_an_error_is_not_aborted() -> None:
    """The iteration is never closed, and its thread is in the middle of torch: stopped there by the interpreter, it
    would end the process with "terminate called without an active exception"."""
    program = """
import threading
import torch
from visling.data.batches.loader import _prefetch

def work():
    while True:
        yield torch.cat([torch.randn(50) for _ in range(200)]).sum()

batches = _prefetch(work(), 100_000, threading.Event())
next(batches)
raise SystemExit(3)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (3, "")


def test_work_is_ahead_of_the_consumer() -> None:
    source = Sentences(400)
    batches = iter(loader(source=source, prefetch=3, bucket=1))
    next(batches)
    deadline = time.monotonic() + 5
    while source.made < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert source.made >= 16
    batches.close()  # type: ignore[attr-defined]


def test_batches_are_valid_and_equal_without_the_thread() -> None:
    ahead, alone = loader(prefetch=4), loader(prefetch=0)
    for (a, targets_a), (b, targets_b) in zip(ahead, alone, strict=True):
        a.validate()
        assert torch.equal(a.text.ids, b.text.ids)
        assert contents(a, targets_a) == contents(b, targets_b)


def test_the_first_batch_of_a_run_is_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Batch] = []
    monkeypatch.setattr(Batch, "validate", lambda batch: checked.append(batch))
    made = loader()
    assert len(list(made)) + len(list(made)) > 2
    assert len(checked) == 1

    def refuse(batch: Batch) -> None:
        raise ValueError("invalid batch: a real box has no area")

    monkeypatch.setattr(Batch, "validate", refuse)
    with pytest.raises(DataError, match=r"a real box has no area\. Look at the store"):
        next(iter(loader()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"bucket": 0}, "bucket"),
        ({"accumulation": 0}, "accumulation"),
        ({"count": 10, "accumulation": 3}, "accumulation = 3"),
        ({"count": 3}, "do not fill one batch of 4"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loader(**changes)
