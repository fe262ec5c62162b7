"""Lists of answers: of released classifiers, and of the answer head of pre-training.

A list stored with the weights lets the answer head of a task start from that of pre-training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from visling import models
from visling.data.answer_table import table_rows
from visling.data.answers import UNKNOWN, AnswerVocabulary
from visling.errors import CheckpointError
from visling.models import head_styles
from visling.models.base import AnswerList
from visling.models.task_model import TaskModel
from visling.nn.head_blocks import NormedClassifier
from visling.nn.heads import build
from visling.objectives.base import Objective
from visling.pretrained.folder import ModelFolder, load_part
from visling.types import Dims, Head

_HEAD = "objectives.image_qa.head"
"""Path of the head's weights in a model folder."""


def save_answers(path: Path, answers: AnswerVocabulary, place: str = _HEAD) -> None:
    """Write the answers of a head that belongs to no task into a model folder, next to those of its task.

    Args:
        place: path of the head's weights in the folder.
    """
    file = path / "answers.json"
    state = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    state = (
        {"answers": list(answers)}
        if place == _HEAD and not state
        else {**state, "others": {**state.get("others", {}), place: list(answers)}}
    )
    file.write_text(json.dumps(state) + "\n", encoding="utf-8")


def table_of(saved: ModelFolder) -> AnswerVocabulary:
    """The answers of a pre-trained model's head, in the order of its outputs.

    Raises:
        CheckpointError: the model has no such head, no table is known, or the table is of another size.
    """
    outputs = [tensor.shape[0] for name, tensor in saved.weights.items() if name == f"{_HEAD}.linear.bias"]
    if not outputs:
        raise CheckpointError(
            f"{saved.path} was not trained to answer questions: its pre-training had no objective image_qa."
        )
    listed = _listed(saved)
    if listed is None:
        raise CheckpointError(
            f"{saved.path} does not say which answers its {outputs[0]} outputs stand for: convert it with --answers "
            "all_ans.json of its release."
        )
    if len(listed) != outputs[0]:
        raise CheckpointError(
            f"the answer table does not belong to {saved.path}: found {len(listed)} answers for {outputs[0]} outputs. "
            "Each output stands for one answer of its own table."
        )
    return AnswerVocabulary(listed)


def _listed(saved: ModelFolder) -> Sequence[str] | None:
    """The head's answers in answers.json, where they are listed under the head's path if the task has answers too."""
    own = saved.state.get("answers") if saved.task is None else None
    found: Sequence[str] | None = saved.state.get("others", {}).get(_HEAD, own)
    return found


def carry_over(model: TaskModel, saved: ModelFolder, answers: Sequence[str]) -> str:
    """Start a task's answer head from that of pre-training, in the families whose release does so. Returns a note for
    the log, empty if nothing was done.

    Hidden layer and norm are copied; each answer takes the output of the same answer, or zeros if pre-training did not
    have it (LXMERT release).

    Args:
        saved: the pre-trained model.
        answers: the task's, in the order of its outputs.
    """
    head = dict(model.heads.items()).get("classify")
    learnt = models.spec(saved.model).carries_answers and f"{_HEAD}.linear.bias" in saved.weights
    if not learnt or not answers or not isinstance(head, NormedClassifier):
        return ""
    return _start(head, model.encoder.dims, saved, answers)


def continue_task_head(
    model: TaskModel, saved: ModelFolder, task: str, answers: AnswerVocabulary, *, given: bool
) -> str:
    """Start a task's answer head from that of a model which was fine-tuned on the same task with the same answers.
    Returns a note for the log, empty if `saved` has no such head.

    Args:
        answers: the task's, in the order of its outputs.
        given: whether they are a list that was named, not counted among the training examples.
    Raises:
        CheckpointError: the list that was named is not that of the model.
    """
    listed, head = saved.state.get("answers"), dict(model.heads.items()).get("classify")
    if saved.task != task or not listed or head is None:
        return ""
    known, count = AnswerVocabulary(listed), f"{len(answers)} answer{'s' if len(answers) > 1 else ''}"
    if known.fingerprint != answers.fingerprint:
        other = f"{len(known)} (fingerprint {known.fingerprint[:8]}, first {known[0]!r})"
        if given:
            raise CheckpointError(
                f"the list of {count} (fingerprint {answers.fingerprint[:8]}, first {answers[0]!r}) does not belong "
                f"to {saved.path}, which gives {other}. Name its own list, or train a new answer head with --set "
                "carry_answers=false."
            )
        return f"the answer head is randomly initialised: it gives {count}, {saved.path} {other}"
    shapes = {name: tensor.shape for name, tensor in head.state_dict().items()}
    prefix = "heads.classify."
    if shapes != {
        name.removeprefix(prefix): tensor.shape for name, tensor in saved.weights.items() if name.startswith(prefix)
    }:
        return f"the answer head is randomly initialised: {saved.path} has one of another layout"
    load_part(head, saved.weights, prefix, saved.path)
    return f"the answer head starts from that of {saved.path}, with the same {count}"


def continue_head(objective: Objective, dims: Dims, saved: ModelFolder, answers: Sequence[str]) -> str:
    """Start the answer head of a pre-training from that of an earlier one, answer by answer. Returns a note for the
    log, empty if there was none.

    Two tables of one size may hold different answers, or the same in another order: weights that fit by shape alone
    would be read with the wrong table.

    Args:
        answers: the table of this pre-training.
    """
    if f"{_HEAD}.linear.bias" not in saved.weights or not isinstance(objective.head, NormedClassifier):
        return ""
    return _start(objective.head, dims, saved, answers)


def _start(head: NormedClassifier, dims: Dims, saved: ModelFolder, answers: Sequence[str]) -> str:
    if _listed(saved) is None:
        return (
            "the answer head is randomly initialised: the pre-trained model does not say which answers its outputs "
            "stand for (visling convert --answers all_ans.json)"
        )
    table = table_of(saved)
    trained = build(Head(kind="classify", outputs=len(table)), dims, style=head_styles(saved.model)["classify"])
    load_part(trained, saved.weights, f"{_HEAD}.", saved.path)
    assert isinstance(trained, NormedClassifier)
    rows = table_rows(answers, list(table))
    head.start_from(trained, rows)
    carried = sum(row is not None for row in rows)
    return f"the answer head starts from that of pre-training: {carried} of {len(rows)} answers carried over"


_VQA_ANSWERS = 3129

ANSWER_TASKS = {_VQA_ANSWERS: "vqa", 1842: "gqa", 1533: "gqa"}
"""Outputs of a released classifier -> its task."""


def why_not_of(known: AnswerList, listed: AnswerVocabulary) -> str:
    """Why a list cannot be that of a release; empty if nothing rules it out."""
    at = listed.unknown
    if len(listed) == _VQA_ANSWERS and known.unknown != "anywhere":
        if known.unknown == "first" and at != 0:
            return f"{UNKNOWN} must be the first answer, and {'is missing' if at is None else f'is number {at}'}"
        if (at is None) != (known.unknown == "absent"):
            return f"it {'lacks' if at is None else 'holds'} {UNKNOWN}"
    if known.fingerprints.get(len(listed), listed.fingerprint) != listed.fingerprint:
        return f"the answers or their order differ (the first are {', '.join(map(repr, listed.answers[:3]))})"
    return ""
