"""All recipes by name: the tables of the modules of this package, joined; and those of a module of your own.

A recipe of your own is named MODULE:NAME, for example my_package.my_recipes:mine. The module offers tables as the
families' files do: `PRETRAINING` and `FINETUNING`, each from a name to a function that returns the config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from visling.config import load_module
from visling.errors import ConfigError, nearest
from visling.recipes import cvlp, lxmert, nlvr, own, releases, scenes, vilbert, visualbert, vlbert
from visling.recipes.configs import FinetuneConfig, PretrainConfig

PUBLISHED_PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {
    **visualbert.PRETRAINING,
    **vlbert.PRETRAINING,
    **vilbert.PRETRAINING,
    **lxmert.PRETRAINING,
    **cvlp.PRETRAINING,
}
"""Pre-training of the papers and releases."""

PUBLISHED_FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {
    **visualbert.FINETUNING,
    **vlbert.FINETUNING,
    **vilbert.FINETUNING,
    **lxmert.FINETUNING,
    **cvlp.FINETUNING,
}
"""Fine-tuning of the papers and releases."""

PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {
    **visualbert.SCENES,
    **vlbert.SCENES,
    **vilbert.SCENES,
    **lxmert.SCENES,
    **cvlp.SCENES,
    **nlvr.PRETRAINING,
    **own.PRETRAINING,
    **PUBLISHED_PRETRAINING,
}

FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {
    **scenes.FINETUNING,
    **nlvr.FINETUNING,
    **own.FINETUNING,
    **PUBLISHED_FINETUNING,
}

T = TypeVar("T")


def common_differences(config: PretrainConfig | FinetuneConfig) -> Mapping[str, str]:
    """Topic -> what the release does in all its runs; nothing for a recipe that is not published."""
    published = PUBLISHED_PRETRAINING if isinstance(config, PretrainConfig) else PUBLISHED_FINETUNING
    return releases.COMMON[config.model] if config.recipe in published and config.model in releases.COMMON else {}


def summarise(recipe: Callable[[], Any]) -> str:
    """First paragraph of a recipe's docstring; one that models and tasks share is a partial function and names the
    task by its title."""
    text = " ".join((getattr(recipe, "func", recipe).__doc__ or "").partition("\n\n")[0].split())
    given: tuple[Any, ...] = getattr(recipe, "args", ())
    return text.replace("A task", scenes.TASKS[given[1]].title) if len(given) > 1 else text


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


def _find(name: str, table: Mapping[str, Callable[[], T]], attribute: str) -> Callable[[], T]:
    path, colon, key = name.rpartition(":")
    if colon:
        table = _load_table(path, attribute, name)
    if key not in table:
        other = {"PRETRAINING": ("finetune", FINETUNING), "FINETUNING": ("pretrain", PRETRAINING)}[attribute]
        if not colon and name in other[1]:
            raise ConfigError(f"{name!r} is a recipe of {other[0]}: use visling {other[0]}. {nearest(key, table)}")
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
