"""The disk is full while something is written: one sentence says so, what was saved is intact, and once there is space
the same command with --resume leaves what an undisturbed one leaves.

Where the system lets nobody mount a small disk, a limit on the size of files takes its place: writing fails as it does
on a full disk, with another number.
"""

from __future__ import annotations

import contextlib
import resource
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.commands import (
    LIMIT,
    assert_same_files,
    assert_same_run,
    begin,
    command,
    count_steps,
    find_leftovers,
    pretrain_words,
    run,
    wait_until,
)
from fixtures.own_mounts import OwnMounts, open_mounts
from fixtures.released_layouts import Layout, detect, write_obj36

Call = Callable[[Sequence[str | Path]], tuple[int, str]]

FULL = "No space left on device"


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file that this process writes can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def extract_words(world: Any) -> list[str | Path]:
    """Words of `visling regions extract`; --out is missing."""
    return [
        "regions", "extract", world.scenes / "images", "--detector", world.detector, "--device", "cpu", "--threads",
        "1", "--batch-size", "2", "--dtype", "float32",
    ]  # fmt: skip


def assert_one_sentence(said: str, *parts: str) -> None:
    """A command has ended with one error for its user, and no traceback."""
    assert said.count("visling:") == 1, said
    assert "Traceback" not in said
    for part in parts:
        assert part in said


def write_features(folder: Path) -> Path:
    """A feature file in the layout of LXMERT's, of 40 images."""
    images = {f"image-{number:02d}": ((100, 80), np.array([[1, 2, 50, 60]])) for number in range(40)}
    return write_obj36(detect(images, Layout(write_obj36, width=64, fewest=3, most=3)), folder)


def test_the_size_that_a_file_may_have(world: Any, tmp_path: Path, call: Call, released: list[str]) -> None:
    """What else always runs: pre-training, extraction and both conversions meet a limit, and complete without it."""
    whole, limited = tmp_path / "whole", tmp_path / "limited"
    assert call(pretrain_words(world, whole, "train.save_every=1"))[0] == 0
    with largest_file(20_000):
        status, said = call(pretrain_words(world, limited, "train.save_every=1"))
    assert status == 2
    assert_one_sentence(said, f"cannot write to {limited}", "File too large", "What was saved before is intact")
    assert call(pretrain_words(world, limited, "train.save_every=1"))[0] == 0
    assert_same_run(limited, whole)

    words = [*extract_words(world), "--out", tmp_path / "regions"]
    with largest_file(7_000):
        status, said = call(words)
    assert status == 2
    assert_one_sentence(said, "cannot write region store", "File too large", "with --resume")
    assert call([*words, "--resume"])[0] == 0
    assert call([*words[:-1], tmp_path / "at-once"])[0] == 0
    assert_same_files(tmp_path / "regions", tmp_path / "at-once")

    words = ["regions", "convert", write_features(tmp_path), "--out", tmp_path / "converted"]
    with largest_file(7_000):
        status, said = call(words)
    assert status == 2
    assert_one_sentence(said, "cannot write region store", "File too large", "with --resume")
    assert call([*words, "--resume"])[0] == 0
    assert call([*words[:-1], tmp_path / "converted-at-once"])[0] == 0
    assert_same_files(tmp_path / "converted", tmp_path / "converted-at-once")

    with largest_file(20_000):
        status, said = call([*released, "--to", tmp_path / "model"])
    assert status == 2
    assert_one_sentence(said, "cannot write", "File too large", "Free space or use another place")
    assert not (tmp_path / "model").exists()
    assert call([*released, "--to", tmp_path / "model"])[0] == 0
    assert call([*released, "--to", tmp_path / "model-at-once"])[0] == 0
    assert_same_files(tmp_path / "model", tmp_path / "model-at-once")


@pytest.fixture
def mounts() -> Iterator[OwnMounts]:
    with open_mounts() as mounts:
        yield mounts


