"""What every pre-training corpus shares: its settings, how it is read, and which of its records have regions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from visling.data.annotations.captions import Captions
from visling.data.annotations.lxmert import LxmertRecord
from visling.data.answers import AnswerVocabulary
from visling.data.batches.examples import ExampleBatch, Source
from visling.data.text import TextLayout
from visling.data.text_arrays import Texts
from visling.data.texts import split_texts
from visling.errors import DataError, StoreError
from visling.image_ids import canonical
from visling.regions.store import NativeStore
from visling.types import Example, Record

R = TypeVar("R", bound=Record)
R_co = TypeVar("R_co", bound=Record, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One body of sentences about images, or of text; which folders it is read from comes from the command line."""

    kind: str
    """One of `corpora.readers.names()`, or a dotted path to a kind of your own: my_package.my_module.kind."""
    weight: float = 1.0
    """Passes over it per epoch; of text next to sentences about images: rows per row with an image."""
    keep_above: bool = True
    """Of vilbert_captions: a draw above one half keeps the caption (first release) or replaces it (False, multi-task
    release)."""
    same_choice: bool = False
    """Of vcr: question i is shown with choice i modulo 8, eight times, as in VisualBERT's release by mistake."""
    question_text: Literal["written", "release"] = "written"
    """Of questions: as people wrote them, or as VisualBERT's release tokenises them."""
    answers: Path | None = None
    """Of questions: file with the answers that may be drawn (`<unk>` where a question has none of them), as in
    VisualBERT's release; None draws from all that people gave."""
    word_links: bool = False
    """Of vcr: links from names to regions count words instead of word pieces, as in VisualBERT's release by mistake."""
    special_tokens: bool = False
    """Of text: rows begin with [CLS] and end with [SEP], as sentences about images do; in VL-BERT's release they have
    neither."""


class RecordSource(Source, Protocol):
    """Examples that come from annotations."""

    @property
    def records(self) -> Sequence[Record]: ...


class Choice(NamedTuple):
    """What an example of a `SentenceSource` shows."""

    record: int
    """Number of the record whose image it is."""
    texts: tuple[int, ...]
    """Numbers of one text, or of the two that make a pair."""
    labels: dict[str, int]


class SentenceSource(ABC, Generic[R_co]):
    """One or two of many texts, next to the image of a record; each kind says in `choose` which.

    Args:
        records: one per example.
        texts: those that `choose` numbers.
    """

    def __init__(self, records: Sequence[R_co], texts: Sequence[str], layout: TextLayout) -> None:
        self.records, self.texts, self.layout = records, texts, layout

    def __len__(self) -> int:
        return len(self.records)

    @abstractmethod
    def choose(self, index: int, rng: np.random.Generator) -> Choice:
        """Draw what example `index` shows; all examples of a source have the same labels and as many texts."""

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """What `choose` draws, laid out."""
        choice = self.choose(index, rng)
        record = self.records[choice.record]
        row = self.layout.row(*(self.texts[number] for number in choice.texts))
        return Example(id=record.id, rows=(row,), images=record.images, labels=choice.labels)

    def prepare(self) -> None:
        """Split the texts into word pieces, unless an earlier run left them (`split_texts`)."""
        _ = self._split

    def measure(self, choices: Sequence[Choice]) -> NDArray[np.int64]:
        """(N,) word pieces of each row."""
        return self.layout.measure(self._split, self._number_texts(choices))

    def lay_out(self, choices: Sequence[Choice]) -> ExampleBatch:
        """What `example` makes of each choice."""
        records = [self.records[choice.record] for choice in choices]
        return ExampleBatch(
            ids=[record.id for record in records],
            images=[record.images for record in records],
            rows=self.layout.rows(self._split, self._number_texts(choices)),
            labels={
                name: np.array([choice.labels[name] for choice in choices], np.int64) for name in choices[0].labels
            },
        )

    @cached_property
    def _split(self) -> Texts:
        return split_texts(self.texts, self.layout.tokenizer)

    def _number_texts(self, choices: Sequence[Choice]) -> NDArray[np.int64]:
        """(N, 1 or 2).

        Raises:
            DataError: a text without any word piece.
        """
        numbers = np.array([choice.texts for choice in choices], np.int64)
        offsets = self._split.offsets
        if (empty := (offsets[numbers] == offsets[numbers + 1]).any(1)).any():
            first = choices[int(empty.argmax())]
            self.layout.row(*(self.texts[number] for number in first.texts))
        return numbers


