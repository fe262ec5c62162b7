"""What a pre-training run reads: which files make a corpus, how it is shown, how corpora are mixed, and the answers that are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from visling.data.annotations.captions import (
    CaptionRecord,
    Captions,
    find_coco_captions,
    find_flickr30k,
    has_coco_captions,
    has_flickr30k,
    read_ids,
)
from visling.data.annotations.genome import QUESTIONS, REGIONS, read_genome_questions, read_region_descriptions
from visling.data.annotations.lxmert import LxmertRecord, find_answer_table, find_lxmert, from_question, has_lxmert, read_lxmert
from visling.data.annotations.passages import Passages, find_passages, has_passages
from visling.data.annotations.questions import find_gqa, find_vqa_files, has_gqa, has_vqa, read_gqa, read_questions
from visling.data.annotations.statements import Nlvr2Record, find_nlvr2, read_nlvr2
from visling.data.annotations.vcr import VcrRecord, find_vcr, has_vcr, read_metadata, read_vcr
from visling.data.annotations.web_captions import (
    Naming,
    find_conceptual_captions,
    find_vilbert_captions,
    has_sbu,
    image_name,
    read_conceptual_captions,
    read_sbu,
    read_vilbert_captions,
    read_vlbert_captions,
)
from visling.data.answer_table import build_table, read_table
from visling.data.answers import AnswerVocabulary
from visling.data.identity import Aliases, canonical
from visling.data.loader import Source
from visling.data.pretraining import (
    CaptionPairs,
    Labelled,
    LabelledSentences,
    LxmertSentences,
    Mixture,
    PlainText,
    QuestionAnswer,
    RecordSource,
    SentenceRecord,
    SingleCaption,
    VcrChoices,
    VilbertCaptions,
)
from visling.data.store import NativeStore
from visling.data.text import TextLayout
from visling.errors import ConfigError, DataError, StoreError
from visling.recipes import assembly
from visling.recipes.plans import Corpus, CorpusKind, Pretraining
from visling.tasks.nlvr import NLVR, NlvrRecord
from visling.types import Record
from visling.vision.extract import find_images

_NAMING_SAMPLE = 2000
"""Rows of Conceptual Captions by which the naming of a store's images is found out."""
_SAME_BOX = 1.0
"""Pixels by which each coordinate of a stored box may be off an object of VCR and is still that object's: stores may hold rounded boxes."""


@dataclass(frozen=True, kw_only=True)
class Reading:
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
class Corpora:
    """The examples of a run."""

    images: Source
    """Sentences about images."""
    text: PlainText | None
    """Text without images."""
    text_share: float
    """Rows of text per row with an image."""
    notes: Sequence[str]
    """What was left out, a sentence per corpus."""


def read(run: Pretraining, data: Sequence[str], layout: TextLayout, store: NativeStore, *, valid: bool, answers: AnswerVocabulary | None) -> Corpora:
    """The training or validation examples of a run: every corpus, read from every folder that has it, mixed by weight.

    In validation, corpora that have no split of their own may be missing, text among them.

    Args:
        answers: the table that `answer_table` gives.
    Raises:
        DataError: no folder has a corpus, or no folder is left to validate on.
        StoreError: the store lacks an image of a data set that ought to be complete, or every image of another.
        ConfigError: all corpora are text without images.
    """
    if all(part.kind == "text" for part in run.corpora):
        raise ConfigError("a run needs a corpus of sentences about images; found text alone. Add one, for example captions.")
    first = Reading(corpus=run.corpora[0], layout=layout, store=store, matching="matching" in run.objectives, answers=answers)
    sources: list[RecordSource] = []
    weights: list[float] = []
    own = run.valid_split if valid else run.train_split
    places = _places(data, own, valid=valid)
    for part in run.corpora:
        kind = _KINDS.get(part.kind)
        if kind is None:
            continue
        there = [place for place in places if kind.there(*place)]
        if valid and not there and not kind.validates:
            continue
        reading = replace(first, corpus=part)  # the notes are those of all
        # A corpus that no folder has is read all the same: its reader says what it looked for.
        for folder, split in there or places[:1]:
            sources.append(kind.read(folder, split, reading))
            weights.append(part.weight)
    if not places:
        raise DataError("every --data folder names its own split, so none is left to validate on: give one without @SPLIT.")
    if not sources:
        raise DataError(f"none of {', '.join(data)} holds a split {own!r}: validate on a corpus that has one, or give --set valid_split=NAME.")
    images: Source
    if answers is None:
        images = sources[0] if len(sources) == 1 and weights == [1.0] else Mixture(sources, weights)
    else:
        images = Mixture([Labelled(source, ("matched", "answer")) for source in sources], weights)
    text, share = _text(run.corpora, places, first, valid=valid)
    return Corpora(images=images, text=text, text_share=share, notes=tuple(first.notes))


