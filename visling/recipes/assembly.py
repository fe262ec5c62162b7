"""What every recipe shares: encoder + heads or objectives = something to train, its run folder, and the folder in which the model is kept.

A model folder holds `config.json` (model name, its settings, task, feature fingerprint; settings of a region extractor that was trained along; for
converted weights also their heads and where they come from), `model.safetensors`, `vocab.txt`, for tasks with an answer vocabulary `answers.json`,
and a model card, `README.md`. Weights are named after their place in a `TaskModel` or a `PretrainModel`: `encoder.`, `heads.NAME.`, `extractor.`,
`objectives.NAME.head.`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from visling import config as configs
from visling import models, runtime
from visling.checkpoints import files, hub
from visling.data.region_targets import DETECTED, check_labels
from visling.data.store import NativeStore
from visling.data.text import TextLayout, Tokenizer
from visling.errors import CheckpointError, ConfigError, StoreError, VislingError, nearest
from visling.models.base import Encoder
from visling.nn import heads as head_blocks
from visling.objectives.base import Objective, PretrainStep
from visling.objectives.masked_regions import RegionLosses
from visling.tasks.base import Task
from visling.tasks.base import load as load_task
from visling.train.engine import TrainConfig
from visling.train.log import Log
from visling.train.state import RunFolder, State, save_weights
from visling.types import Batch, Head, InputSpec, Loss, Record, Targets
from visling.vision import end_to_end
from visling.vision.end_to_end import ExtractorConfig, RegionExtractor


class Recipe(Protocol):
    """What pre-training and fine-tuning runs have in common."""

    @property
    def recipe(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def encoder(self) -> Any: ...
    @property
    def any_features(self) -> bool: ...
    @property
    def train(self) -> TrainConfig: ...


R = TypeVar("R", bound=Recipe)

FORMAT = 1
"""Version of the model folder's layout."""


@dataclass(frozen=True, kw_only=True)
class SavedHead:
    """A head as a converted model folder describes it."""

    part: str
    """Its name in the key maps of the family."""
    head: Head
    style: str
    group: int = 1
    """Rows per example."""

    def build(self, encoder: Encoder) -> nn.Module:
        """The head on an encoder, with fresh weights."""
        return head_blocks.build(self.head, encoder.dims, style=self.style, words=encoder.word_embeddings, group=self.group)


