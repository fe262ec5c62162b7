"""What pre-training corpora show the model, and how often."""

from __future__ import annotations

from collections import Counter

import pytest

from visling.data.annotations.captions import CaptionRecord
from visling.data.annotations.lxmert import LxmertRecord
from visling.data.annotations.questions import QuestionRecord
from visling.data.answers import AnswerVocabulary
from visling.data.masking import TokenMasking, mask_tokens
from visling.data.pretraining import (
    CaptionPairs,
    Labelled,
    LabelledSentences,
    LxmertSentences,
    Mixture,
    PlainText,
    QuestionAnswer,
    SentenceRecord,
    SingleCaption,
    VilbertCaptions,
)
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError
from visling.runtime import generator_for
from visling.types import IGNORE, Example, InputSpec

TOKENIZER = Tokenizer()
LAYOUT = TextLayout(TOKENIZER, InputSpec())
NAMES = ["circle", "square", "triangle", "star"]
RECORDS = [
    CaptionRecord(id=f"{name}{number}", images=(f"image_{at}",), caption=f"{name} {number}")
    for at, name in enumerate(NAMES)
    for number in ("one", "two", "three")
]


def texts(example: Example, row: int = 0) -> list[str]:
    """The sentences of a row."""
    pieces = TOKENIZER.tokens(example.rows[row].ids)
    return " ".join(pieces[1:-1]).split(" [SEP] ")


def test_caption_pairs() -> None:
    source = CaptionPairs(RECORDS, LAYOUT)
    assert len(source) == 12
    seconds: Counter[str] = Counter()
    matched = 0
    for draw in range(4000):
        example = source.example(4, generator_for(0, draw))
        first, second = texts(example)
        assert first == "square two"
        assert example.images == ("image_1",)
        assert example.rows[0].segments.max() == 1
        if example.labels["matched"]:
            assert second in ("square one", "square three"), "another caption of the same image"
        else:
            assert not second.startswith("square"), "a caption of another image"
        matched += example.labels["matched"]
        seconds[second] += 1
    assert abs(matched / 4000 - 0.5) < 0.04
    assert len(seconds) == 11
    assert abs(seconds["square one"] - seconds["square three"]) < 250


@pytest.mark.parametrize("index", [3, 4, 5])
def test_every_sibling_is_drawn_but_never_the_caption_itself(index: int) -> None:
    drawn = {
        texts(example)[1] for draw in range(60) if (example := CaptionPairs(RECORDS, LAYOUT).example(index, generator_for(draw))).labels["matched"]
    }
    assert drawn == {record.caption for record in RECORDS[3:6]} - {RECORDS[index].caption}


def test_a_lone_caption_gets_a_foreign_second() -> None:
    source = CaptionPairs([*RECORDS, CaptionRecord(id="x", images=("lone",), caption="lonely")], LAYOUT)
    assert all(source.example(12, generator_for(draw)).labels["matched"] == 0 for draw in range(30))


def test_one_image_leaves_nothing_to_contrast() -> None:
    for make in (CaptionPairs, SingleCaption):
        with pytest.raises(DataError, match="no other image"):
            make(RECORDS[:3], LAYOUT)
    assert len(SingleCaption(RECORDS[:3], LAYOUT, false_caption_ratio=None)) == 3


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_single_caption(ratio: float) -> None:
    source = SingleCaption(RECORDS, LAYOUT, false_caption_ratio=ratio)
    wrong = 0
    for draw in range(2000):
        example = source.example(0, generator_for(1, draw))
        assert example.images == ("image_0",)
        assert example.labels["matched"] == int(texts(example) == ["circle one"])
        assert example.labels["matched"] or not texts(example)[0].startswith("circle")
        wrong += 1 - example.labels["matched"]
    assert abs(wrong / 2000 - ratio) < 0.05


def test_single_caption_without_matching() -> None:
    example = SingleCaption(RECORDS, LAYOUT, false_caption_ratio=None).example(0, generator_for(0))
    assert example.labels == {"matched": IGNORE}
    with pytest.raises(ConfigError, match="false_caption_ratio"):
        SingleCaption(RECORDS, LAYOUT, false_caption_ratio=1.5)


def test_labelled_sentences() -> None:
    records = [
        SentenceRecord(id="a", images=("x",), sentence="true", label=True),
        SentenceRecord(id="b", images=("x", "y"), sentence="false", label=False),
        SentenceRecord(id="c", images=("x",), sentence="hidden", label=None),
    ]
    made = [LabelledSentences(records, LAYOUT).example(index, generator_for(0)) for index in range(3)]
    assert [example.labels for example in made] == [{"matched": 1}, {"matched": 0}, {"matched": IGNORE}]
    assert [len(example.rows) for example in made] == [1, 2, 1]
    joined = TextLayout(TOKENIZER, InputSpec(pair="sequence"))
    assert len(LabelledSentences(records, joined).example(1, generator_for(0)).rows) == 1


