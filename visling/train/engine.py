"""The loop, top to bottom: next batch, forward, backward, clip, update, log, validate, save.

The engine knows a model as an nn.Module and a step as a function from a batch and its targets to a loss. It works alone and, when a process
group exists, with others (on GPUs through DistributedDataParallel): gradients are means over processes, loss parts in the log exact sums over them.
Scalars stay on the device between log lines; nothing in a step waits for it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from visling import runtime
from visling.errors import ConfigError, DataError, RunError, nearest
from visling.train.log import Log
from visling.train.optim import OptimConfig, apply_schedule, build_optimizer, clip_gradients
from visling.train.state import RunFolder, State, Sums, capture_generators, from_main, gather, restore_generators, save_weights
from visling.types import Batch, Loss

_T = TypeVar("_T")

Step = Callable[[Any, Any], Loss]
"""Forward and loss of one micro-batch: `step(batch, targets)`."""


class Batches(Protocol):
    """One epoch of (batch, targets) pairs after another, each the same for the same epoch number."""

    epoch: int
    """Setting it goes to the beginning of that epoch."""

    def __len__(self) -> int:
        """Pairs per epoch on this process; the same on all."""
        ...

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """The rest of the epoch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position after the pair handed out last, as JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position; the next iteration begins there."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, how, and what to keep."""

    epochs: int = 10
    """Passes over the data."""
    max_steps: int | None = None
    """Optimiser updates in all; replaces `epochs` when given."""
    accumulation: int = 1
    """Micro-batches per update. Those that do not fill an update at the end of an epoch are dropped."""
    normalise: Literal["micro_steps", "counts"] = "micro_steps"
    """Mean over the accumulated micro-batches (and processes): each counts the same (equals one big batch when their counts are equal),
    or by the count of its loss (always equals one big batch; needs a loss with a single part)."""
    precision: runtime.Precision = "fp32"
    """bf16: matrix products in bfloat16; weights, optimiser and losses stay in float32."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    compile: bool = False
    """Compile the step with torch.compile."""
    seed: int = 0
    """Of dropout and everything else drawn in training; process k uses seed + k."""
    log_every: int = 50
    """Updates between training lines."""
    validate_every: int = 1
    """Epochs or updates between validations; the end of a run is always validated."""
    validate_unit: Literal["epochs", "steps"] = "epochs"
    """Unit of `validate_every`."""
    metric: str = "loss"
    """Validation score by which the best weights are kept."""
    direction: Literal["max", "min"] = "min"
    """Whether more or less of `metric` is better."""
    patience: int | None = None
    """Stop when the best score is more than this many validations old (VisualBERT: 3); None = never."""
    save_every: int = 500
    """Updates between saves of last/, besides those at each validation and at the end."""
    max_seconds: float | None = None
    """Save and return after this time; --resume goes on. None = no limit."""
    unused_parameters: bool = True
    """Several GPUs only: some parameters get no gradient in some steps. False saves a walk over the graph."""

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulation", "log_every", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be 1 or more; found {getattr(self, name)}.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"train.max_steps must be 1 or more; found {self.max_steps}. To train by epochs leave it out.")
        if self.seed < 0:
            raise ConfigError(f"train.seed must be 0 or more; found {self.seed}.")
        if self.patience is not None and self.patience < 0:
            raise ConfigError(f"train.patience must be 0 or more; found {self.patience}. To never stop early leave it out.")


def fit(
    model: nn.Module,
    step: Step,
    batches: Batches,
    *,
    config: TrainConfig,
    log: Log,
    validate: Callable[[], Mapping[str, float]] | None = None,
    run_folder: RunFolder | None = None,
    save_best: Callable[[Path], None] | None = None,
    after_update: Callable[[], None] | None = None,
) -> State:
    """Train a model; go on from `run_folder` if it holds a saved state, exactly as if the run had never stopped.

    Args:
        model: on its device, with every parameter that `step` trains.
        step: a closure over `model`.
        validate: scores by name of the model as it stands; None = the final weights are the best.
        run_folder: where the last state and the best weights are kept; None = nowhere.
        save_best: writes the best model into the folder it is given; None = its weights alone.
        after_update: called after each optimiser update (objectives with queues or slowly following networks).
    Raises:
        ConfigError: too few batches, nothing to train, an unknown metric.
        RunError: the loss is not finite, the disk is full, or the saved state does not fit.
    """
    device = next(model.parameters()).device
    limit = len(batches) // config.accumulation * config.accumulation
    if limit == 0:
        raise ConfigError(
            f"an epoch has {len(batches)} batches, fewer than train.accumulation = {config.accumulation}. Use smaller batches or less of it."
        )
    total = config.max_steps or config.epochs * (limit // config.accumulation)
    optimizer, schedule = build_optimizer(model, config.optim, total)
    runtime.seed_everything(config.seed + runtime.rank())

    state = State()
    if run_folder is not None and run_folder.has_last:
        state, position = run_folder.load_last(model, optimizer)
        batches.load_state_dict(position)
    else:
        batches.epoch = 0
        position = batches.state_dict()
    if run_folder is not None:
        run_folder.require_space(_space(model))
    log.start(state.step, total)
    if state.step:
        log.event(f"resumed at step {state.step} of {total}", step=state.step)

    backward = _Backward(model, step, config, device)
    meter = _Meter(state.sums)
    began, before, saved = time.monotonic(), state.elapsed, state.step if state.step else -1
    alone = runtime.world_size() == 1
    # On a CPU nothing runs ahead, so a bad loss can be caught before it spoils the weights; on a GPU it is seen when the meter is read.
    watched = device.type == "cpu" and alone

    def save() -> None:
        nonlocal saved
        meter.read(state.step)
        state.elapsed = before + time.monotonic() - began
        if run_folder is not None:
            run_folder.save_last(model, optimizer, state, position)
        saved = state.step
        meter.skip()

    def check(epoch: int) -> None:
        assert validate is not None
        meter.read(state.step)
        scores = _validate(model, validate)
        log.valid(step=state.step, epoch=epoch, scores=scores)
        state.validated = state.step
        if _improves(scores, state, config):
            if run_folder is not None:
                run_folder.save_best(keep)
            log.event(f"step {state.step}: best {config.metric} so far, {state.best:.4f}", step=state.step)
        meter.skip()

    def keep(folder: Path) -> None:
        if save_best is None:
            save_weights(folder, model)
        else:
            save_best(folder)

    def stop() -> str:
        if state.step >= total:
            return "finished"
        if config.patience is not None and state.stale > config.patience:
            return "patience"
        if config.max_seconds is not None and (alone or state.step % config.log_every == 0):  # processes must agree, which costs a wait
            return "max_seconds" if from_main(time.monotonic() - began >= config.max_seconds) else ""
        return ""

    model.train()
    model.zero_grad(set_to_none=True)
    reason = stop()
    while not reason:
        micro = 0
        for item, reached in _ahead(_positions(batches, limit - state.batch), device):
            if micro == 0:
                generators = capture_generators() if watched and run_folder is not None else None
            micro += 1
            loss = backward(item, last=micro == config.accumulation)
            if watched and not math.isfinite(loss.value.item()):
                meter.read(state.step)
                if run_folder is not None:
                    run_folder.save_last(model, optimizer, state, position, generators)
                raise _not_finite(
                    state.step + 1, _means(loss), "Nothing was updated by it; the saved state, if there is a run folder, is the one before it."
                )
            meter.add(state.step + 1, loss, _examples(item))
            if micro < config.accumulation:
                continue

            micro = 0
            lr = apply_schedule(optimizer, schedule, state.step)
            backward.finish()
            clip_gradients(optimizer, config.optim)
            optimizer.step()
            model.zero_grad(set_to_none=True)
            if after_update is not None:
                after_update()

            state.step, state.batch, position = state.step + 1, state.batch + config.accumulation, reached
            epoch, ended = state.epoch + 1, state.batch == limit
            if ended:
                state.epoch, state.batch, batches.epoch = epoch, 0, epoch
                position = batches.state_dict()
            log.advance(state.step)
            if state.step % config.log_every == 0 or state.step == total:
                meter.read(state.step)
                meter.report(log, state, epoch=epoch, lr=lr, seconds=before + time.monotonic() - began)
            due = ended and epoch % config.validate_every == 0 if config.validate_unit == "epochs" else state.step % config.validate_every == 0
            if validate is not None and due:
                check(epoch)
            if state.step % config.save_every == 0 or state.validated == state.step:
                save()
            reason = stop()
            if reason or ended:
                break

    if validate is not None and reason != "max_seconds" and state.validated < state.step:
        check(state.epoch + (state.batch > 0))
        saved = -1
    elif run_folder is not None and state.best is None:
        run_folder.save_best(keep)
    if saved != state.step:
        save()
    if reason == "patience":
        log.event(f"stopped: no better {config.metric} for {state.stale} validations; the best was at step {state.best_step}", step=state.step)
    elif reason == "max_seconds":
        log.event(f"stopped after {config.max_seconds:.0f} s at step {state.step} of {total}; --resume goes on", step=state.step)
    state.stopped = reason
    return state


def predict(
    step: Callable[[Any, Any], _T], batches: Iterable[tuple[Any, Any]], *, model: nn.Module, precision: runtime.Precision = "fp32"
) -> Iterator[_T]:
    """What `step(batch, targets)` returns for each batch, in evaluation mode and without gradients; the model's mode is put back at the end."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for item in _ahead(batches, device):
            with torch.inference_mode(), runtime.autocast(device, precision):
                result = step(*item)
            yield result
    finally:
        model.train(training)


