"""NLVR v1: is the sentence true of the drawn picture? (Suhr et al. 2017)

Files    {split}/{split}.json, one JSON object a line, and pictures {split}/images/<directory>/{split}-N-M-K.png:
         presentation N, position M of the example in it, and six orders K of the three boxes of one example. Pictures
         are found by file stem, so `directory` is not read and the hidden split, which lacks it, needs no rule of its
         own.
More     {split}/statements.json or statements/{split}.json, in the same fields with the picture's file stem as "image":
         further true and false sentences, as `visling scenes` writes them. They count in the accuracy, never in the
         official numbers.
Official One prediction per picture. Precision: share of right ones. Consistency: share of presentations without any
         error.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from torch import Tensor

from visling.data.annotations.nlvr import (
    NLVR_LABELS,
    PICTURE_NAME,
    PICTURES,
    NlvrRecord,
    read_nlvr,
)
from visling.data.text import TextLayout
from visling.metrics.answers import nlvr_images, nlvr_structured
from visling.tasks.answers import (
    classification_loss,
    count_rows,
    detail_row,
    label_of,
    majority_label,
    mean_score,
    mean_scores,
    true_or_false,
)
from visling.tasks.base import Report, Score, Task, by_id
from visling.types import Batch, Example, Head, Loss, Prediction, Targets

_LEAST = 1e-12


@dataclass(frozen=True, kw_only=True)
class NlvrConfig:
    """Which records are read and how certain the report is to be."""

    pictures: tuple[int, ...] | None = None
    """Orders K of the boxes to use, 0 to 5; None = those that the picture folder of the split holds, or all six without
    it. The official numbers need all six."""
    statements: bool = True
    """Also read the extra statements next to the official file."""
    hold_out: float = 0.2
    """Share of the presentations of a split that are in its part ".held"; the others are in ".train" (always the same
    ones)."""
    draws: int = 1000
    """Resampled sets of presentations for the 95 % intervals."""


class NLVR(Task[NlvrRecord, NlvrConfig]):
    """Judge a sentence about a picture."""

    name: ClassVar[str] = "nlvr"
    metric: ClassVar[str] = "accuracy"
    files: ClassVar[str] = "the folders of NLVR (docs/tasks/nlvr.md)"
    settings: ClassVar[type[NlvrConfig]] = NlvrConfig

    @property
    def heads(self) -> Mapping[str, Head]:
        """One classification, class 1 = true."""
        return {"classify": Head(kind="classify", outputs=len(NLVR_LABELS))}

    def records(self, root: Path, split: str) -> list[NlvrRecord]:
        """One record per picture of the official file, then the extra statements.

        Args:
            split: name of the folder and file; with ".train" or ".held" at its end, that part of it by presentations.
        Raises:
            DataError: neither kind of file is there, a line is not JSON or lacks a field, a label is not true or false,
                or an id comes twice.
            ConfigError: a picture number other than 0 to 5.
        """
        return read_nlvr(
            root, split, pictures=self.config.pictures, statements=self.config.statements, held_out=self.config.hold_out
        )

    def query(self, texts: Sequence[str], images: Sequence[str]) -> NlvrRecord:
        """A sentence about one image, of unknown truth."""
        (text,), (image,) = texts, images
        return NlvrRecord(
            id=image, images=(image,), sentence=text, label=None, identifier=image, presentation=image, official=False
        )

    def example(self, record: NlvrRecord, layout: TextLayout, rng: np.random.Generator) -> Example:
        """The sentence and its picture."""
        labels = {} if record.label is None else {"answer": int(record.label)}
        return Example(id=record.id, rows=(layout.row(record.sentence),), images=record.images, labels=labels)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Loss:
        """Cross-entropy over (N, 2) logits, averaged over examples, in float32."""
        return classification_loss(logits["classify"], cast(Tensor, targets.answer))

    def count(self, targets: Targets, *, whole: bool) -> Mapping[str, Tensor]:
        return {"answer": count_rows(cast(Tensor, targets.answer))}

    def decode(self, logits: Mapping[str, Tensor], batch: Batch, records: Sequence[NlvrRecord]) -> list[Prediction]:
        """The more probable of "true" and "false"; an exact tie is "false"."""
        return true_or_false(logits["classify"], records, NLVR_LABELS)

    def logit(
        self, logits: Mapping[str, Tensor], batch: Batch, number: int, prediction: Prediction, place: int
    ) -> Tensor:
        """The logit of "true" or of "false"."""
        return logits["classify"][number, NLVR_LABELS.index(prediction.top[place][0])]

    def report(self, predictions: Sequence[Prediction], records: Sequence[NlvrRecord]) -> Report:
        """Accuracy over all records; over the official ones, if each example has its six pictures, precision and
        consistency.

        The 95 % intervals of accuracy, precision and consistency are over presentations. `example_accuracy` and
        `example_consistency` judge each example once, by the mean log-odds of its six pictures; they are ours, not the
        official numbers.
        """
        pairs = by_id(predictions, records)
        hits = [_hit(prediction, record) for prediction, record in pairs]
        groups = [record.presentation for record in records]
        scores = {"accuracy": mean_score(hits, groups, draws=self.config.draws)}
        official = [pair for pair in pairs if pair[1].official]
        if official and _complete(record for _, record in official):
            scores |= self._official(official)
        kinds = {
            "label": [NLVR_LABELS[bool(record.label)] for record in records],
            "source": [_source(record) for record in records],
        }
        return Report(scores=scores, by={name: mean_scores(hits, kind) for name, kind in kinds.items()})

    def labelled(self, records: Sequence[NlvrRecord]) -> bool:
        """Whether every sentence is known to be true or false."""
        return all(record.label is not None for record in records)

    def submission(self, predictions: Sequence[Prediction]) -> str:
        """Rows `name.png,true` of the official CSV file, which has no header; extra statements are left out."""
        return "".join(
            f"{prediction.id}.png,{prediction.value}\n"
            for prediction in predictions
            if PICTURE_NAME.fullmatch(prediction.id)
        )

    def baselines(self, train: Sequence[NlvrRecord], records: Sequence[NlvrRecord]) -> Mapping[str, list[Prediction]]:
        """The more frequent label of the training records, for every picture."""
        return {"majority class": majority_label([record.label for record in train], records, NLVR_LABELS)}

    def details(self, predictions: Sequence[Prediction], records: Sequence[NlvrRecord]) -> list[dict[str, Any]]:
        """One row per record; `type` says whether it is a picture of the official file or an extra statement."""
        return [
            detail_row(
                prediction,
                record,
                text=record.sentence,
                kind=_source(record),
                truth=None if record.label is None else NLVR_LABELS[record.label],
                score=None if record.label is None else _hit(prediction, record),
            )
            for prediction, record in by_id(predictions, records)
        ]

    def _official(self, pairs: Sequence[tuple[Prediction, NlvrRecord]]) -> dict[str, Score]:
        labels = {record.identifier: NLVR_LABELS[bool(record.label)] for _, record in pairs}
        whole = nlvr_images([(f"{record.id}.png", prediction.value) for prediction, record in pairs], labels)
        odds: dict[str, list[float]] = defaultdict(list)
        right: dict[str, bool] = {}
        for prediction, record in pairs:
            odds[record.identifier].append(_log_odds(prediction))
            right[record.presentation] = right.get(record.presentation, True) and bool(_hit(prediction, record))
        averaged = nlvr_structured([(name, NLVR_LABELS[sum(values) > 0]) for name, values in odds.items()], labels)
        hits, groups = (
            [_hit(prediction, record) for prediction, record in pairs],
            [record.presentation for _, record in pairs],
        )
        consistent = [float(all_right) for all_right in right.values()]
        scores = {
            "precision": replace(mean_score(hits, groups, draws=self.config.draws), value=100 * whole.precision.value),
            "consistency": replace(
                mean_score(consistent, draws=self.config.draws), value=100 * whole.consistency.value
            ),
        }
        scores["example_accuracy"] = Score(100 * averaged.precision.value, averaged.precision.count)
        scores["example_consistency"] = Score(100 * averaged.consistency.value, averaged.consistency.count)
        return scores


def _complete(records: Iterable[NlvrRecord]) -> bool:
    """Whether every example is there with all its pictures."""
    pictures: dict[str, int] = defaultdict(int)
    for record in records:
        pictures[record.identifier] += 1
    return set(pictures.values()) == {PICTURES}


def _hit(prediction: Prediction, record: NlvrRecord) -> float:
    return float(prediction.value == label_of(record, record.label, NLVR_LABELS))


def _log_odds(prediction: Prediction) -> float:
    """Log-odds of "true": the difference of the two logits."""
    true = dict(prediction.top).get("true", 0.0) if prediction.top else float(prediction.value == "true")
    true = min(max(true, _LEAST), 1 - _LEAST)
    return math.log(true) - math.log1p(-true)


def _source(record: NlvrRecord) -> str:
    return "pictures" if record.official else "statements"


TASK = NLVR
