"""The model folder: weights and what belongs to them, written, read and loaded into modules."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visling import config as configs
from visling import damage, models
from visling.checked_weights import read_checked
from visling.checkpoints import hub
from visling.data.text import Tokenizer
from visling.errors import CheckpointError, nearest
from visling.models import head_styles
from visling.models.base import Encoder
from visling.models.task_model import SavedHead, TaskModel
from visling.objectives.base import Objective
from visling.objectives.pretrain_model import PretrainModel
from visling.pretrained.card import write_card
from visling.pretrained.description import FORMAT, find_model, parse_encoder_config, read_description, reading
from visling.regions.store import NativeStore
from visling.tasks.base import Task
from visling.tasks.base import load as load_task
from visling.train.weights import save_weights
from visling.vision.extractors import ExtractorSettings, read_settings


@dataclass(frozen=True, kw_only=True)
class SavedTask:
    """One task of a model that was trained on several, as its folder describes it."""

    task: str
    """A module of `visling.tasks`, or a dotted path."""
    heads: Mapping[str, str]
    """Head of the task -> its name in the model; tasks that share a head have one name for it."""
    max_tokens: int
    """Longest text row."""
    max_regions: int
    """Regions used per image."""
    task_token: int | None = None
    """Number of the task that its texts name, if the model has task tokens."""


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model folder that has been read."""

    path: Path
    model: str
    """Family, for example visualbert."""
    config: Any
    """The family's config."""
    task: str | None
    """Task name; None for a pre-trained encoder."""
    text_only: bool
    """Whether it was trained without any region."""
    fingerprint: str
    """Of the region features it was trained on."""
    weights: Mapping[str, Tensor]
    state: Mapping[str, Any]
    """What restores the task (its answer vocabulary)."""
    features: str = ""
    """Kind of the region features it was trained on, in `feature_kinds`; empty if they are of none, or it is not
    known."""
    heads: Mapping[str, SavedHead] = field(default_factory=dict)
    """Heads of converted weights, and those of a task that are not of the family's main layout, by the prefix of their
    weights (`objectives.masked_lm.head`, `heads.classify`)."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where converted weights come from: file, its SHA-256, layout, and release if it is in the catalogue."""
    task_token: int | None = None
    """Number of the task that its texts name, if the model has task tokens."""
    tasks: Mapping[str, SavedTask] = field(default_factory=dict)
    """Name -> task of a model that was trained on several; `task` is then None, and `state` holds the state of each."""
    extractor: ExtractorSettings | None = None
    """The jointly trained region extractor that computes its features; the fingerprint is then that of the store of its
    boxes and classes."""

    def encoder(self) -> Encoder:
        """The encoder alone, weights loaded."""
        encoder = models.build(self.model, self.config)
        load_encoder(encoder, self)
        return encoder

    def region_extractor(self) -> nn.Module | None:
        """The network that computes its features, weights loaded; None if it reads those of a store."""
        if self.extractor is None:
            return None
        extractor = self.extractor.build()
        load_part(extractor, self.weights, "extractor.", self.path)
        return extractor

    def for_task(self, name: str | None) -> ModelFolder:
        """The same model for one of the tasks that it was trained on; a model of one task needs no name.

        Raises:
            CheckpointError: it has several tasks and none is named, or none of that name.
        """
        if not self.tasks:
            if name is None:
                return self
            raise CheckpointError(
                f"{self.path} was not trained on several tasks, among which {name!r} could be chosen. Leave --task out."
            )
        if name is None:
            raise CheckpointError(f"{self.path} was trained on several tasks: name one of {', '.join(self.tasks)}.")
        if name not in self.tasks:
            raise CheckpointError(f"{self.path} was not trained on a task {name!r}. {nearest(name, self.tasks)}")
        saved = self.tasks[name]
        weights = {key: tensor for key, tensor in self.weights.items() if not key.startswith("heads.")}
        for own, joint in saved.heads.items():
            part = f"heads.{joint}."
            weights |= {
                f"heads.{own}.{key.removeprefix(part)}": tensor
                for key, tensor in self.weights.items()
                if key.startswith(part)
            }
        return replace(
            self,
            config=replace(self.config, max_tokens=saved.max_tokens, max_regions=saved.max_regions),
            task=saved.task,
            weights=weights,
            state=self.state["tasks"][name],
            task_token=saved.task_token,
            tasks={},
        )

    def task_model(self) -> tuple[TaskModel, Task[Any, Any]]:
        """The fine-tuned model and its task, restored.

        Raises:
            CheckpointError: the folder holds a pre-trained encoder without a task head, or several tasks.
        """
        self.for_task(None)
        if self.task is None:
            raise CheckpointError(
                f"{self.path} holds a pre-trained encoder without a task head. Fine-tune it first: visling finetune "
                f"--init {self.path}."
            )
        task = load_task(self.task).from_state(self.state)
        converted = {name: self.heads[f"heads.{name}"] for name in task.heads if f"heads.{name}" in self.heads}
        encoder = models.build(self.model, self.config)
        extractor = None if self.extractor is None else self.extractor.build()
        model = TaskModel(
            encoder, task.heads, head_styles(self.model), group=task.group, saved=converted, extractor=extractor
        )
        unused = tuple(f"{path}." for path in self.heads if path.removeprefix("heads.") not in converted)
        weights = {name: tensor for name, tensor in self.weights.items() if not name.startswith(unused)}
        load_part(model, weights, "", self.path)
        return model, task

    def head(self, path: str, encoder: Encoder) -> nn.Module:
        """One of `heads` on an encoder, weights loaded."""
        module = self.heads[path].build(encoder)
        load_part(module, self.weights, f"{path}.", self.path)
        return module

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the model folder.

        Raises:
            CheckpointError: the folder holds something, or cannot be written.
        """
        target = claim_folder(Path(folder))
        try:
            for file in self.path.rglob("*"):
                name = file.relative_to(self.path)
                if file.is_file() and any(fnmatch.fnmatch(name.as_posix(), pattern) for pattern in hub.FOLDER_FILES):
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target / name)
        except OSError as error:
            raise CheckpointError(
                f"cannot write the model to {folder}: {error}. Free space or use another folder."
            ) from error

    def push_to_hub(self, repository: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the model folder to owner/name on the Hugging Face hub; returns the address of the change.

        Raises:
            CheckpointError: offline, refused, or unreachable.
        """
        return hub.upload(self.path, repository, private=private, token=token)


