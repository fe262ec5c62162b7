"""Questions about images: VQA v2 with the answers that people gave, GQA with one answer each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visling.data.annotations.files import entries, has_words, is_split, read_json, the_one
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
    """The most frequent answer, named by the annotation or counted."""


EMPTY = "questions without a word"
"""Name under which readers count the questions that they leave out."""

_FOLDERS = (".", "Questions", "questions", "Annotations", "annotations")
_GQA_FOLDERS = (".", "questions", "questions1.2")
_COCO_SPLITS = {"train2014": "train2014", "val2014": "val2014", "test2015": "test2015", "test-dev2015": "test2015"}
"""What a question file calls its split -> what COCO's file names call it."""
_QUESTIONS = re.compile(r"(?P<version>v2_)?OpenEnded_(?P<subset>.+_)?(?P<split>[^_]+)_questions\.json")


def read_questions(
    questions: str | Path, annotations: str | Path | None = None, *, left_out: Counter[str] | None = None
) -> list[QuestionRecord]:
    """Questions of a file in its order, joined with their annotations by question id.

    Images of VQA's own files are named as COCO names them, `COCO_train2014_000000000009`: in a store with Visual
    Genome's images, 9 is another image.

    Args:
        annotations: may cover more questions than the file holds; None for a split without answers.
        left_out: counts questions without a word, which are then left out; None refuses them.
    Raises:
        DataError: a file is missing, truncated or of another layout, a question id comes twice, or a question has no
            annotation or no word.
    """
    questions = Path(questions)
    content = read_json(questions)
    asked = entries(content, "questions", ("question_id", "image_id", "question"), questions)
    coco = _COCO_SPLITS.get(str(content.get("data_subtype")), "") if content.get("data_type") == "mscoco" else ""
    answered = {}
    if annotations is not None:
        annotations = Path(annotations)
        keys = ("question_id", "image_id", "answers")
        answered = {
            entry["question_id"]: entry for entry in entries(read_json(annotations), "annotations", keys, annotations)
        }
        lacking = [entry["question_id"] for entry in asked if entry["question_id"] not in answered]
        if lacking:
            raise DataError(
                f"{annotations} has no annotation for {len(lacking)} of the {len(asked)} questions of "
                f"{questions.name}, first {lacking[0]}. "
                "Questions and annotations must be of the same split."
            )
    records = []
    seen = set()
    for entry in asked:
        number = entry["question_id"]
        if number in seen:
            raise DataError(f"{questions}: question {number} comes twice; question ids are unique.")
        seen.add(number)
        annotation = answered.get(number)
        if annotation is not None and annotation["image_id"] != entry["image_id"]:
            raise DataError(
                f"question {number} is about image {entry['image_id']} in {questions}, "
                f"about image {annotation['image_id']} in {annotations}."
            )
        question = _to_text(entry["question"])
        if _is_empty(question, number, questions, left_out):
            continue
        answers = tuple(_to_text(answer["answer"]) for answer in annotation["answers"]) if annotation else None
        records.append(
            QuestionRecord(
                id=str(number),
                images=(_image_id(str(entry["image_id"]), coco),),
                question=question,
                question_type=annotation.get("question_type", "") if annotation else "",
                answer_type=annotation.get("answer_type", "") if annotation else "",
                answers=answers,
                multiple_choice_answer=_most_frequent(annotation, answers or ()) if annotation else None,
            )
        )
    return records


def _most_frequent(annotation: Mapping[str, Any], answers: Sequence[str]) -> str | None:
    """The annotation's own choice, or, where it names none, the most frequent answer, the first of several."""
    named: str | None = annotation.get("multiple_choice_answer")
    if named is not None or not answers:
        return named
    return Counter(answers).most_common(1)[0][0]


def _image_id(number: str, coco_split: str) -> str:
    return f"COCO_{coco_split}_{int(number):012d}" if coco_split and number.isdecimal() else number


def find_vqa_files(root: str | Path, split: str) -> tuple[Path, Path | None]:
    """The question file of a split and its annotation file, if there is one.

    Looks in a folder and in its `Questions` and `Annotations`, for `v2_OpenEnded_*{split}*_questions.json` or the names
    without `v2_`; "train" finds train2014, not trainval2014.

    Raises:
        DataError: no question file, or several (name the split with its year, or move one).
    """
    root = Path(root)
    files, named = _list_vqa_files(root)
    fitting = [(file, match) for file, match in named if is_split(match["split"], split)]
    if any(match["version"] for _, match in fitting):
        fitting = [(file, match) for file, match in fitting if match["version"]]
    pattern = f"v2_OpenEnded_*{split}*_questions.json"
    questions = the_one([file for file, _ in fitting], pattern, root, [file for file, _ in named])
    match = next(match for file, match in fitting if file == questions)
    wanted = f"{match['version'] or ''}{match['subset'] or ''}{match['split']}_annotations.json"
    return questions, next((file for file in files if file.name == wanted), None)