class _Stepped(nn.Module):
    """A step as a module, so that DistributedDataParallel sees the whole of it, loss and heads included."""

    def __init__(self, model: nn.Module, step: Step) -> None:
        super().__init__()
        self.model = model
        self._step = step

    def forward(self, *item: Any) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        loss = self._step(*item)
        return loss.value, dict(loss.parts)


_BUFFERS_STAY = "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers"
"""The switch that spares sending buffers at every step, as it is called in the PyTorch at hand."""


class _Backward:
    """Forward and backward of a micro-batch, scaled so that the gradients of an update are those of its mean loss."""

    def __init__(self, model: nn.Module, step: Step, config: TrainConfig, device: torch.device) -> None:
        run: Step = torch.compile(step) if config.compile else step
        self._config, self._device = config, device
        self._module = _Stepped(model, run)
        self._parallel: DistributedDataParallel | None = None
        if runtime.world_size() > 1 and device.type == "cuda":
            still: dict[str, Any] = {_BUFFERS_STAY: False}
            self._parallel = DistributedDataParallel(self._module, find_unused_parameters=config.unused_parameters, **still)
        self._counts: list[Tensor] = []

    def __call__(self, item: tuple[Any, Any], *, last: bool) -> Loss:
        with self._parallel.no_sync() if self._parallel is not None and not last else contextlib.nullcontext():
            with runtime.autocast(self._device, self._config.precision):
                value, parts = (self._module if self._parallel is None else self._parallel)(*item)
            if self._config.normalise == "counts":
                self._counts.append(_only_count(parts))
                (value * self._counts[-1]).backward()
            else:
                (value / self._config.accumulation).backward()
        return Loss(value=value.detach(), parts=parts)

    def finish(self) -> None:
        """Gradients of the update: their means over processes, divided by the counts of the update where they are what it is normalised by."""
        if runtime.world_size() > 1 and self._parallel is None:
            average_gradients(list(self._module.parameters()))
        if self._counts:
            grads = [p.grad for p in self._module.parameters() if p.grad is not None]
            count = runtime.sum_over_processes(torch.stack(self._counts).sum())
            torch._foreach_mul_(grads, (runtime.world_size() / count.clamp(min=1)).to(torch.float32))
            self._counts = []


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace gradients by their means over processes; those that a process lacks count as zero, those that all lack stay away.

    On a CPU nothing is gained by sending early, as DistributedDataParallel does, and one message an update beats one for every few layers. It also
    keeps clear of a rare failure there: with several threads in a process, DistributedDataParallel was seen to lose its own state in backward.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    there = torch.tensor([float(parameter.grad is not None) for parameter in trained])
    parts = [torch.zeros(parameter.numel()) if parameter.grad is None else parameter.grad.float().flatten() for parameter in trained]
    together = torch.cat([there, *parts])
    torch.distributed.all_reduce(together)
    there, *means = torch.split(together, [len(trained), *(parameter.numel() for parameter in trained)])
    for parameter, mean, present in zip(trained, means, there.tolist(), strict=True):
        if present:
            parameter.grad = (mean / runtime.world_size()).view_as(parameter).to(parameter.dtype)


