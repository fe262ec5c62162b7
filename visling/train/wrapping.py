"""How a module is made parallel: what the processes of a run send each other when, and nothing else."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from visling import runtime
from visling.train.config import TrainConfig
from visling.train.sharding import Sharded


class Wrapped(Protocol):
    """A module whose gradients, after `finish`, are means over all processes."""

    def __call__(self, *item: Any) -> Any:
        """What the module returns."""
        ...

    def micro_step(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Context of forward and backward of one micro-batch; only the last one of an update sends messages."""
        ...

    def finish(self) -> None:
        """Called after the last backward of an update and before its optimiser."""
        ...

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the parameters are plain, complete tensors on every process, and in which forward sends no
        messages: processes may call the model as often as they like. Every process must enter it."""
        ...


def wrap(module: nn.Module, config: TrainConfig, device: torch.device) -> Wrapped:
    """A module, on its device, made parallel as the run needs it. Its parameters may be replaced by others, so
    optimisers and averages are made after it.

    Raises:
        ConfigError: `config.shard`, which this PyTorch cannot do.
    """
    if runtime.world_size() == 1:
        return _Plain(module)
    if config.shard:
        return Sharded(module, device, unused=config.unused_parameters)
    return _DataParallel(module, device, unused=config.unused_parameters)


class _Plain:
    """One process."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *item: Any) -> Any:
        return self._module(*item)

    def micro_step(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def finish(self) -> None:
        """Nothing to do."""

    def whole(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
"""The option that sends buffers at every step, as the installed PyTorch names it."""


class _WithUnused(nn.Module):
    """A module with a parameter that never receives a gradient: if DistributedDataParallel looks for such parameters
    and finds none, it prints a warning that means nothing to a user. On a GPU, where such a parameter makes every step
    wait for the device, the warning is the lesser evil."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, *item: Any) -> Any:
        return self.module(*item)


class _DataParallel:
    """Several processes, each with the whole model; gradients are sent while backward still runs.

    Args:
        unused: some parameters receive no gradient in some steps, perhaps on some processes only.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, unused: bool) -> None:
        options: dict[str, Any] = {_SYNC_BUFFERS: False}
        if unused and device.type == "cpu":
            module = _WithUnused(module)
        # Gradients are views of the messages, which saves a copy of each and lets messages leave during backward.
        # No static_graph: the weights of losses, paused tasks and text without images change what is trained.
        self._parallel = DistributedDataParallel(
            module, find_unused_parameters=unused, gradient_as_bucket_view=True, **options
        )

    def __call__(self, *item: Any) -> Any:
        return self._parallel(*item)

    def micro_step(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self._parallel.no_sync()

    def finish(self) -> None:
        """Nothing to do: the last backward has waited for its messages."""

    def whole(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()