def has_vqa(root: Path, split: str) -> bool:
    """Whether a folder has question files of a split in VQA's naming."""
    return any(is_split(match["split"], split) for _, match in _list_vqa_files(root)[1])


def _list_vqa_files(root: Path) -> tuple[list[Path], list[tuple[Path, re.Match[str]]]]:
    """JSON files of a folder and its annotation folders, and those of them that hold questions."""
    files = list(
        {file.resolve(): file for folder in _FOLDERS for file in sorted((root / folder).glob("*.json"))}.values()
    )
    return files, [(file, match) for file in files if (match := _QUESTIONS.fullmatch(file.name))]


def read_gqa(path: str | Path, *, left_out: Counter[str] | None = None) -> list[QuestionRecord]:
    """GQA's questions of a file or of a folder of chunks (`train_all_questions/train_all_questions_0.json`), by
    question id.

    Ids stay strings, because some begin with a zero. `question_type` is GQA's structural type, `answer_type` its
    semantic one.

    Args:
        left_out: counts questions without a word, which are then left out; None refuses them.
    Raises:
        DataError: a file is missing, truncated or of another layout, the folder has no chunk, chunks repeat a question,
            or one has no word.
    """
    path = Path(path)
    chunks = [path]
    if path.is_dir():
        chunks = sorted(path.glob(f"{path.name}_*.json"), key=lambda file: (len(file.name), file.name))  # 10 after 9
        if not chunks:
            raise DataError(f"{path} holds no chunk {path.name}_*.json. Unpack the questions again.")
    records: dict[str, QuestionRecord] = {}
    for chunk in chunks:
        content = read_json(chunk)
        if not isinstance(content, dict):
            raise DataError(
                f"{chunk} must be an object from question id to question; found a {type(content).__name__}."
            )
        for number, entry in content.items():
            if not isinstance(entry, dict) or not {"question", "imageId"} <= entry.keys():
                raise DataError(
                    f"{chunk}: question {number} lacks 'question' or 'imageId'. Is it a question file of GQA?"
                )
            if number in records:
                raise DataError(f"{chunk}: question {number} comes twice; question ids are unique.")
            question, types, answer = _to_text(entry["question"]), entry.get("types") or {}, entry.get("answer")
            if _is_empty(question, number, chunk, left_out):
                continue
            records[number] = QuestionRecord(
                id=number,
                images=(str(entry["imageId"]),),
                question=question,
                question_type=types.get("structural") or "",
                answer_type=types.get("semantic") or "",
                answers=None if answer is None else (str(answer),),
                multiple_choice_answer=None if answer is None else str(answer),
            )
    return list(records.values())


def _to_text(value: Any) -> str:
    """A value of a file as text; null is empty."""
    return "" if value is None else str(value)


def _is_empty(question: str, number: Any, path: Path, left_out: Counter[str] | None) -> bool:
    """Whether a question has no word; if so, it is counted in `left_out`.

    Raises:
        DataError: it has none, and `left_out` is None.
    """
    if has_words(question):
        return False
    if left_out is None:
        raise DataError(
            f"{path}: question {number} is empty: found {question!r}, expected at least one word. "
            "Fill it in, or remove it."
        )
    left_out[EMPTY] += 1
    return True


def find_gqa(root: str | Path, split: str) -> Path:
    """GQA's question file, or folder of chunks, of a split in a folder or its `questions`.

    "train" is the balanced set, on which all published systems train; "train_all" is the whole one.

    Raises:
        DataError: neither file nor folder.
    """
    root = Path(root)
    name = _gqa_file_name(split)
    file = _find_gqa(root, name)
    if file is None:
        present = sorted(file.name for folder in _GQA_FOLDERS for file in (root / folder).glob("*_questions*"))
        raise DataError(
            f"no {name}.json or folder {name} under {root}; found {', '.join(present) or 'no GQA questions'}. "
            "Check the folder and the split."
        )
    return file


def has_gqa(root: Path, split: str) -> bool:
    """Whether a folder has GQA's questions of a split."""
    return _find_gqa(root, _gqa_file_name(split)) is not None


def _gqa_file_name(split: str) -> str:
    return f"{split if split.endswith(('_balanced', '_all')) else f'{split}_balanced'}_questions"


def _find_gqa(root: Path, name: str) -> Path | None:
    for folder in _GQA_FOLDERS:
        for path in (root / folder / f"{name}.json", root / folder / name):
            if path.exists():
                return path
    return None
