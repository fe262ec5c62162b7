"""The loop, top to bottom: next batch, forward, backward, clip, update, log, validate, save.

The engine knows a model as an nn.Module and a step as a function from a batch and its targets to a loss. It works alone
and, when a process group exists, with others (on GPUs through DistributedDataParallel): gradients are means over
processes, loss parts in the log exact sums over them. Scalars stay on the device between log lines; nothing in a step
waits for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from visling import runtime
from visling.errors import ConfigError, DataError, nearest
from visling.train.config import TrainConfig
from visling.train.log import Log
from visling.train.meter import Meter, mean_parts, not_finite
from visling.train.optim import apply_schedule, build_optimizer, clip_gradients
from visling.train.parallel import Backward, Step
from visling.train.state import RunFolder, State, capture_generators, from_main, restore_generators, save_weights
from visling.train.transfer import move_ahead
from visling.types import Batch

_T = TypeVar("_T")


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

    backward = Backward(model, step, config, device)
    meter = Meter(state.sums)
    began, before, saved = time.monotonic(), state.elapsed, state.step if state.step else -1
    alone = runtime.world_size() == 1
    # On a CPU nothing runs ahead, so a bad loss can be caught before it spoils the weights; on a GPU it is seen when
    # the meter is read.
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
        if config.max_seconds is not None and (
            alone or state.step % config.log_every == 0
        ):  # processes must agree, which costs a wait
            return "max_seconds" if from_main(time.monotonic() - began >= config.max_seconds) else ""
        return ""

    model.train()
    model.zero_grad(set_to_none=True)
    reason = stop()
    while not reason:
        micro = 0
        for item, reached in move_ahead(_positions(batches, limit - state.batch), device):
            if micro == 0:
                generators = capture_generators() if watched and run_folder is not None else None
            micro += 1
            loss = backward(item, last=micro == config.accumulation)
            if watched and not math.isfinite(loss.value.item()):
                meter.read(state.step)
                if run_folder is not None:
                    run_folder.save_last(model, optimizer, state, position, generators)
                raise not_finite(
                    state.step + 1,
                    mean_parts(loss),
                    "Nothing was updated by it; the saved state, if there is a run folder, is the one before it.",
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
            due = (
                ended and epoch % config.validate_every == 0
                if config.validate_unit == "epochs"
                else state.step % config.validate_every == 0
            )
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
        log.event(
            f"stopped: no better {config.metric} for {state.stale} validations; the best was at step {state.best_step}",
            step=state.step,
        )
    elif reason == "max_seconds":
        log.event(
            f"stopped after {config.max_seconds:.0f} s at step {state.step} of {total}; --resume goes on",
            step=state.step,
        )
    state.stopped = reason
    return state


def predict(
    step: Callable[..., _T],
    batches: Iterable[tuple[Any, ...]],
    *,
    model: nn.Module,
    precision: runtime.Precision = "fp32",
) -> Iterator[_T]:
    """What `step(batch, targets)` returns for each batch, in evaluation mode and without gradients; the model's mode is
    put back at the end."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for item in move_ahead(batches, device):
            with torch.inference_mode(), runtime.autocast(device, precision):
                result = step(*item)
            yield result
    finally:
        model.train(training)


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
            # Batches may be dropped at the end; the loader must have let go before the next epoch is set
            iterator.close()
        yield item, position


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
        raise ConfigError(
            f"train.metric is {config.metric!r}, but validation reports no such score. {nearest(config.metric, scores)}"
        )
    score = scores[config.metric]
    better = not math.isnan(score) and (
        state.best is None or (score > state.best if config.direction == "max" else score < state.best)
    )
    if better:
        state.best, state.best_step, state.stale = score, state.step, 0
    else:
        state.stale += 1
    return better


def _examples(item: tuple[Any, Any]) -> int:
    """Examples in a pair: groups of rows of a Batch, else the length of the first tensor."""
    batch = item[0]
    if isinstance(batch, Batch):
        rows = batch.text.ids if batch.text.row is None else batch.text.row
        return int(rows.shape[0]) // batch.group
    return next(len(leaf) for leaf in pytree.tree_leaves(item) if isinstance(leaf, Tensor))


def _space(model: nn.Module) -> int:
    """Bytes a run's folder needs at most: two states (the old one goes when the new one is complete) and two copies of
    the best weights."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return int(2 * (weights + moments) + 2 * weights)
