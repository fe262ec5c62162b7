"""Pre-training corpora as sources of examples: caption pairs, single captions, labelled sentences, questions with answers or choices of them, text
without images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from visling.data.annotations.captions import CaptionRecord
from visling.data.annotations.lxmert import LxmertRecord
from visling.data.annotations.questions import QuestionRecord
from visling.data.annotations.vcr import NUM_CHOICES, VcrRecord, with_names
from visling.data.answer_table import listed
from visling.data.answers import AnswerVocabulary
from visling.data.loader import Source
from visling.data.text import NamedWord, TextLayout
from visling.errors import ConfigError, DataError
from visling.types import IGNORE, Example, Record, TextRow


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


class CaptionPairs:
    """Two captions; does the second fit the image of the first?

    Half of the time (a draw u > 0.5) the second is a random caption of another image (matched 0), else another caption of the same image
    (matched 1). An image with a single caption always gets a random second one.

    Source:
        VisualBERT release, `two_sentence`. Its label field is called `is_random_next`, yet 1 means "fits", as here.
    """

    def __init__(self, records: Sequence[CaptionRecord], layout: TextLayout) -> None:
        self.records, self.layout = records, layout
        self._others = _by_image(records)

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """The caption `index` and a drawn second one."""
        record = self.records[index]
        siblings = self._others[record.images[0]]
        foreign = rng.random() > 0.5 or len(siblings) == 1
        if foreign:
            second = _of_another_image(self.records, record, rng)
        else:
            drawn = siblings[int(rng.integers(len(siblings) - 1))]
            # The last sibling stands in for the caption itself, so that each of the others is equally likely.
            second = self.records[siblings[-1] if drawn == index else drawn]
        row = self.layout.row(record.caption, second.caption)
        return Example(id=record.id, rows=(row,), images=record.images, labels={"matched": int(not foreign)})


class SingleCaption:
    """One caption, replaced by a random one of another image with a given probability.

    Args:
        false_caption_ratio: probability of a wrong caption (matched 0); None gives no label, for masked language modelling alone.
    Source:
        VisualBERT release without `two_sentence` (0.5).
    """

    def __init__(self, records: Sequence[CaptionRecord], layout: TextLayout, *, false_caption_ratio: float | None = 0.5) -> None:
        if false_caption_ratio is not None and not 0 <= false_caption_ratio <= 1:
            raise ConfigError(f"false_caption_ratio must lie in [0, 1]; found {false_caption_ratio:g}.")
        self.records, self.layout, self.false_caption_ratio = records, layout, false_caption_ratio
        if false_caption_ratio:
            _by_image(records)

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """The image of caption `index` with that caption or a wrong one."""
        record = self.records[index]
        if self.false_caption_ratio is None:
            return Example(id=record.id, rows=(self.layout.row(record.caption),), images=record.images, labels={"matched": IGNORE})
        wrong = rng.random() < self.false_caption_ratio
        shown = _of_another_image(self.records, record, rng) if wrong else record
        return Example(id=record.id, rows=(self.layout.row(shown.caption),), images=record.images, labels={"matched": int(not wrong)})


class LabelledSentences:
    """A sentence that is true of its images (matched 1) or not (matched 0); no label where it is unknown.

    Args:
        masked: whether masked language modelling hides words of these sentences too, as the release does. Hiding the word on which a sentence turns
            makes its label a guess, and where true and false sentences are balanced the words say nothing about the image.
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
        return Example(id=record.id, rows=rows, images=record.images, labels={"matched": IGNORE if record.label is None else int(record.label)})


