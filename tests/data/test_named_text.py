"""Rows of a question and its choices: pieces, links, cuts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from visling.data.named_text import cut_front, cut_longer, cut_second, cut_shared, lay_out_choices, split_words
from visling.data.text import NamedWord, TextLayout, Tokenizer
from visling.errors import DataError
from visling.types import InputSpec, TextRow

TOKENIZER = Tokenizer()
QUESTION: list[NamedWord] = [("why", None), ("is", None), ("bewilderedly", 4), ("here", None), ("?", None)]
CHOICES: list[list[NamedWord]] = [[("no", None)], [("it's", 2), ("snowing", None), ("dog", 0), (".", None)]]


def rows(most: int = 40, **settings: Any) -> tuple[tuple[TextRow, ...], TextLayout]:
    layout = TextLayout(TOKENIZER, InputSpec(max_tokens=most))
    given = {"cut": "longer", "links": "every_piece", **settings}
    return lay_out_choices(layout, given.pop("parts", [QUESTION]), CHOICES, **given), layout


def text(row: TextRow) -> str:
    return " ".join(TOKENIZER.tokens(row.ids))


def links(row: TextRow) -> list[tuple[str, int]]:
    return [(TOKENIZER.tokens([row.ids[at]])[0], item) for at, item in row.links]


def test_pieces_know_their_words_and_objects() -> None:
    pieces = split_words(TOKENIZER, CHOICES[1])
    assert TOKENIZER.tokens(pieces.ids) == ["it", "'", "s", "snow", "##ing", "dog", "."]
    assert pieces.owners.tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert pieces.words.tolist() == [0, 1, 2, 3, 3, 4, 5]
    assert pieces.objects.tolist() == [2, 2, 2, -1, -1, 0, -1]
    with pytest.raises(DataError, match=r"a text is empty: found \[''\]"):
        split_words(TOKENIZER, [("", 1)])


def test_links_of_every_piece_of_the_first_or_of_none() -> None:
    (_, row), _ = rows()
    assert links(row) == [("bewildered", 4), ("##ly", 4), ("it", 2), ("'", 2), ("s", 2), ("dog", 0)]
    (_, row), _ = rows(links="first_piece")
    assert links(row) == [("bewildered", 4), ("it", 2), ("dog", 0)]
    (_, row), _ = rows(links="none")
    assert row.links == ()


def test_orders_and_separated_parts() -> None:
    parts = [QUESTION[:2], CHOICES[0]]
    (row, _), _ = rows(parts=parts)
    assert text(row) == "[CLS] why is no [SEP] no [SEP]"
    (row, _), _ = rows(parts=parts, separated=True)
    assert text(row) == "[CLS] why is [SEP] no [SEP] no [SEP]"
    assert row.segments.tolist() == [0] * 6 + [1] * 2
    (_, row), _ = rows(parts=[QUESTION[:2]], order="answer_first")
    assert text(row) == "[CLS] it ' s snow ##ing dog . [SEP] why is [SEP]"
    assert links(row) == [("it", 2), ("'", 2), ("s", 2), ("dog", 0)]
    (_, row), _ = rows(parts=[QUESTION[:2]], order="one_sentence")
    assert text(row) == "[CLS] why is it ' s snow ##ing dog . [SEP]"
    assert (links(row), set(row.segments.tolist())) == ([("it", 2), ("'", 2), ("s", 2), ("dog", 0)], {0})


@pytest.mark.parametrize(
    ("cut", "question", "choice"),
    [
        ("longer", "why is bewildered ##ly", "it ' s snow"),
        ("shared", "why is bewildered ##ly", "it ' s snow"),
        ("second", "why is bewildered ##ly here ?", "it '"),
        ("front", "why is bewildered ##ly here ?", "dog ."),
    ],
)
def test_long_rows_lose_what_the_rule_says_and_are_counted(cut: Any, question: str, choice: str) -> None:
    (short, long), layout = rows(11, cut=cut)
    assert text(long) == f"[CLS] {question} [SEP] {choice} [SEP]"
    whole = question if cut == "shared" else "why is bewildered ##ly here ?"
    assert text(short) == f"[CLS] {whole} [SEP] no [SEP]"
    assert layout.truncated == 1


def test_rules_of_cutting() -> None:
    assert cut_front(5, 4, 9) == (0, 0)
    assert cut_front(5, 4, 6) == (0, 3)
    assert cut_front(5, 4, 3) == (2, 4)
    assert cut_longer(8, 8, 9) == (5, 4)
    assert cut_longer(8, 2, 9) == (7, 2)
    assert cut_second(8, 8, 9) == (8, 1)
    assert cut_second(12, 8, 9) == (8, 1)
    assert cut_second(4, 3, 9) == (4, 3)
    assert cut_shared([8], [8, 1, 3], 9) == ([4], [5, 1, 3]), "every choice reads the question as the longest left it"
    assert cut_shared([3, 4], [2], 6) == ([1, 3], [2]), "the question gives before the answer"
    assert cut_shared([1, 6], [2], 6) == ([1, 3], [2])


def test_words_are_counted_on_from_text_to_text() -> None:
    (_, row), _ = rows(parts=[QUESTION[:2], [("it's", None)]], separated=True)
    assert row.words is not None
    assert row.words.tolist() == [-1, 0, 1, 2, 3, 4, 5, -1, 6, 7, 8, 9, 9, 10, 11, -1]
    assert np.array_equal(row.segments == 1, np.arange(16) > 7)
