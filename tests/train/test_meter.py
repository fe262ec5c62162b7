"""How a run used its machine: share of waiting, memory, utilisation; as a program, one of several processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from visling import runtime
from visling.train import memory
from visling.train import meter as metering
from visling.train.config import TrainConfig
from visling.train.engine import fit
from visling.train.log import TIMED, Log, format_rate, read
from visling.train.memory import take_peak_memory
from visling.train.meter import Meter
from visling.train.optim import OptimConfig
from visling.train.state import RunFolder, State, Sums
from visling.types import Loss

CPU = torch.device("cpu")
ROWS, WIDTH, STEPS, RATE = 8, 32, 6, 1e9
NEEDED = 3 * 2 * ROWS * WIDTH**2
"""Operations of the one product of a step, and of its two gradients."""


class Slow:
    """A loader that takes its time over each batch."""

    epoch = 0

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(STEPS):
            time.sleep(self.seconds)
            yield torch.ones(ROWS, WIDTH), torch.ones(ROWS)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def train(path: Path, wait: float, work: float, **given: Any) -> list[dict[str, Any]]:
    """Training lines of a run whose loader and whose step take so many seconds."""
    model = nn.Linear(WIDTH, WIDTH, bias=False)

    def step(x: Tensor, y: Tensor) -> Loss:
        time.sleep(work)
        return Loss.mean("square", model(x.requires_grad_()).square().mean(1))

    config = TrainConfig(epochs=1, log_every=3, optim=OptimConfig(lr=1e-3))
    with Log(path / "log.jsonl") as log:
        fit(model, step, Slow(wait), config=config, log=log, **given)
    return [entry for entry in read(path / "log.jsonl") if entry["kind"] == "train"]


@pytest.fixture
def _known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "measure_rate", lambda device, precision: RATE)


def test_a_loader_that_sleeps_makes_the_run_wait(tmp_path: Path) -> None:
    for line in train(tmp_path, wait=0.06, work=0.02):
        assert line["data_wait"] == pytest.approx(0.75, abs=0.15)  # a busy machine sleeps longer


def test_a_loader_that_is_ready_does_not(tmp_path: Path) -> None:
    for line in train(tmp_path, wait=0.0, work=0.05):
        assert line["data_wait"] < 0.3


@pytest.mark.usefixtures("_known_rate")
def test_utilisation_is_what_was_needed_over_what_could_be_computed(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    lines = train(tmp_path, wait=0.0, work=0.01, products=lambda item: NEEDED * len(item[0]) / ROWS, run_folder=folder)
    for line in lines:
        seconds = 3 * ROWS / line["examples_per_second"]
        assert line["utilisation"] == pytest.approx(3 * NEEDED / seconds / RATE, rel=1e-9)
    assert folder.read()["product_rate"] == RATE
    events = [entry["message"] for entry in read(tmp_path / "log.jsonl") if entry["kind"] == "event"]
    assert events == ["matrix products measured at 0.001 TFLOP/s"]


def test_what_is_needed_is_null_where_it_is_not_known(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    assert [line["utilisation"] for line in train(tmp_path, wait=0.0, work=0.0, run_folder=folder)] == [None, None]
    assert "product_rate" not in folder.read()


@pytest.mark.usefixtures("_known_rate")
def test_the_group_counts_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples and products of all processes, waiting and memory of the one with most."""
    other = Sums(loss=1.0, steps=1, examples=10, seconds=2.0, waited=1.5, flops=6e8), 7 * 10**12
    monkeypatch.setattr(metering, "gather", lambda value: [value, other])
    own, state = Sums(loss=3.0, steps=1, examples=30, seconds=2.0, waited=0.5, flops=2e8), State(step=1)
    meter = Meter(own, CPU, "fp32", products=lambda item: 0.0)
    with Log(tmp_path / "log.jsonl") as log:
        meter.report(log, state, epoch=1, lr=0.1, seconds=2.0)
    (line,) = read(tmp_path / "log.jsonl")
    assert {name: line[name] for name in TIMED} == {
        "examples_per_second": 20.0, "data_wait": 0.75, "memory": 7 * 10**12, "utilisation": 0.4, "seconds": 2.0,
    }  # fmt: skip
    assert line["loss"] == 2.0


@pytest.mark.usefixtures("_known_rate")
def test_a_line_across_an_interruption_counts_what_came_before(toy: ModuleType, tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    def run(*, at: int = 0, resume: bool = False) -> None:
        model, step = toy.make()
        folder = RunFolder.create(tmp_path / "run", resume=resume)
        with Log(folder.log) as log:
            fit(
                model, toy.interrupted(step, at, stop), toy.Pairs(batch_size=4), config=toy.config(log_every=1000),
                log=log, run_folder=folder, products=lambda item: 1000.0,
            )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run(at=14)  # in update 7; the state of update 6 is saved
    run(resume=True)
    (line,) = (entry for entry in read(tmp_path / "run" / "log.jsonl") if entry["kind"] == "train")
    assert line["step"] == 15
    assert line["utilisation"] / line["examples_per_second"] == pytest.approx(1000.0 / 4 / RATE)


def test_processes_are_reported_as_one(tmp_path: Path) -> None:
    """Two processes, of which the second waits for its loader: the group waits."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    members = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)], env=os.environ | group | {"RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in ("0", "1")
    ]
    try:
        assert [member.wait(timeout=120) for member in members] == [0, 0]
    finally:
        for member in members:
            member.kill()
    rate = RunFolder(tmp_path).read()["product_rate"]
    for line in (entry for entry in read(tmp_path / "log.jsonl") if entry["kind"] == "train"):
        assert line["data_wait"] > 0.3
        seconds = 3 * 2 * ROWS / line["examples_per_second"]  # three steps of both
        assert line["utilisation"] == pytest.approx(3 * 2 * NEEDED / seconds / rate, rel=1e-9)
    events = [entry["message"] for entry in read(tmp_path / "log.jsonl") if entry["kind"] == "event"]
    assert events == [f"matrix products measured at {format_rate(rate)} in all 2 processes together"]


def test_memory_grows_with_what_is_allocated() -> None:
    before = take_peak_memory(CPU)
    assert before is not None
    assert 10**7 < before < 10**11
    size = before + 2**26  # beyond the peak so far, of which most may have been freed
    block = torch.ones(size, dtype=torch.uint8)
    after = take_peak_memory(CPU)
    assert after is not None
    assert after > before + 2**25
    del block
    assert take_peak_memory(CPU) == after, "a peak does not fall"


def test_memory_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = take_peak_memory(CPU)
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "missing")
    elsewhere = take_peak_memory(CPU)
    assert there is not None
    assert elsewhere is not None
    assert elsewhere >= 0.9 * there
    monkeypatch.setattr(sys, "platform", "win32")
    assert take_peak_memory(CPU) is None


if __name__ == "__main__":
    with runtime.process_group():
        out = Path(sys.argv[1])
        folder = RunFolder.create(out)
        train(out, wait=0.1 * runtime.rank(), work=0.02, products=lambda item: NEEDED, run_folder=folder)
