"""VQA v2 in the files that releases prepared of it, and which of them a folder holds.

Layouts  official   the question and annotation files of the data set (`annotations.questions`)
         lxmert     LXMERT's `data/vqa/{split}.json`: scores in place of people's answers
         imdb       Pythia's and MMF's `imdb_{split}.npy` (VisualBERT; optional in VL-BERT): tokenised questions
         targets    the official questions with hengyuan-hu's `cache/{split}_target.pkl` (ViLBERT): scores by the number
                    of the answer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import digits
from typing import Any, Literal

import numpy as np

from visling.data.annotations.files import Layout, has_words, is_split, plain_id, the_one
from visling.data.annotations.questions import (
    NUM_PEOPLE,
    UNTOLD,
    QuestionRecord,
    answers_of_scores,
    find_lxmert_questions,
    find_vqa_files,
    has_vqa,
    is_part_of_val,
    read_lxmert_questions,
    read_questions,
    read_vqa,
    take_part,
)
from visling.errors import DataError
from visling.image_ids import canonical
from visling.pickles import read_object_array, read_pickle

VqaLayout = Literal["official", "lxmert", "imdb", "targets"]

_IMDB_FOLDERS = (".", "imdb", "vqa_imdb", "data/imdb")
_TARGET_FOLDERS = ("cache", ".")
_ANSWER_KEYS = ("answers", "all_answers", "valid_answers")
"""Where an entry of an imdb file lists answers; the last lists only those of the release's vocabulary."""


@dataclass(frozen=True)
class _Layout:
    """How a layout is recognised and read."""

    holds: Callable[[Path, str], bool]
    read: Callable[[Path, str], list[QuestionRecord]]
    files: Callable[[str], str]
    """Split -> names of its files, for messages."""


def read_vqa_layout(root: str | Path, split: str, layout: VqaLayout | None = None) -> list[QuestionRecord]:
    """Questions of a split of VQA in the layout of a folder.

    Args:
        layout: which one to read where a folder holds several; None = the only one.
    Raises:
        DataError: the folder holds the split in several layouts, or in none; or a file is not of its layout.
    """
    root = Path(root)
    if layout is not None:
        return _LAYOUTS[layout].read(root, split)
    present = [name for name, each in _LAYOUTS.items() if each.holds(root, split)]
    if len(present) > 1:
        found = "; ".join(f"{name} ({_LAYOUTS[name].files(split)})" for name in present)
        raise DataError(
            f"{root} holds the split {split!r} of VQA in several layouts: {found}. "
            f"Choose one, for example with task_settings.layout={present[0]}, or give a folder with a single one."
        )
    return _LAYOUTS[present[0] if present else "official"].read(root, split)


def find_imdb(root: str | Path, split: str) -> Path | None:
    """The imdb file of a split in a folder or its `imdb`, `vqa_imdb` or `data/imdb`, if there is one; "train" finds
    train2014.

    Raises:
        DataError: several.
    """
    root = Path(root)
    files = [file for folder in _IMDB_FOLDERS for file in sorted((root / folder).glob("imdb_*.npy"))]
    fitting = [file for file in files if is_split(file.stem.removeprefix("imdb_"), split)]
    return the_one(fitting, f"imdb_{split}*.npy", root, files) if fitting else None


def read_imdb(path: str | Path) -> list[QuestionRecord]:
    """Questions of an imdb file, in its order; its first entry is a header.

    A question is its tokens, joined by blanks: the release removed commas and question marks. Entries that list fewer
    than ten answers name only those of the release's vocabulary; the others are entered as `UNTOLD`. An entry with
    nothing but a single `answer` has that one.

    Raises:
        DataError: the file is missing, damaged or of another layout, or a question comes twice or has no word.
    """
    path = Path(path)
    entries = read_object_array(path)
    records: dict[str, QuestionRecord] = {}
    with Layout(path) as at:
        for at.entry, entry in enumerate(entries[1:], start=1):
            number = at.entry
            if not isinstance(entry, dict) or not {"question_id", "image_id"} <= entry.keys():
                raise DataError(
                    f"{path}: entry {number} must be an object with 'question_id' and 'image_id'; found "
                    f"{', '.join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__}. "
                    "Is it an imdb file of VQA?"
                )
            name = _spell_id(entry["question_id"])
            if name in records:
                raise DataError(f"{path}: question {name} comes twice; question ids are unique.")
            question = " ".join(map(str, entry.get("question_tokens", ()))) or str(entry.get("question_str", ""))
            if not has_words(question):
                raise DataError(f"{path}: question {name} is empty. Fill it in, or remove it.")
            answers = _listed_answers(entry)
            told = [answer for answer in answers or () if answer != UNTOLD]
            records[name] = QuestionRecord(
                id=name,
                images=(_spell_id(entry.get("image_name", entry["image_id"])),),
                question=question,
                question_type="",
                answer_type="",
                answers=answers,
                multiple_choice_answer=max(told, key=told.count) if told else None,
            )
    return list(records.values())


def _spell_id(value: Any) -> str:
    """An id, which numpy may have made a number of its own."""
    return plain_id(value.item() if isinstance(value, np.generic) else value)


