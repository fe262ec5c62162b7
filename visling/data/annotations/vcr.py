"""Visual commonsense reasoning (VCR; Zellers et al. 2019): questions about images, four answers to each, four
rationales for the right one.

Files    {split}.jsonl for train, val and test, also in vcr1annots/: one question per line. Fields that are read:
         annot_id, movie, question_number, img_fn, metadata_fn, objects, question, answer_choices, rationale_choices,
         answer_label, rationale_label (test has no labels).
         vcr1images/: images in folders by movie, and next to each image its objects (`metadata_fn`): boxes, segms,
             names, width, height.
Tokens   A sentence is a list of words and tags; a tag is a list of integers, the objects that it stands for, counted
         from 0 as in `objects`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visling.data.annotations.files import Layout, has_words, read_json, read_json_lines, text_field
from visling.errors import DataError
from visling.image_ids import from_file_name
from visling.types import Record

IMAGES = "vcr1images"
"""Folder of the images and of their objects' metadata."""
NUM_CHOICES = 4
PERSON = "person"
"""Class of people in `objects`."""
NEUTRAL_NAMES = (
    "Casey", "Riley", "Jessie", "Jackie", "Avery", "Jaime", "Peyton", "Kerry", "Jody", "Kendall", "Peyton", "Skyler",
    "Frankie", "Pat", "Quinn",
)  # fmt: skip
"""Names of people in texts, in this order; one occurs twice in the release (R2C's list)."""

EVERYONE = ("everyone", "everyones")
"""Words that stand for all people, in lower case."""

_FOLDERS = (".", "vcr1annots")

Token = str | tuple[int, ...]
"""A word, or the objects that a tag stands for."""
Sentence = tuple[Token, ...]


@dataclass(frozen=True, kw_only=True)
class VcrRecord(Record):
    """One question with its answers and rationales; the id is `annot_id`, the image that of `img_fn` without folder and
    suffix.

    `visling regions extract` names images the same way. Stems are unique in VCR.
    """

    objects: tuple[str, ...]
    """Class of each detected object; tags count them from 0."""
    question: Sentence
    answer_choices: tuple[Sentence, ...]
    """(4); a question of one's own may have any number."""
    rationale_choices: tuple[Sentence, ...]
    """(4), why the right answer is right."""
    answer_label: int | None
    """Which answer is right; None where the file does not say."""
    rationale_label: int | None
    """Which rationale is right; None where the file does not say."""
    movie: str
    question_number: int
    metadata: Path | None
    """File of the image's objects; `read_metadata` reads it. None in a question of one's own."""


@dataclass(frozen=True, kw_only=True)
class VcrData:
    """What a file holds, and what was left out of it."""

    records: tuple[VcrRecord, ...]
    """In the order of the file."""
    empty: int
    """Questions left out because they, an answer or a rationale have no word."""
    repeated: int
    """Questions left out because their id had occurred before."""


@dataclass(frozen=True, kw_only=True)
class VcrMetadata:
    """The objects of an image, in the order that tags count."""

    boxes: NDArray[np.float32]
    """(objects, 4) pixel corners."""
    confidence: NDArray[np.float32]
    """(objects) the detector's."""
    outlines: tuple[Sequence[Any], ...]
    """Polygons of each object as in the file: lists of x, y in pixels."""
    size: tuple[int, int]
    """Width and height of the image in pixels."""


def find_vcr(root: str | Path, split: str) -> tuple[Path, Path]:
    """The annotations of a split in a folder or its `vcr1annots`, and the folder of images inside or next to
    it.

    Raises:
        DataError: the split has no annotations.
    """
    root = Path(root)
    file = _find_annotations(root, split)
    if file is None:
        raise DataError(
            f"no {split}.jsonl of VCR in {root} or its folder vcr1annots. "
            "Unpack vcr1annots.zip there, or name the folder that has it."
        )
    inside, outside = file.parent / IMAGES, file.parent.parent / IMAGES
    return file, outside if outside.is_dir() and not inside.is_dir() else inside


def has_vcr(root: Path, split: str) -> bool:
    """Whether a folder has annotations of a split."""
    return _find_annotations(root, split) is not None


def _find_annotations(root: Path, split: str) -> Path | None:
    return next((file for folder in _FOLDERS if (file := root / folder / f"{split}.jsonl").is_file()), None)


