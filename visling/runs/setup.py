"""The course of every training run: a prepared run opens its folder, builds its model, trains it and is concluded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from torch import nn

from visling import config as configs
from visling import runtime
from visling.data.corpora.base import split_root
from visling.errors import VislingError
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.regions.store import NativeStore
from visling.runs.inputs import Inputs
from visling.train.engine import Batches, fit
from visling.train.log import Log
from visling.train.parallel import Step
from visling.train.state import RunFolder, State


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the loop works on."""

    model: nn.Module
    """On its device, with the weights that it starts from."""
    step: Step
    batches: Batches
    validate: Callable[[], Mapping[str, float]]
    save: Callable[[Path], None]
    """Writes the model as it stands as a model folder."""
    record: Callable[[RunFolder], None]
    """Writes down what `run.json` holds beyond what all runs have."""
    notes: Sequence[str] = ()
    """What there is to say at the beginning of a run: what was left out, what the weights start from."""
    begin: Callable[[], None] | None = None
    """Called before the first update of a run, not of a resumed one."""
    after_update: Callable[[], None] | None = None


class PreparedRun(Protocol):
    """A run of which everything has been read and checked, and nothing has been built."""

    @property
    def config(self) -> PretrainConfig | FinetuneConfig:
        """Fitted to the store."""
        ...

    @property
    def inputs(self) -> Inputs: ...

    @property
    def store(self) -> NativeStore | None:
        """Regions that it is trained on."""
        ...

    @property
    def origin(self) -> Mapping[str, Any]:
        """Where everything comes from, for run.json: task, data, images."""
        ...

    def build(self) -> Training:
        """The model with the weights that it starts from, its batches and its losses.

        Raises:
            CheckpointError, ConfigError: weights that do not fit.
        """
        ...


def carry_out(
    run: PreparedRun, out: Path, *, resume: bool = False, stream: TextIO | None = None, command: Sequence[str] = ()
) -> State:
    """Train what has been prepared; leaves a run folder.

    Args:
        stream: where progress is written.
        command: the command line that asked for it.
    Returns:
        How far it came; `stopped` says why it ended.
    """
    with _open_folder(run, out, resume=resume, stream=stream, command=command) as (folder, log):
        runtime.seed_everything(run.config.train.seed)
        training = run.build()
        folder.record(
            {
                "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
                "inputs": configs.to_dict(run.inputs.spec),
                "fingerprint": "" if run.store is None else run.store.fingerprint,
            }
        )
        training.record(folder)
        if not folder.has_last:
            for note in dict.fromkeys(training.notes):
                log.event(note, step=0)
            if training.begin is not None:
                training.begin()
        state = fit(
            training.model,
            training.step,
            training.batches,
            config=run.config.train,
            log=log,
            validate=training.validate,
            run_folder=folder,
            save_best=training.save,
            after_update=training.after_update,
        )
        _conclude(run, folder, state, log)
    return state


@contextlib.contextmanager
def _open_folder(
    run: PreparedRun, out: Path, *, resume: bool, stream: TextIO | None, command: Sequence[str]
) -> Iterator[tuple[RunFolder, Log]]:
    """A run folder with everything about the run written down, and its log; `_conclude` marks it as finished.

    A run that fails before anything is saved leaves no folder behind, so that the mended command can use the same one.
    """
    existed = out.exists()
    folder = RunFolder.create(out, resume=resume)
    config = run.config
    try:
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
            may_differ=("train.log_every", "train.save_every", "train.max_seconds"),
        )
        with Log(folder.log, stream=stream) as log:
            yield folder, log
    except VislingError:
        if not resume and runtime.is_main() and not folder.has_last and not folder.model.exists():
            for file in (folder.log, folder.path / "run.json"):
                file.unlink(missing_ok=True)
            for made in (folder.last, *(() if existed else (folder.path,))):
                with contextlib.suppress(OSError):  # absent, or it holds what is not ours
                    made.rmdir()
        raise


def describe_origin(
    *, data: Sequence[str | Path], images: Path | None = None, task: str | None = None
) -> dict[str, Any]:
    """Where a run's examples come from, for run.json: paths that are found again from another working folder.

    Args:
        images: folder of the images, if it is not that of the annotations.
    """
    return {
        "task": task,
        "data": [os.path.abspath(root) for root in data],
        "images": os.path.abspath(split_root(str(data[0]))[0] if images is None else images),
    }


def _conclude(run: PreparedRun, folder: RunFolder, state: State, log: Log) -> None:
    """What follows the last update: cut texts are reported, the detector is kept, and only then is the run marked as
    finished.

    A run killed before the mark does all of this again when it is resumed; one that `max_seconds` stopped stays open.
    """
    layout, store = run.inputs.layout, run.store
    if layout.truncated:
        often = f"{layout.truncated} times, counted over all epochs,"
        log.event(f"{often} a text was longer than {layout.spec.max_tokens} word pieces and was cut", step=state.step)
    detector = None if store is None else store.settings.get("detector")
    if detector is not None and not Path(detector).is_dir():
        log.event(
            f"no detector was kept with the model: {detector}, which computed the regions, is gone. To predict, name one "
            "with --detector",
            step=state.step,
        )
    elif detector is not None:
        folder.keep(Path(detector), "detector")
    if state.stopped != "max_seconds":
        folder.finish()
