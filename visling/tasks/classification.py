"""Classification of a text with an image, or of a text alone: one label or several, of one's own (also Hateful Memes,
Kiela et al. 2020).

Files    {split}.jsonl, .json, .csv or .tsv (`data/annotations/classification.py`).
Labels   In ascending order if all are whole numbers, otherwise in alphabetical order, or in that of a file. Of two, the
         second is the positive one.
Loss     One label: cross-entropy. Several: binary cross-entropy, summed over labels. Both are means over examples.
Shapes   N examples, A labels.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from visling import config as configs
from visling.data.annotations.classification import (
    FieldNames,
    LabelledText,
    find_classification,
    labelled_texts,
)
from visling.data.annotations.tables import SEPARATOR, Table
from visling.data.answers import AnswerVocabulary
from visling.data.text import TextLayout
from visling.errors import ConfigError, DataError
from visling.metrics.classification import Flags, Numbers, auroc, average_precision, label_scores
from visling.tasks.answers import count_rows, detail_row, mean_score
from visling.tasks.base import Report, Score, Task, by_id
from visling.types import Batch, Example, Head, Loss, Prediction, Targets

TOP = 5
"""Labels listed in a row of details."""


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """Where texts, images and labels stand, and how labels are learned and chosen."""

    text_field: str | None = None
    """Field of the text; None: text, question, sentence or caption."""
    second_field: str | None = None
    """Field of a second text, such as the hypothesis about a premise; None: text2, if there is one."""
    image_field: str | None = None
    """Field of the image; None: image or img, if there is one."""
    label_field: str | None = None
    """Field of the label, or of the list of labels; None: label or labels."""
    id_field: str | None = None
    """Field of the id; None: id, or the number of the row if there is none."""
    labels: Path | None = None
    """File that lists the labels, one a line, in the order of the outputs; None: those of the training examples."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: examples of rare labels count for more. One label: by examples / (labels * examples with this label).
    Several: examples that have a label by the ratio of those without to those with it."""
    threshold: float = 0.5
    """Least probability at which one of several labels is given."""
    empty_text: str = "picture"
    """What the model reads with an image that has no text."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold is a probability, from 0 to 1; found {self.threshold:g}.")


