"""Questions about images: VQA v2 with the answers that people gave, GQA with one answer each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visling.data.annotations.files import (
    Layout,
    entries,
    has_words,
    is_split,
    optional_text,
    plain_id,
    read_ids,
    read_json,
    the_one,
)
from visling.data.annotations.kept_questions import keep_questions
from visling.data.annotations.people_answers import by_question, read_annotation, text_of
from visling.data.annotations.problems import Place
from visling.data.annotations.streamed import list_chunks, stream_object
from visling.data.annotations.tables import FILL_IN, Row, Table
from visling.errors import DataError
from visling.image_ids import canonical
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


UNTOLD = "(another answer)"
"""Stands for answers of which a file does not tell more; no list has it."""

NUM_PEOPLE = 10
"""People who answered each question of VQA."""

EMPTY = "questions without a word"
"""Name under which readers count the questions that they leave out."""

_FOLDERS = (".", "Questions", "questions", "Annotations", "annotations")
_GQA_FOLDERS = (".", "questions", "questions1.2")
_COCO_SPLITS = {"train2014": "train2014", "val2014": "val2014", "test2015": "test2015", "test-dev2015": "test2015"}
"""What a question file calls its split -> what COCO's file names call it."""
_BETWEEN_WORDS = re.compile(r"(\W+)")
_QUESTIONS = re.compile(r"(?P<version>v2_)?OpenEnded_(?P<subset>.+_)?(?P<split>[^_]+)_questions\.json")


def read_questions(
    questions: str | Path, annotations: str | Path | None = None, *, left_out: Counter[str] | None = None
) -> list[QuestionRecord]:
    """Questions of a file in its order, joined with their annotations by question id.

    Images of VQA's own files are named as COCO names them, `COCO_train2014_000000000009`: in a store with Visual
    Genome's images, 9 is another image.

    What large files hold is kept for later runs (`kept_questions`).

    Args:
        annotations: may cover more questions than the file holds; None for a split without answers.
        left_out: counts questions without a word, which are then left out; None refuses them.
    Raises:
        DataError: a file is missing, truncated or of another layout, a question id comes twice, or a question has no
            annotation or no word.
    """
    files = (Path(questions), None if annotations is None else Path(annotations))

    def read(counted: Counter[str]) -> list[QuestionRecord]:
        return _read_files(*files, counted)

    records, counted = keep_questions(QuestionRecord, [file for file in files if file is not None], read)
    if left_out is None and counted:
        _read_files(*files, None)  # refuses the first of them
    if left_out is not None:
        left_out.update(counted)
    return records


def _read_files(questions: Path, annotations: Path | None, left_out: Counter[str] | None) -> list[QuestionRecord]:
    """See `read_questions`."""
    with Layout(questions, "question") as at:
        content = read_json(questions)
        asked = entries(content, "questions", ("question_id", "image_id", "question"), questions)
        coco = _COCO_SPLITS.get(str(content.get("data_subtype")), "") if content.get("data_type") == "mscoco" else ""
        answered = {}
        if annotations is not None:
            keys = ("question_id", "image_id", "answers")
            answered = by_question(entries(read_json(annotations), "annotations", keys, annotations), annotations)
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
            number = at.entry = entry["question_id"]
            if number in seen:
                raise DataError(f"{questions}: question {number} comes twice; question ids are unique.")
            seen.add(number)
            annotation = answered.get(number)
            if annotation is not None and annotation["image_id"] != entry["image_id"]:
                raise DataError(
                    f"question {number} is about image {entry['image_id']} in {questions}, "
                    f"about image {annotation['image_id']} in {annotations}."
                )
            question = text_of(entry["question"])
            if _is_empty(question, number, questions, left_out):
                continue
            # Millions of answers are a few thousand different ones: each text is kept once.
            told = (
                read_annotation(annotation, annotations) if annotation is not None and annotations is not None else {}
            )
            records.append(
                QuestionRecord(
                    id=plain_id(number),
                    images=(_image_id(plain_id(entry["image_id"]), coco),),
                    question=question,
                    question_type=told.get("question_type", ""),
                    answer_type=told.get("answer_type", ""),
                    answers=told.get("answers"),
                    multiple_choice_answer=told.get("multiple_choice_answer"),
                )
            )
        return records