def answer_table(run: Pretraining, data: Sequence[str]) -> AnswerVocabulary | None:
    """The answers of a run that learns to answer questions; None for others.

    The table beside LXMERT's merged files (`all_ans.json`) if a folder has one; else the best answers of the training questions that occur
    `run.min_answer_count` times.

    Raises:
        ConfigError: no corpus of the run has answers.
        DataError: a file is not of its layout, folders have different tables, or no answer is frequent enough.
    """
    if "image_qa" not in run.objectives:
        return None
    asking = [kind for part in run.corpora if (kind := _KINDS.get(part.kind)) is not None and kind.questions is not None]
    if not asking:
        with_answers = ", ".join(name for name, kind in _KINDS.items() if kind.questions is not None)
        raise ConfigError(f"the objective image_qa needs a corpus with answers ({with_answers}); the recipe has none.")
    places = _places(data, run.train_split, valid=False)
    tables = {file: read_table(file) for folder, _ in places if (file := find_answer_table(folder)) is not None}
    if len(set(tables.values())) > 1:
        raise DataError(f"the answer tables {', '.join(map(str, tables))} differ: one run has one. Leave out the folder whose table is not wanted.")
    if tables:
        return next(iter(tables.values()))
    labels: list[Mapping[str, float]] = []
    for kind in asking:
        assert kind.questions is not None
        for folder, split in [place for place in places if kind.there(*place)] or places[:1]:
            labels += [record.scores for record in kind.questions(folder, split, None) if record.scores]
    return build_table(labels, run.min_answer_count)


def images_of(source: Source) -> list[str]:
    """Image of every example, where the features of random regions come from."""
    return [record.images[0] for part in _parts(source) for record in part.records]


def find_pictures(run: Pretraining, folder: Path, sources: Iterable[Source], store: NativeStore) -> dict[str, Path]:
    """File of every image that the examples speak of: named as the image, as the store names it, or by another spelling of it.

    Raises:
        DataError: the folder is missing or empty, lacks a picture, or has several of one name.
    """
    found: dict[str, list[Path]] = {}
    for path in find_images(folder):
        found.setdefault(path.stem, []).append(path)
    files, stored = Aliases(found), Aliases(store.ids)
    exact = any(part.kind in _NUMBERED for part in run.corpora)
    images = dict.fromkeys(image for source in sources for part in _parts(source) for record in part.records for image in record.images)
    pictures: dict[str, Path] = {}
    missing: list[str] = []
    for image in images:
        name = image if image in found else stored.find(image)
        if name not in found:
            name = None if exact and _genome_number(image) else files.find(image)
        if name is None:
            missing.append(image)
            continue
        if len(found[name]) > 1:
            first, second = found[name][:2]
            raise DataError(
                f"{first} and {second} are both called {name}: which of them image {image!r} is cannot be told. Give with --images a folder in which "
                "no two pictures share a name."
            )
        pictures[image] = found[name][0]
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of the {len(images)} pictures that the run reads, such as {missing[0]!r}. Pictures are called like their "
            "image, with any image suffix, in the folder or below it. Name the folder that the regions were made of, or leave the sentences about "
            "lost pictures out."
        )
    return pictures


def _parts(source: Source) -> Sequence[RecordSource]:
    return source.sources if isinstance(source, Mixture) else (source,)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """How a corpus is read."""

    read: Callable[[Path, str, Reading], RecordSource]
    there: Callable[[Path, str], bool]
    """Whether a folder has it."""
    validates: bool = True
    """Whether it comes with a validation split."""
    questions: Callable[[Path, str, Reading | None], Sequence[LxmertRecord]] | None = None
    """Its questions with their answers, if it has any."""


def _places(data: Sequence[str], own: str, *, valid: bool) -> list[tuple[Path, str]]:
    """Folders and the split that each is read for."""
    return [(folder, split or own) for folder, split in map(assembly.folder_and_split, data) if not (valid and split)]


_T = TypeVar("_T", bound=Record)


