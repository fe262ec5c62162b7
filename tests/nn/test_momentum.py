"""The slow copy and the ring queue: arithmetic, what is trained and saved, wrapping, exact restoring, several
processes."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.testing import assert_close

from visling.errors import ConfigError
from visling.nn.momentum import MomentumCopy, RingQueue, from_all_processes

WIDTH = 3


class Tied(nn.Module):
    """One table used twice, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, WIDTH)
        self.out = nn.Linear(WIDTH, 5)
        self.out.weight = self.table.weight
        self.dropout = nn.Dropout(0.5)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.out(self.dropout(self.table(ids)) - self.mean)
        return scores


def numbered(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(-1, WIDTH).contiguous()


def everything(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bool)


def test_copy_takes_a_share_of_the_way_and_a_tied_table_moves_once() -> None:
    source = Tied()
    slow = MomentumCopy(copy.deepcopy(source), momentum=0.75)
    before = {name: value.clone() for name, value in slow.network.named_parameters()}
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter))
        source.mean.add_(2.0)
    after = {name: value.clone() for name, value in source.named_parameters()}
    slow.update(source)
    assert before.keys() == {"table.weight", "out.bias"}
    for name, value in slow.network.named_parameters():
        assert_close(value, 0.75 * before[name] + 0.25 * after[name])
    assert torch.equal(slow.network.get_buffer("mean"), source.mean)
    assert all(torch.equal(after[name], value) for name, value in source.named_parameters())


def test_a_momentum_near_one_is_followed_to_the_last_digits() -> None:
    source, steps, momentum = nn.Linear(1, 1, bias=False).double(), 1000, 0.99995
    slow = MomentumCopy(copy.deepcopy(source), momentum=momentum)
    start = source.weight.item()
    with torch.no_grad():
        source.weight.fill_(start + 1)
    for _ in range(steps):
        slow.update(source)
    assert slow.network.get_parameter("weight").item() - start == pytest.approx(1 - momentum**steps, rel=1e-9)


@pytest.mark.parametrize(("momentum", "expected"), [(0.0, 5.0), (1.0, 1.0)])
def test_extreme_momentum(momentum: float, expected: float) -> None:
    source = nn.Linear(1, 1)
    nn.init.constant_(source.weight, 1.0)
    slow = MomentumCopy(copy.deepcopy(source), momentum=momentum)
    nn.init.constant_(source.weight, 5.0)
    slow.update(source)
    assert slow.network.get_parameter("weight").item() == expected


def test_a_copy_may_follow_under_other_names() -> None:
    source = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    slow = MomentumCopy(
        nn.ModuleDict({"c": nn.Linear(2, 2)}), momentum=0.0, source_name=lambda name: name.replace("c.", "b.")
    )
    slow.update(source)
    assert torch.equal(slow.network.get_parameter("c.weight"), source["b"].get_parameter("weight"))


def test_the_copy_has_no_gradient_and_no_place_in_an_optimiser() -> None:
    source = Tied()
    slow = MomentumCopy(copy.deepcopy(source), momentum=0.9)
    assert all(parameter.requires_grad for parameter in source.parameters())
    assert not any(parameter.requires_grad for parameter in slow.parameters())
    assert not slow(torch.tensor([1, 2])).requires_grad
    assert slow.state_dict().keys() == {f"network.{name}" for name in source.state_dict()}


def test_dropout_of_the_copy_follows_its_mode() -> None:
    slow, ids = MomentumCopy(Tied(), momentum=0.9), torch.arange(5)
    assert not torch.equal(slow.train()(ids), slow(ids))
    assert torch.equal(slow.eval()(ids), slow(ids))


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_impossible_momentum(momentum: float) -> None:
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\]"):
        MomentumCopy(nn.Linear(1, 1), momentum=momentum)


def test_queue_fills_wraps_and_forgets_the_oldest_first() -> None:
    queue = RingQueue(5, WIDTH)
    place = queue.rows.data_ptr()
    held: list[float] = []
    first = 0
    for count in (3, 1, 2, 5, 0, 4, 3):
        assert queue.full == (len(held) >= 5)
        queue.push(numbered(first, count), everything(count))
        held = [*held, *range(first, first + count)][-5:]
        first += count
        assert int(queue.filled) == len(held)
        assert sorted(queue.rows[: len(held), 0].tolist()) == sorted(held)
    assert queue.rows.data_ptr() == place
    assert torch.equal(
        torch.roll(queue.rows, -int(queue.at), 0), numbered(first - 5, 5)
    )  # from the position on: oldest to newest


def test_rows_that_are_not_real_do_not_enter() -> None:
    masks = [
        [True, False, True, True],
        [False, False, False, False],
        [False, True, True, False],
        [True, True, True, True],
        [False, True, False, True],
    ]
    queue, plain = RingQueue(4, WIDTH), RingQueue(4, WIDTH)
    for number, mask in enumerate(masks):
        rows, real = numbered(10 * number, 4), torch.tensor(mask)
        queue.push(rows.masked_fill(~real[:, None], torch.nan), real)
        plain.push(rows[real], everything(sum(mask)))
        assert torch.equal(queue.rows, plain.rows)
        assert (int(queue.at), int(queue.filled)) == (int(plain.at), int(plain.filled))


def test_too_many_rows_and_an_empty_queue_are_refused() -> None:
    with pytest.raises(ConfigError, match="6 rows are pushed into a queue of 5"):
        RingQueue(5, WIDTH).push(numbered(0, 6), everything(6))
    with pytest.raises(ConfigError, match="capacity of 0"):
        RingQueue(0, WIDTH)


def test_half_precision_queue_keeps_what_half_precision_can() -> None:
    queue, rows = RingQueue(4, WIDTH, dtype=torch.float16), torch.randn(3, WIDTH)
    queue.push(rows, everything(3))
    assert queue.rows.dtype == torch.float16
    assert torch.equal(queue.rows[:3], rows.half())


def test_restored_queue_goes_on_exactly() -> None:
    queue = RingQueue(5, WIDTH)
    queue.push(torch.randn(4, WIDTH), everything(4))
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    twin = RingQueue(5, WIDTH)
    twin.push(torch.randn(5, WIDTH), everything(5))
    was_full = [twin.full]
    twin.load_state_dict(torch.load(file, weights_only=True))
    was_full.append(twin.full)  # the loaded one has room
    more = torch.randn(3, WIDTH)
    for each in (queue, twin):
        each.push(more, torch.tensor([True, False, True]))
    assert queue.state_dict().keys() == {"rows", "at", "filled"}
    for name, value in queue.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name])
    assert [*was_full, twin.full] == [True, False, True]


def test_deep_copies_are_apart() -> None:
    queue = RingQueue(3, WIDTH)
    twin = copy.deepcopy(queue)
    queue.push(numbered(1, 3), everything(3))
    assert queue.full
    assert not twin.full
    assert not twin.rows.any()


def _process(rank: int, store: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        queue = RingQueue(5, WIDTH)
        for first in (0, 100):
            mask = torch.tensor([True, rank == 0])
            queue.push(from_all_processes(numbered(first + 10 * rank, 2)), from_all_processes(mask))
        torch.save(queue.state_dict(), f"{results}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_all_processes_hold_the_same_queue(tmp_path: Path) -> None:
    spawn(_process, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["rows"][:, 0].tolist() == [110, 1, 10, 100, 101]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_alone_nothing_is_copied() -> None:
    rows = numbered(0, 2)
    assert from_all_processes(rows) is rows
