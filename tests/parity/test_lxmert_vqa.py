"""VQA's rows, scores and dumps recorded from the official code of LXMERT and CVLP (`golden/{lxmert,cvlp}_tasks/vqa`).

Not as in the releases, on purpose:
- Records whose image has no features are not dropped: they stop a run, naming what is missing (`check_images`).
- The releases read `minival` with the first images of val's features alone and drop what lies behind; CVLP keeps that
  limit for the splits joined with it. Ours has no limit, so the dropped ids are checked to be those.
- A training label outside the list of answers has no score (a KeyError in the releases); predictions for missing,
  unknown or no ids are errors, where the releases divide by the number of predictions.
- Boxes that leave the picture are the business of the region reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetuning_runs import FEATURES, Data, Recorded, read_data
from torch.testing import assert_close

from visling.data.annotations.questions import QuestionRecord, read_lxmert_questions
from visling.data.corpora.base import check_images
from visling.data.text import TextLayout
from visling.errors import DataError, StoreError
from visling.metrics.answers import vqa_accuracy
from visling.regions.formats.tsv import RegionTsv
from visling.runtime import generator_for
from visling.tasks.vqa import VQA
from visling.types import Prediction, Record

FAMILIES = ("lxmert", "cvlp")


def recorded_of(golden: Path, family: str) -> Recorded:
    return Recorded(golden / f"{family}_tasks", family, "vqa")


def data_of(recorded: Recorded, splits: str, store: Path) -> Data:
    return read_data(recorded, recorded.read("training_run")["settings"], splits, store)


def cases(golden: Path, family: str) -> list[str]:
    return sorted(file.stem.removeprefix("rows_") for file in (golden / f"{family}_tasks" / "vqa").glob("rows_*.json"))


def is_beyond_minival(recorded: Recorded, record: Record, kept: set[str]) -> bool:
    """Whether the image of a record lies behind all those of val that the release has read."""
    names = [name for name, *_ in RegionTsv(recorded.root / "data" / FEATURES["vqa"][1]).images()]
    last = max(names.index(name) for name in kept if name in names)
    return record.images[0] in names[last + 1 :]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows(golden: Path, tmp_path: Path, family: str) -> None:
    recorded = recorded_of(golden, family)
    assert len(cases(golden, family)) >= 5
    for case in cases(golden, family):
        expected, arrays = recorded.read(f"rows_{case}"), recorded.arrays(f"rows_{case}")
        splits = expected["splits"]
        data = data_of(recorded, splits, tmp_path / case)
        kept, dropped = ([str(number) for number in expected[name]] for name in ("kept_ids", "dropped_ids"))
        assert len(data.records) == expected["loaded"]
        assert [name for name in data.records if name in kept] == kept
        assert [name for name in data.records if name not in kept] == dropped
        images = {data.records[name].images[0] for name in kept}
        for name in dropped:
            record = data.records[name]
            if record.images[0] in data.store:
                assert "minival" in splits.split(",")
                assert is_beyond_minival(recorded, record, images)
            else:
                with pytest.raises(StoreError, match=record.images[0]):
                    check_images([record], data.store)
        compare_rows(data, kept, expected, arrays)


def compare_rows(data: Data, kept: list[str], expected: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    records = [data.records[name] for name in kept]
    assert all(isinstance(record, QuestionRecord) for record in records)
    assert [getattr(record, "question", None) for record in records] == expected["sentences"]
    batch, targets = data.collate(kept)
    assert batch.regions is not None
    assert_close(batch.regions.features, torch.from_numpy(arrays["features"]), rtol=0, atol=1e-6)
    assert_close(batch.regions.boxes, torch.from_numpy(arrays["boxes"]), rtol=0, atol=1e-5)
    assert data.task.labelled(records) == ("targets" in expected)
    if "targets" in expected:
        assert targets.answer is not None
        assert_close(targets.answer, torch.tensor(expected["targets"]), rtol=0, atol=1e-6)
        assert_close(targets.answer, torch.from_numpy(arrays["target"]), rtol=0, atol=1e-6)
    else:
        assert targets.answer is None


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens(golden: Path, family: str) -> None:
    recorded = recorded_of(golden, family)
    arrays = recorded.arrays("tokens_train")
    layout = TextLayout(recorded.tokenizer, recorded.inputs(recorded.read("training_run")["settings"]))
    task, rng = recorded.build_task(), generator_for(0)
    records = recorded.records("train")
    ids, mask, segments = (arrays[name] for name in ("input_ids", "input_mask", "segment_ids"))
    assert len(records) == len(ids)
    for record, row_ids, row_mask, row_segments in zip(records, ids, mask, segments, strict=True):
        row = task.example(record, layout, rng).rows[0]
        length = len(row.ids)
        assert row_mask.sum() == length
        np.testing.assert_array_equal(row.ids, row_ids[:length])
        np.testing.assert_array_equal(row.segments, row_segments[:length])
    assert layout.truncated == int((np.array(mask).sum(1) == layout.spec.max_tokens).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_dumps(golden: Path, family: str) -> None:
    recorded = recorded_of(golden, family)
    evaluator = recorded.read("evaluator")
    records = [record for record in recorded.records(evaluator["split"]) if isinstance(record, QuestionRecord)]
    task = recorded.build_task()
    assert isinstance(task, VQA)
    compared = 0
    for case in evaluator["cases"]:
        given = {str(name): answer for name, answer in case["predictions"]}
        answered = [record for record in records if record.id in given]
        assert vqa_accuracy(given, answered).overall.value == pytest.approx(case["score"], abs=1e-9)
        predictions = [Prediction(id=name, value=answer, confidence=1.0) for name, answer in given.items()]
        score = task.report(predictions, answered).scores["accuracy"].value
        assert score == pytest.approx(100 * case["score"], abs=0.005)
        if len(answered) < len(records):
            compared += 1
            with pytest.raises(DataError, match="missing"):
                task.report(predictions, records)
        else:
            written = recorded.read(evaluator["dump_file"].removesuffix(".json"))
            assert task.submission(predictions) == written
    assert compared
    with pytest.raises(DataError, match="in excess"):
        task.report([Prediction(id="0", value="yes", confidence=1.0)], records[:0])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_outside_the_list_has_no_score(golden: Path, tmp_path: Path, family: str) -> None:
    recorded = recorded_of(golden, family)
    facts = {fact["what"]: fact["result"] for fact in recorded.read("evaluator")["facts"]}
    assert facts["answer outside the list in a training label"].startswith("KeyError")
    file = tmp_path / "train.json"
    file.write_text('[{"question_id": 1, "img_id": "9", "sent": "where?", "label": {"not listed": 1, "yes": 0.3}}]')
    (record,) = read_lxmert_questions(file)
    layout = TextLayout(recorded.tokenizer, recorded.inputs(recorded.read("training_run")["settings"]))
    scores = recorded.build_task().example(record, layout, generator_for(0)).labels["answer"]
    assert scores.indices.tolist() == [recorded.answers.index("yes")]
    assert scores.scores.tolist() == pytest.approx([0.3])
