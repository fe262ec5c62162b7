"""The model families, by name or by module. A family's module, and with it torch, is imported when it is first asked
for, so that a list of names costs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from visling import config as configs
from visling import models
from visling.errors import ConfigError, nearest

if TYPE_CHECKING:
    from visling.models.base import Encoder, ModelSpec

MODELS: Mapping[str, str] = {
    "visualbert": "visling.models.visualbert",
    "lxmert": "visling.models.lxmert",
    "cvlp": "visling.models.cvlp",
    "vlbert": "visling.models.vlbert",
    "vilbert": "visling.models.vilbert",
}
"""Name -> module that offers `SPEC`."""

BASELINES: Mapping[str, str] = {"vilbert-baseline": "visling.models.vilbert_baseline"}
"""Models that a paper compares its own with: found by name like a family, but none of `names`, for all of which there
are recipes on scenes and comparisons."""


def names() -> tuple[str, ...]:
    """All family names of this package."""
    return tuple(MODELS)


def spec(name: str) -> ModelSpec[Any]:
    """Description of a family, by name ("lxmert") or by dotted module path ("my_package.my_model").

    Raises:
        ConfigError: no such family, or the module does not offer `SPEC`.
    """
    from visling.models.base import ModelSpec

    known = {**MODELS, **BASELINES}
    path = name if "." in name else known.get(name)
    module = None if path is None else configs.load_module(path)
    if module is None:
        raise ConfigError(
            f"no model {name!r}. {nearest(name, known)} A model of your own is given as my_package.my_module."
        )
    spec = getattr(module, "SPEC", None)
    if not isinstance(spec, ModelSpec):
        raise ConfigError(f"module {path} offers no model: expected SPEC = a visling.models.base.ModelSpec.")
    return spec


def build(name: str, config: Any) -> Encoder:
    """A randomly initialised encoder.

    Raises:
        ConfigError: no such family, or the config is not of this family.
    """
    family = spec(name)
    if not isinstance(config, family.config):
        raise ConfigError(
            f"{name} is configured by {family.config.__name__}; found {type(config).__name__}. "
            f"Presets: {', '.join(family.presets)}."
        )
    return family.build(config)


def build_tiny(name: str) -> Encoder:
    """The family's smallest preset, for tests."""
    return build(name, spec(name).presets["tiny"])


def encoder_config(model: str, given: Any) -> Any:
    """A family's config from what a setting or a run.json gives: itself, its settings as a mapping, or the name of a
    preset.

    Raises:
        ConfigError: no such family, preset or setting.
    """
    family = models.spec(model)
    if isinstance(given, family.config):
        return given
    if isinstance(given, Mapping):
        return configs.from_dict(family.config, given, where="encoder")
    if given not in family.presets:
        raise ConfigError(
            f"'encoder' is {given!r}, not a preset of {model}. {nearest(str(given), family.presets)} "
            "One setting: encoder.name=value."
        )
    return family.presets[given]


def head_styles(model: str, release: str | None = None) -> dict[str, str]:
    """Head kind -> style of a model's main release layout, or of another one, where the kinds that it lacks have the
    main one's.

    Raises:
        ConfigError: no such layout.
    """
    spec = models.spec(model)
    layouts = dict.fromkeys(layout for layout, _ in spec.head_styles)
    if release is not None and release not in layouts:
        raise ConfigError(f"{model} has no heads of a layout {release!r}. {nearest(release, layouts)}")
    return {
        kind: style
        for wanted in (spec.layout, release)
        for (layout, kind), style in spec.head_styles.items()
        if layout == wanted
    }
