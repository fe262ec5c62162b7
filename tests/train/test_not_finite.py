"""Losses and gradients that are not finite: the batch that is kept, updates that are left out, runs that stop."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from visling.errors import RunError
from visling.train import engine
from visling.train.config import TrainConfig
from visling.train.engine import fit
from visling.train.log import Log, read
from visling.train.not_finite import MOST_IN_A_ROW, FiniteGuard, name_tensors
from visling.train.optim import OptimConfig
from visling.train.state import RunFolder, State
from visling.types import Batch, Loss, Targets, Text

Spoil = Callable[[Tensor], Tensor]


def nan(value: Tensor) -> Tensor:
    return value * math.nan


def steep(value: Tensor) -> Tensor:
    """The same value, with an infinite slope."""
    return value + (value - value.detach()).abs().sqrt()


def train(
    toy: ModuleType, out: Path, *, spoil: Spoil = nan, at: tuple[int, ...] = (5,), resume: bool = False, **changes: Any
) -> tuple[nn.Module, State, list[dict[str, Tensor]]]:
    """A run whose loss is spoilt in some micro-steps; also the weights after every update that was made."""
    model, step = toy.make(dropout=0.0)
    calls, after = 0, []

    def spoilt(x: Tensor, y: Tensor) -> Loss:
        nonlocal calls
        calls += 1
        loss = step(x, y)
        return Loss(value=spoil(loss.value), parts=loss.parts, terms=loss.terms) if calls in at else loss

    folder = RunFolder.create(out, resume=resume)
    with Log(folder.log) as log:
        state = fit(
            model,
            spoilt,
            toy.Pairs(),
            config=toy.config(**{"accumulation": 1, "epochs": 1, **changes}),
            log=log,
            run_folder=folder,
            after_update=lambda: after.append({name: value.clone() for name, value in model.state_dict().items()}),
            after_skip=lambda: after.append({}),
        )
    return model, state, after


def events(out: Path) -> list[str]:
    return [entry["message"] for entry in read(out / "log.jsonl") if entry["kind"] == "event"]


@pytest.mark.parametrize(("spoil", "what"), [(nan, "loss"), (steep, "gradient")])
def test_a_run_stops_and_keeps_the_batch(toy: ModuleType, tmp_path: Path, spoil: Spoil, what: str) -> None:
    out = tmp_path / "run"
    with pytest.raises(RunError, match=f"the {what} of step 5 is not finite") as caught:
        train(toy, out, spoil=spoil)
    file = out / "not_finite" / "step-00000005-process-0.safetensors"
    assert f"Its batch is in {file}." in str(caught.value)
    pairs = list(toy.Pairs())
    assert load_file(file).keys() == {"micro_batch_0.batch", "micro_batch_0.targets"}
    assert torch.equal(load_file(file)["micro_batch_0.batch"], pairs[4][0])
    about = json.loads(file.with_suffix(".json").read_text())
    assert (about["step"], about["epoch"], about["process"], about["processes"]) == (5, 1, 0, 1)
    assert about["not_finite"] == what
    assert about["settings"]["max_steps"] is None
    (kept,) = about["micro_batches"].values()
    assert (kept["position"]["epoch"], kept["position"]["next"]) == (0, 4)
    assert kept["examples"] is None, "this loader does not tell"
    assert (kept["loss"] == "nan") is (what == "loss")
    assert set(kept["parts"]) == {"answer", "size"}


def test_the_state_before_a_bad_update_resumes_as_if_it_had_not_been(toy: ModuleType, tmp_path: Path) -> None:
    expected = train(toy, tmp_path / "good", at=())[0]
    with pytest.raises(RunError, match="not finite"):
        train(toy, tmp_path / "bad")
    resumed, state, _ = train(toy, tmp_path / "bad", at=(), resume=True)
    assert state.step == 11
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("spoil", [nan, steep])
def test_an_update_is_left_out_and_the_schedule_goes_on(toy: ModuleType, tmp_path: Path, spoil: Spoil) -> None:
    out = tmp_path / "run"
    optim = OptimConfig()
    settings: dict[str, Any] = {"not_finite": "skip", "log_every": 1, "average": 0.5, "optim": optim}
    _, state, after = train(toy, out, spoil=spoil, at=(1, 5, 6), **settings)
    good = [entry for entry in read(tmp_path / "run" / "log.jsonl") if entry["kind"] == "train"]
    _, _, whole = train(toy, tmp_path / "good", at=(), **settings)
    rates = {entry["step"]: entry["lr"] for entry in read(tmp_path / "good" / "log.jsonl") if entry["kind"] == "train"}
    assert (state.step, state.skipped, state.stopped) == (11, 3, "finished")
    assert [bool(weights) for weights in after] == [number not in (1, 5, 6) for number in range(1, 12)]
    assert [entry["step"] for entry in good] == [2, 3, 4, 7, 8, 9, 10, 11]
    assert all(entry["lr"] == rates[entry["step"]] for entry in good)
    assert all(math.isfinite(entry["loss"]) for entry in good)
    said = events(out)
    assert [event.partition(" is not finite")[0][-6:] for event in said[:3]] == ["step 1", "step 5", "step 6"]
    assert said[-1] == "3 updates were left out because a loss or a gradient was not finite"
    assert len(list((out / "not_finite").glob("*.safetensors"))) == 3
    assert len(whole) == 11


def test_nothing_moves_in_an_update_that_is_left_out(toy: ModuleType, tmp_path: Path) -> None:
    """Weights, moments and averages: of a run that ends before it, and of one whose last update it is."""
    optim = OptimConfig(schedule="constant", warmup_share=0.0)
    for name, at, steps in (("short", (), 4), ("skipped", (5,), 5)):
        train(toy, tmp_path / name, at=at, max_steps=steps, not_finite="skip", average=0.5, optim=optim)
    short, skipped = (max((tmp_path / name / "last").iterdir()) for name in ("short", "skipped"))
    assert [short.name, skipped.name] == ["step-00000004", "step-00000005"]
    for name in ("model.safetensors", "average.safetensors"):
        one, other = load_file(short / name), load_file(skipped / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (short, skipped))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_statistics_of_norms_are_those_before_the_update(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))

    class Few:
        epoch = 0

        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Any:
            yield torch.full((4, 6), math.nan), torch.zeros(4, dtype=torch.int64)
            yield torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)

        def state_dict(self) -> dict[str, Any]:
            return {"epoch": self.epoch}

        def load_state_dict(self, state: Any) -> None: ...

    def step(x: Tensor, y: Tensor) -> Loss:
        return Loss.mean("answer", F.cross_entropy(model(x), y, reduction="none"))

    config = TrainConfig(epochs=1, not_finite="skip")
    state = fit(model, step, Few(), config=config, log=Log())
    assert (state.step, state.skipped) == (2, 1)
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert model[0].num_batches_tracked == 1


def test_many_in_a_row_stop_the_run(toy: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"It is the {MOST_IN_A_ROW + 1}th update in a row"):
        train(toy, tmp_path / "run", at=tuple(range(3, 40)), not_finite="skip", epochs=3)
    kept = sorted(file.name for file in (tmp_path / "run" / "not_finite").glob("*.safetensors"))
    assert kept[-1] == f"step-{MOST_IN_A_ROW + 3:08d}-process-0.safetensors"
    assert len(kept) == MOST_IN_A_ROW + 1


def test_a_loss_that_is_read_late_keeps_the_batch_made_again(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where updates are not waited for."""

    class Late(FiniteGuard):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.checks = False

    monkeypatch.setattr(engine, "FiniteGuard", Late)
    with pytest.raises(RunError, match=r"step 3 is not finite .* corrupted since that step.* Its batch is in"):
        train(toy, tmp_path / "run", at=(5,), accumulation=2, log_every=4)
    (file,) = (tmp_path / "run" / "not_finite").glob("*.safetensors")
    assert file.name == "step-00000003-process-0.safetensors"
    pairs, kept = list(toy.Pairs()), load_file(file)
    for number in (0, 1):
        assert torch.equal(kept[f"micro_batch_{number}.batch"], pairs[4 + number][0])
        assert torch.equal(kept[f"micro_batch_{number}.targets"], pairs[4 + number][1])


