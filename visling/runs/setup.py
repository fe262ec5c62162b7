"""What all training runs have in common: open the run folder, build the model, train it, conclude the run."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TextIO

from torch import nn

from visling import config as configs
from visling import runtime
from visling.data.batches.workers import explain_killed
from visling.data.corpora.base import split_root
from visling.data.text import TextLayout
from visling.errors import RunError, VislingError
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.recipes.multitask_configs import MultitaskConfig
from visling.regions.store import NativeStore
from visling.runs.inputs import Inputs
from visling.train.batches import Batches
from visling.train.claim import LOCK, hold_folder
from visling.train.config import MAY_CHANGE
from visling.train.engine import fit
from visling.train.exchange import from_main
from visling.train.log import Log
from visling.train.loggers import check_loggers, open_loggers
from visling.train.machines import require_shared
from visling.train.meter import CountProducts
from visling.train.pace import Pace
from visling.train.parallel import Count, Step
from visling.train.restarts import MARK
from visling.train.state import RunFolder, State


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the loop works on."""

    model: nn.Module
    """On its device, with its initial weights."""
    step: Step
    batches: Batches
    batch_sizes: Mapping[str, int]
    """What a batch of `batches` holds -> how many examples on this process."""
    accumulation: int
    """Batches per update."""
    validate: Callable[[], Mapping[str, float]]
    save: Callable[[Path], None]
    """Writes the current model as a model folder."""
    record: Callable[[RunFolder], None]
    """Adds to `run.json` what other kinds of runs do not have."""
    notes: Sequence[str] = ()
    """What is logged when a run starts: what was left out, where the weights come from."""
    begin: Callable[[], None] | None = None
    """Called before the first update, not when a run is resumed."""
    after_update: Callable[[], None] | None = None
    after_skip: Callable[[], None] | None = None
    pace: Pace | None = None
    """Of a run whose validations decide what is trained next."""
    variant: Callable[[], Hashable] | None = None
    """What the course of a step depends on in addition to its batch and the weights; None = steps cannot be
    recorded."""
    count: Count | None = None
    """What the loss of a batch divides by, from batch and targets alone."""
    products: CountProducts | None = None
    """What a micro-step needs in matrix products; None = that is not known."""


class PreparedRun(Protocol):
    """A run whose inputs have been read and checked, and whose model has not been built."""

    @property
    def config(self) -> PretrainConfig | FinetuneConfig | MultitaskConfig:
        """Fitted to the store."""
        ...

    @property
    def inputs(self) -> Inputs: ...

    @property
    def layouts(self) -> Sequence[TextLayout]:
        """What lays out its training texts, and counts those that it cuts."""
        ...

    @property
    def store(self) -> NativeStore | None:
        """Regions that it is trained on."""
        ...

    @property
    def origin(self) -> Mapping[str, Any]:
        """Where the inputs come from, for run.json: task, data, images."""
        ...

    def build(self, started_by: int | None = None) -> Training:
        """The model with its initial weights, its batches and its losses.

        Args:
            started_by: number of processes that started the run, if it is resumed; None = it starts with those of now.

        Raises:
            CheckpointError, ConfigError: weights do not fit.
        """
        ...


def carry_out(
    run: PreparedRun,
    out: Path,
    *,
    resume: bool = False,
    stream: TextIO | None = None,
    log_to: Sequence[str] = (),
    command: Sequence[str] = (),
) -> State:
    """Train a prepared run; leaves a run folder.

    Args:
        stream: where progress is written.
        log_to: where losses and scores go in addition to `out/log.jsonl`: tensorboard, wandb, trackio.
        command: the command line that asked for it.
    Returns:
        How far it came; `stopped` says why it ended.
    """
    with (
        _open_folder(run, out, resume=resume, stream=stream, log_to=log_to, command=command) as opened,
        explain_killed(),
    ):
        folder, log = opened
        runtime.seed_everything(run.config.train.seed)
        started_by = folder.find_started_by()
        training = run.build(started_by)
        record_layout(folder, training.batch_sizes, training.accumulation, started_by)
        folder.record(
            {
                "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
                "inputs": configs.to_dict(run.inputs.spec),
                "fingerprint": "" if run.store is None else run.store.fingerprint,
            }
        )
        training.record(folder)
        if not from_main(folder.has_last):
            for note in dict.fromkeys(training.notes):
                log.event(note, step=0)
            if training.begin is not None:
                training.begin()
        runtime.resume_collector()
        state = fit(
            training.model,
            training.step,
            training.batches,
            config=replace(run.config.train, accumulation=training.accumulation),
            log=log,
            validate=training.validate,
            run_folder=folder,
            save_model=training.save,
            after_update=training.after_update,
            after_skip=training.after_skip,
            pace=training.pace,
            variant=training.variant,
            count=training.count,
            products=training.products,
        )
        if state.stopped != "terminated":  # then there is no time for more than the state
            _conclude(run, folder, state, log)
    return state