def _with_regions(records: Sequence[_T], root: Path, reading: Reading, *, numbered: Callable[[str], bool] = lambda image: False) -> list[_T]:
    """The records whose images have regions.

    Args:
        numbered: whether an image id is a number of Visual Genome. Its 9 and COCO's 9 are two images: it is looked for by its exact id, and never
            found under a name of COCO.
    Raises:
        StoreError: none has.
    """
    store = reading.store
    images = dict.fromkeys(image for record in records for image in record.images)
    exact = frozenset(store.ids).intersection(images)
    taken = frozenset(filter(numbered, exact))
    # Found exactly, or by an alias that is not Visual Genome's.
    there = {image for image in images if image in exact or (not numbered(image) and canonical(image) not in taken and image in store)}
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


# Sentences as COCO, NLVR, VQA and VCR hold them; the store must know every image, though its detector may have found nothing in it.


def _complete(records: Sequence[_T], root: Path, reading: Reading) -> list[_T]:
    assembly.check_images(records, reading.store)
    return _with_regions(records, root, reading)


def _coco(root: Path, split: str, reading: Reading) -> Sequence[CaptionRecord]:
    found = find_coco_captions(root, split)
    _note_captions(found, root, reading)
    return _complete(found.records, root, reading)


def _note_captions(found: Captions, root: Path, reading: Reading) -> None:
    left_out = {
        "empty captions": found.empty,
        "repeated captions": found.repeated,
        "lines of another layout": found.malformed,
        "images without a caption": len(found.bare_images),
    }
    reading.note(root, left_out)


def _only_captions(root: Path, split: str, reading: Reading) -> RecordSource:
    return SingleCaption(_coco(root, split, reading), reading.layout, false_caption_ratio=None)


def _caption_pairs(root: Path, split: str, reading: Reading) -> RecordSource:
    return CaptionPairs(_coco(root, split, reading), reading.layout)


def _single_captions(root: Path, split: str, reading: Reading) -> RecordSource:
    return SingleCaption(_coco(root, split, reading), reading.layout)


def _sentences(root: Path, split: str, reading: Reading) -> list[SentenceRecord]:
    nlvr2 = find_nlvr2(root, split)
    records: Sequence[NlvrRecord | Nlvr2Record] = NLVR().records(root, split) if nlvr2 is None else read_nlvr2(nlvr2)
    sentences = [SentenceRecord(id=record.id, images=record.images, sentence=record.sentence, label=record.label) for record in records]
    return _complete(sentences, root, reading)


def _statements(root: Path, split: str, reading: Reading) -> RecordSource:
    return LabelledSentences(_sentences(root, split, reading), reading.layout)


def _unmasked_statements(root: Path, split: str, reading: Reading) -> RecordSource:
    return LabelledSentences(_sentences(root, split, reading), reading.layout, masked=False)


def _true_statements(root: Path, split: str, reading: Reading) -> RecordSource:
    return LabelledSentences([replace(record, label=None) for record in _sentences(root, split, reading) if record.label], reading.layout)


def _has_statements(root: Path, split: str) -> bool:
    name = split.partition(".")[0]
    nlvr = (root / name / f"{name}.json", root / name / "statements.json", root / "statements" / f"{name}.json")
    return find_nlvr2(root, split) is not None or any(path.exists() for path in nlvr)


def _questions(root: Path, split: str, reading: Reading, *, spelled: bool = False) -> RecordSource:
    questions, annotations = find_vqa_files(root, split)
    if annotations is None:
        raise DataError(f"{root} has questions for {split!r} but no annotations: pre-training on questions needs their answers.")
    left_out = Counter[str]()
    records = read_questions(questions, annotations, left_out=left_out)
    reading.note(root, left_out)
    return QuestionAnswer(_complete(records, root, reading), reading.layout, spelled=spelled)


def _vcr(root: Path, split: str, reading: Reading) -> RecordSource:
    found = read_vcr(*find_vcr(root, split))
    reading.note(root, {"questions with a sentence without a word": found.empty, "repeated questions": found.repeated})
    records = _complete(found.records, root, reading)
    images = {record.images[0]: record for record in records}
    objects_from = {image: start for image, record in images.items() if (start := _objects_from(record, reading.store)) is not None}
    if unlike := len(images) - len(objects_from):
        reading.notes.append(
            f"vcr of {root}: names are not linked to regions in {unlike} of {len(images)} images, whose regions are not the objects of VCR's metadata"
        )
    part = reading.corpus
    return VcrChoices(records, reading.layout, objects_from=objects_from, same_choice=part.same_choice, word_links=part.word_links)


