"""Moving batches to the device before they are used."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_T = TypeVar("_T")


def move_ahead(items: Iterable[_T], device: torch.device) -> Generator[_T, None, None]:
    """Items with their tensors on the device; on a GPU the next one is copied while the current one is in use."""
    if device.type != "cuda":
        for item in items:
            yield pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), item)
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ready: list[_T] = []
    for item in items:
        with torch.cuda.stream(side):
            copied = pytree.tree_map_only(Tensor, lambda tensor: _start_copy(tensor, device), item)
        if ready:
            yield _await_copy(ready.pop(), side, device)
        ready.append(copied)
    if ready:
        yield _await_copy(ready.pop(), side, device)


def _start_copy(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if tensor.device.type == "cpu" else tensor.to(device)


def _await_copy(item: _T, side: torch.cuda.Stream, device: torch.device) -> _T:
    """Make the device's own stream wait for the copy, and keep the memory until that stream has used it."""
    current = torch.cuda.current_stream(device)
    current.wait_stream(side)
    for leaf in pytree.tree_leaves(item):
        if isinstance(leaf, Tensor):
            leaf.record_stream(current)
    return item