class TaskModel(nn.Module):
    """An encoder with the heads that one task asks for.

    Args:
        styles: head kind -> style of the family.
        saved: heads that are of another style or size, by name.
    """

    def __init__(self, encoder: Encoder, task: Task[Any, Any], styles: Mapping[str, str], saved: Mapping[str, SavedHead] | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.kinds = {name: head.kind for name, head in task.heads.items()}
        known = saved or {}
        self.heads = nn.ModuleDict(
            {
                name: known[name].build(encoder)
                if name in known
                else head_blocks.build(head, encoder.dims, style=styles[head.kind], words=encoder.word_embeddings, group=task.group)
                for name, head in task.heads.items()
            }
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Logits by head name; shapes in `nn.heads`."""
        encoded = self.encoder(batch)
        return {name: head(encoded.pooled) for name, head in self.heads.items()}


class PretrainModel(nn.Module):
    """An encoder with the objectives that teach it; the loss is the weighted sum of theirs.

    Args:
        extractor: what makes the regions' features of the batch's pixels, and is taught along.
    """

    def __init__(
        self, encoder: Encoder, objectives: Mapping[str, Objective], weights: Mapping[str, float], extractor: RegionExtractor | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.extractor = extractor
        self.objectives = nn.ModuleDict(dict(objectives))
        self.weights = dict(weights)

    def after_update(self) -> None:
        """Tell every objective that the optimiser has moved the weights."""
        for objective in self.objectives.children():
            assert isinstance(objective, Objective)
            objective.after_update()

    def forward(self, batch: Batch, targets: Targets) -> Loss:
        """Weighted sum of the objectives' losses on one batch; in training, one of weight 0 is not computed."""
        batch = self.seen(batch)
        step = PretrainStep(model=self.encoder, batch=batch, encoded=self.encoder(batch), targets=targets)
        losses: list[Loss] = [objective(step).scaled(self.weights[name]) for name, objective in self._heard()]
        return sum(losses[1:], start=losses[0])

    def seen(self, batch: Batch) -> Batch:
        """The batch as the encoder reads it: with features of its pixels, if there is an extractor."""
        if self.extractor is None or batch.regions is None:
            return batch
        assert batch.pixels is not None, "an extractor needs a batch with pixels"
        return dataclasses.replace(batch, regions=self.extractor.describe(batch.regions, batch.pixels))

    def _heard(self) -> Iterator[tuple[str, nn.Module]]:
        return ((name, objective) for name, objective in self.objectives.items() if self.weights[name] or not self.training)


def encoder_config(model: str, given: Any) -> Any:
    """A family's config from what a setting or a run.json gives: itself, its settings as a mapping, or the name of a preset.

    Raises:
        ConfigError: no such family, preset or setting.
    """
    family = models.spec(model)
    if isinstance(given, family.config):
        return given
    if isinstance(given, Mapping):
        return configs.from_dict(family.config, given, where="encoder")
    if given not in family.presets:
        raise ConfigError(f"'encoder' is {given!r}, not a preset of {model}. {nearest(str(given), family.presets)} One setting: encoder.name=value.")
    return family.presets[given]


def folder_and_split(root: str) -> tuple[Path, str]:
    """What `DIR@SPLIT` names; the split is empty for a plain folder, whose own path may hold an @."""
    folder, at, split = root.rpartition("@")
    return (Path(root), "") if not at or "/" in split or Path(root).is_dir() else (Path(folder), split)


def head_styles(model: str) -> dict[str, str]:
    """Head kind -> style of a model's main release layout."""
    spec = models.spec(model)
    return {kind: style for (layout, kind), style in spec.head_styles.items() if layout == spec.layout}


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A model folder that has been read."""

    path: Path
    model: str
    """Family, for example visualbert."""
    config: Any
    """The family's config."""
    task: str | None
    """Task name; None for a pre-trained encoder."""
    text_only: bool
    """Whether it was trained without seeing any region."""
    fingerprint: str
    """Of the region features it was trained on."""
    weights: Mapping[str, Tensor]
    state: Mapping[str, Any]
    """What the task needs to be restored (its answer vocabulary)."""
    heads: Mapping[str, SavedHead] = field(default_factory=dict)
    """Heads of converted weights by the prefix of their weights (`objectives.masked_lm.head`, `heads.classify`)."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where converted weights come from: file, its SHA-256, layout, and release if it is a known one."""
    extractor: ExtractorConfig | None = None
    """The region extractor that was trained along, whose features it knows; the fingerprint is then that of its boxes and classes."""

    def encoder(self) -> Encoder:
        """The encoder alone, weights loaded."""
        encoder = models.build(self.model, self.config)
        load_part(encoder, self.weights, "encoder.", self.path)
        return encoder

    def task_model(self) -> tuple[TaskModel, Task[Any, Any]]:
        """The fine-tuned model and its task, restored.

        Raises:
            CheckpointError: the folder holds a pre-trained encoder without a task head.
        """
        if self.task is None:
            raise CheckpointError(
                f"{self.path} holds a pre-trained encoder without a task head. Fine-tune it first: visling finetune --init {self.path}."
            )
        task = load_task(self.task).from_state(self.state)
        own = {name: self.heads[f"heads.{name}"] for name in task.heads if f"heads.{name}" in self.heads}
        model = TaskModel(models.build(self.model, self.config), task, head_styles(self.model), saved=own)
        beside = tuple(f"{place}." for place in self.heads if place.removeprefix("heads.") not in own)
        load_part(model, {name: tensor for name, tensor in self.weights.items() if not name.startswith(beside)}, "", self.path)
        return model, task

    def head(self, place: str, encoder: Encoder) -> nn.Module:
        """One of `heads` on an encoder, weights loaded."""
        module = self.heads[place].build(encoder)
        load_part(module, self.weights, f"{place}.", self.path)
        return module

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the model folder.

        Raises:
            CheckpointError: the folder holds something, or cannot be written.
        """
        target = claim(Path(folder))
        try:
            for file in self.path.rglob("*"):
                name = file.relative_to(self.path)
                if file.is_file() and any(fnmatch.fnmatch(name.as_posix(), pattern) for pattern in hub.FOLDER_FILES):
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target / name)
        except OSError as error:
            raise CheckpointError(f"cannot write the model to {folder}: {error}. Free space or use another folder.") from error

    def push_to_hub(self, repository: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the model folder to owner/name on the Hugging Face hub; returns the address of the change.

        Raises:
            CheckpointError: offline, refused, or not reachable.
        """
        return hub.upload(self.path, repository, private=private, token=token)


def from_pretrained(source: str | Path, *, revision: str | None = None, offline: bool | None = None) -> Saved:
    """A model from a folder here, or by owner/name from the Hugging Face hub.

    Args:
        revision: branch, tag or commit on the hub.
        offline: look into the hub's cache only; None = as the variable HF_HUB_OFFLINE says.
    Raises:
        CheckpointError: nothing there, not a model folder, damaged files, or a newer layout.
    """
    return read(hub.fetch(str(source), revision=revision, offline=offline) if hub.is_id(source) else Path(source))


def claim(path: Path) -> Path:
    """A new or empty folder to write to.

    Raises:
        CheckpointError: it holds something, is a file, or cannot be made.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not empty. Name another folder, or remove it: nothing is overwritten.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {path}: {error}. Use another one.") from error
    return path


def save(
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
        run: the `Pretraining` or `Finetuning` it came from.
        store: regions it was trained on.
    """
    describe(
        path,
        model=run.model,
        config=module.encoder.config,
        task=task,
        text_only=text_only,
        fingerprint="" if store is None else store.fingerprint,
        tokenizer=tokenizer,
        trained=f"by the recipe {run.recipe}",
        extractor=module.extractor.config if isinstance(module, PretrainModel) and module.extractor is not None else None,
    )
    save_weights(path, module)


def describe(
    path: Path,
    *,
    model: str,
    config: Any,
    task: Task[Any, Any] | None,
    text_only: bool,
    fingerprint: str,
    tokenizer: Tokenizer,
    trained: str,
    heads: Mapping[str, SavedHead] | None = None,
    source: Mapping[str, Any] | None = None,
    extractor: ExtractorConfig | None = None,
) -> None:
    """Write all of a model folder but its weights.

    Args:
        trained: for the model card: by what, or where the weights come from.
        heads: of converted weights, by place.
        source: of converted weights.
        extractor: settings of the region extractor that was trained along.
    """
    described = {
        "format": FORMAT,
        "model": model,
        "config": configs.to_dict(config),
        "task": None if task is None else task.name,
        "text_only": text_only,
        "fingerprint": fingerprint,
        **({"extractor": configs.to_dict(extractor)} if extractor is not None else {}),
        **({"heads": configs.to_dict(heads)} if heads else {}),
        **({"source": dict(source)} if source else {}),
    }
    (path / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer.vocabulary_file, path / "vocab.txt")
    if task is not None:
        (path / "answers.json").write_text(json.dumps(task.state()) + "\n", encoding="utf-8")
    (path / "README.md").write_text(_card(described, trained, [] if task is None else task.state().get("answers", [])), encoding="utf-8")


def _card(described: Mapping[str, Any], trained: str, answers: Sequence[str]) -> str:
    """The model card, with the hub's header."""
    model, task, source = described["model"], described["task"], described.get("source", {})
    heads = [f"{place} ({about['head']['kind']}, {about['head']['outputs']})" for place, about in described.get("heads", {}).items()]
    if described["text_only"]:
        features = "It has seen no region."
    elif "extractor" in described:
        features = (
            "It makes them of pixels with its own network, whose weights are here too (`extractor.`); others give wrong answers without an error. "
            f"Boxes and classes were those of the regions `{described['fingerprint']}`."
        )
    elif described["fingerprint"]:
        features = f"It was trained on region features `{described['fingerprint']}`; others give wrong answers without an error."
    else:
        features = "Which region features it was trained on is not recorded; others give wrong answers without an error."
    facts = [
        f"- Trained {trained}.",
        f"- Task: {task or 'none; pre-trained encoder'}.",
        f"- Features: {features} {source.get('note', '')}".rstrip(),
        *([f"- Answers: {len(answers)}, in `answers.json`; their order is part of the model."] if answers else []),
        *([f"- Heads: {', '.join(heads)}."] if heads else []),
        *([f"- Licence of the weights: {source['licence']}."] if "licence" in source else []),
        *([f"- From: {source['address']}."] if "address" in source else []),
    ]
    use = "api.load(FOLDER)" if task and not source else "api.from_pretrained(FOLDER).encoder()"
    return "\n".join(
        [
            "---",
            "library_name: visling",
            f"tags: [vision-and-language, {model}{', ' + task if task else ''}]",
            "---",
            "",
            f"# {model}{', ' + task if task else ''}",
            "",
            *facts,
            "",
            f"Use: `from visling import api; {use}`. Settings are in `config.json`, the word pieces in `vocab.txt`.",
            "",
        ]
    )


def read(path: Path) -> Saved:
    """Read a model folder, or the `model` folder inside a run folder.

    Raises:
        CheckpointError: nothing there, not a model folder, damaged files, or a newer layout.
    """
    folder = path if (path / "config.json").exists() else path / "model"
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"no model in {path}: expected config.json and model.safetensors there or in {path / 'model'}. Has the run finished its first epoch?"
        )
    answers = folder / "answers.json"
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        layout = described.get("format") if isinstance(described, dict) else type(described).__name__
        if not isinstance(layout, int):
            raise CheckpointError(
                f"{folder} holds no model that pretrain or finetune wrote: its config.json says {layout!r}. "
                "Check the path; weights of another library are read by visling convert."
            )
        if layout != FORMAT:
            raise CheckpointError(f"{folder} has layout {layout}; this version reads {FORMAT}. Update visling.")
        return Saved(
            path=folder,
            model=described["model"],
            config=configs.from_dict(models.spec(described["model"]).config, described["config"]),
            task=described["task"],
            text_only=described["text_only"],
            fingerprint=described["fingerprint"],
            weights=load_file(folder / "model.safetensors"),
            state=json.loads(answers.read_text(encoding="utf-8")) if answers.exists() else {},
            heads={place: configs.from_dict(SavedHead, head) for place, head in described.get("heads", {}).items()},
            source=described.get("source", {}),
            extractor=configs.from_dict(ExtractorConfig, described["extractor"]) if "extractor" in described else None,
        )
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the model in {folder}: {error}. The files may be truncated; train or copy it again.") from error
    except KeyError as error:
        raise CheckpointError(f"{folder / 'config.json'} lacks {error}: it was edited or is damaged. Train or copy the model again.") from error


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
            f"weights in {source} do not fit: {len(missing)} missing, {len(foreign)} unknown, {len(shapes)} of another shape, "
            f"first {first!r}{sizes}. Use the settings it was trained with (config.json beside it)."
        )
    module.load_state_dict(part)


