"""The run folder: what it refuses, what it writes, and that no failure in the middle of a write loses anything."""

from __future__ import annotations

import errno
import hashlib
import json
import random
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from visling.errors import RunError
from visling.train import disk, saved_states
from visling.train.generators import capture_generators, restore_generators
from visling.train.state import RunFolder, State, Sums
from visling.train.weights import save_weights


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


def files_of(folder: RunFolder) -> dict[str, set[str]]:
    """What is in last/, by its name there."""
    return {entry.name: {file.name for file in entry.iterdir()} for entry in sorted(folder.last.iterdir())}


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

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
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
    assert files_of(folder) == {"step-00000003": {"model.safetensors", "optimizer.pt", "state.json"}}
    about = json.loads((folder.last / "step-00000003" / "state.json").read_text())
    for name in ("model.safetensors", "optimizer.pt"):
        contents = (folder.last / "step-00000003" / name).read_bytes()
        assert about["files"][name] == {"size": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
    folder.save_last(model, optimizer, state, {})
    assert files_of(folder) == {"step-00000003": {"model.safetensors", "optimizer.pt", "state.json"}}


def test_generators_of_an_earlier_moment(tmp_path: Path) -> None:
    np.random.randn()  # leaves a second Gaussian waiting
    earlier = json.loads(json.dumps(capture_generators()))
    drawn = random.random(), np.random.randn(), torch.rand(1).item()
    restore_generators(earlier)
    assert (random.random(), np.random.randn(), torch.rand(1).item()) == drawn


FAILURES = {
    "weights": ("saved_states.save_file", SafetensorError("Error while serializing: No space left on device")),
    "optimiser": ("saved_states.torch.save", RuntimeError("PytorchStreamWriter failed writing file data/0")),
    "disk": ("saved_states.json.dumps", OSError(errno.ENOSPC, "No space left on device")),
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
        patch.setattr(f"visling.train.{name}", fail)
        with pytest.raises(RunError, match=r"cannot write to .* free\)\. What was saved before is intact"):
            folder.save_last(later, later_optimizer, State(step=2), {})
    assert list(files_of(folder)) == ["step-00000001"]
    found, _ = folder.load_last(later, later_optimizer)
    assert found.step == 1
    assert same(model, later)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("survives", [True, False])
@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("at", range(1, 9))
def test_a_kill_at_any_flush_or_rename_leaves_a_whole_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, again: bool, survives: bool
) -> None:
    """`again`: the state is of the step that was saved before; `survives`: whether Python still runs its clean-up; a
    real kill does not."""
    folder = RunFolder.create(tmp_path / "run")
    model, optimizer = trained()
    folder.save_last(model, optimizer, State(step=5, best=0.1), {}, keep=1)
    later, later_optimizer = trained(seed=1)
    calls = 0

    def kill_before(act: Callable[..., Any]) -> Callable[..., Any]:
        def killed(*given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                if not survives:
                    shutil.copytree(folder.path, tmp_path / "left")
                raise Killed
            return act(*given)

        return killed

    after = State(step=5 if again else 6, best=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(saved_states, "flush", kill_before(disk.flush))
        patch.setattr(Path, "rename", kill_before(Path.rename))
        try:
            folder.save_last(later, later_optimizer, after, {}, keep=1)
            assert at == 8, "three files, their folder, one or two renamed states, the folder of states, a deletion"
        except Killed:
            if not survives:
                folder = RunFolder.create(tmp_path / "left", resume=True)
    loaded, loaded_optimizer = trained(seed=2)
    found, _ = folder.load_last(loaded, loaded_optimizer)
    assert not folder.notes
    assert same(loaded, model if found.best == 0.1 else later)
    assert at > 4 or found.best == 0.1
    assert at < 8 or found.best == 0.2
    folder.save_last(later, later_optimizer, State(step=7), {}, keep=1)
    assert list(files_of(folder)) == ["step-00000007"]


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


@pytest.fixture
def three(tmp_path: Path) -> RunFolder:
    """A run with the states of steps 10, 20 and 30."""
    folder = RunFolder.create(tmp_path / "run")
    for number in range(1, 5):
        folder.save_last(*trained(number), State(step=10 * number), {"next": number}, keep=3)
    assert list(files_of(folder)) == ["step-00000020", "step-00000030", "step-00000040"]
    return folder


def load(folder: RunFolder) -> tuple[int, nn.Module]:
    model, optimizer = trained(seed=9)
    state, _ = folder.load_last(model, optimizer)
    return state.step, model


def test_the_newest_state_is_resumed(three: RunFolder) -> None:
    step, model = load(three)
    assert step == 40
    assert not three.notes
    assert same(model, trained(4)[0])


def flip(file: Path, at: float) -> None:
    contents = bytearray(file.read_bytes())
    contents[int(at * len(contents))] ^= 1
    file.write_bytes(contents)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda state: flip(state / "model.safetensors", 0.9), "model.safetensors is damaged: its SHA-256"),
        (lambda state: flip(state / "optimizer.pt", 0.5), "optimizer.pt is damaged: its SHA-256"),
        (lambda state: flip(state / "state.json", 0.5), "state.json"),
        (lambda state: (state / "state.json").write_text("{"), "state.json cannot be read"),
        (lambda state: (state / "state.json").write_text("[]"), "state.json is damaged"),
        (lambda state: (state / "state.json").unlink(), "state.json cannot be read"),
        (lambda state: (state / "optimizer.pt").unlink(), "optimizer.pt cannot be read"),
        (lambda state: (state / "model.safetensors").write_bytes(b"short"), "bytes, not"),
    ],
)
def test_a_damaged_state_is_left_out_loudly(three: RunFolder, damage: Callable[[Path], object], said: str) -> None:
    damage(three.last / "step-00000040")
    step, model = load(three)
    assert step == 30
    assert same(model, trained(3)[0])
    (note,) = three.notes
    assert "the state of step 40 is left out" in note
    assert f"step-00000040/{said}" in note or said in note
    assert "resumed at step 30 instead" in note
    three.save_last(*trained(5), State(step=35), {}, keep=3)
    assert list(files_of(three)) == ["step-00000020", "step-00000030", "step-00000035"], "the damaged one is gone"


