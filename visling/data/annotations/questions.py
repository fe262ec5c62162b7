"""VQA v2 questions and the answers that people gave."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from visling.data.annotations.captions import entries, is_split, read_json, the_one
from visling.errors import DataError
from visling.types import Record


@dataclass(frozen=True, kw_only=True)
class QuestionRecord(Record):
    """One question about one image."""

    question: str
    question_type: str
    """First words, from the data set's list; empty without annotations."""
    answer_type: str
    """"yes/no", "number" or "other"; empty without annotations."""
    answers: tuple[str, ...] | None
    """As written by people, usually 10; None without annotations."""
    multiple_choice_answer: str | None
    """The most frequent answer."""


_FOLDERS = (".", "Questions", "questions", "Annotations", "annotations")
_QUESTIONS = re.compile(r"(?P<version>v2_)?OpenEnded_(?P<subset>.+_)?(?P<split>[^_]+)_questions\.json")


def read_questions(questions: str | Path, annotations: str | Path | None = None) -> list[QuestionRecord]:
    """Questions of a file in its order, joined with their annotations by question id.

    Args:
        annotations: may hold more questions than asked for; None for a split without answers.
    Raises:
        DataError: a file is missing, truncated or of another layout, a question id comes twice, or a question has no annotation.
    """
    questions = Path(questions)
    asked = entries(read_json(questions), "questions", ("question_id", "image_id", "question"), questions)
    answered = {}
    if annotations is not None:
        annotations = Path(annotations)
        keys = ("question_id", "image_id", "answers", "multiple_choice_answer")
        answered = {entry["question_id"]: entry for entry in entries(read_json(annotations), "annotations", keys, annotations)}
        lacking = [entry["question_id"] for entry in asked if entry["question_id"] not in answered]
        if lacking:
            raise DataError(
                f"{annotations} has no annotation for {len(lacking)} of the {len(asked)} questions of {questions.name}, first {lacking[0]}. "
                "Questions and annotations must be of the same split."
            )
    records = []
    seen = set()
    for entry in asked:
        number = entry["question_id"]
        if number in seen:
            raise DataError(f"{questions}: question {number} comes twice; question ids are unique.")
        seen.add(number)
        known = answered.get(number)
        if known is not None and known["image_id"] != entry["image_id"]:
            raise DataError(f"question {number} is about image {entry['image_id']} in {questions}, about image {known['image_id']} in {annotations}.")
        records.append(
            QuestionRecord(
                id=str(number),
                images=(str(entry["image_id"]),),
                question=str(entry["question"]),
                question_type=known.get("question_type", "") if known else "",
                answer_type=known.get("answer_type", "") if known else "",
                answers=tuple(str(answer["answer"]) for answer in known["answers"]) if known else None,
                multiple_choice_answer=known["multiple_choice_answer"] if known else None,
            )
        )
    return records


def find_vqa_files(root: str | Path, split: str) -> tuple[Path, Path | None]:
    """The question file of a split and its annotation file, if there is one.

    Looks in a folder and in its `Questions` and `Annotations`, for `v2_OpenEnded_*{split}*_questions.json` or the names without `v2_`; "train" finds
    train2014, not trainval2014.

    Raises:
        DataError: no question file, or several (name the split with its year, or move one).
    """
    root = Path(root)
    files = {file.resolve(): file for folder in _FOLDERS for file in sorted((root / folder).glob("*.json"))}
    named = [(file, match) for file in files.values() if (match := _QUESTIONS.fullmatch(file.name))]
    fitting = [(file, match) for file, match in named if is_split(match["split"], split)]
    if any(match["version"] for _, match in fitting):
        fitting = [(file, match) for file, match in fitting if match["version"]]
    pattern = f"v2_OpenEnded_*{split}*_questions.json"
    questions = the_one([file for file, _ in fitting], pattern, root, [file for file, _ in named])
    match = next(match for file, match in fitting if file == questions)
    wanted = f"{match['version'] or ''}{match['subset'] or ''}{match['split']}_annotations.json"
    return questions, next((file for file in files.values() if file.name == wanted), None)