class _Meter:
    """Losses since the last log line; they stay on the device until read."""

    def __init__(self, sums: Sums) -> None:
        self._sums = sums
        self._waiting: list[tuple[int, Loss, int]] = []
        self._clock = time.monotonic()

    def add(self, step: int, loss: Loss, examples: int) -> None:
        """Take in one micro-step of update `step`."""
        self._waiting.append((step, loss, examples))

    def skip(self) -> None:
        """Do not count the time since the last read as training."""
        self._clock = time.monotonic()

    def read(self, step: int) -> None:
        """Add up what waits, up to update `step`.

        Raises:
            RunError: a loss was not finite.
        """
        waiting = [entry for entry in self._waiting if entry[0] <= step]
        self._waiting = []
        tensors = [t for _, loss, _ in waiting for t in (loss.value, *(value for part in loss.parts.values() for value in part))]
        numbers = iter(torch.stack([t.detach().to(tensors[0].device, torch.float64) for t in tensors]).tolist() if tensors else [])
        bad: tuple[int, dict[str, float]] | None = None
        for at, loss, examples in waiting:
            value = next(numbers)
            parts = {name: (next(numbers), next(numbers)) for name in loss.parts}
            if not math.isfinite(value) and bad is None:
                bad = at, {name: _ratio(*part) for name, part in parts.items()}
            self._sums.loss += value
            self._sums.steps += 1
            self._sums.examples += examples
            for name, (amount, count) in parts.items():
                known = self._sums.parts.setdefault(name, [0.0, 0.0])
                known[0] += amount
                known[1] += count
        self._sums.seconds += time.monotonic() - self._clock
        self._clock = time.monotonic()
        found = [entry for entry in gather(bad) if entry is not None]
        if found:
            raise _not_finite(*found[0], "The weights are spoilt since then; the saved state, if any, is an earlier one.")

    def report(self, log: Log, state: State, *, epoch: int, lr: float, seconds: float) -> None:
        """Write a training line about everything read, over all processes, and begin anew."""
        everyone = gather(self._sums)
        steps = sum(sums.steps for sums in everyone)
        parts: dict[str, list[float]] = {}
        for sums in everyone:
            for name, (amount, count) in sums.parts.items():
                known = parts.setdefault(name, [0.0, 0.0])
                known[0] += amount
                known[1] += count
        spent = max(self._sums.seconds, 1e-9)
        updates = state.step - state.logged
        log.train(
            step=state.step,
            epoch=epoch,
            loss=sum(sums.loss for sums in everyone) / steps,
            parts={name: _ratio(*part) for name, part in parts.items() if part[1]},  # nothing to say of what nobody was asked
            lr=lr,
            examples_per_second=sum(sums.examples for sums in everyone) / spent,
            seconds=seconds,
            seconds_per_step=spent / updates,
        )
        state.logged, state.sums = state.step, Sums()
        self._sums = state.sums