def load_heads(objectives: Mapping[str, Objective], saved: Saved) -> list[str]:
    """Load the heads of objectives that a model was pre-trained with, where they have the same weights in the same shapes.

    Returns:
        Objectives that a model was not trained with, or whose head differs (another answer table): they keep fresh heads.
    """
    fresh = []
    for name, objective in objectives.items():
        head = getattr(objective, "head", None)
        if head is None:
            continue
        prefix = f"objectives.{name}.head."
        shapes = {key.removeprefix(prefix): tensor.shape for key, tensor in saved.weights.items() if key.startswith(prefix)}
        if shapes == {key: tensor.shape for key, tensor in head.state_dict().items()}:
            load_part(head, saved.weights, prefix, saved.path)
        else:
            fresh.append(name)
    return fresh


def check_family(saved: Saved, model: str) -> None:
    """Refuse to start a model from weights of another family.

    Raises:
        CheckpointError: the families differ.
    """
    if saved.model == model:
        return
    mend = f"Name a model of {model} with --init."
    if {saved.model, model} == {"lxmert", "cvlp"}:  # CVLP's query network is an LXMERT
        mend = (
            f"They share their released layout: visling convert {saved.path} --to-layout official --to FILE.pth, then "
            f"visling convert FILE.pth --model {model} --from official --to START, and --init START."
        )
    raise CheckpointError(f"{saved.path} holds {saved.model}, but the recipe trains {model}. {mend}")


