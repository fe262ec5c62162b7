"""A run that was stopped and resumed equals one that was not, bit for bit; and several processes equal one."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fixtures.groups import run_group
from safetensors.torch import load_file
from torch.testing import assert_close

from visling.train.schedule import Plateau
from visling.train.state import RunFolder

PROGRAM = Path(__file__).with_name("toy.py")
STEPS = 15


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def whole(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The run that nothing interrupts."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    model, state = toy.run(path)
    assert state.step == STEPS
    assert state.stopped == "finished"
    return path, model


@pytest.mark.parametrize("at", [1, 9, 14, 22, 29])
def test_stop_and_resume_equal_the_uninterrupted_run(
    toy: ModuleType, whole: tuple[Path, Any], tmp_path: Path, at: int
) -> None:
    path, model = whole
    with pytest.raises(toy.Stopped):
        toy.run(tmp_path / "run", at=at, how=toy.stop)
    resumed, state = toy.run(tmp_path / "run", resume=True)
    assert state.step == STEPS
    assert equal(model, resumed)
    assert toy.lines(tmp_path / "run") == toy.lines(path)
    best, expected = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", path))
    assert all(torch.equal(best[name], expected[name]) for name in expected)


def test_averaged_weights_and_a_plateau_resume_exactly(toy: ModuleType, tmp_path: Path) -> None:
    """Also in the middle of an epoch, after the rate has fallen."""
    plateau = Plateau(factor=0.5, patience=0, cooldown=1)
    changes = {"average": 0.8, "optim": replace(toy.config().optim, plateau=plateau, drop_epochs=(2.0,))}
    whole, expected = toy.run(tmp_path / "whole", **changes)
    assert expected.plateau.level < 1
    assert expected.averaged_best is not None
    for at in (1, 14, 22, 29):
        path = tmp_path / str(at)
        with pytest.raises(toy.Stopped):
            toy.run(path, at=at, how=toy.stop, **changes)
        resumed, state = toy.run(path, resume=True, **changes)
        assert equal(whole, resumed)
        assert toy.lines(path) == toy.lines(tmp_path / "whole")
        assert (state.plateau, state.averaged_best) == (expected.plateau, expected.averaged_best)
        for name in ("models/averaged/model.safetensors", "last/step-00000015/average.safetensors"):
            found, wanted = (load_file(folder / name) for folder in (path, tmp_path / "whole"))
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], value) for key, value in wanted.items())


@pytest.fixture(scope="module")
def whole_with_models(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, which keeps every model."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    toy.run(path, **toy.EVERYTHING)
    return path


def assert_same_models(one: Path, other: Path) -> None:
    kept = {file.relative_to(one): load_file(file) for file in one.glob("model*/**/model.safetensors")}
    assert len(kept) == 6
    assert {file.relative_to(other) for file in other.glob("model*/**/*")} == {
        file.relative_to(one) for file in one.glob("model*/**/*")
    }
    for name, weights in kept.items():
        found = load_file(other / name)
        assert all(torch.equal(found[key], value) for key, value in weights.items()), name


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("at", [9, 20, 29])
def test_a_killed_process_keeps_the_same_models(
    toy: ModuleType, whole_with_models: Path, tmp_path: Path, at: int
) -> None:
    killed = subprocess.run(
        [sys.executable, PROGRAM, "kill", tmp_path / "run", str(at), "everything"], check=False, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL
    toy.run(tmp_path / "run", resume=True, **toy.EVERYTHING)
    assert_same_models(whole_with_models, tmp_path / "run")
    assert toy.lines(tmp_path / "run") == toy.lines(whole_with_models)


@pytest.mark.parametrize("at", range(1, 13))
@pytest.mark.parametrize("written", [True, False])
def test_a_kill_around_any_model_that_is_kept_changes_nothing(
    toy: ModuleType, whole_with_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, written: bool
) -> None:
    """Three models of epochs, the last weights three times, the best and the best averaged ones up to three times;
    killed before one or after it, with a state that is older."""
    save, calls = RunFolder.save_model, 0

    def killed(self: RunFolder, *given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls != at:
            save(self, *given)
            return
        if written:
            save(self, *given)
        raise toy.Stopped

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_model", killed)
        try:
            toy.run(tmp_path / "run", **toy.EVERYTHING)
        except toy.Stopped:
            toy.run(tmp_path / "run", resume=True, **toy.EVERYTHING)
    assert calls >= 8
    assert_same_models(whole_with_models, tmp_path / "run")
    assert toy.lines(tmp_path / "run") == toy.lines(whole_with_models)


def test_a_run_stopped_by_time_keeps_its_last_weights(toy: ModuleType, tmp_path: Path) -> None:
    model, state = toy.run(tmp_path / "run", max_seconds=0.0, keep=("last",))
    assert state.stopped == "max_seconds"
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert torch.equal(found["out.weight"], model.out.weight)


def test_stopping_twice_and_by_time_changes_nothing(toy: ModuleType, whole: tuple[Path, Any], tmp_path: Path) -> None:
    path, model = whole
    with pytest.raises(toy.Stopped):
        toy.run(tmp_path / "run", at=16, how=toy.stop)
    _, state = toy.run(tmp_path / "run", resume=True, max_seconds=0.0)
    assert state.stopped == "max_seconds"
    assert state.step < STEPS
    assert RunFolder(tmp_path / "run").read()["status"] == "running"
    resumed, state = toy.run(tmp_path / "run", resume=True)
    assert equal(model, resumed)
    assert toy.lines(tmp_path / "run") == toy.lines(path)
    assert state.stopped == "finished"


def test_a_resumed_run_that_forgets_its_generators_differs(
    toy: ModuleType, whole: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(toy.Stopped):
        toy.run(tmp_path / "run", at=16, how=toy.stop)
    monkeypatch.setattr("visling.train.state.restore_generators", lambda generators: None)
    resumed, _ = toy.run(tmp_path / "run", resume=True)
    assert not equal(whole[1], resumed)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_process_resumes_exactly(toy: ModuleType, whole: tuple[Path, Any], tmp_path: Path) -> None:
    path, model = whole
    killed = subprocess.run(
        [sys.executable, PROGRAM, "kill", tmp_path / "run", "20"],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    newest = max(state.name for state in (tmp_path / "run" / "last").glob("step-????????"))
    assert newest in ("step-00000006", "step-00000009"), "the last one may not have been written yet"
    resumed, _ = toy.run(tmp_path / "run", resume=True)
    assert equal(model, resumed)
    assert toy.lines(tmp_path / "run") == toy.lines(path)


def run_processes(count: int, *arguments: object) -> None:
    """The program in a group of processes."""
    run_group(count, PROGRAM, *arguments, timeout=120)


def test_two_processes_equal_one(toy: ModuleType, tmp_path: Path) -> None:
    """Without dropout; each process takes half of every batch."""
    run_processes(2, "distributed", tmp_path / "two")
    toy.distributed(tmp_path / "one", batch_size=4)
    for kind in ("means", "counts"):
        one, two = tmp_path / "one" / kind, tmp_path / "two" / kind
        for found, expected in zip(toy.lines(two), toy.lines(one), strict=True):
            assert found.keys() == expected.keys()
            assert found["step"] == expected["step"]
            if found["kind"] == "train":
                assert found["parts"] == pytest.approx(expected["parts"], abs=1e-5)
                assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        for file in ("model.safetensors", *(["average.safetensors"] if kind == "means" else [])):
            weights, expected_weights = (load_file(run / "last" / "step-00000015" / file) for run in (two, one))
            for name, value in weights.items():
                assert_close(value, expected_weights[name], atol=1e-5, rtol=1e-5)

    averaged = load_file(tmp_path / "two" / "means" / "models" / "averaged" / "model.safetensors")
    assert averaged.keys() == weights.keys()


@pytest.mark.parametrize(
    "parts",
    [
        [(1, 4, 2, 9), (2, 4, 1, 5), (1, 4, 2, 999)],
        pytest.param(
            [(1, 4, 2, 9), (2, 4, 1, 5), (4, 2, 1, 4), (4, 1, 2, 5), (2, 2, 2, 5), (1, 2, 4, 999)],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [(2, 2, 2, 9, 1), (1, 4, 2, 9), (4, 2, 1, 4, 1), (2, 4, 1, 5), (2, 2, 2, 999, 1)],
            marks=pytest.mark.slow,
            id="spread and whole",
        ),
    ],
)
def test_other_numbers_of_processes_continue_the_same_course(
    toy: ModuleType, tmp_path: Path, parts: list[tuple[int, ...]]
) -> None:
    """(processes, batch size, batches per update, call of the step before which it stops, 1 if the model is spread over
    the processes): 8 examples in every update, saved after every third one and after every fifth, and logged after
    every fourth."""
    toy.share_run(tmp_path / "whole", 4, 2, 999)
    for processes, *layout in parts:
        run_processes(processes, "share", tmp_path / "parts", *layout)
    found, expected = toy.lines(tmp_path / "parts"), toy.lines(tmp_path / "whole")
    assert len(found) == len(expected) > 5
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert (one["kind"], one["step"], one["epoch"]) == (other["kind"], other["step"], other["epoch"])
        if one["kind"] == "train":
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
            assert one["parts"] == pytest.approx(other["parts"], abs=1e-5)
        else:
            assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    for name in ("model.safetensors", "average.safetensors"):
        ends = (load_file(tmp_path / run / "last" / "step-00000015" / name) for run in ("parts", "whole"))
        for tensor, wanted in zip(*(end.values() for end in ends), strict=True):
            assert_close(tensor, wanted, atol=1e-5, rtol=1e-5)