def read_vcr(path: str | Path, images: str | Path) -> VcrData:
    """Questions of a file.

    Args:
        images: folder that `img_fn` and `metadata_fn` start from.
    Raises:
        DataError: the file is missing or truncated, a field is missing or has another form, a tag names an object that
            is not listed, a label is not the number of a choice, or an image is described in two ways.
    """
    path, images = Path(path), Path(images)
    records: dict[str, VcrRecord] = {}
    described: dict[str, tuple[str, str, tuple[str, ...]]] = {}
    # The same words and tags occur in hundreds of thousands of sentences: each is stored once.
    shared: dict[Token, Token] = {}
    empty = repeated = 0
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        name, file = text_field(row, "annot_id", where), text_field(row, "img_fn", where)
        listed = _read_field(row, "objects", where)
        if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
            raise DataError(f"{where}: objects must be a list of class names; found {listed!r:.80}.")
        image = from_file_name(file)
        description = (file, text_field(row, "metadata_fn", where), tuple(listed))
        first = described.setdefault(image, description)
        if first != description:
            raise DataError(
                f"{where}: image {image} is described as {description}, before as {first}. "
                "Regions are found by the name without its folder, and tags "
                "count the same objects in all questions: rename one of two images, or download the file again."
            )
        objects = first[2]
        question = _read_sentence(_read_field(row, "question", where), "question", len(objects), where, shared)
        answers, rationales = (
            _read_choices(row, f"{kind}_choices", len(objects), where, shared) for kind in ("answer", "rationale")
        )
        if name in records:
            repeated += 1
        elif not all(map(_has_word, (question, *answers, *rationales))):
            empty += 1
        else:
            records[name] = VcrRecord(
                id=name,
                images=(image,),
                objects=objects,
                question=question,
                answer_choices=answers,
                rationale_choices=rationales,
                answer_label=_read_label(row, "answer_label", where),
                rationale_label=_read_label(row, "rationale_label", where),
                movie=text_field(row, "movie", where),
                question_number=_read_integer(row, "question_number", where),
                metadata=images / first[1],
            )
    return VcrData(records=tuple(records.values()), empty=empty, repeated=repeated)


def read_metadata(record: VcrRecord) -> VcrMetadata:
    """Metadata of the objects in a record's image.

    Raises:
        DataError: the file is missing, truncated or of another layout, it lists other objects than the annotations, or
            a box lies outside the image.
    """
    path = record.metadata
    if path is None or not path.is_file():
        raise DataError(
            f"question {record.id!r} of VCR has no metadata {path}. "
            "Unpack the .json files of vcr1images.zip next to the annotations."
        )
    with Layout(path):
        return _parse_metadata(read_json(path), record, path)


def _parse_metadata(content: Any, record: VcrRecord, path: Path) -> VcrMetadata:
    """See `read_metadata`."""
    if not isinstance(content, dict) or (lacking := {"boxes", "segms", "names", "width", "height"} - content.keys()):
        problem = (
            f"it lacks {', '.join(sorted(lacking))}"
            if isinstance(content, dict)
            else f"found a {type(content).__name__}"
        )
        raise DataError(f"{path} is not metadata of VCR: {problem}. Unpack vcr1images.zip again.")
    if list(content["names"]) != list(record.objects):
        raise DataError(
            f"{path} lists the objects {content['names']}, question {record.id!r} lists {list(record.objects)}: "
            "tags count the same objects in both. "
            "Take annotations and metadata from one release."
        )
    try:
        boxes = np.array(content["boxes"], np.float32).reshape(len(record.objects), 5)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{path}: boxes must be five numbers for each of {len(record.objects)} objects, x1, y1, x2, y2, "
            f"confidence: {error}."
        ) from error
    if not all(isinstance(outlines, list) for outlines in content["segms"]):
        raise DataError(f"{path}: segms must list the outlines of each object. Unpack vcr1images.zip again.")
    if len(content["segms"]) != len(boxes):
        raise DataError(
            f"{path} has outlines of {len(content['segms'])} objects, but boxes of {len(boxes)}. "
            "Unpack vcr1images.zip again."
        )
    size = (_read_integer(content, "width", str(path)), _read_integer(content, "height", str(path)))
    inside = (boxes[:, 2:4] > 0).all(1) & (boxes[:, :2] < size).all(1) & (boxes[:, :2] <= boxes[:, 2:4]).all(1)
    if not inside.all():  # boxes that only reach beyond the edge occur
        number = int(np.argmin(inside))
        raise DataError(
            f"{path}: the box of object {number}, {boxes[number, :4].tolist()}, has no part of the image of "
            f"{size[0]} x {size[1]} pixels. Boxes are x1, y1, x2, y2 in pixels; unpack vcr1images.zip again."
        )
    return VcrMetadata(boxes=boxes[:, :4], confidence=boxes[:, 4], outlines=tuple(content["segms"]), size=size)


