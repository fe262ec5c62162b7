"""Visual question answering, VQA v2: one question, one image, one of a few thousand short answers (Goyal et al. 2017).

Shapes   N examples, A answers of the vocabulary.
Releases VisualBERT compares a softmax with soft scores that do not sum to one (KL divergence, averaged over examples).
         LXMERT, ViLBERT and VL-BERT take each answer as a yes-no question (binary cross-entropy, averaged over all,
         times A).
Targets  1, 2, 3, 4 or more people gave the answer -> 0.3, 0.6, 0.9, 1; compared as written, while the metric compares
         normalised answers. Questions with fewer than 4 answers, of one's own data, follow the rule for few answers
         (`metrics.answers.FEWEST_ANSWERS`): an answer scores the share of people who gave it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor

from visling.data.annotations.prepared_questions import VqaLayout, read_vqa_layout
from visling.data.annotations.questions import QuestionRecord, release_text, table_questions
from visling.data.annotations.tables import Table
from visling.data.answers import AnswerVocabulary, SoftScores, soft_scores
from visling.data.text import TextLayout, swap_words
from visling.errors import ConfigError, DataError
from visling.metrics.answers import FEWEST_ANSWERS, Average, Version, normalise, vqa_accuracy, vqa_score
from visling.tasks.answers import AnswerTask, answer_loss, count_rows, detail_row, mean_score, top_answers
from visling.tasks.base import Report, Score, by_id
from visling.types import Batch, Example, Loss, Prediction, Targets

TOP = 5
"""Candidates kept per prediction."""


@dataclass(frozen=True, kw_only=True)
class VqaConfig:
    """How answers are listed, learned and scored."""

    loss: Literal["kl", "bce"] | None = None
    """"kl": KL divergence from log-softmax to the soft scores (VisualBERT); "bce": binary cross-entropy times A (the
    others). None: that of the model's family (`ModelSpec.tasks`), which a fine-tuning run fills in."""
    answers: Path | None = None
    """File with the answer vocabulary of a released checkpoint; None builds one from the training questions."""
    min_count: int | None = 9
    """Training questions whose most frequent answer it must be for an answer to be listed (hengyuan-hu's preparation,
    all releases). None builds no list: `answers` must name one, as in the published recipes."""
    question_text: Literal["written", "release"] = "written"
    """Questions as people wrote them, or as VisualBERT's release tokenises them (without commas and inner question
    marks)."""
    mask_unknown: bool | None = None
    """Never answer `<unk>`, where the vocabulary lists it (VisualBERT's validation; its test-file writer does not).
    None: as in the family's release (VL-BERT: it may be answered), else never."""
    metric_version: Version = "2021"
    """Official script: "2021", or "2017" as it was when the five papers appeared. "mmf" is no official one: MMF's own
    normalisation of both sides."""
    layout: VqaLayout | None = None
    """Which files to read where a folder holds several: "official", "lxmert", "imdb" or "targets"
    (`annotations.prepared_questions`). None: the only ones."""


