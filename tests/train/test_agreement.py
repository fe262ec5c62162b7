"""Being asked to end, and what processes decide together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from visling.train.agreement import Agreement, Signs
from visling.train.interruption import announce_end, listen
from visling.train.state import RunFolder


def raising(number: signal.Signals, times: int = 1) -> Callable[[], None]:
    def send() -> None:
        for _ in range(times):
            signal.raise_signal(number)

    return send


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# Being asked


def test_the_first_request_is_noted_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    acts: list[str] = []
    with listen(acts.append) as interruption:
        seen = [interruption.asked]
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
            seen.append(interruption.asked)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "the next one ends at once"
    assert seen == ["", "terminated", "terminated", "interrupted"]
    assert acts == ["terminated"]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_handlers_of_the_program_are_left_alone() -> None:
    heard: list[int] = []
    usual = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with listen() as interruption:
            signal.raise_signal(signal.SIGTERM)
            assert interruption.asked == ""
    finally:
        signal.signal(signal.SIGTERM, usual)
    assert heard == [signal.SIGTERM]


def test_other_threads_listen_to_nothing() -> None:
    found: list[Any] = []

    def work() -> None:
        with listen():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


def test_the_request_is_confirmed_without_a_stream(capfd: pytest.CaptureFixture[str]) -> None:
    announce_end("terminated")
    announce_end("interrupted")
    first, second = capfd.readouterr().err.splitlines()
    assert first == "visling: training ends after this update, and its state is saved."
    assert second.endswith("saved; Ctrl-C again ends at once.")


# Training that is asked to end


@pytest.fixture(scope="module")
def whole(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("runs") / "whole"
    return path, toy.run(path)[0]


@pytest.mark.parametrize("at", [1, 9, 30])
def test_sigterm_saves_and_the_resumed_run_equals_the_whole_one(
    toy: ModuleType, whole: tuple[Path, Any], tmp_path: Path, at: int
) -> None:
    """In the first update, in the last one of an epoch, and in the last one of all, which finishes the run."""
    path = tmp_path / "run"
    _, state = toy.run(path, at=at, how=raising(signal.SIGTERM))
    expected = {1: (1, "terminated", True), 9: (5, "terminated", True), 30: (15, "finished", False)}[at]
    assert (state.step, state.stopped, state.unfinished) == expected
    if state.unfinished:
        said = (path / "log.jsonl").read_text()
        assert f"stopped by SIGTERM at step {state.step} of 15; resume with --resume" in said
        assert (path / "model").exists() is (at == 9), "written at the end of an epoch, not in a hurry"
        resumed, state = toy.run(path, resume=True)
        assert state.stopped == "finished"
        assert equal(resumed, whole[1])
        assert toy.lines(path) == toy.lines(whole[0])


def test_ctrl_c_saves_and_then_interrupts(toy: ModuleType, whole: tuple[Path, Any], tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        toy.run(path, at=14, how=raising(signal.SIGINT))
    resumed, _ = toy.run(path, resume=True)
    assert equal(resumed, whole[1])


def test_more_sigterms_do_not_disturb_the_save(
    toy: ModuleType, whole: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, saves = tmp_path / "run", 0
    save = RunFolder.save_last

    def disturbed(self: RunFolder, *given: Any, **options: Any) -> None:
        nonlocal saves
        saves += 1
        signal.raise_signal(signal.SIGTERM)
        save(self, *given, **options)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_last", disturbed)
        _, state = toy.run(path, at=3, how=raising(signal.SIGTERM, times=2))
    assert (state.step, state.stopped, saves) == (2, "terminated", 1)
    resumed, _ = toy.run(path, resume=True)
    assert equal(resumed, whole[1])


# Several processes


def test_a_process_alone_sees_the_present() -> None:
    seen = Signs()
    agreement = Agreement(lambda: seen)
    assert agreement.exchange(alarm=True)
    assert not agreement.exchange()
    assert agreement.signs == Signs()
    seen = Signs(asked="terminated", elapsed=3.0)
    assert agreement.signs == seen


PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from visling import runtime
from visling.train.agreement import Agreement, Signs
from visling.train.engine import fit
from visling.train.log import Log, read
from visling.train.state import RunFolder
sys.path.insert(0, {folder!r})
import toy

out = Path({out!r})
with runtime.process_group(2):
    rank = runtime.rank()
    own = (
        Signs(time_over=True, elapsed=7.0) if rank == 0 else Signs(asked="terminated", line_overdue=True, elapsed=9.0)
    )
    agreement = Agreement(lambda: own)
    assert agreement.signs == Signs(asked="terminated", time_over=True, line_overdue=True, elapsed=7.0)
    assert agreement.exchange(alarm=rank == 1)
    assert not agreement.exchange()

    def train(name, at, how, resume=False, **changes):
        model, step = toy.make(dropout=0.0)
        folder = RunFolder.create(out / name, resume=resume)
        pairs = toy.Pairs(2, rank, 2)
        spied = toy.interrupted(step, at, how if rank == 1 else lambda: None)
        with Log(folder.log) as log:
            return fit(model, spied, pairs, config=toy.config(**changes), log=log, run_folder=folder)

    sent = train("sent", 9, lambda: os.kill(os.getpid(), signal.SIGTERM), log_every=100)
    assert (sent.step, sent.stopped) == (5, "terminated"), sent
    again = train("sent", 0, None, resume=True)
    assert (again.step, again.stopped) == (15, "finished"), again
    slow = train("slow", 3, lambda: time.sleep(0.3), log_every=100, log_seconds=0.25, max_seconds=20.0)
    timed = train("timed", 0, None, seconds=0.2, log_every=10000, optim=toy.OptimConfig(clip="none"))
    steps = runtime.sum_over_processes(__import__("torch").tensor(float(timed.step)))
    assert steps == 2 * timed.step, "a run bounded by time ends at one step"
    began = time.monotonic()
    over = train("over", 0, None, max_steps=10**6, log_every=10**6, max_seconds=0.3)
    assert over.stopped == "max_seconds" and time.monotonic() - began < 10
    if rank == 0:
        print([entry["step"] for entry in read(out / "slow" / "log.jsonl") if entry["kind"] == "train"])
"""


def test_two_processes_stop_and_log_at_the_same_update(tmp_path: Path) -> None:
    """One of them is asked to end, or is slow; the other one has the clock."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(folder=str(Path(__file__).parent), out=str(tmp_path)))
    ended = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=240, check=False, env={**os.environ}
    )
    assert ended.returncode == 0, ended.stderr
    lines = json.loads(ended.stdout.splitlines()[-1])
    assert lines[0] == 2, "the slow process was in the second update"
    assert lines[-1] == 15