def check_fingerprint(saved: Saved, fingerprint: str, *, override: bool, extracts: bool = False) -> None:
    """Refuse region features other than those a model was trained on.

    Args:
        extracts: whether the run makes features with a region extractor of its own, and takes boxes and classes alone from the store.
    Raises:
        CheckpointError: the fingerprints differ, or one side makes its own features and the other does not, and `override` is off.
    """
    if saved.text_only or override:
        return
    if saved.extractor is not None and not extracts:
        raise CheckpointError(
            f"{saved.path} was trained along with a region extractor of its own and knows no other features; this run reads those of a store, which "
            "give wrong answers without any error. Go on with a recipe that has an extractor, start from a model that was trained on stored "
            "features, or pass --other-features to take the encoder alone and teach it these."
        )
    if saved.extractor is None and extracts:
        raise CheckpointError(
            f"{saved.path} knows region features but comes without the network that made them, and this run makes its own. If a file has that "
            "network (a VL-BERT end to end), name it with --backbone and pass --other-features, too. Else start from text weights or a model with "
            "an extractor, or teach the encoder the features of this one with --other-features alone."
        )
    if saved.fingerprint == fingerprint:
        return
    if not saved.fingerprint:
        raise CheckpointError(
            f"{saved.path} holds converted weights, and which region features they were trained on is not recorded. {saved.source.get('note', '')} "
            "If these regions are of that kind, pass --other-features, or say so once and for all with visling convert --features STORE."
        )
    raise CheckpointError(
        f"{saved.path} was trained on region features {saved.fingerprint[:12]}; these are {fingerprint[:12]}. Features of another detector "
        "give wrong answers without any error. Extract regions with the same detector, or pass --other-features to go on all the same."
    )


