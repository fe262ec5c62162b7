"""What people answered to VQA's questions, as the annotation files hold it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from sys import intern
from typing import Any

from visling.data.annotations.files import Layout, optional_text


def by_question(listed: Sequence[Mapping[str, Any]], path: Path) -> dict[Any, Mapping[str, Any]]:
    with Layout(path, "annotation") as at:
        found = {}
        for at.entry, entry in enumerate(listed):
            found[entry["question_id"]] = entry
    return found


def read_annotation(annotation: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Fields of a record that come of the annotation of its question."""
    with Layout(path, "annotation of question") as at:
        at.entry = annotation["question_id"]
        answers = tuple(intern(text_of(answer["answer"])) for answer in annotation["answers"])
        return {
            "question_type": intern(optional_text(annotation.get("question_type"))),
            "answer_type": intern(optional_text(annotation.get("answer_type"))),
            "answers": answers,
            "multiple_choice_answer": _most_frequent(annotation, answers),
        }


def _most_frequent(annotation: Mapping[str, Any], answers: Sequence[str]) -> str | None:
    """The annotation's own choice, or, where it names none, the most frequent answer, the first of several."""
    named = annotation.get("multiple_choice_answer")
    if named is not None or not answers:
        return None if named is None else optional_text(named)
    return Counter(answers).most_common(1)[0][0]


def text_of(value: Any) -> str:
    """A value of a file as text; null is empty."""
    return "" if value is None else str(value)
