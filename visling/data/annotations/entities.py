"""Flickr30K Entities (Plummer et al. 2015): sentences about images, their noun phrases, and boxes of what these name.

Files    Sentences/ID.txt: one sentence a line. A phrase is marked `[/EN#283585/people/other two men]`: the chain of
         phrases that name the same entity in this image, one type or several, the words. Chain 0: not visible.
         Annotations/ID.xml: objects with the chains that they belong to and one box, or the statement that there is
         none (`nobndbox`, `scene`). A chain may have several boxes, and a box several chains.
         {train,val,test}.txt: image ids, one a line; or {split}_imgid2idx.pkl, BAN's table from image id to row.
         UNRELATED_CAPTIONS: sentences about something else, as `ID NUMBER` from 1, after a line of comment.
Boxes    Corners in pixels, both inside the box; the first pixel is number 1 in the files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from visling.data.annotations.files import Layout, has_words, read_lines
from visling.errors import DataError
from visling.image_ids import from_file_name
from visling.pickles import read_pickle
from visling.types import Record

Box = tuple[float, float, float, float]

NOT_VISUAL = "0"
"""Chain of every phrase that names nothing visible; such phrases do not belong together."""
UNRELATED = "UNRELATED_CAPTIONS"

_FOLDERS = (".", "Flickr30kEntities", "flickr30k_entities")
_MARK = re.compile(r"\[/EN#(?P<chain>\d+)(?P<types>(?:/[^\s/\]]+)*)\s+|\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phrase:
    """Some words of a sentence that name an entity."""

    text: str
    chain: str
    """Phrases of an image with the same chain name the same entity, but for `NOT_VISUAL`."""
    types: tuple[str, ...]
    """One or several of people, clothing, bodyparts, animals, vehicles, instruments, scene, other, notvisual."""
    start: int
    """Where it begins in the sentence, in characters."""
    stop: int
    """Where it ends."""
    boxes: tuple[Box, ...] | None = None
    """Pixel corners of the entity; None = not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedSentence:
    """A sentence without its mark-up, and its phrases in their order."""

    text: str
    """Words separated by single blanks."""
    phrases: tuple[Phrase, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBoxes:
    """What an annotation file says about an image."""

    size: tuple[int, int]
    """Width and height in pixels."""
    boxes: Mapping[str, tuple[Box, ...]]
    """Chain -> its boxes, in the order of the file."""
    scene: tuple[str, ...]
    """Chains that name the scene as a whole."""
    unboxed: tuple[str, ...]
    """Chains of which some object has no box; another may have one."""


@dataclass(frozen=True, kw_only=True)
class EntitiesRecord(Record):
    """One sentence of one image with its phrases that have a box; the id is `IMAGE#NUMBER`, counted from 0."""

    sentence: str
    phrases: tuple[Phrase, ...]
    size: tuple[int, int] | None = None
    """Width and height of the image in pixels; None = not annotated."""
    unboxed: int = 0
    """Phrases of the sentence without a box, left out."""
    left_out: int = 0
    """Other sentences of the image that were left out, since none of their phrases has a box."""


@dataclass(frozen=True, kw_only=True)
class EntitiesData:
    """What the files of a split hold, and what was left out."""

    records: tuple[EntitiesRecord, ...]
    """In the order of the list of images and of their sentences."""
    unboxed_phrases: int
    """Phrases without a box, also those of sentences that were left out."""
    unboxed_sentences: int
    """Sentences left out because no phrase has a box."""
    unrelated: int
    """Sentences left out because they are listed as unrelated to their image."""


def parse_sentence(line: str, where: str) -> MarkedSentence:
    """The sentence of a marked-up line.

    Args:
        where: names the line in errors.
    Raises:
        DataError: brackets that do not pair, or a phrase without words.
    """
    plain, opened, at = "", None, 0
    spans: list[tuple[re.Match[str], int, int]] = []
    for mark in _MARK.finditer(line):
        plain += line[at : mark.start()]
        at = mark.end()
        if mark["chain"] is not None:
            if opened is not None:
                raise _unbalanced(where, line, "a phrase begins within another")
            opened = mark, len(plain)
        elif opened is None:
            raise _unbalanced(where, line, "']' closes no phrase")
        else:
            spans.append((*opened, len(plain)))
            opened = None
    if opened is not None:
        raise _unbalanced(where, line, "a phrase is not closed")
    plain += line[at:]
    text = " ".join(plain.split())
    phrases = []
    for mark, start, stop in spans:
        first, last = _place_start(plain, start), len(" ".join(plain[:stop].split()))
        if last <= first:
            raise DataError(f"{where}: the phrase {mark[0].strip()} has no words in {line.strip()!r}. Remove its mark.")
        types = tuple(mark["types"].split("/")[1:])
        phrases.append(Phrase(text=text[first:last], chain=mark["chain"], types=types, start=first, stop=last))
    return MarkedSentence(text=text, phrases=tuple(phrases))


def _place_start(plain: str, at: int) -> int:
    """Where position `at` of a text is once its blanks are single ones."""
    before = " ".join(plain[:at].split())
    return len(before) + (bool(before) and plain[at - 1].isspace())


def _unbalanced(where: str, line: str, what: str) -> DataError:
    return DataError(
        f"{where}: {what} in {line.strip()!r}. Phrases are marked [/EN#NUMBER/type words] and do not nest; "
        "correct the line."
    )


def read_boxes(path: str | Path) -> ImageBoxes:
    """Boxes of an image, as in its file: the first pixel is number 1.

    Raises:
        DataError: the file is missing, truncated or not XML, declares a document type (which could expand without end
            and which no official file has), or lacks a number; a box is inverted or outside the image.
    """
    path = Path(path)
    with Layout(path):
        return _collect_boxes(_read_xml(path), path)


def _collect_boxes(root: ElementTree.Element, path: Path) -> ImageBoxes:
    """See `read_boxes`."""
    size = int(_number(root.findtext("size/width"), path)), int(_number(root.findtext("size/height"), path))
    boxes: dict[str, list[Box]] = {}
    scene: list[str] = []
    unboxed: list[str] = []
    for element in root.iterfind("object"):
        chains = [(name.text or "").strip() for name in element.iterfind("name")]
        corners = element.find("bndbox")
        if corners is not None:
            x1, y1, x2, y2 = (_number(corners.findtext(side), path) for side in ("xmin", "ymin", "xmax", "ymax"))
            _check_box((x1, y1, x2, y2), size, chains, path)
            for chain in chains:
                boxes.setdefault(chain, []).append((x1, y1, x2, y2))
        if _is_set(element, "scene"):
            scene += chains
        if _is_set(element, "nobndbox"):
            unboxed += chains
    return ImageBoxes(
        size=size,
        boxes={chain: tuple(own) for chain, own in boxes.items()},
        scene=tuple(scene),
        unboxed=tuple(unboxed),
    )


def _read_xml(path: Path) -> ElementTree.Element:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"no annotation file {path}. Check the path.") from error
    except OSError as error:  # a list that names what can be no file
        raise DataError(f"cannot read {str(path)[:300]}: {error.strerror}. Correct the list of images.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start}: {error.reason}. Unpack it again.") from error
    if "<!DOCTYPE" in text:
        raise DataError(
            f"{path} declares a document type, which may define entities that expand without end; "
            "official files have none. Remove the declaration."
        )
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:  # a zero byte is a ValueError
        raise DataError(f"{path} is truncated or not XML: {error}. Unpack it again.") from error