def _positions(batches: Batches, limit: int) -> Iterator[tuple[tuple[Any, Any], dict[str, Any]]]:
    """The next `limit` pairs of the epoch, each with the position after it."""
    iterator = iter(batches)
    for number in range(limit):
        try:
            item = next(iterator)
        except StopIteration:
            raise DataError(
                f"the loader promised {limit} more batches in this epoch but gave {number}. Its length and its iteration disagree."
            ) from None
        position = batches.state_dict()
        if number == limit - 1 and isinstance(iterator, Generator):
            iterator.close()  # batches may be dropped at the end; the loader must have let go before the next epoch is set
        yield item, position


def _ahead(items: Iterable[_T], device: torch.device) -> Iterator[_T]:
    """Items with their tensors on the device; on a GPU the next one is copied while the current one is worked on."""
    if device.type != "cuda":
        for item in items:
            yield pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), item)
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ready: list[_T] = []
    for item in items:
        with torch.cuda.stream(side):
            copied = pytree.tree_map_only(Tensor, lambda tensor: _copy(tensor, device), item)
        if ready:
            yield _received(ready.pop(), side, device)
        ready.append(copied)
    if ready:
        yield _received(ready.pop(), side, device)


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if tensor.device.type == "cpu" else tensor.to(device)


def _received(item: _T, side: torch.cuda.Stream, device: torch.device) -> _T:
    """Make the device's own stream wait for the copy, and keep the memory until that stream has used it."""
    current = torch.cuda.current_stream(device)
    current.wait_stream(side)
    for leaf in pytree.tree_leaves(item):
        if isinstance(leaf, Tensor):
            leaf.record_stream(current)
    return item