def _objects_from(record: VcrRecord, store: NativeStore) -> int | None:
    """Number of the region that is object 0 of a picture: 0, or 1 behind the whole image; None if the store holds others than its objects in their
    order."""
    objects, regions = read_metadata(record).boxes, store[record.images[0]].boxes
    start = len(regions) - len(objects)
    return start if start in (0, 1) and bool((np.abs(regions[start:] - objects) <= _SAME_BOX).all()) else None


# Captions of data sets whose images may be gone: wrong ones are mixed in where the run learns matching.


def _captioned(
    find: Callable[[Path, str, Reading], Captions], *, numbered: Callable[[str], bool] = lambda image: False
) -> Callable[[Path, str, Reading], RecordSource]:
    def source(root: Path, split: str, reading: Reading) -> RecordSource:
        found = find(root, split, reading)
        _note_captions(found, root, reading)
        records = _with_regions(found.records, root, reading, numbered=numbered)
        return SingleCaption(records, reading.layout, false_caption_ratio=0.5 if reading.matching else None)

    return source


def _conceptual_captions(root: Path, split: str, reading: Reading) -> Captions:
    file = find_conceptual_captions(root, split)
    return read_vlbert_captions(file) if file.suffix == ".json" else read_conceptual_captions(file, _naming(file, reading.store))


def _naming(file: Path, store: NativeStore) -> Naming:
    """How the store names the images of Conceptual Captions: as more of the first rows are found."""
    with file.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        addresses = [(number, line.rpartition("\t")[2].strip()) for number, line in zip(range(_NAMING_SAMPLE), lines, strict=False)]
    found: dict[Naming, int] = {
        naming: sum(image_name(address, number, naming) in store for number, address in addresses) for naming in ("crc32", "line")
    }
    return "line" if found["line"] > found["crc32"] else "crc32"


def _vilbert_captions(root: Path, split: str, reading: Reading) -> RecordSource:
    found = read_vilbert_captions(find_vilbert_captions(root, split))
    _note_captions(found, root, reading)
    records = _with_regions(found.records, root, reading)
    pool = [record.caption for record in found.records[: len(records)]]
    return VilbertCaptions(records, reading.layout, pool=pool, keep_above=reading.corpus.keep_above, matching=reading.matching)


def _has_sbu(root: Path, split: str) -> bool:
    return split == "train" and has_sbu(root)


def _has_conceptual_captions(root: Path, split: str) -> bool:
    return _found(find_conceptual_captions, root, split)


def _has_vilbert_captions(root: Path, split: str) -> bool:
    return _found(find_vilbert_captions, root, split)


def _found(find: Callable[[Path, str], Path], root: Path, split: str) -> bool:
    try:
        return bool(find(root, split))
    except DataError:
        return False


def _of_split(records: Sequence[_T], root: Path, split: str) -> list[_T]:
    """Records of a split of Visual Genome, which has none of its own: of the images that `{split}_images.txt` lists; without such a list, for
    training, of those that no other list has."""
    own = root / f"{split}_images.txt"
    if own.is_file():
        wanted = read_ids(own)
        return [record for record in records if record.images[0] in wanted]
    others = frozenset[str]().union(*(read_ids(file) for file in root.glob("*_images.txt")))
    return [record for record in records if record.images[0] not in others]


def _vg_regions(root: Path, split: str, reading: Reading) -> Captions:
    found = read_region_descriptions(_genome_file(root, split, REGIONS))
    return replace(found, records=tuple(_of_split(found.records, root, split)))


def _genome_file(root: Path, split: str, name: str) -> Path:
    if split != "train" and not (root / f"{split}_images.txt").is_file():
        raise DataError(
            f"Visual Genome has no splits, and {root} has no list {split}_images.txt of the images of {split!r}, one id a line. Make one."
        )
    return root / name


def _has_genome(name: str) -> Callable[[Path, str], bool]:
    def there(root: Path, split: str) -> bool:
        return (root / name).is_file() and (split == "train" or (root / f"{split}_images.txt").is_file())

    return there


# Sentences as LXMERT reads them.


def _asked(
    questions: Callable[[Path, str, Reading | None], Sequence[LxmertRecord]], *, numbered: Callable[[str], bool] = lambda image: False
) -> Callable[[Path, str, Reading], RecordSource]:
    def source(root: Path, split: str, reading: Reading) -> RecordSource:
        records = _with_regions(questions(root, split, reading), root, reading, numbered=numbered)
        return LxmertSentences(records, reading.layout, answers=reading.answers, false_sentence_ratio=0.5 if reading.matching else None)

    return source


