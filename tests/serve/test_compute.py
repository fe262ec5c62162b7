"""The queue before the models: what goes together, in which order, and what becomes of those who leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from visling.serve.compute import ComputeQueue, QueueFull


class Model:
    """Something that computes batches when it is let, and remembers them."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.threads: set[str] = set()
        self.free = threading.Event()
        self.free.set()

    def answer(self, items: Sequence[Any]) -> list[Any]:
        self.free.wait(5)
        self.batches.append(list(items))
        self.threads.add(threading.current_thread().name)
        return [ValueError(item) if item == "bad" else f"answer to {item}" for item in items]

    def inspect(self, items: Sequence[Any]) -> list[Any]:
        return [f"look at {item}" for item in self.answer(items)]


def with_queue(work: Callable[[ComputeQueue], Awaitable[Any]], **limits: Any) -> Any:
    """The result of some work with a running queue."""

    async def run() -> Any:
        settings = {"most_waiting": 100, "most_together": 4, "most_pixels": 100, "collect_seconds": 0.01, **limits}
        queue = ComputeQueue(**settings)
        running = asyncio.create_task(queue.run())
        try:
            return await asyncio.wait_for(work(queue), 10)
        finally:
            running.cancel()
            queue.close()

    return asyncio.run(run())


def test_items_of_one_work_go_together_in_their_order() -> None:
    first, second = Model(), Model()

    async def ask(queue: ComputeQueue) -> list[str]:
        asked = [(first.answer, 1), (second.answer, 2), (first.answer, 3), (first.inspect, 4), (first.answer, 5)]
        return await asyncio.gather(*(queue.ask(work, item) for work, item in asked))

    assert with_queue(ask) == [
        "answer to 1", "answer to 2", "answer to 3", "look at answer to 4", "answer to 5",
    ]  # fmt: skip
    assert first.batches == [[1, 3, 5], [4]]
    assert second.batches == [[2]]
    assert first.threads == second.threads
    assert len(first.threads) == 1, "all models are computed by one thread"


def test_a_batch_has_so_many_items_and_pixels() -> None:
    model = Model()

    async def ask(queue: ComputeQueue) -> Any:
        pixels = [60, 60, 40, 500, 0, 0, 0, 0, 0]
        return await asyncio.gather(*(queue.ask(model.answer, n, pixels=size) for n, size in enumerate(pixels)))

    with_queue(ask)
    assert model.batches == [[0, 2, 4, 5], [1, 6, 7, 8], [3]], "one that is too large alone is computed alone"


def test_an_error_is_its_own() -> None:
    model = Model()

    async def ask(queue: ComputeQueue) -> Any:
        return await asyncio.gather(*(queue.ask(model.answer, n) for n in ("a", "bad", "b")), return_exceptions=True)

    a, bad, b = with_queue(ask)
    assert (a, str(bad), b) == ("answer to a", "bad", "answer to b")
    assert isinstance(bad, ValueError)


def test_a_bug_fails_its_batch_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    def fail(items: Sequence[Any]) -> list[Any]:
        raise RuntimeError("a bug")

    async def ask(queue: ComputeQueue) -> Any:
        model = Model()
        asked = [queue.ask(fail, 1), queue.ask(model.answer, 2), queue.ask(fail, 3)]
        return await asyncio.gather(*asked, return_exceptions=True)

    first, second, third = with_queue(ask)
    assert (str(first), second, str(third)) == ("a bug", "answer to 2", "a bug")
    assert "a computation failed" in caplog.text


def test_who_leaves_is_not_computed_and_makes_room() -> None:
    model = Model()

    async def ask(queue: ComputeQueue) -> Any:
        model.free.clear()
        running = asyncio.create_task(queue.ask(model.answer, "running"))
        await asyncio.sleep(0.05)  # it is being computed
        waiting = [asyncio.create_task(queue.ask(model.answer, n)) for n in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await queue.ask(model.answer, "too many")
        waiting[1].cancel()
        await asyncio.sleep(0)
        last = asyncio.create_task(queue.ask(model.answer, "last"))
        running.cancel()  # its result is given to nobody
        model.free.set()
        return await asyncio.gather(waiting[0], waiting[2], last)

    assert with_queue(ask, most_waiting=3) == ["answer to 0", "answer to 2", "answer to last"]
    assert model.batches == [["running"], [0, 2, "last"]]


def test_what_waits_at_the_end_is_cancelled() -> None:
    async def ask(queue: ComputeQueue) -> bool:
        model = Model()
        model.free.clear()
        running = asyncio.create_task(queue.ask(model.answer, 1))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(queue.ask(model.answer, 2))
        await asyncio.sleep(0)
        queue.close()
        model.free.set()
        await asyncio.wait({waiting}, timeout=2)
        running.cancel()
        return waiting.cancelled()

    assert with_queue(ask)
