"""All recipes by name: the tables of the modules of this package, joined; and those of a module of your own.

A recipe of your own is named MODULE:NAME, for example my_package.my_recipes:mine. The module offers tables as the
families' files do: `PRETRAINING`, `FINETUNING` and `MULTITASK`, each from a name to a function that returns the config.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from visling.config import load_module
from visling.errors import ConfigError, nearest
from visling.recipes import (
    cvlp,
    lxmert,
    multitask,
    nlvr,
    own,
    releases,
    scenes,
    vilbert,
    vilbert_baseline,
    visualbert,
    vlbert,
)
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.recipes.multitask_configs import MultitaskConfig

PUBLISHED_PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {
    **visualbert.PRETRAINING,
    **vlbert.PRETRAINING,
    **vilbert.PRETRAINING,
    **vilbert_baseline.PRETRAINING,
    **lxmert.PRETRAINING,
    **cvlp.PRETRAINING,
}
"""Pre-training of the papers and releases."""

PUBLISHED_FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {
    **visualbert.FINETUNING,
    **vlbert.FINETUNING,
    **vilbert.FINETUNING,
    **vilbert_baseline.FINETUNING,
    **lxmert.FINETUNING,
    **cvlp.FINETUNING,
}
"""Fine-tuning of the papers and releases."""

PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {
    **visualbert.SCENES,
    **vlbert.SCENES,
    **vilbert.SCENES,
    **vilbert_baseline.SCENES,
    **lxmert.SCENES,
    **cvlp.SCENES,
    **nlvr.PRETRAINING,
    **own.PRETRAINING,
    **PUBLISHED_PRETRAINING,
}

FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {
    **scenes.FINETUNING,
    **vlbert.SCENES_FINETUNING,
    **vilbert_baseline.SCENES_FINETUNING,
    **nlvr.FINETUNING,
    **own.FINETUNING,
    **PUBLISHED_FINETUNING,
}

MULTITASK: Mapping[str, Callable[[], MultitaskConfig]] = multitask.MULTITASK

T = TypeVar("T")


def common_differences(config: PretrainConfig | FinetuneConfig | MultitaskConfig) -> Mapping[str, str]:
    """Topic -> what the release does in all its runs; nothing for a recipe that is not published."""
    published: Mapping[str, Any] = PUBLISHED_FINETUNING
    if isinstance(config, PretrainConfig):
        published = PUBLISHED_PRETRAINING
    elif isinstance(config, MultitaskConfig):
        published = multitask.PUBLISHED
    if config.recipe not in published:
        return {}
    common = releases.COMMON[config.model]
    if isinstance(config, PretrainConfig):
        return common
    one_device = config.model in releases.FINETUNED_ON_ONE_DEVICE
    topics = {topic: told for topic, told in common.items() if topic != "losses" or not one_device}
    return {**topics, **releases.COMMON_IN_FINETUNING.get(config.model, {})}


def summarise(recipe: Callable[[], Any]) -> str:
    """First paragraph of a recipe's docstring; one that models and tasks share is a partial function and names the
    task by its title."""
    return explain(recipe)[0]


def explain(recipe: Callable[[], Any]) -> tuple[str, str, str]:
    """What a recipe's docstring says: its first paragraph, the others, and the source of its numbers."""
    function = getattr(recipe, "func", recipe)
    text, _, source = inspect.cleandoc(function.__doc__ or "").partition("\n\nSource:\n")
    first, *others = text.partition("\n\nArgs:\n")[0].split("\n\n")
    first, more, source = (" ".join(part.split()) for part in (first, " ".join(others), source))
    given: tuple[Any, ...] = getattr(recipe, "args", ())
    return (first.replace("A task", scenes.TASKS[given[1]].title) if len(given) > 1 else first), more, source


def find_pretraining(name: str) -> Callable[[], PretrainConfig]:
    """A recipe for pre-training, of this package or of a module of your own.

    Raises:
        ConfigError: no such recipe.
    """
    return _find(name, PRETRAINING, "PRETRAINING")


def find_finetuning(name: str) -> Callable[[], FinetuneConfig]:
    """A recipe for fine-tuning, of this package or of a module of your own.

    Raises:
        ConfigError: no such recipe.
    """
    return _find(name, FINETUNING, "FINETUNING")


def find_multitask(name: str) -> Callable[[], MultitaskConfig]:
    """A recipe of several tasks, of this package or of a module of your own.

    Raises:
        ConfigError: no such recipe.
    """
    return _find(name, MULTITASK, "MULTITASK")


def _find(name: str, table: Mapping[str, Callable[[], T]], attribute: str) -> Callable[[], T]:
    path, colon, key = name.rpartition(":")
    if colon:
        table = _load_table(path, attribute, name)
    if key not in table:
        others = {"pretrain": PRETRAINING, "finetune": FINETUNING, "multitask": MULTITASK}
        if not colon and (verb := next((verb for verb, other in others.items() if name in other), None)):
            raise ConfigError(f"{name!r} is a recipe of {verb}: use visling {verb}. {nearest(key, table)}")
        raise ConfigError(f"no recipe {name!r}. {nearest(key, table)}")
    return table[key]


def _load_table(path: str, attribute: str, name: str) -> Mapping[str, Any]:
    module = load_module(path)
    if module is None:
        raise ConfigError(f"no recipe {name!r}: there is no module {path}. Check the path; it must be importable.")
    table = getattr(module, attribute, None)
    if not isinstance(table, Mapping):
        raise ConfigError(f"no recipe {name!r}: module {path} offers no table {attribute} (name -> function).")
    return table
