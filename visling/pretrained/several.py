"""What a fine-tuning takes from a model that was trained on several tasks: the number and the heads of its own."""

from __future__ import annotations

from typing import Any

from visling import config as configs
from visling.errors import ConfigError
from visling.models.task_model import TaskModel
from visling.pretrained.folder import ModelFolder, load_part
from visling.tasks.base import Task
from visling.tasks.base import load as load_task


def find_token(saved: ModelFolder, task: Task[Any, Any]) -> int | None:
    """Number of a task among the task tokens of a model; None where the model was not trained on it.

    Of several variants of the task (RefCOCO, RefCOCO+) it is the one with the same settings.

    Raises:
        ConfigError: there are several, and none has the same settings.
    """
    if not saved.tasks:
        return saved.task_token if saved.task == task.name else None
    variants = _list_variants(saved, task)
    same = [name for name in variants if saved.state["tasks"][name].get("config") == configs.to_dict(task.config)]
    numbers = {name: saved.tasks[name].task_token for name in same or variants}
    if len(set(numbers.values())) > 1:
        listed = ", ".join(f"{number} ({name})" for name, number in numbers.items())
        raise ConfigError(
            f"{saved.path} was trained on several variants of {task.name}. Say whose token the texts carry: "
            f"--set task_token=N, one of {listed}."
        )
    return next(iter(numbers.values()), None)


def continue_heads(model: TaskModel, task: Task[Any, Any], saved: ModelFolder, token: int | None) -> list[str]:
    """Start the heads of a task from those that a model of several tasks has for it. Returns notes for the log.

    Args:
        token: number of the task; it chooses among variants that do not share a head.
    """
    variants = _list_variants(saved, task)
    name = next((one for one in variants if saved.tasks[one].task_token == token), next(iter(variants), None))
    if name is None:
        return [f"the heads are randomly initialised: {saved.path} was not trained on {task.name}"]
    known, notes = saved.tasks[name], []
    trained = load_task(known.task).from_state(saved.state["tasks"][name])
    if task.answers is not None and list(task.answers) != list(trained.answers or ()):
        return [f"the heads are randomly initialised: those of {name} in {saved.path} have other answers"]
    for own, head in model.heads.items():
        prefix = f"heads.{known.heads[own]}." if own in known.heads else None
        if prefix is None:
            notes.append(f"the head {own} is randomly initialised: {name} in {saved.path} has none")
            continue
        load_part(head, saved.weights, prefix, saved.path)
        sharing = [other for other, task_ in saved.tasks.items() if known.heads[own] in task_.heads.values()]
        notes.append(f"the head {own} starts from that of {', '.join(sharing)} in {saved.path}")
    return notes


def _list_variants(saved: ModelFolder, task: Task[Any, Any]) -> list[str]:
    """Names of the model's tasks that are this task, whatever their settings."""
    return [name for name, known in saved.tasks.items() if known.task == task.name]
