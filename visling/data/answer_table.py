"""LXMERT's answer table: the spelling under which answers of several data sets meet, and where the answers of a task stand in it.

Source   LXMERT release, `AnswerTable` and `load_lxmert_qa`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_ARTICLES = ("a ", "an ", "the ")
_SPELLINGS: Mapping[str, str] = {
    "a man": "man",
    "the man": "man",
    "a woman": "woman",
    "the woman": "woman",
    **{word: str(number) for number, word in enumerate(["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], start=1)},
    "grey": "gray",
}


def table_form(answer: str) -> str:
    """An answer as the table spells it: lower case, without one final full stop and leading articles, numbers up to ten as digits.

    Each article is taken off at most once, "a" before "an" before "the", so "a an x" becomes "x" and "the a x" stays "a x". White space is
    stripped only where something was taken off.
    """
    answer = answer.lower()
    if answer.endswith("."):
        answer = answer[:-1].strip()
    for article in _ARTICLES:
        if answer.startswith(article):
            answer = answer.removeprefix(article).strip()
    return _SPELLINGS.get(answer, answer)


def table_rows(answers: Sequence[str], table: Sequence[str]) -> tuple[int | None, ...]:
    """Entry of the table for each answer of a task; None where it has none.

    For `nn.heads.NormedClassifier.start_from`. Of VQA's 3,129 answers 3,124 are in the table of 9,500, of GQA's 1,842 there are 1,736.
    """
    number = {entry: row for row, entry in enumerate(table)}
    return tuple(number.get(table_form(answer)) for answer in answers)