def from_pretrained(source: str | Path, *, revision: str | None = None, offline: bool | None = None) -> ModelFolder:
    """A model from a local folder, or by owner/name from the Hugging Face hub.

    Args:
        revision: branch, tag or commit on the hub.
        offline: use the hub's cache only; None = follow the variables VISLING_OFFLINE and HF_HUB_OFFLINE.
    Raises:
        CheckpointError: not found, not a model folder, damaged files, or a newer layout.
    """
    return read_model_folder(
        hub.fetch(str(source), revision=revision, offline=offline) if hub.is_id(source) else Path(source)
    )


def claim_folder(path: Path) -> Path:
    """A new or empty folder to write to.

    Raises:
        CheckpointError: it holds something, is a file, or cannot be made.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise CheckpointError(
            f"{path} exists and is not empty. Name another folder, or remove it: nothing is overwritten."
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {path}: {error}. Use another one.") from error
    return path


def save_model_folder(
    path: Path,
    module: TaskModel | PretrainModel,
    *,
    run: Any,
    task: Task[Any, Any] | None,
    text_only: bool,
    store: NativeStore | None,
    tokenizer: Tokenizer,
) -> None:
    """Write a model folder.

    Args:
        run: the `PretrainConfig` or `FinetuneConfig` it was trained by.
        store: regions it was trained on.
    """
    describe_model_folder(
        path,
        model=run.model,
        config=run.encoder,
        task=task,
        text_only=text_only,
        fingerprint="" if store is None else store.fingerprint,
        features="" if store is None else store.kind,
        tokenizer=tokenizer,
        trained=f"by the recipe {run.recipe}",
        heads=None if task is None else _describe_heads(task, run.model, run.head_layout),
        task_token=None if task is None else run.task_token,
        extractor=run.extractor,
    )
    save_weights(path, module)


def _describe_heads(task: Task[Any, Any], model: str, layout: str | None) -> dict[str, SavedHead]:
    """The heads of a task by the prefix of their weights; none where they are of the family's main layout."""
    if layout is None:
        return {}
    styles = head_styles(model, layout)
    return {
        f"heads.{name}": SavedHead(part=name, head=head, style=styles[head.kind], group=task.group)
        for name, head in task.heads.items()
    }


