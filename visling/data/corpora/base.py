"""What every pre-training corpus shares: its settings, how it is read, and which of its records have regions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np

from visling.data.annotations.captions import Captions
from visling.data.annotations.lxmert import LxmertRecord
from visling.data.answers import AnswerVocabulary
from visling.data.batches.loader import Source
from visling.data.text import TextLayout
from visling.errors import ConfigError, DataError, StoreError
from visling.image_ids import canonical
from visling.regions.store import NativeStore
from visling.types import Record


class RecordSource(Source, Protocol):
    """Examples that are made of annotations."""

    @property
    def records(self) -> Sequence[Record]: ...


@dataclass(frozen=True, kw_only=True)
class SentenceRecord(Record):
    """A sentence about one or two images, and whether it is true of them."""

    sentence: str
    label: bool | None
    """None = unknown."""


def group_by_image(records: Sequence[Record]) -> dict[str, list[int]]:
    """Numbers of the captions of each image; at least two images."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, record in enumerate(records):
        groups[record.images[0]].append(number)
    if len(groups) < 2:
        raise DataError(
            f"captions of {len(groups)} image(s) leave no other image to draw a wrong caption from: give captions of at least two."
        )
    return dict(groups)


_R = TypeVar("_R", bound=Record)


def draw_of_another_image(records: Sequence[_R], record: _R, rng: np.random.Generator) -> _R:
    while True:
        drawn = records[int(rng.integers(len(records)))]
        if drawn.images != record.images:
            return drawn


def split_root(root: str) -> tuple[Path, str]:
    """What `DIR@SPLIT` names; the split is empty for a plain folder, whose own path may hold an @."""
    folder, at, split = root.rpartition("@")
    return (Path(root), "") if not at or "/" in split or Path(root).is_dir() else (Path(folder), split)


def check_images(records: Iterable[Record], store: NativeStore) -> None:
    """Refuse a store that lacks images, before any time is spent on training or scoring.

    Raises:
        StoreError: names the first example and image, and how many images are missing.
    """
    missing: dict[str, str] = {}
    for record in records:
        for image in record.images:
            if image not in store:
                missing.setdefault(image, record.id)
    for image, example in missing.items():
        try:
            store.count(image)
        except StoreError as error:
            others = f" In all, {len(missing)} annotated images are missing." if len(missing) > 1 else ""
            raise StoreError(f"example {example!r} needs image {image!r}: {error}{others}") from error


@dataclass(frozen=True, kw_only=True)
class CorpusContext:
    """What the reader of a corpus knows, and what all of them leave out."""

    corpus: Corpus
    layout: TextLayout
    store: NativeStore
    matching: bool
    """Whether the run learns which text fits an image; without it no sentence is replaced."""
    answers: AnswerVocabulary | None = None
    """Answers that image question answering is asked for; None = it is not learnt."""
    notes: list[str] = field(default_factory=list)
    """What was left out, a sentence per corpus."""

    def note(self, root: Path, left_out: Mapping[str, int]) -> None:
        """Remember what was left out of the corpus and how often, unless it is nothing."""
        told = [f"{count} {what}" for what, count in left_out.items() if count]
        if told:
            self.notes.append(f"{self.corpus.kind} of {root}: left out {', '.join(told)}")


@dataclass(frozen=True, kw_only=True)
class CorpusReader:
    """How a corpus is read."""

    read: Callable[[Path, str, CorpusContext], RecordSource]
    there: Callable[[Path, str], bool]
    """Whether a folder has it."""
    validates: bool = True
    """Whether it comes with a validation split."""
    questions: Callable[[Path, str, CorpusContext | None], Sequence[LxmertRecord]] | None = None
    """Its questions with their answers, if it has any."""


_T = TypeVar("_T", bound=Record)


