"""Phrase grounding: where phrases stand, what is learned and predicted, and how it is scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from visling.data.annotations.entities import EntitiesRecord, parse_sentence
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError
from visling.tasks.base import TaskSource, TextOnly, load
from visling.tasks.grounding import (
    HEAD,
    KEPT,
    NOT_READ,
    GroundedPhrase,
    Grounding,
    GroundingConfig,
    PhraseGrounding,
)
from visling.types import Batch, InputSpec, Prediction, RegionArray, Regions, Slots, Targets, Text

TASK = PhraseGrounding()
TOKENIZER = Tokenizer()
RNG = np.random.default_rng(0)
SIZE = (100, 50)


class Store(dict[str, RegionArray]):
    feature_size = 2
    fingerprint = "here"


BOXES = np.array([[0, 0, 20, 20], [10, 10, 40, 40], [60, 0, 100, 50]], np.float32)
STORE = Store(a=RegionArray(features=np.zeros((3, 2), np.float32), boxes=BOXES, size=SIZE))
SPEC = InputSpec(feature_size=2)


def record(line: str, *boxes: tuple[tuple[float, ...], ...] | None, name: str = "a#0") -> EntitiesRecord:
    """A marked-up sentence about image a, with the boxes of each phrase."""
    sentence = parse_sentence(line, "here")
    phrases = [replace(one, boxes=own) for one, own in zip(sentence.phrases, boxes, strict=True)]  # type: ignore[arg-type]
    return EntitiesRecord(id=name, images=("a",), sentence=sentence.text, phrases=tuple(phrases), size=SIZE)


MEN = record(
    "[/EN#1/people Two men] hold [/EN#2/other/clothing a kite] near [/EN#3/other a tree] .",
    ((0, 0, 20, 20), (60, 0, 100, 50)),
    ((10, 10, 40, 40),),
    ((80, 45, 90, 50),),
)


def layout(**settings: Any) -> TextLayout:
    return TextLayout(TOKENIZER, replace(SPEC, **settings))


def collate(*records: EntitiesRecord, task: PhraseGrounding = TASK, **settings: Any) -> tuple[Batch, Targets]:
    used = layout(**settings)
    source = TaskSource(task, records, used)
    examples = [source.example(number, RNG) for number in range(len(records))]
    return Collator(STORE, used.spec, TOKENIZER)(examples, [RNG] * len(records))


def pieces_at_phrases(line: str, **settings: Any) -> list[str]:
    """The piece at which each phrase stands."""
    given = record(line, *[()] * line.count("[/EN#"))
    (row,) = PhraseGrounding(GroundingConfig(**settings)).example(given, layout(), RNG).rows
    return [TOKENIZER.tokens(row.ids)[at] for at in row.phrases]


def test_a_phrase_stands_at_the_last_piece_of_its_last_word() -> None:
    assert load("grounding") is PhraseGrounding
    assert pieces_at_phrases("[/EN#1/people A bewildered man] rides [/EN#2/vehicles red sports-cars].") == [
        "man",
        "cars",
    ]
    assert pieces_at_phrases("[/EN#1/people zzyzzx] runs") == [TOKENIZER.tokens(TOKENIZER.encode("zzyzzx"))[-1]]
    assert len(TOKENIZER.encode("zzyzzx")) > 1


def test_a_phrase_may_end_within_a_word() -> None:
    line = "The [/EN#1/people girl]'s hat , [/EN#2/other [kite], [/EN#3/vehicles motor]cycles ."
    assert pieces_at_phrases(line) == ["girl", "kite", "motorcycles"]
    assert pieces_at_phrases(line, phrase_at="release") == ["girl", "kite", "motorcycles"]


def test_a_repeated_phrase_stands_at_its_own_place() -> None:
    line = "[/EN#1/people the man] sees [/EN#2/people the man]"
    given = record(line, (), ())
    for where, wanted in (("phrase", (2, 5)), ("release", (2, 2))):
        (row,) = PhraseGrounding(GroundingConfig(phrase_at=where)).example(given, layout(), RNG).rows  # type: ignore[arg-type]
        assert row.phrases == wanted


def test_words_without_a_piece() -> None:
    """The tokeniser removes control characters: a phrase of nothing else cannot be read."""
    given = record("[/EN#1/other \x07] is [/EN#2/people a man \x07] .", (), ())
    (row,) = TASK.example(given, layout(), RNG).rows
    assert row.phrases[0] == NOT_READ
    assert TOKENIZER.tokens(row.ids)[row.phrases[1]] == "man"


def test_targets_are_shared_by_the_matching_regions() -> None:
    _, targets = collate(MEN)
    assert targets.phrase_boxes is not None
    assert targets.phrase_boxes.tolist() == [[[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]
    for target, wanted in (("union_box", [0.0, 0.0, 0.0]), ("first_box", [1.0, 0.0, 0.0])):
        _, targets = collate(MEN, task=PhraseGrounding(GroundingConfig(target=target)))  # type: ignore[arg-type]
        assert targets.phrase_boxes is not None
        assert targets.phrase_boxes[0, 0].tolist() == wanted
    _, targets = collate(MEN, max_regions=2)
    assert targets.phrase_boxes is not None
    assert targets.phrase_boxes[0, 0].tolist() == [1.0, 0.0], "only regions that the model sees"


def test_phrases_that_are_cut_off_have_no_target_and_no_box() -> None:
    cut = layout(max_tokens=7).row(MEN.sentence)
    assert TOKENIZER.tokens(cut.ids)[-2] == "kite"
    batch, targets = collate(MEN, max_tokens=6)
    assert batch.phrases is not None
    assert batch.phrases.at[0, :3].tolist() == [2, NOT_READ, NOT_READ]
    assert targets.phrase_boxes is not None
    assert targets.phrase_boxes[0].any(1).tolist() == [True, False, False]
    (prediction,) = TASK.decode({HEAD: torch.zeros(1, 4, 3)}, batch, [MEN])
    assert [len(phrase.boxes) for phrase in prediction.value.phrases] == [3, 0, 0]
    assert [name for name, _ in prediction.top] == ["Two men"]
    report = TASK.report([prediction], [MEN])
    assert report.scores["recall_at_1"].value == pytest.approx(100 / 3)
    assert report.scores["cut_off"].value == pytest.approx(200 / 3)
    assert report.scores["upper_bound"].value == pytest.approx(200 / 3), "a region matches, though it cannot be chosen"
    assert [row["box"] for row in TASK.submission([prediction])][1:] == [None, None]


def test_a_preset_that_cuts_rows_later_is_refused() -> None:
    with pytest.raises(ConfigError, match="joint_limit=64 would cut phrases off unseen"):
        TASK.example(MEN, layout(joint_limit=64), RNG)


def test_a_batch_without_any_phrase_left() -> None:
    batch, targets = collate(MEN, max_tokens=3)
    scores = torch.randn(1, batch.phrases.at.shape[1] if batch.phrases else 3, 3, requires_grad=True)
    loss = TASK.loss({HEAD: scores}, targets)
    assert loss.value == 0
    (prediction,) = TASK.decode({HEAD: scores}, batch, [MEN])
    assert (prediction.top, prediction.boxes, prediction.confidence) == ((), (), 0.0)


def test_loss_by_hand() -> None:
    """KL divergence of two sentences: with equal scores, log R - log m for each phrase with m matching regions."""
    _, targets = collate(MEN, replace(MEN, id="a#1", phrases=MEN.phrases[1:]))
    scores = torch.zeros(2, 4, 3, requires_grad=True)
    by_phrase = np.log([3 / 2, 3, 3])
    loss = TASK.loss({HEAD: scores}, targets)
    assert loss.value.item() == pytest.approx(by_phrase.sum() / 2)
    assert [part.item() for part in loss.parts["grounding"]] == [pytest.approx(by_phrase.sum()), 2]
    own = PhraseGrounding(GroundingConfig(loss_per="phrase")).loss({HEAD: scores}, targets)
    assert own.value.item() == pytest.approx(by_phrase.sum() / 3)
    loss.value.backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert not scores.grad[0, 2:].any(), "neither a phrase without a region nor padding is learned from"


def test_padded_regions_take_no_part() -> None:
    _, targets = collate(MEN)
    assert targets.phrase_boxes is not None
    scores = torch.randn(1, 4, 3)
    padded = torch.cat([scores, torch.full((1, 4, 2), torch.finfo(torch.float32).min)], dim=-1)
    wider = Targets(phrase_boxes=torch.nn.functional.pad(targets.phrase_boxes, (0, 2)))
    torch.testing.assert_close(TASK.loss({HEAD: padded}, wider).value, TASK.loss({HEAD: scores}, targets).value)


def test_a_model_of_the_words_alone_is_refused() -> None:
    source = TextOnly(TaskSource(TASK, [MEN], layout()))
    batch, targets = Collator(None, SPEC, TOKENIZER)([source.example(0, RNG)], [RNG])
    with pytest.raises(ConfigError, match="which a text-only model does not see: leave --text-only out"):
        TASK.loss({HEAD: torch.zeros(1, 4, 0)}, targets)
    (prediction,) = TASK.decode({HEAD: torch.zeros(1, 4, 0)}, batch, [MEN])
    assert prediction.boxes == ()


def given_batch(regions: int, real: int, phrases: int) -> Batch:
    """Boxes in a row, each four pixels wide, the last ones padding."""
    left = torch.arange(regions) / 50
    boxes = torch.stack([left, torch.zeros(regions), left + 0.02, torch.ones(regions)], dim=1)[None]
    return Batch(
        text=Text(
            ids=torch.ones(1, 9, dtype=torch.int64), mask=torch.ones(1, 9).bool(), segments=torch.zeros(1, 9).long()
        ),
        regions=Regions(
            features=torch.zeros(1, regions, 2),
            boxes=boxes,
            mask=torch.arange(regions)[None] < real,
            size=torch.tensor([[200.0, 50.0]]),
        ),
        phrases=Slots(at=torch.ones(1, 4).long(), mask=torch.arange(4)[None] < phrases),
    )


@pytest.mark.parametrize("real", [1, 7, 30])
def test_the_best_boxes_in_pixels_and_never_padding(real: int) -> None:
    scores = torch.randn(1, 4, 30)
    scores[:, :, real:] = 100.0
    (prediction,) = TASK.decode({HEAD: scores}, given_batch(30, real, len(MEN.phrases)), [MEN])
    assert len(prediction.top) == len(prediction.boxes) == len(MEN.phrases)
    for number, grounded in enumerate(prediction.value.phrases):
        order = scores[0, number, :real].argsort(descending=True)[:KEPT].tolist()
        assert grounded.boxes == tuple((4.0 * k, 0.0, 4.0 * k + 4, 50.0) for k in order)
        chance = scores[0, number, :real].softmax(0).max().item()
        assert prediction.top[number][0] == MEN.phrases[number].text
        assert prediction.top[number][1] == pytest.approx(chance, abs=1e-6)
        assert prediction.boxes[number] == grounded.boxes[0]
    assert prediction.confidence == pytest.approx(np.prod([chance for _, chance in prediction.top]))


def predicted(*boxes: Sequence[tuple[float, ...]], reachable: bool | None = True, name: str = "a#0") -> Prediction:
    phrases = tuple(
        GroundedPhrase(text=phrase.text, chain=phrase.chain, boxes=tuple(own), reachable=reachable)  # type: ignore[arg-type]
        for phrase, own in zip(MEN.phrases, boxes, strict=True)
    )
    return Prediction(id=name, value=Grounding(phrases), confidence=0.5, top=(("Two men", 0.5),))


RIGHT, WRONG = (10.0, 10.0, 40.0, 40.0), (0.0, 0.0, 1.0, 1.0)


def test_report() -> None:
    found = TASK.report([predicted([WRONG] * 5 + [(60, 0, 100, 50)], [RIGHT], [WRONG])], [MEN])
    values = {name: score.value for name, score in found.scores.items()}
    assert values == pytest.approx(
        {"recall_at_1": 100 / 3, "recall_at_5": 100 / 3, "recall_at_10": 200 / 3, "upper_bound": 100}
    )
    assert all(score.count == 3 for score in found.scores.values())
    assert found.scores["recall_at_1"].low is not None
    kinds = {name: (score.value, score.count) for name, score in found.by["type"].items()}
    assert kinds == {"people": (0, 1), "other": (50, 2), "clothing": (100, 1)}, "a phrase counts in each of its types"
    assert found.variants == {"right": "any_box, IoU >= 0.5", "first_pixel": "1", "phrase_at": "phrase"}
    authors = PhraseGrounding(GroundingConfig(target="union_box", inclusive=True))
    whole = predicted([(0, 0, 100, 50)], [RIGHT], [WRONG], reachable=None)
    found = authors.report([whole], [MEN])
    assert found.scores["recall_at_1"].value == pytest.approx(200 / 3)
    assert found.variants["right"] == "union_box, IoU with +1 >= 0.5"
    assert "upper_bound" not in found.scores, "not known without the regions"


def test_details_and_submission() -> None:
    prediction = predicted([WRONG], [RIGHT], [])
    (row,) = json.loads(json.dumps(TASK.details([prediction], [MEN])))
    assert row["text"] == MEN.sentence
    assert row["score"] == pytest.approx(1 / 3)
    assert row["truth"].startswith("Two men: 0, 0, 20, 20; a kite: 10, 10, 40, 40")
    assert row["prediction"] == "Two men: 0, 0, 1, 1; a kite: 10, 10, 40, 40; a tree: no box"
    assert [phrase["rank"] for phrase in row["phrases"]] == [None, 1, None]
    assert row["phrases"][1]["types"] == ["other", "clothing"]
    rows = json.loads(json.dumps(TASK.submission([prediction])))
    assert rows[0] == {"image": "a", "sentence": 0, "phrase_id": "1", "phrase": "Two men", "box": list(WRONG)}
    assert rows[2]["box"] is None


@pytest.mark.parametrize(
    ("text", "sentence", "phrases"),
    [
        ("[a man] holds [ a  red kite ]", "a man holds a red kite", ["a man", "a red kite"]),
        ("a man holds  a kite", "a man holds a kite", ["a man holds a kite"]),
        ("[/EN#7/people a man] holds [a kite]", "a man holds a kite", ["a man", "a kite"]),
    ],
)
def test_a_text_with_brackets(text: str, sentence: str, phrases: list[str]) -> None:
    asked = TASK.query([text], ["a"])
    assert asked.sentence == sentence
    assert [phrase.text for phrase in asked.phrases] == phrases
    assert not TASK.labelled([asked])
    batch, targets = collate(asked)
    assert targets.phrase_boxes is None
    scores = torch.zeros(1, 4, 3)
    scores[..., 1] = 5
    (prediction,) = TASK.decode({HEAD: scores}, batch, [asked])
    assert prediction.boxes == ((10.0, 10.0, 40.0, 40.0),) * len(phrases)
    assert [name for name, _ in prediction.top] == phrases
    assert str(prediction.value).startswith(f"{phrases[0]}: 10, 10, 40, 40")
    (row,) = TASK.details([prediction], [asked])
    assert (row["truth"], row["score"]) == (None, None)


@pytest.mark.parametrize("text", ["[a man holds", "a man] holds", "[a [red] kite]", "[] holds"])
def test_a_text_with_broken_brackets(text: str) -> None:
    with pytest.raises(DataError, match=r"the brackets in .* do not mark phrases.*Correct them") as caught:
        TASK.query([text], ["a"])
    assert repr(text) in str(caught.value)
    assert "/EN#" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_text(text: str) -> None:
    with pytest.raises(DataError, match=r"the text is empty: found '.*Fill it in"):
        TASK.query([text], ["a"])


def test_notes() -> None:
    assert TASK.notes([MEN]) == []
    told = TASK.notes([replace(MEN, unboxed=2, left_out=1), replace(MEN, id="a#1", unboxed=1, left_out=1)])
    assert told == [
        "phrases without a box, which are not asked about: 3",
        "further sentences of these images, none of whose phrases has a box, left out: 1",
    ]


def test_baselines_look_at_training_boxes_alone() -> None:
    left, right = (0.0, 0.0, 50.0, 50.0), (50.0, 0.0, 100.0, 50.0)
    train = [record("[/EN#1/people men]", (left,), name=f"t{k}") for k in range(3)]
    train.append(record("[/EN#1/people men]", (right, (51.0, 0.0, 99.0, 50.0)), name="t3"))
    asked = replace(record("[/EN#1/people men]", ((100.0, 0.0, 200.0, 10.0),)), size=(200, 10))
    found = TASK.baselines(train, [asked])
    (whole,), (places,) = found["whole image"], found["most frequent positions"]
    assert whole.boxes == ((0.0, 0.0, 200.0, 10.0),)
    assert places.value.phrases[0].boxes == ((0.0, 0.0, 100.0, 10.0), (100.0, 0.0, 200.0, 10.0))
    assert places.confidence == pytest.approx(3 / 5)
    scores = TASK.report([places], [asked]).scores
    assert (scores["recall_at_1"].value, scores["recall_at_5"].value) == (0, 100)
    assert TASK.report([whole], [asked]).scores["recall_at_1"].value == 100, "half of the image"


def test_settings_travel_with_the_model() -> None:
    task = PhraseGrounding(GroundingConfig(target="first_box", strict=True, first_pixel=0))
    again = PhraseGrounding.from_state(json.loads(json.dumps(task.state())))
    assert again.config == task.config
    assert again.rule.strict
    with pytest.raises(ConfigError, match="target"):
        PhraseGrounding.configured({"target": "all_boxes"})
