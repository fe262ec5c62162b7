"""How fast a device multiplies matrices, which a run's utilisation is measured against.

Measured  The best of some products of two square matrices in the run's precision, on its device and with its threads.
          The matrices are so large that one product takes at least `LEAST` seconds: larger ones are no faster.
Several   Processes multiply at the same time, since they may share cores or a power limit; the rate of a group is the
          sum of theirs.
"""

from __future__ import annotations

import functools
import time

import torch

from visling import runtime
from visling.train.exchange import gather

SMALLEST, LARGEST = 512, 8192
"""Rows of the matrices that are tried, doubled from one to the next."""
LEAST = 2e-3
"""Seconds of a product that is large enough."""
SECONDS = 0.1
"""For how long products of that size are repeated."""


def measure_rate(device: torch.device, precision: runtime.Precision) -> float:
    """Floating-point operations a second of matrix products, two for each multiplication and addition, of all processes
    together. Every process must call it. What was measured once in a process is not measured again there."""
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return _measure_group(device, runtime.resolve(precision, device), threads, runtime.world_size())


@functools.cache
def _measure_group(device: torch.device, precision: runtime.Precision, threads: int, processes: int) -> float:
    gather(None)  # all begin at the same time
    return sum(gather(_measure_own(device, precision)))


def _measure_own(device: torch.device, precision: runtime.Precision) -> float:
    """Rate of this process alone, whatever the others do."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # the global ones belong to the run
    size, seconds = SMALLEST, 0.0
    while True:
        a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
        out = a @ b  # the first product of a size also loads kernels
        seconds = _time_product(a, b, out)
        if seconds >= LEAST or size == LARGEST:
            break
        size *= 2
    spent, best = seconds, seconds
    while spent < SECONDS:
        seconds = _time_product(a, b, out)
        spent, best = spent + seconds, min(best, seconds)
    return 2 * size**3 / best


def _time_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    _synchronise(a.device)
    began = time.perf_counter()
    torch.mm(a, b, out=out)
    _synchronise(a.device)
    return time.perf_counter() - began


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
