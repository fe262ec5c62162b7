"""Visual Genome's region descriptions and questions as pre-training examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from visling.data.annotations.captions import Captions
from visling.data.annotations.files import read_ids
from visling.data.annotations.genome import QUESTIONS, REGIONS, read_genome_questions, read_region_descriptions
from visling.data.annotations.lxmert import LxmertRecord, from_question
from visling.data.corpora.base import CorpusContext
from visling.errors import DataError
from visling.types import Record

_T = TypeVar("_T", bound=Record)


def _of_split(records: Sequence[_T], root: Path, split: str) -> list[_T]:
    """Records of a split of Visual Genome, which has none of its own: of the images that `{split}_images.txt` lists;
    without such a list, for training, of those that no other list has."""
    own = root / f"{split}_images.txt"
    if own.is_file():
        wanted = read_ids(own)
        return [record for record in records if record.images[0] in wanted]
    others = frozenset[str]().union(*(read_ids(file) for file in root.glob("*_images.txt")))
    return [record for record in records if record.images[0] not in others]


def genome_phrases(root: Path, split: str, reading: CorpusContext) -> Captions:
    found = read_region_descriptions(_genome_file(root, split, REGIONS))
    return replace(found, records=tuple(_of_split(found.records, root, split)))


def _genome_file(root: Path, split: str, name: str) -> Path:
    if split != "train" and not (root / f"{split}_images.txt").is_file():
        raise DataError(
            f"Visual Genome has no splits, and {root} has no list {split}_images.txt of the images of {split!r}, one id a line. Make one."
        )
    return root / name


def has_genome(name: str) -> Callable[[Path, str], bool]:
    def there(root: Path, split: str) -> bool:
        return (root / name).is_file() and (split == "train" or (root / f"{split}_images.txt").is_file())

    return there


def genome_questions(root: Path, split: str, reading: CorpusContext | None) -> Sequence[LxmertRecord]:
    records, left_out = read_genome_questions(_genome_file(root, split, QUESTIONS))
    if reading is not None:
        reading.note(root, {"empty or repeated questions": left_out})
    return [from_question(record, "visual7w") for record in _of_split(records, root, split)]


def is_genome_number(image: str) -> bool:
    """Whether an image id of Visual Genome, GQA or LXMERT's merged files is a number of Visual Genome; their other ids
    are COCO's names."""
    return image.isdecimal()
