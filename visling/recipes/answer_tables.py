"""The answer table of a pre-trained model: kept beside its weights, so that the head of a task can start from the head of pre-training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from visling import runtime
from visling.data.answer_table import table_rows
from visling.data.answers import AnswerVocabulary
from visling.errors import CheckpointError, RunError
from visling.nn import heads
from visling.recipes import assembly
from visling.recipes.assembly import Saved, TaskModel
from visling.train.state import RunFolder
from visling.types import Head

_HEAD = "objectives.image_qa.head"
"""Where the weights of the head lie in a model folder."""

_CARRIED_BY = frozenset({"lxmert", "cvlp"})
"""Families whose release starts the answer head of a task from that of pre-training (LXMERT, `load_lxmert_qa`; CVLP uses the same)."""


def save(path: Path, answers: AnswerVocabulary) -> None:
    """Write the table into a model folder."""
    (path / "answers.json").write_text(json.dumps({"answers": list(answers)}) + "\n", encoding="utf-8")


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


def table_of(saved: Saved, file: AnswerVocabulary | None = None) -> AnswerVocabulary:
    """The answers of a pre-trained model's head, in the order of its outputs.

    Args:
        file: the table of a release, whose weights say nothing of their answers.
    Raises:
        CheckpointError: the model has no such head, no table is known, or the table is not the one it was trained on.
    """
    outputs = [tensor.shape[0] for name, tensor in saved.weights.items() if name == f"{_HEAD}.linear.bias"]
    if not outputs:
        raise CheckpointError(f"{saved.path} has not learnt to answer questions: its pre-training had no objective image_qa.")
    own = AnswerVocabulary(saved.state["answers"]) if "answers" in saved.state else None
    table = own or file
    if table is None:
        raise CheckpointError(
            f"{saved.path} does not say which answers its {outputs[0]} outputs stand for: give its table (all_ans.json of its release)."
        )
    if len(table) != outputs[0] or (file is not None and table != file):
        found = (
            f"{len(table if file is None else file)} answers for {outputs[0]} outputs" if file is None or len(file) != outputs[0] else "another order"
        )
        raise CheckpointError(f"the answer table does not belong to {saved.path}: found {found}. Each output stands for one answer of its own table.")
    return table


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
    if "answers" not in saved.state:
        return "the answer head starts from fresh weights: the pre-trained model does not say which answers its outputs stand for"
    table = table_of(saved)
    trained = heads.build(Head(kind="classify", outputs=len(table)), model.encoder.dims, style=assembly.head_styles(saved.model)["classify"])
    assembly.load_part(trained, saved.weights, f"{_HEAD}.", saved.path)
    assert isinstance(trained, heads.NormedClassifier)
    rows = table_rows(answers, list(table))
    head.start_from(trained, rows)
    return f"the answer head starts from that of pre-training: {sum(row is not None for row in rows)} of {len(rows)} answers carried over"
