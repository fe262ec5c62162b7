"""Visual Genome: descriptions of regions, and questions with one answer each. Field names changed between its releases;
both are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visling.data.annotations.captions import Captions, collect
from visling.data.annotations.files import Layout, has_words, plain_id, read_json
from visling.data.annotations.questions import QuestionRecord
from visling.errors import DataError

REGIONS, QUESTIONS = "region_descriptions.json", "question_answers.json"
"""Names of the files."""


def read_region_descriptions(path: str | Path) -> Captions:
    """Phrases of `region_descriptions.json` as captions of their whole image.

    Raises:
        DataError: the file is missing, truncated or of another layout.
    """

    def rows() -> Iterator[tuple[str, str, Any]]:
        for image, region in _iterate_entries(Path(path), "regions"):
            with Layout(Path(path)):
                name = plain_id(_first_field(region, ("region_id", "id"), Path(path)))
            yield name, image, region.get("phrase")

    return collect(rows())


def read_genome_questions(path: str | Path) -> tuple[list[QuestionRecord], int]:
    """Questions of `question_answers.json`, and how many were left out because they have no words or a repeated id.

    Raises:
        DataError: the file is missing, truncated or of another layout.
    """
    path = Path(path)
    records: list[QuestionRecord] = []
    seen: set[str] = set()
    left_out = 0
    for image, pair in _iterate_entries(path, "qas"):
        number = str(_first_field(pair, ("qa_id", "id"), path))
        question, answer = (" ".join(str(pair.get(name) or "").split()) for name in ("question", "answer"))
        if number in seen or not has_words(question) or not has_words(answer):
            left_out += 1
            continue
        seen.add(number)
        records.append(
            QuestionRecord(
                id=number,
                images=(image,),
                question=question,
                question_type="",
                answer_type="",
                answers=(answer,),
                multiple_choice_answer=answer,
            )
        )
    return records, left_out


def _iterate_entries(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Image id and entry, for the entries of the list `name` of every image."""
    content = read_json(path)
    if not isinstance(content, list) or any(
        not isinstance(image, dict) or not isinstance(image.get(name), list) for image in content
    ):
        raise DataError(
            f"{path} must be a list of images, each with a list {name!r}; found another layout. "
            "Check which file of Visual Genome it is."
        )
    with Layout(path, "image") as at:
        for at.entry, listed in enumerate(content):
            for entry in listed[name]:
                if not isinstance(entry, dict):
                    raise TypeError(f"{entry!r:.60} in its {name}")
                image = entry["image_id"] if "image_id" in entry else _first_field(listed, ("image_id", "id"), path)
                yield plain_id(image), entry


def _first_field(entry: dict[str, Any], names: tuple[str, ...], path: Path) -> Any:
    for name in names:
        if name in entry:
            return entry[name]
    raise DataError(f"{path}: an entry lacks {' or '.join(map(repr, names))}; found {', '.join(entry) or 'nothing'}.")