def load_backbone(extractor: RegionExtractor, path: Path) -> str:
    """Start a region extractor from a file: a plain ResNet (a detector that was converted to one, in the release), or a VL-BERT that was trained end
    to end, from which its network is taken.

    Returns:
        What was read, for the log.
    Raises:
        CheckpointError: no such file, or not a network of this size.
    """
    tensors = files.read(path)
    layout = "official" if any(name.startswith("image_feature_extractor.") for name in tensors) else "resnet"
    try:
        end_to_end.KEYS[layout].load(tensors, {"extractor": extractor})
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} does not fill the region extractor, read as {'a VL-BERT end to end' if layout == 'official' else 'a plain ResNet'}: {error} "
            "Give a file of the recipe's depth, or change extractor.blocks."
        ) from error
    return f"the region extractor starts from {path} ({layout})"


def check_images(records: Iterable[Record], store: NativeStore) -> None:
    """Refuse a store that lacks images, before any time is spent on training or scoring.

    Raises:
        StoreError: names the first example and image, and how many images are missing.
    """
    missing: dict[str, str] = {}
    for record in records:
        for image in record.images:
            if image not in store:
                missing.setdefault(image, record.id)
    for image, example in missing.items():
        try:
            store.count(image)
        except StoreError as error:
            others = f" In all, {len(missing)} annotated images are missing." if len(missing) > 1 else ""
            raise StoreError(f"example {example!r} needs image {image!r}: {error}{others}") from error


