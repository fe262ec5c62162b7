"""Tensors that are spread over processes (`train.shard`), and arithmetic on each process's part of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_spread(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Asked by the name of a method: importing the class takes seconds, which ordinary runs
    are spared."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, without gradient and in the same memory: what is done to the part is done to the
    tensor. One that is not spread is its own part."""
    spread: Any = tensor
    return spread.to_local().detach() if is_spread(tensor) else tensor


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`local` of each."""
    return [local(tensor) for tensor in tensors]


def complete(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is spread, on every process, all of which must ask for it; one that is not spread is
    returned as it is."""
    spread: Any = tensor
    return spread.full_tensor() if is_spread(tensor) else tensor


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy complete values into a tensor; each process copies its own part.

    Raises:
        RuntimeError: of another shape.
    """
    if is_spread(tensor):
        spread: Any = tensor
        mesh, placements = spread.device_mesh, spread.placements
        values = dist.tensor.distribute_tensor(values, mesh, placements, src_data_rank=None)
    tensor.copy_(values)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """(len(tensors),) 2-norm of each tensor, by one message for all that are spread. Every process must ask for those
    of the same tensors, at least one."""
    own = torch.stack(torch._foreach_norm(local_parts(tensors)))
    spread = [is_spread(tensor) for tensor in tensors]
    if not any(spread):
        return own
    totals = own.square()
    dist.all_reduce(totals)
    return torch.where(torch.tensor(spread, device=own.device), totals.sqrt(), own)
