"""What a recipe of several tasks returns: an encoder that is trained on all in turn, and the numbers of each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from visling.errors import ConfigError
from visling.models import encoder_config
from visling.recipes.configs import FinetuneConfig
from visling.train.config import TrainConfig
from visling.train.multitask import StopAndGo


@dataclass(frozen=True, kw_only=True)
class JointTask:
    """One of the tasks that a model is trained on in turn."""

    task: str
    """A module of `visling.tasks`, or a dotted path."""
    task_settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the task that differ from its defaults."""
    folder: str = "."
    """Sub-folder of the annotations that all tasks have in common; not read where the task is given a folder of its
    own."""
    shares: str | None = None
    """Tasks with the same name here have one head in common for each head of the same name; None = heads of its own."""
    task_token: int | None = None
    """Number of the task among the model's task tokens; None for a model without them."""
    batch_size: int = 128
    """Examples per update and process."""
    max_tokens: int | None = None
    """Longest text row; None = that of the encoder."""
    max_regions: int | None = None
    """Regions used per image; None = those of the encoder."""
    loss_scale: float = 1.0
    """What its loss is multiplied by (ViLBERT's releases: the rate of the task over the smallest of all tasks, which is
    the rate of the run)."""
    epochs: int = 20
    """Passes over its examples if it were trained alone: the task with most updates by this count sets the length of
    the run, and the others begin their examples again."""
    train_split: str = "train"
    """One split, or several joined by "+"."""
    valid_split: str = "val"
    train_limit: int | None = None
    """Use only the first so many training examples (in a random order of the run's seed)."""
    valid_images: int | None = None
    """Validate on the examples of the first so many images only: a task that ranks scores all pairs of them."""
    without_images: Path | None = None
    """List of images that are left out of its training because other tasks test on them."""
    metric: str | None = None
    """Validation score that decides when the task pauses and which of its models is the best; None = the task's
    own."""

    def __post_init__(self) -> None:
        if not self.loss_scale > 0:
            raise ConfigError(f"loss_scale must be more than 0; found {self.loss_scale}. To drop a task take it out.")
        if self.epochs < 1:
            raise ConfigError(f"a task has 1 epoch or more; found {self.epochs}.")


@dataclass(frozen=True, kw_only=True)
class MultitaskConfig:
    """One run that trains an encoder on several tasks; saved in run.json."""

    recipe: str
    model: str
    """Family."""
    encoder: Any
    """The family's config; what a task reads of text and image is set per task."""
    any_features: bool = False
    """Whether the encoder's feature width follows the region stores; a published run reads features of one width."""
    tasks: Mapping[str, JointTask]
    """Name -> task, in the order in which an iteration visits them. Names are those of folders and heads."""
    multiplier: float = 1.0
    """What the length of the run is multiplied by (release: `train_iter_multiplier`)."""
    stop_and_go: StopAndGo | None = field(default_factory=StopAndGo)
    """When a task pauses; None = never, and all tasks are validated after each epoch of the run."""
    sort_by_length: int = 1
    """As in `FinetuneConfig`."""
    start: str = "random"
    """What the weights start from: random (initialisation), released text weights (bert-base-uncased), or the recipe
    whose model `--init` names."""
    from_init: Mapping[str, Any] | None = None
    """As in `FinetuneConfig`."""
    release_start: bool = True
    """As in `FinetuneConfig`."""
    carry_answers: bool = True
    """As in `FinetuneConfig`."""
    train: TrainConfig
    """How long and how. `train.epochs` are parts of equal length into which the run is cut: drops and resets count
    them. `train.max_steps` ends a run with `stop_and_go` early, without a change of its schedule. `train.metric` is
    "mean", of the tasks' latest scores."""
    paper: Mapping[str, Any] = field(default_factory=dict)
    """Setting (dotted) or topic -> what the paper has instead, where it is known."""
    release: Mapping[str, Any] = field(default_factory=dict)
    """Setting (dotted) or topic -> what the released code has instead."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder", encoder_config(self.model, self.encoder))
        if not self.tasks:
            raise ConfigError("a run of several tasks needs at least one: tasks is empty.")
        if not self.multiplier > 0:
            raise ConfigError(f"multiplier must be more than 0; found {self.multiplier}.")
        for name in self.tasks:
            if not re.fullmatch(r"[A-Za-z0-9_+-]+", name):
                raise ConfigError(
                    f"a task cannot be called {name!r}: its name is that of a folder and of heads. Use letters, "
                    "digits, _, + and -."
                )
            self.finetuning(name)  # whose settings check each other
        self._check_tokens()
        self._check_training()

    def _check_tokens(self) -> None:
        owners: dict[int, str] = {}
        for name, task in self.tasks.items():
            if task.task_token is None:
                continue
            if (other := owners.setdefault(task.task_token, name)) != name:
                raise ConfigError(
                    f"the tasks {other} and {name} have the same task token, {task.task_token}: the model could not "
                    f"tell them apart. Give one of them another number: --set tasks.{name}.task_token=N."
                )

    def _check_training(self) -> None:
        train = self.train
        refused = {
            "train.accumulation": (train.accumulation != 1, "every task makes updates of its own: use 1"),
            "train.seconds": (train.seconds is not None, "the length is that of the longest task: use multiplier"),
            "train.average": (train.average is not None, "scores of one model decide whose turn it is: leave it out"),
            "train.keep": ("epochs" in train.keep, "models after every epoch are not kept: use best and last"),
            "train.validate_every": (
                (train.validate_every, train.validate_unit) != (1, "epochs"),
                "a task is validated when its own epoch is complete: leave it out",
            ),
            "train.metric": (train.metric != "mean", 'the score of the whole run is the mean over tasks: use "mean"'),
            "train.direction": (train.direction != "max", "higher means are better: use max"),
            "train.patience": (
                train.patience is not None and self.stop_and_go is not None,
                "a task that has stopped improving pauses by itself: leave it out, or use stop_and_go=none",
            ),
            "train.optim.drop_epochs": (
                bool(train.optim.drop_epochs) and self.stop_and_go is not None,
                "a run with stop_and_go does not know its number of updates: use a schedule, or stop_and_go=none",
            ),
        }
        if found := [f"{name}: {mend}" for name, (wrong, mend) in refused.items() if wrong]:
            raise ConfigError(f"a run of several tasks cannot have these settings. {'. '.join(found)}.")

    def head_name(self, name: str, own: str) -> str:
        """Name in the joint model of a task's head."""
        return f"{self.tasks[name].shares or name}_{own}"

    def finetuning(self, name: str) -> FinetuneConfig:
        """What it takes to train one of the tasks alone, with its part of the numbers."""
        task = self.tasks[name]
        changes = {"max_tokens": task.max_tokens, "max_regions": task.max_regions}
        return FinetuneConfig(
            recipe=self.recipe,
            model=self.model,
            encoder=replace(self.encoder, **{key: value for key, value in changes.items() if value is not None}),
            any_features=self.any_features,
            task=task.task,
            task_settings=task.task_settings,
            task_token=task.task_token,
            batch_size=task.batch_size,
            sort_by_length=self.sort_by_length,
            train_split=task.train_split,
            valid_split=task.valid_split,
            train_limit=task.train_limit,
            valid_images=task.valid_images,
            without_images=task.without_images,
            start=self.start,
            release_start=self.release_start,
            carry_answers=self.carry_answers,
            train=self.train,
        )
