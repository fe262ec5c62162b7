"""Questions and answers as a model is shown them, and how often."""

from __future__ import annotations

from collections import Counter

import pytest
from fixtures.corpus_draws import LAYOUT, count_draws, expect_shares, sentences_of

from visling.data.annotations.lxmert import LxmertRecord
from visling.data.annotations.questions import QuestionRecord
from visling.data.answers import AnswerVocabulary
from visling.data.corpora.questions import LxmertSentences, QuestionAnswer
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError
from visling.runtime import generator_for
from visling.types import IGNORE, InputSpec


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
    assert {sentences_of(example)[0] for example in made} == {"what is it ? red", "what is it ? dark red"}
    assert all(example.rows[0].segments.max() == 0 and example.labels == {"matched": IGNORE} for example in made)


def test_each_answer_is_drawn_as_often_as_it_was_given() -> None:
    said, _ = count_draws(lambda layout: QuestionAnswer([question(("red", "dark red", "red"))], layout), 0)
    expect_shares(said, {("what is it? red",): 2 / 3, ("what is it? dark red",): 1 / 3})


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
    for draw in range(40):
        example = source.example(1, generator_for(0, draw))
        assert example.images == ("a",)
        assert example.labels["matched"] == int(sentences_of(example) == ["colour"])
        assert sentences_of(example)[0] in ("colour", "other", "number"), "never a sentence of the same image"
    said, labels = count_draws(lambda layout: LxmertSentences(SENTENCES, layout, answers=ANSWERS), 1)
    expect_shares(said, {("colour",): 1 / 2, ("other",): 1 / 4, ("number",): 1 / 4})
    expect_shares(labels, {(0, IGNORE): 1 / 2, (1, 1): 1 / 2 / 3, (1, 2): 1 / 3})


@pytest.mark.parametrize(("index", "expected"), [(0, IGNORE), (2, IGNORE), (3, 0)])
def test_what_is_not_asked_or_not_in_the_table_has_no_answer(index: int, expected: int) -> None:
    source = LxmertSentences(SENTENCES, LAYOUT, answers=ANSWERS, false_sentence_ratio=0.0)
    assert source.example(index, generator_for(0)).labels == {"matched": 1, "answer": expected}


def test_lxmert_without_matching_or_answers() -> None:
    source = LxmertSentences(SENTENCES, LAYOUT, answers=ANSWERS, false_sentence_ratio=None)
    assert {sentences_of(source.example(3, generator_for(draw)))[0] for draw in range(30)} == {"number"}
    assert source.example(3, generator_for(0)).labels == {"matched": IGNORE, "answer": 0}
    assert LxmertSentences(SENTENCES, LAYOUT, false_sentence_ratio=None).example(3, generator_for(0)).labels == {
        "matched": IGNORE
    }
    assert len(LxmertSentences(SENTENCES[:2], LAYOUT, false_sentence_ratio=None)) == 2
    with pytest.raises(DataError, match="no other image"):
        LxmertSentences(SENTENCES[:2], LAYOUT)
    with pytest.raises(ConfigError, match="false_sentence_ratio"):
        LxmertSentences(SENTENCES, LAYOUT, false_sentence_ratio=-1)


def test_answers_are_drawn_from_the_list_of_the_release() -> None:
    def record(number: int, *answers: str) -> QuestionRecord:
        return QuestionRecord(
            id=str(number),
            images=("1",),
            question="Red, or not? ",
            question_type="",
            answer_type="",
            answers=answers,
            multiple_choice_answer=answers[0],
        )

    records = [record(1, "rare", "yes", "yes", "no"), record(2, "rare", "rarer")]
    tokenizer = Tokenizer()
    layout = TextLayout(tokenizer, InputSpec())
    listed = AnswerVocabulary(["<unk>", "yes", "no"])

    def drawn(index: int, source: QuestionAnswer) -> Counter[str]:
        rows = (source.example(index, generator_for(5, number)).rows[0] for number in range(300))
        return Counter(tokenizer.decode(row.ids) for row in rows)

    release = QuestionAnswer(records, layout, answers=listed, text="release")
    first = drawn(0, release)
    assert set(first) == {"red or not ? yes", "red or not ? no"}
    assert 170 < first["red or not ? yes"] < 230, "in proportion to the people who gave it"
    assert set(drawn(1, release)) == {"red or not ? < unk >"}
    assert any("rare" in text for text in drawn(0, QuestionAnswer(records, layout)))
