"""Commands that do not train, killed at random moments: the same command again completes, and leaves the same files."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.commands import assert_same_files, begin, command, find_leftovers, run
from fixtures.released_layouts import Layout, detect, write_obj36

pytestmark = pytest.mark.slow

KILLS = 3


def kill_at_random(
    words: Sequence[str | Path], whole: Sequence[str | Path], tmp_path: Path, is_begun: Callable[[], bool]
) -> None:
    """Run `whole` to its end, then `words` until it has been killed `KILLS` times, at moments within the time that
    `whole` took, and once to its end.

    Args:
        is_begun: whether something is there that the command should continue.
    """
    start = time.monotonic()
    ended = run(whole)
    assert ended.returncode == 0, ended.stderr
    seconds, chance = time.monotonic() - start, random.Random(7)
    for part in range(KILLS):
        # The last ones come late, when files are being written.
        moment = seconds * chance.uniform(part / KILLS, (part + 1) / KILLS)
        running = begin(command([*words, *(["--resume"] if is_begun() else [])]), tmp_path / "said")
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert running.wait(moment) == 0, (tmp_path / "said").read_text()
            return  # faster than `whole`, it came to its end before the last kill
        running.send_signal(signal.SIGKILL)
        running.wait()
    ended = run([*words, *(["--resume"] if is_begun() else [])])
    assert ended.returncode == 0, ended.stderr


def test_extraction_and_conversion(world: Any, tmp_path: Path) -> None:
    images = {f"image-{number:03d}": ((100, 80), np.array([[1, 2, 50, 60]])) for number in range(300)}
    features = write_obj36(detect(images, Layout(write_obj36, width=512)), tmp_path)
    extracting = ["regions", "extract", world.scenes / "images", "--detector", world.detector, "--batch-size", "2"]
    for name, words in {"extracted": extracting, "converted": ["regions", "convert", features]}.items():
        out, whole = tmp_path / name, tmp_path / f"{name}-whole"
        kill_at_random(
            [*words, "--out", out], [*words, "--out", whole], tmp_path, lambda out=out: any(out.glob("*.json*"))
        )
        assert_same_files(out, whole)


def test_drawing(tmp_path: Path) -> None:
    """Nothing that looks complete is left by a kill, and the next start removes what is left."""
    words = ["scenes", "--images", "200", "--set", "processes=1", "--out"]
    out, whole = tmp_path / "scenes", tmp_path / "whole"
    kill_at_random([*words, out], [*words, whole], tmp_path, lambda: False)
    assert_same_files(out, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["said", "scenes", "whole"]


def test_evaluation(world: Any, tmp_path: Path) -> None:
    """Scores appear when all other results are there."""
    killed, whole = (Path(shutil.copytree(world.vqa, tmp_path / name)) for name in ("killed", "whole"))
    options = ["--split", "test", "--device", "cpu"]
    kill_at_random(["evaluate", killed, *options], ["evaluate", whole, *options], tmp_path, lambda: False)
    assert find_leftovers(killed) == []
    assert_same_files(killed, whole)
