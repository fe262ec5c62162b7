"""Answer vocabularies and soft answer scores.

Shapes   A answers of the vocabulary, k of them with a score.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from visling import damage
from visling.errors import DataError
from visling.pickles import read_pickle

UNKNOWN = "<unk>"
"""Entry for "any other answer" in vocabularies derived from Pythia."""


class AnswerVocabulary:
    """An ordered list of answers; the order is a property of each checkpoint.

    Args:
        answers: distinct strings; the empty string is allowed (the common VQA lists hold it).
        unknown: the entry that stands for every other answer; ignored if the list does not hold it.
    Raises:
        DataError: an answer is listed twice, or is not a string.
    """

    def __init__(self, answers: Sequence[str], *, unknown: str = UNKNOWN) -> None:
        self.answers = tuple(answers)
        if wrong := [answer for answer in self.answers if not isinstance(answer, str)]:
            raise DataError(f"an answer vocabulary holds strings; found {wrong[0]!r:.80}.")
        self._index = {answer: number for number, answer in enumerate(self.answers)}
        if len(self._index) != len(self.answers):
            twice = [answer for answer, count in Counter(self.answers).items() if count > 1]
            raise DataError(
                f"the answer vocabulary lists {len(twice)} answers more than once, first {twice[0]!r}. "
                "Every answer has one index."
            )
        self.unknown = self._index.get(unknown)
        """Index of the unknown entry, or None."""

    @classmethod
    def build(cls, counts: Mapping[str, int], minimum: int = 9, *, unknown: str | None = None) -> Self:
        """The answers given at least `minimum` times, the most frequent first, ties in alphabetical order.

        Args:
            counts: answer -> number of questions whose most frequent answer it is.
            unknown: entry to put first, for every other answer.
        Raises:
            DataError: no answer is that frequent.
        Source:
            hengyuan-hu's VQA preparation, shared by all later systems: at least 9 questions of train + val.
        """
        kept = sorted(
            (answer for answer, count in counts.items() if count >= minimum and answer != unknown),
            key=lambda answer: (-counts[answer], answer),
        )
        if not kept:
            raise DataError(
                f"no answer occurs {minimum} times among {len(counts)} different ones. Lower the minimum count."
            )
        return cls(kept) if unknown is None else cls([unknown, *kept], unknown=unknown)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a JSON list (of strings, or of LXMERT's `{"ans": ...}`), a list of strings (`label2ans.pkl`) or a
        table from answer to number (`ans2label.pkl`) that ViLBERT pickled, or a text file with one answer per line.

        Raises:
            DataError: the file is missing, or a `.json` or `.pkl` file holds something else.
        """
        path = Path(path)
        try:
            return cls(_read_answers(path))
        except DataError as error:
            raise error if str(path) in str(error) else DataError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a JSON list, or, unless the name ends in `.json`, one answer per line."""
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.answers, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
        else:
            path.write_text("".join(f"{answer}\n" for answer in self.answers), encoding="utf-8")

    @property
    def fingerprint(self) -> str:
        """Digest of the answers and their order; a checkpoint remembers it."""
        return hashlib.sha256(json.dumps(self.answers).encode("utf-8")).hexdigest()

    def index(self, answer: str) -> int | None:
        """Index of an answer, exactly as written; the unknown entry (or None) if it is not listed."""
        return self._index.get(answer, self.unknown)

    def __getitem__(self, index: int) -> str:
        return self.answers[index]

    def __len__(self) -> int:
        return len(self.answers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.answers)

    def __contains__(self, answer: object) -> bool:
        return answer in self._index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnswerVocabulary) and self.answers == other.answers and self.unknown == other.unknown

    def __hash__(self) -> int:
        return hash(self.answers)


def _read_answers(path: Path) -> list[str]:
    """The answers of a file, see `AnswerVocabulary.load`."""
    if path.suffix == ".pkl":
        return _to_answers(read_pickle(path), path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"no answer vocabulary {path}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"answer vocabulary {path} is not UTF-8 text: byte {error.start}: {error.reason}.") from error
    if path.suffix != ".json":
        return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    try:
        return _to_answers(damage.parse_json(text), path)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"answer vocabulary {path} is not JSON: {error}.") from error


def _to_answers(entries: Any, path: Path) -> list[str]:
    """Answers of the entries of a file: a list, or a table from answer to number.

    Raises:
        DataError: they are neither.
    """
    numbers = {str(number) for number in entries.values()} if isinstance(entries, dict) else set()
    if numbers and numbers == {str(number) for number in range(len(entries))}:
        entries = sorted(entries, key=lambda answer: int(entries[answer]))
    if not isinstance(entries, list):
        raise DataError(
            f"answer vocabulary {path} must be a list of answers in the order of their indices; "
            f"found {type(entries).__name__}."
        )
    return [entry["ans"] if isinstance(entry, dict) and "ans" in entry else entry for entry in entries]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SoftScores:
    """Scores of a few answers; the collator makes them dense."""

    indices: NDArray[np.int64]
    """(k,) ascending."""
    scores: NDArray[np.float32]
    """(k,) in (0, 1]."""
    size: int
    """Number of answers A."""

    def dense(self) -> NDArray[np.float32]:
        """(A,)."""
        full = np.zeros(self.size, np.float32)
        full[self.indices] = self.scores
        return full


def soft_scores(
    answers: Sequence[str],
    vocabulary: AnswerVocabulary,
    *,
    formula: Literal["counts", "leave_one_out", "share"] = "counts",
) -> SoftScores:
    """Score of each listed answer, given what people answered.

    Args:
        answers: usually 10; compared with the vocabulary exactly as written. No answers give no scores.
        formula: "counts" is the table 1, 2, 3, 4 or more people -> 0.3, 0.6, 0.9, 1; "leave_one_out" averages min(1, n
            / 3) over the subsets without one person, after repeating fewer than 10 answers cyclically up to 10. With 10
            answers both agree. "share", for questions with few answers, is the share of people among those whose answer
            is listed, so that the scores sum to one.
    Source:
        counts: hengyuan-hu, LXMERT, ViLBERT. leave_one_out: Pythia, VisualBERT, VL-BERT. The unknown entry has no score
            in any.
    """
    if formula == "leave_one_out" and 0 < len(answers) < 10:
        answers = [answers[number % len(answers)] for number in range(10)]
    counts = Counter(
        number
        for answer in answers
        if (number := vocabulary.index(answer)) is not None and number != vocabulary.unknown
    )
    indices = sorted(counts)
    if formula == "counts":
        scores = [(0.3, 0.6, 0.9, 1.0)[min(counts[number], 4) - 1] for number in indices]
    elif formula == "share":
        scores = [counts[number] / counts.total() for number in indices]
    else:
        scores = [_leave_one_out(counts[number], len(answers)) for number in indices]
    return SoftScores(
        indices=np.array(indices, dtype=np.int64), scores=np.array(scores, dtype=np.float32), size=len(vocabulary)
    )


def _leave_one_out(count: int, people: int) -> float:
    """Mean over people of min(1, how many of the others gave the answer / 3)."""
    return (count * min(1.0, (count - 1) / 3) + (people - count) * min(1.0, count / 3)) / people
