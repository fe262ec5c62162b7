"""Explanations judged over a data set: areas that are known beforehand, intervals over images, and the same numbers
whatever the batches."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.relevance_models import COUNTS, LENGTHS, build, make_batch, records_of, vqa
from fixtures.relevance_recordings import EveryAnswer
from torch import Tensor

from visling.analysis import judging
from visling.analysis.judging import Judgement, judge
from visling.analysis.relevance import METHODS, Explanation, Scores
from visling.analysis.removal import FRACTIONS, area_under, count_kept
from visling.data.batches.shown import ShownExamples
from visling.errors import ConfigError, DataError
from visling.runs.examples import open_run
from visling.tasks.retrieval import Retrieval
from visling.types import Batch, Example, Prediction, Record, TextRow

NEEDLE = 2
"""The region on which the right answer depends, of images that have it."""


class FindNeedle(EveryAnswer):
    """Answers "answer 1", which is right, while the needle can be seen."""

    def decode(self, logits: Mapping[str, Tensor], batch: Batch, records: Sequence[Record]) -> list[Prediction]:
        assert batch.regions is not None
        seen = (batch.regions.features[:, :, 0] > 50).any(1).tolist()
        return [
            Prediction(id=record.id, value=f"answer {int(there)}", confidence=1.0, top=((f"answer {int(there)}", 1.0),))
            for record, there in zip(records, seen, strict=True)
        ]

    def details(self, predictions: Sequence[Prediction], records: Sequence[Any]) -> list[dict[str, Any]]:
        return [{"id": one.id, "score": float(one.value == "answer 1")} for one in predictions]


def shown(task: EveryAnswer, rows: Sequence[int]) -> ShownExamples:
    """Some of the same four examples."""
    torch.manual_seed(3)
    batch = make_batch("lxmert")
    assert batch.regions is not None
    features = batch.regions.features.clone()
    features[:, NEEDLE, 0] = 100.0
    batch = dataclasses.replace(
        batch, regions=dataclasses.replace(batch.regions, features=features * batch.regions.mask[..., None])
    )
    examples = [
        Example(
            id=str(n),
            images=(f"{n}-0",),
            rows=(TextRow(ids=batch.text.ids[n, : LENGTHS[n]].numpy(), segments=np.zeros(LENGTHS[n], np.int64)),),
        )
        for n in rows
    ]
    records = records_of(task, len(LENGTHS))
    return ShownExamples(
        numbers=list(rows),
        records=[records[n] for n in rows],
        examples=examples,
        batch=batch.map(lambda tensor: tensor[list(rows)]),
        regions=[[] for _ in rows],
    )


def oracle(
    model: object, task: object, batch: Batch, records: Sequence[Record], *, methods: Sequence[str], **options: Any
) -> list[Explanation]:
    """Relevance and contrast know the needle, attention takes the regions in their order, all else is blind."""
    found = []
    for record, words, regions in zip(records, batch.text.mask.sum(1), batch.regions.mask.sum(1), strict=True):
        scores = {name: np.zeros(int(regions), np.float32) for name in methods}
        for name in {"relevance", "contrast"} & set(methods):
            scores[name][NEEDLE : NEEDLE + 1] = 1.0
        if "raw_attention" in methods:
            scores["raw_attention"] = -np.arange(int(regions), dtype=np.float32)
        text = np.zeros(int(words), np.float32)
        by_place = {name: ((Scores(text=text, regions=values),),) for name, values in scores.items()}
        found.append(
            Explanation(prediction=Prediction(id=record.id, value="", confidence=1.0), scores=by_place, against=())
        )
    return found


@pytest.fixture
def task() -> FindNeedle:
    plain = vqa()
    return FindNeedle(plain.config, plain.answers)


def curve(found: Judgement, part: str, method: str, order: str) -> judging.JudgedCurve:
    (one,) = [one for one in found.curves if (one.part, one.method, one.order) == (part, method, order)]
    return one


def test_areas_are_those_that_follow_from_what_is_removed(task: FindNeedle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "explain", oracle)
    model = build("lxmert", task)
    found = judge(model, task, [shown(task, [0, 1]), shown(task, [2])], seeds=40)
    assert found.questions == {"regions": 3, "text": 3}
    assert found.images == 3
    assert found.fractions == FRACTIONS
    counts = COUNTS[:3]
    kept = {count: [count_kept(count, fraction) for fraction in FRACTIONS] for count in counts}

    def mean(rule: Any) -> list[float]:
        return [
            100 * float(np.mean([rule(count, kept[count][at]) for count in counts])) for at in range(len(FRACTIONS))
        ]

    expected = {
        ("relevance", "most_first"): mean(lambda count, left: left == count),
        ("relevance", "least_first"): mean(lambda count, left: left > 0),
        ("contrast", "least_first"): mean(lambda count, left: left > 0),
        ("raw_attention", "most_first"): mean(lambda count, left: count - left <= NEEDLE),
        ("raw_attention", "least_first"): mean(lambda count, left: left > NEEDLE),
    }
    for (method, order), accuracy in expected.items():
        one = curve(found, "regions", method, order)
        assert one.accuracy == pytest.approx(accuracy)
        assert one.area.value == pytest.approx(area_under(FRACTIONS, accuracy))
        assert one.area.low is not None
        assert one.area.high is not None
        assert one.area.low <= one.area.value <= one.area.high
    chance = curve(found, "regions", "random", "random")
    assert chance.accuracy == pytest.approx(mean(lambda count, left: left / count), abs=15)
    assert chance.gain == {}
    best, worst = (
        curve(found, "regions", "relevance", "most_first"),
        curve(found, "regions", "relevance", "least_first"),
    )
    raw = curve(found, "regions", "raw_attention", "most_first")
    assert best.gain["random"].value == pytest.approx(chance.area.value - best.area.value)
    assert worst.gain["random"].value == pytest.approx(worst.area.value - chance.area.value)
    assert best.gain["raw_attention"].value == pytest.approx(raw.area.value - best.area.value)
    assert set(raw.gain) == {"random"}
    assert best.gain["raw_attention"].value > 0 < worst.gain["raw_attention"].value
    assert {one.method for one in found.curves} == {*METHODS, "random"}
    assert all(score == 100 for one in found.curves if one.part == "text" for score in one.accuracy)
    assert json.loads(json.dumps(found.to_json()))["curves"][0]["area"]["count"] == 3


def test_batches_do_not_matter(task: FindNeedle) -> None:
    model = build("lxmert", task)
    together = judge(model, task, [shown(task, [0, 1, 2, 3])], methods=["input_gradient"], seeds=2)
    apart = judge(model, task, [shown(task, [n]) for n in range(4)], methods=["input_gradient"], seeds=2)
    assert together == apart
    assert {one.method for one in together.curves} == {"input_gradient", "raw_attention", "random"}


def test_a_part_that_no_example_has_is_left_out(task: FindNeedle) -> None:
    def blind(one: ShownExamples) -> ShownExamples:
        return dataclasses.replace(one, batch=dataclasses.replace(one.batch, regions=None))

    plain = vqa()

    class Right(EveryAnswer):
        def details(self, predictions: Sequence[Prediction], records: Sequence[Any]) -> list[dict[str, Any]]:
            return [{"id": one.id, "score": 1.0} for one in predictions]

    found = judge(build("lxmert", plain), Right(plain.config, plain.answers), [blind(shown(task, [0, 1]))], seeds=1)
    assert found.questions == {"regions": 0, "text": 2}
    assert {one.part for one in found.curves} == {"text"}


def test_what_cannot_be_judged_is_refused(task: FindNeedle) -> None:
    model = build("lxmert", task)
    with pytest.raises(DataError, match=r"example 0-0 has no label, so that no answer to it is right or wrong"):
        judge(model, vqa(), [shown(task, [0])])
    with pytest.raises(ConfigError, match=r"the task retrieval ranks all texts and images"):
        judge(model, Retrieval(), [shown(task, [0])])


def test_nothing_removed_gives_the_accuracy_of_the_evaluation(world: Any) -> None:
    """On scenes, with a real task."""
    opened = open_run(world.vqa, split="test", device="cpu")
    assert opened.model is not None
    done: list[int] = []
    found = judge(
        opened.model, opened.task, opened.batches(batch_size=5), methods=["relevance"], seeds=1, progress=done.append
    )
    predictions = [one for batch in predict(opened) for one in batch]
    report = opened.task.report(predictions, opened.records)
    assert done[-1] == len(opened.records)
    for one in found.curves:
        assert one.accuracy[0] == pytest.approx(report.scores["accuracy"].value, abs=1e-4)


def predict(opened: Any) -> Iterator[list[Prediction]]:
    for one in opened.batches(batch_size=5):
        yield opened.task.decode(opened.model(one.batch), one.batch.unshared(), one.records)
