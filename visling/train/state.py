"""A run's folder: what is kept, how it is written so that a kill loses nothing, and exact resume.

Layout  run.json (what the run is); log.jsonl; model/ (the best or the last weights); models/ (others that are
        kept: last/, averaged/, epoch-0001/, ...); last/ (everything needed to resume).
Atomic  Every file is written under a temporary name, flushed to the disk and renamed. last/state.json names the files
        that belong to it and is renamed last, so that at any moment it names one complete, consistent set.
Safe    Weights are safetensors, the optimiser is a weights-only torch file, the rest is JSON. Nothing is unpickled
        blindly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from visling import config as configs
from visling import damage, runtime
from visling.errors import RunError
from visling.train.averaging import WeightAverage
from visling.train.claim import refuse_taken
from visling.train.generators import capture_generators, restore_generators
from visling.train.schedule import PlateauState

_T = TypeVar("_T")

FORMAT = 1
"""Version of the layout of last/."""


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
    elapsed: float = 0.0
    """Seconds spent in all, earlier parts of a resumed run included."""
    sums: Sums = field(default_factory=Sums)
    stopped: str = ""
    """Why `fit` returned: finished, patience or max_seconds."""


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
        """State to resume from."""
        self.log = path / "log.jsonl"

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
        return (self.last / "state.json").exists()

    @property
    def holds_models(self) -> bool:
        """Whether any model is kept."""
        return self.model.exists() or self.models.exists()

    def read(self) -> dict[str, Any]:
        """Contents of run.json."""
        return _read_json(self.path / "run.json")

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
        _write_json(self.path / "run.json", {**recorded, **configs.to_dict(values)})

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
        with _explain_failure(self.path):
            part = folder.with_name(folder.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            try:
                part.mkdir(parents=True)
                write(part)
                files = sorted(part.iterdir(), key=lambda file: (file.suffix == ".safetensors", file.name))
                for file in files:
                    _flush(file)
                if folder.exists():
                    for file in files:
                        file.replace(folder / file.name)
                else:
                    _flush(part)
                    part.replace(folder)
                _flush(folder)
                _flush(folder.parent)
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
        with _explain_failure(self.path):
            shutil.copytree(
                source,
                self.model / name,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("last", "*.jsonl", "*.part"),
            )
            for folder in others:
                shutil.copytree(self.model / name, folder / name, dirs_exist_ok=True, copy_function=_link_or_copy)

    def save_last(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        state: State,
        position: Mapping[str, Any],
        generators: Mapping[str, Any] | None = None,
        *,
        average: WeightAverage | None = None,
    ) -> None:
        """Save everything that `load_last` needs to resume exactly from here. Every process must call it.

        Args:
            position: the loader's `state_dict()`, JSON values only.
            generators: from `capture_generators`; None = their current state.
        Raises:
            RunError: the disk is full or not writable; the previous state is left intact.
        """
        everyone = gather(capture_generators() if generators is None else generators)
        if not runtime.is_main():
            return
        with _explain_failure(self.path):
            self.last.mkdir(exist_ok=True)
            serial = _read_json(self.last / "state.json")["serial"] + 1 if self.has_last else 1
            names = {"model": f"model-{serial:06d}.safetensors", "optimizer": f"optimizer-{serial:06d}.pt"}
            if average is not None:
                names["average"] = f"average-{serial:06d}.safetensors"
            tensors, ties = _untie(model.state_dict())
            try:
                with _replace_file(self.last / names["model"]) as part:
                    save_file(tensors, part)
                if average is not None:
                    with _replace_file(self.last / names["average"]) as part:
                        save_file(_untie(average.state_dict())[0], part)
                with _replace_file(self.last / names["optimizer"]) as part:
                    torch.save(optimizer.state_dict(), part)
                about = {
                    "format": FORMAT,
                    "serial": serial,
                    "files": names,
                    "ties": ties,
                    "position": dict(position),
                    "generators": everyone,
                }
                _write_json(self.last / "state.json", {**about, "state": dataclasses.asdict(state)})
            finally:
                self._sweep()

    def _sweep(self) -> None:
        """Delete the files in last/ that its state.json does not name."""
        named = {"state.json", *_read_json(self.last / "state.json")["files"].values()} if self.has_last else set()
        for file in self.last.iterdir():
            if file.name not in named:
                file.unlink()

    def load_last(
        self, model: nn.Module, optimizer: Optimizer, average: WeightAverage | None = None
    ) -> tuple[State, dict[str, Any]]:
        """Restore weights, their average, optimiser and generators; return progress and the loader's position.

        Raises:
            RunError: the state is damaged, has another layout, was saved by another number of processes, or does not
                fit the model.
        """
        try:
            about = _read_json(self.last / "state.json")
            layout, names = about["format"], about["files"]
            tensors = load_file(self.last / names["model"])
            averages = {} if average is None else load_file(self.last / names["average"])
            moments = torch.load(self.last / names["optimizer"], map_location="cpu", weights_only=True)
        except (
            OSError,
            KeyError,
            ValueError,
            EOFError,
            SafetensorError,
            RuntimeError,
            pickle.UnpicklingError,
        ) as error:
            raise RunError(
                f"cannot read the saved state in {self.last}: {error}. Start again with another --out, or from the "
                "weights in model/."
            ) from error
        if layout != FORMAT:
            raise RunError(
                f"{self.last} has layout {layout}; this version reads {FORMAT}. Finish the run with the version that "
                "started it."
            )
        if len(about["generators"]) != runtime.world_size():
            raise RunError(
                f"{self.last} was saved by {len(about['generators'])} processes; this run has {runtime.world_size()}. "
                "Resume with the same number."
            )
        try:
            model.load_state_dict({**tensors, **{alias: tensors[kept] for alias, kept in about["ties"].items()}})
            if average is not None:
                average.load_state_dict(averages)
            optimizer.load_state_dict(moments)
        except (RuntimeError, ValueError, KeyError) as error:
            raise RunError(
                f"the saved state in {self.last} does not fit this model: {error}. Resume with the settings that the "
                "run was started with."
            ) from error
        restore_generators(about["generators"][runtime.rank()])
        state = about["state"]
        nested = {"sums": Sums(**state["sums"]), "plateau": PlateauState(**state.get("plateau", {}))}
        return State(**{**state, **nested, "stopped": ""}), about["position"]


def save_weights(folder: Path, model: nn.Module) -> None:
    """Write a module's weights to model.safetensors in a folder, each tied tensor once."""
    save_file(_untie(model.state_dict())[0], folder / "model.safetensors")


