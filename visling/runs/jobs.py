"""Runs in a pool of processes: those of a comparison, and those of the claims of papers."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, TypeVar

from visling import runtime
from visling.errors import RunError, VislingError
from visling.recipes.tables import find_finetuning, find_pretraining
from visling.runs import finetune as finetuning_module
from visling.runs import pretrain as pretraining_module
from visling.runs.configure import configure
from visling.runs.evaluate import evaluate
from visling.train.interruption import listen
from visling.train.state import RunFolder, State

Start = Literal["pre-trained", "from scratch", "text only"]

FOLDER_SUFFIX: Mapping[Start, str] = {"pre-trained": "", "from scratch": "-scratch", "text only": "-text-only"}
"""What a fine-tuned run starts from and sees -> suffix of its folder."""


class Runnable(Protocol):
    """A run that `carry_out` can start in this process or in another."""

    @property
    def folder(self) -> Path:
        """Its run folder."""

    @property
    def init(self) -> Path | None:
        """Folder of the run that it starts from."""

    def work(self, stream: TextIO | None = None) -> bool:
        """Start or resume it, and see to what is measured at its end.

        Returns:
            Whether it has ended; False after SIGTERM, when it is to be resumed.
        """


R = TypeVar("R", bound=Runnable)


@dataclass(frozen=True, kw_only=True)
class Places:
    """What a run reads and where it computes."""

    data: Path
    store: Path
    device: str
    images: Path | None = None
    """Read by recipes with a jointly trained extractor."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a comparison."""

    model: str
    seed: int
    task: str = ""
    """Empty: pre-training."""
    start: Start = "pre-trained"
    recipe: str
    settings: tuple[str, ...]
    folder: Path
    init: Path | None = None
    place: Places
    split: str
    """Scored at the end of a task."""

    def __str__(self) -> str:
        return f"{self.model}, seed {self.seed}, {f'{self.task}, {self.start}' if self.task else 'pre-training'}"

    @property
    def status(self) -> str:
        """Status in its run.json; empty if there is none."""
        return read_status(self.folder)

    @property
    def ended(self) -> bool:
        """Whether it is trained and, if it has a task, scored."""
        return self.status == "finished" and (not self.task or self.evaluation is not None)

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """Its scores; None if there are none, or if the process was killed while writing them."""
        file = self.folder / f"evaluation_{self.split}.json"
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found

    def work(self, stream: TextIO | None = None) -> bool:
        """Train it to its end, and score it."""
        training = PlacedTraining(
            verb="finetune" if self.task else "pretrain",
            recipe=self.recipe,
            settings=self.settings,
            folder=self.folder,
            init=self.init,
            place=self.place,
        )
        if not training.work(stream):
            return False
        if self.task and self.evaluation is None:
            place = self.place
            evaluate(
                self.folder, split=self.split, data=place.data, store=place.store, device=place.device, overwrite=True
            )
        return True


def read_status(folder: Path) -> str:
    """Status in the run.json of a run folder; empty if there is none."""
    return str(RunFolder(folder).read().get("status")) if (folder / "run.json").exists() else ""


@dataclass(frozen=True, kw_only=True)
class PlacedTraining:
    """A recipe with changed settings, what it reads, and the folder that it leaves."""

    verb: Literal["pretrain", "finetune"]
    recipe: str
    settings: tuple[str, ...]
    folder: Path
    init: Path | None = None
    place: Places

    def work(self, stream: TextIO | None = None) -> bool:
        """Start or resume it and train it to its end; one that has finished is left as it is.

        Returns:
            Whether it has finished; False after SIGTERM, when it is to be resumed.
        """
        status = read_status(self.folder)
        if not status:
            for torn in self.folder.glob("*.part"):  # left by a process killed before it wrote run.json
                torn.unlink()
        if status == "finished":
            return True
        train = self._pretrain if self.verb == "pretrain" else self._finetune
        return not train(resume=status != "", stream=stream).unfinished

    def _pretrain(self, *, resume: bool, stream: TextIO | None) -> State:
        place = self.place
        config = configure(find_pretraining(self.recipe)(), self.settings, init=self.init)
        return pretraining_module.pretrain(
            config,
            self.folder,
            data=[str(place.data)],
            store=place.store,
            init=self.init,
            images=None if config.extractor is None else place.images,
            device=place.device,
            resume=resume,
            stream=stream,
            command=self.command,
        )

    def _finetune(self, *, resume: bool, stream: TextIO | None) -> State:
        place = self.place
        config = configure(find_finetuning(self.recipe)(), self.settings, init=self.init)
        return finetuning_module.finetune(
            config,
            self.folder,
            data=place.data,
            store=place.store,
            init=self.init,
            images=None if config.extractor is None else place.images,
            device=place.device,
            resume=resume,
            stream=stream,
            command=self.command,
        )

    @property
    def command(self) -> list[str]:
        """The command line of this run alone."""
        settings = [word for setting in self.settings for word in ("--set", setting)]
        init = [] if self.init is None else ["--init", str(self.init)]
        place = self.place
        data = ["--data", str(place.data), "--store", str(place.store), "--device", place.device]
        return [
            "visling",
            self.verb,
            "--recipe",
            self.recipe,
            *data,
            *init,
            *settings,
            "--threads",
            "1",
            "--out",
            str(self.folder),
        ]


