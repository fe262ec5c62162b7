"""Finding tasks by name, joining predictions with records, the report's written form, examples without images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.data.annotations.nlvr import NlvrRecord
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError
from visling.tasks.base import (
    JoinedRecords,
    Report,
    Score,
    Task,
    TaskSource,
    TextOnly,
    by_id,
    load,
    names,
    read_records,
)
from visling.tasks.nlvr import NLVR
from visling.tasks.vqa import VQA
from visling.types import InputSpec, Prediction, Record


def test_tasks_load_by_name() -> None:
    assert load("vqa") is VQA
    assert load("nlvr") is NLVR
    assert load("visling.tasks.vqa") is VQA
    assert {"nlvr", "vqa"} <= set(names())
    assert "base" not in names()
    for name in names():
        assert load(name).name == name
        assert issubclass(load(name), Task)


@pytest.mark.parametrize(
    ("name", "message"),
    [("vqaa", "Did you mean 'vqa'"), ("my_task.vqa", "no task 'my_task.vqa'"), ("base", "offers no task")],
)
def test_unknown_tasks_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(name)


def test_a_task_of_ones_own_loads_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "own_visling_tasks"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "weather.py").write_text(
        "from visling.tasks.vqa import VQA\nclass Weather(VQA):\n    name = 'weather'\nTASK = Weather\n"
    )
    (package / "broken.py").write_text("import a_module_that_is_not_installed\n")
    (package / "empty.py").write_text("TASK = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load("own_visling_tasks.weather").name == "weather"
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_installed"):
        load("own_visling_tasks.broken")
    with pytest.raises(ConfigError, match="offers no task"):
        load("own_visling_tasks.empty")


def test_report_has_the_written_form() -> None:
    report = Report(scores={"accuracy": Score(62.5, 8)}, by={"question_type": {"how many": Score(50.0, 4)}})
    assert json.loads(json.dumps(report.to_dict("vqa", "val"))) == {
        "task": "vqa",
        "split": "val",
        "scores": {"accuracy": {"value": 62.5, "count": 8}},
        "by": {"question_type": {"how many": {"value": 50.0, "count": 4}}},
    }


def _prediction(name: str) -> Prediction:
    return Prediction(id=name, value=name, confidence=1.0)


def test_predictions_meet_their_records_by_id() -> None:
    records = [Record(id=name, images=()) for name in ("a", "b")]
    assert [(p.value, r.id) for p, r in by_id([_prediction("b"), _prediction("a")], records)] == [
        ("a", "a"),
        ("b", "b"),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [("a", "1 missing, 0 in excess, first 'b'"), ("abc", "1 in excess, first 'c'"), ("abb", "3 predictions .2 diff")],
)
def test_predictions_must_cover_the_records(given: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        by_id([_prediction(name) for name in given], [Record(id=name, images=()) for name in "ab"])


def test_source_can_leave_the_images_out() -> None:
    layout = TextLayout(Tokenizer(), InputSpec())
    record = NlvrRecord(
        id="dev-1-0-0",
        images=("dev-1-0-0",),
        sentence="a box",
        label=True,
        identifier="1-0",
        presentation="1",
        official=True,
    )
    rng = np.random.default_rng(0)
    seen = TaskSource(NLVR(), [record], layout)
    blind = TextOnly(TaskSource(NLVR(), [record], layout))
    assert len(seen) == len(blind) == 1
    assert seen.example(0, rng).images == ("dev-1-0-0",)
    assert blind.example(0, rng).images == ()
    assert blind.example(0, rng).labels == seen.example(0, rng).labels == {"answer": 1}


def test_several_splits_are_read_as_one() -> None:
    class Splits:
        def records(self, root: Path, split: str) -> list[Record]:
            return [Record(id=f"{split}{number}", images=()) for number in range(2)] + [Record(id=split[-1], images=())]

    task: Any = Splits()
    joined = ["train0", "train1", "n", "val0", "val1", "l"]
    assert [record.id for record in read_records(task, Path(), "train+val")] == joined
    assert [record.id for record in read_records(task, Path(), "train,val")] == joined
    assert [record.id for record in read_records(task, Path(), "test-dev2015")] == [
        "test-dev20150",
        "test-dev20151",
        "5",
    ]
    with pytest.raises(
        DataError, match=r"example 'n' of \. is in more than one of the splits train, nen: leave one out"
    ):
        read_records(task, Path(), "train+nen")


def test_joined_records_are_those_of_their_parts() -> None:
    whole = [Record(id=str(number), images=()) for number in range(5)]
    joined = JoinedRecords(whole[:2], [], whole[2:])
    assert len(joined) == 5
    assert list(joined) == [joined[place] for place in range(5)] == whole
    assert joined[-1] == whole[-1]
    assert joined[1:4] == whole[1:4]
    with pytest.raises(IndexError):
        joined[5]
    assert len(JoinedRecords[Record]()) == 0