class QuestionAnswer:
    """`question ? answer` as one text, the answer drawn from those people gave.

    Args:
        spelled: whether the answer enters letter by letter, as it does in the release by mistake; else it stays whole.
    Source:
        VisualBERT's task-specific pre-training on VQA.
    Raises:
        DataError: a question without answers.
    """

    def __init__(self, records: Sequence[QuestionRecord], layout: TextLayout, *, spelled: bool = False) -> None:
        if bare := next((record for record in records if not record.answers), None):
            raise DataError(f"question {bare.id!r} has no answers: pre-training on questions needs an annotated split (train or val).")
        self.records, self.layout, self.spelled = records, layout, spelled

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Question `index` with a drawn answer; nothing to match."""
        record = self.records[index]
        assert record.answers
        drawn = record.answers[int(rng.integers(len(record.answers)))]
        answer = " ".join(drawn) if self.spelled else drawn
        question = record.question.rstrip()
        row = self.layout.row(f"{question if question.endswith('?') else question + ' ?'} {answer}")
        return Example(id=record.id, rows=(row,), images=record.images, labels={"matched": IGNORE})


class VcrChoices:
    """A question of VCR and one of its answers, or question with right answer and one of its rationales: is the choice right (matched 1)?

    Eight examples of each question, its answers first. Objects are called by names (`with_names`), which answers and rationales take over from what
    comes before them. Regions are all that the store has of the image, whose id is the stem of `img_fn`; the release shows the whole image, as a
    region of its own, and those detections alone that question, answers or rationales of either kind name, all persons where "everyone" is
    mentioned or nothing is named (`add_all_features`).

    Args:
        objects_from: image -> number of the region that is its object 0, the others following it: names are linked to these regions. Of images that
            are not in it nothing is linked.
        same_choice: whether question number i is shown with choice i modulo 8 only, eight times an epoch, as in the release by mistake
            (`complete_shuffle` overwrites the number that the choice is made of); else with each choice once.
        word_links: whether links count words where they should count pieces, as in the release by mistake; see `TextLayout.named`.
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
        if bare := next((record for record in records if record.answer_label is None or record.rationale_label is None), None):
            raise DataError(f"question {bare.id!r} has no labels: pre-training on VCR needs a split that tells the right choices (train or val).")
        self.records = [record for record in records for _ in range(2 * NUM_CHOICES)]
        """The annotation of each example."""
        self.layout, self.objects_from, self.same_choice, self.word_links = layout, objects_from, same_choice, word_links

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
        first, second = (self._regions(words, record.images[0]) for words in (first, second))
        row = self.layout.named(first, second, by_word=self.word_links)
        return Example(id=f"{record.id}:{which}", rows=(row,), images=record.images, labels={"matched": int(choice == label)})

    def _regions(self, words: Sequence[NamedWord], image: str) -> list[NamedWord]:
        """The words with regions of the store in place of objects."""
        start = self.objects_from.get(image)
        return [(word, None if number is None or start is None else start + number) for word, number in words]


class LxmertSentences:
    """A caption or question, replaced by one of another image with a given probability; questions that stay are asked for a drawn answer.

    Draws are made in this order: whether the sentence is wrong, which one stands in its place (again while it is of the same image), and, for a
    question in its place with several answers in the table, the answer, in proportion to its score.

    Args:
        answers: table whose entries `answer` counts; IGNORE where nothing is asked, no answer is in the table or the sentence was replaced. None
            gives no such label.
        false_sentence_ratio: probability of a wrong sentence (matched 0); None replaces none and gives no label, for runs without matching.
    Source:
        LXMERT release, `lxmert_pretrain.py` and `lxmert_data.py` (0.5).
    Raises:
        DataError: sentences of a single image, where another image's are needed.
    """

    def __init__(
        self,
        records: Sequence[LxmertRecord],
        layout: TextLayout,
        *,
        answers: AnswerVocabulary | None = None,
        false_sentence_ratio: float | None = 0.5,
    ) -> None:
        if false_sentence_ratio is not None and not 0 <= false_sentence_ratio <= 1:
            raise ConfigError(f"false_sentence_ratio must lie in [0, 1]; found {false_sentence_ratio:g}.")
        self.records, self.layout, self.answers, self.false_sentence_ratio = records, layout, answers, false_sentence_ratio
        if false_sentence_ratio:
            _by_image(records)

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """The image of sentence `index` with that sentence or a wrong one."""
        record = shown = self.records[index]
        labels = {"matched": IGNORE}
        if self.false_sentence_ratio is not None:
            wrong = rng.random() < self.false_sentence_ratio
            shown = _of_another_image(self.records, record, rng) if wrong else record
            labels["matched"] = int(not wrong)
        if self.answers is not None:
            labels["answer"] = _answer(record, self.answers, rng) if shown is record else IGNORE
        return Example(id=record.id, rows=(self.layout.row(shown.sentence),), images=record.images, labels=labels)


def _answer(record: LxmertRecord, answers: AnswerVocabulary, rng: np.random.Generator) -> int:
    """A drawn answer of a question, as its number in the table."""
    scores = {answer: score for answer, score in listed(record.scores or {}, answers).items() if score > 0}
    if not scores:
        return IGNORE
    drawn = 0
    if len(scores) > 1:
        shares = np.array(list(scores.values()), np.float64)
        drawn = int(rng.multinomial(1, shares / shares.sum()).argmax())
    number = answers.index(list(scores)[drawn])
    assert number is not None
    return number


class VilbertCaptions:
    """A caption, or half of the time one drawn from all captions, its own included: then it fits and is labelled as if it did not.

    Args:
        pool: captions in the order of the file, from which the first `len(records)` are drawn, whether their image has regions or not.
        keep_above: draws above one half keep the caption (first release); False keeps below (multi-task release).
        matching: False replaces none and gives no label (the multi-task release's `objective` 2).
    Source:
        ViLBERT, `concept_cap_dataset.py` of both releases. Their labels are turned round: here 1 means "fits".
    """

    def __init__(
        self,
        records: Sequence[CaptionRecord],
        layout: TextLayout,
        *,
        pool: Sequence[str] | None = None,
        keep_above: bool = True,
        matching: bool = True,
    ) -> None:
        self.records, self.layout, self.keep_above, self.matching = records, layout, keep_above, matching
        self.pool = [record.caption for record in records] if pool is None else pool
        if len(self.pool) < len(records):
            raise DataError(f"{len(self.pool)} captions to draw from for {len(records)} images: the pool holds the captions of all of them.")

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """The image of caption `index` with that caption or a drawn one."""
        record = self.records[index]
        kept = not self.matching or (rng.random() > 0.5) == self.keep_above
        caption = record.caption if kept else self.pool[int(rng.integers(len(self.records)))]
        return Example(
            id=record.id, rows=(self.layout.row(caption),), images=record.images, labels={"matched": int(kept) if self.matching else IGNORE}
        )