def _listed_answers(entry: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What people answered; None for an entry without answers."""
    listed = next((tuple(map(str, entry[key])) for key in _ANSWER_KEYS if len(entry.get(key, ()))), None)
    if listed is None:
        return (str(entry["answer"]),) if "answer" in entry else None
    return (*listed, *[UNTOLD] * (NUM_PEOPLE - len(listed)))


def find_targets(root: str | Path, split: str) -> Path | None:
    """The target file of a split in a folder or its `cache`, if there is one: for a part of val, that of val."""
    file = f"{_whole_split(Path(root), split).rstrip(digits)}_target.pkl"
    return next((path for folder in _TARGET_FOLDERS if (path := Path(root) / folder / file).is_file()), None)


def _whole_split(root: Path, split: str) -> str:
    return "val" if is_part_of_val(root, split) else split


def read_targets(questions: str | Path, targets: str | Path) -> list[QuestionRecord]:
    """Official questions with the scores of a target file, in the order of their ids.

    Scores stand for people as in `read_lxmert_questions`; answers outside the list next to the target file
    (`trainval_label2ans.pkl` or `trainval_ans2label.pkl`) have none.

    Raises:
        DataError: a file is missing or of another layout, a question has no target or one of another image, or a target
            names an answer beyond the list.
    """
    questions, targets = Path(questions), Path(targets)
    answers = _read_target_answers(targets.parent)
    given = _read_target_entries(targets)
    records = read_questions(questions)
    if lacking := [record.id for record in records if record.id not in given]:
        raise DataError(
            f"{targets} has no target for {len(lacking)} of the {len(records)} questions of {questions.name}, first "
            f"{lacking[0]}. Questions and targets must be of the same split."
        )
    complete = []
    with Layout(targets, "question") as at:
        for record in sorted(records, key=lambda record: int(record.id)):
            at.entry = record.id
            entry = given[record.id]
            if canonical(entry.get("image_id", record.images[0])) != canonical(record.images[0]):
                raise DataError(
                    f"question {record.id} is about image {record.images[0]} in {questions}, about image "
                    f"{entry['image_id']} in {targets}."
                )
            if beyond := [label for label in entry["labels"] if not 0 <= label < len(answers)]:
                raise DataError(
                    f"{targets}: question {record.id} has answer {beyond[0]}, but the list next to the file has "
                    f"{len(answers)} answers. Targets and list must be of one preparation."
                )
            scores = {
                answers[label]: float(score) for label, score in zip(entry["labels"], entry["scores"], strict=True)
            }
            people, most = answers_of_scores(scores)
            complete.append(replace(record, answers=people, multiple_choice_answer=most))
    return complete


def _read_target_entries(path: Path) -> dict[str, Mapping[str, Any]]:
    with Layout(path):
        content = read_pickle(path)
        keys = {"question_id", "labels", "scores"}
        if not isinstance(content, list) or any(
            not isinstance(entry, dict) or not keys <= entry.keys() or len(entry["labels"]) != len(entry["scores"])
            for entry in content
        ):
            raise DataError(
                f"{path} must be a list of objects with question_id, labels and as many scores; found another layout. "
                "Is it a target file of VQA?"
            )
        return {_spell_id(entry["question_id"]): entry for entry in content}


def _read_target_answers(folder: Path) -> Sequence[str]:
    """Answers by their number in target files."""
    file = folder / "trainval_label2ans.pkl"
    if file.is_file():
        listed = read_pickle(file)
        if isinstance(listed, list) and all(isinstance(answer, str) for answer in listed):
            return listed
        raise DataError(f"{file} must be a list of answers, all of them texts; found {listed!r:.80}.")
    file = folder / "trainval_ans2label.pkl"
    numbers = read_pickle(file)
    with Layout(file):
        fits = isinstance(numbers, dict) and sorted(numbers.values()) == list(range(len(numbers)))
    if not fits or not all(isinstance(answer, str) for answer in numbers):
        raise DataError(f"{file} must number its answers from 0 without a gap; found another layout.")
    return sorted(numbers, key=lambda answer: int(numbers[answer]))


def _has_official(root: Path, split: str) -> bool:
    """Whether the official files hold a split; questions without annotations belong to the targets next to them."""
    if not has_vqa(root, split):
        return False
    return find_targets(root, split) is None or find_vqa_files(root, _whole_split(root, split))[1] is not None


def _has_targets(root: Path, split: str) -> bool:
    return find_targets(root, split) is not None and has_vqa(root, split)


def _read_targets(root: Path, split: str) -> list[QuestionRecord]:
    if (file := find_targets(root, split)) is None:
        raise DataError(f"no {split}_target.pkl in {root} or its cache folder. Check the folder and the split.")
    records = read_targets(find_vqa_files(root, _whole_split(root, split))[0], file)
    return take_part(records, root, split) if is_part_of_val(root, split) else records


def _has_lxmert(root: Path, split: str) -> bool:
    """Whether LXMERT's file of a split is there as such: next to val's official files, `minival.json` is a list of
    their questions."""
    return find_lxmert_questions(root, split) is not None and not is_part_of_val(root, split)


def _read_lxmert(root: Path, split: str) -> list[QuestionRecord]:
    if (file := find_lxmert_questions(root, split)) is None:
        raise DataError(f"no {split}.json in {root}. Check the folder and the split.")
    return read_lxmert_questions(file)


def _read_imdb(root: Path, split: str) -> list[QuestionRecord]:
    if (file := find_imdb(root, split)) is None:
        raise DataError(f"no imdb_{split}*.npy in {root} or its imdb folder. Check the folder and the split.")
    return read_imdb(file)


_LAYOUTS: Mapping[VqaLayout, _Layout] = {
    "official": _Layout(_has_official, read_vqa, lambda split: f"v2_OpenEnded_*{split}*_questions.json"),
    "lxmert": _Layout(_has_lxmert, _read_lxmert, lambda split: f"{split}.json"),
    "imdb": _Layout(lambda root, split: find_imdb(root, split) is not None, _read_imdb, lambda split: f"imdb_{split}*"),
    "targets": _Layout(_has_targets, _read_targets, lambda split: f"{split}_target.pkl"),
}
