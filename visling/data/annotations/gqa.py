"""GQA's questions: the official files, the lists of LXMERT's release, the caches of ViLBERT's multi-task release.

Files    `{tier}_{balanced|all}_questions.json` or a folder of chunks of that name; choices `{tier}_choices.json` or a
         folder of chunks. LXMERT: `train.json`, `valid.json`, `testdev.json`, `submit.json`. ViLBERT:
         `cache/{part}_target.pkl` with `cache/trainval_label2ans.pkl`.
Ids      Texts of digits, some of which begin with a zero; image ids are Visual Genome's numbers, or `n` and a number.
Memory   The official files are gigabytes. They are streamed, and records are kept as columns of about 100 bytes a
         question (`GqaRecords`): 14.3 million questions take 1.5 GB.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from visling.data.annotations.files import Layout, has_words, optional_text, plain_id
from visling.data.annotations.gqa_records import GqaChoices, GqaColumns, GqaRecords
from visling.data.annotations.image_lists import read_image_list
from visling.data.annotations.questions import EMPTY, UNTOLD, find_gqa, has_gqa
from visling.data.annotations.streamed import list_chunks, stream_list, stream_object
from visling.data.answers import AnswerVocabulary
from visling.errors import DataError
from visling.image_ids import canonical
from visling.pickles import read_pickle

NUM_MINVAL = 3000
"""Questions that ViLBERT holds out of trainval: the last ones by id, compared as text."""

_FOLDERS = (".", "gqa")
_CHOICES = (".", "eval", "choices", "questions", "questions1.2")
_CLEAN = "_clean"
_CUT = "trainval"
_NOT_STEPS = ("exist", "query: name", "choose name")
"""Operations with one of these in their text are no step of reasoning (official script)."""


def read_gqa_split(root: Path, split: str, left_out: Counter[str] | None = None) -> GqaRecords:
    """Questions of a split, from the first of these layouts that has it, in the folder or in its `gqa`.

    Official files: "train", "val", "testdev", "test" and "challenge" are the balanced sets, "train_all" and the like
    the whole ones, "submission" what the server wants answers to. LXMERT's lists by their names ("valid", "submit").
    ViLBERT's parts: "trainval" is train and val without the last `NUM_MINVAL` by id, "minval" those; of its caches, or
    of the official files. With "_clean" added, a split loses the questions about images of `genome_test_ids.npy`, which
    other tasks are tested on.

    Args:
        left_out: counts questions without a word, which are left out; None refuses them.
    Raises:
        DataError: no file of the split, or one that is damaged, of another layout or repeats a question.
    """
    name = split.removesuffix(_CLEAN)
    for folder in (root / part for part in _FOLDERS):
        records = _read_folder(folder, "submission_all" if name == "submission" else name, left_out)
        if records is not None:
            return records if name == split else _without_test_images(records, folder)
    present = sorted(
        file.name
        for part in _FOLDERS
        for pattern in ("*_questions*", "questions*/*_questions*", "cache/*_target.pkl")
        for file in (root / part).glob(pattern)
    )
    raise DataError(
        f"no questions of GQA's split {split!r} in {root} or {root / 'gqa'}: expected {name}_balanced_questions.json "
        f"(or {name}_questions.json for a name with _all), LXMERT's {name}.json, or ViLBERT's cache/{name}_target.pkl; "
        f"found {', '.join(present) or 'no GQA questions'}. Check the folder and the split."
    )


def _read_folder(folder: Path, name: str, left_out: Counter[str] | None) -> GqaRecords | None:
    """The questions of a split in one folder, or None."""
    if has_gqa(folder, name):
        return read_gqa_files([find_gqa(folder, name)], left_out, choices=find_choices(folder, name))
    if name in ("minval", _CUT):
        return _read_part(folder, name, left_out)
    if (file := folder / f"{name}.json").is_file():
        return read_lxmert_gqa(file, left_out)
    if (file := folder / "cache" / f"{name}_target.pkl").is_file():
        return read_vilbert_gqa(file, left_out)
    return None


def _read_part(folder: Path, name: str, left_out: Counter[str] | None) -> GqaRecords | None:
    """ViLBERT's training set or what is held out of it, or None."""
    if (file := folder / "cache" / f"{_CUT}_target.pkl").is_file():
        records = read_vilbert_gqa(file, left_out)
    elif has_gqa(folder, "train") and has_gqa(folder, "val"):
        records = _sort(read_gqa_files([find_gqa(folder, "train"), find_gqa(folder, "val")], left_out))
    else:
        return None
    cut = max(len(records) - NUM_MINVAL, 0)
    return records.select(range(cut) if name == _CUT else range(cut, len(records)))


def _sort(records: GqaRecords) -> GqaRecords:
    """By id, compared as text."""
    ids = records.ids()
    return records.select(sorted(range(len(ids)), key=ids.__getitem__))


def _without_test_images(records: GqaRecords, folder: Path) -> GqaRecords:
    """The questions about images that no other task is tested on."""
    places = [folder / "cache" / "genome_test_ids.npy", folder / "genome_test_ids.npy"]
    file = next((place for place in places if place.is_file()), places[0])
    held_out = read_image_list(file)
    return records.select([row for row, image in enumerate(records.image_ids()) if canonical(image) not in held_out])


