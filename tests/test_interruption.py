"""Commands that are asked to end, or one of whose processes is killed: what they say, what they leave, and how they
continue."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")

PLENTY = "train.max_steps=100000"
"""Of a run that is to be stopped."""


class Command:
    """A command in a session of its own, whose output is kept in files."""

    def __init__(self, folder: Path, *words: object, launcher: tuple[str, ...] = ()) -> None:
        folder.mkdir(exist_ok=True)
        self._files = folder / "stdout", folder / "stderr"
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "visling", *map(str, words)],
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        return self._files[0].read_text()

    @property
    def err(self) -> str:
        return self._files[1].read_text()

    def wait_until(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not holds():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.out}{self.err}"
            assert time.monotonic() < end, f"nothing happened: {self.out}{self.err}"
            time.sleep(0.01)

    def wait(self, within: float = 60.0) -> int:
        return self.process.wait(timeout=within)

    def end(self) -> None:
        """Whatever it has started, and is still there."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts commands and ends them with the test."""
    commands: list[Command] = []

    def begin(*words: object, launcher: tuple[str, ...] = ()) -> Command:
        commands.append(Command(tmp_path / f"command-{len(commands)}", *words, launcher=launcher))
        return commands[-1]

    yield begin
    for command in commands:
        command.end()


def pretraining(world: Any, out: Path, *changes: str, batch_size: int = 8) -> list[object]:
    """`visling pretrain` on the tiny world, with a line for every update."""
    kept = [setting for setting in world.settings if not setting.startswith(("train.max_steps", "batch_size"))]
    settings = [*kept, f"batch_size={batch_size}", "train.log_every=1", *changes]
    return [
        "pretrain", "--recipe", "visualbert-scenes", "--data", world.scenes, "--store", world.regions, "--out", out,
        "--device", "cpu", "--threads", 1, *(word for setting in settings for word in ("--set", setting)),
    ]  # fmt: skip


def reached(out: Path) -> int:
    """The last step in a run's log."""
    log = out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n") and '"train"' in line), default=0)


def status(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text())["status"])


def events(run: Path) -> list[str]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["message"] for line in lines if line["kind"] == "event"]


def members(command: Command) -> dict[int, int]:
    """Process number by rank of everything that a command started, itself included."""
    found, below = {}, {command.process.pid}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent in below or int(folder.name) in below:
            below.add(int(folder.name))
            found.update({int(word[5:]): int(folder.name) for word in words if word.startswith(b"RANK=")})
    return found


