"""The run folder: what it refuses, what it writes, and that no failure in the middle of a write loses anything."""

from __future__ import annotations

import errno
import json
import random
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from visling.errors import RunError
from visling.train import state as states
from visling.train.generators import capture_generators, restore_generators
from visling.train.state import RunFolder, State, Sums, save_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.decoder = nn.Linear(3, 5)
        self.decoder.weight = self.words.weight
        self.register_buffer("part", torch.arange(6.0)[:3])
        self.register_buffer("none", torch.zeros(0))


def trained(seed: int = 0) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model.decoder(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_new_run_is_recorded(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs" / "one")
    folder.record({"task": "vqa", "images": Path("pictures"), "config": {"lr": 1.0}})
    found = folder.read()
    assert found["status"] == "running"
    assert (found["task"], found["images"], found["finished"]) == ("vqa", "pictures", None)
    folder.finish()
    assert folder.read()["status"] == "finished"
    assert folder.read()["finished"] >= found["started"]
    assert not folder.has_last


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"file{number}").write_text("")
    with pytest.raises(RunError, match=r"not empty: it holds file0, .*file4 and 2 more\. Use another --out, or delete"):
        RunFolder.create(tmp_path)
    RunFolder.create(tmp_path / "run")
    with pytest.raises(RunError, match="--resume"):
        RunFolder.create(tmp_path / "run")
    assert RunFolder.create(tmp_path / "run", resume=True).path == tmp_path / "run"
    with pytest.raises(RunError, match="is a file"):
        RunFolder.create(tmp_path / "file0")
    with pytest.raises(RunError, match=r"cannot write to .*run: .*file0 is a file, not a folder\. Use another --out"):
        RunFolder.create(tmp_path / "file0" / "deep" / "run")


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert RunFolder.create(tmp_path / "run").read()["status"] == "running"


def test_a_kill_during_the_first_write_leaves_an_empty_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json.part").write_text('{"status": "runn')
    with pytest.raises(RunError, match="nothing to resume"):
        RunFolder.create(run, resume=True)
    assert RunFolder.create(run).read()["status"] == "running"
    assert [entry.name for entry in run.iterdir()] == ["run.json"]
    with pytest.raises(RunError, match=r"not empty: it holds run\.json\. "):
        RunFolder.create(run)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to resume"):
        RunFolder.create(tmp_path / "missing", resume=True)
    assert not (tmp_path / "missing").exists()


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(states.tempfile, "TemporaryFile", refuse)
    with pytest.raises(RunError, match=r"cannot write to .*Permission denied.*fix permissions"):
        RunFolder.create(tmp_path / "run")


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path / "run")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 10**10 - 10**9, 10**9))
    folder.require_space(10**9)
    with pytest.raises(RunError, match=r"about 2\.00 GB .* 1\.00 GB are free"):
        folder.require_space(2 * 10**9)


