"""What pre-training corpora show the model, and how often."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from visling.data.annotations.captions import CaptionRecord
from visling.data.annotations.lxmert import LxmertRecord
from visling.data.annotations.questions import QuestionRecord
from visling.data.annotations.vcr import VcrRecord
from visling.data.answers import AnswerVocabulary
from visling.data.batches.loader import Source
from visling.data.batches.masking import TokenMasking, mask_tokens
from visling.data.corpora.base import SentenceRecord
from visling.data.corpora.captions import CaptionPairs, SingleCaption, VilbertCaptions
from visling.data.corpora.mixture import Labelled, Mixture
from visling.data.corpora.questions import LxmertSentences, QuestionAnswer
from visling.data.corpora.statements import LabelledSentences
from visling.data.corpora.text import PlainText
from visling.data.corpora.vcr import VcrChoices
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError
from visling.runtime import generator_for
from visling.types import IGNORE, Example, InputSpec, TextRow

TOKENIZER = Tokenizer()
LAYOUT = TextLayout(TOKENIZER, InputSpec())
NAMES = ["circle", "square", "triangle", "star"]
RECORDS = [
    CaptionRecord(id=f"{name}{number}", images=(f"image_{at}",), caption=f"{name} {number}")
    for at, name in enumerate(NAMES)
    for number in ("one", "two", "three")
]


DRAWS = 100_000


class Remembering:
    """A layout that lays each text out once, and knows what it laid out: a hundred thousand examples in a second."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, ...], TextRow] = {}
        self.said: dict[int, tuple[str, ...]] = {}

    def row(self, *given: str) -> TextRow:
        if given not in self.rows:
            self.rows[given] = LAYOUT.row(*given)
            self.said[id(self.rows[given])] = given
        return self.rows[given]

    def __call__(self, example: Example) -> tuple[str, ...]:
        """The sentences of an example's first row."""
        return self.said[id(example.rows[0])]


def drawn(make: Callable[[Any], Source], index: int) -> tuple[Counter[tuple[str, ...]], Counter[tuple[int, ...]]]:
    """How often each text and each set of labels came in so many draws of an example, whose image stays the same."""
    layout, rng = Remembering(), generator_for(5, index)
    source = make(layout)
    examples = [source.example(index, rng) for _ in range(DRAWS)]
    assert {example.images for example in examples} == {examples[0].images}
    return Counter(map(layout, examples)), Counter(tuple(example.labels.values()) for example in examples)


def expect(found: Counter[Any], shares: Mapping[Any, float]) -> None:
    """Each outcome, and no other, has its share of all draws within five standard deviations."""
    assert found.keys() == {outcome for outcome, share in shares.items() if share}
    assert abs(sum(shares.values()) - 1) < 1e-9
    for outcome, share in shares.items():
        off = found[outcome] - DRAWS * share
        assert abs(off) <= 5 * math.sqrt(DRAWS * share * (1 - share)), (outcome, found[outcome] / DRAWS, share)


def texts(example: Example, row: int = 0) -> list[str]:
    """The sentences of a row."""
    pieces = TOKENIZER.tokens(example.rows[row].ids)
    return " ".join(pieces[1:-1]).split(" [SEP] ")


def test_caption_pairs() -> None:
    source = CaptionPairs(RECORDS, LAYOUT)
    assert len(source) == 12
    for draw in range(40):
        example = source.example(4, generator_for(0, draw))
        first, second = texts(example)
        assert first == "square two"
        assert example.images == ("image_1",)
        assert example.rows[0].segments.max() == 1
        assert example.labels == {"matched": int(second.startswith("square"))}


def test_half_of_the_second_captions_are_of_another_image() -> None:
    said, labels = drawn(lambda layout: CaptionPairs(RECORDS, layout), 4)
    others = {("square two", record.caption): 0.5 / 9 for record in RECORDS if record.images != ("image_1",)}
    expect(said, {("square two", "square one"): 0.25, ("square two", "square three"): 0.25, **others})
    expect(labels, {(1,): 0.5, (0,): 0.5})