def is_there(process: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = load_file(one / "model" / "model.safetensors"), load_file(other / "model" / "model.safetensors")
    assert left.keys() == right.keys()
    for name, weights in left.items():
        assert torch.equal(weights, right[name]), name


# Asked to end


def test_sigterm_saves_and_ends_with_success(world: Any, tmp_path: Path, start: Callable[..., Command]) -> None:
    """Of the first of two processes, which tells the other one; then the run is resumed."""
    out = tmp_path / "run"
    words = [*pretraining(world, out, PLENTY, batch_size=4), "--processes", 2]
    command = start(*words)
    command.wait_until(lambda: reached(out) >= 2)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 0, command.err
    assert "Stopped by SIGTERM" in command.out
    assert "with --resume continues" in command.out
    assert "Traceback" not in command.err
    assert status(out) == "running"
    stopped = [event for event in events(out) if event.startswith("stopped by SIGTERM at step")]
    assert len(stopped) == 1
    resumed = start(*words, "--resume")
    resumed.wait_until(lambda: any(event.startswith("resumed at step") for event in events(out)))


@pytest.mark.slow
def test_sigterm_to_another_process_alone_ends_all(world: Any, tmp_path: Path, start: Callable[..., Command]) -> None:
    out = tmp_path / "run"
    command = start(*pretraining(world, out, PLENTY, batch_size=4), "--processes", 2)
    command.wait_until(lambda: reached(out) >= 2)
    os.kill(members(command)[1], signal.SIGTERM)
    assert command.wait() == 0, command.err
    assert "Stopped by SIGTERM" in command.out


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_saves_and_ends_with_130(
    world: Any, tmp_path: Path, start: Callable[..., Command], processes: int
) -> None:
    """As in a terminal, every process gets it."""
    out = tmp_path / "run"
    command = start(*pretraining(world, out, PLENTY, batch_size=4), "--processes", processes)
    command.wait_until(lambda: reached(out) >= 2)
    os.killpg(command.process.pid, signal.SIGINT)
    assert command.wait() == 130, command.err
    assert "Traceback" not in command.err
    assert command.err.count("Ctrl-C again ends at once") == 1
    assert "training and extraction resume with --resume" in command.err
    saved = json.loads(next(out.glob("last/**/state.json")).read_text())["state"]["step"]
    assert any(event == f"stopped by Ctrl-C at step {saved} of 100000; resume with --resume" for event in events(out))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(world: Any, tmp_path: Path, start: Callable[..., Command]) -> None:
    """In a validation that would take long: the first one waits for its end."""
    out = tmp_path / "run"
    changes = ("train.max_steps=4", "train.validate_every=2", "train.validate_unit=steps")
    words = pretraining(world, out, *changes)
    program = (
        "import sys, time\nfrom visling.train import engine\nfrom visling import __main__\n"
        "engine.evaluate = lambda *_: time.sleep(60)\n"
        f"sys.argv = ['visling', *{[str(word) for word in words]!r}]\n__main__.main()\n"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while reached(out) < 2:
            assert command.poll() is None
            time.sleep(0.01)
        time.sleep(0.5)
        command.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert command.poll() is None
        command.send_signal(signal.SIGINT)
        said = command.communicate(timeout=10)[1]
    finally:
        command.kill()
    assert command.returncode == -signal.SIGINT
    assert "Traceback" not in said


@pytest.mark.slow
def test_sigterm_before_training_ends_as_usual(tmp_path: Path, world: Any, start: Callable[..., Command]) -> None:
    command = start(*pretraining(world, tmp_path / "run", PLENTY))
    time.sleep(0.3)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == -signal.SIGTERM
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["finetune", "multitask", "detect"])
def test_every_verb_that_trains_hears_sigterm(
    world: Any, tmp_path: Path, start: Callable[..., Command], verb: str
) -> None:
    out = tmp_path / "run"
    some = [setting for setting in world.settings if not setting.startswith(("train.max_steps", "batch_size"))]
    common = ["--out", out, "--device", "cpu", "--threads", 1, "--set", PLENTY, "--set", "train.log_every=1"]
    tiny = [word for setting in some for word in ("--set", setting)]
    train = world.scenes / "images" / "train"
    words = {
        "finetune": [
            "finetune", "--recipe", "visualbert-vqa-scenes", "--data", world.scenes, "--store", world.regions, *tiny,
            *common,
        ],
        "detect": [
            "detect", "train", train, "--annotations", world.scenes / "annotations" / "instances_train.json",
            "--preset", "scenes", *common,
        ],
        "multitask": [
            "multitask", "--recipe", "vilbert-multitask-scenes", "--data", world.scenes, "--store", world.regions,
            *common,
        ],
    }[verb]  # fmt: skip
    command = start(*words)
    command.wait_until(lambda: reached(out) >= 2)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 0, command.err
    assert "Stopped by SIGTERM" in command.out
    assert status(out) == "running"
    resumed = start(*words, "--resume")
    resumed.wait_until(lambda: any(event.startswith("resumed at step") for event in events(out)))


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_comparison_ends_its_runs(world: Any, tmp_path: Path, start: Callable[..., Command], jobs: int) -> None:
    out = tmp_path / "comparison"
    some = [setting for setting in world.settings if setting.startswith(("encoder", "batch_size"))]
    tiny = [word for setting in some for name in ("--set", "--pretrain-set") for word in (name, setting)]
    words = [
        "compare", "--models", "visualbert,vlbert", "--recipe", "scenes", "--tasks", "vqa-scenes", "--data",
        world.scenes, "--store", world.regions, "--out", out, "--seeds", 1, "--jobs", jobs, *tiny, "--pretrain-set",
        PLENTY, "--pretrain-set", "train.log_every=1", "--set", "train.max_steps=2",
    ]  # fmt: skip
    runs = [out / model / "seed-0" / "pretrain" for model in ("visualbert", "vlbert")][:jobs]
    command = start(*words)
    command.wait_until(lambda: all(reached(run) >= 2 for run in runs))
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 0, command.err
    assert "Stopped by SIGTERM" in command.out
    assert "Traceback" not in command.err
    assert json.loads((out / "comparison.json").read_text())["status"] == "running"
    assert all(any(event.startswith("stopped by SIGTERM") for event in events(run)) for run in runs)
    resumed = start(*words, "--resume")
    resumed.wait_until(lambda: any(event.startswith("resumed at step") for event in events(runs[0])))


@pytest.mark.slow
def test_the_demo_ends_what_it_has_started(tmp_path: Path, start: Callable[..., Command]) -> None:
    out = tmp_path / "demo"
    command = start("demo", "--size", "small", "--out", out)
    command.wait_until(lambda: reached(out / "detector") > 0)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 0, command.err
    assert "The demo was stopped. Run the same command to continue from here." in command.out
    assert any(event.startswith("stopped by SIGTERM") for event in events(out / "detector"))
    resumed = start("demo", "--size", "small", "--out", out)
    resumed.wait_until(lambda: any(event.startswith("resumed at step") for event in events(out / "detector")))


# Killed


@pytest.mark.slow
def test_one_of_four_killed_ends_all_with_one_message(
    world: Any, tmp_path: Path, start: Callable[..., Command]
) -> None:
    out = tmp_path / "run"
    command = start(*pretraining(world, out, PLENTY, batch_size=2), "--processes", 4)
    command.wait_until(lambda: reached(out) >= 2)
    everyone = members(command)
    os.kill(everyone[2], signal.SIGKILL)
    assert command.wait(within=15) not in (0, None)
    assert command.err.count("visling:") == 1
    assert "process 2 of this run (0 to 3) was ended by SIGKILL" in command.err
    assert "with --resume" in command.err
    assert "Traceback" not in command.err
    assert not any(is_there(process) for process in everyone.values())


@pytest.mark.slow
def test_the_others_end_when_the_first_is_killed(world: Any, tmp_path: Path, start: Callable[..., Command]) -> None:
    out = tmp_path / "run"
    command = start(*pretraining(world, out, PLENTY, batch_size=4), "--processes", 2)
    command.wait_until(lambda: reached(out) >= 2)
    other = members(command)[1]
    command.process.kill()
    end = time.monotonic() + 10
    while is_there(other):
        assert time.monotonic() < end
        time.sleep(0.1)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "--max-restarts", "3")


