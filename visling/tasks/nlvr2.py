"""NLVR2: is the sentence true of the two pictures? (Suhr, Zhou et al. 2019)

Files    {split}.json, one JSON object a line, or LXMERT's of the same name (`data/annotations/statements.py`); regions
         of both images under their names, `dev-850-0-img0`.
Official One prediction per sentence and pair. Accuracy: share of right ones. Consistency: share of sentences of a set
         of images that are judged rightly of each of their pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from visling.data.annotations.statements import (
    Nlvr2Record,
    find_nlvr2,
    nlvr2_group,
    read_nlvr2,
    table_statements,
)
from visling.data.annotations.tables import Table
from visling.data.text import TextLayout
from visling.errors import ConfigError, DataError
from visling.metrics.answers import nlvr2_scores
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

LABELS = ("False", "True")
"""By class index: 1 = the sentence is true."""


@dataclass(frozen=True, kw_only=True)
class Nlvr2Config:
    """How the two images are shown; it must be the preset's `pair`."""

    joined: bool | None = None
    """True: one row with the regions of both images (VisualBERT). False: a row for each image, joined by the head
    (LXMERT, CVLP, ViLBERT). None: as in the model's family, which a fine-tuning run fills in; joined where it names
    none."""
    loss: Literal["cross_entropy", "bce"] | None = None
    """"cross_entropy" over the two outputs (VisualBERT, LXMERT, CVLP); "bce": binary cross-entropy of each output,
    averaged over both (ViLBERT's multi-task release). None: that of the model's family (`ModelSpec.tasks`), which a
    fine-tuning run fills in; cross-entropy where it names none."""


