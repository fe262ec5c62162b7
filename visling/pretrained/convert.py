"""Released weight files -> model folders, and back.

    file -> tensors -> key map -> encoder + heads -> model folder -> key map, backwards -> file, or a folder for
    transformers

The contents of a file are read from its names and shapes; what they leave open (the preset, the order of the answers)
is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visling import models, runtime
from visling.checkpoints import files
from visling.checkpoints.files import check_absent, whole_folder, write_tensors
from visling.checkpoints.keymap import Coverage
from visling.data.answers import AnswerVocabulary
from visling.data.text import Tokenizer, check_task_token
from visling.errors import CheckpointError, ConfigError
from visling.feature_kinds import describe_kind, fits
from visling.models.base import Encoder
from visling.models.task_model import SavedHead
from visling.pretrained.answers import ANSWER_TASKS, save_answers, why_not_of
from visling.pretrained.features import measure_features
from visling.pretrained.folder import KEPT, describe_model_folder
from visling.pretrained.recognise import (
    Choice,
    check_file,
    choose,
    find_heads,
    find_weights,
    fitting_layouts,
    listed,
    with_bert_prefix,
)
from visling.regions.store import NativeStore
from visling.tasks import base as tasks

OBJECTIVES: Mapping[str, str] = {
    "vocabulary": "masked_lm",
    "matching": "matching",
    "region_targets": "masked_regions",
    "answers": "image_qa",
    "projection": "region_contrast",
}
"""Part of the key maps -> objective whose head it is."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What `convert` did."""

    path: Path
    model: str
    preset: str
    """Empty if a config was given."""
    layout: str
    release: str
    """Name in the catalogue; empty if it is not listed."""
    task: str | None
    heads: Mapping[str, SavedHead]
    """By path in the model folder."""
    coverage: Coverage


def convert(
    source: str | Path,
    out: Path,
    *,
    layout: str | None = None,
    model: str | None = None,
    preset: str | None = None,
    config: Any = None,
    settings: Sequence[str] = (),
    release: str | None = None,
    task: str | None = None,
    task_token: int | None = None,
    answers: Sequence[Path] = (),
    other_answers: bool = False,
    encoder_only: bool = False,
    features: Path | None = None,
    seed: int = 0,
    offline: bool | None = None,
) -> Converted:
    """Write a model folder from a released weight file. Every key of the file and every parameter must be accounted
    for.

    Args:
        source: weight file, folder that holds one, name in the catalogue, or owner/name on the hub.
        layout: key map of the family; None = of the release, else the only one that the names fit.
        model: family; None = of the release, else the only one that the names fit.
        preset: None = of the release, else the only one that the shapes fit.
        config: the family's config, instead of a preset.
        settings: changes of the preset, `name=value`.
        release: name in the catalogue; None = the entry named like the file, if neither `layout` nor `model` is given.
        task: what the model will be used for; None = question answering if there is a classifier with as many outputs
            as a released one.
        task_token: number of that task among the file's task tokens; None = that of the release, if it has one for all
            data sets of the task.
        answers: files with the answers in the order of a classifier, each for the one of its length; for pre-training
            on questions the answer table.
        other_answers: accept lists that are not those of the release.
        encoder_only: leave all heads out.
        features: region store whose features the weights were trained on; its fingerprint is recorded.
        seed: for parameters that the file does not hold.
        offline: download nothing; None = follow VISLING_OFFLINE and HF_HUB_OFFLINE.
    Raises:
        CheckpointError: unreadable or unsafe file, another layout, weights that do not fit, answers that are missing or
            wrong, or `out` is taken.
        ConfigError: no such family, layout, preset, setting or task.
    """
    check_absent(out)
    path, known = find_weights(source, release, by_name=layout is None and model is None, offline=offline)
    tensors = files.read(path)
    check_file(path, known)
    choice = choose(tensors, known, layout=layout, model=model, preset=preset, config=config, settings=settings)
    if choice.layout == "bert":
        tensors = with_bert_prefix(tensors)
    store = None if features is None else NativeStore.open(features)
    runtime.seed_everything(seed)
    encoder, heads, coverage = _load(tensors, choice, store, encoder_only=encoder_only)
    lists = _answer_lists(choice, heads, task, answers, any_list=other_answers)
    chosen = _task(choice, heads, task, lists)
    if task_token is not None:
        check_task_token(task_token, models.spec(choice.model).inputs(choice.config).num_tasks)
    places = _places(heads, chosen)
    tokenizer = _tokenizer(choice)
    weights = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    for place, (_, module) in places.items():
        weights |= {f"{place}.{name}": tensor for name, tensor in module.state_dict().items()}
    with whole_folder(out) as folder:
        describe_model_folder(
            folder,
            model=choice.model,
            config=choice.config,
            task=chosen,
            text_only=choice.layout == "bert",
            fingerprint="" if store is None else store.fingerprint,
            features=_find_kind(choice, store),
            tokenizer=tokenizer,
            trained=f"elsewhere; converted from {path.name} (layout {choice.layout})",
            heads={place: saved for place, (saved, _) in places.items()},
            task_token=_find_task_token(choice, chosen) if task_token is None else task_token,
            source=_provenance(path, choice, coverage)
            | ({} if encoder_only else _precisions(tensors, choice, coverage)),
        )
        for place, (saved, _) in places.items():
            if saved.part in lists and (chosen is None or place.removeprefix("heads.") not in chosen.heads):
                save_answers(folder, lists[saved.part], place)
        write_tensors(weights, folder / "model.safetensors", checked=True)
        if (dropped := coverage.dropped) and not encoder_only and choice.layout != "bert":
            write_tensors({name: tensors[name] for name in dropped}, folder / KEPT)
    return Converted(
        path=out,
        model=choice.model,
        preset=choice.preset,
        layout=choice.layout,
        release="" if choice.release is None else choice.release.name,
        task=None if chosen is None else chosen.name,
        heads={place: saved for place, (saved, _) in places.items()},
        coverage=coverage,
    )


