"""A run's folder: what is kept, how it is written so that a kill loses nothing, and exact resume.

Layout  run.json (what the run is); log.jsonl; model/ (the best or the last weights); models/ (others that are
        kept: last/, averaged/, epoch-0001/, ...); last/ (states to resume from, see `train.saved_states`).
Atomic  Every file is written under a temporary name, flushed to the disk and renamed; a state is a folder that is
        renamed as a whole.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from visling import config as configs
from visling import runtime
from visling.errors import RunError
from visling.train.averaging import WeightAverage
from visling.train.background import Background
from visling.train.claim import LOCK, refuse_taken
from visling.train.disk import explain_failure, flush, link_or_copy, read_json, write_json
from visling.train.exchange import from_main, gather
from visling.train.generators import capture_generators, restore_generators, seed_generators
from visling.train.restarts import mark_begun
from visling.train.saved_states import SavedStates
from visling.train.schedule import PlateauState
from visling.train.snapshot import Snapshot, apply_state, collect_state


@dataclass(kw_only=True)
class Sums:
    """Sums since the last log line."""

    loss: float = 0.0
    steps: int = 0
    """Micro-steps in `loss`."""
    parts: dict[str, list[float]] = field(default_factory=dict)
    """Name -> [sum, count]."""
    examples: int = 0
    seconds: float = 0.0
    """Training time, without validation and saving."""
    waited: float = 0.0
    """Of that, seconds in which this process waited for its loader."""
    flops: float = 0.0
    """Operations of the matrix products that the micro-steps need."""

    def add(self, others: Iterable[Sums]) -> Sums:
        """These sums and those of other processes; the times are those of this one."""
        total = copy.deepcopy(self)
        for other in others:
            total.loss += other.loss
            total.steps += other.steps
            total.examples += other.examples
            total.flops += other.flops
            for name, (amount, count) in other.parts.items():
                part = total.parts.setdefault(name, [0.0, 0.0])
                part[0] += amount
                part[1] += count
        return total


@dataclass(kw_only=True)
class State:
    """How far a run has come."""

    step: int = 0
    """Optimiser updates made."""
    epoch: int = 0
    """Epochs completed."""
    batch: int = 0
    """Micro-batches of the current epoch that went into an update."""
    best: float | None = None
    """Best validation score so far."""
    best_step: int = 0
    stale: int = 0
    """Validations since the best one."""
    averaged_best: float | None = None
    """Best validation score of the averaged weights so far."""
    averaged_best_step: int = 0
    plateau: PlateauState = field(default_factory=PlateauState)
    validated: int = 0
    """Step of the last validation."""
    logged: int = 0
    """Step of the last training line."""
    skipped: int = 0
    """Updates that were left out because they were not finite."""
    elapsed: float = 0.0
    """Seconds spent in all, earlier parts of a resumed run included."""
    sums: Sums = field(default_factory=Sums)
    stopped: str = ""
    """Why `fit` returned: finished, patience, max_seconds, terminated or interrupted."""

    @property
    def unfinished(self) -> bool:
        """Whether `fit` stopped early, and the run is to be resumed."""
        return self.stopped in ("max_seconds", "terminated", "interrupted")


_EMPTY = Snapshot(weights={}, ties={}, optimizer={}, averages=None)
"""What other processes than the main one have of a state that it has read."""


class RunFolder:
    """One run's folder, made with `create`; only the main process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = path / "model"
        """The model that everything uses by default: the best weights, or the last."""
        self.models = path / "models"
        """Other models that are kept, a folder each."""
        self.averaged = self.models / "averaged"
        """The best averaged weights, of a run that averages them."""
        self.last = path / "last"
        """States to resume from."""
        self.log = path / "log.jsonl"
        self.resumed_by = ""
        """How the processes of a resumed run share its batches, if not as those that started it; for the log."""
        self.notes: list[str] = []
        """What the log is to say when training begins or is resumed."""
        self._states = SavedStates(self.last)
        self._saving = Background()

    @classmethod
    def create(cls, path: Path, *, resume: bool = False) -> RunFolder:
        """Claim a new or empty folder, or with `resume` one that holds an unfinished run.

        Raises:
            RunError: the folder is not empty, holds nothing to resume, or cannot be written to.
        """
        problem = ""
        if runtime.is_main():
            try:
                _claim(path, resume)
            except RunError as error:
                problem = str(error)
        problem = from_main(problem)
        if problem:
            raise RunError(problem)
        return cls(path)

    @property
    def has_last(self) -> bool:
        """Whether there is a state to resume from."""
        return self._states.exist

    @property
    def holds_models(self) -> bool:
        """Whether any model is kept."""
        return self.model.exists() or self.models.exists()

    def read(self) -> dict[str, Any]:
        """Contents of run.json."""
        return read_json(self.path / "run.json")

    def find_started_by(self) -> int:
        """Processes that started the run, or those of now if there is no state to resume from. Every process must ask
        for it."""
        recorded = self.read().get("processes") if runtime.is_main() and self.has_last else None
        return from_main(recorded) or runtime.world_size()

    def record(self, values: Mapping[str, Any], *, may_differ: Collection[str] = ()) -> None:
        """Merge values into run.json.

        Args:
            may_differ: dotted settings of `config` that a resumed run may change (paths, log intervals).
        Raises:
            RunError: the folder was started with another `config`, or cannot be written to.
        """
        if not runtime.is_main():
            return
        recorded = self.read()
        if "config" in recorded and "config" in values:
            changed = configs.difference(values["config"], recorded["config"])
            changed = {
                name: pair
                for name, pair in changed.items()
                if not any(name == free or name.startswith(f"{free}.") for free in may_differ)
            }
            if changed:
                listed = "; ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in list(changed.items())[:5])
                raise RunError(
                    f"{self.path} was started with other settings: {listed}. Resume with the same settings, or use "
                    "another --out."
                )
        write_json(self.path / "run.json", {**recorded, **configs.to_dict(values)})

    def finish(self) -> None:
        """Record that the run has finished."""
        self.record({"status": "finished", "finished": _now()})

    def require_space(self, needed: int, *, mend: str = "") -> None:
        """Raise `RunError` unless `needed` bytes are free on the folder's disk.

        Args:
            mend: what else would help, as a sentence.
        """
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise RunError(
                f"{self.path} needs about {needed / 1e9:.2f} GB for this run, but {free / 1e9:.2f} GB are free. "
                f"Free some or use another --out.{mend}"
            )

    def save_model(self, folder: Path, write: Callable[[Path], None]) -> None:
        """Make `folder`, which is `model` or in `models`, hold what `write` puts into the folder it is given.

        A new folder appears as a whole; in an older one the files are replaced, the weights last.
        """
        if not runtime.is_main():
            return
        with explain_failure(self.path):
            part = folder.with_name(folder.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            try:
                part.mkdir(parents=True)
                write(part)
                files = sorted(part.iterdir(), key=lambda file: (file.suffix == ".safetensors", file.name))
                for file in files:
                    flush(file)
                if folder.exists():
                    for file in files:
                        file.replace(folder / file.name)
                else:
                    flush(part)
                    part.replace(folder)
                flush(folder)
                flush(folder.parent)
            finally:
                shutil.rmtree(part, ignore_errors=True)
                with contextlib.suppress(OSError):
                    self.models.rmdir()  # if nothing was kept there yet

    def keep(self, source: Path, name: str) -> None:
        """Copy another model's folder to model/`name`, without the files that only its training needs; it is put into
        the other models that are kept, too, as links to the same files where the disk allows that."""
        if not runtime.is_main():
            return
        others = (
            [folder for folder in sorted(self.models.iterdir()) if folder.is_dir() and folder.suffix != ".part"]
            if self.models.is_dir()
            else []
        )
        with explain_failure(self.path):
            shutil.copytree(
                source,
                self.model / name,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("last", "*.jsonl", "*.part", LOCK),
            )
            for folder in others:
                shutil.copytree(self.model / name, folder / name, dirs_exist_ok=True, copy_function=link_or_copy)

    def save_last(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        state: State,
        position: Mapping[str, Any],
        generators: Mapping[str, Any] | None = None,
        *,
        average: WeightAverage | None = None,
        accumulation: int = 1,
        keep: int = 2,
        in_background: bool = False,
    ) -> None:
        """Save everything that `load_last` needs to resume exactly from here. Every process must call it.

        Args:
            position: the loader's `state_dict()`, JSON values only.
            generators: from `capture_generators`; None = their current state.
            accumulation: micro-batches per update, in which `state.batch` counts.
            keep: states that are kept, the newest.
            in_background: write the files in a thread, from a copy; `check_saving` and `finish_saving` raise its
                errors. The copy needs as much main memory as the files.
        Raises:
            RunError: the disk is full or not writable, now or when the last state was written in the background; the
                older states are left intact.
        """
        self.finish_saving()
        everyone = gather((capture_generators() if generators is None else generators, state.sums))
        snapshot = collect_state(model, optimizer, average, copied=in_background)
        if not runtime.is_main():
            return
        step, about = (
            state.step,
            {
                "accumulation": accumulation,
                "position": copy.deepcopy(dict(position)),
                "generators": [generators for generators, _ in everyone],
                "state": {
                    **dataclasses.asdict(state),
                    "sums": dataclasses.asdict(state.sums.add(sums for _, sums in everyone[1:])),
                },
            },
        )

        def write() -> None:
            with explain_failure(self.path):
                self._states.write(step, snapshot, about, keep=keep)

        if in_background:
            self._saving.start(write)
        else:
            write()

    def check_saving(self) -> None:
        """Raise the `RunError` of a state that could not be written in the background; does not wait for one that is
        being written."""
        self._saving.check()

    def finish_saving(self) -> None:
        """Wait for the state that is being written in the background, and raise its `RunError`."""
        self._saving.wait()

    def load_last(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        average: WeightAverage | None = None,
        *,
        accumulation: int = 1,
        seed: int = 0,
    ) -> tuple[State, dict[str, Any]]:
        """Restore weights, their average, optimiser and generators from the newest state that is undamaged; return
        progress and the loader's position. Every
        process must call it; the main one reads. What is wrong with newer states is added to `notes`.

        Args:
            accumulation: micro-batches per update, in which `state.batch` is to count.
            seed: of the generators of processes that did not exist when the state was saved.
        Raises:
            RunError: no state is undamaged, or it has another layout or does not fit the model.
        """
        found, problem = None, ""
        if runtime.is_main():
            try:
                found = self._states.read()
            except RunError as error:
                problem = str(error)
        problem = from_main(problem)
        if problem:
            raise RunError(problem)
        about: dict[str, Any] = from_main({} if found is None else found.about)
        self.notes += [] if found is None else found.notes
        try:
            apply_state(_EMPTY if found is None else found.snapshot, model, optimizer, average)
        except (RuntimeError, ValueError, KeyError) as error:
            raise RunError(
                f"the saved state in {self.last} does not fit this model: {error}. Resume with the settings that the "
                "run was started with."
            ) from error
        generators, rank = about["generators"], runtime.rank()
        state = _read_state(about["state"], about["accumulation"], accumulation, processes=len(generators))
        if rank < len(generators):
            restore_generators(generators[rank])
        else:
            seed_generators(seed, state.step, rank)
        return state, about["position"]


def _claim(path: Path, resume: bool) -> None:
    refuse_taken(path, resume)
    _check_writable(path)
    with explain_failure(path):
        mark_begun(path)
    if not (path / "run.json").exists():
        write_json(path / "run.json", {"status": "running", "started": _now(), "finished": None})


def _check_writable(path: Path) -> None:
    with explain_failure(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


def _read_state(saved: Mapping[str, Any], accumulation_before: int, accumulation: int, *, processes: int) -> State:
    """A saved state, with micro-steps as this run counts them: an update may have had others. The sums are those of all
    processes together: the main process takes them over.

    Args:
        processes: that saved it.
    """
    sums = Sums(**saved["sums"]) if runtime.is_main() else Sums()
    before, now = processes * accumulation_before, runtime.world_size() * accumulation
    if before != now:
        sums.loss, sums.steps = sums.loss * now / before, sums.steps * now // before
    nested = {"sums": sums, "plateau": PlateauState(**saved.get("plateau", {}))}
    batch = saved["batch"] * accumulation // accumulation_before
    return State(**{**saved, **nested, "batch": batch, "stopped": ""})


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
