"""Questions with their answers as pre-training examples: VQA, GQA, LXMERT's merged file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from visling.data.annotations.lxmert import LxmertRecord, find_lxmert, from_question, has_lxmert, read_lxmert
from visling.data.annotations.questions import (
    QuestionRecord,
    find_gqa,
    has_gqa,
    has_vqa,
    read_gqa,
    read_vqa,
    release_text,
)
from visling.data.answer_table import listed
from visling.data.answers import UNKNOWN, AnswerVocabulary
from visling.data.corpora.base import (
    Choice,
    CorpusContext,
    CorpusReader,
    RecordSource,
    SentenceSource,
    Typical,
    draw_of_another_image,
    group_by_image,
    keep_with_regions,
    keep_with_regions_of_all,
)
from visling.data.text import TextLayout
from visling.errors import ConfigError, DataError
from visling.types import IGNORE, Example


class QuestionAnswer:
    """`question ? answer` as one text, the answer drawn from those people gave.

    Args:
        spelled: whether the answer enters letter by letter, as it does in the release by mistake; else it stays whole.
        answers: those that may be drawn; where people gave none of them, `<unk>` is. None: all that people gave.
        text: questions as written, or as the release tokenises them.
    Source:
        VisualBERT's task-specific pre-training on VQA.
    Raises:
        DataError: a question without answers.
    """

    def __init__(
        self,
        records: Sequence[QuestionRecord],
        layout: TextLayout,
        *,
        spelled: bool = False,
        answers: AnswerVocabulary | None = None,
        text: Literal["written", "release"] = "written",
    ) -> None:
        if bare := next((record for record in records if not record.answers), None):
            raise DataError(
                f"question {bare.id!r} has no answers: "
                "pre-training on questions needs an annotated split (train or val)."
            )
        self.records, self.layout, self.spelled = records, layout, spelled
        self.answers, self.text = answers, text

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Question `index` with a drawn answer; nothing to match."""
        record = self.records[index]
        assert record.answers
        answers: Sequence[str] = record.answers
        if self.answers is not None:
            answers = [answer for answer in answers if answer in self.answers] or [UNKNOWN]
        drawn = answers[int(rng.integers(len(answers)))]
        answer = " ".join(drawn) if self.spelled else drawn
        question = release_text(record.question) if self.text == "release" else record.question.rstrip()
        row = self.layout.row(f"{question if question.endswith('?') else question + ' ?'} {answer}")
        return Example(id=record.id, rows=(row,), images=record.images, labels={"matched": IGNORE})


