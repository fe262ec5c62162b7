"""WordPiece against BERT's own tokeniser, layouts against the releases' rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError
from visling.types import InputSpec, TextRow

TOKENIZER = Tokenizer()

NASTY = [
    "",
    "   \t\n ",
    "Unaffable!!  RUNNING",
    "What's the café-crème naïve Ångström?",
    "cafe\u0301 vs café",
    "日本語 と 中文字符 mixed",
    "한국어 한글",
    "Ελληνικά ΣΊΣΥΦΟΣ",
    "straße İstanbul ıI",
    "emoji 😀👩‍👩‍👧 and ☃",
    "x" * 100,
    "x" * 101,
    "zero\u200bwidth \ufeffbom \u00adsoft",
    "control\x00\x07chars\ufffd",
    "no\u00a0break\u3000ideographic\u2028line",
    "1,000.50$ 50% #tag @user a_b a/b \\ ^ ` ~",
    "“curly” ‘quotes’ — dash … ¿qué?",
    "don't can't o'clock",
    "ﬁ ligature ½ ² Ⅷ",
    "हिन्दी العربية עברית ไทย",
]


def layout(**changes: object) -> TextLayout:
    cut = changes.pop("cut", "release")
    return TextLayout(TOKENIZER, InputSpec(**changes), cut=cut)  # type: ignore[arg-type]


def tokens(row: TextRow) -> list[str]:
    return TOKENIZER.tokens(row.ids)


@pytest.fixture(scope="module")
def oracle() -> object:
    transformers = pytest.importorskip("transformers")
    return transformers.BertTokenizer(str(TOKENIZER.vocabulary_file), do_lower_case=True)


def test_the_oracle_is_the_same_vocabulary(oracle: object) -> None:
    assert oracle.convert_tokens_to_ids(["[PAD]", "[MASK]", "circle"]) == [0, 103, TOKENIZER.id("circle")]  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", NASTY)
def test_equals_bert_tokenizer(text: str, oracle: object) -> None:
    assert TOKENIZER.encode(text) == oracle.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60).filter(lambda text: "[" not in text))
def test_equals_bert_tokenizer_on_any_text(text: str) -> None:
    transformers = pytest.importorskip("transformers")
    global _ORACLE
    _ORACLE = _ORACLE or transformers.BertTokenizer(str(TOKENIZER.vocabulary_file), do_lower_case=True)
    assert TOKENIZER.encode(text) == _ORACLE.encode(text, add_special_tokens=False)


_ORACLE = None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Unaffable", ["una", "##ffa", "##ble"]),
        ("What's the Café-crème?", ["what", "'", "s", "the", "cafe", "-", "cr", "##eme", "?"]),
        ("x" * 101, ["[UNK]"]),
        ("日本", ["日", "本"]),
        ("A\tSMALL\nred  circle", ["a", "small", "red", "circle"]),
        ("☃☃ ok", ["[UNK]", "ok"]),
    ],
)
def test_pieces_by_hand(text: str, expected: list[str]) -> None:
    assert TOKENIZER.tokens(TOKENIZER.encode(text)) == expected


def test_vocabulary_is_the_released_one() -> None:
    assert TOKENIZER.size == 30522
    assert (TOKENIZER.pad, TOKENIZER.unk, TOKENIZER.cls, TOKENIZER.sep, TOKENIZER.mask) == (0, 100, 101, 102, 103)
    assert TOKENIZER.vocabulary_file.name == "bert-base-uncased.txt"


def test_special_tokens_in_a_text_are_ordinary_characters() -> None:
    assert TOKENIZER.tokens(TOKENIZER.encode("a [MASK] b")) == ["a", "[", "mask", "]", "b"]


def test_words_group_pieces() -> None:
    assert [TOKENIZER.tokens(word) for word in TOKENIZER.words("an unaffable cat.")] == [
        ["an"],
        ["una", "##ffa", "##ble"],
        ["cat"],
        ["."],
    ]
    assert TOKENIZER.words("  ") == []


def test_decode_joins_pieces_and_drops_padding() -> None:
    ids = [TOKENIZER.cls, *TOKENIZER.encode("Unaffable cats"), TOKENIZER.mask, TOKENIZER.sep, TOKENIZER.pad]
    assert TOKENIZER.decode(ids) == "unaffable cats [MASK]"


def test_texts_split_together_equal_single_ones() -> None:
    ids, words, lengths = TOKENIZER.split(NASTY * 2)
    singles = [TOKENIZER.pieces(text) for text in NASTY * 2]
    assert lengths.tolist() == [len(single) for single, _ in singles]
    assert ids.tolist() == [piece for single, _ in singles for piece in single]
    assert words.tolist() == [word for _, numbers in singles for word in numbers]
    assert [array.tolist() for array in TOKENIZER.split([])] == [[], [], []]


def test_remembered_pieces_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        TOKENIZER.pieces("a cat")[0][0] = 5


def test_unknown_vocabulary_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="bert-base-uncased"):
        Tokenizer("bert-base-uncase")


def test_own_vocabulary_file(tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_text(
        "[PAD]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\n[MASK]\r\na\r\n\u2028\r\n##b\r\n", encoding="utf-8", newline=""
    )
    own = Tokenizer(str(file))
    assert own.size == 8
    assert own.encode("ab c") == [5, 7, 1]


@pytest.mark.parametrize(
    ("content", "message"), [("[PAD]\n[UNK]\n[CLS]\n[SEP]\n", r"lacks \[MASK\]"), ("a\nb\na\n", "repeats 1")]
)
def test_broken_vocabulary_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "vocab.txt"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        Tokenizer(str(file))


def test_single_text() -> None:
    row = layout().row("Unaffable cat")
    assert tokens(row) == ["[CLS]", "una", "##ffa", "##ble", "cat", "[SEP]"]
    assert row.segments.tolist() == [0] * 6
    assert row.words is not None
    assert row.words.tolist() == [-1, 0, 0, 0, 1, -1]
    assert row.answer_at is None


def test_pair_has_segment_one_after_the_first_separator() -> None:
    row = layout().row("a cat", "unaffable dog")
    assert tokens(row) == ["[CLS]", "a", "cat", "[SEP]", "una", "##ffa", "##ble", "dog", "[SEP]"]
    assert row.segments.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert row.words is not None
    assert row.words.tolist() == [-1, 0, 1, -1, 2, 2, 2, 3, -1]


@pytest.mark.parametrize("question", ["Is it red?", "Is it red", "is it red ? "])
def test_answer_slot_in_the_same_segment(question: str) -> None:
    row = layout(answer_slot="same_segment").row(question, answer=True)
    assert tokens(row) == ["[CLS]", "is", "it", "red", "?", "[MASK]", "[SEP]"]
    assert row.answer_at == len(row.ids) - 2
    assert row.segments.tolist() == [0] * 7
    assert row.words is not None
    assert row.words.tolist() == [-1, 0, 1, 2, 3, -1, -1]


def test_answer_slot_in_the_second_segment() -> None:
    row = layout(answer_slot="second_segment").row("is it red?", answer=True)
    assert tokens(row) == ["[CLS]", "is", "it", "red", "?", "[SEP]", "[MASK]", "[SEP]"]
    assert row.answer_at == 6
    assert row.segments.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


def test_models_without_a_slot_get_a_plain_row() -> None:
    assert tokens(layout().row("is it red", answer=True)) == ["[CLS]", "is", "it", "red", "[SEP]"]
    assert layout(answer_slot="same_segment").row("is it red").answer_at is None


@pytest.mark.parametrize(("slot", "kept"), [("none", 6), ("same_segment", 5), ("second_segment", 4)])
def test_long_single_text_keeps_its_first_pieces_and_its_slot(slot: str, kept: int) -> None:
    made = layout(max_tokens=8, answer_slot=slot)
    row = made.row("one two three four five six seven eight nine", answer=True)
    assert len(row.ids) == 8
    assert tokens(row)[1 : 1 + kept] == ["one", "two", "three", "four", "five", "six"][:kept]
    assert (row.answer_at is None) == (slot == "none")
    if row.answer_at is not None:
        assert tokens(row)[row.answer_at] == "[MASK]"
    assert made.truncated == 1


def test_exact_fit_is_not_cut() -> None:
    made = layout(max_tokens=8)
    assert len(made.row("one two three four five six").ids) == 8
    assert len(made.row("one two", "three four five").ids) == 8
    assert made.truncated == 0


def numbered(count: int, word: str) -> str:
    return " ".join([word] * (count - 1) + ["end"])


def test_quirk_pairs_lose_more_than_their_excess_in_the_release() -> None:
    made = layout(max_tokens=128)
    row = made.row(numbered(80, "cat"), numbered(60, "dog"))
    # Excess 140 - 125 = 15: 8 from the first, 15 + 8 from the second (15 - 8 would have done).
    assert (row.segments == 0).sum() - 2 == 72
    assert (row.segments == 1).sum() - 1 == 37
    assert tokens(row)[72] == tokens(row)[-2] == "end", "cut from the front: the ends stay"
    assert made.truncated == 1


def test_exact_cut_fills_the_row() -> None:
    row = layout(max_tokens=128, cut="exact").row(numbered(80, "cat"), numbered(60, "dog"))
    assert len(row.ids) == 128
    assert (row.segments == 0).sum() - 2 == 72


def test_first_text_keeps_32_pieces() -> None:
    row = layout(max_tokens=64).row(numbered(30, "cat"), numbered(60, "dog"))
    assert (row.segments == 0).sum() - 2 == 30
    assert (row.segments == 1).sum() - 1 == 60 - 29


@settings(max_examples=150, deadline=None)
@given(
    a=st.integers(1, 200), b=st.integers(1, 200), most=st.integers(70, 128), cut=st.sampled_from(["release", "exact"])
)
def test_no_pair_is_too_long(a: int, b: int, most: int, cut: str) -> None:
    made = layout(max_tokens=most, cut=cut)
    row = made.row(numbered(a, "cat"), numbered(b, "dog"))
    assert len(row.ids) <= most
    assert made.truncated == int(a + b + 3 > most)
    if cut == "exact":
        assert len(row.ids) == min(a + b + 3, most)
    assert tokens(row).count("[SEP]") == 2
    assert np.all(np.diff(row.segments) >= 0)


@pytest.mark.parametrize("text", ["", "   ", "\u200b"])
def test_empty_text_is_an_error(text: str) -> None:
    with pytest.raises(DataError, match="question is empty"):
        layout(answer_slot="same_segment").row(text, answer=True)
    with pytest.raises(DataError, match="second text is empty"):
        layout().row("fine", text)


def test_no_answer_slot_after_two_texts() -> None:
    with pytest.raises(ConfigError, match="one text, not two"):
        layout(answer_slot="same_segment").row("a", "b", answer=True)


def named(text: str, **regions: int) -> list[tuple[str, int | None]]:
    """Words of a text, some of which name regions."""
    return [(word, regions.get(word)) for word in text.split()]


def test_named_words_are_laid_out_as_a_pair_with_links() -> None:
    first, second = (
        named("Casey 's pottedplant isn't unbelievably red", Casey=3, pottedplant=1),
        named("Casey smiles", Casey=3),
    )
    row = layout().named(first, second)
    plain = layout().row("Casey 's pottedplant isn't unbelievably red", "Casey smiles")
    assert tokens(row) == tokens(plain)
    assert row.segments.tolist() == plain.segments.tolist()
    assert row.words is not None
    assert plain.words is not None
    assert row.words.tolist() == plain.words.tolist()
    assert [(tokens(row)[at], region) for at, region in row.links] == [("casey", 3), ("pot", 1), ("casey", 3)]
    assert [at for at, _ in row.links] == [1, 4, len(row.ids) - 3]


def test_quirk_links_by_word_drift_to_the_left_in_the_release() -> None:
    first, second = named("pottedplant and dog", dog=2, pottedplant=1), named("unbelievably dog", dog=2)
    assert layout().named(first, second).links == ((1, 1), (6, 2), (13, 2))
    assert layout().named(first, second, by_word=True).links == ((1, 1), (3, 2), (9, 2))


def test_a_long_row_of_named_words_loses_the_front_of_its_second_text() -> None:
    first = named(numbered(100, "cat"), end=7)
    second = [("zero", 4), ("unbelievably", 5), *named(numbered(28, "dog"), end=6)]
    made = layout(max_tokens=128)
    row = made.named(first, second)
    assert (row.segments == 0).sum() - 2 == 100, "nothing of the first is cut"
    assert len(row.ids) == 128
    assert tokens(row)[102] == "dog"
    assert row.links == ((100, 7), (126, 6)), "names that are cut have no link"
    assert made.truncated == 1
    assert layout(max_tokens=133).named(first, second).links == ((100, 7), (102, 5), (131, 6)), (
        "linked where the rest of the name stands"
    )
    by_word = layout(max_tokens=128).named(first, second, by_word=True)
    assert by_word.links == ((100, 7),), "number 29 of the second text would stand behind the row"


def test_named_words_whose_first_text_alone_is_too_long() -> None:
    row = layout(max_tokens=16).named(named(numbered(20, "cat"), end=1), named("no dog"))
    assert len(row.ids) == 16
    assert tokens(row)[13:] == ["end", "[SEP]", "[SEP]"]
    assert row.links == ((13, 1),)


def test_named_words_without_a_piece() -> None:
    with pytest.raises(DataError, match="second text is empty"):
        layout().named(named("fine"), [("\u200b", None)])
    row = layout().named([("\u200b", 4), ("Casey", 3)], named("yes"))
    assert (tokens(row)[1], row.links) == ("casey", ((1, 3),))
