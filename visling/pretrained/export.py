"""Model folders -> weight files in a released layout, or folders for transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visling import models
from visling.checkpoints import files
from visling.checkpoints.files import check_absent, whole_folder, write_tensors
from visling.checkpoints.keymap import KeyMap
from visling.errors import CheckpointError, ConfigError, nearest
from visling.models.base import ModelSpec
from visling.pretrained.convert import OBJECTIVES
from visling.pretrained.folder import KEPT, ModelFolder, read_model_folder
from visling.pretrained.recognise import BY_PRODUCTS
from visling.vision.extractors import NETWORKS


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What `export` did."""

    path: Path
    layout: str
    tensors: int
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Path in the model folder -> why it was not written."""


def export(folder: Path, out: Path, *, layout: str = "official") -> Exported:
    """Write the weights of a model folder, or of a run folder, in a released layout.

    Args:
        out: weight file (.safetensors, else a PyTorch file); for `layout` "transformers" a folder that its classes load
            by from_pretrained.
        layout: "official" = the one that the weights were converted from, else the family's first that has names for
            all of them; or any by name.
    Raises:
        CheckpointError: the layout has no name for a tensor, or `out` is taken.
        ConfigError: the family has no such layout.
    """
    check_absent(out)
    saved = read_model_folder(folder)
    spec = models.spec(saved.model)
    if layout != "official" and layout not in spec.keys:
        raise ConfigError(f"{saved.model} has no layout {layout!r}. {nearest(layout, [*spec.keys, 'official'])}")
    parts, left_out = _parts(saved)
    found, tensors, names = _invert(saved, spec, parts, layout)
    if saved.extractor is not None:
        keys = NETWORKS[saved.extractor.kind].keys
        if found in keys:
            network = {name: tensor for name, tensor in saved.weights.items() if name.startswith("extractor.")}
            tensors |= keys[found].invert(network)
        else:
            left_out["extractor"] = "the layout has no names for the network that computes features"
    if found == saved.source.get("layout"):
        tensors = _as_it_came(saved, tensors)
    if found == "transformers":
        with whole_folder(out) as target:
            described = _describe_for_transformers(saved, spec, names)
            (target / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            shutil.copyfile(saved.path / "vocab.txt", target / "vocab.txt")
            write_tensors(tensors, target / "model.safetensors")
    else:
        write_tensors(tensors, out)
    return Exported(path=out, layout=found, tensors=len(tensors), left_out=left_out)


def _describe_for_transformers(saved: ModelFolder, spec: ModelSpec[Any], parts: Mapping[str, str]) -> dict[str, Any]:
    """config.json of the family's classes in transformers, with the answers of its classifier where known."""
    if spec.transformers is None:
        raise ConfigError(f"{saved.model} has no classes in transformers: its ModelSpec lacks `transformers`.")
    heads = {
        part: {
            name.removeprefix(f"{path}."): tensor
            for name, tensor in saved.weights.items()
            if name.startswith(f"{path}.")
        }
        for path, part in parts.items()
        if path != "encoder"
    }
    described = spec.transformers(saved.config, heads)
    labels, answers = described.pop("num_labels", 2), list(saved.state.get("answers", []))
    if len(answers) == labels:
        described["id2label"] = {str(number): answer for number, answer in enumerate(answers)}
        described["label2id"] = {answer: number for number, answer in enumerate(answers)}
    elif labels != 2:  # the default of transformers
        described["num_labels"] = labels
    return described


def _as_it_came(saved: ModelFolder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the layout that a model was converted from, with those kept for writing back, in the file's
    precision."""
    precision = saved.source.get("precision", {})
    found = {
        name: tensor.to(getattr(torch, precision[name])) if name in precision else tensor
        for name, tensor in tensors.items()
    }
    kept = files.read(saved.path / KEPT) if (saved.path / KEPT).exists() else {}
    return {**kept, **found}


_ALIASES: Mapping[str, tuple[str, ...]] = {
    "classify": ("classifier", "answers"),
    "classifier": ("classifier", "answers"),
    "answers": ("classifier", "answers"),
    "pair": ("pair", "classifier"),
    "score": ("score", "classifier"),
}
"""Head of a task -> names that its part may have; most releases call the head of any task its classifier."""


def _parts(saved: ModelFolder) -> tuple[dict[str, tuple[tuple[str, ...], dict[str, Tensor]]], dict[str, str]]:
    """Path -> names that its part may have in a key map, and its tensors; and what is no weight of the model."""
    objectives = {objective: part for part, objective in OBJECTIVES.items()}
    parts: dict[str, tuple[tuple[str, ...], dict[str, Tensor]]] = {}
    left_out: dict[str, str] = {}
    unfilled = frozenset(saved.source.get("fresh", ()))
    for name, tensor in saved.weights.items():
        if name in unfilled:
            left_out[name] = "was not in the converted file"
            continue
        first, *rest = name.split(".")
        if first == "extractor":
            continue  # its names are in vision/extractors.py
        place = (
            first if first == "encoder" else f"{first}.{rest[0]}" if first == "heads" else ".".join([first, *rest[:2]])
        )
        if first == "encoder":
            names: tuple[str, ...] = ("encoder",)
        elif first == "heads":
            own = saved.heads[place].part if place in saved.heads else rest[0]
            names = _ALIASES.get(own, (own,))
        elif place.endswith(".head") and rest[0] in objectives:
            names = (objectives[rest[0]],)
        else:
            left_out[place] = "state of an objective, not a weight of the model"
            continue
        parts.setdefault(place, (names, {}))[1][name.removeprefix(f"{place}.")] = tensor
    return parts, left_out


def _invert(
    saved: ModelFolder,
    spec: ModelSpec[Any],
    parts: Mapping[str, tuple[tuple[str, ...], dict[str, Tensor]]],
    layout: str,
) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    """Layout, tensors under its names, and path -> part of its key map."""
    if layout == "official":
        own = [saved.source.get("layout", ""), saved.task or "", spec.layout, *spec.keys]
        foreign = {"bert", "transformers", "volta", *BY_PRODUCTS} - ({"volta"} & {own[0]})
        layouts = [name for name in dict.fromkeys(own) if name in spec.keys and name not in foreign]
    else:
        layouts = [layout]
    reasons = []
    for aliases in (1, None):
        for name in layouts:
            try:
                return name, *name_tensors(spec.keys[name], parts, aliases)
            except CheckpointError as error:
                reasons.append(f"{name}: {error}")
    cure = (
        " Released models do not whiten region features: train the model with --set encoder.whiten_features=false."
        if any(".whiten." in reason for reason in reasons)
        else ""
    )
    raise CheckpointError(
        f"{saved.path} cannot be written as {layout!r} of {saved.model}. {' '.join(dict.fromkeys(reasons))}{cure}"
    )


def name_tensors(
    keys: KeyMap, parts: Mapping[str, tuple[tuple[str, ...], dict[str, Tensor]]], aliases: int | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under the names of a layout; of the names that a part may have, the first that the layout knows."""
    chosen = {"encoder": "encoder"}
    ours = {f"encoder.{name}": tensor for name, tensor in parts["encoder"][1].items()}
    keys.invert(ours)
    for place, (names, tensors) in parts.items():
        reasons = []
        for part in names[:aliases] if place not in chosen else ():
            added = {f"{part}.{name}": tensor for name, tensor in tensors.items()}
            try:
                keys.invert(ours | added)
            except CheckpointError as error:
                reasons.append(str(error))
                continue
            chosen[place] = part
            ours |= added
            break
        if place not in chosen:
            raise CheckpointError(" ".join(reasons))
    return keys.invert(ours), chosen