class NLVR2(Task[Nlvr2Record, Nlvr2Config]):
    """Judge a sentence about two pictures."""

    name: ClassVar[str] = "nlvr2"
    metric: ClassVar[str] = "accuracy"
    images: ClassVar[int] = 2
    files: ClassVar[str] = "one file per split, the official one or LXMERT's (docs/tasks/nlvr2.md)"
    settings: ClassVar[type[Nlvr2Config]] = Nlvr2Config

    @property
    def heads(self) -> Mapping[str, Head]:
        """One classification, class 1 = true; over both rows where each image has its own."""
        return {"classify": Head(kind="classify" if self._joined else "pair", outputs=len(LABELS))}

    @property
    def group(self) -> int:
        """Rows of an example."""
        return 1 if self._joined else 2

    @property
    def _joined(self) -> bool:
        return self.config.joined is not False

    def records(self, root: Path, split: str) -> list[Nlvr2Record]:
        """Statements of a split in the order of its file.

        Args:
            split: train, dev, test1, test2, or balanced_dev and the like; in LXMERT's files train, valid, test, hidden.
        Raises:
            DataError: no file of the split, or one that is not of the official layout.
        """
        file = find_nlvr2(root, split)
        if file is None:
            raise DataError(
                f"no statements of split {split!r} in {root}: expected {root / f'{split}.json'}, "
                f"{root / 'nlvr2' / f'{split}.json'} or {root / 'data' / f'{split}.json'}."
            )
        return read_nlvr2(file)

    def read_table(self, table: Table) -> list[Nlvr2Record]:
        """Statements of a file of one's own: `image1`, `image2`, `text` and `label`; without official identifiers each
        is a group of its own in the consistency."""
        return table_statements(table)

    def query(self, texts: Sequence[str], images: Sequence[str]) -> Nlvr2Record:
        """A sentence about two images, of unknown truth."""
        (text,), (left, right) = texts, images
        return Nlvr2Record(id=f"{left}-{right}", images=(left, right), sentence=text, label=None)

    def example(self, record: Nlvr2Record, layout: TextLayout, rng: np.random.Generator) -> Example:
        """The sentence and its two images.

        Raises:
            ConfigError: the preset shows two images in another way than the settings say.
        """
        if self._joined != (layout.spec.pair == "sequence"):
            raise ConfigError(
                f"the preset shows two images as {layout.spec.pair}, the task has "
                f"joined={str(self._joined).lower()}: set "
                f"task_settings={{joined = {str(layout.spec.pair == 'sequence').lower()}}}."
            )
        labels = {} if record.label is None else {"answer": int(record.label)}
        return Example(
            id=record.id, rows=(layout.row(record.sentence),) * self.group, images=record.images, labels=labels
        )

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Loss:
        """Loss of (N, 2) logits, averaged over examples, in float32."""
        scores, labels = logits["classify"], cast(Tensor, targets.answer)
        loss = classification_loss(scores, labels)
        if self.config.loss != "bce":
            return loss
        right = labels[:, None] == torch.arange(len(LABELS), device=labels.device)
        each = F.binary_cross_entropy_with_logits(scores.float(), right.float(), reduction="none").mean(1)
        return Loss.mean("answer", each).reporting({"answer_accuracy": loss.parts["answer_accuracy"]})

    def count(self, targets: Targets, *, whole: bool) -> Mapping[str, Tensor]:
        return {"answer": count_rows(cast(Tensor, targets.answer))}

    def decode(self, logits: Mapping[str, Tensor], batch: Batch, records: Sequence[Nlvr2Record]) -> list[Prediction]:
        """The more probable of "True" and "False"; an exact tie is "False"."""
        return true_or_false(logits["classify"], records, LABELS)

    def logit(
        self, logits: Mapping[str, Tensor], batch: Batch, number: int, prediction: Prediction, place: int
    ) -> Tensor:
        """The logit of "True" or of "False"."""
        return logits["classify"][number, LABELS.index(prediction.top[place][0])]

    def report(self, predictions: Sequence[Prediction], records: Sequence[Nlvr2Record]) -> Report:
        """Accuracy and consistency; accuracy by label."""
        pairs = by_id(predictions, records)
        truths = [_truth(record) for _, record in pairs]
        hits = [float(prediction.value == truth) for (prediction, _), truth in zip(pairs, truths, strict=True)]
        official = nlvr2_scores(
            {prediction.id: prediction.value for prediction, _ in pairs},
            {record.id: _truth(record) for record in records},
            {record.id: nlvr2_group(record.id) for record in records},
        )
        sets = [nlvr2_group(record.id) for record in records]
        return Report(
            scores={
                "accuracy": replace(mean_score(hits, sets), value=100 * official.accuracy.value),
                "consistency": Score(100 * official.consistency.value, official.consistency.count),
            },
            by={"label": mean_scores(hits, truths)},
        )

    def labelled(self, records: Sequence[Nlvr2Record]) -> bool:
        """Whether every sentence is known to be true or false."""
        return all(record.label is not None for record in records)

    def submission(self, predictions: Sequence[Prediction]) -> str:
        """Rows `identifier,True` of the official CSV file, which has no header."""
        return "".join(f"{prediction.id},{prediction.value}\n" for prediction in predictions)

    def baselines(self, train: Sequence[Nlvr2Record], records: Sequence[Nlvr2Record]) -> Mapping[str, list[Prediction]]:
        """The more frequent label of the training records, for every pair."""
        return {"majority label": majority_label([record.label for record in train], records, LABELS)}

    def details(self, predictions: Sequence[Prediction], records: Sequence[Nlvr2Record]) -> list[dict[str, Any]]:
        """One row per sentence and pair; `image` is the left one, `images` has both."""
        return [
            detail_row(
                prediction,
                record,
                text=record.sentence,
                kind="pair",
                truth=None if record.label is None else _truth(record),
                score=None if record.label is None else float(prediction.value == _truth(record)),
            )
            for prediction, record in by_id(predictions, records)
        ]


def _truth(record: Nlvr2Record) -> str:
    return label_of(record, record.label, LABELS)


TASK = NLVR2
