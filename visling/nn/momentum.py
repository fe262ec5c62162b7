"""What contrast over many batches needs: a momentum copy of a network, and a queue of the features that it computed (He
et al. 2020, MoCo).

Letters  N new rows, K capacity of the queue, E feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from visling import runtime
from visling.errors import ConfigError
from visling.shards import local_parts


def _same(name: str) -> str:
    return name


class MomentumCopy(nn.Module):
    """A network that is never trained: after each update of its source it moves a small step towards it. Runs without
    gradients.

    Its parameters require no gradient, which keeps them out of optimisers; they are saved with the module that owns the
    copy. A tensor that the source uses in two places is one parameter and moves once (CVLP's release moves its tied
    word table twice).
    """

    def __init__(self, network: nn.Module, *, momentum: float, source_name: Callable[[str], str] = _same) -> None:
        """Freeze `network`, which this module then owns.

        Args:
            momentum: share of the old value that is kept at each step.
            source_name: name of a parameter or buffer of `network` -> its name in the source.
        """
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ConfigError(
                f"momentum must lie in [0, 1]; found {momentum}. 1 never follows, 0 copies at every step."
            )
        self.momentum = momentum
        self.network = network.requires_grad_(False)
        self._source_name = source_name

    @torch.no_grad()
    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the network returns, without a graph."""
        return self.network(*arguments, **options)

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Copy = momentum x copy + (1 - momentum) x source, in one fused call; buffers become those of the source."""
        sources = dict(source.named_parameters())
        pairs = [(own, sources[self._source_name(name)]) for name, own in self.network.named_parameters()]
        if pairs:
            copies, originals = (local_parts(side) for side in zip(*pairs, strict=True))
            torch._foreach_lerp_(copies, originals, 1 - self.momentum)
        buffers = dict(source.named_buffers())
        for name, own in self.network.named_buffers():
            own.copy_(buffers[self._source_name(name)])


@runtime_checkable
class HasMomentumCopy(Protocol):
    """A network whose momentum copy is not simply a copy, as CVLP's, which skips layers."""

    def momentum_copy(self, momentum: float) -> MomentumCopy:
        """A copy with the current weights, that follows this network."""
        ...


@runtime_checkable
class DependsOnValues(Protocol):
    """A module whose path through `forward` depends on values or chance, so that it cannot be traced without them."""

    def use_typical_path(self) -> None:
        """Take from now on the path of a typical training step, whatever the values."""
        ...


@runtime_checkable
class DrawsPath(Protocol):
    """A module whose path through `forward` is drawn for all batches of an update at once, on all processes alike."""

    def draw_path(self, number: int) -> None:
        """Take from now on the path that belongs to the update of this number."""
        ...


class RingQueue(nn.Module):
    """The last K feature rows, first in, first out, written in place on the device; rows, position and fill are saved
    with the weights."""

    rows: Tensor
    """(K, E); in no particular order of age."""
    at: Tensor
    """() int64: where the next row goes."""
    filled: Tensor
    """() int64: rows written so far, at most K."""

    def __init__(self, capacity: int, size: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if capacity < 1:
            raise ConfigError(f"a queue must hold at least one row; found a capacity of {capacity}.")
        self.register_buffer("rows", torch.zeros(capacity, size, dtype=dtype))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self._full = False
        self.register_load_state_dict_post_hook(_reset_full)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        """Capacity."""
        return self.rows.shape[0]

    @property
    def full(self) -> bool:
        """Whether every row has been written. Waits for the device until it is; a full queue stays full."""
        if not self._full:
            self._full = bool(self.filled >= len(self))
        return self._full

    def use_typical_path(self) -> None:
        """Count as full without looking at the device."""
        self._full = True

    @torch.no_grad()
    def push(self, rows: Tensor, mask: Tensor) -> None:
        """Replace the oldest rows by the new ones (N, E) where `mask` (N,) holds, in order, without a device sync.

        Raises:
            ConfigError: more rows, real or not, than the queue holds.
        """
        if len(rows) > len(self):
            raise ConfigError(
                f"{len(rows)} rows are pushed into a queue of {len(self)}. Use a longer queue or smaller batches."
            )
        # Every row has a place of its own, masked rows after the real ones; they write the old value back.
        count = mask.sum()
        place = torch.where(mask, mask.cumsum(0) - 1, count + (~mask).cumsum(0) - 1)
        place = (self.at + place) % len(self)
        self.rows[place] = torch.where(mask[:, None], rows.to(self.rows.dtype), self.rows[place])
        self.at.copy_((self.at + count) % len(self))
        self.filled.copy_((self.filled + count).clamp(max=len(self)))


def _reset_full(queue: nn.Module, _: Any) -> None:
    """A loaded queue may be emptier than the one it replaces."""
    assert isinstance(queue, RingQueue)
    queue._full = False


def from_all_processes(rows: Tensor) -> Tensor:
    """The rows (N, ...) of all processes by rank, (processes x N, ...); the same N everywhere. With one process: the
    tensor itself."""
    if runtime.world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(runtime.world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
