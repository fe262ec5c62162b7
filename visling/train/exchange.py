"""Values that the processes of a run tell each other; every process must call these."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

from visling import runtime

_T = TypeVar("_T")


def from_main(value: _T) -> _T:
    """The main process's value on every process."""
    if runtime.world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: _T) -> list[_T]:
    """Every process's value, by rank."""
    if runtime.world_size() == 1:
        return [value]
    values: list[Any] = [None] * runtime.world_size()
    dist.all_gather_object(values, value)
    return values
