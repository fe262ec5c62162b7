"""The config of a run: that of a recipe, with the encoder of the model that the run starts from, and changed settings.

config = configure(FINETUNING["lxmert-vqa-scenes"](), ["train.epochs=3", "encoder.dropout_rate=0.2"], init=start)
finetune(config, out, data=data, store=store, init=start)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from visling.errors import Conflicts
from visling.pretrained.description import read_encoder_config
from visling.recipes.changes import change_recipe
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.recipes.multitask_configs import MultitaskConfig

C = TypeVar("C", PretrainConfig, FinetuneConfig, MultitaskConfig)


def configure(
    recipe: C, settings: Sequence[str] = (), *, options: Mapping[str, Any] | None = None, init: Path | None = None
) -> C:
    """The config that the command line makes of the same recipe, settings and model.

    Args:
        settings: `a.b=value`, as after --set; they have the last word.
        options: values of `recipes.changes.OPTIONS`; None = not given.
        init: model or run folder that the run starts from.
    Raises:
        ConfigError: no such setting or value, or two that contradict each other.
        CheckpointError: no model in `init`.
    """
    conflicts = Conflicts()
    start, config = None, recipe
    with conflicts.collect():
        start = None if init is None else read_encoder_config(init)
    with conflicts.collect():
        config = change_recipe(recipe, settings, options=options, start=start)
    conflicts.refuse()
    return config


def follow_init(config: C, init: Path | None) -> C:
    """The config with the encoder of the model that a run starts from; unchanged if `configure` has seen to that."""
    return config if init is None or config.from_init is not None else configure(config, init=init)