def from_main(value: _T) -> _T:
    """The main process's value on every process."""
    if runtime.world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: _T) -> list[_T]:
    """Every process's value, by rank."""
    if runtime.world_size() == 1:
        return [value]
    values: list[Any] = [None] * runtime.world_size()
    dist.all_gather_object(values, value)
    return values


def _claim(path: Path, resume: bool) -> None:
    refuse_taken(path, resume)
    _check_writable(path)
    if not (path / "run.json").exists():
        _write_json(path / "run.json", {"status": "running", "started": _now(), "finished": None})


def _check_writable(path: Path) -> None:
    with _explain_failure(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


@contextlib.contextmanager
def _explain_failure(path: Path) -> Iterator[None]:
    """Turn errors of writing into a RunError that says what to do; torch and safetensors have their own classes for a
    full disk."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"cannot write to {path}: {error} ({_describe_free_space(path)} free). What was saved before is intact. "
            "Free space or fix permissions."
        ) from error


def _describe_free_space(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    return f"{shutil.disk_usage(path).free / 1e9:.2f} GB"


@contextlib.contextmanager
def _replace_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` in one step, or is deleted on failure."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        _flush(part)
        part.replace(path)
        _flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path: Path, values: Any) -> None:
    with _explain_failure(path.parent), _replace_file(path) as part:
        part.write_text(
            json.dumps(values, indent=None if path.name == "state.json" else 2, allow_nan=False) + "\n",
            encoding="utf-8",
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = damage.parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}. It is damaged: start again in another --out.") from error
    if not isinstance(values, dict):
        raise RunError(f"{path} holds {type(values).__name__}, not a run's settings. Start again in another --out.")
    return values


def _untie(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in main memory, tied ones once under their first name; and name -> first name of the others."""
    first: dict[Any, str] = {}
    kept, ties = {}, {}
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if identity in first:
            ties[name] = first[identity]
            continue
        first[identity] = name
        value = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share a larger storage
        alone = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        kept[name] = value if alone else value.clone()
    return kept, ties


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
