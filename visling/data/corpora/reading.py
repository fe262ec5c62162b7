"""What a pre-training run reads: which files make a corpus, how it is shown, how corpora are mixed, and the answers
that are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from visling.data.annotations.captions import find_flickr30k, has_coco_captions, has_flickr30k
from visling.data.annotations.genome import QUESTIONS, REGIONS
from visling.data.annotations.lxmert import find_answer_table, has_lxmert
from visling.data.annotations.questions import has_gqa, has_vqa
from visling.data.annotations.vcr import has_vcr
from visling.data.annotations.web_captions import (
    read_sbu,
)
from visling.data.answer_table import build_table, read_table
from visling.data.answers import AnswerVocabulary
from visling.data.batches.loader import Source
from visling.data.corpora.base import Corpus, CorpusContext, CorpusKind, CorpusReader, RecordSource, split_root
from visling.data.corpora.captions import (
    caption_reader,
    conceptual_captions,
    has_conceptual_captions,
    has_vilbert_captions,
    read_caption_pairs,
    read_captions_of_vilbert,
    read_only_captions,
    read_single_captions,
    sbu_present,
)
from visling.data.corpora.genome import genome_phrases, genome_questions, has_genome, is_genome_number
from visling.data.corpora.mixture import Labelled, Mixture
from visling.data.corpora.questions import (
    gqa_questions,
    lxmert_sentences,
    question_reader,
    read_question_answers,
    vqa_questions,
)
from visling.data.corpora.statements import (
    has_statements,
    read_statements,
    read_true_statements,
    read_unmasked_statements,
)
from visling.data.corpora.text import PlainText, read_text
from visling.data.corpora.vcr import read_vcr_choices
from visling.data.text import TextLayout
from visling.errors import ConfigError, DataError
from visling.regions.store import NativeStore


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


def read(
    corpora: Sequence[Corpus],
    data: Sequence[str],
    layout: TextLayout,
    store: NativeStore,
    *,
    split: str,
    valid: bool,
    matching: bool,
    answers: AnswerVocabulary | None,
) -> Corpora:
    """The training or validation examples of a run: every corpus, read from every folder that has it, mixed by weight.

    In validation, corpora that have no split of their own may be missing, text among them.

    Args:
        split: read from the folders that do not name their own.
        matching: whether the run learns which text fits an image.
        answers: the table that `answer_table` gives.
    Raises:
        DataError: no folder has a corpus, or no folder is left to validate on.
        StoreError: the store lacks an image of a data set that ought to be complete, or every image of another.
        ConfigError: all corpora are text without images.
    """
    if all(part.kind == "text" for part in corpora):
        raise ConfigError(
            "a run needs a corpus of sentences about images; found text alone. Add one, for example captions."
        )
    first = CorpusContext(corpus=corpora[0], layout=layout, store=store, matching=matching, answers=answers)
    sources: list[RecordSource] = []
    weights: list[float] = []
    places = _roots(data, split, valid=valid)
    for part in corpora:
        kind = READERS.get(part.kind)
        if kind is None:
            continue
        there = [place for place in places if kind.there(*place)]
        if valid and not there and not kind.validates:
            continue
        reading = replace(first, corpus=part)  # the notes are those of all
        # A corpus that no folder has is read all the same: its reader says what it looked for.
        for folder, own in there or places[:1]:
            sources.append(kind.read(folder, own, reading))
            weights.append(part.weight)
    if not places:
        raise DataError(
            "every --data folder names its own split, so none is left to validate on: give one without @SPLIT."
        )
    if not sources:
        raise DataError(
            f"none of {', '.join(data)} holds a split {split!r}: validate on a corpus that has one, or give --set valid_split=NAME."
        )
    images: Source
    if answers is None:
        images = sources[0] if len(sources) == 1 and weights == [1.0] else Mixture(sources, weights)
    else:
        images = Mixture([Labelled(source, ("matched", "answer")) for source in sources], weights)
    text, share = read_text(corpora, places, first, valid=valid)
    return Corpora(images=images, text=text, text_share=share, notes=tuple(first.notes))


def answer_table(corpora: Sequence[Corpus], data: Sequence[str], *, split: str, min_count: int) -> AnswerVocabulary:
    """The answers of a run that learns to answer questions.

    The table beside LXMERT's merged files (`all_ans.json`) if a folder has one; else the best answers of the training
    questions that occur `min_count` times.

    Raises:
        ConfigError: no corpus of the run has answers.
        DataError: a file is not of its layout, folders have different tables, or no answer is frequent enough.
    """
    asking = [kind for part in corpora if (kind := READERS.get(part.kind)) is not None and kind.questions is not None]
    if not asking:
        with_answers = ", ".join(name for name, kind in READERS.items() if kind.questions is not None)
        raise ConfigError(f"the objective image_qa needs a corpus with answers ({with_answers}); the recipe has none.")
    places = _roots(data, split, valid=False)
    tables = {file: read_table(file) for folder, _ in places if (file := find_answer_table(folder)) is not None}
    if len(set(tables.values())) > 1:
        raise DataError(
            f"the answer tables {', '.join(map(str, tables))} differ: one run has one. Leave out the folder whose table is not wanted."
        )
    if tables:
        return next(iter(tables.values()))
    labels: list[Mapping[str, float]] = []
    for kind in asking:
        assert kind.questions is not None
        for folder, own in [place for place in places if kind.there(*place)] or places[:1]:
            labels += [record.scores for record in kind.questions(folder, own, None) if record.scores]
    return build_table(labels, min_count)


def images_of(source: Source) -> list[str]:
    """Image of every example, where the features of random regions come from."""
    return [record.images[0] for part in record_sources(source) for record in part.records]


def record_sources(source: Source) -> Sequence[RecordSource]:
    return source.sources if isinstance(source, Mixture) else (source,)  # type: ignore[return-value]


def _roots(data: Sequence[str], own: str, *, valid: bool) -> list[tuple[Path, str]]:
    """Folders and the split that each is read for."""
    return [(folder, split or own) for folder, split in map(split_root, data) if not (valid and split)]


READERS: Mapping[CorpusKind, CorpusReader] = {
    "captions": CorpusReader(read=read_only_captions, there=has_coco_captions),
    "caption_pairs": CorpusReader(read=read_caption_pairs, there=has_coco_captions),
    "single_captions": CorpusReader(read=read_single_captions, there=has_coco_captions),
    "statements": CorpusReader(read=read_statements, there=has_statements),
    "unmasked_statements": CorpusReader(read=read_unmasked_statements, there=has_statements),
    "true_statements": CorpusReader(read=read_true_statements, there=has_statements),
    "questions": CorpusReader(read=read_question_answers, there=has_vqa),
    "spelled_questions": CorpusReader(read=partial(read_question_answers, spelled=True), there=has_vqa),
    "vcr": CorpusReader(read=read_vcr_choices, there=has_vcr),
    "conceptual_captions": CorpusReader(read=caption_reader(conceptual_captions), there=has_conceptual_captions),
    "vilbert_captions": CorpusReader(read=read_captions_of_vilbert, there=has_vilbert_captions),
    "sbu": CorpusReader(
        read=caption_reader(lambda root, split, reading: read_sbu(root)), there=sbu_present, validates=False
    ),
    "flickr30k": CorpusReader(
        read=caption_reader(lambda root, split, reading: find_flickr30k(root, split)), there=has_flickr30k
    ),
    "vg_regions": CorpusReader(
        read=caption_reader(genome_phrases, numbered=is_genome_number), there=has_genome(REGIONS), validates=False
    ),
    "vg_qa": CorpusReader(
        read=question_reader(genome_questions, numbered=is_genome_number),
        there=has_genome(QUESTIONS),
        validates=False,
        questions=genome_questions,
    ),
    "gqa": CorpusReader(
        read=question_reader(gqa_questions, numbered=is_genome_number), there=has_gqa, questions=gqa_questions
    ),
    "answered_questions": CorpusReader(read=question_reader(vqa_questions), there=has_vqa, questions=vqa_questions),
    "lxmert": CorpusReader(
        read=question_reader(lxmert_sentences, numbered=is_genome_number), there=has_lxmert, questions=lxmert_sentences
    ),
}
"""Every kind of corpus about images."""

NUMBERED = frozenset({"vg_regions", "vg_qa", "gqa", "lxmert"})
"""Those whose images may be numbers of Visual Genome."""