def test_labelled_sentences_can_stay_unmasked() -> None:
    records = [SentenceRecord(id="a", images=("x",), sentence="there is a red star", label=True)]
    everything = TokenMasking(rate=1.0)
    for masked, chosen in ((True, 5), (False, 0)):
        row = LabelledSentences(records, LAYOUT, masked=masked).example(0, generator_for(0)).rows[0]
        assert len(mask_tokens(row, everything, TOKENIZER, generator_for(0))[1]) == chosen


def question(answers: tuple[str, ...] | None, text: str = "what is it?") -> QuestionRecord:
    return QuestionRecord(id="1", images=("x",), question=text, question_type="", answer_type="", answers=answers, multiple_choice_answer=None)


@pytest.mark.parametrize("text", ["what is it?", "what is it ", "what is it ?"])
def test_question_with_answer_is_one_text_with_whole_words(text: str) -> None:
    source = QuestionAnswer([question(("red", "dark red"), text)], LAYOUT)
    made = [source.example(0, generator_for(draw)) for draw in range(40)]
    assert {texts(example)[0] for example in made} == {"what is it ? red", "what is it ? dark red"}
    assert all(example.rows[0].segments.max() == 0 and example.labels == {"matched": IGNORE} for example in made)


def test_questions_without_answers() -> None:
    with pytest.raises(DataError, match="'1' has no answers"):
        QuestionAnswer([question(None)], LAYOUT)


ANSWERS = AnswerVocabulary(["2", "blue", "gray", "yes"])


def sentence(name: str, image: str, scores: dict[str, float] | None = None) -> LxmertRecord:
    return LxmertRecord(id=name, images=(image,), sentence=name, source="vqa", scores=scores)


SENTENCES = [
    sentence("caption", "a"),
    sentence("colour", "a", {"grey": 0.6, "Blue.": 0.3, "silver": 1.0}),
    sentence("other", "b", {"silver": 1.0}),
    sentence("number", "c", {"Two": 1.0, "never": 0.0, "yes": 0.0}),
]


def test_lxmert_replaces_half_of_the_sentences_and_draws_answers_by_score() -> None:
    source = LxmertSentences(SENTENCES, LAYOUT, answers=ANSWERS)
    assert len(source) == 4
    answers: Counter[int] = Counter()
    for draw in range(4000):
        example = source.example(1, generator_for(0, draw))
        assert example.images == ("a",)
        assert example.labels["matched"] == int(texts(example) == ["colour"])
        assert texts(example)[0] in ("colour", "other", "number"), "never a sentence of the same image"
        answers[example.labels["answer"]] += 1
        assert (example.labels["answer"] == IGNORE) == (example.labels["matched"] == 0)
    assert answers.keys() == {IGNORE, 1, 2}
    assert abs(answers[IGNORE] / 4000 - 0.5) < 0.04
    assert abs(answers[2] / (answers[1] + answers[2]) - 2 / 3) < 0.05


@pytest.mark.parametrize(("index", "expected"), [(0, IGNORE), (2, IGNORE), (3, 0)])
def test_what_is_not_asked_or_not_in_the_table_has_no_answer(index: int, expected: int) -> None:
    source = LxmertSentences(SENTENCES, LAYOUT, answers=ANSWERS, false_sentence_ratio=0.0)
    assert source.example(index, generator_for(0)).labels == {"matched": 1, "answer": expected}


def test_lxmert_without_matching_or_answers() -> None:
    source = LxmertSentences(SENTENCES, LAYOUT, answers=ANSWERS, false_sentence_ratio=None)
    assert {texts(source.example(3, generator_for(draw)))[0] for draw in range(30)} == {"number"}
    assert source.example(3, generator_for(0)).labels == {"matched": IGNORE, "answer": 0}
    assert LxmertSentences(SENTENCES, LAYOUT, false_sentence_ratio=None).example(3, generator_for(0)).labels == {"matched": IGNORE}
    assert len(LxmertSentences(SENTENCES[:2], LAYOUT, false_sentence_ratio=None)) == 2
    with pytest.raises(DataError, match="no other image"):
        LxmertSentences(SENTENCES[:2], LAYOUT)
    with pytest.raises(ConfigError, match="false_sentence_ratio"):
        LxmertSentences(SENTENCES, LAYOUT, false_sentence_ratio=-1)


