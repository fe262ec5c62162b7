"""VCR's questions with one of their choices as pre-training examples (VisualBERT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from visling.data.annotations.vcr import (
    NUM_CHOICES,
    VcrRecord,
    find_vcr,
    has_vcr,
    read_metadata,
    read_vcr,
    with_names,
)
from visling.data.corpora.base import CorpusContext, CorpusReader, RecordSource, Typical, keep_with_regions_of_all
from visling.data.named_objects import find_first_object
from visling.data.text import NamedWord, TextLayout
from visling.errors import DataError
from visling.types import Example


class VcrChoices:
    """A question of VCR and one of its answers, or a question with its right answer and one of its rationales: is the
    choice right (matched 1)?

    Eight examples of each question, its answers first. Objects are called by names (`with_names`), which answers and
    rationales inherit from the text before them. Regions are all that the store has of the image, whose id is the
    stem of `img_fn`; the release shows the whole image, as a region of its own, and only those detections that
    question, answers or rationales of either kind name, all persons where "everyone" is mentioned or nothing is named
    (`add_all_features`).

    Args:
        objects_from: image -> number of the region that is its object 0, the others following it: names are linked to
            these regions. In images that are not in it nothing is linked.
        same_choice: whether question number i is shown with choice i modulo 8 only, eight times an epoch, as in the
            release by mistake (`complete_shuffle` overwrites the number from which the choice is computed); else with
            each choice once.
        word_links: whether links count words where they should count pieces, as in the release by mistake; see
            `TextLayout.named`.
    Source:
        VisualBERT's task-specific pre-training on VCR, `vcr.py` with `pretraining_include_qa_and_qar`.
    Raises:
        DataError: a question without labels.
    """

    def __init__(
        self,
        records: Sequence[VcrRecord],
        layout: TextLayout,
        *,
        objects_from: Mapping[str, int],
        same_choice: bool = False,
        word_links: bool = False,
    ) -> None:
        if bare := next(
            (record for record in records if record.answer_label is None or record.rationale_label is None), None
        ):
            raise DataError(
                f"question {bare.id!r} has no labels: "
                "pre-training on VCR needs a split with the right choices (train or val)."
            )
        self.records = [record for record in records for _ in range(2 * NUM_CHOICES)]
        """The annotation of each example."""
        self.layout, self.objects_from, self.same_choice, self.word_links = (
            layout,
            objects_from,
            same_choice,
            word_links,
        )

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Choice `index` modulo 8 of question `index` // 8; nothing is drawn."""
        record = self.records[index]
        number, which = divmod(index, 2 * NUM_CHOICES)
        if self.same_choice:
            which = number % (2 * NUM_CHOICES)
        assert record.answer_label is not None
        context, choices, label = record.question, record.answer_choices, record.answer_label
        if which >= NUM_CHOICES:
            assert record.rationale_label is not None
            context, choices, label = context + choices[label], record.rationale_choices, record.rationale_label
        choice = which % NUM_CHOICES
        first, names = with_names(context, record.objects, {})
        second, _ = with_names(choices[choice], record.objects, names)
        first, second = (self._link_regions(words, record.images[0]) for words in (first, second))
        row = self.layout.named(first, second, by_word=self.word_links)
        return Example(
            id=f"{record.id}:{which}", rows=(row,), images=record.images, labels={"matched": int(choice == label)}
        )

    def _link_regions(self, words: Sequence[NamedWord], image: str) -> list[NamedWord]:
        """The words with regions of the store in place of objects."""
        start = self.objects_from.get(image)
        return [(word, None if number is None or start is None else start + number) for word, number in words]


def _read_choices(root: Path, split: str, context: CorpusContext) -> RecordSource:
    questions = read_vcr(*find_vcr(root, split))
    left_out = {"questions with a sentence without a word": questions.empty, "repeated questions": questions.repeated}
    context.note(root, left_out)
    records = keep_with_regions_of_all(questions.records, root, context)
    images = {record.images[0]: record for record in records}
    objects_from = {
        image: start
        for image, record in images.items()
        if (start := find_first_object(read_metadata(record).boxes, context.store[image].boxes)) is not None
    }
    if unlike := len(images) - len(objects_from):
        context.notes.append(
            f"{context.corpus.kind} of {root}: names are not linked to regions in {unlike} of {len(images)} images, "
            "whose regions are not the objects of VCR's metadata"
        )
    corpus = context.corpus
    return VcrChoices(
        records,
        context.layout,
        objects_from=objects_from,
        same_choice=corpus.same_choice,
        word_links=corpus.word_links,
    )


READERS: Mapping[str, CorpusReader] = {
    "vcr": CorpusReader(
        shows="a question of VCR with one of its answers, or with its right answer and one of its rationales: is the "
        "choice right; each of the eight choices once per pass (VisualBERT)",
        read=_read_choices,
        present=has_vcr,
        settings=frozenset({"same_choice", "word_links"}),
        typical=Typical(tokens=35, examples=212_923 * 8),  # four answers and four rationales of each question
    ),
}
