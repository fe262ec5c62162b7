"""GQA: a question about an image, made of its scene graph, and one answer (Hudson & Manning 2019).

Shapes   N examples, A answers of the vocabulary.
Releases LXMERT, CVLP and ViLBERT take each answer as a yes-no question (binary cross-entropy, averaged over all, times
         A). LXMERT has a second loss, cross-entropy times A (`--mceLoss`). VisualBERT and VL-BERT were not trained on
         GQA; here they learn it like the others.
Targets  1 for the answer, as written; an answer that is not listed leaves all targets at 0.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
from torch import Tensor

from visling.data.annotations.gqa import read_gqa_split
from visling.data.annotations.gqa_records import GqaRecord, GqaRecords
from visling.data.annotations.questions import UNTOLD
from visling.data.answers import AnswerVocabulary, soft_scores
from visling.data.text import TextLayout, swap_words
from visling.errors import DataError
from visling.metrics.answers import Average
from visling.metrics.gqa import Choices, gqa_scores, label_scores
from visling.tasks.answers import AnswerTask, answer_loss, count_rows, detail_row, mean_score, top_answers
from visling.tasks.base import Report, Score, by_id
from visling.types import Batch, Example, Loss, Prediction, Targets

TOP = 5
"""Candidates kept per prediction."""


@dataclass(frozen=True, kw_only=True)
class GqaConfig:
    """How answers are listed and learned."""

    loss: Literal["bce", "kl", "mce"] = "bce"
    """"bce": binary cross-entropy times A (LXMERT, CVLP, ViLBERT); "kl": softmax cross-entropy, 0 for an answer that is
    not listed; "mce": softmax cross-entropy times A, an answer that is not listed counting as the first one (LXMERT's
    `--mceLoss`)."""
    answers: Path | None = None
    """File with the answer vocabulary of a released checkpoint: JSON, text, or a pickled list; None builds one from the
    training questions."""
    min_count: int | None = 1
    """Training questions whose answer it must be for an answer to be listed. None builds no list: `answers` must name
    one, as in the published recipes."""


class GQA(AnswerTask[GqaRecord, GqaConfig]):
    """Answer a question that was made of the scene graph of an image."""

    name: ClassVar[str] = "gqa"
    metric: ClassVar[str] = "accuracy"
    files: ClassVar[str] = "the official questions, LXMERT's lists, or ViLBERT's caches (docs/tasks/gqa.md)"
    settings: ClassVar[type[GqaConfig]] = GqaConfig

    def __init__(self, config: GqaConfig | None = None, answers: AnswerVocabulary | None = None) -> None:
        super().__init__(config, answers)
        self._left_out = Counter[str]()

    def setup(self, records: Sequence[GqaRecord]) -> None:
        """List the answers of the training questions, unless a vocabulary is given.

        Raises:
            ConfigError: neither a vocabulary nor a minimum count is given.
            DataError: no training question has an answer, or none is frequent enough.
        """
        if self._answers is None:
            min_count = self.least_count(self.config.min_count)
            counts = Counter(record.answer for record in records if record.answer not in (None, UNTOLD))
            if not counts:
                raise DataError(f"none of the {len(records)} training questions has an answer. Train on train or val.")
            self._answers = AnswerVocabulary.build(counts, min_count)

    def records(self, root: Path, split: str) -> GqaRecords:
        """Questions of a split, in official files, LXMERT's lists or ViLBERT's caches. See `read_gqa_split`."""
        return read_gqa_split(root, split, self._left_out)

    def query(self, texts: Sequence[str], images: Sequence[str]) -> GqaRecord:
        """A question about one image that nobody has answered."""
        (text,), (image,) = texts, images
        return GqaRecord(id=image, images=(image,), question=text, answer=None)

    def example(self, record: GqaRecord, layout: TextLayout, rng: np.random.Generator) -> Example:
        """The question with the model's answer slot, if it has one; as label the answer, and for a mirrored image the
        one with left and right exchanged."""
        labels, mirrored = {}, {}
        if record.answer is not None:
            labels["answer"] = soft_scores([record.answer], self.answers, formula="share")
            if (exchanged := swap_words(record.answer)) != record.answer:
                mirrored["answer"] = soft_scores([exchanged], self.answers, formula="share")
        row = layout.row(record.question, answer=True)
        return Example(id=record.id, rows=(row,), images=record.images, labels=labels, mirrored_labels=mirrored)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Loss:
        """Loss over (N, A) logits and targets; part "answer_accuracy" is the share of right answers."""
        return answer_loss(logits["classify"], cast(Tensor, targets.answer), self.config.loss)

    def count(self, targets: Targets, *, whole: bool) -> Mapping[str, Tensor]:
        return {"answer": count_rows(cast(Tensor, targets.answer))}

    def decode(self, logits: Mapping[str, Tensor], batch: Batch, records: Sequence[GqaRecord]) -> list[Prediction]:
        """The most probable answers; probabilities are one sigmoid each with loss "bce", else a softmax."""
        scores = logits["classify"].detach().float().cpu()
        probabilities = scores.sigmoid() if self.config.loss == "bce" else scores.softmax(1)
        return top_answers(probabilities, records, list(self.answers), most=TOP)

    def report(self, predictions: Sequence[Prediction], records: Sequence[GqaRecord]) -> Report:
        """Official scores over balanced questions, whole, by types, number of words and number of steps.

        Validity and plausibility need the choices of the split, consistency all questions that balanced ones entail
        (splits with "_all"); what is left out is named among the variants. Questions without types (LXMERT's and
        ViLBERT's files) have an accuracy alone.
        """
        in_order = [record for _, record in by_id(predictions, records)]
        answered = {prediction.id: prediction.value for prediction in predictions}
        if not all(record.structural for record in in_order):
            labels = {record.id: {_truth(record): 1.0} for record in in_order}
            return Report(
                scores={"accuracy": _score_records(answered, in_order, label_scores(answered, labels))},
                variants={"script": "LXMERT's evaluator, since questions have no types"},
            )
        balanced = [record for record in in_order if record.balanced]
        if not balanced:
            raise DataError(f"none of the {len(in_order)} questions is balanced; only those are scored.")
        choices = _choices_of(balanced)
        complete = all(answered.keys() >= set(record.entailed) for record in balanced)
        found = gqa_scores(answered, in_order, choices=choices, consistency=complete)
        parts = {
            "accuracy": (found.accuracy, balanced),
            "binary": (found.binary, [record for record in balanced if record.structural != "query"]),
            "open": (found.open, [record for record in balanced if record.structural == "query"]),
        }
        others = {
            "validity": found.validity,
            "plausibility": found.plausibility,
            "consistency": found.consistency,
            "distribution": found.distribution,
        }
        variants = {"script": "official"}
        if choices is None:
            variants["validity and plausibility"] = "left out: the split has no choices file"
        if not complete:
            variants["consistency"] = "left out: entailed questions are not in this split, but in the one with _all"
        return Report(
            scores={
                **{name: _score_records(answered, some, mean) for name, (mean, some) in parts.items() if some},
                **{name: _score(mean) for name, mean in others.items() if mean is not None and mean.count},
            },
            by={
                "structural": {name: _score(mean) for name, mean in found.structural.items()},
                "semantic": {name: _score(mean) for name, mean in found.semantic.items()},
                "words": {str(number): _score(mean) for number, mean in found.words.items()},
                "steps": {str(number): _score(mean) for number, mean in found.steps.items()},
            },
            variants=variants,
        )

    def labelled(self, records: Sequence[GqaRecord]) -> bool:
        """Whether every question has its answer."""
        return all(record.answer is not None for record in records)

    def notes(self, records: Sequence[GqaRecord]) -> list[str]:
        """How many questions were left out, or have an answer that the model cannot give."""
        unlisted = sum(record.answer is not None and record.answer not in self.answers for record in records)
        found = [f"{number} {what} are left out" for what, number in self._left_out.items()]
        if unlisted:
            found.append(f"{unlisted} of {len(records)} questions have an answer that is not among those listed")
        return found

    def submission(self, predictions: Sequence[Prediction]) -> list[dict[str, str]]:
        """The list that the evaluation server takes; it wants every question of `submission_all_questions.json`."""
        return [{"questionId": prediction.id, "prediction": prediction.value} for prediction in predictions]

    def baselines(self, train: Sequence[GqaRecord], records: Sequence[GqaRecord]) -> Mapping[str, list[Prediction]]:
        """The most frequent training answer of each question's pattern, and of its local group (the paper's "local
        prior")."""
        return {
            "majority answer per question type": _majority(train, records, ("structural", "detailed")),
            "majority answer per local group": _majority(
                train, records, ("structural", "detailed", "global_group", "local_group")
            ),
        }

    def details(self, predictions: Sequence[Prediction], records: Sequence[GqaRecord]) -> list[dict[str, Any]]:
        """One row per question, balanced or not."""
        return [
            detail_row(
                prediction,
                record,
                text=record.question,
                kind=record.structural,
                truth=record.answer,
                score=None if record.answer is None else float(prediction.value == record.answer),
            )
            for prediction, record in by_id(predictions, records)
        ]


def _choices_of(records: Sequence[GqaRecord]) -> Choices | None:
    """Where the valid and plausible answers of these questions are looked up; None if some have none."""
    files = {record.id: record.choices for record in records if record.choices is not None}
    return (lambda number: files[number][number]) if len(files) == len(records) else None


def _truth(record: GqaRecord) -> str:
    if record.answer is None:
        raise DataError(f"question {record.id} has no answer, so nothing can be scored. Write the submission instead.")
    return record.answer


def _score_records(answered: Mapping[str, str], records: Sequence[GqaRecord], mean: Average) -> Score:
    """The official mean of the hits of these records, with an interval by image."""
    hits = [float(answered[record.id] == record.answer) for record in records]
    return replace(mean_score(hits, [record.images[0] for record in records]), value=100 * mean.value)


def _score(mean: Average) -> Score:
    return Score(100 * mean.value, mean.count)


def _majority(train: Sequence[GqaRecord], records: Sequence[GqaRecord], fields: Sequence[str]) -> list[Prediction]:
    """The most frequent training answer of the questions that agree in these fields; where none does, in all but the
    last, and so on.

    Raises:
        DataError: no training question has an answer.
    """
    counts: dict[tuple[str | None, ...], Counter[str]] = defaultdict(Counter)
    for record in train:
        if record.answer is not None:
            key = tuple(getattr(record, name) for name in fields)
            for length in range(len(key) + 1):
                counts[key[:length]][record.answer] += 1
    if not counts:
        raise DataError("the majority baseline needs training questions with answers; found none.")
    best = {key: min(answers.items(), key=lambda pair: (-pair[1], pair[0]))[0] for key, answers in counts.items()}
    predictions = []
    for record in records:
        key = tuple(getattr(record, name) for name in fields)
        while key not in best:
            key = key[:-1]
        share = counts[key][best[key]] / counts[key].total()
        predictions.append(Prediction(id=record.id, value=best[key], confidence=share, top=((best[key], share),)))
    return predictions


TASK = GQA
