"""How often a model in pre-training answers the questions of its validation corpora correctly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from visling import runtime
from visling.data.annotations.lxmert import LxmertRecord
from visling.data.answer_table import listed
from visling.data.answers import AnswerVocabulary
from visling.data.batches.examples import Source
from visling.data.batches.loader import Loader
from visling.data.corpora.mixture import Mixture
from visling.draws import KeyedDraws, Stream
from visling.errors import RunError
from visling.metrics.answers import source_scores
from visling.objectives.image_qa import ImageQA
from visling.train.exchange import gather
from visling.train.state import RunFolder
from visling.types import Batch, Targets


def record_answers(folder: RunFolder, answers: AnswerVocabulary) -> None:
    """Write the table's digest into run.json.

    Raises:
        RunError: the run was started with another table.
    """
    known = folder.read().get("answers") if runtime.is_main() else None
    if known not in (None, answers.fingerprint):
        raise RunError(
            f"{folder.path} was started with another answer table: the answers of the data, or their order, have "
            "changed since then. Resume with the same data, or use another --out."
        )
    folder.record({"answers": answers.fingerprint})


class AnsweredQuestions:
    """The batches of a validation; the model's answers to them are scored per data set.

    Used as a context manager around the passes of the model. A question whose sentence was replaced by one of
    another image is not scored; the release scores its answer as if it had been asked.

    Args:
        objective: image_qa.
        batches: examples of `source`, a mixture of annotated sources.
        table: answers in the order of the head's outputs.
    """

    def __init__(self, objective: nn.Module, batches: Loader, source: Source, table: AnswerVocabulary) -> None:
        assert isinstance(objective, ImageQA)
        assert isinstance(source, Mixture)
        self._head, self._batches, self._source, self._table = objective.head, batches, source, table
        self._numbers: list[tuple[int, bool]] = []
        self._answers: list[Tensor] = []

    def __enter__(self) -> Self:
        self._numbers, self._answers = [], []
        self._handle = self._head.register_forward_hook(self._note_answers)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def __iter__(self) -> Iterator[tuple[Batch, Targets]]:
        for numbers, batch, targets in self._batches.batches_with_index():
            replaced = [False] * len(numbers) if targets.matched is None else (targets.matched == 0).tolist()
            self._numbers += zip(numbers.tolist(), replaced, strict=True)
            yield batch, targets

    def scores(self) -> dict[str, float]:
        """Mean score of the answers of all processes, and that of each data set; nothing if no question was asked."""
        answers = torch.cat(self._answers).tolist() if self._answers else []
        own = [(number, answer) for (number, wrong), answer in zip(self._numbers, answers, strict=True) if not wrong]
        asked = sorted(item for process in gather(own) for item in process)
        draws = KeyedDraws(self._batches.seed, self._batches.epoch, [number for number, _ in asked])
        rngs = draws.each(Stream.EXAMPLE)
        scores = source_scores(
            (self._table[answer], replace(record, scores=listed(record.scores, self._table)))
            for (number, answer), rng in zip(asked, rngs, strict=True)
            # What an example was made from: its annotation, if that is a question with answers.
            if isinstance(record := self._source.record(number, rng), LxmertRecord) and record.scores is not None
        )
        by_source = {f"image_qa_score_{source}": score.value for source, score in scores.sources.items()}
        return {"image_qa_score": scores.overall.value, **by_source} if by_source else {}

    def _note_answers(self, head: nn.Module, states: Any, logits: Tensor) -> None:
        self._answers.append(logits.argmax(-1))