def _number(text: str | None, path: Path) -> float:
    try:
        return float(text or "")
    except ValueError as error:
        raise DataError(f"{path}: expected a number of pixels; found {text!r}. Unpack it again.") from error


def _is_set(element: ElementTree.Element, name: str) -> bool:
    return (element.findtext(name) or "0").strip() == "1"


def _check_box(box: Box, size: tuple[int, int], chains: Sequence[str], path: Path) -> None:
    """Refuse a box without any pixel of the image."""
    (x1, y1, x2, y2), (width, height) = box, size
    if not (x1 <= x2 and y1 <= y2 and x1 <= width and y1 <= height and x2 >= 1 and y2 >= 1):
        raise DataError(
            f"{path}: the box {box} of {', '.join(chains)} has no pixel of the image of {width} x {height} pixels. "
            "Corners are xmin <= xmax and ymin <= ymax from 1 on; correct the file."
        )


def find_entities(root: str | Path, split: str) -> tuple[Path, Path] | None:
    """The folder of `Sentences` and `Annotations` and the list of a split's images, if there are any: in a folder, its
    `Flickr30kEntities` or its `flickr30k_entities`. BAN's table may also stand next to that folder."""
    root = Path(root)
    for folder in (root / name for name in _FOLDERS):
        if (folder / "Sentences").is_dir() and (folder / "Annotations").is_dir():
            table = f"{split}_imgid2idx.pkl"
            for file in (folder / f"{split}.txt", folder / table, root / table):
                if file.is_file():
                    return folder, file
    return None


