"""Visual commonsense reasoning: share of right answers, of right rationales given the right answer, and of questions
with both.

Source   VCR's leaderboard: `annot_id`, four scores of the answers, four scores of the rationales for each answer.
Ties     The first of the highest scores is the choice. Only the order of scores matters.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from visling.errors import DataError
from visling.metrics.answers import Average

CHOICES = 4
"""Answers of a question, and rationales of an answer."""
ANSWER_COLUMNS = tuple(f"answer_{number}" for number in range(CHOICES))
RATIONALE_COLUMNS = tuple(
    f"rationale_conditioned_on_a{answer}_{number}" for answer in range(CHOICES) for number in range(CHOICES)
)


@dataclass(frozen=True)
class VcrScores:
    """The three accuracies, as fractions."""

    answer: Average
    """Q -> A."""
    rationale: Average
    """QA -> R, given the right answer."""
    joint: Average
    """Q -> AR: both are right."""


def vcr_hits(answers: ArrayLike, rationales: ArrayLike, labels: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """(N, 3) whether the answer, the rationale and both are right.

    Args:
        answers: (N, 4) scores.
        rationales: (N, 4) scores, given the right answer.
        labels: (N) the right answer and the right rationale.
    Raises:
        DataError: the numbers of examples differ, or there is none.
    """
    chosen, reasons = np.asarray(answers, np.float64), np.asarray(rationales, np.float64)
    if not len(chosen) == len(reasons) == len(labels) or not labels:
        raise DataError(
            f"scores of {len(chosen)} answers and of {len(reasons)} rationales for {len(labels)} labels: "
            "give one of each for at least one question."
        )
    hits = np.column_stack([chosen.argmax(1), reasons.argmax(1)]) == np.asarray(labels)
    return np.column_stack([hits, hits.all(1)])


def vcr_scores(answers: ArrayLike, rationales: ArrayLike, labels: Sequence[tuple[int, int]]) -> VcrScores:
    """Accuracies of scores; arguments and errors as of `vcr_hits`."""
    return VcrScores(
        *(Average(total=float(hits.sum()), count=len(hits)) for hits in vcr_hits(answers, rationales, labels).T)
    )


def submission_scores(text: str, labels: Mapping[str, tuple[int, int]]) -> VcrScores:
    """Accuracies of a submission file; of the rationales, those are read that are given the right answer.

    Args:
        labels: annot_id -> the right answer and the right rationale.
    Raises:
        DataError: not a submission file, or one of other questions.
    """
    given = read_submission(text)
    if given.keys() != labels.keys():
        odd = sorted(given.keys() ^ labels.keys())
        raise DataError(
            f"the submission has {len(given)} questions, {len(labels)} have labels; {len(odd)} are in one of the two "
            f"only, first {odd[0]!r}. Score every question of one split exactly once."
        )
    return vcr_scores(
        [given[name][0] for name in labels],
        [given[name][1][answer] for name, (answer, _) in labels.items()],
        list(labels.values()),
    )


def write_submission(scores: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> str:
    """The official CSV file: annot_id, 4 columns of answers, 16 of rationales.

    Args:
        scores: annot_id -> scores of the answers (4), and of the rationales given each answer (4, 4).
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["annot_id", *ANSWER_COLUMNS, *RATIONALE_COLUMNS])
    for name, (answers, rationales) in scores.items():
        numbers = [np.asarray(part, np.float64).reshape(size) for part, size in ((answers, 4), (rationales, 16))]
        writer.writerow([name, *np.concatenate(numbers).tolist()])
    return file.getvalue()


def write_phase(scores: Mapping[str, NDArray[np.float64]], kind: str) -> str:
    """The columns of one phase as a CSV file, named as in the official one.

    Args:
        scores: annot_id -> (1, choices) given the question or the right answer, or (answers, choices) given each.
        kind: "answer" or "rationale"; rationales given the right answer alone are called `rationale_0` and so on.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for number, (name, given) in enumerate(scores.items()):
        if not number:
            each = [kind] if len(given) == 1 else [f"{kind}_conditioned_on_a{answer}" for answer in range(len(given))]
            columns = [f"{column}_{choice}" for column in each for choice in range(given.shape[1])]
            writer.writerow(["annot_id", *columns])
        writer.writerow([name, *given.flatten().tolist()])
    return file.getvalue()


def read_submission(text: str) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """annot_id -> scores of the answers (4), and of the rationales given each answer (4, 4).

    Raises:
        DataError: a column is missing, a score is no number, or a question occurs twice.
    """
    reader = csv.DictReader(io.StringIO(text))
    wanted = ("annot_id", *ANSWER_COLUMNS, *RATIONALE_COLUMNS)
    if lacking := [name for name in wanted if name not in (reader.fieldnames or ())]:
        raise DataError(
            f"the submission lacks the columns {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}: expected "
            f"a CSV file with a header of {len(wanted)} columns, annot_id, answer_0, ..., {RATIONALE_COLUMNS[-1]}."
        )
    found: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for row in reader:
        name = row["annot_id"]
        try:
            scores = np.array([row[column] for column in wanted[1:]], np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"the submission's scores of {name!r} are not all numbers: {error}.") from error
        if name in found:
            raise DataError(f"the submission has {name!r} twice: score every question exactly once.")
        found[name] = scores[:CHOICES], scores[CHOICES:].reshape(CHOICES, CHOICES)
    return found