def _load(
    tensors: Mapping[str, Tensor], choice: Choice, store: NativeStore | None, *, encoder_only: bool
) -> tuple[Encoder, dict[str, tuple[SavedHead, nn.Module]], Coverage]:
    """Encoder and heads by part, filled from the file."""
    spec = models.spec(choice.model)
    if choice.layout == "bert" and getattr(choice.config, "whiten_features", False) and store is None:
        raise ConfigError(
            "this preset whitens the features by statistics of the region store, which BERT's file lacks: name the "
            "store with --features."
        )
    encoder = measure_features(models.build(choice.model, choice.config), store, store.ids if store is not None else ())
    keys = spec.keys[choice.layout]
    try:
        ours, _ = keys.convert(tensors, {"encoder"} if encoder_only else None)
        heads = find_heads(ours, spec, choice.layout, encoder)
        coverage = keys.load(tensors, {"encoder": encoder, **{part: module for part, (_, module) in heads.items()}})
    except CheckpointError as error:
        others = [fit for fit in fitting_layouts(tensors) if fit != (choice.model, choice.layout)]
        hint = f"\nThe names fit {listed(others)}." if others else ""
        raise CheckpointError(
            f"cannot read the file as {choice.layout!r} of {choice.model}, preset {choice.preset or 'as given'}: "
            f"{error}{hint}"
        ) from error
    if choice.layout == "bert":
        encoder.after_text_weights()
    return encoder, heads, coverage


def _answer_lists(
    choice: Choice,
    heads: Mapping[str, tuple[SavedHead, nn.Module]],
    task: str | None,
    paths: Sequence[Path],
    *,
    any_list: bool,
) -> dict[str, AnswerVocabulary]:
    """Part -> answers in the order of its outputs, for classifiers with a list; each list belongs to the classifier of
    its length."""
    if paths and task is not None and tasks.load(task).answers is tasks.Task.answers:
        raise ConfigError(f"the task {task} has no list of answers: --answers is not for it.")
    sizes = {
        part: saved.head.outputs
        for part, (saved, _) in heads.items()
        if saved.head.kind == "classify" and part.startswith(("classifier", "answers"))
    }
    if paths and not sizes:
        raise CheckpointError(
            f"--answers needs a classifier over answers; the file has none, only: {', '.join(heads) or 'no head'}."
        )
    known = models.spec(choice.model).answer_list(choice.layout)
    found: dict[str, AnswerVocabulary] = {}
    for path in paths:
        listed = AnswerVocabulary.load(path)
        part = next((part for part, outputs in sizes.items() if outputs == len(listed) and part not in found), None)
        if part is None:
            raise CheckpointError(
                f"{path} lists {len(listed)} answers, but the classifier has {' or '.join(map(str, sizes.values()))}. "
                f"For {choice.model} the list is {known.file}."
            )
        if not any_list and (wrong := why_not_of(known, listed)):
            raise CheckpointError(
                f"{path} is not the list of the release: {wrong}. For {choice.model} it is {known.file}. Another "
                "list, or another order, gives wrong answers without an error. If these weights were trained "
                "with it, pass --other-answers."
            )
        found[part] = listed
    return found


def _task(
    choice: Choice,
    heads: Mapping[str, tuple[SavedHead, nn.Module]],
    name: str | None,
    lists: Mapping[str, AnswerVocabulary],
) -> tasks.Task[Any, Any] | None:
    """The task of the model with its answers; None for a pre-trained encoder."""
    classifiers = {part: saved.head.outputs for part, (saved, _) in heads.items() if _answers(part, saved, heads)}
    kind = None if name is None else tasks.load(name)
    if kind is not None and kind.answers is tasks.Task.answers:
        return kind.configured(models.spec(choice.model).tasks.get(kind.name, {}))
    if kind is not None and not classifiers:
        raise CheckpointError(
            f"the task {name} needs a classifier over answers; the file has none, only: "
            f"{', '.join(heads) or 'no head'}."
        )
    part = next(
        (part for part, outputs in classifiers.items() if ANSWER_TASKS.get(outputs) == (name or "vqa")),
        next(iter(classifiers), ""),
    )
    for lacking, outputs in classifiers.items():
        if lacking not in lists and (outputs in ANSWER_TASKS or (kind is not None and lacking == part)):
            listed = models.spec(choice.model).answer_list(choice.layout)
            raise CheckpointError(
                f"the file has a classifier over {outputs} answers, whose order it does not contain: give the list "
                f"with --answers FILE, once for each classifier. For {choice.model} it is {listed.file}. Other lists "
                "of the same length have another order and give wrong answers without an error. --encoder-only leaves "
                "the classifier out."
            )
    if part not in lists:
        return None
    own = ANSWER_TASKS.get(classifiers[part], "")
    name = name or (own if own in tasks.names() else "vqa")
    settings = models.spec(choice.model).tasks.get(name, {})
    return tasks.load(name).from_state({"config": dict(settings), "answers": list(lists[part])})


