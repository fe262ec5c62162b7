"""Runs that torchrun starts again continue by themselves, but nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest

from visling import runtime
from visling.cli.printing import claim_store
from visling.errors import RunError
from visling.train.restarts import MARK, mark_begun, was_restarted
from visling.train.state import RunFolder


def by_torchrun(patch: pytest.MonkeyPatch, name: str = "none") -> None:
    patch.setenv("TORCHELASTIC_RUN_ID", name)


def test_nothing_is_marked_without_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert runtime.launch() is None
    mark_begun(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not was_restarted(tmp_path)


@pytest.mark.parametrize("name", ["none", "job-17"])
def test_a_restart_knows_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    by_torchrun(monkeypatch, name)
    assert not was_restarted(tmp_path), "it is the first start"
    mark_begun(tmp_path)
    assert was_restarted(tmp_path)
    by_torchrun(monkeypatch, "job-18")
    assert not was_restarted(tmp_path)
    assert not was_restarted(tmp_path / "none")


@pytest.mark.parametrize("left", [(), ("run.json.part",), ("run.json", "log.jsonl")])
def test_a_run_is_claimed_again_in_any_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: tuple[str, ...]
) -> None:
    by_torchrun(monkeypatch)
    folder = RunFolder.create(tmp_path / "run")
    (folder.path / "run.json").unlink()
    for name in left:
        (folder.path / name).write_text('{"status": "running"}\n')
    assert RunFolder.create(tmp_path / "run").read()["status"] == "running"


def test_what_lay_there_before_is_refused_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    RunFolder.create(tmp_path / "run")
    by_torchrun(monkeypatch)
    for _ in range(2):
        with pytest.raises(RunError, match="is not empty"):
            RunFolder.create(tmp_path / "run")
    assert not (tmp_path / "run" / MARK).exists()


def test_a_store_is_continued_by_a_restart_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_torchrun(monkeypatch)
    claim_store(tmp_path / "store", resume=False)
    (tmp_path / "store" / "parts").mkdir()
    claim_store(tmp_path / "store", resume=False)
    by_torchrun(monkeypatch, "another")
    with pytest.raises(RunError, match="is not empty"):
        claim_store(tmp_path / "store", resume=False)
