"""Recorded steps equal ordinary ones bit for bit; when steps are recorded. A stand-in for a GPU records."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from visling.errors import ConfigError, RunError
from visling.train import graphs, parallel
from visling.train.config import TrainConfig
from visling.train.engine import fit
from visling.train.graphs import CudaRecorder, RecordedSteps
from visling.train.log import TIMED, Log, read
from visling.train.optim import OptimConfig
from visling.train.parallel import choose_compilation
from visling.train.state import RunFolder


class Again:
    """Recording does nothing; a replay does the work again, on the tensors that were recorded."""

    def __init__(self) -> None:
        self.recorded, self.replayed, self.reason = 0, 0, ""

    def watch(self, work: Callable[[], Any]) -> tuple[Any, str]:
        return work(), self.reason

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.recorded += 1
        result = torch.empty(0, dtype=torch.float64)

        def replay() -> None:
            self.replayed += 1
            done = work()
            result.resize_(done.shape).copy_(done)

        return result, replay


class Broken(Again):
    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        raise RuntimeError("operation not permitted when stream is capturing")


def choose(config: TrainConfig, device: torch.device, *, recordable: bool) -> str:
    return "graphs" if recordable and config.compile != "no" else "no"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Again:
    """What runs record their steps with, unless their settings say no."""
    made = Again()
    monkeypatch.setattr(parallel, "CudaRecorder", lambda device: made)
    monkeypatch.setattr(parallel, "choose_compilation", choose)
    return made


def train(
    toy: ModuleType, path: Path, *, dropout: float = 0.0, masked: bool = False, **changes: Any
) -> tuple[nn.Module, Any]:
    """A toy run of three epochs, whose pooler receives no gradient."""
    model, step = toy.make(dropout)
    folder = RunFolder.create(path)
    with Log(folder.log) as log:
        fit(
            model, toy.masked(model) if masked else step, toy.Pairs(), config=toy.config(**changes), log=log,
            run_folder=folder, variant=lambda: None, count=toy.count_masked,
        )  # fmt: skip
    return model, read(folder.log)


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulation": 1},
        {"accumulation": 2},
        {"accumulation": 2, "normalise": "counts", "masked": True},
        {"accumulation": 1, "precision": "bf16"},
        {"accumulation": 1, "optim": OptimConfig(name="adamw", lr=0.02, clip="global")},
        {"accumulation": 2, "average": 0.8},
    ],
    ids=["each", "accumulated", "counts", "bf16", "adamw", "averaged"],
)
def test_recorded_steps_equal_ordinary_ones(
    toy: ModuleType, recorder: Again, tmp_path: Path, settings: dict[str, Any]
) -> None:
    ordinary, expected = train(toy, tmp_path / "ordinary", compile="no", **settings)
    assert recorder.recorded == 0
    recorded, found = train(toy, tmp_path / "recorded", **settings)
    batches = {1: 33, 2: 30}[settings["accumulation"]]  # 11 an epoch; one does not fill an update
    assert (recorder.recorded, recorder.replayed) == (1, batches - 2)
    for (name, one), other in zip(ordinary.named_parameters(), recorded.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert recorded.pooler.weight.grad is None  # type: ignore[union-attr]
    for one, other in zip(expected, found, strict=True):
        assert {key: value for key, value in one.items() if key not in TIMED} == {
            key: value for key, value in other.items() if key not in TIMED
        }


def make_steps(recorder: Again, variant: Callable[[], Any] = lambda: None) -> tuple[RecordedSteps, nn.Module]:
    """Steps of two layers, of which batches of an odd number of rows train the first alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))

    def run(item: tuple[Tensor, str]) -> Any:
        rows, name = item
        hidden = model[0](rows)
        loss = (hidden.square() if len(rows) % 2 else model[1](hidden)).mean()
        torch.autograd.backward(loss)
        return loss.detach(), {name: (loss.detach(), torch.tensor(len(rows)))}

    return RecordedSteps(run, model.parameters(), variant, recorder), model


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


