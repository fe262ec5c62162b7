"""Training on several tasks in turn: 12-in-1, and what else is read by one encoder.

Leaves    model/ with the encoder and all heads, which `visling finetune --init` starts from; models/NAME with the best
          model of each task, a model folder of that task alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from visling import models
from visling.errors import ConfigError, DataError, StoreError, VislingError, nearest
from visling.models.task_model import JointModel
from visling.pretrained.features import check_features, start_encoder
from visling.pretrained.folder import (
    SavedTask,
    check_family,
    describe_model_folder,
    read_model_folder,
    save_model_folder,
)
from visling.recipes.changes import describe_followed
from visling.recipes.multitask_configs import MultitaskConfig
from visling.recipes.releases import describe_start
from visling.regions.store import NativeStore
from visling.runs.configure import follow_init
from visling.runs.finetune import Finetuning
from visling.runs.needed_products import are_known, task_products
from visling.runs.setup import Training, carry_out, describe_origin
from visling.tasks.base import list_images
from visling.train.layout import fit_layout
from visling.train.multitask import TurnBatches, Turns
from visling.train.parallel import Counts
from visling.train.state import RunFolder, State
from visling.train.weights import save_weights
from visling.types import Batch, Loss, Targets


@dataclass(frozen=True, kw_only=True)
class TaskPaths:
    """Folders of annotations, or region stores: one for all tasks, and those of tasks that have their own."""

    common: Path | None
    own: Mapping[str, Path]

    @classmethod
    def read(cls, given: Sequence[str], tasks: Sequence[str], option: str) -> TaskPaths:
        """From the command line: PATH for all tasks, NAME=PATH for one.

        Raises:
            ConfigError: two paths for all, or a name that no task has.
        """
        common: Path | None = None
        own: dict[str, Path] = {}
        for value in given:
            name, equals, path = value.partition("=")
            if not equals or "/" in name:
                if common is not None:
                    raise ConfigError(
                        f"{option} was given twice for all tasks: {common} and {value}. For one task: NAME=PATH."
                    )
                common = Path(value)
            elif name not in tasks:
                raise ConfigError(f"{option} {value}: the recipe has no task {name!r}. {nearest(name, tasks)}")
            else:
                own[name] = Path(path)
        return cls(common=common, own=own)

    def of(self, name: str, option: str) -> Path:
        """The path of a task.

        Raises:
            ConfigError: it has none.
        """
        found = self.own.get(name, self.common)
        if found is None:
            raise ConfigError(f"the task {name} has no {option}: give one for all tasks, or {option} {name}=PATH.")
        return found


def multitask(
    config: MultitaskConfig,
    out: Path,
    *,
    data: Sequence[str],
    store: Sequence[str],
    init: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    other_features: bool = False,
    stream: TextIO | None = None,
    log_to: Sequence[str] = (),
    command: Sequence[str] = (),
) -> State:
    """Train a model on several tasks in turn; leaves a run folder.

    Args:
        config: a recipe's, as it is or with changed settings (`runs.configure`).
        data: folder of annotations of all tasks, in which each may have a sub-folder (`JointTask.folder`); NAME=PATH
            for that of one task.
        store: region store of all images; NAME=PATH for that of one task.
        init: pre-trained model or run folder, whose encoder's settings the run has (`runs.configure`); None starts from
            scratch.
        other_features: accept that `init`, or another store, has features of another detector.
        stream: where progress is written.
        log_to: where losses and scores go in addition to `out/log.jsonl`: tensorboard, wandb, trackio.
    Returns:
        How far it came; `stopped` says why it ended.
    Raises:
        ConfigError, DataError, StoreError, RunError: see their messages; nothing is trained before all inputs have been
            checked.
    """
    run = Multitasking(config, data=data, store=store, init=init, device=device, other_features=other_features)
    return carry_out(run, out, resume=resume, stream=stream, log_to=log_to, command=command)


class Multitasking:
    """A run over several tasks that is ready to start; the arguments are those of `multitask`."""

    def __init__(
        self,
        config: MultitaskConfig,
        *,
        data: Sequence[str],
        store: Sequence[str],
        init: Path | None,
        device: str,
        other_features: bool,
    ) -> None:
        config, names = follow_init(config, init), list(config.tasks)
        folders, stores = TaskPaths.read(data, names, "--data"), TaskPaths.read(store, names, "--store")
        paths = {name: _find_folder(config, name, folders) for name in names}
        self.tasks: dict[str, Finetuning] = {}
        """Each task as a run of its own would be prepared."""
        for name in names:
            with _naming(name):
                self.tasks[name] = Finetuning(
                    config.finetuning(name),
                    data=paths[name],
                    store=stores.of(name, "--store"),
                    init=None,
                    device=device,
                    other_features=other_features,
                )
        first = next(iter(self.tasks.values()))
        self.store, self.inputs = _store_of(first), first.inputs
        self._check_stores(other_features)
        self.config = replace(config, encoder=replace(config.encoder, feature_size=self.store.feature_size))
        self.start = None if init is None else read_model_folder(init)
        self.notice = ""
        """How the features differ from those that `init` was trained on, where they only come near."""
        if self.start is not None:
            check_family(self.start, config.model)
            self.notice = check_features(self.start, self.store, override=other_features)
        self.folder: RunFolder | None = None
        """Where the best models are kept; known when the run begins."""
        self.layouts = [task.inputs.layout for task in self.tasks.values()]
        self.origin = {
            **describe_origin(data=list(dict.fromkeys(paths.values()))),
            "tasks": {
                name: {
                    **describe_origin(data=[paths[name]], task=task.config.task),
                    "store": os.path.abspath(_store_of(task).path),
                    "config": {"train_split": task.config.train_split},
                }
                for name, task in self.tasks.items()
            },
        }

    def _check_stores(self, other_features: bool) -> None:
        for name, task in self.tasks.items():
            store = _store_of(task)
            if store.feature_size != self.store.feature_size:
                raise StoreError(
                    f"{store.path}, the store of {name}, holds features of width {store.feature_size}; those of "
                    f"{self.store.path} are {self.store.feature_size} wide. One encoder reads features of one width: "
                    "extract them with one detector."
                )
            if store.fingerprint != self.store.fingerprint and not other_features:
                raise StoreError(
                    f"{store.path}, the store of {name}, holds features of another detector than {self.store.path}. "
                    "Extract them with one detector, or accept that with --other-features."
                )

    def build(self, started_by: int | None = None) -> Training:
        """The model, the batches of all tasks and their validation."""
        config, tasks = self.config, self.tasks
        model, notes = self._build_model()
        asked = {name: task.fit_batch(started_by)[0] for name, task in tasks.items()}
        sizes, accumulation = fit_layout(asked, config.train.accumulation, started_by)
        loaders = {name: task.load_batches(sizes[name], accumulation) for name, task in tasks.items()}
        turns = self._plan_turns({name: len(loader) // accumulation for name, loader in loaders.items()})

        def step(batch: Batch, labelled: tuple[str, Targets]) -> Loss:
            name, targets = labelled
            loss = tasks[name].task.loss(model.of_task(name)(batch), targets)
            return loss.prefixed(f"{name}.").scaled(config.tasks[name].loss_scale)

        def count(batch: Batch, labelled: tuple[str, Targets]) -> Counts:
            name, targets = labelled
            counts = tasks[name].task.count(targets, whole=model.of_task(name).shows_whole)
            return {f"{name}.{term}": number for term, number in counts.items()}

        def record(folder: RunFolder) -> None:
            self.folder = folder
            counts = {
                name: {"train": len(task.train_records), "valid": len(task.valid_records)}
                for name, task in tasks.items()
            }
            folder.record({"examples": counts})

        return Training(
            model=model,
            step=step,
            batches=TurnBatches(loaders, turns, accumulation),
            batch_sizes=sizes,
            accumulation=accumulation,
            validate=lambda: self._validate(model, turns),
            save=lambda path: self._save(path, model),
            record=record,
            notes=[
                *filter(None, [self.notice]),
                *notes,
                *(f"{name}: {note}" for name, task in tasks.items() for note in task.describe_examples(started_by)),
            ],
            pace=None if config.stop_and_go is None else turns,
            variant=lambda: None,  # the task is part of the batch
            count=count,
            products=(lambda item: task_products(model.of_task(item[1][0]), item[0]).step.total)
            if are_known(config.encoder)
            else None,
        )

    def _build_model(self) -> tuple[JointModel, list[str]]:
        """The model with its initial weights, and notes on its heads."""
        config, tasks = self.config, self.tasks
        self._check_answers()
        encoder = models.build(config.model, config.encoder)
        started = start_encoder(encoder, self.start, self.store, self._list_images())
        model = JointModel(
            encoder,
            {name: (task.task.heads, task.task.group) for name, task in tasks.items()},
            {name: self._name_heads(name) for name in tasks},
            models.head_styles(config.model),
        )
        notes: list[str] = []
        if self.start is None:
            if published := describe_start(config):
                notes.append(f"starts from random weights; {published}")
        else:
            notes += [*describe_followed(config, self.start.path), *started]
            for name, task in tasks.items():
                notes += [f"{name}: {note}" for note in task.start_heads(model.of_task(name), self.start)]
        return model.to(self.inputs.device), notes

    def _list_images(self) -> list[str]:
        """Training images that are in the first task's store, by which features are measured."""
        return [
            image
            for task in self.tasks.values()
            if _store_of(task).path == self.store.path
            for image in list_images(task.train_records)
        ]

    def _check_answers(self) -> None:
        """Refuse a head that two tasks share whose answers differ."""
        owners: dict[str, str] = {}
        for name, task in self.tasks.items():
            shared, answers = self.config.tasks[name].shares, task.task.answers
            if shared is None or answers is None:
                continue
            first = owners.setdefault(shared, name)
            known = self.tasks[first].task.answers
            if known is not None and known.fingerprint != answers.fingerprint:
                raise ConfigError(
                    f"the tasks {first} and {name} share a head, but not their answers: {len(known)} and "
                    f"{len(answers)}, or another order. Give both one list (task_settings.answers), or each a head of "
                    f"its own (--set tasks.{name}.shares=none)."
                )

    def _name_heads(self, name: str) -> dict[str, str]:
        """Head of a task -> its name in the joint model."""
        return {own: self.config.head_name(name, own) for own in self.tasks[name].task.heads}

    def _plan_turns(self, lengths: Mapping[str, int]) -> Turns:
        config, epochs = self.config, self.config.train.epochs
        longest = max(config.tasks[name].epochs * length for name, length in lengths.items())
        per_epoch = int(longest * config.multiplier / epochs)
        if config.stop_and_go is None and config.train.max_steps is not None and per_epoch:
            epochs = math.ceil(config.train.max_steps / (per_epoch * len(lengths)))  # `max_steps` replaces the epochs
        return Turns(lengths, epochs=epochs, iterations_per_epoch=per_epoch, stop_and_go=config.stop_and_go)

    def _validate(self, model: JointModel, turns: Turns) -> Mapping[str, float]:
        """Scores of the tasks that are due, as TASK.SCORE, and the mean of the tasks' latest scores, 0 for one that has
        not been validated yet; keeps the best model of each task."""
        found: dict[str, dict[str, float]] = {}

        def score(name: str) -> float:
            if name not in found:
                found[name] = self.tasks[name].validate(model.of_task(name))
            metric = self._metric(name)
            if metric not in found[name]:
                raise ConfigError(
                    f"tasks.{name}.metric is {metric!r}, but its validation reports no such score. "
                    f"{nearest(metric, found[name])}"
                )
            value = found[name][metric]
            if value > turns.best.get(name, -math.inf):
                self._keep_best(name, model)
            return value

        turns.validate(score)
        scores = {f"{name}.{key}": value for name, values in found.items() for key, value in values.items()}
        return scores | {"mean": sum(turns.latest.get(name, 0.0) for name in self.tasks) / len(self.tasks)}

    def _metric(self, name: str) -> str:
        return self.config.tasks[name].metric or self.tasks[name].task.metric

    def _keep_best(self, name: str, model: JointModel) -> None:
        """Write the model of a task, without the heads of the others, to models/NAME."""
        task, folder = self.tasks[name], self.folder
        if folder is None:
            return
        folder.save_model(
            folder.models / name,
            lambda path: save_model_folder(
                path, model.of_task(name), run=task.config, task=task.task, text_only=False, store=task.store,
                tokenizer=task.inputs.tokenizer,
            ),
        )  # fmt: skip

    def _save(self, path: Path, model: JointModel) -> None:
        """Write the encoder and all heads as a model folder."""
        saved = {
            name: SavedTask(
                task=task.task.name,
                heads=self._name_heads(name),
                max_tokens=task.inputs.spec.max_tokens,
                max_regions=task.inputs.spec.max_regions,
                task_token=task.config.task_token,
            )
            for name, task in self.tasks.items()
        }
        describe_model_folder(
            path,
            model=self.config.model,
            config=self.config.encoder,
            task=None,
            text_only=False,
            fingerprint=self.store.fingerprint,
            features=self.store.kind,
            tokenizer=self.inputs.tokenizer,
            trained=f"by the recipe {self.config.recipe}",
            tasks=saved,
        )
        states = {"tasks": {name: task.task.state() for name, task in self.tasks.items()}}
        (path / "answers.json").write_text(json.dumps(states) + "\n", encoding="utf-8")
        save_weights(path, model)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors about one task, with its name, and with that of its settings here."""
    try:
        yield
    except VislingError as error:
        told = str(error).replace("--set task_settings.", f"--set tasks.{name}.task_settings.")
        raise type(error)(f"task {name}: {told}") from error


def _store_of(task: Finetuning) -> NativeStore:
    assert task.store is not None, "a run of several tasks sees regions"
    return task.store


def _find_folder(config: MultitaskConfig, name: str, folders: TaskPaths) -> Path:
    """Folder of a task's annotations.

    Raises:
        DataError: there is none.
    """
    given = folders.of(name, "--data")
    path = given if name in folders.own else given / config.tasks[name].folder
    if not path.is_dir():
        raise DataError(f"the task {name} has no folder {path}. Name its annotations with --data {name}=DIR.")
    return path
