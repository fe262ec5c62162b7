"""The machine misbehaves: its clock jumps, shared memory is full, a worker is killed, files vanish under a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fixtures.commands import (
    LIMIT,
    assert_same_run,
    begin,
    command,
    count_steps,
    find_processes,
    pretrain_words,
    run,
    wait_until,
)
from fixtures.own_mounts import open_mounts

Call = Callable[[Sequence[str | Path]], tuple[int, str]]

STEPS = ("train.max_steps=60", "train.save_every=5")

JUMPING = """
import datetime, itertools, time
real_time, real_datetime = time.time, datetime.datetime
jumps = itertools.cycle([0.0, 3e8, -9e8, 4e6, -1.0])
time.time = lambda: real_time() + next(jumps)
time.time_ns = lambda: int(time.time() * 1e9)

class Jumping(real_datetime):
    @classmethod
    def now(cls, tz=None):
        return real_datetime.fromtimestamp(time.time(), tz)

datetime.datetime = Jumping
"""
"""Sets the clock of a process years ahead and back at every look. Where elapsed time is measured, nothing looks at it:
the system's monotonic clock does not jump, whatever is done to the other one."""


@pytest.fixture(scope="module")
def whole(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    ended = run(pretrain_words(world, out, *STEPS))
    assert ended.returncode == 0, ended.stderr
    return out


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(
    world: Any, whole: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Started, killed and resumed with it: the same weights and lines, elapsed time that grows, and speeds that are
    possible."""
    (tmp_path / "sitecustomize.py").write_text(JUMPING)
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    out, line = tmp_path / "run", command(pretrain_words(world, tmp_path / "run", *STEPS))
    running = begin(line, tmp_path / "said", environment=path)
    wait_until(lambda: count_steps(out) > 6)
    running.send_signal(signal.SIGKILL)
    running.wait()
    resumed = begin([*line, "--resume"], tmp_path / "said", environment=path)
    assert resumed.wait(LIMIT) == 0, (tmp_path / "said").read_text()
    lines = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    trained = [entry for entry in lines if entry["kind"] == "train"]
    seconds = [entry["seconds"] for entry in trained]
    assert seconds == sorted(seconds)
    assert 0 < seconds[-1] < LIMIT
    assert all(entry["examples_per_second"] > 0 for entry in trained)
    left = [line.rpartition("  ")[2] for line in (tmp_path / "said").read_text().splitlines() if line.endswith("left")]
    assert left
    assert not [text for text in left if "days" in text or text.startswith("-")]
    assert_same_run(out, whole)
    record_property("longest time left", max(left))


@pytest.mark.slow
def test_a_full_shared_memory(
    world: Any, whole: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Processes that prepare batches need it: a little to start, and room for the batches, which pass through it."""
    out, memory = tmp_path / "run", Path("/dev/shm")
    line = command(pretrain_words(world, out, *STEPS, "workers=2"))
    with open_mounts() as mounts:
        mounts.add_disk(memory, 1 << 12)
        for size, message in ((1 << 12, "cannot be started"), (98_304, "no shared memory (/dev/shm) is left")):
            mounts.resize_disk(memory, size)
            ended = mounts.run(line, timeout=LIMIT)
            assert ended.returncode == 2, ended.stderr
            assert ended.stderr.count("visling:") == 1
            assert message in ended.stderr
            assert "/dev/shm" in ended.stderr
            assert "Traceback" not in ended.stderr
            record_property(f"message with {size} bytes", ended.stderr.strip().splitlines()[-1])
        mounts.resize_disk(memory, 1 << 26)
        resume = ["--resume"] if out.exists() else []
        again = mounts.run([*line, *resume])
        assert again.returncode == 0, again.stderr
    assert_same_run(out, whole)


@pytest.mark.slow
def test_a_killed_worker(
    world: Any, whole: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A process that prepares batches is killed, as by a system short of memory."""
    out = tmp_path / "run"
    line = command(pretrain_words(world, out, *STEPS, "workers=2", "train.max_steps=2000"))
    running = begin(line, tmp_path / "said")
    wait_until(lambda: count_steps(out) > 6)
    children = [number for number, _ in find_processes(str(out)) if number != running.pid]
    os.kill(children[-1], signal.SIGKILL)
    assert running.wait(LIMIT) == 2
    said = (tmp_path / "said").read_text()
    assert said.count("visling:") == 1
    assert "was ended from outside" in said
    assert "--resume" in said
    assert list(find_processes(str(out))) == []
    record_property("message", said.strip().splitlines()[-1])


@pytest.mark.slow
def test_a_store_deleted_while_a_run_reads_it(world: Any, whole: Path, regions: Path, tmp_path: Path) -> None:
    """Its files are mapped: they stay readable until the run ends. Resuming it names what is gone."""
    out, own = tmp_path / "run", types.SimpleNamespace(**{**vars(world), "regions": regions})
    line = command(pretrain_words(own, out, *STEPS))
    running = begin(line, tmp_path / "said")
    wait_until(lambda: count_steps(out) > 6)
    shutil.rmtree(regions)
    assert running.wait(LIMIT) == 0
    assert_same_run(out, whole)
    ended = run([*line[3:], "--resume"])
    assert ended.returncode == 2
    assert f"no region store at {regions}" in ended.stderr
