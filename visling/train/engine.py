"""The loop, top to bottom: next batch, forward, backward, clip, step, log, validate, save.

The engine knows a model as an nn.Module and a step as a function from a batch and its targets to a loss. It runs in one
process or, when a process group exists, in several (on GPUs through DistributedDataParallel): gradients are means over
processes, loss parts in the log exact sums over them. Scalars stay on the device between log lines; no step waits for
the device. Several processes agree once per update on what they do next (`train.agreement`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from visling import runtime
from visling.errors import ConfigError
from visling.train.agreement import Agreement, Signs
from visling.train.averaging import WeightAverage
from visling.train.batches import Batches, Fetched, fetch
from visling.train.config import TrainConfig
from visling.train.exchange import from_main
from visling.train.interruption import Interruption, announce_end, listen
from visling.train.keeping import KeptModels
from visling.train.log import Log
from visling.train.machines import require_equal
from visling.train.meter import CountProducts, Meter, count_examples
from visling.train.not_finite import FiniteGuard, NotFiniteError
from visling.train.optim import apply_schedule, build_optimizer, clip_gradients
from visling.train.pace import Pace
from visling.train.parallel import Backward, Count, Step, share_statistics
from visling.train.scoring import evaluate, improves, is_better
from visling.train.space import estimate_space
from visling.train.state import RunFolder, State
from visling.train.transfer import move_ahead
from visling.types import Loss

_T = TypeVar("_T")


def fit(
    model: nn.Module,
    step: Step,
    batches: Batches,
    *,
    config: TrainConfig,
    log: Log,
    validate: Callable[[], Mapping[str, float]] | None = None,
    run_folder: RunFolder | None = None,
    save_model: Callable[[Path], None] | None = None,
    after_update: Callable[[], None] | None = None,
    after_skip: Callable[[], None] | None = None,
    pace: Pace | None = None,
    variant: Callable[[], Hashable] | None = None,
    count: Count | None = None,
    products: CountProducts | None = None,
    reseed: bool = True,
) -> State:
    """Train a model; resume from `run_folder` if it holds a saved state, exactly as if the run had never stopped.

    Args:
        model: on its device, with every parameter that `step` trains.
        step: a closure over `model`.
        validate: scores by name of the model in its current state; None = the final weights are the best. Where
            weights are averaged it is called once more, while they are in the model's place.
        run_folder: where the last state and the models that `config.keep` names are kept; None = nowhere.
        save_model: writes the model as it stands into the folder it is given; None = its weights alone.
        after_update: called after each optimiser update (objectives with queues or momentum networks).
        after_skip: called in its place where an update was left out (`config.not_finite`).
        pace: of a run whose validations decide what is trained next; None = all epochs have one length.
        variant: what the course of a step depends on in addition to its batch and the weights, such as the weights of
            losses; None = that is not known, and steps are not recorded (`config.compile`).
        count: what the loss of a pair divides by, known before its forward pass; None = that is not known, and updates
            of several micro-batches are averaged by `config.normalise` "micro_steps" only.
        products: what a micro-step needs in matrix products, which the log compares with what the device can do; None
            = that is not known.
        reseed: seed the generators by `config.seed` first; False = continue the caller's random stream.
    Returns:
        How far it came. After SIGTERM, which any of the processes may receive, `stopped` is "terminated": the state is
        saved, and the run is to be resumed.
    Raises:
        ConfigError: too few batches, nothing to train, an unknown metric.
        KeyboardInterrupt: Ctrl-C was pressed; the state is saved as after SIGTERM.
        RunError: the loss is not finite, the disk is full, the saved state does not fit, or processes
            read other examples.
    """
    with listen(announce_end if runtime.is_main() else None) as interruption:
        trainer = Trainer(
            model,
            step,
            batches,
            config=config,
            log=log,
            validate=validate,
            run_folder=run_folder,
            save_model=save_model,
            after_update=after_update,
            after_skip=after_skip,
            pace=pace,
            variant=variant,
            count=count,
            products=products,
            reseed=reseed,
            interruption=interruption,
        )
        try:
            state = trainer.run()
        finally:
            if run_folder is not None:
                run_folder.finish_saving()
    if state.stopped == "interrupted":
        raise KeyboardInterrupt
    return state


class Trainer:
    """One call of `fit`: what it works on, how far it has come, and a method for each phase of an update."""

    def __init__(
        self,
        model: nn.Module,
        step: Step,
        batches: Batches,
        *,
        config: TrainConfig,
        log: Log,
        validate: Callable[[], Mapping[str, float]] | None,
        run_folder: RunFolder | None,
        save_model: Callable[[Path], None] | None,
        after_update: Callable[[], None] | None,
        after_skip: Callable[[], None] | None,
        pace: Pace | None,
        variant: Callable[[], Hashable] | None,
        count: Count | None,
        products: CountProducts | None,
        reseed: bool,
        interruption: Interruption,
    ) -> None:
        self.model, self.batches, self.config, self.log, self.run_folder = model, batches, config, log, run_folder
        self._validate, self.pace = validate, pace
        self._after_update, self._after_skip, self._interruption = after_update, after_skip, interruption
        self.device = next(model.parameters()).device

        self.limit = len(batches) // config.accumulation * config.accumulation
        if self.limit == 0:
            raise ConfigError(
                f"an epoch has {len(batches)} batches, fewer than train.accumulation = {config.accumulation}. "
                "Use smaller batches or less accumulation."
            )
        updates_per_epoch = self.limit // config.accumulation
        self.total, self.seconds = _bound_run(config, updates_per_epoch, pace)
        known = self.total if pace is None else None
        self.backward = Backward(model, step, config, self.device, variant, count)  # may replace the parameters
        self.optimizer, self.schedule = build_optimizer(model, config.optim, known, per_epoch=updates_per_epoch)
        self.average = None if config.average is None else WeightAverage(model, config.average)
        if config.optim.plateau is not None and validate is None:
            raise ConfigError(
                f"optim.plateau lowers the rate by {config.metric!r}, but this run is not validated. Leave it out."
            )
        if reseed:
            runtime.seed_everything(config.seed + runtime.rank())

        self.state = State()
        if run_folder is not None and from_main(run_folder.has_last):
            self.state, self.position = run_folder.load_last(
                model, self.optimizer, self.average, accumulation=config.accumulation, seed=config.seed
            )
            batches.load_state_dict(self.position)
            self.position = batches.state_dict()
        else:
            batches.epoch = 0
            self.position = batches.state_dict()
        require_equal(self.position)
        if run_folder is not None:
            epochs = None if known is None else known // updates_per_epoch - self.state.epoch
            mend = " Or keep fewer models: --set 'train.keep=[\"best\"]'." if "epochs" in config.keep else ""
            run_folder.require_space(estimate_space(model, config, epochs), mend=mend)
        self.saved_at = self.state.step if self.state.step else -1
        self.kept = KeptModels(run_folder, config, model, self.average, save_model)
        self.epoch, self.lr = self.state.epoch + 1, 0.0  # of the last update; epochs count from 1

        self.meter = Meter(self.state.sums, self.device, config.precision, products)
        self.began, self.elapsed_before = time.monotonic(), self.state.elapsed
        self.reported = self.began
        self.guard = FiniteGuard(config, model, self.device, None if run_folder is None else run_folder.path)
        self.agreement = Agreement(self._look)
        self.share = self._measure_share()

    def run(self) -> State:
        """Next batch, forward, backward, clip, step, log, validate, save, until there is a reason to stop."""
        self._start()
        try:
            self._run_epochs()
        except NotFiniteError as error:
            raise (error if self.guard.checks else self.guard.keep_late(self.batches, error)) from None
        finally:
            self.agreement.close()
        return self.state

    def _run_epochs(self) -> None:
        reason = self._find_reason_to_stop()
        while not reason:
            if self.pace is not None:
                self.limit = len(self.batches)
            fetched = fetch(self.batches, self.limit - self.state.batch, self.meter)
            with contextlib.closing(move_ahead(fetched, self.device)) as pairs:
                epoch_ended = False
                while not reason and not epoch_ended:
                    reached = self._make_update(pairs)
                    epoch_ended = self._advance(reached)
                    self._log_if_due()
                    self._keep_epoch_if_due(epoch_ended)
                    self._validate_if_due(epoch_ended)
                    self._save_if_due()
                    reason = self._find_reason_to_stop()
        self._conclude(reason)

    def _start(self) -> None:
        runtime.keep_freed_memory()
        step, elapsed = self.state.step, self.state.elapsed
        self.log.start(step, self.total, seconds=self.seconds)
        for note in () if self.run_folder is None else self.run_folder.notes:
            self.log.event(note, step=step)
        if step and self.run_folder is not None:
            whole = f"of {self.total}" if self.seconds is None else f"after {elapsed:.0f} of {self.seconds:.0f} s"
            self.log.event(f"resumed at step {step} {whole}{self.run_folder.resumed_by}", step=step)
        if self.config.shard and runtime.world_size() == 1:
            self.log.event("one process has nobody to share the model with: train.shard does nothing", step=step)
        self.meter.announce(self.log, self.run_folder, step)
        self.model.train()
        self.model.zero_grad(set_to_none=True)

    def _make_update(self, pairs: Iterator[Fetched]) -> dict[str, Any]:
        """Forward and backward of an update's micro-batches, and the step of the optimiser; returns the position of the
        batches after them."""
        fetched = [next(pairs) for _ in range(self.config.accumulation)]
        items = [one.pair for one in fetched]
        self.guard.begin(self.state.step + 1, self.epoch, fetched)
        self.backward.begin(items)
        losses = [self.backward(item, last=number == len(items)) for number, item in enumerate(items, 1)]
        alarm = self.agreement.exchange(alarm=self.guard.finds_bad_loss(losses))
        self.backward.finish()
        if alarm or self.guard.finds_bad_gradient():
            self._skip_update(losses)
        else:
            for one, loss in zip(fetched, losses, strict=True):
                self.meter.add(self.state.step + 1, loss, count_examples(one.pair), one.flops)
            self._update_weights()
        return fetched[-1].after

    def _skip_update(self, losses: Sequence[Loss]) -> None:
        """Leave an update out that is not finite, or save the state before it and raise."""
        try:
            found = self.guard.refuse(losses)
        except NotFiniteError:
            self.meter.read(self.state.step)
            self._write_last(self.guard.generators)
            raise
        self.model.zero_grad(set_to_none=True)
        self.state.skipped += 1
        self.log.event(found, step=self.state.step + 1)
        if self._after_skip is not None:
            self._after_skip()

    def _update_weights(self) -> None:
        norms = self.guard.accept()
        level = self.state.plateau.level
        self.lr = apply_schedule(self.optimizer, self.schedule, self.state.step, self.share, level=level)
        clip_gradients(self.optimizer, self.config.optim, norms)
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        self.model.zero_grad(set_to_none=True)
        if self._after_update is not None:
            self._after_update()

    def _advance(self, reached: dict[str, Any]) -> bool:
        """Count the update; returns whether it was the last of its epoch."""
        state = self.state
        state.step, state.batch, self.position = state.step + 1, state.batch + self.config.accumulation, reached
        self.epoch, epoch_ended = state.epoch + 1, state.batch == self.limit
        if epoch_ended:
            state.epoch, state.batch, self.batches.epoch = self.epoch, 0, self.epoch
            self.position = self.batches.state_dict()
        self.share = self._measure_share()
        return epoch_ended

    def _log_if_due(self) -> None:
        self.log.advance(self.state.step, self._measure_elapsed())
        if self.state.step % self.config.log_every == 0 or self._is_complete() or self.agreement.signs.line_overdue:
            self.reported = time.monotonic()
            self.meter.read(self.state.step)
            if not self.state.sums.steps:  # every update since the last line was left out
                return
            if note := self.backward.take_note():
                self.log.event(note, step=self.state.step)
            epoch = self.epoch if self.pace is None else self.pace.epoch(self.state.batch // self.config.accumulation)
            self.meter.report(self.log, self.state, epoch=epoch, lr=self.lr, seconds=self._measure_elapsed())

    def _keep_epoch_if_due(self, epoch_ended: bool) -> None:
        if epoch_ended and self.kept.keeps_epochs:
            self.meter.read(self.state.step)
            with self.backward.whole():
                self.kept.keep_epoch(self.epoch)
            self.meter.skip()

    def _validate_if_due(self, epoch_ended: bool) -> None:
        every = self.config.validate_every
        if self.config.validate_unit == "epochs":
            due = epoch_ended and self.epoch % every == 0
        else:
            due = self.state.step % every == 0
        if self._validate is not None and due and not self._is_complete():  # the end of the run validates by itself
            with self.backward.whole():
                self._score(self._validate, self.epoch)

    def _score(self, validate: Callable[[], Mapping[str, float]], epoch: int) -> None:
        """Validate the model, and keep its weights: as the best if they are the best so far, as the last anyway. The
        averaged weights are validated after it, and kept if they are the best averaged ones."""
        state, name = self.state, self.config.metric
        self.meter.read(state.step)
        share_statistics(self.model)
        scores, averaged = evaluate(self.model, validate), {}
        if self.average is not None:
            with self.average.in_place_of_model():
                averaged = evaluate(self.model, validate)
        prefixed = {f"averaged_{key}": score for key, score in averaged.items()}
        epoch = epoch if self.pace is None else self.pace.epoch(state.batch // self.config.accumulation)
        self.log.valid(step=state.step, epoch=epoch, scores={**scores, **prefixed})
        state.validated = state.step
        if state.batch == 0:  # at the end of an epoch a validation may change what follows
            self.position = self.batches.state_dict()
        if improves(scores, state, self.config):
            self.kept.keep_best()
            self.log.event(f"step {state.step}: best {name} so far, {state.best:.4f}", step=state.step)
        if averaged and is_better(averaged[name], state.averaged_best, self.config.direction):
            state.averaged_best, state.averaged_best_step = averaged[name], state.step
            self.kept.keep_average()
            self.log.event(f"step {state.step}: best averaged {name} so far, {averaged[name]:.4f}", step=state.step)
        self._lower_rate_if_due(scores[name])
        self.kept.keep_last(self.state.step)
        self.meter.skip()

    def _lower_rate_if_due(self, score: float) -> None:
        plateau, state, name = self.config.optim.plateau, self.state, self.config.metric
        if plateau is not None and state.plateau.add(score, plateau, self.config.direction):
            self.log.event(
                f"step {state.step}: {name} has stopped improving; the learning rate is multiplied by {plateau.factor}",
                step=state.step,
            )

    def _save_if_due(self) -> None:
        if self.run_folder is not None:
            self.run_folder.check_saving()
        due = self.state.step % self.config.save_every == 0 or self.state.validated == self.state.step
        if due and not self._is_complete():  # at the end of the run, once its validation is in the state
            self._save_last()

    def _save_last(self) -> None:
        self.meter.read(self.state.step)
        self.state.elapsed = self._measure_elapsed()
        self._write_last()
        self.saved_at = self.state.step
        self.meter.skip()

    def _save_last_once(self) -> None:
        if self.saved_at != self.state.step:
            self._save_last()

    def _write_last(self, generators: Mapping[str, Any] | None = None) -> None:
        if self.run_folder is not None:
            config = self.config
            self.run_folder.save_last(
                self.model, self.optimizer, self.state, self.position, generators, average=self.average,
                accumulation=config.accumulation, keep=config.keep_states, in_background=config.save_in_background,
            )  # fmt: skip

    def _find_reason_to_stop(self) -> str:
        """finished, patience, max_seconds, terminated, interrupted, or nothing."""
        signs = self.agreement.signs
        if self._is_complete():
            return "finished"
        if self.config.patience is not None and self.state.stale > self.config.patience:
            return "patience"
        return signs.asked or ("max_seconds" if signs.time_over else "")

    def _look(self) -> Signs:
        """What this process sees now."""
        now, config = time.monotonic(), self.config
        return Signs(
            asked=self._interruption.asked,
            time_over=config.max_seconds is not None and now - self.began >= config.max_seconds,
            line_overdue=config.log_seconds is not None and now - self.reported >= config.log_seconds,
            elapsed=self._measure_elapsed(),
        )

    def _conclude(self, reason: str) -> None:
        """Validate the final weights unless the run is to be resumed, save what is not saved yet, and say why it
        ended."""
        state, config = self.state, self.config
        if reason in ("terminated", "interrupted"):  # who asks may not wait for more than the state
            self._save_last_once()
            how = "SIGTERM" if reason == "terminated" else "Ctrl-C"
            self.log.event(f"stopped by {how} at {self._describe_step()}; resume with --resume", step=state.step)
            state.stopped = reason
            return
        with self.backward.whole():
            if self._validate is not None and reason != "max_seconds" and state.validated < state.step:
                if self.pace is not None:
                    self.pace.finish()
                self._score(self._validate, state.epoch + (state.batch > 0))
                self.saved_at = -1
            elif state.best is None:
                self.kept.keep_best()
                self.kept.keep_average()
            self.kept.keep_last(self.state.step)
        self._save_last_once()
        if reason == "patience":
            self.log.event(
                f"stopped: no better {config.metric} for {state.stale} validations; "
                f"the best was at step {state.best_step}",
                step=state.step,
            )
        elif reason == "max_seconds":
            self.log.event(
                f"stopped after {config.max_seconds:.0f} s at {self._describe_step()}; resume with --resume",
                step=state.step,
            )
        if state.skipped:
            self.log.event(
                f"{state.skipped} updates were left out because a loss or a gradient was not finite", step=state.step
            )
        state.stopped = reason

    def _describe_step(self) -> str:
        return f"step {self.state.step}" + (f" of {self.total}" if self.seconds is None else "")

    def _measure_elapsed(self) -> float:
        """Seconds spent on the run, earlier parts of a resumed one included."""
        return self.elapsed_before + time.monotonic() - self.began

    def _measure_share(self) -> float | None:
        """Share of the run that has passed, by its pace or by the main process's clock; None where the number of
        updates bounds it."""
        if self.pace is not None:
            return self.pace.share(self.state.batch // self.config.accumulation)
        return None if self.seconds is None else self.agreement.signs.elapsed / self.seconds

    def _is_complete(self) -> bool:
        if self.pace is not None and self.pace.complete:
            return True
        if self.total is not None:
            return self.state.step >= self.total
        return self.share is not None and self.share >= 1


def predict(
    step: Callable[..., _T],
    batches: Iterable[tuple[Any, ...]],
    *,
    model: nn.Module,
    precision: runtime.Precision = "fp32",
) -> Iterator[_T]:
    """What `step(batch, targets)` returns for each batch, in evaluation mode and without gradients; the model's mode is
    restored at the end."""
    device, training = next(model.parameters()).device, model.training
    runtime.keep_freed_memory()
    model.eval()
    try:
        for item in move_ahead(batches, device):
            with torch.inference_mode(), runtime.autocast(device, precision):
                result = step(*item)
            yield result
    finally:
        model.train(training)


def _bound_run(config: TrainConfig, updates_per_epoch: int, pace: Pace | None) -> tuple[int | None, float | None]:
    """Updates of the whole run (at most, with a pace), or the seconds of one that time bounds."""
    if pace is not None:
        return config.max_steps or pace.most, None
    if config.max_steps is None and config.seconds is not None:
        return None, config.seconds
    return config.max_steps or config.epochs * updates_per_epoch, None