class Classification(Task[LabelledText, ClassificationConfig]):
    """Give an example its label or labels."""

    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"
    files: ClassVar[str] = "one file per split, .jsonl, .json, .csv or .tsv (docs/tasks/classification.md)"
    settings: ClassVar[type[ClassificationConfig]] = ClassificationConfig

    def __init__(
        self,
        config: ClassificationConfig | None = None,
        labels: Sequence[str] | None = None,
        *,
        several: bool = False,
        weights: Sequence[float] | None = None,
    ) -> None:
        """
        Args:
            labels: by output.
            several: whether an example may have any number of them.
            weights: of each label in the loss.
        """
        super().__init__(config)
        if labels is None and self.config.labels is not None:
            labels = list(AnswerVocabulary.load(self.config.labels))
        self._labels = None if labels is None else AnswerVocabulary(labels)
        self._index = {label: number for number, label in enumerate(labels or ())}
        self._several = several
        self._weights = weights

    @property
    def answers(self) -> AnswerVocabulary:
        """The labels, by output.

        Raises:
            ConfigError: not known yet.
        """
        if self._labels is None:
            raise ConfigError(
                "the labels are not known yet: call setup(training records), or name a file in "
                "ClassificationConfig.labels."
            )
        return self._labels

    @property
    def heads(self) -> Mapping[str, Head]:
        """One classification over the labels."""
        return {"classify": Head(kind="classify", outputs=len(self.answers))}

    def setup(self, records: Sequence[LabelledText]) -> None:
        """List the labels of the training examples, unless a file does, and count them for the class weights.

        Raises:
            DataError: an example has no label or one that the file does not list, or there are fewer than two labels.
        """
        counts = Counter(label for record in records for label in _labels_of(record))
        self._several = any(record.several for record in records)
        if self._labels is None:
            numbers = all(label.isascii() and label.removeprefix("-").isdigit() for label in counts)
            self._labels = AnswerVocabulary(sorted(counts, key=int) if numbers else sorted(counts))
            self._index = {label: number for number, label in enumerate(self._labels)}
        listed = list(self._labels)
        if unlisted := [label for label in counts if label not in self._index]:
            raise DataError(
                f"label {unlisted[0]!r} of the training examples is not in {self.config.labels}, which lists "
                f"{len(listed)}. Add it, or remove these examples."
            )
        if len(listed) < (1 if self._several else 2):
            raise DataError(
                f"the {len(records)} training examples have {len(listed)} label{'' if len(listed) == 1 else 's'}: "
                f"{', '.join(listed) or 'none'}. There is nothing to tell apart: add examples of another."
            )
        if self.config.class_weights == "balanced":
            having = [max(counts[label], 1) for label in listed]
            self._weights = [
                max(len(records) - have, 1) / have if self._several else len(records) / (len(listed) * have)
                for have in having
            ]

    def records(self, root: Path, split: str) -> list[LabelledText]:
        """Examples of a split in the order of its file; `split` is the name of the file without its suffix."""
        table = Table(find_classification(root, split))
        records = self.read_table(table)
        table.problems.refuse()
        return records

    def read_table(self, table: Table) -> list[LabelledText]:
        """Examples of a file in its order."""
        config = self.config
        given = {
            "text": config.text_field, "second": config.second_field, "image": config.image_field,
            "label": config.label_field, "id": config.id_field,
        }  # fmt: skip
        named = {what: (name,) for what, name in given.items() if name is not None}
        # The label may be absent from a hidden split.
        names = FieldNames(**named, required=frozenset(named.keys() - {"label"}))
        return labelled_texts(table, names)

    def check(self, records: Sequence[LabelledText]) -> None:
        """Refuse one label where the training examples have lists of them, or the reverse."""
        for record in records:
            if why := self._why_other_kind(record):
                raise DataError(f"example {record.id!r}: {why}")

    def _why_other_kind(self, record: LabelledText) -> str:
        """Why an example does not go with those of training; empty if it does."""
        if record.labels is None or record.several == self._several:
            return ""
        kinds = ("one label", "a list of labels")
        return (
            f"it has {kinds[record.several]}, the training examples have {kinds[self._several]} each. Write all files "
            "in the same form: one label under 'label', or lists under 'labels'."
        )

    def query(self, texts: Sequence[str], images: Sequence[str]) -> LabelledText:
        """One or two texts about an image, or about none, without a label."""
        first, *rest = texts
        return LabelledText(
            id=images[0] if images else first,
            images=tuple(images),
            text=first,
            second=rest[0] if rest else None,
            labels=None,
            several=self._several,
        )

    def example(self, record: LabelledText, layout: TextLayout, rng: np.random.Generator) -> Example:
        """One row; label `answer`: the number of the label, left out if it is unknown in training, or (A,) flags.

        Raises:
            DataError: one label where the model gives several, or the reverse.
        """
        labels: dict[str, Any] = {}
        if why := self._why_other_kind(record):
            raise DataError(why)
        if record.labels is not None:
            known = [self._index[label] for label in record.labels if label in self._index]
            if self._several:
                labels["answer"] = np.isin(np.arange(len(self.answers)), known).astype(np.float32)
            elif known:
                labels["answer"] = known[0]
        row = layout.row(record.text or self.config.empty_text, record.second)
        return Example(id=record.id, rows=(row,), images=record.images, labels=labels)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Loss:
        """Loss of (N, A) logits; part "answer_accuracy" is the share of examples whose labels are all right."""
        scores, labels = logits["classify"].float(), cast(Tensor, targets.answer)
        weights = None if self._weights is None else torch.tensor(self._weights, device=scores.device)
        if self._several:
            values = F.binary_cross_entropy_with_logits(scores, labels, pos_weight=weights, reduction="none").sum(1)
            threshold = torch.tensor(self.config.threshold).logit().item()
            hits = ((scores.detach() >= threshold) == labels.bool()).all(1).sum()
        else:
            values = F.cross_entropy(scores, labels, weight=weights, reduction="none")
            hits = (scores.detach().argmax(1) == labels).sum()
        loss = Loss.mean("answer", values)
        return loss.reporting({"answer_accuracy": (hits, loss.parts["answer"][1])})

    def count(self, targets: Targets, *, whole: bool) -> Mapping[str, Tensor]:
        return {"answer": count_rows(cast(Tensor, targets.answer))}

    def decode(self, logits: Mapping[str, Tensor], batch: Batch, records: Sequence[LabelledText]) -> list[Prediction]:
        """The most probable label, or all whose probability reaches the threshold, joined by "|"; `top` has every
        label."""
        scores = logits["classify"].detach().float().cpu()
        chances = (scores.sigmoid() if self._several else scores.softmax(1)).tolist()
        return [self._predict(record, row) for record, row in zip(records, chances, strict=True)]

    def _predict(self, record: LabelledText, chances: Sequence[float]) -> Prediction:
        pairs = list(zip(self.answers, chances, strict=True))
        top = tuple(sorted(pairs, key=lambda pair: -pair[1]))
        if not self._several:
            return Prediction(id=record.id, value=top[0][0], confidence=top[0][1], top=top)
        given = [label for label, chance in pairs if chance >= self.config.threshold]
        sure = float(np.prod([chance if chance >= self.config.threshold else 1 - chance for chance in chances]))
        return Prediction(id=record.id, value=SEPARATOR.join(given), confidence=sure, top=top)

    def report(self, predictions: Sequence[Prediction], records: Sequence[LabelledText]) -> Report:
        """Accuracy (of several labels: all right), F1, area under the ROC curve and, for several labels, mean average
        precision; precision, recall and F1 of each label. A label that training has not seen counts as missed."""
        pairs = by_id(predictions, records)
        listed = list(self.answers)
        unseen = dict.fromkeys(label for record in records for label in _labels_of(record) if label not in self._index)
        labels = [*listed, *unseen]
        truth = _flag(labels, [_labels_of(record) for _, record in pairs])
        given = _flag(labels, [self._split(prediction.value) for prediction, _ in pairs])
        tops = [dict(prediction.top) for prediction, _ in pairs]
        chances = np.array([[top[label] for label in listed] for top in tops])
        found = label_scores(truth, given)
        count = len(pairs)
        groups = [record.images[0] if record.images else record.id for _, record in pairs]
        scores = {
            "accuracy": mean_score((truth == given).all(1).astype(float).tolist(), groups),
            "macro_f1": Score(100 * found.macro_f1, count),
            "micro_f1": Score(100 * found.micro_f1, count),
            "weighted_f1": Score(100 * found.weighted_f1, count),
        }
        variants = {"f1": "labels that occur among truths or predictions"}
        if self._several:
            variants["accuracy"] = "examples whose labels are all right"
        areas, variants["auroc"] = self._areas(truth[:, : len(listed)], chances)
        if areas:
            scores["auroc"] = Score(100 * float(np.mean(areas)), count)
        if self._several:
            means = [average_precision(truth[:, column], chances[:, column]) for column in range(len(listed))]
            if defined := [mean for mean in means if mean is not None]:
                scores["mean_average_precision"] = Score(100 * float(np.mean(defined)), count)
        per_label = {
            name: {
                label: Score(100 * float(value), int(number))
                for label, value, number, occurs in zip(labels, values, found.true, found.occurring, strict=True)
                if occurs
            }
            for name, values in (("precision", found.precision), ("recall", found.recall), ("f1", found.f1))
        }
        return Report(scores=scores, by=per_label, variants=variants)

    def _areas(self, truth: Flags, chances: Numbers) -> tuple[list[float], str]:
        """Areas under the ROC curve, of the positive label or of each that some examples have and others lack, and what
        was computed."""
        listed = list(self.answers)
        binary = not self._several and len(listed) == 2
        columns = [1] if binary else range(len(listed))
        areas = [area for column in columns if (area := auroc(truth[:, column], chances[:, column])) is not None]
        if not areas:
            return [], "undefined: no label that some examples have and others lack"
        if binary:
            return areas, f"label {listed[1]}"
        return areas, f"mean over {len(areas)} of {len(listed)} labels, each against the rest"

    def _split(self, value: str) -> Sequence[str]:
        return value.split(SEPARATOR) if self._several else [value]

    def labelled(self, records: Sequence[LabelledText]) -> bool:
        """Whether every example has its labels."""
        return all(record.labels is not None for record in records)

    def notes(self, records: Sequence[LabelledText]) -> list[str]:
        """That labels are unknown in training, and that texts are empty."""
        notes = []
        unseen = [
            [label for label in record.labels or () if label not in self._index]
            for record in records
        ]  # fmt: skip
        if number := sum(map(bool, unseen)):
            first = next(labels[0] for labels in unseen if labels)
            notes.append(
                f"{number} of {len(records)} examples have a label that no training example has, such as {first!r}: "
                "it cannot be predicted and counts as missed"
            )
        labels = {label for record in records for label in record.labels or ()}
        if not self._several and len(labels) == 1 and len(records) > 1:
            (label,) = labels
            notes.append(
                f"all {len(records)} examples have the label {label!r}: the area under the ROC curve is undefined"
            )
        if number := sum(not record.text for record in records):
            notes.append(
                f"{number} of {len(records)} examples have no text: the model reads {self.config.empty_text!r}"
            )
        return notes

    def submission(self, predictions: Sequence[Prediction]) -> str:
        """CSV with a header: id,proba,label for one of two labels, where proba is the probability of the second
        (Hateful Memes); otherwise id,label, several labels joined by "|"."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        listed = list(self.answers)
        if self._several or len(listed) != 2:
            table.writerow(("id", "label"))
            table.writerows((prediction.id, prediction.value) for prediction in predictions)
        else:
            table.writerow(("id", "proba", "label"))
            table.writerows(
                (prediction.id, f"{dict(prediction.top)[listed[1]]:.6f}", prediction.value)
                for prediction in predictions
            )
        return text.getvalue()

    def details(self, predictions: Sequence[Prediction], records: Sequence[LabelledText]) -> list[dict[str, Any]]:
        """One row per example; `type` is its label, or "several"."""
        rows = []
        for prediction, record in by_id(predictions, records):
            truth = None if record.labels is None else SEPARATOR.join(record.labels)
            right = set(record.labels or ()) == set(filter(None, self._split(prediction.value)))
            text = f"{record.text} / {record.second}" if record.second else record.text
            rows.append(
                detail_row(
                    replace(prediction, top=prediction.top[:TOP]),
                    record,
                    text=text,
                    kind="several" if self._several else truth or "",
                    truth=truth,
                    score=None if truth is None else float(right),
                )
            )
        return rows

    def baselines(
        self, train: Sequence[LabelledText], records: Sequence[LabelledText]
    ) -> Mapping[str, list[Prediction]]:
        """The most frequent label of the training examples or, of several, those that reach the threshold there."""
        counts = Counter(label for record in train for label in _labels_of(record))
        shares = [counts[label] / len(train) for label in self.answers]
        return {"majority label": [self._predict(record, shares) for record in records]}

    def state(self) -> dict[str, Any]:
        """Settings and labels in the order of the head's outputs."""
        return {
            **super().state(), "answers": list(self.answers), "several": self._several,
            "weights": None if self._weights is None else list(self._weights),
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The task of a saved model, with its own labels."""
        if not isinstance(state.get("answers"), list):
            raise ConfigError(
                "the saved state of a classification lists its labels under 'answers'; found none. "
                "Is answers.json of another task?"
            )
        settings = {
            key: value for key, value in state.get("config", {}).items() if key != "labels"
        }  # the file may be gone; its labels are here
        return cls(
            configs.from_dict(ClassificationConfig, settings),
            state["answers"],
            several=bool(state.get("several")),
            weights=state.get("weights"),
        )


def _labels_of(record: LabelledText) -> tuple[str, ...]:
    """Labels of an example.

    Raises:
        DataError: it has none.
    """
    if record.labels is None:
        raise DataError(f"{record.id} has no label, so nothing can be learned or scored. Use a labelled split.")
    return record.labels


def _flag(labels: Sequence[str], given: Sequence[Sequence[str]]) -> Flags:
    """(N, L) which labels each example has."""
    flags = np.zeros((len(given), len(labels)), np.bool_)
    index = {label: number for number, label in enumerate(labels)}
    for row, some in enumerate(given):
        flags[row, [index[label] for label in some if label]] = True
    return flags


TASK = Classification
