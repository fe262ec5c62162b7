"""A model, a loader and a run small enough for tests; as a program, a run that kills itself or one of several
processes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visling import runtime
from visling.train.config import TrainConfig
from visling.train.engine import fit
from visling.train.exchange import from_main
from visling.train.log import TIMED, Log, read
from visling.train.optim import OptimConfig
from visling.train.parallel import Step
from visling.train.state import RunFolder, State
from visling.types import Loss

EXAMPLES, WIDTH, CLASSES = 44, 6, 3

EVERYTHING: Mapping[str, Any] = {"keep": ("best", "last", "epochs"), "average": 0.8}
"""Settings of a run that keeps every model."""


class Toy(nn.Module):
    """Dropout, a norm, tied weights and a pooler that no step uses."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(WIDTH, CLASSES)
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.dropout(self.second(torch.tanh(self.first(x))))))


class Pairs:
    """A loader of seeded examples, shuffled by epoch, cut into one share per process."""

    def __init__(
        self, batch_size: int = 4, rank: int = 0, world: int = 1, examples: int = EXAMPLES, accumulation: int = 1
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(examples, WIDTH, generator=generator)
        self.y = (self.x[:, :CLASSES] + 0.3 * torch.randn(examples, CLASSES, generator=generator)).argmax(1)
        self.batch_size, self.rank, self.world, self.accumulation = batch_size, rank, world, accumulation
        self._epoch = self._next = 0

    @property
    def epoch(self) -> int:
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch, self._next = epoch, 0

    def __len__(self) -> int:
        return len(self.x) // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = runtime.generator_for(7, self._epoch).permutation(len(self.x))
        while self._next < len(self):
            start = (self._next * self.world + self.rank) * self.batch_size
            at = torch.from_numpy(order[start : start + self.batch_size])
            self._next += 1
            yield self.x[at], self.y[at]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "next": self._next, "accumulation": self.accumulation}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._next = state["epoch"], state["next"] * self.accumulation // state["accumulation"]


def make(dropout: float = 0.2) -> tuple[Toy, Step]:
    """A freshly seeded model and its step."""
    torch.manual_seed(3)
    model = Toy(dropout)

    def step(x: Tensor, y: Tensor) -> Loss:
        logits = model(x)
        return Loss.mean("answer", F.cross_entropy(logits.float(), y, reduction="none")) + Loss.mean(
            "size", logits.float().square()
        ).scaled(0.1)

    return model, step


def accuracy(model: Toy) -> Callable[[], dict[str, float]]:
    """A validation that, carelessly, also draws random numbers."""
    data = Pairs()

    def validate() -> dict[str, float]:
        torch.rand(3)
        with torch.inference_mode():
            return {
                "accuracy": float((model(data.x).argmax(1) == data.y).double().mean()),
                "loss": float(F.cross_entropy(model(data.x), data.y)),
            }

    return validate


def config(**changes: Any) -> TrainConfig:
    """11 micro-batches, 5 updates of 2 and one dropped per epoch."""
    optim = OptimConfig(name="bert_adam", lr=0.02, clip="per_tensor", exclude=("pooler",))
    settings: dict[str, Any] = {
        "epochs": 3,
        "accumulation": 2,
        "normalise": "micro_steps",
        "optim": optim,
        "log_every": 2,
        "save_every": 3,
        "seed": 1,
        "metric": "accuracy",
        "direction": "max",
    }
    return TrainConfig(**{**settings, **changes})


def interrupted(step: Step, at: int, how: Callable[[], None]) -> Step:
    """A step that calls `how` instead of its `at`-th call."""
    calls = 0

    def wrapped(x: Tensor, y: Tensor) -> Loss:
        nonlocal calls
        calls += 1
        if calls == at:
            how()
        return step(x, y)

    return wrapped