def describe_model_folder(
    path: Path,
    *,
    model: str,
    config: Any,
    task: Task[Any, Any] | None,
    text_only: bool,
    fingerprint: str,
    tokenizer: Tokenizer,
    trained: str,
    features: str = "",
    heads: Mapping[str, SavedHead] | None = None,
    source: Mapping[str, Any] | None = None,
    task_token: int | None = None,
    tasks: Mapping[str, SavedTask] | None = None,
    extractor: ExtractorSettings | None = None,
) -> None:
    """Write a model folder except its weights.

    Args:
        trained: for the model card: how, or where the weights come from.
        features: kind of the region features in `feature_kinds`, if it is known.
        heads: those that `ModelFolder.heads` describes.
        source: of converted weights.
        task_token: number of the task that its texts name, if the model has task tokens.
        tasks: of a model of several tasks, whose states the caller writes into answers.json.
        extractor: settings of the region extractor that was trained jointly.
    """
    described = {
        "format": FORMAT,
        "model": model,
        "config": configs.to_dict(config),
        "task": None if task is None else task.name,
        "text_only": text_only,
        "fingerprint": fingerprint,
        **({"features": features} if features else {}),
        **({"task_token": task_token} if task_token is not None else {}),
        **({"tasks": configs.to_dict(tasks)} if tasks else {}),
        **({"extractor": configs.to_dict(extractor)} if extractor is not None else {}),
        **({"heads": configs.to_dict(heads)} if heads else {}),
        **({"source": dict(source)} if source else {}),
    }
    (path / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer.vocabulary_file, path / "vocab.txt")
    if task is not None:
        (path / "answers.json").write_text(json.dumps(task.state()) + "\n", encoding="utf-8")
    (path / "README.md").write_text(
        write_card(described, trained, [] if task is None else task.state().get("answers", [])), encoding="utf-8"
    )


def read_model_folder(path: Path) -> ModelFolder:
    """Read a model folder, or the `model` folder inside a run folder.

    Raises:
        CheckpointError: not found, not a model folder, damaged files, or a newer layout.
    """
    folder = find_model(path)
    answers = folder / "answers.json"
    with reading(folder):
        described = read_description(folder)
        state = damage.parse_json(answers.read_text(encoding="utf-8")) if answers.exists() else {}
        if not isinstance(state, dict):
            raise CheckpointError(
                f"{answers} must hold an object with the settings and answers of the task; found a "
                f"{type(state).__name__}. Is it a list of answers? visling convert takes one with --answers."
            )
        if not isinstance(described["model"], str) or not isinstance(described["fingerprint"], str):
            raise CheckpointError(
                f"{folder / 'config.json'} must name the model and the fingerprint of its features; found "
                f"{described['model']!r:.80} and {described['fingerprint']!r:.80}. Train or copy the model again."
            )
        return ModelFolder(
            path=folder,
            model=described["model"],
            config=parse_encoder_config(described),
            task=described["task"],
            text_only=described["text_only"],
            fingerprint=described["fingerprint"],
            features=described.get("features", ""),
            weights=read_checked(folder / "model.safetensors"),
            state=state,
            heads={path: configs.from_dict(SavedHead, head) for path, head in described.get("heads", {}).items()},
            source=described.get("source", {}),
            task_token=described.get("task_token"),
            tasks={name: configs.from_dict(SavedTask, task) for name, task in described.get("tasks", {}).items()},
            extractor=read_settings(described["extractor"]) if "extractor" in described else None,
        )