def table_questions(table: Table) -> list[QuestionRecord]:
    """Questions of a file of one's own. Fields: `image`, `question`, and `answer` (one) or `answers` (a list, in cells
    joined by "|"), which a file without any answer lacks; `id` and `type` (or `question_type`) if there are any."""
    image, question = table.require("image", "img"), table.require("question", "text")
    answers, kind = table.find(("answers", "answer")), table.find(("type", "question_type")) or ""
    if "answer" in table.fields and "answers" in table.fields:
        table.problems.add(Place(table.path), "has the fields 'answer' and 'answers'", "Remove or rename one of them.")
    having = sum(not row.lacks(answers) for row in table.rows) if answers is not None else 0
    records = []
    for row, identifier in zip(table.rows, table.ids(), strict=True):
        given = _table_answers(row, answers, having) if answers is not None and having else None
        records.append(
            QuestionRecord(
                id=identifier,
                images=(row.image(image),),
                question=row.text(question),
                question_type=row.text(kind, optional=True),
                answer_type="",
                answers=given,
                multiple_choice_answer=Counter(given).most_common(1)[0][0] if given else None,
            )
        )
    return records


def _table_answers(row: Row, name: str, having: int) -> tuple[str, ...]:
    value = row.values.get(name)
    if row.lacks(name) or value == []:
        row.problem(f"no answer in field {name!r}; {having} of {len(row.table.rows)} rows have one", FILL_IN)
        return ()
    if name == "answers":
        return row.texts(name)
    if isinstance(value, list):
        row.problem(f"field 'answer' holds a list: {value!r}", "Name the field 'answers', in every row.")
        return ()
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        row.problem(f"field 'answer' must be a text or a number; found {value!r}", "Write it in quotes.")
        return ()
    return (str(value).strip(),)


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


def read_vqa(root: str | Path, split: str, *, left_out: Counter[str] | None = None) -> list[QuestionRecord]:
    """VQA's questions of a split: of the file that `find_vqa_files` finds, or a part of val.

    Parts of val: "minival" is what `minival.txt` or `minival.json` next to the files lists, "nominival" the rest. The
    list holds question or image ids, one a line or as JSON; LXMERT's own `minival.json` is one. ViLBERT's "minval" and
    "nominval" need none: the last 3,000 questions by id, and all before them.

    Args:
        left_out: as in `read_questions`.
    Raises:
        DataError: no such file or list, or a list of something else.
    """
    root = Path(root)
    if not is_part_of_val(root, split):
        try:
            files = find_vqa_files(root, split)
        except DataError as error:
            if split.removeprefix("no") not in _PARTS:
                raise
            raise DataError(
                f"{error} A part of val is named by minival.txt or minival.json next to val's files, a list of its "
                "question or image ids. To do without it, set train_split to train and valid_split to val."
            ) from error
        return read_questions(*files, left_out=left_out)
    return take_part(read_questions(*find_vqa_files(root, "val"), left_out=left_out), root, split)


def is_part_of_val(root: Path, split: str) -> bool:
    """Whether a split is no file of its own but a part of val, as in `read_vqa`."""
    return not _has_vqa_file(root, split) and _find_part(root, split) is not None


def take_part(records: Sequence[QuestionRecord], root: Path, split: str) -> list[QuestionRecord]:
    """Those of val's questions that belong to a part of it.

    Raises:
        DataError: the list of the part names something else.
    """
    part = _find_part(root, split)
    assert part is not None, f"{split} is no part of val"
    held = _held_out(records, part, root)
    wanted = not split.startswith("no")
    return [record for record in records if (record.id in held) == wanted]


def has_vqa(root: Path, split: str) -> bool:
    """Whether `read_vqa` has something to read for a split."""
    return _has_vqa_file(root, split) or _find_part(root, split) is not None


def _has_vqa_file(root: Path, split: str) -> bool:
    return any(is_split(match["split"], split) for _, match in _list_vqa_files(root)[1])


_LAST = "minval"
"""ViLBERT's part of val, which needs no list."""
NUM_LAST = 3000
"""Questions of that part."""
_PARTS = ("minival", _LAST)


def _find_part(root: Path, split: str) -> Path | str | None:
    """The list that holds a part of val out of training, or `_LAST`; None if there is no such part, or no val."""
    name = split.removeprefix("no")
    if name not in _PARTS or not _has_vqa_file(root, "val"):
        return None
    lists = [
        path for folder in _FOLDERS for kind in ("txt", "json") if (path := root / folder / f"{name}.{kind}").is_file()
    ]
    return lists[0] if lists else _LAST if name == _LAST else None


def _held_out(records: Sequence[QuestionRecord], part: Path | str, root: Path) -> frozenset[str]:
    """Ids of the questions of a part of val."""
    if isinstance(part, str):
        with Layout(root, "question"):
            return frozenset(sorted((record.id for record in records), key=int)[-NUM_LAST:])
    listed = frozenset(map(canonical, read_ids(part) if part.suffix == ".txt" else _read_listed(part)))
    # Numbers of images and of questions look alike; a list is of those that it has more of.
    by_question = frozenset(record.id for record in records if canonical(record.id) in listed)
    by_image = frozenset(record.id for record in records if canonical(record.images[0]) in listed)
    if not (by_question or by_image):
        raise DataError(
            f"{part} lists {len(listed)} ids, none of which is a question or an image of val in {root}. "
            "It must list question or image ids of val, one a line or as a JSON list."
        )
    images = {canonical(record.images[0]) for record in records} & listed
    return by_question if len(by_question) >= len(images) else by_image