def run(
    path: Path, *, resume: bool = False, at: int = 0, how: Callable[[], None] | None = None, **changes: Any
) -> tuple[Toy, State]:
    """A run in a folder, stopped by `how` at a call of the step."""
    model, step = make()
    folder = RunFolder.create(path, resume=resume)
    with Log(folder.log) as log:
        state = fit(
            model,
            step if how is None else interrupted(step, at, how),
            Pairs(),
            config=config(**changes),
            log=log,
            validate=accuracy(model),
            run_folder=folder,
        )
    return model, state


def masked(model: nn.Module) -> Step:
    """A loss of two terms; the count of the first differs from batch to batch."""

    def step(x: Tensor, y: Tensor) -> Loss:
        logits = model(x)
        answer = Loss.mean("answer", F.cross_entropy(logits, y, reduction="none"), x[:, 0] > 0.3)
        return answer + Loss.mean("size", logits.square()).scaled(0.1)

    return step


def count_masked(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What the loss of `masked` divides by."""
    return {"answer": (x[:, 0] > 0.3).sum(), "size": torch.tensor(len(x) * CLASSES)}


def distributed(path: Path, batch_size: int = 2) -> None:
    """Two runs without dropout, as one of several processes or alone: normalised by steps, with averaged weights; and
    normalised by counts."""
    with runtime.process_group():
        for kind in ("means", "counts"):
            model, step = make(dropout=0.0)
            folder = RunFolder.create(path / kind)
            pairs = Pairs(batch_size, runtime.rank(), runtime.world_size())
            with Log(folder.log) as log:
                if kind == "means":
                    changed = config(average=0.8)
                    fit(model, step, pairs, config=changed, log=log, validate=accuracy(model), run_folder=folder)
                else:
                    changed = config(normalise="counts")
                    fit(model, masked(model), pairs, config=changed, log=log, run_folder=folder, count=count_masked)


class Stopped(Exception):
    """The run is interrupted."""


def stop() -> None:
    """Interrupt a run."""
    raise Stopped


def share_run(path: Path, batch_size: int, accumulation: int, at: int, shard: int = 0) -> None:
    """A part of a run without dropout, by as many processes as there are, up to a call of the step.

    Args:
        shard: 1 = the model is spread over them.
    """
    with runtime.process_group():
        model, step = make(dropout=0.0)
        folder = RunFolder.create(path, resume=from_main(path.exists()))
        pairs = Pairs(batch_size, runtime.rank(), runtime.world_size(), accumulation=accumulation)
        settings = config(
            accumulation=accumulation, average=0.8, log_every=4, normalise="micro_steps", shard=bool(shard)
        )
        with Log(folder.log) as log, contextlib.suppress(Stopped):
            fit(
                model,
                interrupted(step, at, stop),
                pairs,
                config=settings,
                log=log,
                validate=accuracy(model),
                run_folder=folder,
            )


def gloo_threads() -> list[str]:
    """Names of this process's threads that work for a process group; empty where the system does not list them."""
    tasks = Path("/proc/self/task")
    names = [(task / "comm").read_text().strip() for task in tasks.iterdir()] if tasks.is_dir() else []
    return [name for name in names if "gloo" in name]


def lines(path: Path) -> list[dict[str, Any]]:
    """A run's log without what depends on the clock, and without events."""
    return [
        {key: value for key, value in entry.items() if key not in TIMED}
        for entry in read(path / "log.jsonl")
        if entry["kind"] != "event"
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] in ("distributed", "share"):
        if sys.argv[1] == "distributed":
            distributed(Path(sys.argv[2]))
        else:
            share_run(Path(sys.argv[2]), *map(int, sys.argv[3:]))
        # A thread that still releases tensors when the interpreter ends would abort the process, now and then. What
        # PyTorch keeps of a model that was spread keeps the group, too.
        assert sys.argv[6:] == ["1"] or not gloo_threads(), gloo_threads()
    else:
        changes = EVERYTHING if sys.argv[4:] == ["everything"] else {}
        run(Path(sys.argv[2]), at=int(sys.argv[3]), how=lambda: os.kill(os.getpid(), signal.SIGKILL), **changes)