def _lxmert(root: Path, split: str, reading: Reading | None) -> Sequence[LxmertRecord]:
    found = read_lxmert(*find_lxmert(root, split))
    if reading is not None:
        reading.note(root, {"empty sentences": found.empty, "repeated sentences": found.repeated})
    return found.records


def _vqa(root: Path, split: str, reading: Reading | None) -> Sequence[LxmertRecord]:
    questions, annotations = find_vqa_files(root, split)
    if annotations is None:
        raise DataError(f"{root} has questions for {split!r} but no annotations: learning to answer needs their answers.")
    left_out = Counter[str]()
    records = read_questions(questions, annotations, left_out=left_out)
    if reading is not None:
        reading.note(root, left_out)
    return [from_question(record, "vqa") for record in records]


def _gqa(root: Path, split: str, reading: Reading | None) -> Sequence[LxmertRecord]:
    left_out = Counter[str]()
    records = read_gqa(find_gqa(root, split), left_out=left_out)
    if reading is not None:
        reading.note(root, left_out)
    return [from_question(record, "gqa") for record in records]


def _vg_qa(root: Path, split: str, reading: Reading | None) -> Sequence[LxmertRecord]:
    records, left_out = read_genome_questions(_genome_file(root, split, QUESTIONS))
    if reading is not None:
        reading.note(root, {"empty or repeated questions": left_out})
    return [from_question(record, "visual7w") for record in _of_split(records, root, split)]


def _genome_number(image: str) -> bool:
    """Whether an image id of Visual Genome, GQA or LXMERT's merged files is a number of Visual Genome; their other ids are COCO's names."""
    return image.isdecimal()


_KINDS: Mapping[CorpusKind, _Kind] = {
    "captions": _Kind(read=_only_captions, there=has_coco_captions),
    "caption_pairs": _Kind(read=_caption_pairs, there=has_coco_captions),
    "single_captions": _Kind(read=_single_captions, there=has_coco_captions),
    "statements": _Kind(read=_statements, there=_has_statements),
    "unmasked_statements": _Kind(read=_unmasked_statements, there=_has_statements),
    "true_statements": _Kind(read=_true_statements, there=_has_statements),
    "questions": _Kind(read=_questions, there=has_vqa),
    "spelled_questions": _Kind(read=partial(_questions, spelled=True), there=has_vqa),
    "vcr": _Kind(read=_vcr, there=has_vcr),
    "conceptual_captions": _Kind(read=_captioned(_conceptual_captions), there=_has_conceptual_captions),
    "vilbert_captions": _Kind(read=_vilbert_captions, there=_has_vilbert_captions),
    "sbu": _Kind(read=_captioned(lambda root, split, reading: read_sbu(root)), there=_has_sbu, validates=False),
    "flickr30k": _Kind(read=_captioned(lambda root, split, reading: find_flickr30k(root, split)), there=has_flickr30k),
    "vg_regions": _Kind(read=_captioned(_vg_regions, numbered=_genome_number), there=_has_genome(REGIONS), validates=False),
    "vg_qa": _Kind(read=_asked(_vg_qa, numbered=_genome_number), there=_has_genome(QUESTIONS), validates=False, questions=_vg_qa),
    "gqa": _Kind(read=_asked(_gqa, numbered=_genome_number), there=has_gqa, questions=_gqa),
    "answered_questions": _Kind(read=_asked(_vqa), there=has_vqa, questions=_vqa),
    "lxmert": _Kind(read=_asked(_lxmert, numbered=_genome_number), there=has_lxmert, questions=_lxmert),
}
"""Every kind of corpus about images."""
_NUMBERED = frozenset({"vg_regions", "vg_qa", "gqa", "lxmert"})
"""Those whose images may be numbers of Visual Genome."""


def _text(corpora: Sequence[Corpus], places: Sequence[tuple[Path, str]], reading: Reading, *, valid: bool) -> tuple[PlainText | None, float]:
    """The text corpus, all its files one after the other, and its rows per row with an image."""
    parts = [part for part in corpora if part.kind == "text"]
    if not parts:
        return None, 0.0
    if len(parts) > 1:
        raise ConfigError(f"a run has one text corpus, read from all folders that have text; found {len(parts)}.")
    there = [place for place in places if has_passages(*place)]
    if valid and not there:
        return None, 0.0
    passages = Passages([file for place in there or places[:1] for file in find_passages(*place)])
    replace(reading, corpus=parts[0]).note(passages.paths[0].parent, {"lines without a word": passages.empty})
    return PlainText(passages, reading.layout), parts[0].weight
