"""What tasks that choose among listed answers share: the loss, decoding and rows of details.

Shapes   N examples, A answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from visling import config as configs
from visling.data.annotations.files import plain_id, read_json_lines
from visling.data.answers import AnswerVocabulary
from visling.errors import ConfigError, DataError
from visling.metrics.answers import bootstrap
from visling.tasks.base import C, R, Score, Task
from visling.types import IGNORE, Head, Loss, Prediction, Record


class AnswerTask(Task[R, C]):
    """What tasks have in common that classify an image and a question into listed answers; their settings have
    `answers`, the file that lists them, and `min_count`, by which they are listed without a file."""

    def __init__(self, config: C | None = None, answers: AnswerVocabulary | None = None) -> None:
        super().__init__(config)
        file = getattr(self.config, "answers")  # noqa: B009  (C is any settings class with this field)
        self._answers = AnswerVocabulary.load(file) if answers is None and file is not None else answers

    @property
    def answers(self) -> AnswerVocabulary:
        """The answers, by index.

        Raises:
            ConfigError: not known yet.
        """
        if self._answers is None:
            raise ConfigError(
                "the answer vocabulary is not known yet: call setup(training records), or name a file in "
                f"{self.settings.__name__}.answers."
            )
        return self._answers

    @staticmethod
    def least_count(min_count: int | None) -> int:
        """The setting `min_count`, where no file lists the answers.

        Raises:
            ConfigError: it is None.
        """
        if min_count is None:
            raise ConfigError(
                "the answers are neither given nor to be counted: name their file in task_settings.answers, or set "
                "task_settings.min_count."
            )
        return min_count

    @property
    def heads(self) -> Mapping[str, Head]:
        """One classification over the answers."""
        return {"classify": Head(kind="classify", outputs=len(self.answers))}

    def state(self) -> dict[str, Any]:
        """Settings and answers in the order of the head's outputs."""
        return {**super().state(), "answers": list(self.answers)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The task of a saved model, with its own answers."""
        if not isinstance(state.get("answers"), list):
            raise ConfigError(
                f"the saved state of a {cls.name.upper()} task lists its answers under 'answers'; found none. "
                "Is answers.json of another task?"
            )
        # The file of answers may be gone; what it held is here.
        settings = {key: value for key, value in state.get("config", {}).items() if key != "answers"}
        return cls(configs.from_dict(cls.settings, settings), AnswerVocabulary(state["answers"]))


def classification_loss(logits: Tensor, labels: Tensor, name: str = "answer") -> Loss:
    """Cross-entropy averaged over examples, in float32; part "{name}_accuracy" is the share of correct answers.

    Args:
        logits: (N, A).
        labels: (N,) int64.
    """
    scores = logits.float()
    loss = Loss.mean(name, F.cross_entropy(scores, labels, reduction="none"))
    hits = (scores.detach().argmax(1) == labels).sum()
    return loss.reporting({f"{name}_accuracy": (hits, loss.parts[name][1])})


def answer_loss(logits: Tensor, scores: Tensor, kind: Literal["kl", "bce", "mce"]) -> Loss:
    """Loss of soft answer scores, averaged over examples, in float32.

    Args:
        logits: (N, A).
        scores: (N, A) in [0, 1]; rows need not sum to one.
        kind: "kl": sum of s (log s - log softmax), as `kl_div(reduction="batchmean")`; "bce": binary cross-entropy
            summed over the answers; "mce": cross-entropy of the best answer, times A; where all scores are 0, the first
            answer is the best.
    """
    logits, scores = logits.float(), scores.float()
    if kind == "kl":
        values = F.kl_div(logits.log_softmax(1), scores, reduction="none").sum(1)
    elif kind == "mce":
        values = F.cross_entropy(logits, scores.argmax(1), reduction="none") * scores.shape[1]
    else:
        values = F.binary_cross_entropy_with_logits(logits, scores, reduction="none").sum(1)
    loss = Loss.mean("answer", values)
    reached = scores.gather(1, logits.detach().argmax(1, keepdim=True)).sum()
    return loss.reporting({"answer_accuracy": (reached, loss.parts["answer"][1])})


def sigmoid_loss(scores: Tensor, choice: Tensor, positive_weight: float = 1.0) -> Loss:
    """Binary cross-entropy of each choice, averaged by weight over all choices of all examples; part "answer_accuracy"
    is the share of correct best choices.

    Args:
        scores: (N, G) float32.
        choice: (N,) int64.
        positive_weight: of the right choice; the others have 1.
    Source:
        VL-BERT release, `resnet_vlbert_for_vcr.py`, `CLASSIFIER_SIGMOID`.
    """
    wanted = F.one_hot(choice, scores.shape[1]).to(scores.dtype)
    weights = _weigh_choices(wanted, positive_weight)
    total = F.binary_cross_entropy_with_logits(scores, wanted, weights, reduction="sum")
    hits = (scores.detach().argmax(1) == choice).sum()
    loss = Loss.ratio("answer", total, weights.sum())
    return loss.reporting({"answer_accuracy": (hits, count_rows(choice))})


def choice_loss(
    scores: Tensor, choice: Tensor, kind: Literal["softmax", "sigmoid"] | None, positive_weight: float = 1.0
) -> Loss:
    """Loss of a choice among (N, G) scores: `sigmoid_loss`, or unless it is asked for `classification_loss`."""
    if kind == "sigmoid":
        return sigmoid_loss(scores, choice, positive_weight)
    return classification_loss(scores, choice)


def count_choices(
    choice: Tensor, choices: int, kind: Literal["softmax", "sigmoid"] | None, positive_weight: float = 1.0
) -> Tensor:
    """What `choice_loss` divides by.

    Args:
        choices: G.
    """
    if kind == "sigmoid":
        return _weigh_choices(F.one_hot(choice, choices).float(), positive_weight).sum()
    return count_rows(choice)


def _weigh_choices(wanted: Tensor, positive_weight: float) -> Tensor:
    return 1 + (positive_weight - 1) * wanted


def count_rows(values: Tensor) -> Tensor:
    """Length of the first dimension, as a scalar tensor that is filled on the device."""
    return torch.full((), len(values), device=values.device)


def class_loss(logits: Tensor, classes: Tensor) -> Loss:
    """Cross-entropy of the classes of all regions of all rows; a last region without a target is the whole image,
    class 0.

    Args:
        logits: (B, R, C) or (B, R+1, C).
        classes: (B, R) int64, IGNORE = not counted.
    Source:
        VL-BERT release, `cnn_loss_reg`.
    """
    if logits.shape[1] > classes.shape[1]:
        classes = _add_whole(classes)
    values = F.cross_entropy(logits.float().transpose(1, 2), classes, reduction="none", ignore_index=IGNORE)
    return Loss.mean("object_classes", values, classes != IGNORE)


def count_classes(classes: Tensor, *, whole: bool) -> Tensor:
    """What `class_loss` divides by.

    Args:
        whole: whether the logits have the whole image's.
    """
    return ((_add_whole(classes) if whole else classes) != IGNORE).sum()


def _add_whole(classes: Tensor) -> Tensor:
    return F.pad(classes, (0, 1))


def true_or_false(logits: Tensor, records: Sequence[Record], labels: tuple[str, str]) -> list[Prediction]:
    """The more probable of two labels, the second of which means true; an exact tie is the first.

    Args:
        logits: (N, 2).
        labels: what the benchmark writes for false and true.
    """
    predictions = []
    for record, (false, true) in zip(records, logits.detach().double().softmax(1).tolist(), strict=True):
        top = sorted(zip(labels, (false, true), strict=True), key=lambda pair: -pair[1])
        predictions.append(Prediction(id=record.id, value=top[0][0], confidence=top[0][1], top=tuple(top)))
    return predictions


def top_answers(
    probabilities: Tensor, records: Sequence[Record], answers: Sequence[str], *, most: int
) -> list[Prediction]:
    """The most probable answers, best first.

    Args:
        probabilities: (N, A) on the CPU.
        most: candidates kept per prediction.
    """
    best = probabilities.topk(min(most, len(answers)), dim=1)
    predictions = []
    for record, indices, values in zip(records, best.indices.tolist(), best.values.tolist(), strict=True):
        top = tuple((answers[index], value) for index, value in zip(indices, values, strict=True))
        predictions.append(Prediction(id=record.id, value=top[0][0], confidence=top[0][1], top=top))
    return predictions


def majority_label(
    train: Sequence[bool | None], records: Sequence[Record], labels: tuple[str, str]
) -> list[Prediction]:
    """Baseline that looks at nothing: the more frequent of two labels of the training records, for every record."""
    share = sum(bool(label) for label in train) / max(len(train), 1)
    top = tuple(sorted(zip(labels, (1 - share, share), strict=True), key=lambda pair: -pair[1]))
    return [Prediction(id=record.id, value=top[0][0], confidence=top[0][1], top=top) for record in records]


def label_of(record: Record, label: bool | None, labels: tuple[str, str]) -> str:
    """The label of a record as the benchmark writes it.

    Raises:
        DataError: the record has none.
    """
    if label is None:
        raise DataError(f"{record.id} has no label, so nothing can be scored. Write the submission file instead.")
    return labels[label]


def detail_row(
    prediction: Prediction, record: Record, *, text: str, kind: str, truth: str | None, score: float | None
) -> dict[str, Any]:
    """A row of `details_{split}.jsonl`; `images` is there where an example has several, `image` is None for a text
    alone."""
    return {
        "id": record.id,
        "image": record.images[0] if record.images else None,
        **({"images": list(record.images)} if len(record.images) > 1 else {}),
        "text": text,
        "type": kind,
        "truth": truth,
        "prediction": prediction.value,
        "confidence": prediction.confidence,
        "top": [list(candidate) for candidate in prediction.top],
        "score": score,
    }


def read_predictions(details: Path) -> list[Prediction]:
    """The predictions that an evaluation has written into its `details_{split}.jsonl`, without boxes.

    Raises:
        DataError: the file is missing, or no such file.
    """
    predictions = []
    for number, row in read_json_lines(details):
        try:
            predictions.append(
                Prediction(
                    id=plain_id(row["id"]),
                    value=row["prediction"],
                    confidence=row["confidence"],
                    top=tuple((name, chance) for name, chance in row["top"]),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{details}, line {number} is not a row of details: {error!r}. Give a file that evaluate has written."
            ) from error
    return predictions


def mean_score(values: Sequence[float], groups: Sequence[str] | None = None, *, draws: int = 1000) -> Score:
    """Mean of fractions in percent, with its 95 % interval by the bootstrap.

    Args:
        values: at least one.
        groups: of each value, resampled whole, since examples of one image or one presentation are not independent;
            None = every value by itself.
        draws: resampled sets.
    """
    low, high = bootstrap(values, [str(number) for number in range(len(values))] if groups is None else groups, draws)
    return Score(100 * sum(values) / len(values), len(values), low=100 * low, high=100 * high)


def mean_scores(values: Sequence[float], groups: Sequence[str]) -> Mapping[str, Score]:
    """Mean of fractions per group, in percent, in alphabetical order."""
    by_group: dict[str, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        by_group[group].append(value)
    return {
        group: Score(100 * sum(members) / len(members), len(members)) for group, members in sorted(by_group.items())
    }