def carry_out(
    runs: Sequence[R],
    jobs: int,
    stream: TextIO | None,
    note: Callable[[R], None],
    *,
    seconds: float | None = None,
) -> bool:
    """Carry out all runs in order, none before the one that it starts from has ended.

    Args:
        jobs: runs at a time, each in a process of its own with one thread; with 1, and without a limit of time, they
            run in this process.
        note: called with a run that has ended.
        seconds: after which those under way save their states and end; None = no limit.
    Returns:
        Whether all have ended; False after SIGTERM or at the end of the time, when those under way have saved their
        states.
    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the same holds.
    """
    if (jobs == 1 and seconds is None) or not runs:
        for run in runs:
            with _name_errors(run):
                if not run.work(stream):
                    return False
            note(run)
        return True
    left, running = list(runs), dict[Future[bool], R]()
    until = None if seconds is None else time.monotonic() + seconds
    with _start_workers(jobs) as (pool, end), listen(lambda _: end.set()) as interruption:

        def is_over() -> bool:
            if until is not None and time.monotonic() >= until:
                end.set()
            return end.is_set()

        while (left and not is_over()) or running:
            needed = {run.folder for run in (*left, *running.values())}
            free = 0 if is_over() else jobs - len(running)
            for run in [run for run in left if run.init not in needed][:free]:
                left.remove(run)
                running[pool.submit(_work, run)] = run
            for future in wait(running, timeout=_find_rest(until, end), return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                try:
                    with _name_errors(run):
                        ended = future.result()
                except RunError:
                    if not end.is_set():
                        raise
                    ended = False  # it was reading data, or scoring
                if ended:
                    note(run)
                else:
                    left.append(run)
    if interruption.asked == "interrupted":
        raise KeyboardInterrupt
    return not left


def _work(run: Runnable) -> bool:
    """`Runnable.work` as a function, which a pool can be given."""
    return run.work()


def _find_rest(until: float | None, end: Event) -> float | None:
    """Seconds until the workers are asked to end; None = they have been, or there is no limit."""
    return None if until is None or end.is_set() else max(until - time.monotonic(), 0.0)


@contextlib.contextmanager
def _name_errors(run: Runnable) -> Iterator[None]:
    """Name the run in errors."""
    try:
        yield
    except VislingError as error:
        raise RunError(f"{run}: {error}") from error
    except BrokenProcessPool as error:
        raise RunError(
            f"{run}: a process ended without a message (killed, or out of memory). What was saved is kept: continue "
            "with --resume or fewer --jobs."
        ) from error


@contextlib.contextmanager
def _start_workers(jobs: int) -> Iterator[tuple[ProcessPoolExecutor, Event]]:
    """Processes that end when this one does, however it ends: two that write to one run folder would corrupt it. The
    event asks them to save what they train and to end it."""
    # spawn: a fork of a process with threads (torch starts some) may hang.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    end = context.Event()
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare_worker, initargs=(ours, end))
    try:
        yield pool, end
    except BaseException:
        theirs.close()  # they stop in the middle of a step, which a run folder survives
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        theirs.close()
        ours.close()


def _prepare_worker(parent: Connection, end: Event) -> None:
    """Set up a worker: one thread for torch, and two that watch the parent."""
    runtime.limit_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the parent passes it on
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    threading.Thread(target=_await_end, args=(end,), daemon=True).start()


def _watch_parent(parent: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        parent.recv()  # nothing is ever sent: this returns when the parent's end is closed
    os._exit(1)


def _await_end(end: Event) -> None:
    end.wait()
    os.kill(os.getpid(), signal.SIGTERM)  # training saves; whatever else it is doing ends