def listed_images(path: Path) -> list[str]:
    """Image ids of the list of a split, in its order.

    Raises:
        DataError: the file is missing or of another layout, or lists an image twice.
    """
    if path.suffix == ".pkl":
        table = read_pickle(path)
        if not isinstance(table, dict):
            raise DataError(f"{path} holds a {type(table).__name__}; expected a table from image id to row.")
        return [str(image) for image in table]
    images = [from_file_name(line.strip()) for _, line in read_lines(path) if line.strip()]
    if twice := [image for image, count in Counter(images).items() if count > 1]:
        raise DataError(f"{path} lists image {twice[0]} more than once ({len(twice)} such images). List each once.")
    return images


def read_sentences(folder: Path, image: str) -> list[tuple[int, MarkedSentence]]:
    """Sentences of an image with their numbers from 0; lines without a word are none.

    Raises:
        DataError: the file is missing or not UTF-8, or a line's mark-up is broken.
    """
    path = folder / "Sentences" / f"{image}.txt"
    parsed = ((number - 1, parse_sentence(line, f"{path}, line {number}")) for number, line in read_lines(path))
    return [(number, sentence) for number, sentence in parsed if has_words(sentence.text)]


def read_entities(
    root: str | Path, split: str, *, first_pixel: Literal[0, 1] = 1, unrelated: bool = False
) -> EntitiesData:
    """Sentences of a split with their phrases that have a box.

    Args:
        first_pixel: its number in the boxes returned: 1 as in the files (BAN, VisualBERT), or 0 (the official reader in
            Python).
        unrelated: keep sentences that UNRELATED_CAPTIONS lists.
    Raises:
        DataError: a file is missing or broken.
    """
    found = find_entities(root, split)
    if found is None:
        raise DataError(
            f"{root} has no Flickr30K Entities of {split!r}: expected Sentences, Annotations and {split}.txt, "
            f"there or in {' or '.join(_FOLDERS[1:])}. Unpack annotations.zip next to the lists of images."
        )
    folder, file = found
    excluded = frozenset() if unrelated else _read_unrelated(folder)
    records: list[EntitiesRecord] = []
    counts: Counter[str] = Counter()
    for image in listed_images(file):
        annotated = read_boxes(folder / "Annotations" / f"{image}.xml")
        chosen, bare = [], 0
        for number, sentence in read_sentences(folder, image):
            if (image, number) in excluded:
                counts["unrelated"] += 1
            else:
                boxed = _boxed_phrases(sentence, annotated, first_pixel)
                counts["phrases"] += len(sentence.phrases) - len(boxed)
                bare += not boxed
                chosen += [(number, sentence, boxed)] * bool(boxed)
        counts["sentences"] += bare
        records += [
            EntitiesRecord(
                id=f"{image}#{number}",
                images=(image,),
                sentence=sentence.text,
                phrases=boxed,
                size=annotated.size,
                unboxed=len(sentence.phrases) - len(boxed),
                left_out=bare,
            )
            for number, sentence, boxed in chosen
        ]
    return EntitiesData(
        records=tuple(records),
        unboxed_phrases=counts["phrases"],
        unboxed_sentences=counts["sentences"],
        unrelated=counts["unrelated"],
    )


def _boxed_phrases(sentence: MarkedSentence, annotated: ImageBoxes, first_pixel: int) -> tuple[Phrase, ...]:
    """The phrases that have a box, with their boxes."""
    less = 1 - first_pixel
    return tuple(
        Phrase(
            text=phrase.text,
            chain=phrase.chain,
            types=phrase.types,
            start=phrase.start,
            stop=phrase.stop,
            boxes=tuple((x1 - less, y1 - less, x2 - less, y2 - less) for x1, y1, x2, y2 in boxes),
        )
        for phrase in sentence.phrases
        if phrase.chain != NOT_VISUAL and (boxes := annotated.boxes.get(phrase.chain))
    )


def _read_unrelated(folder: Path) -> frozenset[tuple[str, int]]:
    """Image and number, from 0, of the sentences listed as unrelated; none if there is no list."""
    path = folder / UNRELATED
    if not path.is_file():
        return frozenset()
    pairs = set()
    for number, line in read_lines(path):
        words = line.split()
        if len(words) == 2 and re.fullmatch(r"[0-9]{1,9}", words[1]):
            pairs.add((from_file_name(words[0]), int(words[1]) - 1))
        elif words and number > 1:
            raise DataError(
                f"{path}, line {number}: expected an image id and the number of a sentence; found {line!r}."
            )
    return frozenset(pairs)