def load_part(module: nn.Module, weights: Mapping[str, Tensor], prefix: str, source: Path) -> None:
    """Load the weights under a prefix into a module; all of them, and nothing else.

    Raises:
        CheckpointError: names or shapes differ.
    """
    part = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    wanted = module.state_dict()
    missing, foreign = sorted(wanted.keys() - part.keys()), sorted(part.keys() - wanted.keys())
    shapes = [name for name in wanted.keys() & part.keys() if wanted[name].shape != part[name].shape]
    if missing or foreign or shapes:
        first = (missing + foreign + sorted(shapes))[0]
        sizes = f" ({tuple(part[first].shape)} instead of {tuple(wanted[first].shape)})" if first in shapes else ""
        raise CheckpointError(
            f"weights in {source} do not fit: {len(missing)} missing, {len(foreign)} unknown, {len(shapes)} of "
            f"another shape, first {first!r}{sizes}. Use the settings it was trained with (its config.json)."
        )
    module.load_state_dict(part)


def load_encoder(encoder: Encoder, saved: ModelFolder) -> list[str]:
    """Load the encoder of a model into one of the same family. Returns notes for the log.

    A model that gets task tokens may start from one without: the table stays randomly initialised, as in ViLBERT's
    multi-task release.

    Raises:
        CheckpointError: names or shapes differ; names the settings that do.
    """
    weights, notes = dict(saved.weights), []
    count = models.spec(saved.model).inputs(saved.config).num_tasks
    table = encoder.state_dict().get(_TASK_TABLE)
    if table is not None and not count:
        weights[f"encoder.{_TASK_TABLE}"] = table
        notes.append(f"the {len(table)} task tokens are randomly initialised: {saved.path} has none")
    try:
        load_part(encoder, weights, "encoder.", saved.path)
    except CheckpointError as error:
        differing = [
            f"encoder.{name} is {here}, not {there}"
            for name, (there, here) in configs.difference(encoder.config, saved.config).items()
            if name not in models.spec(saved.model).kept
        ]
        if not differing:
            raise
        raise CheckpointError(f"{error} Here {'; '.join(differing)}.") from error
    return notes


_TASK_TABLE = "tasks.weight"
"""Of an encoder with task tokens."""


def load_heads(objectives: Mapping[str, Objective], saved: ModelFolder) -> list[str]:
    """Load the heads of objectives that a model was pre-trained with, where names and shapes are the same.

    Returns:
        Objectives that the model was not trained with, or whose head differs (another answer table): their heads stay
        randomly initialised.
    """
    random = []
    for name, objective in objectives.items():
        head = getattr(objective, "head", None)
        if head is None:
            continue
        prefix = f"objectives.{name}.head."
        shapes = {
            key.removeprefix(prefix): tensor.shape for key, tensor in saved.weights.items() if key.startswith(prefix)
        }
        if shapes == {key: tensor.shape for key, tensor in head.state_dict().items()}:
            load_part(head, saved.weights, prefix, saved.path)
        else:
            random.append(name)
    return random


def objective_heads(saved: ModelFolder) -> dict[str, dict[str, Tensor]]:
    """Objective -> name -> tensor of the head that it has trained."""
    heads: dict[str, dict[str, Tensor]] = {}
    for name, tensor in saved.weights.items():
        kind, _, rest = name.partition(".")
        objective, _, place = rest.partition(".")
        if kind == "objectives" and place.startswith("head."):
            heads.setdefault(objective, {})[place.removeprefix("head.")] = tensor
    return heads


def check_family(saved: ModelFolder, model: str) -> None:
    """Refuse to start a model from weights of another family.

    Raises:
        CheckpointError: the families differ.
    """
    if saved.model == model:
        return
    mend = f"Name a model of {model} with --init."
    if saved.model in models.spec(model).loads_from or model in models.spec(saved.model).loads_from:
        mend = (
            f"They share their released layout: visling convert {saved.path} --to-layout official --to FILE.pth, then "
            f"visling convert FILE.pth --model {model} --from official --to START, and --init START."
        )
    raise CheckpointError(f"{saved.path} holds {saved.model}, but the recipe trains {model}. {mend}")


KEPT = "kept.safetensors"
"""File of a model folder with tensors that a release stores and never reads; no loader reads it, `export` writes them
back."""