def test_tensors_are_named_by_their_path() -> None:
    ids = torch.ones(2, 3, dtype=torch.int64)
    text = Text(ids=ids, segments=ids, mask=torch.ones(2, 3, dtype=torch.bool))
    batch = Batch(text=text, regions=None, group=1)
    names = dict(name_tensors("batch", batch))
    assert {"batch.text.ids", "batch.text.mask"} <= names.keys()
    assert torch.equal(names["batch.text.ids"], text.ids)
    nested = name_tensors("x", {"a": [torch.zeros(1), (torch.ones(1),)], "b": "text"})
    assert [name for name, _ in nested] == ["x.a.0", "x.a.1.0"]
    assert dict(name_tensors("targets", Targets())) == {}


PROGRAM = """
import math, sys
from pathlib import Path
from visling import runtime
from visling.errors import RunError
from visling.train.engine import fit
from visling.train.log import Log
from visling.train.optim import OptimConfig
from visling.train.state import RunFolder
from visling.types import Loss
sys.path.insert(0, {folder!r})
import toy

out = Path({out!r})
with runtime.process_group(2):
    found = {{}}
    for mode in ("stop", "skip"):
        model, step = toy.make(dropout=0.0)
        calls = 0

        def spoilt(x, y):
            global calls
            calls += 1
            loss = step(x, y)
            bad = calls == 5 and runtime.rank() == 1
            return Loss(value=loss.value * math.nan, parts=loss.parts, terms=loss.terms) if bad else loss

        folder = RunFolder.create(out / mode)
        config = toy.config(accumulation=1, epochs=1, not_finite=mode)
        try:
            with Log(folder.log) as log:
                state = fit(model, spoilt, toy.Pairs(2, runtime.rank(), 2), config=config, log=log, run_folder=folder)
            sums = runtime.sum_over_processes(sum(p.double().sum() for p in model.parameters()).detach())
            assert abs(sums / 2 - sum(p.double().sum() for p in model.parameters())) < 1e-9
            found[mode] = state.skipped
        except RunError as error:
            found[mode] = str(error)
    if runtime.is_main():
        assert "step 5" in found["stop"] and "process-1.safetensors" in found["stop"], found
        assert found["skip"] == 1
        print("alike")
"""


def test_two_processes_stop_or_skip_alike(tmp_path: Path) -> None:
    """Although only the second one's loss is bad, whose batch is kept."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(folder=str(Path(__file__).parent), out=str(tmp_path)))
    ended = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("alike\n")
    for mode in ("stop", "skip"):
        assert [file.name for file in (tmp_path / mode / "not_finite").glob("*.json")] == [
            "step-00000005-process-1.json"
        ]
