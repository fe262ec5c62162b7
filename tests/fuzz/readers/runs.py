"""Files of runs: what they say of themselves, their logs and their results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz.promises import check_texts
from fuzz.readers.base import ARRAYS_MEMORY, Reader, writes_all, writes_json, writes_lines, writes_text

from visling.analysis.head_quantities import read_grounding
from visling.analysis.run_files import RunFiles
from visling.errors import ConfigError
from visling.metrics.vcr import ANSWER_COLUMNS, RATIONALE_COLUMNS, read_submission
from visling.runs.compare import read_comparison
from visling.runs.examples import read_run_json
from visling.runs.own_files import OwnFiles
from visling.runs.retrieve import read_shortlist
from visling.tasks.answers import read_predictions
from visling.train import log
from visling.train.saved_states import SavedStates
from visling.train.snapshot import Snapshot
from visling.train.state import RunFolder
from visling.types import Record

_RUN = {
    "status": "finished", "started": "2026-11-30T10:00:00+00:00", "finished": "2026-11-30T11:00:00+00:00",
    "data": ["/data/vqa"], "store": "/data/store", "task": "vqa", "config": {"train": {"max_steps": 4}, "seed": 0},
    "files": {"train": "/data/train.jsonl", "valid": 0.1},
}  # fmt: skip
_LOG = (
    {"kind": "train", "step": 1, "loss": 0.5, "lr": 1e-4},
    {"kind": "valid", "step": 1, "scores": {"accuracy": 50.0}},
    {"kind": "event", "step": 1, "message": "saved"},
)
_DETAILS = tuple(
    {"id": str(number), "prediction": "yes", "confidence": 0.5, "top": [["yes", 0.5], ["no", 0.25]], "score": 1.0}
    for number in range(2)
)


def _is_object(found: Any) -> None:
    assert isinstance(found, dict)


def _read_run(folder: Path) -> None:
    assert isinstance(RunFiles.read(folder).training_seconds(), float | None)


def _read_own_files(folder: Path) -> None:
    try:
        OwnFiles.from_run(read_run_json(folder))
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error  # what was read has no name any more


def _read_log(folder: Path) -> None:
    for entry in log.read(folder / "log.jsonl"):
        assert isinstance(entry, dict)


def _read_predictions(folder: Path) -> None:
    for prediction in read_predictions(folder / "details_val.jsonl"):
        check_texts([prediction.id])


def _save_states(folder: Path) -> None:
    states = SavedStates(folder / "last")
    for step in (1, 2):
        weights = {"a": torch.full((3,), float(step))}
        optimizer = {
            "state": {"a": {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}},
            "groups": [{"params": ["a"]}],
        }
        snapshot = Snapshot(weights=weights, ties={"b": "a"}, optimizer=optimizer, averages=weights)
        states.write(step, snapshot, {"state": {"step": step}, "position": {"epoch": 0}}, keep=2)


def _read_states(folder: Path) -> None:
    """A damaged state is passed over, with a note, for the one before it."""
    found = SavedStates(folder / "last").read()
    step = found.about["state"]["step"]
    assert found.snapshot.weights["a"].tolist() == [step] * 3
    assert found.snapshot.averages is not None
    assert found.snapshot.averages["a"].tolist() == [step] * 3
    assert step == 2 or "the state of step 2 is left out" in found.notes[0]


def _save_scores(folder: Path) -> None:
    np.savez(folder / "scores.npz", scores=np.zeros((2, 2)), images=np.array(["a", "b"]), texts=np.array(["1", "2"]))


def _read_scores(folder: Path) -> None:
    records = [Record(id="1", images=("a",)), Record(id="2", images=("b",))]
    assert read_shortlist(folder / "scores.npz", records, 1).shape == (2, 2)


def _read_submission(folder: Path) -> None:
    try:
        text = (folder / "x.csv").read_text(encoding="utf-8", errors="replace")
        for answers, rationales in read_submission(text).values():
            assert answers.shape == (4,)
            assert rationales.shape == (4, 4)
    except ValueError as error:
        raise type(error)(f"{folder}: {error}") from error  # a text has no name


_SUBMISSION = ",".join(("annot_id", *ANSWER_COLUMNS, *RATIONALE_COLUMNS)) + "\na," + ",".join(["0.25"] * 20) + "\n"


def _read(read: Callable[[Path], Any], name: str = "") -> Callable[[Path], None]:
    return lambda folder: _is_object(read(folder / name))


READERS = (
    Reader("runs, run.json", writes_json("run.json", _RUN), _read(read_run_json)),
    Reader(
        "runs, run.json by the engine",
        writes_json("run.json", _RUN),
        lambda folder: _is_object(RunFolder(folder).read()),
    ),
    Reader(
        "runs, files of one's own",
        writes_json("run.json", _RUN),
        _read_own_files,
    ),
    Reader("states, two of a run", _save_states, _read_states),
    Reader("runs, log.jsonl", writes_lines("log.jsonl", *_LOG), _read_log),
    Reader(
        "runs, everything for a report",
        writes_all(
            writes_json("run.json", _RUN),
            writes_lines("log.jsonl", *_LOG),
            writes_lines("details_val.jsonl", *_DETAILS),
        ),
        _read_run,
    ),
    Reader("runs, details", writes_lines("details_val.jsonl", *_DETAILS), _read_predictions),
    Reader(
        "runs, comparison.json",
        writes_json("comparison.json", {"plan": {}, "rows": [1]}),
        lambda folder: _is_object(read_comparison(folder / "comparison.json")),
    ),
    Reader(
        "runs, alignment.json",
        writes_json(
            "a.json",
            {"format": "visling-alignment-1", "checkpoint": "x", "layers": ["0"], "phrases": {"accuracy": [[50.0]]}},
        ),
        lambda folder: check_texts([read_grounding(folder / "a.json")[0]]),
    ),
    Reader("runs, scores of pairs", _save_scores, _read_scores, least_memory=ARRAYS_MEMORY),
    Reader("CSV, a submission of VCR", writes_text("x.csv", _SUBMISSION), _read_submission),
)