def test_shapes_take_turns_and_each_trains_its_own_parameters() -> None:
    recorder = Again()
    steps, model = make_steps(recorder)
    generator = torch.Generator().manual_seed(1)
    for turn in range(12):
        for rows in (4, 5):
            batch = torch.randn(rows, 3, generator=generator)
            expected, twin = make_steps(Again())
            value, parts = expected((batch, "a"))
            model.zero_grad(set_to_none=True)
            found, named = steps((batch, "a"))
            assert float(found) == pytest.approx(float(value))
            assert list(named) == ["a"]
            assert [float(number) for number in named["a"]] == pytest.approx([float(parts["a"][0]), rows])
            for one, other in zip(gradients(model), gradients(twin), strict=True):
                assert (one is None) == (other is None), f"turn {turn}, {rows} rows"
                if one is not None:
                    assert torch.equal(one, other)  # type: ignore[arg-type]
    assert (recorder.recorded, recorder.replayed) == (2, 20)


def test_gradients_add_up_over_shapes_recorded_or_not() -> None:
    steps, model = make_steps(Again())
    ordinary, twin = make_steps(Again())
    ordinary._refused = True
    batches = [
        torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows)) for rows in (4, 4, 5, 4, 4, 5, 5, 6, 4)
    ]
    for batch in batches:
        steps((batch, "a"))
        ordinary((batch, "a"))
        for one, other in zip(gradients(model), gradients(twin), strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(one, other)


def test_what_a_step_returned_outlives_the_next() -> None:
    steps, _ = make_steps(Again())
    batch = torch.randn(4, 3)
    for _ in range(3):
        first, parts = steps((batch, "a"))
    kept = float(first)
    steps((2 * batch, "a"))
    assert float(first) == kept == float(parts["a"][0])


def test_every_variant_and_every_name_has_recordings_of_its_own() -> None:
    recorder, weights = Again(), [0]
    steps, _ = make_steps(recorder, lambda: weights[0])
    for weights[0] in (0, 1):
        for name in ("a", "b"):
            for _ in range(4):
                assert list(steps((torch.ones(4, 3), name))[1]) == [name]
    assert (recorder.recorded, recorder.replayed) == (4, 8)


def test_too_many_shapes_are_ordinary_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_SHAPES", 2)
    recorder = Again()
    steps, _ = make_steps(recorder)
    for _ in range(4):
        for rows in (2, 4, 6):
            steps((torch.ones(rows, 3), "a"))
    assert (recorder.recorded, recorder.replayed) == (2, 4)
    assert steps.take_note() == "batches come in more than 2 shapes: steps of further ones are not recorded"
    assert steps.take_note() == ""


@pytest.mark.parametrize(
    ("draw", "reason"),
    [
        (lambda: torch.rand(1), "it draws random numbers on the host"),
        (random.random, "it draws random numbers on the host"),
        (np.random.random, "it draws random numbers on the host"),
        (lambda: None, "it waits for the device"),
    ],
)
def test_steps_that_a_replay_would_change_are_not_recorded(draw: Callable[[], Any], reason: str) -> None:
    recorder = Again()
    recorder.reason = "" if "host" in reason else reason
    parameter = nn.Parameter(torch.zeros(3))

    def run(item: Tensor) -> Any:
        draw()
        torch.autograd.backward((parameter * item).sum())
        return torch.zeros(()), {}

    steps = RecordedSteps(run, [parameter], lambda: None, recorder)
    for _ in range(4):
        steps(torch.ones(3))
    assert recorder.recorded == 0
    assert steps.take_note() == f"steps are not recorded as CUDA graphs: {reason}"
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [4, 4, 4]


def test_a_run_says_what_it_does_not_record(toy: ModuleType, recorder: Again, tmp_path: Path) -> None:
    """Dropout of a CPU draws from the host's generator."""
    _, lines = train(toy, tmp_path / "run", dropout=0.2)
    assert recorder.recorded == 0
    notes = [line["message"] for line in lines if line["kind"] == "event"]
    assert notes == ["steps are not recorded as CUDA graphs: it draws random numbers on the host"]


def test_a_step_that_cannot_be_recorded_says_how_to_go_on() -> None:
    steps, model = make_steps(Broken())
    for _ in range(2):
        steps((torch.ones(4, 3), "a"))
    before = gradients(model)
    with pytest.raises(RunError, match=r"stream is capturing.*--set train\.compile=no"):
        steps((torch.ones(4, 3), "a"))
    assert all(torch.equal(one, other) for one, other in zip(before, gradients(model), strict=True))  # type: ignore[arg-type]


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "processes", "recordable", "expected"),
    [(CPU, 1, True, "no"), (GPU, 1, True, "graphs"), (GPU, 2, True, "no"), (GPU, 1, False, "no")],
)
def test_what_auto_means(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, processes: int, recordable: bool, expected: str
) -> None:
    monkeypatch.setattr("visling.runtime.world_size", lambda: processes)
    assert choose_compilation(TrainConfig(), device, recordable=recordable) == expected
    for setting in ("no", "kernels"):
        assert choose_compilation(TrainConfig(compile=setting), device, recordable=recordable) == setting
    if expected == "no":
        with pytest.raises(ConfigError, match=r'train\.compile = "graphs": .*Use train\.compile = "auto"'):
            choose_compilation(TrainConfig(compile="graphs"), device, recordable=recordable)


