"""The optimiser of a recipe in the words of its release: which of the official parameters it updates, at
which multiple of the rate, with which decay; the rate of every update.

Recorded from the releases: `golden/{family}_tasks/optimizer_groups.json`, at full depth.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from visling import models
from visling.checkpoints.keymap import KeyMap
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.runs import pretrain
from visling.runs.typical_batch import typical_batch, typical_sizes
from visling.runs.typical_task import typical_task_batch, untrained_task
from visling.train.optim import apply_schedule, build_optimizer, parameter_groups
from visling.vision.extractors import NETWORKS

Config = FinetuneConfig | PretrainConfig
Group = tuple[float, float]
"""Multiple of the rate, and decay."""

_ROWS = 24
"""Divisible by the number of tensors that any rule of a key map cuts one into."""


def official_names(keys: KeyMap, names: Iterable[str], parts: Mapping[str, str]) -> dict[str, set[str]]:
    """Official name of a parameter -> those of ours that it is made of; copies of tied tensors are left out.

    Args:
        names: of our parameters, as `TaskModel.named_parameters` has them.
        parts: beginning of a name of ours, such as "heads.classify" -> the part of the key map that it is.
    """
    named = {_as_part(name, parts): name for name in names}
    listed = list(named)
    marked = {name: torch.full((_ROWS, 1), float(number)) for number, name in enumerate(listed)}
    copies = {rule.theirs[0] for rule in keys.rules if rule.kind == "tie"}
    return {
        theirs: {named[listed[int(number)]] for number in tensor.unique()}
        for theirs, tensor in keys.invert(marked).items()
        if theirs not in copies
    }


def _as_part(name: str, parts: Mapping[str, str]) -> str:
    for beginning, part in parts.items():
        if name.startswith(f"{beginning}."):
            return part + name.removeprefix(beginning)
    return name


def untrained_model(config: Config) -> nn.Module:
    """The model of a recipe at its full size, without memory."""
    with torch.device("meta"):
        return untrained_task(config)[0] if isinstance(config, FinetuneConfig) else pretrain.untrained_model(config)


def groups(config: Config, layout: str, parts: Mapping[str, str]) -> dict[str, Group]:
    """Official name of every parameter that the optimiser of a recipe updates -> its group."""
    model = untrained_model(config)
    ours = {
        name: (group["lr"] / config.train.optim.lr, group["weight_decay"])
        for group in parameter_groups(model, config.train.optim)
        for name in group["names"]
    }
    found: dict[str, Group] = {}
    for theirs, made_of in _official(config, layout, model, parts).items():
        settings = {ours.get(name) for name in made_of}
        assert len(settings) == 1, f"{theirs} is made of {sorted(made_of)}, which are not in one group"
        (setting,) = settings
        if setting is not None:
            found[theirs] = setting
    return found


def frozen(config: Config, layout: str, parts: Mapping[str, str]) -> set[str]:
    """Official names of the parameters that have no gradient by construction."""
    model = untrained_model(config)
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {theirs for theirs, made_of in _official(config, layout, model, parts).items() if made_of <= still}


def excluded(config: Config, layout: str, parts: Mapping[str, str]) -> set[str]:
    """Official names of the parameters that the optimiser does not have."""
    model = untrained_model(config)
    return _official(config, layout, model, parts).keys() - groups(config, layout, parts).keys()


def without_gradient(config: Config, layout: str, parts: Mapping[str, str], **sizes: int) -> set[str]:
    """Official names of the parameters that a step leaves without a gradient.

    Args:
        sizes: of the encoder, smaller than in the recipe; its depth stays.
    """
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **sizes))
    model: nn.Module
    if isinstance(config, FinetuneConfig):
        model, task = untrained_task(config)
        batch, targets = typical_task_batch(config, task, 2)
        loss = task.loss(model(batch), targets)
    else:
        model = pretrain.untrained_model(config)
        batch, targets = typical_batch(config, next(iter(typical_sizes(config).values())), 2)
        loss = model(batch, targets)
    loss.value.backward()  # type: ignore[no-untyped-call]
    unseen = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    return {theirs for theirs, made_of in _official(config, layout, model, parts).items() if made_of <= unseen}


def rates(config: Config, total: int, done: Sequence[int]) -> list[float]:
    """Rate of the first group in a run of `total` updates, when so many updates have been made."""
    module, per_epoch = nn.Linear(1, 1, bias=False), total / config.train.epochs
    optimizer, schedule = build_optimizer(module, _for_anything(config), total, per_epoch=per_epoch)
    return [apply_schedule(optimizer, schedule, number) for number in done]


def _for_anything(config: Config) -> Any:
    """The optimiser's settings without those that name parameters."""
    return dataclasses.replace(config.train.optim, exclude=(), rates={})


def _official(config: Config, layout: str, model: nn.Module, parts: Mapping[str, str]) -> dict[str, set[str]]:
    keys = models.spec(config.model).keys[layout]
    names = [name for name, _ in model.named_parameters()]
    network = [name for name in names if name.startswith("extractor.")]
    found = official_names(keys, (name for name in names if name not in network), parts)
    if config.extractor is not None:
        found |= official_names(NETWORKS[config.extractor.kind].keys["official"], network, {})
    return found


def listed(config: Config, layout: str, parts: Mapping[str, str]) -> set[str]:
    """Official names of all parameters of a recipe's model."""
    return set(_official(config, layout, untrained_model(config), parts))


def by_group(named: Mapping[str, Group]) -> dict[Group, set[str]]:
    """Group -> names."""
    found: dict[Group, set[str]] = defaultdict(set)
    for name, group in named.items():
        found[group].add(name)
    return dict(found)