def test_no_state_is_left(three: RunFolder) -> None:
    for state in three.last.iterdir():
        flip(state / "model.safetensors", 0.9)
    with pytest.raises(RunError, match=r"no state in .* can be resumed: .*40.*30.*20.*intact copy.*another --out"):
        load(three)


def test_a_state_can_be_chosen_by_deleting_newer_ones(three: RunFolder) -> None:
    shutil.rmtree(three.last / "step-00000040")
    assert load(three)[0] == 30


class Foreign:
    pass


def test_an_optimiser_with_foreign_objects_is_not_unpickled(three: RunFolder) -> None:
    """Even if its checksum is right."""
    state = three.last / "step-00000040"
    torch.save(Foreign(), state / "optimizer.pt")
    about = json.loads((state / "state.json").read_text())
    del about["sha256"]
    about["files"]["optimizer.pt"] = saved_states._describe(state / "optimizer.pt")
    (state / "state.json").write_text(json.dumps({**about, "sha256": saved_states._hash_contents(about)}))
    assert load(three)[0] == 30
    assert "UnpicklingError" in three.notes[0]


def test_states_of_other_versions_are_refused(three: RunFolder) -> None:
    state = three.last / "step-00000040"
    about = {**json.loads((state / "state.json").read_text()), "format": 99}
    del about["sha256"]
    (state / "state.json").write_text(json.dumps({**about, "sha256": saved_states._hash_contents(about)}))
    with pytest.raises(RunError, match=r"layout 99; this version reads 2\. Finish the run with the version"):
        load(three)


def test_a_state_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.last.mkdir()
    (folder.last / "state.json").write_text('{"format": 1}')
    assert folder.has_last
    with pytest.raises(RunError, match=r"earlier version \(layout 1; this one reads 2\)\. Finish the run with"):
        load(folder)


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
    flush, calls = disk.flush, 0

    def killed(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            if not survives:
                shutil.copytree(folder.path, tmp_path / "left")
            raise Killed
        flush(path)

    with monkeypatch.context() as patch:
        patch.setattr("visling.train.state.flush", killed)
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
        monkeypatch.setattr("os.link", refuse)
    for _ in range(2):  # a resumed run does it again
        folder.keep(source, "detector")
        for kept in (folder.model, folder.models / "last", folder.models / "epoch-0001"):
            file = kept / "detector" / "model" / "weights"
            assert file.read_text() == "weights"
            assert file.samefile(folder.model / "detector" / "model" / "weights") == (links or kept == folder.model)
            assert not (kept / "detector" / "log.jsonl").exists()
