"""One thread that computes, and the questions that wait for it.

PyTorch's number of threads is set for the whole process, and small rows change it briefly, so no two models may run at
the same time. All models therefore share one thread; questions that arrive while it is busy are batched per model.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

Work = Callable[[Sequence[Any]], Sequence[Any]]
"""What is done with items that wait for the same work: a result for each, which is an exception where it failed."""

_log = logging.getLogger("visling.serve")


class QueueFull(Exception):
    """As many questions wait as may."""


@dataclass(eq=False, slots=True)
class _Job:
    work: Work
    item: Any
    pixels: int
    result: asyncio.Future[Any]


class ComputeQueue:
    """Questions in the order of their arrival. Everything but the work itself happens in the event loop's thread."""

    def __init__(self, *, most_waiting: int, most_together: int, most_pixels: int, collect_seconds: float) -> None:
        self.most_waiting, self.most_together, self.most_pixels = most_waiting, most_together, most_pixels
        self.collect_seconds = collect_seconds
        self._waiting: deque[_Job] = deque()
        self._filled = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="visling-compute")

    async def ask(self, work: Work, item: Any, *, pixels: int = 0) -> Any:
        """The work's result for one item, which may be computed together with others of the same work. A caller who is
        cancelled while the item waits takes it out of the queue.

        Args:
            pixels: of the item's images; those that are computed together have at most `most_pixels`.
        Raises:
            QueueFull: too many items wait already.
            Exception: whatever the work returns for this item.
        """
        if len(self._waiting) >= self.most_waiting:
            raise QueueFull
        job = _Job(work, item, pixels, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._filled.set()
        try:
            return await job.result
        finally:
            if job in self._waiting:
                self._waiting.remove(job)

    async def run(self) -> None:
        """Compute until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._filled.wait()
            if len(self._waiting) < self.most_together:
                await asyncio.sleep(self.collect_seconds)
            jobs = self._take()
            if not jobs:
                continue
            try:
                results = await loop.run_in_executor(self._thread, jobs[0].work, [job.item for job in jobs])
            except Exception as error:  # a bug: those who wait must hear of it, and the others go on
                _log.exception("a computation failed")
                results = [error] * len(jobs)
            for job, result in zip(jobs, results, strict=True):
                if job.result.done():  # its client has left
                    continue
                if isinstance(result, Exception):
                    job.result.set_exception(result)
                else:
                    job.result.set_result(result)

    def close(self) -> None:
        """Start nothing new; who still waits is cancelled."""
        for job in self._waiting:
            job.result.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> list[_Job]:
        """The first item that waits and those that can be computed with it, taken out of the queue."""
        taken: list[_Job] = []
        pixels = 0
        for job in self._waiting:
            joins = not taken or (job.work == taken[0].work and pixels + job.pixels <= self.most_pixels)
            if joins and len(taken) < self.most_together:
                taken.append(job)
                pixels += job.pixels
        for job in taken:
            self._waiting.remove(job)
        if not self._waiting:
            self._filled.clear()
        return taken
