"""Runs of a comparison in a pool of processes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Literal, TextIO

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


@dataclass(frozen=True, kw_only=True)
class Places:
    """What all runs read and where they compute."""

    data: Path
    store: Path
    device: str
    split: str


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

    def __str__(self) -> str:
        return f"{self.model}, seed {self.seed}, {f'{self.task}, {self.start}' if self.task else 'pre-training'}"

    @property
    def status(self) -> str:
        """Status in its run.json; empty if there is none."""
        folder = RunFolder(self.folder)
        return str(folder.read().get("status")) if (folder.path / "run.json").exists() else ""

    def ended(self, split: str) -> bool:
        """Whether it is trained and, if it has a task, scored."""
        return self.status == "finished" and (not self.task or self.evaluation(split) is not None)

    def evaluation(self, split: str) -> dict[str, Any] | None:
        """Its scores; None if there are none, or if the process was killed while writing them."""
        try:
            found: dict[str, Any] = json.loads((self.folder / f"evaluation_{split}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found


def work(run: Job, place: Places, stream: TextIO | None = None) -> bool:
    """Start or resume one run, train it to its end, and score it.

    Returns:
        Whether it has ended; False after SIGTERM, when it is to be resumed.
    """
    if not run.status:
        for torn in run.folder.glob("*.part"):  # left by a process killed before it wrote run.json
            torn.unlink()
    if run.status != "finished":
        train = _finetune if run.task else _pretrain
        if train(run, place, resume=run.status != "", stream=stream).unfinished:
            return False
    if run.task and run.evaluation(place.split) is None:
        evaluate(run.folder, split=place.split, data=place.data, store=place.store, device=place.device, overwrite=True)
    return True


def _pretrain(run: Job, place: Places, *, resume: bool, stream: TextIO | None) -> State:
    return pretraining_module.pretrain(
        configure(find_pretraining(run.recipe)(), run.settings),
        run.folder,
        data=[str(place.data)],
        store=place.store,
        device=place.device,
        resume=resume,
        stream=stream,
        command=_build_command("pretrain", run, place),
    )


def _finetune(run: Job, place: Places, *, resume: bool, stream: TextIO | None) -> State:
    return finetuning_module.finetune(
        configure(find_finetuning(run.recipe)(), run.settings, init=run.init),
        run.folder,
        data=place.data,
        store=place.store,
        init=run.init,
        device=place.device,
        resume=resume,
        stream=stream,
        command=_build_command("finetune", run, place),
    )


def _build_command(verb: str, run: Job, place: Places) -> list[str]:
    """The command line of this run alone."""
    settings = [word for setting in run.settings for word in ("--set", setting)]
    init = [] if run.init is None else ["--init", str(run.init)]
    data = ["--data", str(place.data), "--store", str(place.store), "--device", place.device]
    return [
        "visling",
        verb,
        "--recipe",
        run.recipe,
        *data,
        *init,
        *settings,
        "--threads",
        "1",
        "--out",
        str(run.folder),
    ]


def carry_out(
    runs: Sequence[Job], place: Places, jobs: int, stream: TextIO | None, note: Callable[[Job], None]
) -> bool:
    """Carry out all runs in order, none before the one that it starts from has ended.

    Returns:
        Whether all have ended; False after SIGTERM, when those under way have saved their states.
    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the same holds.
    """
    if jobs == 1 or not runs:
        for run in runs:
            with _name_errors(run):
                if not work(run, place, stream):
                    return False
            note(run)
        return True
    left, running = list(runs), dict[Future[bool], Job]()
    with _start_workers(jobs) as (pool, end), listen(lambda _: end.set()) as interruption:
        while (left and not interruption.asked) or running:
            needed = {run.folder for run in (*left, *running.values())}
            free = 0 if interruption.asked else jobs - len(running)
            for run in [run for run in left if run.init not in needed][:free]:
                left.remove(run)
                running[pool.submit(work, run, place)] = run
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                try:
                    with _name_errors(run):
                        ended = future.result()
                except RunError:
                    if not interruption.asked:
                        raise
                    ended = False  # it was reading data, or scoring
                if ended:
                    note(run)
                else:
                    left.append(run)
    if interruption.asked == "interrupted":
        raise KeyboardInterrupt
    return not left


@contextlib.contextmanager
def _name_errors(run: Job) -> Iterator[None]:
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
