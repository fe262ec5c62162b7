"""True and false sentences about images as pre-training examples: NLVR, NLVR2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from visling.data.annotations.nlvr import NlvrRecord, read_nlvr
from visling.data.annotations.statements import Nlvr2Record, find_nlvr2, read_nlvr2
from visling.data.corpora.base import (
    CorpusContext,
    CorpusReader,
    RecordSource,
    SentenceRecord,
    Typical,
    keep_with_regions_of_all,
)
from visling.data.text import TextLayout
from visling.types import IGNORE, Example, TextRow


class LabelledSentences:
    """A sentence that is true of its images (matched 1) or not (matched 0); no label where it is unknown.

    Args:
        masked: whether masked language modelling hides words of these sentences too, as the release does. Hiding the
            word that decides a sentence makes its label a guess, and where true and false sentences are balanced, the
            words say nothing about the image.
    Source:
        VisualBERT's task-specific pre-training on NLVR2.
    """

    def __init__(self, records: Sequence[SentenceRecord], layout: TextLayout, *, masked: bool = True) -> None:
        self.records, self.layout, self.masked = records, layout, masked

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Sentence `index`; one row per image for presets that join two rows."""
        record = self.records[index]
        row = self.layout.row(record.sentence)
        if not self.masked:
            row = replace(row, words=np.full_like(row.ids, -1))
        rows: tuple[TextRow, ...] = (row,)
        if len(record.images) > 1 and self.layout.spec.pair == "rows":
            rows *= len(record.images)
        return Example(
            id=record.id,
            rows=rows,
            images=record.images,
            labels={"matched": IGNORE if record.label is None else int(record.label)},
        )


def _read_sentences(root: Path, split: str, context: CorpusContext) -> list[SentenceRecord]:
    nlvr2 = find_nlvr2(root, split)
    records: Sequence[NlvrRecord | Nlvr2Record] = read_nlvr(root, split) if nlvr2 is None else read_nlvr2(nlvr2)
    sentences = [
        SentenceRecord(id=record.id, images=record.images, sentence=record.sentence, label=record.label)
        for record in records
    ]
    return keep_with_regions_of_all(sentences, root, context)


def _read_statements(root: Path, split: str, context: CorpusContext) -> RecordSource:
    return LabelledSentences(_read_sentences(root, split, context), context.layout)


def _read_unmasked_statements(root: Path, split: str, context: CorpusContext) -> RecordSource:
    return LabelledSentences(_read_sentences(root, split, context), context.layout, masked=False)


def _read_true_statements(root: Path, split: str, context: CorpusContext) -> RecordSource:
    return LabelledSentences(
        [replace(record, label=None) for record in _read_sentences(root, split, context) if record.label],
        context.layout,
    )


def _has_statements(root: Path, split: str) -> bool:
    name = split.partition(".")[0]
    nlvr = (root / name / f"{name}.json", root / name / "statements.json", root / "statements" / f"{name}.json")
    return find_nlvr2(root, split) is not None or any(path.exists() for path in nlvr)


_TYPICAL = Typical(tokens=22, examples=86_373, images=2)  # NLVR2, training

READERS: Mapping[str, CorpusReader] = {
    "statements": CorpusReader(
        shows="a sentence of NLVR or NLVR2 that is true or false of its images, some words masked (VisualBERT)",
        read=_read_statements,
        present=_has_statements,
        typical=_TYPICAL,
    ),
    "unmasked_statements": CorpusReader(
        shows="the same with every word visible", read=_read_unmasked_statements, present=_has_statements
    ),
    "true_statements": CorpusReader(
        shows="true sentences of NLVR or NLVR2, read as captions", read=_read_true_statements, present=_has_statements
    ),
}
