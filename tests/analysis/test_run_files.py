"""Reading a run folder: its files in order, what it lacks in words, and nothing fatal but an absent folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from visling.analysis.run_files import RunFiles, as_mapping, as_number, score_value
from visling.errors import RunError


def test_a_finished_run_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "finished", "images": "pictures"}')
    entries = [
        {"kind": "train", "step": 1, "seconds": 2.5},
        {"kind": "valid", "step": 1},
        {"kind": "event", "message": "ended"},
        {"kind": "odd"},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for split in ("train", "val", "test"):
        (tmp_path / f"evaluation_{split}.json").write_text('{"scores": {}}')
        (tmp_path / f"details_{split}.jsonl").write_text('{"id": 1}\n\n')
    run = RunFiles.read(tmp_path)
    assert (len(run.train), len(run.valid), run.events) == (1, 1, ["ended"])
    assert list(run.evaluations) == list(run.details) == ["test", "val", "train"], "the test split represents the run"
    assert run.details["val"] == [{"id": 1}]
    assert (run.training_seconds(), run.image_folder(), run.open_store()) == (2.5, Path("pictures"), None)
    assert run.missing == []


def test_what_an_unfinished_run_lacks_is_listed(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "running", "store": "gone", "started": "2030-01-01T10:00:00"}')
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 7}\n{"kind": "tr')
    run = RunFiles.read(tmp_path)
    assert run.training_seconds() is None
    assert run.open_store() is None
    assert run.missing == [
        "log.jsonl: 1 incomplete line left out",
        "the run has not finished; its last record is step 7",
        "no evaluation yet: there are no test scores",
        "the region store of this run cannot be opened: images are shown without regions",
    ]
    with pytest.raises(RunError, match="no run folder"):
        RunFiles.read(tmp_path / "gone")


def test_another_run_becomes_a_baseline(tmp_path: Path) -> None:
    for name, splits in (("full", ("test", "val")), ("blind", ("test",))):
        (tmp_path / name).mkdir()
        for split in splits:
            (tmp_path / name / f"evaluation_{split}.json").write_text(json.dumps({"scores": {"accuracy": 3.0}}))
    full, blind = RunFiles.read(tmp_path / "full"), RunFiles.read(tmp_path / "blind")
    full.add_baseline(blind)
    assert full.evaluations["test"]["baselines"] == {"blind": {"scores": {"accuracy": 3.0}}}
    assert "baselines" not in full.evaluations["val"]
    assert "blind has not been evaluated on val: it has no column there" in full.missing


def test_values_of_a_wrong_shape_count_as_absent() -> None:
    assert [as_number(value) for value in (1, 2.5, True, "3", float("nan"), None)] == [1.0, 2.5, None, None, None, None]
    assert as_mapping([1]) == {}
    assert [score_value(cell) for cell in (4, {"value": 5, "count": 9}, {"count": 9}, "x")] == [4.0, 5.0, None, None]
