"""A pool of runs that is asked to end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fixtures.pooled_runs import Sleeper

from visling.runs.jobs import carry_out


@contextlib.contextmanager
def terminated_when(is_time: Callable[[], bool]) -> Iterator[None]:
    """Context in which this process gets SIGTERM once something holds."""

    def watch() -> None:
        until = time.monotonic() + 120
        while not is_time():
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        time.sleep(0.5)  # a process that has ended a run asks for another one
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        watcher.join()


def make(folder: Path, seconds: float, init: Path | None = None) -> Sleeper:
    folder.mkdir()
    return Sleeper(folder, seconds, init)


@pytest.mark.parametrize("long", [1, 2])
def test_when_it_is_asked_to_end_runs_save_and_idle_processes_leave(tmp_path: Path, long: int) -> None:
    """With one long run the other process waits for work, where a signal would leave the lock of the queue held."""
    runs = [make(tmp_path / str(number), 300.0 if number < long else 0.0) for number in range(2)]
    later = make(tmp_path / "later", 0.0, init=runs[0].folder)
    ended: list[Sleeper] = []
    left = [run.folder / ("begun" if number < long else "ended") for number, run in enumerate(runs)]
    with terminated_when(lambda: all(file.exists() for file in left)):
        assert carry_out([*runs, later], 2, None, ended.append) is False
    assert ended == runs[long:]
    assert all((run.folder / "saved").exists() for run in runs[:long])
    assert not (later.folder / "begun").exists()


def test_at_the_end_of_the_time_no_further_run_begins(tmp_path: Path) -> None:
    run = make(tmp_path / "run", 300.0)
    assert carry_out([run], 1, None, lambda run: None, seconds=0.5) is False
    assert not (run.folder / "ended").exists()


def test_without_a_limit_all_end_each_after_the_one_that_it_starts_from(tmp_path: Path) -> None:
    first = make(tmp_path / "first", 0.2)
    second = make(tmp_path / "second", 0.0, init=first.folder)
    ended: list[Sleeper] = []
    assert carry_out([second, first], 2, None, ended.append) is True
    assert ended == [first, second]
