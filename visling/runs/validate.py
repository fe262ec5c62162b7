"""Validation in pre-training: exact means of the objectives' losses, and scores of answers to questions.

Every process validates whole batches, the ones that a single process would form, and the sums are added up in the
order of the batches: scores do not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from torch import Tensor

from visling import runtime
from visling.data.answers import AnswerVocabulary
from visling.data.batches.examples import Source
from visling.data.batches.loader import Loader
from visling.objectives.base import Objective, PretrainStep
from visling.objectives.pretrain_model import PretrainModel
from visling.runs.question_scores import AnsweredQuestions
from visling.train.engine import predict
from visling.train.exchange import gather
from visling.types import Batch, Loss, Targets


class Validation:
    """Scores of a model in pre-training, by name.

    Args:
        batches: validation examples of `source`.
        weights: of the objectives in "loss".
        text: text without images, if any.
        answers: table of image_qa; None without that objective.
    """

    def __init__(
        self,
        model: PretrainModel,
        batches: Loader,
        source: Source,
        *,
        weights: Mapping[str, float],
        text: Loader | None,
        answers: AnswerVocabulary | None,
        precision: runtime.Precision,
    ) -> None:
        self._model, self._batches, self._text = model, batches, text
        self._weights, self._precision = weights, precision
        self._questions = (
            None if answers is None else AnsweredQuestions(model.objectives["image_qa"], batches, source, answers)
        )

    def __call__(self) -> Mapping[str, float]:
        """Losses and accuracies of one pass; "loss" is the weighted sum of the objectives'."""
        with self._questions or contextlib.nullcontext():
            losses = predict(
                self._model, self._questions or self._batches, model=self._model, precision=self._precision
            )
            scores = mean_over_batches(losses, self._weights)
        if self._questions is not None:
            scores |= self._questions.scores()
        if self._text is not None:
            losses = predict(self._compute_text_loss, self._text, model=self._model, precision=self._precision)
            scores = {**mean_over_batches(losses, {}), **scores}
        return scores

    def _compute_text_loss(self, batch: Batch, targets: Targets) -> Loss:
        return text_loss(self._model, batch, targets)


def text_loss(model: PretrainModel, batch: Batch, targets: Targets) -> Loss:
    """Loss of the masked words of text without images; its parts are prefixed with text_."""
    masked_lm = model.objectives["masked_lm"]
    assert isinstance(masked_lm, Objective)
    encoded = model.encoder(batch, reads=masked_lm.reads_of_encoded(batch, targets))
    loss: Loss = masked_lm(PretrainStep(model=model.encoder, batch=batch, encoded=encoded, targets=targets))
    return loss.prefixed("text_").scaled(model.weights["masked_lm"])


def count_text(model: PretrainModel, batch: Batch, targets: Targets) -> dict[str, Tensor]:
    """What the terms of `text_loss` divide by, by name."""
    masked_lm = model.objectives["masked_lm"]
    assert isinstance(masked_lm, Objective)
    return {f"text_{name}": count for name, count in masked_lm.count(batch, targets).items()}


def mean_over_batches(losses: Iterable[Loss], weights: Mapping[str, float]) -> dict[str, float]:
    """Mean of each part over the batches of all processes, and as "loss" the weighted sum of the objectives' means.

    Args:
        losses: of this process's batches; batch k of all is batch k // n of process k mod n.
    """
    own = [{name: (float(amount), float(count)) for name, (amount, count) in loss.parts.items()} for loss in losses]
    shares = gather(own)
    sums: dict[str, list[float]] = {}
    for number in range(sum(map(len, shares))):
        for name, (amount, count) in shares[number % len(shares)][number // len(shares)].items():
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += amount
            total[1] += count
    means = {name: amount / max(count, 1.0) for name, (amount, count) in sums.items() if count}
    return {"loss": sum(weight * means.get(name, 0.0) for name, weight in weights.items()), **means}