class Driver:
    """Stands for what PyTorch offers of a GPU: remembers in which order it was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        self.mode = "default"
        cuda, driver = torch.cuda, self

        class Stream:
            def __init__(self, device: torch.device | None = None) -> None: ...

            def wait_stream(self, other: Any) -> None:
                driver.calls.append("wait")

        class Graph:
            def replay(self) -> None:
                driver.calls.append("replay")

            def pool(self) -> str:
                return "pool"

        current = Stream()

        @contextlib.contextmanager
        def graph(made: Graph, **options: Any) -> Iterator[None]:
            del options["stream"]
            driver.calls.append(options)
            yield

        def set_mode(mode: str) -> None:
            self.mode = mode

        for name, value in (
            ("Stream", Stream), ("CUDAGraph", Graph), ("graph", graph), ("current_stream", lambda device: current),
            ("stream", lambda stream: contextlib.nullcontext()), ("empty_cache", lambda: self.calls.append("empty")),
            ("get_sync_debug_mode", lambda: self.mode), ("set_sync_debug_mode", set_mode),
        ):  # fmt: skip
            monkeypatch.setattr(cuda, name, value)


def test_work_is_watched_on_the_stream_of_the_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    recorder = CudaRecorder(GPU)

    def waiting() -> str:
        assert driver.mode == "warn"
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", UserWarning, stacklevel=1)
        return "result"

    assert recorder.watch(waiting) == ("result", "it waits for the device")
    assert recorder.watch(lambda: 7) == (7, "")
    assert driver.calls == ["wait"] * 4, "each stream waits for the other"
    with pytest.raises(ZeroDivisionError):
        recorder.watch(lambda: 1 / 0)
    assert driver.mode == "default"


def test_recordings_share_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    recorder = CudaRecorder(GPU)
    result = torch.zeros(3)
    for pool in (None, "pool"):
        found, replay = recorder.record(lambda: result)
        assert found is result
        replay()
        assert driver.calls == ["empty", {"pool": pool, "capture_error_mode": "thread_local"}, "replay"]
        driver.calls.clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: there is no GPU")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gpu_replays_what_it_would_have_computed(toy: ModuleType, tmp_path: Path, accumulation: int) -> None:
    """With dropout, whose random numbers go on from one replay to the next."""
    losses = {}
    for kind in ("no", "graphs"):
        model, step = toy.make(0.2)
        model.to("cuda")
        folder = RunFolder.create(tmp_path / kind)
        with Log(folder.log) as log:
            fit(
                model, step, toy.Pairs(), config=toy.config(compile=kind, accumulation=accumulation, log_every=1),
                log=log, run_folder=folder, variant=lambda: None,
            )  # fmt: skip
        lines = read(folder.log)
        assert not [line for line in lines if line["kind"] == "event" and "not recorded" in line["message"]]
        losses[kind] = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses["graphs"] == pytest.approx(losses["no"], rel=1e-4)