class VQA(AnswerTask[QuestionRecord, VqaConfig]):
    """Answer a question about an image."""

    name: ClassVar[str] = "vqa"
    metric: ClassVar[str] = "accuracy"
    files: ClassVar[str] = "VQA v2 in its own files, or in those that a release prepared of it (docs/tasks/vqa.md)"
    settings: ClassVar[type[VqaConfig]] = VqaConfig

    def setup(self, records: Sequence[QuestionRecord]) -> None:
        """List the frequent answers of the training questions, unless a vocabulary is given.

        Raises:
            ConfigError: neither a vocabulary nor a minimum count is given.
        """
        if self._answers is None:
            self._answers = answer_vocabulary(records, self.least_count(self.config.min_count))

    def records(self, root: Path, split: str) -> list[QuestionRecord]:
        """Questions of a split in the layout that the folder has, with answers where there are any. See `read_vqa` for
        parts of val."""
        return read_vqa_layout(root, split, self.config.layout)

    def read_table(self, table: Table) -> list[QuestionRecord]:
        """Questions of a file of one's own: `image`, `question`, `answer` or `answers` (a list, in cells joined by
        "|"), and, if there are any, `id` and `type`."""
        return table_questions(table)

    def query(self, texts: Sequence[str], images: Sequence[str]) -> QuestionRecord:
        """A question about one image that nobody has answered."""
        (text,), (image,) = texts, images
        return QuestionRecord(
            id=image,
            images=(image,),
            question=text,
            question_type="",
            answer_type="",
            answers=None,
            multiple_choice_answer=None,
        )

    def example(self, record: QuestionRecord, layout: TextLayout, rng: np.random.Generator) -> Example:
        """The question with the model's answer slot, if it has one; soft scores as label, if people answered, and those
        of the answers with left and right exchanged for a mirrored image."""
        labels, mirrored = {}, {}
        if record.answers is not None:
            labels["answer"] = self._score(record.answers)
            exchanged = [swap_words(answer) for answer in record.answers]
            if exchanged != list(record.answers):
                mirrored["answer"] = self._score(exchanged)
        question = release_text(record.question) if self.config.question_text == "release" else record.question
        row = layout.row(question, answer=True)
        return Example(id=record.id, rows=(row,), images=record.images, labels=labels, mirrored_labels=mirrored)

    def _score(self, answers: Sequence[str]) -> SoftScores:
        """Score of each listed answer, by the rule that the metric follows for as many answers."""
        if len(answers) >= FEWEST_ANSWERS:
            return soft_scores(answers, self.answers)
        listed = [answer if answer in self.answers else normalise(answer) for answer in answers]
        return soft_scores(listed, self.answers, formula="share")

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Loss:
        """Loss over (N, A) logits and scores; part "answer_accuracy" is the score of the best answer, before any
        normalisation."""
        return answer_loss(logits["classify"], cast(Tensor, targets.answer), self._kind_of_loss())

    def count(self, targets: Targets, *, whole: bool) -> Mapping[str, Tensor]:
        return {"answer": count_rows(cast(Tensor, targets.answer))}

    def _kind_of_loss(self) -> Literal["kl", "bce"]:
        if self.config.loss is None:
            raise ConfigError(
                "the loss follows the family of the model, which a task does not know: "
                'set VqaConfig.loss to "kl" or "bce".'
            )
        return self.config.loss

    def decode(self, logits: Mapping[str, Tensor], batch: Batch, records: Sequence[QuestionRecord]) -> list[Prediction]:
        """The most probable answers; probabilities are a softmax, or with loss "bce" one sigmoid each."""
        scores = logits["classify"].detach().float().cpu()
        if self.config.mask_unknown is not False and self.answers.unknown is not None:
            scores = scores.index_fill(1, torch.tensor([self.answers.unknown]), -torch.inf)
        probabilities = scores.softmax(1) if self._kind_of_loss() == "kl" else scores.sigmoid()
        return top_answers(probabilities, records, list(self.answers), most=TOP)

    def report(self, predictions: Sequence[Prediction], records: Sequence[QuestionRecord]) -> Report:
        """Official VQA accuracy, whole, per question type and per answer type."""
        pairs = by_id(predictions, records)
        scores = vqa_accuracy(
            {prediction.id: prediction.value for prediction, _ in pairs}, records, self.config.metric_version
        )
        hits = [scores.each[record.id] for record in records]
        interval = mean_score(hits, [record.images[0] for record in records])
        return Report(
            scores={"accuracy": replace(interval, value=scores.overall.percent)},
            variants={"script": self.config.metric_version},
            by={
                name: {value: _score(mean) for value, mean in means.items()}
                for name, means in (("question_type", scores.question_types), ("answer_type", scores.answer_types))
                if any(means)  # no file of one's own has to name types
            },
        )

    def labelled(self, records: Sequence[QuestionRecord]) -> bool:
        """Whether people answered every question."""
        return all(record.answers is not None for record in records)

    def notes(self, records: Sequence[QuestionRecord]) -> list[str]:
        """That questions have too few answers for the official rule, and that answers are not listed."""
        few = [record for record in records if 0 < len(record.answers or ()) < FEWEST_ANSWERS]
        if not few:
            return []
        notes = [
            f"{len(few)} of {len(records)} questions have fewer than {FEWEST_ANSWERS} answers: to them, an answer "
            "scores the share of people who gave it; by the official leave-one-out rule it could not reach 100"
        ]
        unlisted = [record for record in few if not self._score(record.answers or ()).indices.size]
        if unlisted:
            notes.append(
                f"{len(unlisted)} of {len(few)} questions have no answer that the model can give, such as "
                f"{unlisted[0].multiple_choice_answer!r}, and score 0: the {len(self.answers)} answers are those of "
                "the training questions, or of the list that was given"
            )
        return notes

    def submission(self, predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
        """The list that the evaluation server takes; it wants every question of the test file, once.

        Raises:
            DataError: two predictions for one question.
        """
        if len({prediction.id for prediction in predictions}) < len(predictions):
            twice = Counter(prediction.id for prediction in predictions).most_common(1)[0][0]
            raise DataError(f"two predictions answer question {twice!r}; the server takes one for each question.")
        return [
            {
                # Those of VQA are numbers, those of one's own files may be anything.
                "question_id": int(prediction.id) if prediction.id.isdecimal() else prediction.id,
                "answer": prediction.value,
            }
            for prediction in predictions
        ]

    def baselines(
        self, train: Sequence[QuestionRecord], records: Sequence[QuestionRecord]
    ) -> Mapping[str, list[Prediction]]:
        """The most frequent training answer of each question's type."""
        return {"majority answer per question type": majority_answers(train, records)}

    def details(self, predictions: Sequence[Prediction], records: Sequence[QuestionRecord]) -> list[dict[str, Any]]:
        """One row per question; `score` is its accuracy as a fraction, None where nobody answered."""
        return [
            detail_row(
                prediction,
                record,
                text=record.question,
                kind=record.question_type,
                truth=record.multiple_choice_answer,
                score=vqa_score(prediction.value, record.answers, self.config.metric_version)
                if record.answers
                else None,
            )
            for prediction, record in by_id(predictions, records)
        ]


def answer_vocabulary(records: Sequence[QuestionRecord], min_count: int) -> AnswerVocabulary:
    """The normalised most-frequent answers of the questions that occur often enough, the most frequent first.

    Raises:
        DataError: no annotations, or no answer that is frequent enough.
    """
    counts = Counter(
        normalise(record.multiple_choice_answer) for record in records if record.multiple_choice_answer is not None
    )
    if not counts:
        raise DataError(
            f"none of the {len(records)} training questions has an answer. "
            "Put the annotation file next to the question file."
        )
    return AnswerVocabulary.build(counts, min_count)


def majority_answers(train: Sequence[QuestionRecord], records: Sequence[QuestionRecord]) -> list[Prediction]:
    """Baseline that sees neither image nor question: the most frequent training answer of the question's type (of all,
    for a new type).

    Raises:
        DataError: no training question has an answer.
    """
    counts: dict[str | None, Counter[str]] = defaultdict(Counter)
    for record in train:
        if record.multiple_choice_answer is not None:
            for kind in (record.question_type, None):
                counts[kind][record.multiple_choice_answer] += 1
    if not counts:
        raise DataError("the majority baseline needs training questions with answers; found none.")
    best = {kind: min(answers.items(), key=lambda pair: (-pair[1], pair[0]))[0] for kind, answers in counts.items()}
    predictions = []
    for record in records:
        kind = record.question_type if record.question_type in counts else None
        share = counts[kind][best[kind]] / counts[kind].total()
        predictions.append(Prediction(id=record.id, value=best[kind], confidence=share, top=((best[kind], share),)))
    return predictions


def _score(mean: Average) -> Score:
    return Score(mean.percent, mean.count)


TASK = VQA
