"""Forward and backward of a micro-batch; the mean of gradients over processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visling import runtime
from visling.errors import ConfigError
from visling.train.config import TrainConfig
from visling.train.graphs import MOST_SHAPES, CudaRecorder, Parts, RecordedSteps
from visling.train.wrapping import wrap
from visling.types import Loss

Step = Callable[[Any, Any], Loss]
"""Forward and loss of one micro-batch: `step(batch, targets)`."""


class _Stepped(nn.Module):
    """A step as a module, so that what makes it parallel sees all of it, loss and heads included."""

    def __init__(self, model: nn.Module, step: Step) -> None:
        super().__init__()
        self.model = model
        self._step = step

    def forward(self, *item: Any) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        loss = self._step(*item)
        return loss.value, dict(loss.parts)


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
        self._wrapped = wrap(self._module, config, device)
        self._counts: list[Tensor] = []
        self._recorded: RecordedSteps | None = None
        if means == "graphs":
            assert variant is not None
            self._recorded = RecordedSteps(self._run, model.parameters(), variant, CudaRecorder(device))

    def begin(self, items: Sequence[tuple[Any, Any]]) -> None:
        """Announce the micro-batches of the next update, in the order in which they come."""

    def __call__(self, item: tuple[Any, Any], *, last: bool) -> Loss:
        with self._wrapped.micro_step(last=last):
            value, parts = self._run(item) if self._recorded is None else self._recorded(item)
        if self._config.normalise == "counts":
            self._counts.append(_get_only_count(parts))
        return Loss(value=value, parts=parts)

    def _run(self, item: tuple[Any, Any]) -> tuple[Tensor, Parts]:
        """Forward and backward; the detached loss and its parts."""
        with runtime.autocast(self._device, self._config.precision):
            value, parts = self._wrapped(*item)
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
        self._wrapped.finish()
        if self._counts:
            grads = [p.grad for p in self._module.parameters() if p.grad is not None]
            count = runtime.sum_over_processes(torch.stack(self._counts).sum())
            torch._foreach_mul_(grads, (runtime.world_size() / count.clamp(min=1)).to(torch.float32))
            self._counts = []

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the model's parameters are plain, complete tensors on every process: for validating and
        saving. Every process must enter it."""
        return self._wrapped.whole()


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


def _get_only_count(parts: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    if len(parts) != 1:
        raise ConfigError(
            f'train.normalise = "counts" needs a loss with one part; found {sorted(parts)}. Use "micro_steps".'
        )
    return next(iter(parts.values()))[1]
