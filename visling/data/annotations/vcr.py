"""Visual commonsense reasoning (VCR; Zellers et al. 2019): questions about pictures, four answers to each, four
rationales of the right one.

Files    {split}.jsonl for train, val and test, also in vcr1annots/: one question a line. Fields that are read:
         annot_id, movie, question_number, img_fn, metadata_fn, objects, question, answer_choices, rationale_choices,
         answer_label, rationale_label (test has no labels).
         vcr1images/: pictures in folders of movies, and beside each picture its objects (`metadata_fn`): boxes, segms,
             names, width, height.
Tokens   A sentence is a list of words and tags; a tag is a list of integers, the objects that it stands for, counted from 0 as in `objects`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visling.data.annotations.files import has_words, read_json, read_json_lines, text_field
from visling.errors import DataError
from visling.image_ids import from_file_name
from visling.types import Record

IMAGES = "vcr1images"
"""Folder of the pictures and of what is known of their objects."""
NUM_CHOICES = 4
PERSON = "person"
"""Class of people in `objects`."""
NEUTRAL_NAMES = (
    "Casey", "Riley", "Jessie", "Jackie", "Avery", "Jaime", "Peyton", "Kerry", "Jody", "Kendall", "Peyton", "Skyler", "Frankie", "Pat", "Quinn"
)  # fmt: skip
"""What people are called in texts, in this order; one name stands twice in the release (R2C's list)."""

_FOLDERS = (".", "vcr1annots")

Token = str | tuple[int, ...]
"""A word, or the objects that a tag stands for."""
Sentence = tuple[Token, ...]


@dataclass(frozen=True, kw_only=True)
class VcrRecord(Record):
    """One question with its answers and rationales; the id is `annot_id`, the image that of `img_fn` without folder and
    suffix.

    So `visling regions extract` names the pictures too. Stems are unique in VCR.
    """

    objects: tuple[str, ...]
    """Class of each object that was detected; tags count them from 0."""
    question: Sentence
    answer_choices: tuple[Sentence, ...]
    """(4)"""
    rationale_choices: tuple[Sentence, ...]
    """(4), why the right answer is right."""
    answer_label: int | None
    """Which answer is right; None where the file does not tell."""
    rationale_label: int | None
    """Which rationale is right; None where the file does not tell."""
    movie: str
    question_number: int
    metadata: Path
    """File of the picture's objects; `read_metadata` reads it."""


@dataclass(frozen=True, kw_only=True)
class VcrData:
    """What a file holds, and what was left out of it."""

    records: tuple[VcrRecord, ...]
    """In the order of the file."""
    empty: int
    """Questions left out because they, an answer or a rationale are without a word."""
    repeated: int
    """Questions left out because their id had come before."""


@dataclass(frozen=True, kw_only=True)
class VcrMetadata:
    """The objects of a picture, in the order that tags count."""

    boxes: NDArray[np.float32]
    """(objects, 4) pixel corners."""
    confidence: NDArray[np.float32]
    """(objects) the detector's."""
    outlines: tuple[Sequence[Any], ...]
    """Of each object its polygons as the file has them: lists of x, y in pixels."""
    size: tuple[int, int]
    """Width and height of the picture in pixels."""


def find_vcr(root: str | Path, split: str) -> tuple[Path, Path]:
    """The annotations of a split in a folder or its `vcr1annots`, and the folder of images that lies there or beside
    it.

    Raises:
        DataError: there are no annotations of the split.
    """
    root = Path(root)
    file = _annotations(root, split)
    if file is None:
        raise DataError(
            f"no {split}.jsonl of VCR in {root} or its folder vcr1annots. Unpack vcr1annots.zip there, or name the folder that has it."
        )
    beside = file.parent.parent / IMAGES
    return file, beside if beside.is_dir() and not (file.parent / IMAGES).is_dir() else file.parent / IMAGES


def has_vcr(root: Path, split: str) -> bool:
    """Whether a folder has annotations of a split."""
    return _annotations(root, split) is not None


def _annotations(root: Path, split: str) -> Path | None:
    return next((file for folder in _FOLDERS if (file := root / folder / f"{split}.jsonl").is_file()), None)


def read_vcr(path: str | Path, images: str | Path) -> VcrData:
    """Questions of a file.

    Args:
        images: folder that `img_fn` and `metadata_fn` start from.
    Raises:
        DataError: the file is missing or truncated, a field is missing or of another form, a tag names an object that
            is not listed, a label is not that of a choice, or a picture is described in two ways.
    """
    path, images = Path(path), Path(images)
    records: dict[str, VcrRecord] = {}
    pictures: dict[str, tuple[str, str, tuple[str, ...]]] = {}
    # Words and tags come in hundreds of thousands of sentences: each is kept once.
    shared: dict[Token, Token] = {}
    empty = repeated = 0
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        name, file = text_field(row, "annot_id", where), text_field(row, "img_fn", where)
        listed = _field(row, "objects", where)
        if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
            raise DataError(f"{where}: objects must be a list of class names; found {listed!r:.80}.")
        image = from_file_name(file)
        here = (file, text_field(row, "metadata_fn", where), tuple(listed))
        picture = pictures.setdefault(image, here)
        if picture != here:
            raise DataError(
                f"{where}: image {image} is described as {here}, before as {picture}. Regions are found by the name without its folder, and tags "
                "count the same objects in all questions: rename one of two pictures, or download the file again."
            )
        objects = picture[2]
        question = _sentence(_field(row, "question", where), "question", len(objects), where, shared)
        answers, rationales = (
            _choices(row, f"{kind}_choices", len(objects), where, shared) for kind in ("answer", "rationale")
        )
        if name in records:
            repeated += 1
        elif not all(map(_says_something, (question, *answers, *rationales))):
            empty += 1
        else:
            records[name] = VcrRecord(
                id=name,
                images=(image,),
                objects=objects,
                question=question,
                answer_choices=answers,
                rationale_choices=rationales,
                answer_label=_label(row, "answer_label", where),
                rationale_label=_label(row, "rationale_label", where),
                movie=text_field(row, "movie", where),
                question_number=_number(row, "question_number", where),
                metadata=images / picture[1],
            )
    return VcrData(records=tuple(records.values()), empty=empty, repeated=repeated)


def read_metadata(record: VcrRecord) -> VcrMetadata:
    """What is known of the objects of a record's picture.

    Raises:
        DataError: the file is missing, truncated or of another layout, or it lists other objects than the annotations.
    """
    path = record.metadata
    if not path.is_file():
        raise DataError(
            f"question {record.id!r} of VCR has no metadata {path}. Unpack the .json files of vcr1images.zip beside the annotations."
        )
    content = read_json(path)
    if not isinstance(content, dict) or (lacking := {"boxes", "segms", "names", "width", "height"} - content.keys()):
        found = (
            f"it lacks {', '.join(sorted(lacking))}"
            if isinstance(content, dict)
            else f"found a {type(content).__name__}"
        )
        raise DataError(f"{path} is no metadata of VCR: {found}. Unpack vcr1images.zip again.")
    if list(content["names"]) != list(record.objects):
        raise DataError(
            f"{path} lists the objects {content['names']}, question {record.id!r} lists {list(record.objects)}: tags count the same objects in both. "
            "Take annotations and metadata from one release."
        )
    try:
        boxes = np.array(content["boxes"], np.float32).reshape(len(record.objects), 5)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{path}: boxes must be five numbers for each of {len(record.objects)} objects, x1, y1, x2, y2, confidence: {error}."
        ) from error
    if len(content["segms"]) != len(boxes):
        raise DataError(
            f"{path} has outlines of {len(content['segms'])} objects, but boxes of {len(boxes)}. Unpack vcr1images.zip again."
        )
    size = (_number(content, "width", str(path)), _number(content, "height", str(path)))
    return VcrMetadata(boxes=boxes[:, :4], confidence=boxes[:, 4], outlines=tuple(content["segms"]), size=size)