def test_other_settings_are_refused_on_resume(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.record({"config": {"train": {"seed": 1, "log_every": 5}}})
    folder.record({"config": {"train": {"seed": 1, "log_every": 9}}}, may_differ=("train.log_every",))
    with pytest.raises(RunError, match=r"train\.seed was 1, now 2"):
        folder.record({"config": {"train": {"seed": 2, "log_every": 9}}})


def test_everything_comes_back(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    model, optimizer = trained()
    state = State(
        step=3, epoch=1, batch=2, best=0.1 + 0.2, sums=Sums(loss=1 / 3, steps=2, parts={"a": [0.1, 3.0]}, examples=7)
    )
    folder.save_last(model, optimizer, state, {"epoch": 1, "next": 4})
    drawn = random.random(), np.random.rand(), torch.rand(1).item(), np.random.randn()
    other, other_optimizer = trained(seed=1)
    found, position = folder.load_last(other, other_optimizer)
    assert found == state
    assert position == {"epoch": 1, "next": 4}
    assert (random.random(), np.random.rand(), torch.rand(1).item(), np.random.randn()) == drawn
    assert same(model, other)
    assert other.decoder.weight is other.words.weight
    moments = [entry["exp_avg"] for entry in optimizer.state.values()]
    assert all(torch.equal(a, b["exp_avg"]) for a, b in zip(moments, other_optimizer.state.values(), strict=True))
    assert sorted(file.name for file in folder.last.iterdir()) == [
        "model-000001.safetensors",
        "optimizer-000001.pt",
        "state.json",
    ]
    folder.save_last(model, optimizer, state, {})
    assert len(list(folder.last.iterdir())) == 3


def test_generators_of_an_earlier_moment(tmp_path: Path) -> None:
    np.random.randn()  # leaves a second Gaussian waiting
    earlier = json.loads(json.dumps(capture_generators()))
    drawn = random.random(), np.random.randn(), torch.rand(1).item()
    restore_generators(earlier)
    assert (random.random(), np.random.randn(), torch.rand(1).item()) == drawn


FAILURES = {
    "weights": ("save_file", SafetensorError("Error while serializing: No space left on device")),
    "optimiser": ("torch.save", RuntimeError("PytorchStreamWriter failed writing file data/0")),
    "disk": ("json.dumps", OSError(errno.ENOSPC, "No space left on device")),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_full_disk_leaves_the_previous_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    folder = RunFolder.create(tmp_path / "run")
    model, optimizer = trained()
    folder.save_last(model, optimizer, State(step=1), {})
    later, later_optimizer = trained(seed=1)
    name, failure = FAILURES[what]

    def fail(*_: Any, **__: Any) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(f"visling.train.state.{name}", fail)
        with pytest.raises(RunError, match=r"cannot write to .* free\)\. What was saved before is intact"):
            folder.save_last(later, later_optimizer, State(step=2), {})
    assert len(list(folder.last.iterdir())) == 3
    found, _ = folder.load_last(later, later_optimizer)
    assert found.step == 1
    assert same(model, later)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("survives", [True, False])
@pytest.mark.parametrize("at", range(1, 10))
def test_a_kill_at_any_rename_or_flush_leaves_a_whole_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, survives: bool
) -> None:
    """`survives`: whether Python still runs its clean-up; a real kill does not."""
    folder = RunFolder.create(tmp_path / "run")
    model, optimizer = trained()
    folder.save_last(model, optimizer, State(step=1), {})
    later, later_optimizer = trained(seed=1)
    flush, calls = states._flush, 0

    def killed(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            if not survives:
                shutil.copytree(folder.path, tmp_path / "left")
            raise Killed
        flush(path)

    with monkeypatch.context() as patch:
        patch.setattr(states, "_flush", killed)
        if at <= 6:
            with pytest.raises(Killed):
                folder.save_last(later, later_optimizer, State(step=2), {})
        else:
            folder.save_last(later, later_optimizer, State(step=2), {})
    if not survives and at <= 6:
        folder = RunFolder.create(tmp_path / "left", resume=True)
    loaded, loaded_optimizer = trained(seed=2)
    found, _ = folder.load_last(loaded, loaded_optimizer)
    assert found.step == (1 if at < 6 else 2)
    assert same(loaded, model if found.step == 1 else later)
    folder.save_last(later, later_optimizer, State(step=3), {})
    assert len(list(folder.last.iterdir())) == 3


def test_a_state_that_does_not_fit(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.save_last(*trained(), State(), {})
    other = nn.Linear(2, 2)
    with pytest.raises(RunError, match="does not fit this model"):
        folder.load_last(other, torch.optim.SGD(other.parameters()))


@pytest.mark.parametrize(
    ("content", "message"), [('{"status": "runn', "It is damaged"), ("[]", "holds list, not a run's settings")]
)
def test_a_damaged_run_json_is_refused(tmp_path: Path, content: str, message: str) -> None:
    folder = RunFolder.create(tmp_path / "run")
    (folder.path / "run.json").write_text(content)
    with pytest.raises(RunError, match=message):
        folder.record({"status": "running"})


class Foreign:
    pass


def test_a_damaged_or_foreign_state_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    model, optimizer = trained()
    folder.save_last(model, optimizer, State(), {})
    file = next(folder.last.glob("optimizer-*.pt"))
    whole = file.read_bytes()
    torch.save(Foreign(), file)
    with pytest.raises(RunError, match="cannot read the saved state"):
        folder.load_last(model, optimizer)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match="cannot read the saved state"):
        folder.load_last(model, optimizer)
    file.write_bytes(whole)
    about = json.loads((folder.last / "state.json").read_text())
    (folder.last / "state.json").write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(RunError, match="layout 99"):
        folder.load_last(model, optimizer)


def test_the_best_model_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    model, _ = trained()
    folder.save_model(folder.model, lambda path: save_weights(path, model))
    kept = load_file(folder.model / "model.safetensors")
    assert set(kept) == {"words.weight", "decoder.bias", "part", "none"}

    def half(path: Path) -> None:
        (path / "model.safetensors").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="No space left"):
        folder.save_model(folder.model, half)
    assert all(torch.equal(kept[name], value) for name, value in load_file(folder.model / "model.safetensors").items())
    assert not (folder.path / "model.part").exists()


@pytest.mark.parametrize("survives", [True, False])
@pytest.mark.parametrize("at", range(1, 6))
@pytest.mark.parametrize("older", [True, False])
def test_a_kill_at_any_flush_leaves_whole_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool, at: int, survives: bool
) -> None:
    """A new folder is there as a whole or not at all; in an older one the weights are those before or after."""
    folder = RunFolder.create(tmp_path / "run")
    kept = folder.models / "epoch-0001"

    def written(number: int) -> Any:
        def write(path: Path) -> None:
            (path / "config.json").write_text("{}")
            save_weights(path, trained(number)[0])

        return write

    if older:
        folder.save_model(kept, written(0))
    flush, calls = states._flush, 0

    def killed(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            if not survives:
                shutil.copytree(folder.path, tmp_path / "left")
            raise Killed
        flush(path)

    with monkeypatch.context() as patch:
        patch.setattr(states, "_flush", killed)
        try:
            folder.save_model(kept, written(1))
        except Killed:
            if not survives:
                folder = RunFolder.create(tmp_path / "left", resume=True)
                kept = folder.models / "epoch-0001"
    if kept.exists():
        assert {file.name for file in kept.iterdir()} == {"config.json", "model.safetensors"}
        found = load_file(kept / "model.safetensors")["words.weight"]
        assert any(torch.equal(found, trained(number)[0].words.weight) for number in ((0, 1) if older else (1,)))
    else:
        assert not older
    folder.save_model(kept, written(2))
    assert torch.equal(load_file(kept / "model.safetensors")["words.weight"], trained(2)[0].words.weight)
    assert [entry.name for entry in folder.models.iterdir()] == ["epoch-0001"]


def test_a_failure_of_the_first_model_leaves_no_empty_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")

    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="No space left"):
        folder.save_model(folder.models / "epoch-0001", fail)
    assert not folder.holds_models
    assert not folder.models.exists()


@pytest.mark.parametrize("links", [True, False])
def test_a_detector_is_put_into_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    folder = RunFolder.create(tmp_path / "run")
    for kept in (folder.model, folder.models / "last", folder.models / "epoch-0001"):
        folder.save_model(kept, lambda path: save_weights(path, trained()[0]))
    source = tmp_path / "detector"
    (source / "model").mkdir(parents=True)
    (source / "model" / "weights").write_text("weights")
    (source / "log.jsonl").write_text("")

    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(states.os, "link", refuse)
    for _ in range(2):  # a resumed run does it again
        folder.keep(source, "detector")
        for kept in (folder.model, folder.models / "last", folder.models / "epoch-0001"):
            file = kept / "detector" / "model" / "weights"
            assert file.read_text() == "weights"
            assert file.samefile(folder.model / "detector" / "model" / "weights") == (links or kept == folder.model)
            assert not (kept / "detector" / "log.jsonl").exists()
