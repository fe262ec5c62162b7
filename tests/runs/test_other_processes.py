"""Runs that 1, 2, 4 and again 1 processes carry out one after the other train what one process would have trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures import shared_runs
from fixtures.groups import run_group

from visling.train.log import read

PROCESSES = (1, 2, 4, 1)
KINDS = ("pretrain", "finetune", "multitask")

pytestmark = pytest.mark.slow


def share(count: int, parts: list[dict[str, Any]]) -> None:
    """Carry out parts of runs in a group of processes."""
    run_group(count, shared_runs.__file__, json.dumps(parts), timeout=400)


@pytest.fixture(scope="module")
def runs(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KIND/whole and KIND/parts, and pretrain/dropped, in which dropout is on; each part makes some three updates."""
    path = tmp_path_factory.mktemp("runs")
    text = path / "text.doc"
    text.write_text("".join(f"the {colour} circle is left of the star .\n" for colour in ("red", "blue") * 20))
    places = {"scenes": str(world.scenes), "regions": str(world.regions), "text": str(text)}
    for number, count in enumerate(PROCESSES):
        last = number == len(PROCESSES) - 1
        parts = [{"kind": kind, "out": str(path / kind / "parts"), "places": places} for kind in KINDS]
        parts.append({"kind": "pretrain", "out": str(path / "pretrain" / "dropped"), "places": places, "dropout": True})
        for part in parts:
            # Calls of the step until four updates have begun, of which an even number has been saved
            calls = {"finetune": {1: 2, 2: 1, 4: 1}, "pretrain": {1: 1, 2: 1, 4: 1}, "multitask": {1: 1, 2: 1, 4: 1}}
            part["at"] = 0 if last else 3 * calls[str(part["kind"])][count] + 1
        if number == 0:
            parts += [{"kind": kind, "out": str(path / kind / "whole"), "places": places} for kind in KINDS]
        share(count, parts)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_one_process(runs: Path, kind: str) -> None:
    whole, parts = (read(runs / kind / name / "log.jsonl") for name in ("whole", "parts"))
    trained, expected = ([line for line in lines if line["kind"] == "train"] for lines in (parts, whole))
    assert len(trained) == len(expected) >= 9
    for one, other in zip(trained, expected, strict=True):
        assert (one["step"], one["epoch"]) == (other["step"], other["epoch"])
        assert one["lr"] == pytest.approx(other["lr"])
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["parts"] == pytest.approx(other["parts"], abs=1e-5)
    assert json.loads((runs / kind / "parts" / "run.json").read_text())["status"] == "finished"


def test_what_started_a_run_stays_recorded_and_the_log_says_who_continued_it(runs: Path) -> None:
    about = json.loads((runs / "pretrain" / "parts" / "run.json").read_text())
    assert (about["processes"], about["global_batch"]) == (1, {"images": 4, "text": 4})
    assert (about["config"]["batch_size"], about["config"]["train"]["accumulation"]) == (4, 1)
    events = [line["message"] for line in read(runs / "pretrain" / "parts" / "log.jsonl") if line["kind"] == "event"]
    said = [event for event in events if event.startswith("resumed at step")]
    assert [event.partition(" of 12")[2].partition(".")[0] for event in said] == [
        " by 2 processes, started by 1: batches of 2 images and 2 text, 1 per update",
        " by 4 processes, started by 1: batches of 1 images and 1 text, 1 per update",
        "",
    ]


def test_with_dropout_it_trains_on(runs: Path) -> None:
    lines = [line for line in read(runs / "pretrain" / "dropped" / "log.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 13))