@pytest.mark.parametrize("keep_above", [True, False])
def test_vilbert_draws_from_the_first_captions_of_the_file(keep_above: bool) -> None:
    records = [RECORDS[0], RECORDS[3], RECORDS[6]]
    pool = ["circle one", "gone", "square one", "triangle one", "more"]
    source = VilbertCaptions(records, LAYOUT, pool=pool, keep_above=keep_above)
    assert len(source) == 3
    wrong: Counter[str] = Counter()
    for draw in range(3000):
        example = source.example(0, generator_for(2, draw))
        assert example.images == ("image_0",)
        if example.labels["matched"]:
            assert texts(example) == ["circle one"]
        else:
            wrong[texts(example)[0]] += 1
    assert wrong.keys() == {"circle one", "gone", "square one"}, "as many as there are images, the right one included"
    assert abs(wrong.total() / 3000 - 0.5) < 0.05
    assert max(wrong.values()) - min(wrong.values()) < 120


def test_vilbert_without_matching() -> None:
    source = VilbertCaptions(RECORDS[:1], LAYOUT, matching=False)
    assert all(source.example(0, generator_for(draw)).labels == {"matched": IGNORE} for draw in range(20))
    with pytest.raises(DataError, match="1 captions to draw from for 2 images"):
        VilbertCaptions(RECORDS[:2], LAYOUT, pool=["a"])


def test_plain_text_takes_following_passages_until_it_is_long_enough() -> None:
    passages = ["one two three", "four , five", "six"]
    source = PlainText(passages, LAYOUT, min_words=5)
    rows = [source.example(index, generator_for(0)).rows[0] for index in range(3)]
    assert [TOKENIZER.decode(row.ids) for row in rows] == [
        "one two three four , five",
        "four , five six one two three",
        "six one two three four , five",
    ]
    for row in rows:
        assert row.words is not None
        assert row.words.tolist() == list(range(len(row.ids))), "words are numbered through"
        assert set(row.segments.tolist()) == {0}
        assert not {TOKENIZER.cls, TOKENIZER.sep} & set(row.ids.tolist())
    example = PlainText(passages, LAYOUT, min_words=0, max_tokens=2).example(0, generator_for(0))
    assert (TOKENIZER.decode(example.rows[0].ids), example.images, dict(example.labels)) == ("one two", (), {})
    assert len(PlainText(["alone"], LAYOUT).example(0, generator_for(0)).rows[0].ids) == 64, "behind the last passage comes the first"
    assert len(PlainText(["word " * 500], LAYOUT).example(0, generator_for(0)).rows[0].ids) == LAYOUT.spec.max_tokens


def test_empty_text() -> None:
    with pytest.raises(DataError, match="found none"):
        PlainText([], LAYOUT)
    with pytest.raises(DataError, match="every passage is empty"):
        PlainText(["\u200b", "\u0000"], LAYOUT).example(1, generator_for(0))


def test_labels_are_filled_up() -> None:
    captions = SingleCaption(RECORDS, LAYOUT, false_caption_ratio=0.0)
    source = Labelled(captions, ("matched", "answer"))
    assert (len(source), source.records) == (12, RECORDS)
    assert source.example(0, generator_for(0)).labels == {"matched": 1, "answer": IGNORE}


class Numbers:
    """A source whose examples are named after their place."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count

    def example(self, index: int, rng: object) -> Example:
        assert 0 <= index < self.count
        return Example(id=f"{self.name}{index}", rows=(), images=())


def test_mixture_passes_over_every_source_as_often_as_weighted() -> None:
    plain = Mixture([Numbers("a", 3), Numbers("b", 2)])
    assert [plain.example(index, generator_for(0)).id for index in range(len(plain))] == ["a0", "a1", "a2", "b0", "b1"]
    weighted = Mixture([Numbers("a", 4), Numbers("b", 2), Numbers("c", 10)], [0.5, 2, 1.5])
    assert len(weighted) == 2 + 4 + 15
    drawn = [weighted.example(index, generator_for(7, index)).id for index in range(len(weighted))]
    assert drawn[2:6] == ["b0", "b1", "b0", "b1"]
    assert drawn[6:16] == [f"c{number}" for number in range(10)]
    epochs = {weighted.example(0, generator_for(epoch, 0)).id for epoch in range(40)}
    assert epochs == {"a0", "a1", "a2", "a3"}, "a part of a pass is drawn afresh"


@pytest.mark.parametrize(("sources", "weights"), [([], None), ([Numbers("a", 1)], [0.0]), ([Numbers("a", 1)], [1.0, 1.0])])
def test_impossible_mixtures(sources: list[Numbers], weights: list[float] | None) -> None:
    with pytest.raises(ConfigError, match="one positive weight"):
        Mixture(sources, weights)