@pytest.mark.parametrize("index", [3, 4, 5])
def test_every_sibling_is_drawn_but_never_the_caption_itself(index: int) -> None:
    drawn = {
        texts(example)[1]
        for draw in range(60)
        if (example := CaptionPairs(RECORDS, LAYOUT).example(index, generator_for(draw))).labels["matched"]
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
    for draw in range(40):
        example = source.example(0, generator_for(1, draw))
        assert example.images == ("image_0",)
        assert example.labels["matched"] == int(texts(example) == ["circle one"])
    said, labels = drawn(lambda layout: SingleCaption(RECORDS, layout, false_caption_ratio=ratio), 0)
    expect(
        said,
        {
            ("circle one",): 1 - ratio,
            **{(record.caption,): ratio / 9 for record in RECORDS if record.images != ("image_0",)},
        },
    )
    expect(labels, {(1,): 1 - ratio, (0,): ratio})


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
    return QuestionRecord(
        id="1",
        images=("x",),
        question=text,
        question_type="",
        answer_type="",
        answers=answers,
        multiple_choice_answer=None,
    )


@pytest.mark.parametrize("text", ["what is it?", "what is it ", "what is it ?"])
def test_question_with_answer_is_one_text_with_whole_words(text: str) -> None:
    source = QuestionAnswer([question(("red", "dark red"), text)], LAYOUT)
    made = [source.example(0, generator_for(draw)) for draw in range(40)]
    assert {texts(example)[0] for example in made} == {"what is it ? red", "what is it ? dark red"}
    assert all(example.rows[0].segments.max() == 0 and example.labels == {"matched": IGNORE} for example in made)


def test_each_answer_is_drawn_as_often_as_it_was_given() -> None:
    said, _ = drawn(lambda layout: QuestionAnswer([question(("red", "dark red", "red"))], layout), 0)
    expect(said, {("what is it? red",): 2 / 3, ("what is it? dark red",): 1 / 3})


def test_questions_without_answers() -> None:
    with pytest.raises(DataError, match="'1' has no answers"):
        QuestionAnswer([question(None)], LAYOUT)


def vcr(number: int, **changed: Any) -> VcrRecord:
    """A question about two people and a dog; its second answer and its last rationale are right."""
    given: dict[str, Any] = {
        "id": f"val-{number}",
        "images": (f"{number}@0",),
        "objects": ("person", "dog", "person"),
        "question": ("does", (2,), "see", (1,), "?"),
        "answer_choices": (("yes",), ((0,), "does"), ("no",), ("maybe",)),
        "rationale_choices": (("look",), ((2,), "smiles"), ("why",), ((0, 1), "left")),
        "answer_label": 1,
        "rationale_label": 3,
        "movie": "movie",
        "question_number": number,
        "metadata": Path("none"),
    }
    return VcrRecord(**(given | changed))


def test_every_choice_of_vcr_is_shown_once_with_its_name_for_everybody() -> None:
    source = VcrChoices([vcr(0), vcr(1)], LAYOUT, objects_from={"1@0": 1})
    assert len(source) == 16
    made = [source.example(index, generator_for(0, index)) for index in range(16)]
    asked, right = "does casey see dog ?", "does casey see dog ? riley does"
    expected = [[asked, choice] for choice in ("yes", "casey does", "no", "maybe")]
    expected += [[right, choice] for choice in ("look", "casey smiles", "why", "riley dog left")]
    assert [texts(example) for example in made] == expected * 2
    assert [example.labels["matched"] for example in made] == [0, 1, 0, 0, 0, 0, 0, 1] * 2
    assert len({example.id for example in made}) == 16
    assert [record.images for record in source.records] == [example.images for example in made]
    assert not any(example.rows[0].links for example in made[:8]), "the store holds other regions of this image"
    assert [example.rows[0].links for example in made[8:10]] == [((2, 3), (4, 2)), ((2, 3), (4, 2), (7, 1))]


def test_quirk_a_question_of_vcr_is_shown_with_one_choice_in_the_release() -> None:
    source = VcrChoices([vcr(number) for number in range(10)], LAYOUT, objects_from={}, same_choice=True)
    shown = [source.example(index, generator_for(0)).id for index in range(len(source))]
    assert shown == [f"val-{number}:{number % 8}" for number in range(10) for _ in range(8)]
    assert source.example(8 * 9, generator_for(0)).labels == {"matched": 1}, "choice 1 of question 9"


@pytest.mark.parametrize("label", ["answer_label", "rationale_label"])
def test_choices_of_vcr_without_labels(label: str) -> None:
    with pytest.raises(DataError, match="'val-1' has no labels: pre-training on VCR needs a split that tells"):
        VcrChoices([vcr(0), vcr(1, **{label: None})], LAYOUT, objects_from={})


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
    for draw in range(40):
        example = source.example(1, generator_for(0, draw))
        assert example.images == ("a",)
        assert example.labels["matched"] == int(texts(example) == ["colour"])
        assert texts(example)[0] in ("colour", "other", "number"), "never a sentence of the same image"
    said, labels = drawn(lambda layout: LxmertSentences(SENTENCES, layout, answers=ANSWERS), 1)
    expect(said, {("colour",): 1 / 2, ("other",): 1 / 4, ("number",): 1 / 4})
    expect(labels, {(0, IGNORE): 1 / 2, (1, 1): 1 / 2 / 3, (1, 2): 1 / 3})


@pytest.mark.parametrize(("index", "expected"), [(0, IGNORE), (2, IGNORE), (3, 0)])
def test_what_is_not_asked_or_not_in_the_table_has_no_answer(index: int, expected: int) -> None:
    source = LxmertSentences(SENTENCES, LAYOUT, answers=ANSWERS, false_sentence_ratio=0.0)
    assert source.example(index, generator_for(0)).labels == {"matched": 1, "answer": expected}


def test_lxmert_without_matching_or_answers() -> None:
    source = LxmertSentences(SENTENCES, LAYOUT, answers=ANSWERS, false_sentence_ratio=None)
    assert {texts(source.example(3, generator_for(draw)))[0] for draw in range(30)} == {"number"}
    assert source.example(3, generator_for(0)).labels == {"matched": IGNORE, "answer": 0}
    assert LxmertSentences(SENTENCES, LAYOUT, false_sentence_ratio=None).example(3, generator_for(0)).labels == {
        "matched": IGNORE
    }
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
    for draw in range(40):
        example = source.example(0, generator_for(2, draw))
        assert example.images == ("image_0",)
        assert example.labels["matched"] == ((generator_for(2, draw).random() > 0.5) == keep_above)
        assert texts(example) == ["circle one"] or not example.labels["matched"]
    said, labels = drawn(lambda layout: VilbertCaptions(records, layout, pool=pool, keep_above=keep_above), 0)
    # As many as there are images, the right one included.
    expect(said, {("circle one",): 1 / 2 + 1 / 6, ("gone",): 1 / 6, ("square one",): 1 / 6})
    expect(labels, {(1,): 1 / 2, (0,): 1 / 2})


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
    assert len(PlainText(["alone"], LAYOUT).example(0, generator_for(0)).rows[0].ids) == 64, (
        "behind the last passage comes the first"
    )
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
    rng = generator_for(3)
    expect(Counter(weighted.example(0, rng).id for _ in range(DRAWS)), {f"a{number}": 1 / 4 for number in range(4)})
    expect(Counter(weighted.example(20, rng).id for _ in range(DRAWS)), {f"c{number}": 1 / 10 for number in range(10)})


def test_a_mixture_knows_the_annotation_of_an_example() -> None:
    parts = [SingleCaption(RECORDS[:7], LAYOUT), Labelled(SingleCaption(RECORDS[3:], LAYOUT), ("matched",))]
    mixed = Mixture(parts, [0.5, 1.7])
    for index in range(len(mixed)):
        assert mixed.record(index, generator_for(2, index)).id == mixed.example(index, generator_for(2, index)).id


@pytest.mark.parametrize(
    ("sources", "weights"), [([], None), ([Numbers("a", 1)], [0.0]), ([Numbers("a", 1)], [1.0, 1.0])]
)
def test_impossible_mixtures(sources: list[Numbers], weights: list[float] | None) -> None:
    with pytest.raises(ConfigError, match="one positive weight"):
        Mixture(sources, weights)