def relevant_objects(record: VcrRecord) -> list[int]:
    """The objects that question, answers or rationales name, in their order; in addition all people where a text says
    "everyone", or none names an object.

    Source:
        VisualBERT release, `_get_dets_to_use` with `add_all_features`, after R2C.
    """
    named, everyone = set[int](), False
    for text in (record.question, *record.answer_choices, *record.rationale_choices):
        for token in text:
            if isinstance(token, str):
                everyone |= token.lower() in EVERYONE
            else:
                named.update(token)
    if everyone or not named:
        named.update(number for number, kind in enumerate(record.objects) if kind == PERSON)
    return sorted(named)


def with_names(
    sentence: Sentence, objects: Sequence[str], names: Mapping[int, str], *, conjunction: bool = False
) -> tuple[list[tuple[str, int | None]], dict[int, str]]:
    """The words of a sentence with names in place of tags, each with the object that it names, if any; and the names of
    all objects so far.

    A person without a name gets the next of `NEUTRAL_NAMES`, other objects are called by their class; the objects of
    one tag follow one another. Names are counted from the first again in every sentence: a person whom only an answer
    mentions gets the first one, which a person in the question may have too.

    Args:
        names: of objects that were named before, in the question.
        conjunction: whether the word "and" stands between the objects of one tag (VL-BERT).
    Source:
        VisualBERT release, `vcr_data_utils.py` (`_fix_tokenization`), after R2C.
    """
    named, people, words = dict(names), 0, list[tuple[str, int | None]]()
    for token in sentence:
        if isinstance(token, str):
            words.append((token, None))
            continue
        for place, number in enumerate(token):
            if conjunction and place:
                words.append(("and", None))
            if number not in named:
                person = objects[number] == PERSON
                named[number] = NEUTRAL_NAMES[people % len(NEUTRAL_NAMES)] if person else objects[number]
                people += person
            words.append((named[number], number))
    return words, named


def spell_out(sentence: Sentence, objects: Sequence[str]) -> str:
    """A sentence with its objects written as in VCR's browser: `[person1]`, counted from 1."""
    return " ".join(
        token if isinstance(token, str) else f"[{', '.join(f'{objects[number]}{number + 1}' for number in token)}]"
        for token in sentence
    )


def _read_field(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise DataError(f"{where}: field {name!r} is missing. Is it a file of VCR's annotations?")
    return row[name]


def _read_integer(row: Mapping[str, Any], name: str, where: str) -> int:
    value = _read_field(row, name, where)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{where}: {name} must be an integer; found {value!r:.80}.")
    return value


def _read_label(row: Mapping[str, Any], name: str, where: str) -> int | None:
    if row.get(name) is None:
        return None
    value = _read_integer(row, name, where)
    if not 0 <= value < NUM_CHOICES:
        raise DataError(
            f"{where}: {name} {value} is not the number of a choice; "
            f"expected 0 to {NUM_CHOICES - 1}, or none for a test split."
        )
    return value


def _read_choices(
    row: Mapping[str, Any], name: str, objects: int, where: str, shared: dict[Token, Token]
) -> tuple[Sentence, ...]:
    value = _read_field(row, name, where)
    if not isinstance(value, list) or len(value) != NUM_CHOICES:
        problem = f"{len(value)} of them" if isinstance(value, list) else repr(value)[:80]
        raise DataError(f"{where}: {name} must be a list of {NUM_CHOICES} sentences; found {problem}.")
    return tuple(_read_sentence(choice, name, objects, where, shared) for choice in value)


def _read_sentence(value: Any, name: str, objects: int, where: str, shared: dict[Token, Token]) -> Sentence:
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
                    f"{where}: {name} names object {wrong[0]}, but {objects} are listed, counted from 0. "
                    "Download the file again."
                )
        else:
            raise DataError(
                f"{where}: {name} holds {entry!r:.80}; expected words, and lists of integers that count objects."
            )
        tokens.append(shared.setdefault(token, token))
    return tuple(tokens)


def _has_word(sentence: Collection[Token]) -> bool:
    return any(has_words(token) if isinstance(token, str) else bool(token) for token in sentence)
