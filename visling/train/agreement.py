"""What the processes of a run decide together, once per update.

Every process contributes a few numbers, and all get the highest of each. They travel from CPU to CPU, on GPUs through a
group of their own next to NCCL's: the devices are not waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from visling import runtime
from visling.train.interruption import STRENGTH, Asked


@dataclass(frozen=True, kw_only=True)
class Signs:
    """What one process sees, or what all of them have seen."""

    asked: Asked = ""
    """Whether the run has been asked to end."""
    time_over: bool = False
    """`train.max_seconds` have passed."""
    line_overdue: bool = False
    """`train.log_seconds` have passed since the last line."""
    elapsed: float = 0.0
    """Seconds spent on the run by the clock of the main process."""


class Agreement:
    """Makes all processes see the same signs, so that they stop, log and end an epoch at the same update.

    Args:
        look: what this process sees now.
    """

    def __init__(self, look: Callable[[], Signs]) -> None:
        self._look, self._alone = look, runtime.world_size() == 1
        self._group: dist.ProcessGroup | None = None
        if not self._alone and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo", timeout=runtime.PATIENCE)
        self._common = look()
        self.exchange()

    @property
    def signs(self) -> Signs:
        """Of one process what it sees now; of several what they saw at the last exchange."""
        return self._look() if self._alone else self._common

    def exchange(self, *, alarm: bool = False) -> bool:
        """Tell the others what this process sees, and hear it from them.

        Returns:
            Whether any process gave alarm.
        """
        if self._alone:
            return alarm
        own = self._look()
        elapsed = own.elapsed if runtime.is_main() else 0.0
        flags = (float(alarm), float(STRENGTH.index(own.asked)), float(own.time_over), float(own.line_overdue))
        message = torch.tensor([*flags, elapsed], dtype=torch.float64)
        dist.all_reduce(message, dist.ReduceOp.MAX, group=self._group)
        alarmed, asked, over, overdue, elapsed = message.tolist()
        self._common = Signs(
            asked=STRENGTH[int(asked)], time_over=bool(over), line_overdue=bool(overdue), elapsed=elapsed
        )
        return bool(alarmed)

    def close(self) -> None:
        """Give the group back."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