@dataclass(frozen=True, kw_only=True)
class Typical:
    """Size of an example of a corpus, for estimates; the default is that of a corpus that no published run reads."""

    tokens: int = 16
    """Word pieces of a row, special tokens included: a rough mean, as batches hold texts of similar lengths."""
    examples: int | None = None
    """In an epoch of the published run."""
    images: int = 1
    """Per example; 0 for text alone."""


@dataclass(frozen=True, kw_only=True)
class CorpusReader:
    """How a kind of corpus about images is read; the module of a kind offers it in its `READERS`."""

    shows: str
    """What one example is."""
    read: Callable[[Path, str, CorpusContext], RecordSource]
    """The examples of a folder and split."""
    present: Callable[[Path, str], bool]
    """Whether a folder has the corpus, in this split."""
    validates: bool = True
    """Whether it comes with a validation split."""
    numbered: bool = False
    """Whether its image ids may be numbers of Visual Genome; see `is_genome_number`."""
    questions: Callable[[Path, str, CorpusContext | None], Sequence[LxmertRecord]] | None = None
    """Its questions with their answers, if it has any."""
    settings: frozenset[str] = frozenset()
    """Fields of `Corpus` that it reads, besides `kind` and `weight`."""
    serves: str | None = None
    """The only objective for whose sake it is read in addition to other corpora, if there is one."""
    typical: Typical = Typical()


@dataclass(frozen=True, kw_only=True)
class TextReader:
    """How a kind of corpus without images is read: all its folders as one text."""

    shows: str
    """What one example is."""
    read: Callable[[Sequence[tuple[Path, str]], CorpusContext], Source]
    """The examples of several folders, each with its split."""
    present: Callable[[Path, str], bool]
    """Whether a folder has the corpus, in this split."""
    settings: frozenset[str] = frozenset()
    """Fields of `Corpus` that it reads, besides `kind` and `weight`."""
    serves: str | None = "masked_lm"
    """The only objective for whose sake it is read."""
    typical: Typical = Typical(images=0)


@dataclass(frozen=True, kw_only=True)
class CorpusContext:
    """What a corpus is read with, and what was left out of it."""

    corpus: Corpus
    reader: CorpusReader | TextReader
    layout: TextLayout
    regions: NativeStore | None
    """Store of the regions; None where the run reads text alone."""
    matching: bool
    """Whether the run learns which text fits an image; without it no sentence is replaced."""
    answers: AnswerVocabulary | None = None
    """Answers that image question answering chooses from; None = the run does not learn it."""
    notes: list[str] = field(default_factory=list)
    """What was left out, a sentence per corpus; shared by all corpora of a run."""
    captions: dict[tuple[Path, str], Captions] = field(default_factory=dict)
    """COCO's captions by folder and split, which several corpora of a run read; shared by all of them."""

    @property
    def store(self) -> NativeStore:
        """Regions of the images that a corpus speaks of."""
        assert self.regions is not None, "text is read without regions"
        return self.regions

    def note(self, root: Path, left_out: Mapping[str, int]) -> None:
        """Add a note of what was left out of the corpus and how often, if anything was."""
        counts = [f"{count} {what}" for what, count in left_out.items() if count]
        if counts:
            self.notes.append(f"{self.corpus.kind} of {root}: left out {', '.join(counts)}")


@dataclass(frozen=True, kw_only=True)
class SentenceRecord(Record):
    """A sentence about one or two images, and whether it is true of them."""

    sentence: str
    label: bool | None
    """None = unknown."""


