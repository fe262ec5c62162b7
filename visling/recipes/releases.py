"""What all runs of a release have in common and differs here, whatever the recipe; and how a run gets its start."""

from __future__ import annotations

from collections.abc import Mapping

from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.recipes.multitask_configs import MultitaskConfig

_STORED: Mapping[str, str] = {
    "stored regions": "float32; a store holds features (unless --dtype float32), class distributions and confidences "
    "in float16",
}


def _average_over_devices(how: str) -> Mapping[str, str]:
    return {
        "losses": f"averaged on each device ({how}), then over the devices; here over all examples of an "
        'update, or with train.normalise = "micro_steps" and --processes N as there'
    }


COMMON: Mapping[str, Mapping[str, str]] = {
    "visualbert": {
        **_STORED,
        **_average_over_devices("DataParallel"),
        "last batch of an epoch": "kept, though not full; the schedule does not count it, so the last updates, up to "
        "one for each epoch, have a rate of 0",
    },
    "vlbert": {
        **_STORED,
        **_average_over_devices("4 or 16 GPUs"),
        "last batch of an epoch": "kept, though not full: up to one more update per epoch",
        "accumulation": "runs across epochs; here micro-batches that do not fill an update at the end of an epoch are "
        "dropped",
        "fp16": "where a recipe's release says so, half-precision weights and batch norms (apex O2); the loss scale is "
        "called dynamic, but bounded by 128 on both sides. Here: bf16, weights in float32, no loss scale",
    },
    "vilbert": {**_STORED, **_average_over_devices("DistributedDataParallel or DataParallel")},
    "vilbert-baseline": {**_STORED, **_average_over_devices("DistributedDataParallel or DataParallel")},
    "lxmert": {**_STORED, **_average_over_devices("4 GPUs")},
    "cvlp": {**_STORED, **_average_over_devices("DataParallel")},
}
"""Family -> topic -> what its release does in every run."""

COMMON_IN_FINETUNING: Mapping[str, Mapping[str, str]] = {
    family: {"last batch of an epoch": "kept, though not full: up to one more update per epoch"}
    for family in ("vilbert", "vilbert-baseline")
}
"""The same of every fine-tuning."""

FINETUNED_ON_ONE_DEVICE = ("lxmert", "cvlp")
"""Families whose release averages losses over devices in pre-training alone."""


def describe_start(config: PretrainConfig | FinetuneConfig | MultitaskConfig) -> str:
    """What a run's weights should start from, and how to say so; nothing for one that starts from scratch."""
    if config.start == "random":
        return ""
    settings = config.objective_settings if isinstance(config, PretrainConfig) else {}
    key_alone = settings.get("region_contrast", {}).get("key_start") == "init"
    what = "the key network of the published run" if key_alone else "the published run"
    return f"{what} starts from {config.start}: name such a model with --init"
