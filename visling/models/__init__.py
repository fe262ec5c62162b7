"""The model families, by name. A family's module is imported when it is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from visling.errors import ConfigError, nearest
from visling.models.base import Encoder, ModelSpec

MODELS: Mapping[str, str] = {
    "visualbert": "visling.models.visualbert",
    "lxmert": "visling.models.lxmert",
    "cvlp": "visling.models.cvlp",
    "vlbert": "visling.models.vlbert",
    "vilbert": "visling.models.vilbert",
}
"""Name -> module that offers `SPEC`."""


def names() -> tuple[str, ...]:
    """All family names."""
    return tuple(MODELS)


def spec(name: str) -> ModelSpec:
    """Description of a family.

    Raises:
        ConfigError: no such family.
    """
    if name not in MODELS:
        raise ConfigError(f"no model {name!r}. {nearest(name, MODELS)}")
    found: ModelSpec = importlib.import_module(MODELS[name]).SPEC
    return found


def build(name: str, config: Any) -> Encoder:
    """An encoder with fresh weights.

    Raises:
        ConfigError: no such family, or the config is not of this family.
    """
    family = spec(name)
    if not isinstance(config, family.config):
        raise ConfigError(f"{name} is configured by {family.config.__name__}; found {type(config).__name__}. Presets: {', '.join(family.presets)}.")
    return family.build(config)


def build_tiny(name: str) -> Encoder:
    """The family's smallest preset, for tests."""
    return build(name, spec(name).presets["tiny"])