def _answers(part: str, saved: SavedHead, heads: Iterable[str]) -> bool:
    """Whether a head classifies answers for a task; in LXMERT's pre-trained files it is an objective's."""
    return saved.head.kind == "classify" and (
        part.startswith("classifier") or (part == "answers" and "vocabulary" not in set(heads))
    )


def _find_task_token(choice: Choice, task: tasks.Task[Any, Any] | None) -> int | None:
    """Number that the release gives the task; None without task tokens, or where it has several for it."""
    spec = models.spec(choice.model)
    if task is None or not spec.inputs(choice.config).num_tasks:
        return None
    return spec.task_tokens.get(task.name)


def _places(
    heads: Mapping[str, tuple[SavedHead, nn.Module]], task: tasks.Task[Any, Any] | None
) -> dict[str, tuple[SavedHead, nn.Module]]:
    """Path of each head in the model folder: among the task's, the objectives', or under its own name."""
    places: dict[str, tuple[SavedHead, nn.Module]] = {}
    left = dict(heads)
    for name, wanted in {} if task is None else dict(task.heads).items():
        same = [
            part
            for part, (saved, _) in left.items()
            if (saved.head.kind, saved.head.outputs) == (wanted.kind, wanted.outputs)
        ]
        # VisualBERT's matching is a classifier of two as well.
        same.sort(key=lambda part: part in OBJECTIVES and part != "answers")
        if not same:
            assert task is not None
            found = ", ".join(f"{part} ({saved.head.kind}, {saved.head.outputs})" for part, (saved, _) in heads.items())
            raise CheckpointError(
                f"the task {task.name} needs a head of kind {wanted.kind} with {wanted.outputs} outputs; the file has "
                f"{found or 'none'}. Fine-tune the encoder instead, or name the task of the file."
            )
        places[f"heads.{name}"] = left.pop(same[0])
    for part, head in left.items():
        trained = part in OBJECTIVES and (part != "answers" or "vocabulary" in heads)
        places[f"objectives.{OBJECTIVES[part]}.head" if trained else f"heads.{part}"] = head
    return places


def _tokenizer(choice: Choice) -> Tokenizer:
    """The tokenizer of the config.

    Raises:
        ConfigError: it has more word pieces than the word table has rows.
    """
    found = Tokenizer(models.spec(choice.model).inputs(choice.config).vocabulary)
    if found.size > choice.config.vocab_size:
        raise ConfigError(
            f"vocabulary {choice.config.vocabulary!r} has {found.size} entries, but the word table has "
            f"{choice.config.vocab_size} rows. Name the vocabulary of the file with --set vocabulary=FILE."
        )
    return found


def _find_kind(choice: Choice, store: NativeStore | None) -> str:
    """Kind of the features that the weights were trained on: that of the release, else of the store.

    Raises:
        CheckpointError: the store holds features of another kind than the release was trained on.
    """
    release = choice.release
    if release is None or not release.features:
        return "" if store is None else store.kind
    if store is not None and store.kind and not fits(release.features, store.kind):
        raise CheckpointError(
            f"{store.path} holds features of the kind {describe_kind(store.kind)}, but {release.name} was "
            f"trained on {describe_kind(release.features)}: leave --features out, or name a store of that kind."
        )
    return release.features


def _provenance(path: Path, choice: Choice, coverage: Coverage) -> dict[str, Any]:
    release = choice.release
    # What a file lacks is left out again when the model is written back; BERT's weights become another model.
    unfilled = {} if choice.layout == "bert" or not coverage.fresh else {"fresh": sorted(coverage.fresh)}
    known = (
        {}
        if release is None
        else {"release": release.name, "address": release.source, "licence": release.licence, "note": release.note}
    )
    return {"file": path.name, "sha256": files.digest(path), "layout": choice.layout, **known, **unfilled}


def _precisions(tensors: Mapping[str, Tensor], choice: Choice, coverage: Coverage) -> dict[str, Any]:
    """Name -> dtype, for tensors that a file does not store in float32."""
    if choice.layout == "bert":
        return {}
    keys = models.spec(choice.model).keys[choice.layout]
    read = [*coverage.tied, *(name for names in coverage.mapped.values() for name in names)]
    found = {
        keys.repaired(name): str(tensors[name].dtype).removeprefix("torch.")
        for name in read
        if tensors[name].dtype != torch.float32
    }
    return {"precision": found} if found else {}
