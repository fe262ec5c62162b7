"""Whose folder it is: one run at a time, by whatever way the others ended."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from visling.errors import RunError
from visling.runs.setup import claim_run_folder
from visling.train.claim import LOCK, hold_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no locks of this kind")

HOLD = """
import os, sys, time
from pathlib import Path
from visling.train.claim import hold_folder
with hold_folder(Path(sys.argv[1]), resume=False):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    """Also while a child of the killed one still lives, such as one that prepares batches."""
    out = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        for resume in (False, True):
            with (
                pytest.raises(RunError, match=rf"{out} is in use: process {holder.pid} on \S+ runs in it. Wait"),
                claim_run_folder(out, resume=resume),
            ):
                pass
        assert [entry.name for entry in out.iterdir()] == [LOCK]
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=10)
        with claim_run_folder(out, resume=False) as folder:
            assert f"process {os.getpid()} on" in (out / LOCK).read_text()
            assert folder.read()["status"] == "running"
        assert [entry.name for entry in out.iterdir()] == ["run.json"]
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()
        holder.communicate()


def test_what_is_refused_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").touch()
    with pytest.raises(RunError, match="not empty"), hold_folder(tmp_path / "taken", resume=False):
        pass
    with pytest.raises(RunError, match="nothing to resume"), hold_folder(tmp_path / "missing", resume=True):
        pass
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["letter.txt", "taken"]


@pytest.mark.parametrize("existed", [True, False])
def test_a_folder_that_stays_empty_is_removed_if_it_was_made(tmp_path: Path, existed: bool) -> None:
    if existed:
        (tmp_path / "run").mkdir()
    with hold_folder(tmp_path / "run", resume=False), hold_folder(tmp_path / "run", resume=False):
        assert (tmp_path / "run" / LOCK).exists()
    assert list(tmp_path.iterdir()) == ([tmp_path / "run"] if existed else [])


def test_a_lock_that_a_kill_left_behind_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text("process 1 on another machine")
    with claim_run_folder(tmp_path / "run", resume=False):
        pass


def test_a_file_system_without_locks_is_mentioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claim_run_folder(tmp_path / "run", resume=False) as folder:
        (note,) = folder.notes
    assert "without locks (No locks available): make sure that no other run uses it" in note