def fit_to_store(run: R, store: NativeStore) -> R:
    """The run with feature width and the widths of region losses set to those of the store, if its plan leaves them open.

    Raises:
        StoreError: the plan asks for other numbers, or for region losses that the store cannot answer.
    """
    if not store.manifest["regions"]:
        raise StoreError(
            f"{store.path} holds {len(store)} images and no region at all: there is nothing to see. The detector found nothing; score it with "
            "`visling detect eval`, train it longer, and extract again."
        )
    extracts = getattr(run, "extractor", None) is not None  # of pre-training alone; stored features are not read then
    if not extracts and run.encoder.feature_size != store.feature_size:
        if not run.any_features:
            raise StoreError(
                f"{store.path} holds features of width {store.feature_size}; recipe {run.recipe} reads {run.encoder.feature_size}, as its release "
                f"does. Use features of that width, or --set any_features=true to train another model."
            )
        run = configs.override(run, [f"encoder.feature_size={store.feature_size}"])
    losses: RegionLosses | None = getattr(run, "region_losses", None)  # of pre-training alone
    return run if losses is None else _fit_losses(run, losses, store)


def _fit_losses(run: R, losses: RegionLosses, store: NativeStore) -> R:
    lacking = [DETECTED[name] for name in sorted(losses.needs & DETECTED.keys()) if DETECTED[name][0] not in store.fields]
    if lacking:
        field, what = lacking[0]
        mend = "with a detector that names them"
        if field == "probs":
            mend = "again with --probs, or tell the best class alone: --set region_losses.classes=hard"
        raise StoreError(f"{store.path} holds no {what} of regions, which recipe {run.recipe} tells. Extract regions {mend}.")
    soft = losses.classes in ("kl", "cross_entropy")
    # A store without names does not say how many there are: it is taken at the recipe's word.
    found = {
        "num_classes": ("classes", store.fields["probs"].width if soft else len(store.class_names) or losses.num_classes),
        "num_attributes": ("attributes", len(store.attribute_names) or losses.num_attributes),
        "feature_size": ("features", store.feature_size),
    }
    differing = {setting: (name, width) for setting, (name, width) in found.items() if losses.widths.get(name, width) != width}
    if differing and not run.any_features:
        told = "; ".join(f"{width} {name}, not {losses.widths[name]}" for name, width in differing.values())
        raise StoreError(
            f"the regions of {store.path} have {told} as recipe {run.recipe} and its release. Use regions of that detector, or "
            "--set any_features=true to train another model."
        )
    for target, setting in (("region_classes", "num_classes"), ("region_attributes", "num_attributes")):
        if target in losses.needs:
            check_labels(store, target, found[setting][1])
    return configs.override(run, [f"region_losses.{setting}={width}" for setting, (_, width) in differing.items()])


SAMPLED_IMAGES = 2000
"""Images, evenly spread over those of training, whose regions a fresh encoder measures."""


def fresh_encoder(run: Recipe, store: NativeStore | None, images: Iterable[str]) -> Encoder:
    """The run's encoder with fresh weights, fitted to the features of its training images: a store may hold those of a test, too."""
    encoder = models.build(run.model, run.encoder)
    return encoder if getattr(run, "extractor", None) is not None else measure(encoder, store, images)