def with_regions(
    records: Sequence[_T], root: Path, reading: CorpusContext, *, numbered: Callable[[str], bool] = lambda image: False
) -> list[_T]:
    """The records whose images have regions.

    Args:
        numbered: whether an image id is a number of Visual Genome. Its 9 and COCO's 9 are two images: it is looked for
            by its exact id, and never found under a name of COCO.
    Raises:
        StoreError: none has.
    """
    store = reading.store
    images = dict.fromkeys(image for record in records for image in record.images)
    exact = frozenset(store.ids).intersection(images)
    taken = frozenset(filter(numbered, exact))
    # Found exactly, or by an alias that is not Visual Genome's.
    there = {
        image
        for image in images
        if image in exact or (not numbered(image) and canonical(image) not in taken and image in store)
    }
    seen = {image for image in there if store.count(image)}
    kept = [record for record in records if seen.issuperset(record.images)]
    if records and not kept:
        raise StoreError(
            f"region store {store.path} has none of the {len(images)} images of {reading.corpus.kind} in {root}, such as "
            f"{records[0].images[0]!r}{', with a region' if there else ''}. Give the store of this data set; its image ids must be those of the "
            "annotations."
        )
    reading.note(root, {f"sentences of {len(images) - len(seen)} images without regions": len(records) - len(kept)})
    return kept


# Sentences as COCO, NLVR, VQA and VCR hold them; the store must know every image, though its detector may have found
# nothing in it.


def with_all_regions(records: Sequence[_T], root: Path, reading: CorpusContext) -> list[_T]:
    check_images(records, reading.store)
    return with_regions(records, root, reading)


def note_left_out_captions(found: Captions, root: Path, reading: CorpusContext) -> None:
    left_out = {
        "empty captions": found.empty,
        "repeated captions": found.repeated,
        "lines of another layout": found.malformed,
        "images without a caption": len(found.bare_images),
    }
    reading.note(root, left_out)


def can_find(find: Callable[[Path, str], Path], root: Path, split: str) -> bool:
    try:
        return bool(find(root, split))
    except DataError:
        return False


CorpusKind = Literal[
    "captions",
    "caption_pairs",
    "single_captions",
    "statements",
    "unmasked_statements",
    "true_statements",
    "questions",
    "spelled_questions",
    "answered_questions",
    "conceptual_captions",
    "sbu",
    "flickr30k",
    "vilbert_captions",
    "vg_regions",
    "vg_qa",
    "gqa",
    "lxmert",
    "vcr",
    "text",
]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One body of sentences about images; which folders it is read from comes from the command line."""

    kind: CorpusKind
    """COCO captions, as VisualBERT shows them: captions: one, always right, nothing to match. caption_pairs: two, does
    the second fit. single_captions: one, half of the time a wrong one.
    NLVR: statements: true or false. unmasked_statements: the same with every word shown. true_statements: the true ones
    as captions. VQA: questions: question and answer as one text (VisualBERT). spelled_questions: the same, the answer
    letter by letter, as its release has it. answered_questions: questions whose answer is asked for (LXMERT).
    One caption each, half of the time a wrong one if the run learns matching: conceptual_captions (released table, or
    VL-BERT's rows), sbu, flickr30k, vg_regions (phrases of Visual Genome's regions), vilbert_captions (ViLBERT's table
    of Conceptual Captions; a "wrong" one may fit). As answered_questions: vg_qa, gqa. lxmert: its merged file, captions
    and questions of five data sets. vcr: question and one of its answers, or both and a rationale: is the choice right
    (VisualBERT); each of the eight choices once per pass. text: sentences or documents without images, in a batch of
    their own (VL-BERT)."""
    weight: float = 1.0
    """Passes over it per epoch; of text: rows per row with an image."""
    keep_above: bool = True
    """Of vilbert_captions: a draw above one half keeps the caption (first release) or replaces it (False, multi-task
    release)."""
    same_choice: bool = False
    """Of vcr: question i is shown with choice i modulo 8, eight times, as in VisualBERT's release by mistake."""
    word_links: bool = False
    """Of vcr: links from names to regions count words instead of word pieces, as in VisualBERT's release by mistake."""

    def __post_init__(self) -> None:
        owned = (
            ("keep_above", not self.keep_above, "vilbert_captions"),
            ("same_choice", self.same_choice, "vcr"),
            ("word_links", self.word_links, "vcr"),
        )
        for setting, changed, kind in owned:
            if changed and self.kind != kind:
                raise ConfigError(f"{setting} is a setting of {kind}; found it with {self.kind}. Leave it out.")