def group_by_image(records: Sequence[Record]) -> dict[str, list[int]]:
    """Numbers of the captions of each image.

    Raises:
        DataError: captions of fewer than two images.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for number, record in enumerate(records):
        groups[record.images[0]].append(number)
    if len(groups) < 2:
        raise DataError(
            f"captions of {len(groups)} image(s) leave no other image to draw a wrong caption from: "
            "give captions of at least two."
        )
    return dict(groups)


def draw_of_another_image(records: Sequence[Record], record: Record, rng: np.random.Generator) -> int:
    """The number of a random record of another image than that of `record`."""
    while True:
        drawn = int(rng.integers(len(records)))
        if records[drawn].images != record.images:
            return drawn


def split_root(root: str) -> tuple[Path, str]:
    """What `DIR@SPLIT` names; the split is empty for a plain folder, whose own path may hold an @."""
    folder, at, split = root.rpartition("@")
    return (Path(root), "") if not at or "/" in split or Path(root).is_dir() else (Path(folder), split)


def is_genome_number(image: str) -> bool:
    """Whether an image id of a `numbered` corpus (Visual Genome, GQA, LXMERT's merged files) is a number of Visual
    Genome; their other ids are COCO's names."""
    return image.isdecimal()


def check_images(records: Iterable[Record], store: NativeStore) -> None:
    """Refuse a store that lacks images, before any time is spent on training or scoring.

    Raises:
        StoreError: names the first example and image, and how many images are missing.
        DataError: an example has no image.
    """
    named: dict[str, str] = {}
    for record in records:
        if not record.images:
            raise DataError(f"example {record.id!r} has no image. Train a model of the words alone: --text-only.")
        for image in record.images:
            named.setdefault(image, record.id)
    missing = {image: example for image, example in named.items() if image not in store}
    for image, example in missing.items():
        try:
            store.count(image)
        except StoreError as error:
            others = f" In all, {len(missing)} annotated images are missing." if len(missing) > 1 else ""
            raise StoreError(f"example {example!r} needs image {image!r}: {error}{others}") from error


def keep_with_regions(records: Sequence[R], root: Path, context: CorpusContext) -> list[R]:
    """The records whose images have regions; the others are noted.

    A number of Visual Genome is looked up by this exact id only: its 9 and COCO's 9 are two images.

    Raises:
        StoreError: no image has any.
    """
    store = context.store
    numbered = isinstance(context.reader, CorpusReader) and context.reader.numbered
    images = dict.fromkeys(image for record in records for image in record.images)
    exact = frozenset(store.ids).intersection(images)
    genome = frozenset(image for image in images if numbered and is_genome_number(image))
    taken = exact & genome
    # By the exact id, or by an alias that is not a number of Visual Genome.
    stored = {
        image
        for image in images
        if image in exact or (image not in genome and canonical(image) not in taken and image in store)
    }
    usable = {image for image in stored if store.count(image)}
    kept = [record for record in records if usable.issuperset(record.images)]
    if records and not kept:
        raise StoreError(
            f"region store {store.path} has none of the {len(images)} images of {context.corpus.kind} in {root}, "
            f"such as {records[0].images[0]!r}{', with a region' if stored else ''}. "
            "Give the store of this data set; its image ids must be those of the annotations."
        )
    context.note(root, {f"sentences of {len(images) - len(usable)} images without regions": len(records) - len(kept)})
    return kept


def keep_with_regions_of_all(records: Sequence[R], root: Path, context: CorpusContext) -> list[R]:
    """`keep_with_regions` for data sets that ought to be complete (COCO, NLVR, VQA, VCR): the store must know every
    image, though its detector may have found nothing in it.

    Raises:
        StoreError: the store lacks an image.
    """
    check_images(records, context.store)
    return keep_with_regions(records, root, context)


def note_left_out_captions(captions: Captions, root: Path, context: CorpusContext) -> None:
    """Note what the reader of captions left out."""
    left_out = {
        "empty captions": captions.empty,
        "repeated captions": captions.repeated,
        "lines of another layout": captions.malformed,
        "images without a caption": len(captions.bare_images),
        "sentences without an entity in a box": captions.unboxed,
    }
    context.note(root, left_out)


def can_find(find: Callable[[Path, str], Path], root: Path, split: str) -> bool:
    """Whether `find` finds a file."""
    try:
        return bool(find(root, split))
    except DataError:
        return False
