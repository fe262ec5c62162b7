"""A recipe's config as one run has it: with the encoder of the model that it starts from, and with changed settings."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from visling import config as configs
from visling import models
from visling.data.text import Tokenizer
from visling.errors import ConfigError, Conflicts
from visling.recipes.configs import FinetuneConfig, PretrainConfig, value_at
from visling.recipes.multitask_configs import MultitaskConfig

C = TypeVar("C", PretrainConfig, FinetuneConfig, MultitaskConfig)

OPTIONS: Mapping[str, str] = {
    "--epochs": "train.epochs",
    "--batch-size": "batch_size",
    "--lr": "train.optim.lr",
    "--seed": "train.seed",
}
"""Options of the command line that are short for one setting."""


def change_recipe(
    recipe: C, settings: Sequence[str] = (), *, options: Mapping[str, Any] | None = None, start: Any = None
) -> C:
    """The config of a run: the recipe's, with the encoder of the model that it starts from, then changed settings.

    Settings of the encoder are those of that model, except the ones that `ModelSpec.kept` leaves to the recipe. A
    changed vocabulary brings its number of entries.

    Args:
        settings: `a.b=value`, as `config.override` reads them; they have the last word.
        options: values of `OPTIONS`; None = not given.
        start: config of the model's encoder; one of another family changes nothing (it is refused when it is loaded).
    Raises:
        ConfigError: no such setting or value, or an option that contradicts a setting; names all of them.
    """
    conflicts: Conflicts = Conflicts()
    given: list[str] = [*settings, *_spell_options(options or {}, settings, conflicts)]
    own = _name_values(given)
    with conflicts.collect():
        _check_length(recipe, options or {}, own)
    followed = {} if "encoder" in own else _follow(recipe, start)
    completed: list[str] = [] if "encoder" in own else _complete_vocabulary(own)
    inherited: list[str] = [f"{name}={_write(value)}" for name, value in followed.items()]
    config = recipe
    with conflicts.collect():
        config = configs.override(recipe, [*inherited, *given, *completed])
    conflicts.refuse()
    if not isinstance(start, models.spec(recipe.model).config):
        return config
    before = configs.to_dict(recipe)
    left_open = {"encoder.feature_size"} if config.any_features else set()  # the store's, and the model has the same
    taken = followed.keys() - own.keys() - left_open
    return dataclasses.replace(config, from_init={name: value_at(before, name)["here"] for name in sorted(taken)})


def describe_followed(config: PretrainConfig | FinetuneConfig | MultitaskConfig, start: Path) -> list[str]:
    """What a run's encoder has of the model that it starts from, unlike its recipe, for the log."""
    if not config.from_init:
        return []
    here = configs.to_dict(config)
    followed = [
        f"{name} {value_at(here, name)['here']} (recipe: {theirs})" for name, theirs in config.from_init.items()
    ]
    return [f"the encoder has the settings of {start}, unlike recipe {config.recipe}: {', '.join(followed)}"]


def _follow(recipe: PretrainConfig | FinetuneConfig | MultitaskConfig, start: Any) -> dict[str, Any]:
    """Setting (dotted) of the encoder -> its value in the model that a run starts from, where the recipe differs and
    does not keep its own."""
    family = models.spec(recipe.model)
    if not isinstance(start, family.config):
        return {}
    return {
        f"encoder.{name}": theirs
        for name, (_, theirs) in configs.difference(start, recipe.encoder).items()
        if name not in family.kept
    }


def _spell_options(options: Mapping[str, Any], settings: Sequence[str], conflicts: Conflicts) -> list[str]:
    """Options as settings; those to which a setting gives another value are added to the conflicts."""
    named = _name_values(settings)
    spelled = []
    for option, value in options.items():
        name = OPTIONS[option]
        if value is None:
            continue
        if name in named and _read(named[name]) != value:
            conflicts.errors.append(
                ConfigError(f"{option} {value} and --set {name}={named[name]} contradict each other: give one of them.")
            )
        spelled.append(f"{name}={_write(value)}")
    return spelled


def _check_length(
    recipe: PretrainConfig | FinetuneConfig | MultitaskConfig, options: Mapping[str, Any], named: Mapping[str, str]
) -> None:
    """Refuse a number of epochs for a recipe whose length is given in another way, unless that is changed too."""
    for field in ("max_steps", "seconds"):
        found = getattr(recipe.train, field)
        if options.get("--epochs") is not None and found is not None and f"train.{field}" not in named:
            raise ConfigError(
                f"train.{field} is {found:g} in recipe {recipe.recipe} and replaces the epochs, so --epochs would "
                f"change nothing: leave it out, or add --set train.{field}=none."
            )


def _complete_vocabulary(named: Mapping[str, str]) -> list[str]:
    """The number of entries that goes with a changed vocabulary, unless it is given too."""
    if "encoder.vocabulary" not in named or "encoder.vocab_size" in named:
        return []
    return [f"encoder.vocab_size={Tokenizer(str(_read(named['encoder.vocabulary']))).size}"]


def _name_values(settings: Sequence[str]) -> dict[str, str]:
    """Name -> text of the last value of each setting that has one."""
    return {name.strip(): value.strip() for name, equals, value in (s.partition("=") for s in settings) if equals}


def _write(value: Any) -> str:
    """A value as `config.override` reads it."""
    return "none" if value is None else json.dumps(value)


def _read(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