def with_names(
    sentence: Sentence, objects: Sequence[str], names: Mapping[int, str]
) -> tuple[list[tuple[str, int | None]], dict[int, str]]:
    """The words of a sentence with names in place of tags, each with the object that it names, if any; and the names of
    all objects so far.

    A person without a name gets the next of `NEUTRAL_NAMES`, other objects are called by their class; the objects of
    one tag come one after the other. Names are counted anew in every sentence: a person whom only an answer mentions
    gets the first one, which may be that of a person in the question too.

    Args:
        names: of objects that were named before, in the question.
    Source:
        VisualBERT release, `vcr_data_utils.py` (`_fix_tokenization`), after R2C.
    """
    known, people, words = dict(names), 0, list[tuple[str, int | None]]()
    for token in sentence:
        if isinstance(token, str):
            words.append((token, None))
            continue
        for number in token:
            if number not in known:
                person = objects[number] == PERSON
                known[number] = NEUTRAL_NAMES[people % len(NEUTRAL_NAMES)] if person else objects[number]
                people += person
            words.append((known[number], number))
    return words, known


def _field(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise DataError(f"{where}: field {name!r} is missing. Is it a file of VCR's annotations?")
    return row[name]


def _number(row: Mapping[str, Any], name: str, where: str) -> int:
    value = _field(row, name, where)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{where}: {name} must be an integer; found {value!r:.80}.")
    return value


def _label(row: Mapping[str, Any], name: str, where: str) -> int | None:
    if row.get(name) is None:
        return None
    value = _number(row, name, where)
    if not 0 <= value < NUM_CHOICES:
        raise DataError(
            f"{where}: {name} {value} is not the number of a choice; expected 0 to {NUM_CHOICES - 1}, or none for a test split."
        )
    return value


def _choices(
    row: Mapping[str, Any], name: str, objects: int, where: str, shared: dict[Token, Token]
) -> tuple[Sentence, ...]:
    value = _field(row, name, where)
    if not isinstance(value, list) or len(value) != NUM_CHOICES:
        found = f"{len(value)} of them" if isinstance(value, list) else repr(value)[:80]
        raise DataError(f"{where}: {name} must be a list of {NUM_CHOICES} sentences; found {found}.")
    return tuple(_sentence(choice, name, objects, where, shared) for choice in value)


def _sentence(value: Any, name: str, objects: int, where: str, shared: dict[Token, Token]) -> Sentence:
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} must be lists of words and tags; found {value!r:.80}.")
    tokens = []
    for entry in value:
        token: Token
        if isinstance(entry, str):
            token = entry
        elif isinstance(entry, list) and all(
            isinstance(number, int) and not isinstance(number, bool) for number in entry
        ):
            token = tuple(entry)
            if wrong := [number for number in token if not 0 <= number < objects]:
                raise DataError(
                    f"{where}: {name} speaks of object {wrong[0]}, but {objects} are listed, counted from 0. Download the file again."
                )
        else:
            raise DataError(
                f"{where}: {name} holds {entry!r:.80}; expected words, and lists of integers that count objects."
            )
        tokens.append(shared.setdefault(token, token))
    return tuple(tokens)


def _says_something(sentence: Collection[Token]) -> bool:
    return any(has_words(token) if isinstance(token, str) else bool(token) for token in sentence)
