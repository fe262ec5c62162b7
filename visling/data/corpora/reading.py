"""What a pre-training run reads: every corpus from every folder that has it, mixed by weight, and the answers to
choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visling.data.annotations.captions import Captions
from visling.data.annotations.lxmert import find_answer_table
from visling.data.answer_table import build_table, read_table
from visling.data.answers import AnswerVocabulary
from visling.data.batches.examples import Source
from visling.data.corpora.base import (
    Corpus,
    CorpusContext,
    CorpusReader,
    RecordSource,
    TextReader,
    split_root,
)
from visling.data.corpora.mixture import Labelled, Mixture
from visling.data.corpora.readers import are_text, check_corpora, find_reader, readers
from visling.data.text import TextLayout
from visling.errors import ConfigError, Conflicts, DataError
from visling.regions.store import NativeStore

Root = tuple[Path, str]
"""A folder and the split to read of it."""


@dataclass(frozen=True, kw_only=True)
class Corpora:
    """The examples of a run."""

    examples: Source
    """Sentences about images; the text of a run that reads nothing else."""
    text: Source | None
    """Text without images next to them."""
    text_share: float
    """Rows of text per row with an image."""
    notes: Sequence[str]
    """What was left out, a sentence per corpus."""


def read(
    corpora: Sequence[Corpus],
    data: Sequence[str],
    layout: TextLayout,
    store: NativeStore | None,
    *,
    split: str,
    valid: bool,
    matching: bool,
    answers: AnswerVocabulary | None,
) -> Corpora:
    """The training or validation examples of a run: every corpus, read from every folder that has it, mixed by weight.

    In validation, corpora that have no split of their own may be missing, text among them unless it is all there is.

    Args:
        store: may be None for text alone.
        split: read from the folders that do not name their own.
        matching: whether the run learns which text fits an image.
        answers: the table that `answer_table` returns.
    Raises:
        DataError: no folder has a corpus, or no folder is left to validate on.
        StoreError: the store lacks an image of a data set that ought to be complete, or every image of another.
        ConfigError: an unknown kind, a setting of another kind, or several corpora of text.
    """
    check_corpora(corpora)
    notes: list[str] = []
    captions: dict[Root, Captions] = {}
    contexts = [
        CorpusContext(
            corpus=corpus,
            reader=find_reader(corpus.kind),
            layout=layout,
            regions=store,
            matching=matching,
            answers=answers,
            notes=notes,
            captions=captions,
        )
        for corpus in corpora
    ]
    roots = _find_roots(data, split, valid=valid)
    sources: list[RecordSource] = []
    weights: list[float] = []
    conflicts = Conflicts()
    for context in contexts:
        with conflicts.collect():
            for source in _read_images(context, roots, valid=valid):
                sources.append(source)
                weights.append(context.corpus.weight)
    text, share = None, 0.0
    with conflicts.collect():
        text, share = _read_text(contexts, roots, valid=valid)
    conflicts.refuse()
    if not roots:
        raise DataError(
            "every --data folder names its own split, so none is left to validate on: give one without @SPLIT."
        )
    if are_text(corpora):
        if text is None:
            raise DataError(
                f"text alone is validated on its own split {split!r}, which none of {', '.join(data)} holds: add a "
                f"file text/{split}.txt, or name another with --set valid_split=NAME."
            )
        alone = text if share == 1.0 else Mixture([text], [share])
        return Corpora(examples=alone, text=None, text_share=0.0, notes=tuple(notes))
    if not sources:
        raise DataError(
            f"none of {', '.join(data)} holds a split {split!r}: "
            "validate on a corpus that has one, or give --set valid_split=NAME."
        )
    examples: Source
    if answers is None:
        examples = sources[0] if len(sources) == 1 and weights == [1.0] else Mixture(sources, weights)
    else:
        examples = Mixture([Labelled(source, ("matched", "answer")) for source in sources], weights)
    return Corpora(examples=examples, text=text, text_share=share, notes=tuple(notes))


def answer_table(
    corpora: Sequence[Corpus], data: Sequence[str], *, split: str, min_count: int, sources: Sequence[str] = ()
) -> AnswerVocabulary:
    """The answers of a run that learns to answer questions.

    The table next to LXMERT's merged files (`all_ans.json`) if a folder has one; else the best answers of the training
    questions that occur `min_count` times.

    Args:
        sources: data sets whose answers are kept of LXMERT's table (its release's `--qaSets`); none = all.
    Raises:
        ConfigError: no corpus of the run has answers, or `sources` without such a table.
        DataError: a file is not of its layout, folders have different tables, or no answer is frequent enough.
    """
    check_corpora(corpora)
    answered = [reader for corpus in corpora if _has_answers(reader := find_reader(corpus.kind))]
    if not answered:
        with_answers = ", ".join(kind for kind, reader in sorted(readers().items()) if _has_answers(reader))
        raise ConfigError(f"the objective image_qa needs a corpus with answers ({with_answers}); the recipe has none.")
    roots = _find_roots(data, split, valid=False)
    files = [file for folder, _ in roots if (file := find_answer_table(folder)) is not None]
    if sources and not files:
        raise ConfigError(
            f"answer_sources={', '.join(sources)} picks answers from LXMERT's table, which no folder has: "
            "put all_ans.json next to its files, or leave answer_sources out."
        )
    tables = {file: read_table(file, sources or None) for file in files}
    if len(set(tables.values())) > 1:
        raise DataError(
            f"the answer tables {', '.join(map(str, tables))} differ, and a run has one: "
            "leave out the folder whose table is not wanted."
        )
    if tables:
        return next(iter(tables.values()))
    labels: list[Mapping[str, float]] = []
    for reader in answered:
        assert isinstance(reader, CorpusReader)
        assert reader.questions is not None
        for folder, own in _present(reader, roots) or _parts(roots)[:1]:
            labels += [record.scores for record in reader.questions(folder, own, None) if record.scores]
    return build_table(labels, min_count)


def images_of(source: Source) -> list[str]:
    """Image of every example, where the features of random regions come from."""
    return [record.images[0] for part in record_sources(source) for record in part.records]


def record_sources(source: Source) -> Sequence[RecordSource]:
    """The sources that a mixture holds, or the one that it is."""
    return source.sources if isinstance(source, Mixture) else (source,)  # type: ignore[return-value]


def _has_answers(reader: CorpusReader | TextReader) -> bool:
    return isinstance(reader, CorpusReader) and reader.questions is not None


def _find_roots(data: Sequence[str], own: str, *, valid: bool) -> list[Root]:
    """Folders, each with the split to read of it."""
    return [(folder, split or own) for folder, split in map(split_root, data) if not (valid and split)]


def _read_images(context: CorpusContext, roots: Sequence[Root], *, valid: bool) -> list[RecordSource]:
    """The examples of a corpus about images, from every folder that has it."""
    reader = context.reader
    if not isinstance(reader, CorpusReader):
        return []
    present = _present(reader, roots)
    if valid and not present and not reader.validates:
        return []
    # A corpus that no folder has is read all the same: its reader says what it looked for.
    return [reader.read(folder, split, context) for folder, split in present or _parts(roots)[:1]]


def _parts(roots: Sequence[Root]) -> list[Root]:
    """Each of several splits that are joined by "+" by itself."""
    return [(folder, part) for folder, split in roots for part in split.split("+")]


def _present(reader: CorpusReader, roots: Sequence[Root]) -> list[Root]:
    """The folders that have a corpus, with each split to read of it.

    Raises:
        DataError: one has a part of the splits that are joined.
    """
    found: list[Root] = []
    for folder, split in roots:
        parts = split.split("+")
        present = [part for part in parts if reader.present(folder, part)]
        if present and len(present) < len(parts) and reader.validates:
            lacking = ", ".join(part for part in parts if part not in present)
            raise DataError(f"{folder} has the split {', '.join(present)} but not {lacking} of {split!r}. Take it out.")
        found += [(folder, part) for part in present]
    return found


def _read_text(contexts: Sequence[CorpusContext], roots: Sequence[Root], *, valid: bool) -> tuple[Source | None, float]:
    """The corpus of text, and its rows per row with an image."""
    texts = [context for context in contexts if isinstance(context.reader, TextReader)]
    if not texts:
        return None, 0.0
    if len(texts) > 1:
        raise ConfigError(f"a run has one text corpus, read from all folders that have text; found {len(texts)}.")
    context, reader = texts[0], texts[0].reader
    assert isinstance(reader, TextReader)
    present = [root for root in _parts(roots) if reader.present(*root)]
    if valid and not present:
        return None, 0.0
    return reader.read(present or _parts(roots)[:1], context), context.corpus.weight