class LxmertSentences(SentenceSource[LxmertRecord]):
    """A caption or question, replaced by one of another image with a given probability; for questions that stay,
    a drawn answer is to be predicted.

    Draws are made in this order: whether the sentence is wrong, which one replaces it (drawn again while it is of the
    same image), and, for a question that stays and has several answers in the table, the answer, in proportion to its
    score.

    Args:
        answers: table of which the label `answer` is an index; IGNORE for captions, for questions without an answer in
            the table and for replaced sentences. None gives no such label.
        false_sentence_ratio: probability of a wrong sentence (matched 0); None replaces none and gives no label, for
            runs without matching.
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
        super().__init__(records, [record.sentence for record in records], layout)
        self.answers, self.false_sentence_ratio = answers, false_sentence_ratio
        if false_sentence_ratio:
            group_by_image(records)

    def choose(self, index: int, rng: np.random.Generator) -> Choice:
        """The image of sentence `index` with that sentence or a wrong one."""
        record, shown = self.records[index], index
        labels = {"matched": IGNORE}
        if self.false_sentence_ratio is not None:
            wrong = rng.random() < self.false_sentence_ratio
            shown = draw_of_another_image(self.records, record, rng) if wrong else index
            labels["matched"] = int(not wrong)
        if self.answers is not None:
            labels["answer"] = _draw_answer(record, self.answers, rng) if shown == index else IGNORE
        return Choice(index, (shown,), labels)


def _draw_answer(record: LxmertRecord, answers: AnswerVocabulary, rng: np.random.Generator) -> int:
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


def _read_question_answers(root: Path, split: str, context: CorpusContext, *, spelled: bool = False) -> RecordSource:
    left_out = Counter[str]()
    records = read_vqa(root, split, left_out=left_out)
    if any(record.answers is None for record in records):
        raise DataError(
            f"{root} has questions for {split!r} but no annotations: pre-training on questions needs their answers."
        )
    context.note(root, left_out)
    settings = context.corpus
    return QuestionAnswer(
        keep_with_regions_of_all(records, root, context),
        context.layout,
        spelled=spelled,
        answers=None if settings.answers is None else AnswerVocabulary.load(settings.answers),
        text=settings.question_text,
    )


# Sentences as LXMERT reads them.


def ask_with(
    questions: Callable[[Path, str, CorpusContext | None], Sequence[LxmertRecord]],
) -> Callable[[Path, str, CorpusContext], RecordSource]:
    """How questions are read whose answers are predicted: wrong sentences are mixed in if the run learns matching."""

    def read(root: Path, split: str, context: CorpusContext) -> RecordSource:
        records = keep_with_regions(questions(root, split, context), root, context)
        ratio = 0.5 if context.matching else None
        return LxmertSentences(records, context.layout, answers=context.answers, false_sentence_ratio=ratio)

    return read


def _read_merged(root: Path, split: str, context: CorpusContext | None) -> Sequence[LxmertRecord]:
    merged = read_lxmert(*find_lxmert(root, split))
    if context is not None:
        context.note(root, {"empty sentences": merged.empty, "repeated sentences": merged.repeated})
    return merged.records


def _read_vqa(root: Path, split: str, context: CorpusContext | None) -> Sequence[LxmertRecord]:
    left_out = Counter[str]()
    records = read_vqa(root, split, left_out=left_out)
    if any(record.answers is None for record in records):
        raise DataError(
            f"{root} has questions for {split!r} but no annotations: learning to answer needs their answers."
        )
    if context is not None:
        context.note(root, left_out)
    return [from_question(record, "vqa") for record in records]


def _choose_gqa_folder(root: Path, split: str) -> Path:
    """The folder itself, or its `gqa` if the questions are there, as in drawn scenes."""
    return root / "gqa" if not has_gqa(root, split) and has_gqa(root / "gqa", split) else root


def _has_gqa(root: Path, split: str) -> bool:
    return has_gqa(_choose_gqa_folder(root, split), split)


def _read_gqa(root: Path, split: str, context: CorpusContext | None) -> Sequence[LxmertRecord]:
    left_out = Counter[str]()
    records = read_gqa(find_gqa(_choose_gqa_folder(root, split), split), left_out=left_out)
    if context is not None:
        context.note(root, left_out)
    return [from_question(record, "gqa") for record in records]


_SETTINGS = frozenset({"question_text", "answers"})

READERS: Mapping[str, CorpusReader] = {
    "questions": CorpusReader(
        shows="`question ? answer` of VQA as one text, the answer drawn from those people gave (VisualBERT)",
        read=_read_question_answers,
        present=has_vqa,
        settings=_SETTINGS,
        typical=Typical(tokens=12, examples=658_111),  # VQA v2: 443,757 + 214,354
    ),
    "spelled_questions": CorpusReader(
        shows="the same with the answer spelled letter by letter, a mistake in VisualBERT's release",
        read=partial(_read_question_answers, spelled=True),
        present=has_vqa,
        settings=_SETTINGS,
        typical=Typical(tokens=16, examples=658_111),  # about five letters in place of a word
    ),
    "answered_questions": CorpusReader(
        shows="a question of VQA and the answer to predict, half of the time of another image if the run learns "
        "matching (LXMERT)",
        read=ask_with(_read_vqa),
        present=has_vqa,
        questions=_read_vqa,
        serves="image_qa",
    ),
    "gqa": CorpusReader(
        shows="a question of GQA and the answer to predict, half of the time of another image if the run learns "
        "matching (LXMERT)",
        read=ask_with(_read_gqa),
        present=_has_gqa,
        numbered=True,
        questions=_read_gqa,
        serves="image_qa",
    ),
    "lxmert": CorpusReader(
        shows="a caption or question of LXMERT's merged files and the answer to predict, half of the time of another "
        "image if the run learns matching",
        read=ask_with(_read_merged),
        present=has_lxmert,
        numbered=True,
        questions=_read_merged,
        # steps of an epoch of the release (paper, table 1: 9.18 million)
        typical=Typical(tokens=12, examples=35_027 * 256),
    ),
}