def _read_listed(path: Path) -> list[str]:
    """Ids of a JSON list: bare ones, or the `question_id` of each entry, as in LXMERT's files."""
    content = read_json(path)
    if not isinstance(content, list) or any(
        isinstance(entry, dict) and "question_id" not in entry for entry in content
    ):
        raise DataError(f"{path} must be a JSON list of question or image ids, or of objects with a 'question_id'.")
    with Layout(path):
        return [plain_id(entry["question_id"] if isinstance(entry, dict) else entry) for entry in content]


def find_lxmert_questions(root: str | Path, split: str) -> Path | None:
    """The file of a split in LXMERT's layout of VQA (`train.json`, `minival.json`, ...), if there is one."""
    return next((path for folder in _FOLDERS if (path := Path(root) / folder / f"{split}.json").is_file()), None)


def read_lxmert_questions(path: str | Path) -> list[QuestionRecord]:
    """Questions of a file in LXMERT's layout of VQA, which holds scores in place of people's answers: see
    `answers_of_scores`.

    Raises:
        DataError: the file is missing, truncated or of another layout.
    """
    path = Path(path)
    keys = ("question_id", "img_id", "sent")
    content = read_json(path)
    if not isinstance(content, list) or any(
        not isinstance(entry, dict) or any(key not in entry for key in keys) for entry in content
    ):
        raise DataError(
            f"{path} must be a list of objects with {', '.join(keys)}; found another layout. "
            "Is it a file of LXMERT's data/vqa?"
        )
    records = []
    with Layout(path) as at:
        for at.entry, entry in enumerate(content):
            scores = entry.get("label")
            answers, most = (None, None) if scores is None else answers_of_scores(scores)
            records.append(
                QuestionRecord(
                    id=plain_id(entry["question_id"]),
                    images=(plain_id(entry["img_id"]),),
                    question=text_of(entry["sent"]),
                    question_type=optional_text(entry.get("question_type")),
                    answer_type=optional_text(entry.get("answer_type")),
                    answers=answers,
                    multiple_choice_answer=most,
                )
            )
        return records


def answers_of_scores(scores: Mapping[str, float]) -> tuple[tuple[str, ...], str | None]:
    """Answers of ten people that the scores stand for, and the most frequent one, if the file names one.

    A score of 0.3, 0.6, 0.9 or 1 stands for 1, 2, 3, or 4 and more people. As many are entered, and the rest of the ten
    as `UNTOLD`, so that the official rule gives each answer just its score.
    """
    if wrong := next((answer for answer in scores if not isinstance(answer, str)), None):
        raise TypeError(f"the answer {wrong!r:.60}, where a text is expected")
    people = {
        answer: 4 if score > 0.95 else max(round(score / 0.3), 1) for answer, score in scores.items() if score > 0
    }
    answers = [answer for answer, count in people.items() for _ in range(count)]
    most = max(people, key=lambda answer: people[answer]) if people else None
    return (*answers, *[UNTOLD] * (NUM_PEOPLE - len(answers))), most


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
    records: dict[str, QuestionRecord] = {}
    for chunk in list_chunks(path):
        with Layout(chunk, "question") as at:
            for at.entry, entry in stream_object(chunk):
                number = at.entry
                if not isinstance(entry, dict) or not {"question", "imageId"} <= entry.keys():
                    raise DataError(
                        f"{chunk}: question {number} lacks 'question' or 'imageId'. Is it a question file of GQA?"
                    )
                if number in records:
                    raise DataError(f"{chunk}: question {number} comes twice; question ids are unique.")
                question, types, answer = text_of(entry["question"]), entry.get("types") or {}, entry.get("answer")
                if _is_empty(question, number, chunk, left_out):
                    continue
                records[number] = QuestionRecord(
                    id=number,
                    images=(plain_id(entry["imageId"]),),
                    question=question,
                    question_type=optional_text(types.get("structural")),
                    answer_type=optional_text(types.get("semantic")),
                    answers=None if answer is None else (str(answer),),
                    multiple_choice_answer=None if answer is None else str(answer),
                )
    return list(records.values())


def release_text(question: str) -> str:
    """A question as VisualBERT's release tokenises it, for the layout to add its question mark: lower case, without
    commas and question marks, "'s" apart. As written, if nothing would be left.

    Source:
        `tokenize` of Pythia's files of questions, repeated in VisualBERT's `dataloaders/vqa_dataset.py`.
    """
    plain = question.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    tokens = [token.strip() for token in _BETWEEN_WORDS.split(plain)]
    text = " ".join(filter(None, tokens))
    return text if has_words(text) else question


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
