"""Forward and backward of a micro-batch; the mean of gradients over processes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from visling import runtime
from visling.errors import ConfigError
from visling.train.config import TrainConfig
from visling.train.graphs import MOST_SHAPES, CudaRecorder, Parts, RecordedSteps
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
    """Forward and backward of a micro-batch, scaled so that the gradients of an update are those of its mean loss.

    Args:
        variant: what a step depends on in addition to its batch and the weights; None = it cannot be known, and steps
            are not recorded.
    Raises:
        ConfigError: steps are to be recorded that cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Step,
        config: TrainConfig,
        device: torch.device,
        variant: Callable[[], Hashable] | None = None,
    ) -> None:
        means = choose_compilation(config, device, recordable=variant is not None)
        if means == "kernels":
            # Few shapes are still more than the eight after which torch gives up compiling
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
            step = torch.compile(step, dynamic=False)
        self._config, self._device = config, device
        self._module = _Stepped(model, step)
        self._parallel: DistributedDataParallel | None = None
        if runtime.world_size() > 1 and device.type == "cuda":
            options: dict[str, Any] = {_SYNC_BUFFERS: False}
            # Gradients are views of the messages, which saves a copy of each and lets messages leave during backward.
            # No static_graph: the weights of losses, paused tasks and text without images change what is trained.
            self._parallel = DistributedDataParallel(
                self._module,
                find_unused_parameters=config.unused_parameters,
                gradient_as_bucket_view=True,
                **options,
            )
        self._counts: list[Tensor] = []
        self._recorded: RecordedSteps | None = None
        if means == "graphs":
            assert variant is not None
            self._recorded = RecordedSteps(self._run, model.parameters(), variant, CudaRecorder(device))

    def begin(self, items: Sequence[tuple[Any, Any]]) -> None:
        """Announce the micro-batches of the next update, in the order in which they come."""

    def __call__(self, item: tuple[Any, Any], *, last: bool) -> Loss:
        with self._parallel.no_sync() if self._parallel is not None and not last else contextlib.nullcontext():
            value, parts = self._run(item) if self._recorded is None else self._recorded(item)
        if self._config.normalise == "counts":
            self._counts.append(_get_only_count(parts))
        return Loss(value=value, parts=parts)

    def _run(self, item: tuple[Any, Any]) -> tuple[Tensor, Parts]:
        """Forward and backward; the detached loss and its parts."""
        with runtime.autocast(self._device, self._config.precision):
            value, parts = (self._module if self._parallel is None else self._parallel)(*item)
        if self._config.normalise == "counts":
            (value * _get_only_count(parts)).backward()
        else:
            (value / self._config.accumulation).backward()
        return value.detach(), parts

    def take_note(self) -> str:
        """What there is to say about recordings, once; else nothing."""
        return "" if self._recorded is None else self._recorded.take_note()

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


def choose_compilation(
    config: TrainConfig, device: torch.device, *, recordable: bool
) -> Literal["no", "kernels", "graphs"]:
    """What `config.compile` means on a device.

    Args:
        recordable: whether it is known what a step depends on.
    Raises:
        ConfigError: steps are to be recorded that cannot be.
    """
    obstacle = ""
    if device.type != "cuda":
        obstacle = f"a {device.type} records no graphs"
    elif runtime.world_size() > 1:
        obstacle = "the messages of several processes are not recorded"
    elif not recordable:
        obstacle = "a step of this run takes another course each time"
    if config.compile == "graphs" and obstacle:
        raise ConfigError(f'train.compile = "graphs": {obstacle}. Use train.compile = "auto".')
    if config.compile == "auto":
        return "no" if obstacle else "graphs"
    return config.compile


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
