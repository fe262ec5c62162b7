"""Asking again without words or regions: the same as asking a shorter question in the first place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.relevance_models import COUNTS, LENGTHS, VARIANTS, build, make_batch, records_of, vqa
from torch.testing import assert_close

from visling import api
from visling.analysis.relevance import METHODS, explain
from visling.analysis.relevance_rules import Rules
from visling.analysis.removal import (
    FRACTIONS,
    Asked,
    Asker,
    area_under,
    keep,
    leave_one_out,
    list_rows_read,
    probability,
    removable_tokens,
    removal_curves,
    without,
)
from visling.errors import DataError
from visling.tasks.grounding import PhraseGrounding
from visling.tasks.nlvr2 import NLVR2, Nlvr2Config
from visling.tasks.referring import Referring
from visling.tasks.vcr import VCR
from visling.types import Batch, Example, Prediction, TextRow

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def examples_of(batch: Batch, *, images: int = 1, group: int = 1) -> list[Example]:
    """Examples whose first and last tokens are special."""
    at, phrases = batch.text.answer_at, batch.phrases
    rows = [
        TextRow(
            ids=batch.text.ids[number, :length].numpy(),
            segments=np.zeros(length, np.int64),
            words=np.array([-1, *range(length - 2), -1]),
            answer_at=None if at is None else int(at[number]),
            phrases=() if phrases is None else tuple(phrases.at[number][phrases.mask[number]].tolist()),
        )
        for number, length in enumerate(LENGTHS)
    ]
    return [
        Example(id=str(n), rows=tuple(rows[n : n + group]), images=tuple(f"{n}-{k}" for k in range(images)))
        for n in range(0, len(rows), group)
    ]


def pick(batch: Batch, row: int, tokens: Sequence[int], regions: Sequence[int]) -> Batch:
    """One row with these tokens and regions alone, put together by hand."""
    text, shown, slots = batch.text, batch.regions, batch.phrases
    assert shown is not None
    words, seen = [*tokens], [*regions]
    return dataclasses.replace(
        batch,
        text=dataclasses.replace(
            text,
            ids=text.ids[row, words][None],
            mask=text.mask[row, words][None],
            segments=text.segments[row, words][None],
            answer_at=None if text.answer_at is None else torch.tensor([words.index(int(text.answer_at[row]))]),
            task=None if text.task is None else text.task[row : row + 1],
        ),
        regions=dataclasses.replace(
            shown,
            features=shown.features[row, seen][None],
            boxes=shown.boxes[row, seen][None],
            mask=shown.mask[row, seen][None],
            size=shown.size[row : row + 1],
        ),
        phrases=None
        if slots is None
        else dataclasses.replace(
            slots,
            at=torch.tensor(
                [
                    [
                        words.index(at) if there else 0
                        for at, there in zip(slots.at[row].tolist(), slots.mask[row].tolist(), strict=True)
                    ]
                ]
            ),
            mask=slots.mask[row : row + 1],
        ),
    )


KEPT: Sequence[tuple[Sequence[int], Sequence[int]]] = (
    ((0, 1, 3, 4, 5, 6), (0, 2, 4)), ((0, 2, 3), (0, 1, 2)), ((0, 2, 4, 5), ()), ((0, 3, 4), (0,)),
)  # fmt: skip
"""Tokens and regions of each row that stay; what answers and what is grounded is among them."""


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["vqa", "referring", "grounding"])
def test_what_is_cut_out_was_never_there(variant: str, kind: str) -> None:
    task = {"vqa": vqa, "referring": Referring, "grounding": PhraseGrounding}[kind]()
    model = build(variant, task)
    slot = VARIANTS[variant][0] in ("visualbert", "vilbert", "vlbert") and kind == "vqa"
    batch = make_batch(variant, slot=slot, phrases=kind == "grounding")
    tokens, regions = torch.zeros_like(batch.text.mask), torch.zeros(len(COUNTS), max(COUNTS), dtype=torch.bool)
    for row, (kept, seen) in enumerate(KEPT):
        tokens[row, list(kept)] = True
        regions[row, list(seen)] = True
    smaller = keep(batch, tokens, regions)
    smaller.validate()
    assert smaller.text.ids.shape[1] == max(len(kept) for kept, _ in KEPT)
    found = model(smaller)
    for row, (kept, seen) in enumerate(KEPT):
        if not seen:
            continue
        (name, expected), ours = next(iter(model(pick(batch, row, kept, seen)).items())), found
        if kind == "vqa":
            assert_close(ours[name][row], expected[0], **CLOSE)
        elif kind == "referring":
            assert_close(ours[name][row, : len(seen)], expected[0, : len(seen)], **CLOSE)
        else:
            assert smaller.phrases is not None
            slots = smaller.phrases.mask[row]
            assert_close(ours[name][row, slots][:, : len(seen)], expected[0, slots], **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_region_left_is_an_image_without_regions(variant: str) -> None:
    task = vqa()
    model, batch = build(variant, task), make_batch(variant)
    none = torch.zeros(len(COUNTS), max(COUNTS), dtype=torch.bool)
    found = model(keep(batch, batch.text.mask, none))["classify"]
    assert batch.regions is not None
    emptied = dataclasses.replace(batch.regions, mask=none)
    assert found.isfinite().all()
    assert_close(found, model(dataclasses.replace(batch, regions=emptied))["classify"], **CLOSE)


def test_links_follow_their_tokens_and_regions() -> None:
    batch = make_batch("visualbert")
    links = torch.zeros(len(LENGTHS), max(LENGTHS), max(COUNTS), dtype=torch.bool)
    links[0, 3, 2] = links[0, 1, 4] = True
    tokens, regions = batch.text.mask.clone(), torch.ones(len(COUNTS), max(COUNTS), dtype=torch.bool)
    tokens[0, 2] = regions[0, 0] = regions[0, 4] = False
    kept = keep(dataclasses.replace(batch, links=links), tokens, regions)
    kept.validate()
    assert kept.links is not None
    assert kept.links.nonzero().tolist() == [[0, 2, 1]]


def test_without_names_what_it_cannot_leave_out() -> None:
    batch = make_batch("visualbert", slot=True)
    example, first = examples_of(batch)[0], batch.map(lambda tensor: tensor[:1])
    shorter = without(first, example, tokens={0: [1, 3]}, regions={0: [0]})
    assert shorter.text.ids[0].tolist() == [int(first.text.ids[0, at]) for at in (0, 2, 4, 5, 6)]
    assert shorter.text.answer_at is not None
    assert shorter.text.answer_at.tolist() == [3]
    assert shorter.regions is not None
    assert shorter.regions.mask.sum() == COUNTS[0] - 1
    for wrong, said in (
        ({"tokens": {0: [0]}}, r"token 0 of row 0 cannot be left out: .* Those that can are 1, 2, 3, 4\."),
        ({"tokens": {0: [5]}}, "token 5 of row 0 cannot be left out"),
        ({"tokens": {0: [9]}}, "the row has 7 tokens"),
        ({"tokens": {1: [1]}}, "no row 1: the question has 1, counted from 0"),
        ({"regions": {0: [5]}}, "region 5 of row 0 cannot be left out: the row shows 5 regions"),
        ({"regions": {0: [-1]}}, "region -1 of row 0 cannot be left out"),
        ({"regions": {2: [0]}}, "no row 2"),
    ):
        with pytest.raises(DataError, match=said):
            without(first, example, **wrong)
    with pytest.raises(DataError, match="the row shows 0 regions"):
        without(dataclasses.replace(first, regions=None), example, regions={0: [0]})


def test_special_tokens_the_answer_and_phrases_always_stay() -> None:
    (example, *_), (grounded, *_) = (
        examples_of(make_batch("visualbert", slot=True)),
        examples_of(make_batch("visualbert", phrases=True)),
    )
    assert removable_tokens(example) == [[1, 2, 3, 4]]
    assert removable_tokens(grounded) == [[2, 4, 5]]
    unknown_words = dataclasses.replace(example, rows=(dataclasses.replace(example.rows[0], words=None),))
    assert removable_tokens(unknown_words) == [[1, 2, 3, 4]]


def test_the_area_is_that_of_trapezoids() -> None:
    assert area_under((0, 0.5, 1), (1, 0.5, 0)) == pytest.approx(0.5)
    assert area_under((0, 0.25, 1), (1, 0, 0)) == pytest.approx(0.125)
    assert area_under(FRACTIONS, [0.8] * len(FRACTIONS)) == pytest.approx(0.8)


def test_a_region_is_recognised_by_its_box() -> None:
    def say(value: Any, top: list[tuple[str, float]], boxes: list[tuple[float, ...]]) -> Prediction:
        return Prediction(id="1", value=value, confidence=top[0][1] if top else 0.3, top=tuple(top), boxes=tuple(boxes))

    one, two = (0.0, 0.0, 5.0, 5.0), (1.0, 1.0, 6.0, 6.0)
    pointed = say(one, [("3", 0.7), ("0", 0.3)], [one, two])
    assert probability(pointed, 0, say(two, [("0", 0.6), ("2", 0.4)], [two, one])) == 0.4
    assert probability(pointed, 0, say(two, [("3", 1.0)], [two])) == 0.0
    grounded = say("phrases", [("a star", 0.9), ("a ring", 0.8)], [one, two])
    again = say("phrases", [("a star", 0.5), ("a ring", 0.6)], [two, two])
    assert probability(grounded, 0, again) == 0.0
    assert probability(grounded, 1, again) == 0.6
    answered = say("red", [("red", 0.9), ("blue", 0.1)], [])
    assert probability(answered, 1, say("green", [("green", 0.6), ("blue", 0.2)], [])) == 0.2
    assert probability(answered, 0, say("green", [("green", 0.6), ("blue", 0.2)], [])) == 0.0
    assert probability(say(1.5, [], []), 0, say(0.2, [], [])) == 0.3


def test_each_question_is_asked_once_and_removed_in_order() -> None:
    task = vqa()
    model, batch = build("lxmert", task), make_batch("lxmert")
    asker = Asker(model, task, batch, examples_of(batch), records_of(task, len(LENGTHS)))
    assert [len(units) for units in asker.units["regions"]] == list(COUNTS)
    assert [len(units) for units in asker.units["text"]] == [length - 2 for length in LENGTHS]
    calls: list[int] = []
    model.encoder.register_forward_pre_hook(lambda module, given: calls.append(len(given[0].text.ids)))
    scores = np.array([0.1, 0.5, 0.3, 0.3, 0.9])
    questions = asker.list_removals("regions", 0, scores, (0.0, 0.4, 0.6, 1.0))
    assert [sorted(question.gone) for question in questions] == [[], [1, 4], [1, 2, 4], [0, 1, 2, 3, 4]]
    asker.ask([*questions, *questions, Asked(1, "text", frozenset())])
    asker.ask(questions)
    assert calls == [len(questions) + 1]
    assert asker[questions[0]].value == task.decode(model(batch), batch, asker.records)[0].value


def test_an_image_of_all_rows_loses_a_region_in_all_of_them() -> None:
    task = NLVR2(Nlvr2Config(joined=False))
    batch = dataclasses.replace(make_batch("lxmert"), group=2)
    model, records = build("lxmert", task), records_of(task, 2)
    shared = Asker(model, task, batch, examples_of(batch, group=2), records)
    assert shared.units["regions"][1] == [((0, at), (1, at)) for at in range(COUNTS[2])]
    apart = Asker(model, task, batch, examples_of(batch, group=2, images=2), records)
    assert apart.units["regions"][1] == [*(((0, at),) for at in range(COUNTS[2])), ((1, 0),)]
    one_row = Asker(model, task, batch, examples_of(batch, group=2), records, rows=[[1], [0, 1]])
    assert [{row for unit in units for row, _ in unit} for units in one_row.units["text"]] == [{1}, {0, 1}]


def test_of_several_choices_the_words_of_the_chosen_one_are_removed() -> None:
    task = VCR()
    batch = dataclasses.replace(make_batch("vlbert"), group=4)
    model, records = build("vlbert", task), [task.query(["why ?", "a", "b", "c", "d"], ["1"])]
    (explanation,) = explain(model, task, batch, records)
    for place, (name, _) in enumerate(explanation.prediction.top):
        assert list_rows_read(explanation, place) == [int(name)]
    (example,) = examples_of(batch, group=4, images=4)
    curves = removal_curves(model, task, batch, example, records[0], explanation, fractions=(0.0, 1.0))
    chosen = int(explanation.prediction.value)
    smaller = without(batch, example, tokens={chosen: removable_tokens(example)[chosen]})
    (again,) = task.decode(model(smaller), smaller, records)
    for curve in curves:
        if curve.part == "text":
            assert curve.values[-1] == pytest.approx(probability(explanation.prediction, 0, again), abs=1e-5)


@pytest.mark.parametrize("variant", ["visualbert", "vilbert", "lxmert"])
def test_curves_and_leave_one_out_of_a_pair(variant: str) -> None:
    """Each point is what the model says to the smaller question."""
    task = NLVR2(Nlvr2Config(joined=False))
    batch = dataclasses.replace(make_batch(variant).map(lambda tensor: tensor[:2]), group=2)
    (example, *_), (record,) = examples_of(make_batch(variant), group=2, images=2), records_of(task, 1)
    example = dataclasses.replace(
        example,
        rows=tuple(
            dataclasses.replace(row, ids=batch.text.ids[number, : LENGTHS[number]].numpy())
            for number, row in enumerate(example.rows)
        ),
    )
    model = build(variant, task)
    (explanation,) = explain(model, task, batch, [record])
    curves = removal_curves(model, task, batch, example, record, explanation, fractions=(0.0, 0.5, 1.0), seeds=2)
    assert len(curves) == 2 * (5 * 2 + 1)
    assert len({(curve.part, curve.method, curve.order) for curve in curves}) == len(curves)

    def ask(**gone: Any) -> float:
        smaller = without(batch, example, **gone)
        (again,) = task.decode(model(smaller), smaller, [record])
        return probability(explanation.prediction, 0, again)

    every = {row: range(count) for row, count in enumerate(COUNTS[:2])}
    allowed = dict(enumerate(removable_tokens(example)))
    for curve in curves:
        assert curve.fractions == (0.0, 0.5, 1.0)
        assert curve.values[0] == pytest.approx(explanation.prediction.confidence, abs=1e-5)
        last = ask(regions=every) if curve.part == "regions" else ask(tokens=allowed)
        assert curve.values[-1] == pytest.approx(last, abs=1e-5)
        assert curve.area == pytest.approx(area_under(curve.fractions, curve.values))
    left = leave_one_out(model, task, batch, example, record, explanation.prediction)
    assert left.value == pytest.approx(explanation.prediction.confidence, abs=1e-5)
    for row in range(2):
        assert list(left.regions[row]) == list(range(COUNTS[row]))
        assert list(left.words[row]) == [(at,) for at in range(1, LENGTHS[row] - 1)]
        for at, changed in left.regions[row].items():
            assert changed.value == pytest.approx(ask(regions={row: [at]}), abs=1e-5)
        for tokens, changed in left.words[row].items():
            assert changed.value == pytest.approx(ask(tokens={row: tokens}), abs=1e-5)


def test_a_prediction_of_the_world_is_taken_apart(world: Any) -> None:
    """From a picture, through the predictor; a word goes with all its pieces."""
    model = api.load(world.vqa, device="cpu")
    text = "what colour is the kaleidoscopic star?"
    explanation = model.explain(world.picture(), text, most=2)
    encoding = model.encode(world.picture(), text, capture=True)
    assert len(explanation.scores["relevance"]) == 2
    first, second = (name for name, _ in explanation.prediction.top[:2])
    assert repr(explanation) == f"Explanation({first}, {second}; {', '.join(METHODS)})"
    (scores,) = explanation.scores["relevance"][0]
    assert len(scores.text) == sum(len(word.tokens) for word in encoding.words)
    assert len(scores.regions) == len(encoding.regions)
    contrasted = model.explain(world.picture(), text, methods=["relevance"], most=1, rules=Rules(contrast=True))
    assert not np.allclose(contrasted.scores["relevance"][0][0].text, scores.text)
    prepared = model.prepare(api.Question(world.picture(), text))
    given = model.model, model.task, prepared.batch, prepared.example, prepared.record
    left = leave_one_out(*given, explanation.prediction)
    assert list(left.words[0]) == [word.tokens for word in encoding.words if not word.special]
    assert any(len(tokens) > 1 for tokens in left.words[0])
    assert list(left.regions[0]) == [n for n, region in enumerate(encoding.regions) if not region.special]
    curves = removal_curves(*given, explanation)
    again = removal_curves(*given, explanation)
    assert curves == again, "random orders are the same every time"


def test_where_nothing_is_predicted_there_is_no_curve() -> None:
    task = PhraseGrounding()
    batch = make_batch("visualbert", phrases=True)
    example, record = examples_of(batch)[0], records_of(task, 1)[0]
    blind = dataclasses.replace(batch, regions=None).map(lambda tensor: tensor[:1])
    model = build("visualbert", task)
    (explanation,) = explain(model, task, blind, [record])
    assert removal_curves(model, task, blind, example, record, explanation) == ()


def test_a_text_only_model_has_no_curve_of_regions() -> None:
    task = vqa()
    batch = dataclasses.replace(make_batch("visualbert"), regions=None).map(lambda tensor: tensor[:1])
    example, record = examples_of(make_batch("visualbert"))[0], records_of(task, 1)[0]
    model = build("visualbert", task)
    (explanation,) = explain(model, task, batch, [record])
    curves = removal_curves(model, task, batch, example, record, explanation)
    assert {curve.part for curve in curves} == {"text"}
    assert leave_one_out(model, task, batch, example, record, explanation.prediction).regions == ({},)
