"""LXMERT's answer table: the spelling shared by answers of several data sets, and the entries of a task's
answers.

Source   LXMERT release, `AnswerTable` and `load_lxmert_qa`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from visling.data.annotations.files import Layout, plain_id, read_json
from visling.data.answers import AnswerVocabulary
from visling.errors import DataError

_ARTICLES = ("a ", "an ", "the ")
_SPELLINGS: Mapping[str, str] = {
    "a man": "man",
    "the man": "man",
    "a woman": "woman",
    "the woman": "woman",
    **{
        word: str(number)
        for number, word in enumerate(
            ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], start=1
        )
    },
    "grey": "gray",
}


def table_form(answer: str) -> str:
    """An answer as the table spells it: lower case, without one final full stop and leading articles, numbers up to ten
    as digits.

    Each article is removed at most once, "a" before "an" before "the", so "a an x" becomes "x" and "the a x" stays "a
    x". White space is stripped only where something was removed.
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

    For `nn.heads.NormedClassifier.start_from`. Of VQA's 3,129 answers 3,124 are in the table of 9,500, of GQA's 1,842
    1,736.
    """
    number = {entry: row for row, entry in enumerate(table)}
    return tuple(number.get(table_form(answer)) for answer in answers)


def read_table(path: str | Path, sources: Iterable[str] | None = None) -> AnswerVocabulary:
    """The table of a file (`all_ans.json`): a list of `{"ans", "dsets"}` in the order of the outputs.

    Args:
        sources: keep only answers of these data sets (vqa, gqa, visual7w); the order stays, the numbers are contiguous.
    Raises:
        DataError: the file is missing, truncated or of another layout, an answer occurs twice, or no answer is of one
            of the data sets.
    """
    path = Path(path)
    entries = read_json(path)
    if not isinstance(entries, list) or any(not isinstance(entry, dict) or "ans" not in entry for entry in entries):
        raise DataError(
            f"{path} must be a list of objects with 'ans' and 'dsets'; found another layout. "
            "Is it LXMERT's all_ans.json?"
        )
    wanted = None if sources is None else set(sources)
    with Layout(path):
        return _select_answers(entries, wanted, path)


def _select_answers(entries: Sequence[Mapping[str, Any]], wanted: set[str] | None, path: Path) -> AnswerVocabulary:
    """See `read_table`."""
    present = {plain_id(source) for entry in entries for source in entry.get("dsets", ())}
    if wanted is not None and (unknown := sorted(wanted - present)):
        raise DataError(
            f"{path} has no answer of {', '.join(unknown)}; its data sets are {', '.join(sorted(present))}. "
            "Name some of these."
        )
    try:
        return AnswerVocabulary(
            [entry["ans"] for entry in entries if wanted is None or wanted.intersection(entry.get("dsets", ()))]
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def build_table(labels: Iterable[Mapping[str, float]], minimum: int) -> AnswerVocabulary:
    """A table of the answers that are the best one of at least `minimum` questions, sorted as in the release.

    Args:
        labels: answer -> score, for every question.
    Raises:
        DataError: no answer is that frequent.
    """
    counts = Counter(table_form(max(label, key=lambda answer: label[answer])) for label in labels if label)
    del counts[""]
    return AnswerVocabulary(sorted(AnswerVocabulary.build(counts, minimum)))


def listed(label: Mapping[str, float], table: Container[str]) -> dict[str, float]:
    """The answers of a question that are in the table, in its spelling, in the order of the release.

    Where two answers share a spelling, the score of the one that had to be respelt counts, and of several such the
    last: the release removes a respelt answer and puts it back under its new name.
    """
    kept = dict(label)
    for answer in label:
        form = table_form(answer)
        if form not in table:
            kept.pop(answer)
        elif form != answer:
            kept[form] = kept.pop(answer)
    return kept
