"""The answer table of a pre-trained model: what it answers by it is scored in validation; kept beside the weights, it lets the head of a task start
from the head of pre-training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from visling import runtime
from visling.data.annotations.lxmert import LxmertRecord
from visling.data.answer_table import listed, table_rows
from visling.data.answers import AnswerVocabulary
from visling.data.loader import Loader, Source
from visling.data.pretraining import Mixture
from visling.errors import CheckpointError, RunError
from visling.metrics.answers import source_scores
from visling.nn import heads
from visling.objectives.base import Objective
from visling.objectives.image_qa import ImageQA
from visling.recipes import assembly
from visling.recipes.assembly import Saved, TaskModel
from visling.train.state import RunFolder
from visling.types import Batch, Dims, Head, Targets

_HEAD = "objectives.image_qa.head"
"""Where the weights of the head lie in a model folder."""

_CARRIED_BY = frozenset({"lxmert", "cvlp"})
"""Families whose release starts the answer head of a task from that of pre-training (LXMERT, `load_lxmert_qa`; CVLP uses the same)."""


def save(path: Path, answers: AnswerVocabulary, place: str = _HEAD) -> None:
    """Write the answers of a head that is no task's into a model folder, beside those of its task if it has one.

    Args:
        place: of the head's weights in the folder.
    """
    file = path / "answers.json"
    state = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    state = {"answers": list(answers)} if place == _HEAD and not state else {**state, "others": {**state.get("others", {}), place: list(answers)}}
    file.write_text(json.dumps(state) + "\n", encoding="utf-8")


def record(folder: RunFolder, answers: AnswerVocabulary) -> None:
    """Write the table's digest into run.json.

    Raises:
        RunError: the run was begun with another table.
    """
    known = folder.read().get("answers") if runtime.is_main() else None
    if known not in (None, answers.fingerprint):
        raise RunError(
            f"{folder.path} was begun with another answer table: the answers of the data, or their order, have changed since then. "
            "Resume with the same data, or use another --out."
        )
    folder.record({"answers": answers.fingerprint})


class AnsweredQuestions:
    """The batches of a validation; what the model answers while they go through it is scored data set by data set.

    Used as a context manager around the passes of the model. A question that is shown with the sentence of another image is not scored; the release
    scores its answer as if it had been asked.

    Args:
        objective: image_qa.
        batches: examples of `source`, a mixture of annotated sources.
        table: answers in the order of the head's outputs.
    """

    def __init__(self, objective: Objective, batches: Loader, source: Source, table: AnswerVocabulary) -> None:
        assert isinstance(objective, ImageQA)
        assert isinstance(source, Mixture)
        self._head, self._batches, self._source, self._table = objective.head, batches, source, table
        self._asked: list[LxmertRecord | None] = []
        self._answers: list[Tensor] = []

    def __enter__(self) -> Self:
        self._handle = self._head.register_forward_hook(self._answered)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def __iter__(self) -> Iterator[tuple[Batch, Targets]]:
        for numbers, batch, targets in self._batches.batches_with_index():
            replaced = [False] * len(numbers) if targets.matched is None else (targets.matched == 0).tolist()
            for number, wrong in zip(numbers, replaced, strict=True):
                record = self._source.record(int(number), runtime.generator_for(self._batches.seed, self._batches.epoch, int(number)))
                self._asked.append(record if isinstance(record, LxmertRecord) and not wrong else None)
            yield batch, targets

    def scores(self) -> dict[str, float]:
        """Mean score of the answers, and that of each data set; nothing if no question was asked."""
        answers = torch.cat(self._answers).tolist() if self._answers else []
        found = source_scores(
            (self._table[answer], replace(record, scores=listed(record.scores, self._table)))
            for answer, record in zip(answers, self._asked, strict=True)
            if record is not None and record.scores is not None
        )
        by_source = {f"image_qa_score_{source}": score.value for source, score in found.sources.items()}
        return {"image_qa_score": found.overall.value, **by_source} if by_source else {}

    def _answered(self, head: nn.Module, states: Any, logits: Tensor) -> None:
        self._answers.append(logits.argmax(-1))


def table_of(saved: Saved) -> AnswerVocabulary:
    """The answers of a pre-trained model's head, in the order of its outputs.

    Raises:
        CheckpointError: the model has no such head, no table is known, or the table is of another size.
    """
    outputs = [tensor.shape[0] for name, tensor in saved.weights.items() if name == f"{_HEAD}.linear.bias"]
    if not outputs:
        raise CheckpointError(f"{saved.path} has not learnt to answer questions: its pre-training had no objective image_qa.")
    listed = _listed(saved)
    if listed is None:
        raise CheckpointError(
            f"{saved.path} does not say which answers its {outputs[0]} outputs stand for: convert it with --answers all_ans.json, of its release."
        )
    if len(listed) != outputs[0]:
        raise CheckpointError(
            f"the answer table does not belong to {saved.path}: found {len(listed)} answers for {outputs[0]} outputs. Each output stands for one "
            "answer of its own table."
        )
    return AnswerVocabulary(listed)


def _listed(saved: Saved) -> Sequence[str] | None:
    """The answers of the head as answers.json has them; beside a task's answers they stand under the name of the head."""
    own = saved.state.get("answers") if saved.task is None else None
    found: Sequence[str] | None = saved.state.get("others", {}).get(_HEAD, own)
    return found


def carry_over(model: TaskModel, saved: Saved, answers: Sequence[str]) -> str:
    """Start a task's answer head from that of pre-training, in the families whose release does so; what was done, empty if nothing.

    Hidden layer and norm are taken over; each answer takes the output of the same answer, or zeros if pre-training did not know it (LXMERT release).

    Args:
        saved: the pre-trained model.
        answers: the task's, in the order of its outputs.
    """
    head = dict(model.heads.items()).get("classify")
    learnt = saved.model in _CARRIED_BY and f"{_HEAD}.linear.bias" in saved.weights
    if not learnt or not answers or not isinstance(head, heads.NormedClassifier):
        return ""
    return _start(head, model.encoder.dims, saved, answers)


def go_on(objective: Objective, dims: Dims, saved: Saved, answers: Sequence[str]) -> str:
    """Start the answer head of a pre-training from that of an earlier one, answer by answer; what was done, empty if there was none.

    Two tables of one size may hold other answers, or the same in another order: weights that fit by shape alone would answer by the wrong table.

    Args:
        answers: the table of this pre-training.
    """
    if f"{_HEAD}.linear.bias" not in saved.weights or not isinstance(objective.head, heads.NormedClassifier):
        return ""
    return _start(objective.head, dims, saved, answers)


def _start(head: heads.NormedClassifier, dims: Dims, saved: Saved, answers: Sequence[str]) -> str:
    if _listed(saved) is None:
        return (
            "the answer head starts from fresh weights: the pre-trained model does not say which answers its outputs stand for "
            "(visling convert --answers all_ans.json)"
        )
    table = table_of(saved)
    trained = heads.build(Head(kind="classify", outputs=len(table)), dims, style=assembly.head_styles(saved.model)["classify"])
    assembly.load_part(trained, saved.weights, f"{_HEAD}.", saved.path)
    assert isinstance(trained, heads.NormedClassifier)
    rows = table_rows(answers, list(table))
    head.start_from(trained, rows)
    return f"the answer head starts from that of pre-training: {sum(row is not None for row in rows)} of {len(rows)} answers carried over"