class PlainText:
    """Text without an image: a passage, the passages that follow it while it is short, cut to the longest row; no special tokens.

    Cutting comes before masking here and after it in the release, which shows the model the same: words are drawn for in turn, the cut ones last.

    Args:
        min_words: words, punctuation counted, below which the next passage is appended; behind the last comes the first.
        max_tokens: word pieces kept; None = as many as the model reads.
    Source:
        VL-BERT release, `general_corpus.py` (64 and 64).
    """

    def __init__(self, passages: Sequence[str], layout: TextLayout, *, min_words: int = 64, max_tokens: int | None = None) -> None:
        self.passages, self.layout, self.min_words = passages, layout, min_words
        self.max_tokens = layout.spec.max_tokens if max_tokens is None else max_tokens
        if not passages:
            raise DataError("a text corpus needs a passage; found none.")

    def __len__(self) -> int:
        return len(self.passages)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Passage `index` and what follows it; nothing is drawn."""
        ids: list[NDArray[np.int64]] = []
        numbers: list[NDArray[np.int64]] = []
        words, at = 0, index
        while not ids or words < self.min_words:
            pieces, word_numbers = self.layout.tokenizer.pieces(self.passages[at])
            ids.append(pieces)
            numbers.append(word_numbers + words)
            words += int(word_numbers[-1]) + 1 if len(pieces) else 0
            at = (at + 1) % len(self.passages)
            if at == index and not words:
                raise DataError("the text corpus has no word that the tokenizer knows how to read: every passage is empty after cleaning.")
        row = np.concatenate(ids)[: self.max_tokens]
        return Example(
            id=str(index),
            rows=(TextRow(ids=row, segments=np.zeros_like(row), words=np.concatenate(numbers)[: self.max_tokens]),),
            images=(),
        )


class Labelled:
    """A source whose examples have all of some labels, IGNORE where they lack one: a batch of captions alone has them too."""

    def __init__(self, source: RecordSource, names: Sequence[str]) -> None:
        self.source, self.names = source, names

    @property
    def records(self) -> Sequence[Record]:
        """Annotations of the examples."""
        return self.source.records

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index` with its labels filled up."""
        example = self.source.example(index, rng)
        return replace(example, labels={**dict.fromkeys(self.names, IGNORE), **example.labels})


class Mixture:
    """Several sources as one.

    Args:
        weights: passes over each source per epoch, 1 by default: 2 shows every example twice, 0.5 a fresh random half.
    Raises:
        ConfigError: no source, a weight that is not positive, or not one weight per source.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(sources) if weights is None else weights
        if not sources or len(weights) != len(sources) or min(weights) <= 0:
            raise ConfigError(f"a mixture needs sources and one positive weight for each; found {len(sources)} sources, weights {list(weights)}.")
        self.sources = tuple(sources)
        self._ends = np.cumsum([round(weight * len(source)) for source, weight in zip(sources, weights, strict=True)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`: numbers run through the sources in order; the part of a pass that is not whole is drawn at random."""
        source, number = self._place(index, rng)
        return source.example(number, rng)

    def record(self, index: int, rng: np.random.Generator) -> Record:
        """The annotation of which `example` makes example `index` with the same generator; only of sources that have annotations."""
        source, number = self._place(index, rng)
        return cast(RecordSource, source).records[number]

    def _place(self, index: int, rng: np.random.Generator) -> tuple[Source, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        begin, end = (int(self._ends[which - 1]) if which else 0), int(self._ends[which])
        source = self.sources[which]
        within = index - begin
        whole = (end - begin) // len(source) * len(source)
        return source, within % len(source) if within < whole else int(rng.integers(len(source)))


def _by_image(records: Sequence[Record]) -> dict[str, list[int]]:
    """Numbers of the captions of each image; at least two images."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, record in enumerate(records):
        groups[record.images[0]].append(number)
    if len(groups) < 2:
        raise DataError(f"captions of {len(groups)} image(s) leave no other image to draw a wrong caption from: give captions of at least two.")
    return dict(groups)


_R = TypeVar("_R", bound=Record)


def _of_another_image(records: Sequence[_R], record: _R, rng: np.random.Generator) -> _R:
    while True:
        drawn = records[int(rng.integers(len(records)))]
        if drawn.images != record.images:
            return drawn
