"""Visual Genome's region descriptions and questions as pre-training examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from visling.data.annotations.captions import Captions
from visling.data.annotations.files import read_ids
from visling.data.annotations.genome import QUESTIONS, REGIONS, read_genome_questions, read_region_descriptions
from visling.data.annotations.lxmert import LxmertRecord, from_question
from visling.data.corpora.base import CorpusContext, CorpusReader
from visling.data.corpora.captions import read_with
from visling.data.corpora.questions import ask_with
from visling.errors import DataError
from visling.types import Record

_T = TypeVar("_T", bound=Record)


def _keep_split(records: Sequence[_T], root: Path, split: str) -> list[_T]:
    """Records of a split of Visual Genome, which has none of its own: of the images that `{split}_images.txt` lists;
    without such a list, for training, of those that no other list has."""
    own = root / f"{split}_images.txt"
    if own.is_file():
        wanted = read_ids(own)
        return [record for record in records if record.images[0] in wanted]
    others = frozenset[str]().union(*(read_ids(file) for file in root.glob("*_images.txt")))
    return [record for record in records if record.images[0] not in others]


def _read_phrases(root: Path, split: str, context: CorpusContext) -> Captions:
    captions = read_region_descriptions(_find_file(root, split, REGIONS))
    return replace(captions, records=tuple(_keep_split(captions.records, root, split)))


def _find_file(root: Path, split: str, name: str) -> Path:
    if split != "train" and not (root / f"{split}_images.txt").is_file():
        raise DataError(
            f"Visual Genome has no splits, and {root} has no list {split}_images.txt of the images of {split!r}, "
            "one id a line. Make one."
        )
    return root / name


def _has_file(name: str) -> Callable[[Path, str], bool]:
    def has(root: Path, split: str) -> bool:
        return (root / name).is_file() and (split == "train" or (root / f"{split}_images.txt").is_file())

    return has


def _read_questions(root: Path, split: str, context: CorpusContext | None) -> Sequence[LxmertRecord]:
    records, left_out = read_genome_questions(_find_file(root, split, QUESTIONS))
    if context is not None:
        context.note(root, {"empty or repeated questions": left_out})
    return [from_question(record, "visual7w") for record in _keep_split(records, root, split)]


READERS: Mapping[str, CorpusReader] = {
    "vg_regions": CorpusReader(
        shows="a phrase of one of Visual Genome's regions, half of the time of another image if the run learns "
        "matching",
        read=read_with(_read_phrases),
        present=_has_file(REGIONS),
        validates=False,
        numbered=True,
    ),
    "vg_qa": CorpusReader(
        shows="a question of Visual Genome and the answer to predict, half of the time of another image if the run "
        "learns matching (LXMERT)",
        read=ask_with(_read_questions),
        present=_has_file(QUESTIONS),
        validates=False,
        numbered=True,
        questions=_read_questions,
        serves="image_qa",
    ),
}
