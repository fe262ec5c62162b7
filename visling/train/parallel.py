"""Forward and backward of a micro-batch; the mean of gradients over processes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from visling import runtime
from visling.errors import ConfigError
from visling.train.config import TrainConfig
from visling.types import Loss

Step = Callable[[Any, Any], Loss]
"""Forward and loss of one micro-batch: `step(batch, targets)`."""


class _Stepped(nn.Module):
    """A step as a module, so that DistributedDataParallel sees all of it, loss and heads included."""

    def __init__(self, model: nn.Module, step: Step) -> None:
        super().__init__()
        self.model = model
        self._step = step

    def forward(self, *item: Any) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        loss = self._step(*item)
        return loss.value, dict(loss.parts)


_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
"""The option that sends buffers at every step, as the installed PyTorch names it."""


class Backward:
    """Forward and backward of a micro-batch, scaled so that the gradients of an update are those of its mean loss."""

    def __init__(self, model: nn.Module, step: Step, config: TrainConfig, device: torch.device) -> None:
        run: Step = torch.compile(step) if config.compile else step
        self._config, self._device = config, device
        self._module = _Stepped(model, run)
        self._parallel: DistributedDataParallel | None = None
        if runtime.world_size() > 1 and device.type == "cuda":
            options: dict[str, Any] = {_SYNC_BUFFERS: False}
            self._parallel = DistributedDataParallel(
                self._module, find_unused_parameters=config.unused_parameters, **options
            )
        self._counts: list[Tensor] = []

    def __call__(self, item: tuple[Any, Any], *, last: bool) -> Loss:
        with self._parallel.no_sync() if self._parallel is not None and not last else contextlib.nullcontext():
            with runtime.autocast(self._device, self._config.precision):
                value, parts = (self._module if self._parallel is None else self._parallel)(*item)
            if self._config.normalise == "counts":
                self._counts.append(_get_only_count(parts))
                (value * self._counts[-1]).backward()
            else:
                (value / self._config.accumulation).backward()
        return Loss(value=value.detach(), parts=parts)

    def finish(self) -> None:
        """Make the gradients those of the update: means over processes, divided by the update's counts if it is
        normalised by them."""
        if runtime.world_size() > 1 and self._parallel is None:
            average_gradients(list(self._module.parameters()))
        if self._counts:
            grads = [p.grad for p in self._module.parameters() if p.grad is not None]
            count = runtime.sum_over_processes(torch.stack(self._counts).sum())
            torch._foreach_mul_(grads, (runtime.world_size() / count.clamp(min=1)).to(torch.float32))
            self._counts = []


def share_statistics(model: nn.Module) -> None:
    """Give every process the main one's statistics of trained batch norms, of which each measures its own batches:
    what is then validated is the model that is saved."""
    if runtime.world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and any(p.requires_grad for p in module.parameters()):
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, src=0)


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


def _get_only_count(parts: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    if len(parts) != 1:
        raise ConfigError(
            f'train.normalise = "counts" needs a loss with one part; found {sorted(parts)}. Use "micro_steps".'
        )
    return next(iter(parts.values()))[1]