@pytest.mark.slow
@pytest.mark.parametrize("saved", [False, True])
def test_torchrun_restarts_a_run_that_lost_a_process(
    world: Any, tmp_path: Path, start: Callable[..., Command], saved: bool
) -> None:
    """Before anything was saved, and later; it ends with the weights of the run that lost none, bit for bit."""
    changes = ("train.max_steps=120", "train.save_every=" + ("10" if saved else "1000"))
    for name in ("whole", "killed"):
        out = tmp_path / name
        command = start(*pretraining(world, out, *changes, batch_size=2), launcher=TORCHRUN)
        if name == "killed":
            command.wait_until(lambda: reached(tmp_path / "killed") >= (15 if saved else 3))
            os.kill(members(command)[2], signal.SIGKILL)
        assert command.wait(within=120) == 0, command.err
        assert status(out) == "finished"
        assert reached(out) == 120
    assert any(event.startswith("resumed at step") for event in events(tmp_path / "killed")) is saved
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert "has lost another one" in command.err
    assert "Traceback" not in command.err.replace("Traceback : Signal 9", "")


@pytest.mark.slow
def test_a_restart_does_not_continue_what_lay_there_before(
    world: Any, tmp_path: Path, start: Callable[..., Command]
) -> None:
    run = shutil.copytree(world.pretrained, tmp_path / "run")
    before = (run / "run.json").read_text()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--max-restarts", "1")
    command = start(*pretraining(world, run, PLENTY), launcher=launcher)
    assert command.wait() != 0
    assert command.err.count("is not empty") == 2
    assert (run / "run.json").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torchrun", "sigterm"])
def test_an_extraction_that_lost_a_process_continues(
    world: Any, tmp_path: Path, start: Callable[..., Command], how: str
) -> None:
    """By itself under torchrun, else with --resume; with the store of one that lost none."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(20):
        for picture in (world.scenes / "images" / "train").glob("*.png"):
            shutil.copyfile(picture, images / f"{picture.stem}-{number}.png")
    words = ["regions", "extract", images, "--detector", world.detector, "--device", "cpu", "--threads", 1,
             "--batch-size", 2, "--out"]  # fmt: skip
    out = tmp_path / "store"

    def begun() -> bool:
        return any(file.stat().st_size for file in out.glob("parts/*/*.jsonl")) or any(out.glob("parts/*/*.bin"))

    if how == "torchrun":
        command = start(*words, out, launcher=TORCHRUN)
        command.wait_until(begun)
        os.kill(members(command)[2], signal.SIGKILL)
        assert command.wait(within=120) == 0, command.err
    else:
        command = start(*words, out, "--processes", 2)
        command.wait_until(begun)
        command.process.send_signal(signal.SIGTERM)
        assert command.wait() == -signal.SIGTERM
        command = start(*words, out, "--processes", 2, "--resume")
        assert command.wait() == 0, command.err
    whole = start(*words, tmp_path / "whole")
    assert whole.wait() == 0, whole.err
    from visling.regions.store import NativeStore

    one, other = NativeStore.open(out), NativeStore.open(tmp_path / "whole")
    assert sorted(one.ids) == sorted(other.ids)
    assert all((one[name].features == other[name].features).all() for name in one.ids)