def read_gqa_files(
    paths: Iterable[Path], left_out: Counter[str] | None = None, *, choices: GqaChoices | None = None
) -> GqaRecords:
    """Questions of official files, or folders of chunks, in their order.

    Raises:
        DataError: a file is missing, truncated or of another layout, a question comes twice, lacks a field, or has no
            word.
    """
    columns = GqaColumns()
    sources = list(paths)
    for chunk in (chunk for path in sources for chunk in list_chunks(path)):
        with Layout(chunk, "question") as at:
            for at.entry, entry in stream_object(chunk):
                number = at.entry
                if not isinstance(entry, dict) or not {"question", "imageId"} <= entry.keys():
                    raise DataError(
                        f"{chunk}: question {number} lacks 'question' or 'imageId'. Is it a question file of GQA?"
                    )
                types, groups = entry.get("types") or {}, entry.get("groups") or {}
                balanced = bool(entry.get("isBalanced", True))
                if _keep(entry["question"], number, chunk, left_out):
                    columns.append(
                        id=number,
                        image=plain_id(entry["imageId"]),
                        question=entry["question"],
                        answer=None if entry.get("answer") is None else str(entry["answer"]),
                        balanced=balanced,
                        types=tuple(optional_text(types.get(name)) for name in ("structural", "semantic", "detailed")),
                        groups=(
                            optional_text(groups.get("global")) or None,
                            optional_text(groups.get("local")) or None,
                        ),
                        num_steps=count_steps(entry.get("semantic") or ()),
                        entailed=(entry.get("entailed") or ()) if balanced else (),
                    )
    return _finish(columns, sources, choices)


def count_steps(semantic: Iterable[Any]) -> int:
    """Steps of reasoning of a question's program, as the official script counts them."""
    steps = (f"{step['operation']}: {step['argument']}" for step in semantic)
    return sum(not any(word in step for word in _NOT_STEPS) for step in steps)


def read_lxmert_gqa(path: Path, left_out: Counter[str] | None = None) -> GqaRecords:
    """Questions of a list of LXMERT's release, which tells nothing of their types.

    Raises:
        DataError: the file is missing, truncated or of another layout, a question comes twice or has no word, or a
            label is not one answer with the score 1.
    """
    columns = GqaColumns()
    with Layout(path) as at:
        for at.entry, entry in enumerate(stream_list(path)):
            place = at.entry
            if not isinstance(entry, dict) or not {"question_id", "img_id", "sent"} <= entry.keys():
                raise DataError(
                    f"{path}: entry {place} lacks 'question_id', 'img_id' or 'sent'. Is it a file of LXMERT's data/gqa?"
                )
            number, label = plain_id(entry["question_id"]), entry.get("label")
            if label is not None and (not isinstance(label, dict) or list(label.values()) != [1.0]):
                raise DataError(
                    f"{path}: question {number} has the label {label!r}; expected one answer with the score 1, as "
                    "every question of GQA has. Is it a file of LXMERT's data/vqa?"
                )
            if _keep(entry["sent"], number, path, left_out):
                answer = next(iter(label)) if label else None
                columns.append(id=number, image=plain_id(entry["img_id"]), question=entry["sent"], answer=answer)
    return _finish(columns, [path])


def read_vilbert_gqa(path: Path, left_out: Counter[str] | None = None) -> GqaRecords:
    """Questions of a cache of ViLBERT's multi-task release, sorted by id as text.

    It keeps the number of the answer alone; a question whose answer is not listed has `UNTOLD`.

    Raises:
        DataError: a file is missing, damaged or of another layout, or a question comes twice or has no word.
    """
    entries = read_pickle(path)
    answers = AnswerVocabulary.load(path.parent / "trainval_label2ans.pkl")
    columns = GqaColumns()
    keys = {"question_id", "image_id", "question", "labels"}
    if not isinstance(entries, list) or any(
        not isinstance(entry, dict) or not keys <= entry.keys() for entry in entries
    ):
        raise DataError(f"{path} must be a list of objects with {', '.join(sorted(keys))}; found another layout.")
    with Layout(path) as at:
        for at.entry, entry in enumerate(entries):
            number, labels = plain_id(entry["question_id"]), list(entry["labels"])
            if len(labels) > 1 or any(not 0 <= label < len(answers) for label in labels):
                raise DataError(
                    f"{path}: question {number} has the labels {labels}; expected at most one number below "
                    f"{len(answers)}, the length of trainval_label2ans.pkl."
                )
            if _keep(entry["question"], number, path, left_out):
                answer = answers[labels[0]] if labels else UNTOLD
                columns.append(id=number, image=plain_id(entry["image_id"]), question=entry["question"], answer=answer)
    return _sort(_finish(columns, [path]))


def find_choices(folder: Path, split: str) -> GqaChoices | None:
    """Valid and plausible answers of a split, from `{tier}_choices.json` or a folder of chunks; None without them."""
    tier = split.removesuffix("_balanced").removesuffix("_all")
    for part in _CHOICES:
        for path in (folder / part / f"{tier}_choices.json", folder / part / f"{tier}_choices"):
            if path.exists():
                return GqaChoices(path)
    return None


def _keep(question: Any, number: str, path: Path, left_out: Counter[str] | None) -> bool:
    """Whether a question has a word; if not, it is counted in `left_out`.

    Raises:
        DataError: it has none, and `left_out` is None; or it is no text.
    """
    if isinstance(question, str) and has_words(question):
        return True
    if left_out is None or not isinstance(question, str | None):
        raise DataError(
            f"{path}: question {number} is empty: found {question!r}, expected at least one word. "
            "Fill it in, or remove it."
        )
    left_out[EMPTY] += 1
    return False


def _finish(columns: GqaColumns, sources: Iterable[Path], choices: GqaChoices | None = None) -> GqaRecords:
    if (twice := columns.find_repeated()) is not None:
        raise DataError(
            f"{', '.join(map(str, sources))}: question {twice} comes twice; question ids are unique. "
            "Is a chunk there under two names?"
        )
    return GqaRecords(columns, choices=choices)