def _validate(model: nn.Module, validate: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """Scores in evaluation mode; what validation draws does not change the training after it."""
    generators = capture_generators()
    model.eval()
    try:
        return from_main({name: float(score) for name, score in validate().items()})
    finally:
        model.train()
        restore_generators(generators)


def _improves(scores: Mapping[str, float], state: State, config: TrainConfig) -> bool:
    """Whether the scores are the best so far; notes it in the state."""
    if config.metric not in scores:
        raise ConfigError(f"train.metric is {config.metric!r}, but validation reports no such score. {nearest(config.metric, scores)}")
    score = scores[config.metric]
    better = not math.isnan(score) and (state.best is None or (score > state.best if config.direction == "max" else score < state.best))
    if better:
        state.best, state.best_step, state.stale = score, state.step, 0
    else:
        state.stale += 1
    return better


def _only_count(parts: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    if len(parts) != 1:
        raise ConfigError(f'train.normalise = "counts" needs a loss with one part; found {sorted(parts)}. Use "micro_steps".')
    return next(iter(parts.values()))[1]


def _examples(item: tuple[Any, Any]) -> int:
    """Examples in a pair: groups of rows of a Batch, else the length of the first tensor."""
    batch = item[0]
    if isinstance(batch, Batch):
        rows = batch.text.ids if batch.text.row is None else batch.text.row
        return int(rows.shape[0]) // batch.group
    return next(len(leaf) for leaf in pytree.tree_leaves(item) if isinstance(leaf, Tensor))


def _space(model: nn.Module) -> int:
    """Bytes a run's folder needs at most: two states (the old one goes when the new one is complete) and two copies of the best weights."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return int(2 * (weights + moments) + 2 * weights)


def _means(loss: Loss) -> dict[str, float]:
    return {name: _ratio(float(amount), float(count)) for name, (amount, count) in loss.parts.items()}


def _ratio(amount: float, count: float) -> float:
    return amount / max(count, 1.0)


def _not_finite(step: int, parts: Mapping[str, float], after: str) -> RunError:
    listed = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
    return RunError(
        f"the loss of step {step} is not finite ({listed}). {after} Look for NaN in the features or empty targets; "
        'otherwise lower train.optim.lr, warm up longer, clip gradients, or use train.precision = "fp32".'
    )
