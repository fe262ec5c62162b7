"""Folders: read-only, taken by two runs at once, moved, copied while a run writes to them, with any letters in their
name."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fixtures.commands import (
    LIMIT,
    assert_same_run,
    assert_same_weights,
    begin,
    command,
    count_steps,
    pretrain_words,
    run,
    wait_until,
)
from fixtures.own_mounts import open_mounts

Call = Callable[[Sequence[str | Path]], tuple[int, str]]

STEPS = ("train.max_steps=60", "train.save_every=5")


@pytest.fixture(scope="module")
def whole(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    ended = run(pretrain_words(world, out, *STEPS))
    assert ended.returncode == 0, ended.stderr
    return out


@pytest.mark.slow
def test_a_read_only_folder(world: Any, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Root, too, cannot write to a file system that is mounted so."""
    place = tmp_path / "place"
    place.mkdir()
    with open_mounts() as mounts:
        mounts.forbid_writing(place)
        for words in (
            pretrain_words(world, place / "run"),
            ["regions", "extract", world.scenes / "images", "--detector", world.detector, "--out", place / "regions"],
            ["scenes", "--out", place / "scenes", "--images", "4"],
        ):
            ended = mounts.run(command(words))
            assert ended.returncode == 2
            assert ended.stderr.count("visling:") == 1
            assert "Read-only file system" in ended.stderr
            assert "Traceback" not in ended.stderr
            record_property(f"message of {words[0]}", ended.stderr.strip())
        assert list(place.iterdir()) == []


def test_a_path_under_a_file(world: Any, tmp_path: Path, call: Call) -> None:
    (tmp_path / "file").write_text("not a folder")
    status, said = call(pretrain_words(world, tmp_path / "file" / "run"))
    assert status == 2
    assert f"cannot write to {tmp_path / 'file' / 'run'}: {tmp_path / 'file'} is a file" in said


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True], ids=["new", "resumed"])
def test_two_runs_started_into_one_folder(
    world: Any, whole: Path, tmp_path: Path, resume: bool, record_property: Callable[[str, object], None]
) -> None:
    """One of them trains as if it were alone; the other names the process that does."""
    out = tmp_path / "run"
    line = command(pretrain_words(world, out, *STEPS))
    if resume:
        stopped = begin(line, tmp_path / "said")
        wait_until(lambda: count_steps(out) > 6)
        stopped.kill()
        stopped.wait()
        line.append("--resume")
    both = [begin(line, tmp_path / f"said-{number}") for number in range(2)]
    status = [one.wait(LIMIT) for one in both]
    said = [(tmp_path / f"said-{number}").read_text() for number in range(2)]
    if status == [0, 0]:
        # The second began after the first had ended: it found a finished run.
        assert resume
    else:
        assert sorted(status) == [0, 2], said
        refused = said[status.index(2)]
        assert "Traceback" not in refused
        record_property("message", refused.strip().splitlines()[-1])
    assert_same_run(out, whole)


@pytest.mark.slow
def test_a_run_that_is_moved_resumes_elsewhere(world: Any, whole: Path, tmp_path: Path) -> None:
    """Also under a name with spaces and letters of other alphabets, and without a network."""
    out, elsewhere = tmp_path / "Läufe 1", tmp_path / "другое место" / "実験 ☂"
    running = begin(command(pretrain_words(world, out, *STEPS)), tmp_path / "said")
    wait_until(lambda: count_steps(out) > 6)
    running.send_signal(signal.SIGKILL)
    running.wait()
    elsewhere.parent.mkdir()
    out.rename(elsewhere)
    words = [*pretrain_words(world, elsewhere, *STEPS), "--resume"]
    with open_mounts(network=False) as mounts:
        ended = mounts.run(command(words))
    assert ended.returncode == 0, ended.stderr
    assert_same_run(elsewhere, whole)


@pytest.mark.slow
def test_a_copy_made_while_the_run_writes_can_be_resumed(world: Any, whole: Path, tmp_path: Path) -> None:
    """Copied file by file, as `cp -r` and backups do, again and again: each copy resumes from a state that is whole."""
    out = tmp_path / "run"
    running = begin(command(pretrain_words(world, out, "train.max_steps=60", "train.save_every=1")), tmp_path / "said")
    wait_until(lambda: count_steps(out) > 2)
    copies = []
    while running.poll() is None and len(copies) < 20:
        copies.append(tmp_path / f"copy-{len(copies)}")
        os.system(f"cp -r {out} {copies[-1]} 2> {tmp_path / 'vanished'}")
    assert running.wait(LIMIT) == 0
    assert copies
    copy = copies[len(copies) // 2]
    assert json.loads((copy / "run.json").read_text())["status"] == "running"
    ended = run([*pretrain_words(world, copy, "train.max_steps=60", "train.save_every=1"), "--resume"])
    assert ended.returncode == 0, ended.stderr
    assert_same_weights(copy / "model" / "model.safetensors", whole / "model" / "model.safetensors")


def test_names_with_spaces_and_other_letters(world: Any, tmp_path: Path, call: Call) -> None:
    place = tmp_path / "größe 大 ☂"
    scenes = Path(shutil.copytree(world.scenes, place / "the scenes"))
    assert call(["regions", "extract", scenes / "images" / "test", "--detector", world.detector, "--out",
                 place / "the regions", "--device", "cpu"]) == (0, "")  # fmt: skip
    assert call(pretrain_words(world, place / "the run"))[0] == 0
    assert call([*pretrain_words(world, place / "the run"), "--resume"])[0] == 0
    assert (place / "the run" / "model" / "model.safetensors").exists()
    assert call(["regions", "check", place / "the regions"]) == (0, "")
