"""`visling regions extract` by several processes and machines, killed and resumed: always the store of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visling.cli import app
from visling.errors import StoreError
from visling.regions.files import JOURNAL, MANIFEST, committed_ids
from visling.regions.store import NativeStore
from visling.runs import extraction
from visling.runs.extraction import is_in_share
from visling.vision.detector import Detector, DetectorConfig
from visling.vision.extract import ExtractionReport

CONFIG = DetectorConfig(
    class_names=("thing",), attribute_names=("red",), long_side=32, channels=(4, 6), blocks=(0, 0),
    anchor_sizes=(12.0,), proposal_size=4, pool_size=2, feature_size=5, candidates=20, proposals=6, max_regions=4,
    min_regions=2, min_confidence=0.9,
)  # fmt: skip
IMAGES = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector, images of two sizes, their store as one process writes it, and a damaged image."""
    place = tmp_path_factory.mktemp("extraction")
    torch.manual_seed(0)
    Detector(CONFIG).eval().save(place / "detector")
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        folder = place / "images" / ("a" if number < 10 else "b/c")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (20 if number % 4 == 3 else 32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image_{number}.png")
    (place / "images" / "damaged.png").write_text("no image")
    ended = run(place, "--out", place / "one")
    assert ended.returncode == 0, ended.stderr
    return place


def command(place: Path, *words: str | Path) -> list[str]:
    return [
        sys.executable, "-m", "visling", "regions", "extract", str(place / "images"), "--detector",
        str(place / "detector"), "--device", "cpu", "--threads", "1", "--dtype", "float32", "--batch-size", "2",
        "--json", *map(str, words),
    ]  # fmt: skip


def run(place: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(place, *words), capture_output=True, text=True, timeout=120, check=False)


def begin(place: Path, out: Path, *words: str, delay: float) -> subprocess.Popen[bytes]:
    """The command, with a detector that takes `delay` seconds for each batch."""
    slow = (
        "import sys, time\n"
        "from visling.vision.detector import Detector\n"
        "detect = Detector.detect_scaled\n"
        f"Detector.detect_scaled = lambda self, *a, **k: (time.sleep({delay}), detect(self, *a, **k))[1]\n"
        "from visling.cli import app\n"
        "app.run()\n"
    )
    (out.parent / "slow.py").write_text(slow)
    words = (*command(place, "--out", out, *words)[3:],)
    return subprocess.Popen(
        [sys.executable, str(out.parent / "slow.py"), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def assert_same(out: Path, whole: Path) -> None:
    """Two stores of the same regions."""
    found, expected = NativeStore.open(out), NativeStore.open(whole)
    found.check()
    assert found.ids == expected.ids
    assert {key: found.manifest[key] for key in ("fingerprint", "fields", "settings", "regions", "images")} == {
        key: expected.manifest[key] for key in ("fingerprint", "fields", "settings", "regions", "images")
    }
    for image_id in expected.ids:
        one, other = found[image_id], expected[image_id]
        assert one.size == other.size
        for field in expected.fields:
            np.testing.assert_allclose(getattr(one, field), getattr(other, field), atol=1e-3, err_msg=field)


def wait_for(condition: Any, running: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if condition():
            return
        assert running.poll() is None, "it ended too early"
        time.sleep(0.1)
    pytest.fail("nothing was written in a minute")


def test_two_processes_write_the_store_of_one(place: Path, tmp_path: Path) -> None:
    ended = run(place, "--out", tmp_path / "two", "--processes", "2", "--timings")
    assert ended.returncode == 0, ended.stderr
    found, expected = json.loads(ended.stdout), NativeStore.open(place / "one")
    assert (found["images"], found["regions"], found["unreadable"]) == (IMAGES, expected.manifest["regions"], 1)
    assert found["images per second"] > 0
    assert_same(tmp_path / "two", place / "one")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (place / "one").iterdir()
    )
    assert "damaged.png\tcannot read image" in (tmp_path / "two" / "unreadable.txt").read_text()
    before = {path: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    again = run(place, "--out", tmp_path / "two", "--processes", "2", "--resume")
    assert (json.loads(again.stdout)["images"], json.loads(again.stdout)["found already"]) == (0, IMAGES)
    assert {path: path.read_bytes() for path in (tmp_path / "two").iterdir()} == before


@pytest.mark.slow
def test_torchrun(place: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words = command(place, "--out", tmp_path / "two")[2:]
    ended = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["images"] == IMAGES, "said once"
    assert_same(tmp_path / "two", place / "one")


def test_a_kill_costs_one_batch(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "regions"
    running = begin(place, out, delay=0.2)
    wait_for(lambda: len(committed_ids(out)) >= 4, running)
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = len(committed_ids(out))
    assert 4 <= kept < IMAGES
    assert (out / JOURNAL).exists()
    assert not (out / MANIFEST).exists(), "half a store is not taken for a whole one"
    refused = run(place, "--out", out)
    assert refused.returncode == 2
    assert "add to it with --resume" in refused.stderr
    resumed = run(place, "--out", out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["found already"] == kept
    assert json.loads(resumed.stdout)["images"] == IMAGES - kept
    assert_same(out, place / "one")


@pytest.mark.slow
def test_killed_processes_are_resumed_by_another_number(place: Path, tmp_path: Path) -> None:
    """Also: a process does not outlive the command that started it."""
    out = tmp_path / "regions"
    parts = [out / "parts" / f"part-0000{number}" for number in range(3)]
    running = begin(place, out, "--processes", "3", delay=0.3)
    wait_for(lambda: all(committed_ids(part) for part in parts), running)
    running.send_signal(signal.SIGKILL)
    running.wait()
    time.sleep(2)
    kept = sum(len(committed_ids(part)) for part in parts)
    time.sleep(1)
    assert sum(len(committed_ids(part)) for part in parts) == kept, "the others ended, too"
    assert 3 <= kept < IMAGES
    refused = run(place, "--out", out)
    assert "it holds parts" in refused.stderr
    assert "add to it with --resume" in refused.stderr
    with pytest.raises(ValueError, match=r"is unfinished.*--resume"):
        NativeStore.open(out)
    other = run(place, "--out", out, "--resume", "--dtype", "float16")
    assert other.returncode == 2
    assert "its dtype is 'float32'" in other.stderr
    resumed = run(place, "--out", out, "--resume", "--processes", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["found already"] == kept
    assert_same(out, place / "one")
    assert not (out / "parts").exists()


@pytest.mark.slow
def test_parts_are_joined_by_one_process_too(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "regions"
    running = begin(place, out, "--processes", "2", delay=0.3)
    parts = [out / "parts" / f"part-0000{number}" for number in range(2)]
    wait_for(lambda: all(committed_ids(part) for part in parts), running)
    running.kill()
    running.wait()
    time.sleep(1.5)
    resumed = run(place, "--out", out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same(out, place / "one")


@pytest.mark.slow
def test_machines_that_know_nothing_of_each_other(place: Path, tmp_path: Path) -> None:
    """Three shares, one of them by two processes: disjoint, complete, and joined by `visling regions merge`."""
    counts = []
    for number, words in enumerate((["--processes", "2"], [], []), 1):
        ended = run(place, "--out", tmp_path / f"{number}", "--part", f"{number}/3", *words)
        assert ended.returncode == 0, ended.stderr
        counts.append(json.loads(ended.stdout)["images"])
    assert sum(counts) == IMAGES
    assert all(counts)
    stores = [str(tmp_path / f"{number}") for number in (1, 2, 3)]
    merge = [sys.executable, "-m", "visling", "regions", "merge", *stores, "--out", str(tmp_path / "merged")]
    ended = subprocess.run(merge, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert_same(tmp_path / "merged", place / "one")


def test_a_detector_of_the_catalogue_is_taken_by_its_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As converted by an earlier command: nothing is fetched."""
    named = shutil.copytree(place / "detector", tmp_path / "home" / "detectors" / "vg-frcnn")
    monkeypatch.setenv("VISLING_HOME", str(tmp_path / "home"))
    ended = run(place, "--out", tmp_path / "out", "--detector", "vg-frcnn")
    assert ended.returncode == 0, ended.stderr
    found, expected = NativeStore.open(tmp_path / "out"), NativeStore.open(place / "one")
    assert (found.ids, found.fingerprint) == (expected.ids, expected.fingerprint)
    assert found.settings["detector"] == str(named)


def test_parts_on_another_disk_are_named(place: Path, tmp_path: Path) -> None:
    """As the first of two machines sees it that torchrun started, but which share no folder."""
    detector = Detector.load(place / "detector")
    target = extraction.Target(path=tmp_path, detector=detector, settings={})
    target.open(tmp_path / "parts" / "part-00000").close()
    report = ExtractionReport(done=1, skipped_existing=0, unreadable=(), regions=2, without_regions=0)
    with pytest.raises(StoreError, match=r"1 of 2 parts are not in .*parts: part-00001\. .*visling regions merge"):
        extraction._finish(target, report, ["part-00000", "part-00001"])
    assert (tmp_path / "parts" / "part-00000" / MANIFEST).exists()


def test_a_part_without_images_is_merged_too(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [tmp_path / f"{number}" for number in (1, 2)]
    for number, part in enumerate(parts, 1):
        words = [*command(place, "--out", part, "--part", f"{number}/2")[3:]]
        words[2] = str(place / "images" / "a" / "image_1.png")
        assert not call(words, monkeypatch, capsys)[0]
    assert sorted(len(NativeStore.open(part)) for part in parts) == [0, 1]
    for order in (parts, parts[::-1]):
        merged = tmp_path / f"merged-{order[0].name}"
        words = ["regions", "merge", *map(str, order), "--out", str(merged)]
        assert not call(words, monkeypatch, capsys)[0]
        assert NativeStore.open(merged).ids == ["image_1"]


def test_every_image_belongs_to_one_process_of_one_machine() -> None:
    names = [f"COCO_train2014_{number:012d}" for number in range(10_000)]
    machines = (3, 1, 4)  # processes of each
    counts = [
        [sum(is_in_share(name, (number, 3), (rank, processes)) for name in names) for rank in range(processes)]
        for number, processes in enumerate(machines, 1)
    ]
    assert sum(map(sum, counts)) == len(names)
    for shares, processes in zip(counts, machines, strict=True):
        assert min(shares) > 0.9 * len(names) / 3 / processes, "of like size"


def call(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str, str]:
    monkeypatch.setattr(sys, "argv", ["visling", *words])
    with pytest.raises(SystemExit) as end:
        app.run()
    printed = capsys.readouterr()
    return end.value.code, printed.out, printed.err


def test_nothing_readable_is_an_error(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged, out = place / "images" / "damaged.png", tmp_path / "regions"
    words = [*command(place, "--out", out)[3:]]
    words[2] = str(damaged)
    status, _, said = call(words, monkeypatch, capsys)
    assert status == 2
    assert "none of 1 images can be read" in said
    assert str(damaged) in said
    assert list(out.iterdir()) == []
    ended = subprocess.run(
        [sys.executable, "-m", "visling", *words, "--processes", "2"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.count("none of 1 images can be read") == 1
    assert not (out / MANIFEST).exists()


def test_the_list_of_unreadable_images_is_of_the_last_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "images", tmp_path / "regions"
    folder.mkdir()
    for name in ("x.png", "y.png"):
        (folder / name).write_bytes((place / "images" / "a" / "image_0.png").read_bytes())
    (folder / "y.png").write_bytes(b"")
    words = [*command(place, "--out", out)[3:]]
    words[2] = str(folder)
    status, said, warned = call(words, monkeypatch, capsys)
    assert not status
    assert json.loads(said)["unreadable"] == 1
    assert "left out: cannot read image" in warned
    assert (out / "unreadable.txt").read_text().startswith(f"{folder / 'y.png'}\tcannot read image")
    (folder / "y.png").write_bytes((folder / "x.png").read_bytes())
    status, said, _ = call([*words, "--resume"], monkeypatch, capsys)
    assert (json.loads(said)["images"], json.loads(said)["unreadable"]) == (1, 0)
    assert not (out / "unreadable.txt").exists()


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_parts_that_do_not_exist(
    place: Path, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, said = call(command(place, "--out", tmp_path / "new", "--part", part)[3:], monkeypatch, capsys)
    assert status == 2
    assert "must be K/N with K from 1 to N" in said
    assert not (tmp_path / "new").exists()


def test_sources_on_the_command_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink(place / "images", "images")
    Path("list.txt").write_text("a/image_1.png\nb/c/image_11.png\n")
    words = ["regions", "extract", "images/*/image_2.png", "--list", "list.txt", "--base", "images", "--ids", "path"]
    words += ["--detector", str(place / "detector"), "--out", "regions", "--timings"]
    status, said, _ = call(words, monkeypatch, capsys)
    assert not status
    assert "images per second" in said
    store = NativeStore.open("regions")
    assert store.ids == ["a/image_1", "a/image_2", "b/c/image_11"]
    assert len(store["image_2"]) == store.count("a/image_2") > 0
    status, _, said = call([*words[:-5], *words[-5:], "--resume", "--ids", "name"], monkeypatch, capsys)
    assert status == 2
    assert "made with ids 'path'" in said