def record_layout(folder: RunFolder, batch_sizes: Mapping[str, int], accumulation: int, started_by: int) -> None:
    """Record how many processes start a run and how many examples an update has, or say how those that resume it
    divide them.

    Args:
        batch_sizes: what a batch holds -> how many examples on this process.
        accumulation: batches per update.
    """
    now = runtime.world_size()
    if started_by == now:
        whole = {name: size * accumulation * now for name, size in batch_sizes.items()}
        folder.record({"processes": now, "global_batch": whole})
        return
    sizes = " and ".join(f"{size} {name}" for name, size in batch_sizes.items())
    processes = "1 process" if now == 1 else f"{now} processes"
    folder.resumed_by = (
        f" by {processes}, started by {started_by}: batches of {sizes}, {accumulation} per update. What is drawn while "
        "training, such as dropout, is not what it would have been"
    )


@contextlib.contextmanager
def _open_folder(
    run: PreparedRun,
    out: Path,
    *,
    resume: bool,
    stream: TextIO | None,
    log_to: Sequence[str],
    command: Sequence[str],
) -> Iterator[tuple[RunFolder, Log]]:
    """A run folder in which the run is recorded, and its log; `_conclude` marks it as finished."""
    check_loggers(log_to)
    with claim_run_folder(out, resume=resume) as folder:
        config = run.config
        folder.record(
            {
                "command": list(command),
                "recipe": config.recipe,
                "model": config.model,
                "config": configs.to_dict(config),
                "versions": runtime.versions(),
                "seed": config.train.seed,
                "store": None if run.store is None else os.path.abspath(run.store.path),
                **run.origin,
            },
            may_differ=(
                "from_init",
                "workers",
                "store_on_device",
                *MAY_CHANGE,
                "train.compile",
                "train.few_shapes",
                "train.shard",
            ),
        )
        loggers = open_loggers(log_to, folder, {**configs.to_dict(config), **run.origin})
        with Log(folder.log, stream=stream, loggers=loggers) as log:
            yield folder, log


@contextlib.contextmanager
def claim_run_folder(out: Path, *, resume: bool) -> Iterator[RunFolder]:
    """A run folder; one that is refused before anything was saved is removed, so that the corrected command can use the
    same name."""
    existed = out.exists()
    with hold_run_folder(out, resume=resume) as note:
        folder = RunFolder.create(out, resume=resume)
        folder.notes += filter(None, [note])
        try:
            require_shared(folder.path / "run.json")
            yield folder
        except VislingError:
            if not resume and runtime.is_main() and not folder.has_last and not folder.holds_models:
                _remove(folder, existed)
            raise


@contextlib.contextmanager
def hold_run_folder(out: Path, *, resume: bool) -> Iterator[str]:
    """Let the main process hold a run's folder (`train.claim.hold_folder`). Every process must come here.

    Raises:
        RunError: on every process.
    """
    with contextlib.ExitStack() as stack:
        note = problem = ""
        if runtime.is_main():
            try:
                note = stack.enter_context(hold_folder(out, resume=resume))
            except RunError as error:
                problem = str(error)
        note, problem = from_main((note, problem))
        if problem:
            raise RunError(problem)
        yield note


def _remove(folder: RunFolder, existed: bool) -> None:
    """Remove a run of which nothing was saved."""
    for file in (folder.log, *(folder.path / name for name in ("run.json", MARK, LOCK))):
        file.unlink(missing_ok=True)
    for written in ("tensorboard", "wandb"):
        shutil.rmtree(folder.path / written, ignore_errors=True)
    for made in (folder.last, *(() if existed else (folder.path,))):
        with contextlib.suppress(OSError):  # absent, or it holds what is not ours
            made.rmdir()


def describe_origin(
    *,
    data: Sequence[str | Path],
    images: Path | None = None,
    task: str | None = None,
    valid_store: Path | None = None,
) -> dict[str, Any]:
    """Where a run's examples come from, for run.json; paths are absolute.

    Args:
        images: folder of the images; None = that of the annotations.
        valid_store: region store of the validation images, if they have one of their own.
    """
    return {
        "task": task,
        "data": [os.path.abspath(root) for root in data],
        "images": os.path.abspath(split_root(str(data[0]))[0] if images is None else images),
        **({} if valid_store is None else {"valid_store": os.path.abspath(valid_store)}),
    }


def _conclude(run: PreparedRun, folder: RunFolder, state: State, log: Log) -> None:
    """After the last update: report truncated texts, keep the detector, and only then mark the run as finished.

    A run killed before the mark does all of this again when it is resumed; one that stopped early stays open.
    """
    store = run.store
    for layout in run.layouts:
        if layout.truncated:
            often = f"{layout.truncated} times, counted over all epochs,"
            longest = layout.spec.max_tokens
            log.event(f"{often} a text was longer than {longest} word pieces and was cut", step=state.step)
    if store is not None and (detector := store.find_detector()) is not None:
        folder.keep(detector, "detector")
    elif store is not None and (gone := store.settings.get("detector")) is not None:
        log.event(
            f"no detector was kept with the model: {gone}, which computed the regions, is gone. To predict, name one "
            "with --detector",
            step=state.step,
        )
    if state.averaged_best is not None:
        metric, step = run.config.train.metric, state.averaged_best_step
        folder.record({"averaged": {"model": "models/averaged", metric: state.averaged_best, "step": step}})
        log.event(
            f"models/averaged holds the best averaged weights: {metric} {state.averaged_best:.4f} at step {step}",
            step=state.step,
        )
    if not state.unfinished:
        folder.finish()
