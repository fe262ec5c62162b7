"""States that are written in the background, from a copy."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from visling.errors import ConfigError, RunError
from visling.train import saved_states
from visling.train.background import Background
from visling.train.layout import fit_layout
from visling.train.log import read
from visling.train.snapshot import apply_state, collect_state
from visling.train.state import RunFolder, State


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_job_runs_beside_and_its_error_arrives() -> None:
    background, go = Background(), threading.Event()
    done: list[int] = []

    def work() -> None:
        assert go.wait(10)
        done.append(1)

    background.start(work)
    background.check()
    assert not done
    go.set()
    background.wait()
    assert done == [1]
    background.start(lambda: full_disk())
    with pytest.raises(OSError, match="No space left"):
        background.wait()
    background.wait()
    background.start(lambda: full_disk())
    with pytest.raises(OSError, match="No space left"):
        background.start(lambda: done.append(2))
    assert done == [1]


def test_what_is_written_is_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what training has made of it meanwhile; and a state that is being written is no state yet."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [entry["exp_avg"].clone() for entry in optimizer.state.values()]
    go = threading.Event()

    def save_late(*given: Any) -> None:
        assert go.wait(10)
        save_file(*given)

    monkeypatch.setattr(saved_states, "save_file", save_late)
    folder, position = RunFolder.create(tmp_path / "run"), {"next": [1]}
    folder.save_last(model, optimizer, State(step=1), position, in_background=True)
    optimizer.step()
    position["next"].append(2)
    assert not list(folder.last.glob("step-????????"))
    go.set()
    folder.finish_saving()
    saved = load_file(folder.last / "step-00000001" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    _, found = folder.load_last(model, optimizer)
    assert found == {"next": [1]}
    assert all(torch.equal(one["exp_avg"], two) for one, two in zip(optimizer.state.values(), moments, strict=True))


@pytest.mark.parametrize("saves", [1, 2])
def test_a_full_disk_ends_the_run_and_keeps_the_older_state(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    written = 0

    def write(self: Any, *given: Any) -> None:
        nonlocal written
        written += 1
        if written > saves:
            full_disk()
        write_files(self, *given)

    write_files = saved_states.SavedStates._write_files
    monkeypatch.setattr(saved_states.SavedStates, "_write_files", write)
    with pytest.raises(RunError, match=r"cannot write to .*No space left on device.*saved before is intact"):
        toy.run(tmp_path / "run")
    monkeypatch.undo()
    kept = [state.name for state in (tmp_path / "run" / "last").iterdir()]
    assert sorted(kept) == ["step-00000003", "step-00000005"][:saves]
    whole, resumed = toy.run(tmp_path / "whole")[0], toy.run(tmp_path / "run", resume=True)[0]
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("in_background", [True, False])
def test_the_newest_states_are_kept_and_one_that_is_damaged_is_left_out(
    toy: ModuleType, tmp_path: Path, in_background: bool
) -> None:
    """Saved after the steps 3, 5, 6, 9, 10, 12 and 15, the last one at the end of the run."""
    settings = {"keep_states": 3, "save_in_background": in_background}
    model, _ = toy.run(tmp_path / "run", **settings)
    last = tmp_path / "run" / "last"
    assert sorted(state.name for state in last.iterdir()) == ["step-00000010", "step-00000012", "step-00000015"]
    for step, name in ((15, "model.safetensors"), (12, "optimizer.pt")):
        file = last / f"step-{step:08d}" / name
        contents = bytearray(file.read_bytes())
        contents[-1] ^= 1
        file.write_bytes(contents)
    resumed, _ = toy.run(tmp_path / "run", resume=True, **settings)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), resumed.parameters(), strict=True))
    messages = [line["message"] for line in read(tmp_path / "run" / "log.jsonl") if line["kind"] == "event"]
    (newest, next_one) = [message for message in messages if "left out" in message]
    assert "step 15 is left out" in newest
    assert f"{last / 'step-00000015' / 'model.safetensors'} is damaged" in newest
    assert "resumed at step 10 instead" in newest
    assert "step 12 is left out" in next_one
    assert "optimizer.pt is damaged" in next_one
    assert "resumed at step 10 of 15" in messages


def test_parameters_without_a_state_still_have_none(toy: ModuleType) -> None:
    """BertAdam counts the updates of each parameter: the pooler is trained from the third update on."""
    from dataclasses import replace

    from visling.train.optim import build_optimizer

    def build(seed: int) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        model = toy.Toy(0.0)
        return model, build_optimizer(model, replace(toy.config().optim, exclude=()), 15, per_epoch=5)[0]

    def train(model: Any, optimizer: Any, *, pooler: bool) -> None:
        x = torch.linspace(-1, 1, 4 * toy.WIDTH).view(4, toy.WIDTH)
        value = model(x).square().mean()
        (value + model.pooler(x).square().mean() if pooler else value).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    one, two = build(0), build(1)
    train(*one, pooler=False)
    train(*one, pooler=False)
    snapshot = collect_state(*one, copied=True)
    assert "pooler.weight" not in snapshot.optimizer["state"]
    assert snapshot.ties == {"second.weight": "first.weight"}
    apply_state(snapshot, *two)
    for pair in (one, two):
        train(*pair, pooler=True)
    assert one[1].state[one[0].pooler.weight]["step"] == 1
    assert two[1].state_dict().keys() == one[1].state_dict().keys()
    assert str(two[1].state_dict()) == str(one[1].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one[0].parameters(), two[0].parameters(), strict=True))
    assert two[0].second.weight is two[0].first.weight


@pytest.mark.parametrize(
    ("sizes", "accumulation", "before", "now", "expected"),
    [
        ((8,), 1, 1, 1, ((8,), 1)),
        ((8,), 4, 1, 1, ((8,), 4)),
        ((4,), 1, 4, 1, ((4,), 4)),
        ((4,), 1, 4, 2, ((4,), 2)),
        ((8,), 1, 1, 2, ((4,), 1)),
        ((6,), 1, 2, 3, ((4,), 1)),
        ((5,), 2, 2, 1, ((5,), 4)),
        ((3,), 1, 4, 2, ((3,), 2)),
        ((4, 2), 1, 4, 2, ((4, 2), 2)),
        ((4, 2), 1, 2, 4, ((2, 1), 1)),
        ((6, 4), 1, 2, 4, ((3, 2), 1)),
    ],
)
def test_global_batches_are_shared_by_other_processes(
    sizes: tuple[int, ...], accumulation: int, before: int, now: int, expected: tuple[tuple[int, ...], int]
) -> None:
    named = {str(number): size for number, size in enumerate(sizes)}
    fitted, micro_batches = fit_layout(named, accumulation, before, now)
    assert (tuple(fitted.values()), micro_batches) == expected
    for name, size in named.items():
        assert fitted[name] * micro_batches * now == size * accumulation * before
        assert fitted[name] <= size


def test_processes_that_cannot_share_are_told_how_many_can() -> None:
    with pytest.raises(
        ConfigError, match=r"every update of this run has 12 images and 4 text, with 2 processes .*: 1, 2, 4\.$"
    ):
        fit_layout({"images": 6, "text": 2}, 1, 2, 3)