def measure(encoder: Encoder, store: NativeStore | None, images: Iterable[str]) -> Encoder:
    """The encoder with its statistics of region features measured on a sample of these images, if it keeps any."""
    ids = [] if store is None else sorted({image_id for image_id in images if image_id in store})
    if store is not None and ids:
        ids = ids[:: max(1, len(ids) // SAMPLED_IMAGES)]
        encoder.fit_features(torch.cat([torch.from_numpy(store[image_id].features.astype("float32")) for image_id in ids]))
    return encoder


def tokenizer(run: Recipe) -> Tokenizer:
    """The tokenizer of a run's model.

    Raises:
        ConfigError: the vocabulary has more entries than the model's word table.
    """
    found = Tokenizer(models.spec(run.model).inputs(run.encoder).vocabulary)
    if found.size > run.encoder.vocab_size:
        raise ConfigError(
            f"vocabulary {run.encoder.vocabulary!r} has {found.size} entries, but encoder.vocab_size is {run.encoder.vocab_size}. "
            f"Use --set encoder.vocab_size={found.size}."
        )
    return found


@contextlib.contextmanager
def started(
    run: Recipe,
    out: Path,
    *,
    data: Sequence[str | Path],
    store: NativeStore | None,
    task: str | None,
    resume: bool,
    stream: TextIO | None,
    command: Sequence[str],
    images: Path | None = None,
) -> Iterator[tuple[RunFolder, Log]]:
    """A run folder with everything about the run written down, and its log; `conclude` marks it as finished.

    A run that fails before anything is saved leaves no folder behind, so that the mended command can use the same one.

    Args:
        images: folder of the pictures, if it is not that of the annotations.
    """
    existed = out.exists()
    folder = RunFolder.create(out, resume=resume)
    try:
        _record_start(folder, run, data=data, store=store, task=task, command=command, images=images)
        with Log(folder.log, stream=stream) as log:
            yield folder, log
    except VislingError:
        if not resume and runtime.is_main() and not folder.has_last and not folder.model.exists():
            for file in (folder.log, folder.path / "run.json"):
                file.unlink(missing_ok=True)
            if not existed:
                folder.path.rmdir()
        raise


def _record_start(
    folder: RunFolder,
    run: Recipe,
    *,
    data: Sequence[str | Path],
    store: NativeStore | None,
    task: str | None,
    command: Sequence[str],
    images: Path | None,
) -> None:
    folder.record(
        {
            "command": list(command),
            "recipe": run.recipe,
            "task": task,
            "model": run.model,
            "config": configs.to_dict(run),
            "versions": versions(),
            "seed": run.train.seed,
            "data": [os.path.abspath(root) for root in data],  # found again from another working folder
            "images": os.path.abspath(folder_and_split(str(data[0]))[0] if images is None else images),
            "store": None if store is None else os.path.abspath(store.path),
        },
        may_differ=("train.log_every", "train.save_every", "train.max_seconds"),
    )


def versions() -> dict[str, str]:
    """Versions of everything that numbers depend on."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in ("visling", "torch", "numpy", "tokenizers")}}


def record_size(folder: RunFolder, model: nn.Module, spec: InputSpec, store: NativeStore | None) -> None:
    """Write down how large the model is and what it reads."""
    folder.record(
        {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "inputs": configs.to_dict(spec),
            "fingerprint": "" if store is None else store.fingerprint,
        }
    )


def mean_parts(losses: Iterable[Loss], weights: Mapping[str, float]) -> dict[str, float]:
    """Exact mean of each part that has one over batches, and as "loss" the weighted sum of those that are objectives."""
    sums: dict[str, list[float]] = {}
    for loss in losses:
        for name, (amount, count) in loss.parts.items():
            known = sums.setdefault(name, [0.0, 0.0])
            known[0] += float(amount)
            known[1] += float(count)
    means = {name: amount / max(count, 1.0) for name, (amount, count) in sums.items() if count}
    return {"loss": sum(weight * means.get(name, 0.0) for name, weight in weights.items()), **means}


def conclude(folder: RunFolder, state: State, log: Log, *, layout: TextLayout, store: NativeStore | None) -> None:
    """What follows the last update: cut texts are reported, the detector is kept, and only then is the run marked as finished.

    A run killed before the mark does all of this again when it is resumed; one that `max_seconds` stopped stays open.
    """
    if layout.truncated:
        often = f"{layout.truncated} times, counted over all epochs,"
        log.event(f"{often} a text was longer than {layout.spec.max_tokens} word pieces and was cut", step=state.step)
    detector = None if store is None else store.settings.get("detector")
    if detector is not None and not Path(detector).is_dir():
        gone = f"no detector was kept beside the model: {detector}, which made the regions, is gone"
        log.event(f"{gone}. To predict, name one with --detector", step=state.step)
    elif detector is not None:
        folder.keep(Path(detector), "detector")
    if state.stopped != "max_seconds":
        folder.finish()
