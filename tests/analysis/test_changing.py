"""Questions that their reader changes: what is left out is gone, what is drawn is there, the rest stays as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from visling import api
from visling import config as configs
from visling.analysis.changing import draw_boxes, find_regions, leave_out
from visling.analysis.inspection import Inspection
from visling.analysis.question import Prepared, Question, SeenImage
from visling.data.batches.region_order import take_regions
from visling.errors import DataError
from visling.recipes.tables import FINETUNING
from visling.runs.finetune import finetune

TEXT = "how many large red stars are there?"
TINY = ("encoder=tiny", "batch_size=8", "train.max_steps=1", "train.precision=fp32")


@pytest.fixture(scope="module")
def model(world: Any) -> api.Predictor:
    return api.load(world.vqa, device="cpu")


@pytest.fixture(scope="module")
def prepared(world: Any, model: api.Predictor) -> Prepared:
    return model.prepare(Question(world.picture(), TEXT))


def show(model: api.Predictor, asked: Prepared) -> Inspection:
    return model.inspect_prepared(asked, removal=False)


def shares(shown: Inspection) -> dict[str, float]:
    return {answer.text: answer.probability for answer in shown.answers}


def test_a_question_without_a_word_is_the_question_that_lacks_it(
    world: Any, model: api.Predictor, prepared: Prepared
) -> None:
    words = [word.text for word in show(model, prepared).rows[0].words]
    red = words.index("red")
    changed = show(model, leave_out(prepared, model.tokenizer, words=[(0, red)]))
    assert [word.text for word in changed.rows[0].words] == words[:red] + words[red + 1 :]
    expected = show(model, model.prepare(Question(world.picture(), TEXT.replace("red ", ""))))
    assert [word.text for word in expected.rows[0].words] == words[:red] + words[red + 1 :]
    assert shares(changed) == pytest.approx(shares(expected), abs=1e-6)


def test_a_question_without_regions_does_not_show_them(model: api.Predictor, prepared: Prepared) -> None:
    before = show(model, prepared)
    changed = show(model, leave_out(prepared, model.tokenizer, regions=[(0, 0), (0, 2)]))
    regions = before.rows[0].regions
    assert len(regions) > 3
    kept = [region for n, region in enumerate(regions) if n not in (0, 2)]
    assert changed.rows[0].regions == tuple(replace(region, at=n) for n, region in enumerate(kept))
    assert shares(changed) != pytest.approx(shares(before), abs=1e-6)
    none = show(model, leave_out(prepared, model.tokenizer, regions=[(0, n) for n in range(len(regions))]))
    assert none.rows[0].regions == ()


def test_nothing_left_out_changes_nothing(model: api.Predictor, prepared: Prepared) -> None:
    assert shares(show(model, leave_out(prepared, model.tokenizer))) == shares(show(model, prepared))


@pytest.mark.parametrize(
    ("words", "regions", "message"),
    [
        ([(0, 0)], [], r"word 0 of row 0 cannot be left out: expected one of 1 \(how\), 2 \(many\)"),
        ([(0, 99)], [], "word 99 of row 0 cannot be left out"),
        ([(1, 1)], [], "no row 1: the question has 1"),
        ([], [(0, 99)], "region 99 of row 0 cannot be left out"),
        ([], [(0, -1)], "region -1 of row 0 cannot be left out"),
    ],
)
def test_what_is_not_there_cannot_be_left_out(
    model: api.Predictor, prepared: Prepared, words: Any, regions: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        leave_out(prepared, model.tokenizer, words=words, regions=regions)


def test_a_drawn_box_is_a_region_like_any_other(world: Any, model: api.Predictor, prepared: Prepared) -> None:
    seen = model.look(world.picture())
    again = draw_boxes(seen, model.detector, [tuple(map(float, seen.regions.boxes[1]))], model.spec.max_regions)
    assert len(again.regions) == len(seen.regions) + 1
    assert np.allclose(again.regions.features[-1], seen.regions.features[1], atol=1e-3)
    drawn = draw_boxes(seen, model.detector, [(1.0, 2.0, 30.0, 40.0)], model.spec.max_regions)
    shown = show(model, model.prepare(Question(drawn, TEXT))).rows[0].regions
    assert shown[-1].box == pytest.approx((1.0, 2.0, 30.0, 40.0))
    assert shown[:-1] == show(model, prepared).rows[0].regions


def test_drawn_boxes_are_shown_where_there_is_no_room(world: Any, model: api.Predictor) -> None:
    seen = model.look(world.picture())
    most = len(seen.regions)
    drawn = draw_boxes(seen, model.detector, [(1.0, 2.0, 30.0, 40.0)], most)
    assert len(drawn.regions) == most
    assert drawn.regions.boxes[-1].tolist() == [1, 2, 30, 40]
    assert np.array_equal(drawn.regions.boxes[:-1], seen.regions.boxes[:-1])
    with pytest.raises(DataError, match="2 boxes are drawn; the model sees 1 regions"):
        draw_boxes(seen, model.detector, [(1.0, 2.0, 30.0, 40.0)] * 2, 1)


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 5), (5, 0, 1, 5), (-1, 0, 5, 5), (0, 0, 5, 1e6), (0, float("nan"), 5, 5), (0, 0, 5, float("inf"))]
)
def test_a_box_outside_the_image_is_refused(world: Any, model: api.Predictor, box: Any) -> None:
    with pytest.raises(DataError, match=r"is not within the image of \d+ x \d+ pixels"):
        draw_boxes(model.look(world.picture()), model.detector, [box], 36)


def test_regions_keep_their_numbers_when_boxes_are_drawn(world: Any, model: api.Predictor, prepared: Prepared) -> None:
    seen = model.look(world.picture())
    other = model.prepare(Question(draw_boxes(seen, model.detector, [(1.0, 2.0, 30.0, 40.0)], 36), TEXT))
    assert find_regions(prepared, other, [(0, 2), (0, 0)]) == [(0, 2), (0, 0)]
    turned = SeenImage(seen.pixels, take_regions(seen.regions, np.arange(len(seen.regions))[::-1]))
    assert find_regions(prepared, model.prepare(Question(turned, TEXT)), [(0, 0)]) == [(0, len(seen.regions) - 1)]
    for place in ((0, 99), (1, 0)):
        with pytest.raises(DataError, match="no region"):
            find_regions(prepared, other, [place])


def test_rows_lose_what_they_share(world: Any, tmp_path: Any) -> None:
    config = configs.override(FINETUNING["visualbert-vcr-scenes"](), TINY)
    finetune(config, tmp_path / "run", data=world.scenes, store=world.regions, device="cpu")
    model = api.load(tmp_path / "run", device="cpu")
    choices = ["it is red", "it is blue"]
    asked = model.prepare(Question(world.picture(), "how does the star look?", choices))
    words = [[word.text for word in row.words] for row in show(model, asked).rows]
    look, it = words[0].index("look"), words[0].index("it")
    changed = show(model, leave_out(asked, model.tokenizer, words=[(0, look)], regions=[(1, 0)]))
    for row, before in zip(changed.rows, words, strict=True):
        assert [word.text for word in row.words] == [word for word in before if word != "look"]
        assert len(row.regions) == len(show(model, asked).rows[0].regions) - 1
    changed = show(model, leave_out(asked, model.tokenizer, words=[(0, it)]))
    assert [[word.text for word in row.words].count("it") for row in changed.rows] == [0, 1], "a choice of its own"


def test_phrases_and_answers_stay_in_their_places(world: Any, tmp_path: Any) -> None:
    config = configs.override(FINETUNING["visualbert-grounding-scenes"](), TINY)
    finetune(config, tmp_path / "run", data=world.scenes, store=world.regions, device="cpu")
    model = api.load(tmp_path / "run", device="cpu")
    asked = model.prepare(Question(world.picture(), "there is [a red star] near [a blue ring]"))
    changed = leave_out(asked, model.tokenizer, words=[(0, 1), (0, 2)])
    (row,) = changed.example.rows
    (before,) = asked.example.rows
    for at, was in zip(row.phrases, before.phrases, strict=True):
        assert row.ids[at] == before.ids[was]
    assert changed.batch.phrases is not None
    assert changed.batch.phrases.at[0].tolist()[: len(row.phrases)] == list(row.phrases)
    assert torch.equal(changed.batch.text.ids[0], torch.from_numpy(row.ids))
    assert len(show(model, changed).answers) == 2
