"""How a module is made parallel: what the processes of a run send each other when, and nothing else."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from visling import runtime
from visling.train.config import TrainConfig


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
    """A module, on its device, made parallel as the run needs it. Its parameters may be replaced by others, so that
    optimisers and averages must be made after it."""
    if runtime.world_size() == 1:
        return _Plain(module)
    if config.shard:
        return _shard(module, config, device)
    if device.type == "cuda":
        return _DataParallel(module, config)
    return _OneMessage(module)


def _shard(module: nn.Module, config: TrainConfig, device: torch.device) -> Wrapped:
    # Imported by those that need it: with DTensor it takes seconds
    sharding = importlib.import_module("visling.train.sharding")
    sharded: Wrapped = sharding.Sharded(module, device, unused=config.unused_parameters)
    return sharded


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


class _OneMessage(_Plain):
    """Several processes whose gradients are averaged by one message per update."""

    def finish(self) -> None:
        average_gradients(list(self._module.parameters()))


_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
"""The option that sends buffers at every step, as the installed PyTorch names it."""


class _DataParallel:
    """Several processes, each with the whole model; gradients are sent while backward still runs."""

    def __init__(self, module: nn.Module, config: TrainConfig) -> None:
        options: dict[str, Any] = {_SYNC_BUFFERS: False}
        # Gradients are views of the messages, which saves a copy of each and lets messages leave during backward.
        # No static_graph: the weights of losses, paused tasks and text without images change what is trained.
        self._parallel = DistributedDataParallel(
            module, find_unused_parameters=config.unused_parameters, gradient_as_bucket_view=True, **options
        )

    def __call__(self, *item: Any) -> Any:
        return self._parallel(*item)

    def micro_step(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self._parallel.no_sync()

    def finish(self) -> None:
        """Nothing to do: the last backward has waited for its messages."""

    def whole(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace gradients by their means over processes; one that a process lacks counts as zero, one that all lack
    remains None.

    On a CPU sending early, as DistributedDataParallel does, gains nothing, and one message per update is faster than
    one for every few layers. It also avoids a rare failure there: with several threads in a process,
    DistributedDataParallel was seen to lose its own state in backward.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    present = torch.tensor([float(parameter.grad is not None) for parameter in trained])
    parts = [
        torch.zeros(parameter.numel()) if parameter.grad is None else parameter.grad.float().flatten()
        for parameter in trained
    ]
    message = torch.cat([present, *parts])
    torch.distributed.all_reduce(message)
    present, *sums = torch.split(message, [len(trained), *(parameter.numel() for parameter in trained)])
    for parameter, total, owners in zip(trained, sums, present.tolist(), strict=True):
        if owners:
            parameter.grad = (total / runtime.world_size()).view_as(parameter).to(parameter.dtype)
