"""SIGKILL at random moments of a run, again and again: it completes, and equals the run that nobody killed."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures.commands import (
    LIMIT,
    assert_same_run,
    begin,
    command,
    count_steps,
    find_leftovers,
    find_processes,
    pretrain_words,
    run,
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "steps"), [(3, 150), (50, 600)], ids=["few", "many"])
def test_a_run_killed_at_random_moments_equals_the_undisturbed_one(
    world: Any, tmp_path: Path, record_property: Callable[[str, object], None], kills: int, steps: int
) -> None:
    """Each kill comes at a moment drawn evenly from the time that this start of the command may take: it must import
    and read everything again, and then trains its share of the updates that are left, twice as many at most."""
    often = ("train.save_every=3", "train.validate_every=40", 'train.keep=["best","last"]')
    settings = (f"train.max_steps={steps}", *often)
    whole, out = tmp_path / "whole", tmp_path / "killed-1"

    def make_line() -> list[str]:
        resume = ["--resume"] if (out / "run.json").exists() else []
        return command([*pretrain_words(world, out, *settings), *resume])

    began = time.monotonic()
    ended = run(pretrain_words(world, whole, *settings))
    assert ended.returncode == 0, ended.stderr
    seconds = time.monotonic() - began
    training = find_training_seconds(whole)
    chance, found, done, runs = random.Random(16), Counter[str](), 0, 1
    while True:
        before = count_steps(out)
        share = min(2 * (steps - before) / max(kills - done, 1), steps - before) / steps
        running = begin(make_line(), tmp_path / "said")
        if done < kills:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(chance.uniform(0, seconds - training + training * share))
        else:
            running.wait(LIMIT)
        if running.poll() is None:
            running.send_signal(signal.SIGKILL)
        if running.wait() == -signal.SIGKILL:
            done += 1
            found[describe_death(out, before)] += 1
            continue
        assert running.returncode == 0, (tmp_path / "said").read_text()[-2000:]
        assert_same_run(out, whole)
        assert find_leftovers(out) == []
        assert list(find_processes(str(out))) == []
        if done == kills:
            break
        # Faster than the undisturbed one, it came to its end before all kills: another one gets the rest, earlier.
        runs, seconds, training = runs + 1, seconds * 0.7, training * 0.7
        out = tmp_path / f"killed-{runs}"
    found["runs"] = runs
    for name, value in {"kills": kills, "updates": steps, "seconds undisturbed": round(seconds, 1), **found}.items():
        record_property(name, value)


def find_training_seconds(run_folder: Path) -> float:
    """How long a run trained, without start and end."""
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    return float(max(line.get("seconds", 0.0) for line in lines))


def describe_death(run_folder: Path, before: int) -> str:
    """Where a kill met a run that had `before` updates in its log."""
    if run_folder.exists() and find_leftovers(run_folder):
        return "kills while a file was written"
    return "kills while training" if count_steps(run_folder) > before else "kills at the start"
