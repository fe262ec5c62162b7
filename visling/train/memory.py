"""The most memory that a process has taken."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def take_peak_memory(device: torch.device) -> int | None:
    """Bytes: on a GPU the most that tensors took there since the last call, which starts a new peak; elsewhere the
    largest resident memory of this process since it started. None where the system does not say."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    # Linux: `getrusage` would include the memory of the process that started this one
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return _read_usage()


def _read_usage() -> int | None:
    """What `getrusage` says; None on Windows, which has none."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
