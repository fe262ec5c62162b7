"""Forward and backward of a micro-batch; exact averages over micro-batches and processes.

A loss is a weighted sum of averages, each a sum over positions, rows or examples divided by how many there are
(`types.Term`). What an update minimises is that of all its micro-batches on all processes together: every sum over all
of them, divided by every count over all of them. The mean of their means is another number as soon as their counts
differ, and then the result of a run depends on how its batches are divided.

With one micro-batch per process the counts come with the forward pass, and are added up over processes before backward.
With several, the first backward would need the counts of forward passes still to come, so they are derived from the
targets beforehand (`Count`). With one process and one micro-batch the loss is minimised as it is.

What does not depend on how an update is divided, and what does
    Examples, their order, what is masked in them, and the queue of region contrast are the same row for row; losses and
    weights are equal up to the rounding of sums in another order.
    Dropout is drawn for whole tensors, from a generator per process (`train.seed` + rank): with dropout, the losses of
    two divisions are two draws of one distribution. Noise keyed by the global example would need a generator per row.
    On a CPU that is cheap, but fused attention drops inside its kernel, which takes one seed for all rows of a batch,
    packed rows have no place of their own in a tensor, and on a GPU every row of every dropped tensor would be a kernel
    of its own.
    Negatives of ViLBERT's `visual_target` 2 are regions of the same micro-batch: other images stand beside an example
    in another division. Batch norms that are trained measure the micro-batch too, and a detector draws its anchors from
    the generator of its process.
"""

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
from visling.types import Loss, Term

Step = Callable[[Any, Any], Loss]
"""Forward and loss of one micro-batch: `step(batch, targets)`."""

Counts = Mapping[str, Tensor]
"""Term of a loss -> scalar: what it divides by."""

Count = Callable[[Any, Any], Counts]
"""The counts of the loss of one micro-batch, from batch and targets alone."""


class _Stepped(nn.Module):
    """A step as a module, so that what makes it parallel sees all of it, loss and heads included."""

    def __init__(self, model: nn.Module, step: Step) -> None:
        super().__init__()
        self.model = model
        self._step = step

    def forward(self, *item: Any) -> Loss:
        return self._step(*item)


class Backward:
    """Forward and backward of a micro-batch, scaled so that the gradients of an update are those of its mean loss.

    Args:
        variant: what a step depends on in addition to its batch and the weights; None = it cannot be known, and steps
            are not recorded.
        count: see `Count`; None = the counts are not known before the forward pass.
    Raises:
        ConfigError: steps are to be recorded that cannot be, or averages taken whose counts are not known in time.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Step,
        config: TrainConfig,
        device: torch.device,
        variant: Callable[[], Hashable] | None = None,
        count: Count | None = None,
    ) -> None:
        means = choose_compilation(config, device, recordable=variant is not None)
        if means == "kernels":
            # Few shapes are still more than the eight after which torch gives up compiling
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
            step = torch.compile(step, dynamic=False)
        self._config, self._device = config, device
        self._wrapped = wrap(_Stepped(model, step), config, device)
        self._count: Count | None = None
        """Called for the micro-batches of an update before it begins; None = no need."""
        if config.normalise == "counts" and config.accumulation > 1:
            self._count = _require_count(count, config.accumulation)
        self._counts: Counts = {}
        """Of the update, over all micro-batches and processes, where they are known before it begins."""
        self._recorded: RecordedSteps | None = None
        if means == "graphs":
            assert variant is not None
            self._recorded = RecordedSteps(self._run, model.parameters(), variant, CudaRecorder(device))

    def begin(self, items: Sequence[tuple[Any, Any]]) -> None:
        """Announce the micro-batches of the next update, in the order in which they come."""
        if self._count is not None:
            counted = [self._count(*item) for item in items]
            own = {name: torch.stack([counts[name] for counts in counted]).sum() for name in counted[0]}
            self._counts = _sum_counts(own)

    def __call__(self, item: tuple[Any, Any], *, last: bool) -> Loss:
        """Forward and backward; returns the detached loss. Its mean over the micro-batches of the update and all
        processes is what the update minimises."""
        run = self._run if self._recorded is None else self._recorded
        with self._wrapped.micro_step(last=last):
            value, parts = run((item, self._counts))
        return Loss(value=value, parts=parts)

    def _run(self, entry: tuple[tuple[Any, Any], Counts]) -> tuple[Tensor, Parts]:
        """Forward and backward of a micro-batch with the counts that are known; the detached loss and its parts."""
        item, counts = entry
        with runtime.autocast(self._device, self._config.precision):
            loss: Loss = self._wrapped(*item)
        value = self._average(loss, counts)
        torch.autograd.backward(value / self._config.accumulation)
        return value.detach(), dict(loss.parts)

    def _average(self, loss: Loss, counts: Counts) -> Tensor:
        """The loss of a micro-batch, as its value or over the counts of the whole update."""
        config, processes = self._config, runtime.world_size()
        if config.normalise == "micro_steps" or config.accumulation * processes == 1:
            return loss.value
        terms = _require_terms(loss)
        if self._count is None:
            counts = _sum_counts({name: term.count for name, term in terms.items()})
        assert counts.keys() == terms.keys(), f"counted {sorted(counts)}, but the loss has {sorted(terms)}"
        shares = [term.over(counts[name]) for name, term in terms.items()]
        return torch.stack(shares).sum() * (config.accumulation * processes)

    def take_note(self) -> str:
        """What there is to say about recordings, once; else nothing."""
        return "" if self._recorded is None else self._recorded.take_note()

    def finish(self) -> None:
        """Make the gradients those of the update: means over processes."""
        self._wrapped.finish()

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
    if config.compile == "kernels" and config.shard and runtime.world_size() > 1:
        raise ConfigError(
            'train.compile = "kernels" joins the operations of several layers, but with train.shard each layer waits '
            'for its parameters. Use train.compile = "no", or train.shard = false.'
        )
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


def _sum_counts(own: Counts) -> dict[str, Tensor]:
    """Counts of this process -> sums over all processes, float64; one small message."""
    everywhere = runtime.sum_over_processes(torch.stack([count.double() for count in own.values()]))
    return dict(zip(own, everywhere.unbind(), strict=True))


def _require_terms(loss: Loss) -> Mapping[str, Term]:
    if loss.terms is None:
        raise ConfigError(
            f"the loss {', '.join(loss.parts)} is not known as sums and counts, so that its exact average over several "
            "processes or micro-batches cannot be taken. Make it with Loss.mean or Loss.ratio, and add parts with "
            '`reporting`; or use train.normalise = "micro_steps", the mean of their means.'
        )
    return loss.terms


def _require_count(count: Count | None, accumulation: int) -> Count:
    if count is None:
        raise ConfigError(
            f'train.normalise = "counts" with train.accumulation = {accumulation} divides by counts of micro-batches '
            "still to come, and in this run they are known only once a batch has gone through the model (a detector "
            'draws there what it learns from). Use train.normalise = "micro_steps", or train.accumulation = 1.'
        )
    return count