@pytest.mark.slow
def test_a_run_whose_disk_is_filled_by_others(
    world: Any, tmp_path: Path, mounts: OwnMounts, record_property: Callable[[str, object], None]
) -> None:
    disk, whole = tmp_path / "disk", tmp_path / "whole"
    settings = ("train.max_steps=400", "train.save_every=5")
    mounts.add_disk(disk, 3 << 20)
    line = command(pretrain_words(world, disk / "run", *settings))
    running = begin(mounts.enter(line), tmp_path / "said")
    wait_until(lambda: count_steps(mounts.see(disk / "run")) > 60)
    mounts.run(["sh", "-c", f"cat /dev/zero > {disk}/others"])
    assert running.wait(LIMIT) == 2
    said = (tmp_path / "said").read_text()
    assert_one_sentence(said, "visling: cannot write ", str(disk / "run"), FULL)  # a state, or the next line of the log
    seen = mounts.see(disk / "run")
    assert find_leftovers(seen) == []
    again = mounts.run([*line, "--resume"])
    assert again.returncode == 2
    assert_one_sentence(again.stderr, "Free ")
    (mounts.see(disk) / "others").unlink()
    resumed = mounts.run([*line, "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert run(pretrain_words(world, whole, *settings)).returncode == 0
    assert_same_run(seen, whole)
    record_property("message", said.splitlines()[-1])


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_refused_before_it_begins(world: Any, tmp_path: Path, mounts: OwnMounts) -> None:
    disk = tmp_path / "disk"
    mounts.add_disk(disk, 100_000)
    refused = mounts.run(command(pretrain_words(world, disk / "run")))
    assert refused.returncode == 2
    assert_one_sentence(refused.stderr, "needs about", "are free")
    assert list(mounts.see(disk).iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [9_000, 45_000], ids=["on the way", "at the end"])
def test_extraction_and_conversion_to_a_disk_that_is_too_small(
    world: Any, tmp_path: Path, mounts: OwnMounts, record_property: Callable[[str, object], None], size: int
) -> None:
    """Too small for the features, or just too small to join them to one file."""
    converting = ["regions", "convert", write_features(tmp_path)]
    for name, words in {"extract": extract_words(world), "convert": converting}.items():
        disk, out, whole = tmp_path / name, tmp_path / name / "regions", tmp_path / f"{name}-whole"
        mounts.add_disk(disk, size)
        line = command([*words, "--out", out])
        failed = mounts.run(line)
        assert failed.returncode == 2, failed.stderr
        assert_one_sentence(failed.stderr, f"cannot write region store {out}", FULL, "with --resume")
        assert mounts.run([*line, "--resume"]).returncode == 2, "still full"
        mounts.resize_disk(disk, 4 << 20)
        resumed = mounts.run([*line, "--resume"])
        assert resumed.returncode == 0, resumed.stderr
        assert run([*words, "--out", whole]).returncode == 0
        assert_same_files(mounts.see(out), whole)
        record_property(f"message of {name}", failed.stderr.strip())


@pytest.mark.slow
def test_conversion_of_weights_to_a_disk_that_is_too_small(
    tmp_path: Path, mounts: OwnMounts, released: list[str], record_property: Callable[[str, object], None]
) -> None:
    disk, whole = tmp_path / "disk", tmp_path / "whole"
    mounts.add_disk(disk, 40_000)
    line = command([*released, "--to", disk / "model"])
    failed = mounts.run(line)
    assert failed.returncode == 2
    assert_one_sentence(failed.stderr, f"cannot write {disk / 'model'}", FULL)
    assert list(mounts.see(disk).iterdir()) == []
    mounts.resize_disk(disk, 4 << 20)
    assert mounts.run(line).returncode == 0
    subprocess.run(command([*released, "--to", whole]), check=True, capture_output=True)
    assert_same_files(mounts.see(disk / "model"), whole)
    record_property("message", failed.stderr.strip())
