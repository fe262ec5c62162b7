"""A model before its pre-training, to be compared with itself: random weights of a seed, other things equal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from visling import models, runtime
from visling.data.corpora.base import check_images
from visling.errors import ConfigError, DataError, nearest
from visling.models.base import Encoder
from visling.pretrained.features import measure_features
from visling.pretrained.folder import ModelFolder
from visling.regions.store import NativeStore
from visling.runs.examples import OpenedRun
from visling.runs.inputs import Inputs
from visling.tasks.base import Task, list_images, read_records
from visling.types import Record


def reset_weights(opened: OpenedRun, seed: int) -> OpenedRun:
    """The same run with a randomly initialised encoder."""
    saved, inputs = opened.saved, opened.inputs
    encoder = _draw_encoder(saved.model, saved.config, opened.store, opened.records, seed)
    return replace(opened, model=None, encoder=encoder.to(inputs.device).eval())


def _draw_encoder(family: str, config: Any, store: NativeStore | None, records: Sequence[Record], seed: int) -> Encoder:
    """Random weights; statistics of features, if it keeps any, are measured on the images of the records."""
    runtime.seed_everything(seed)
    return measure_features(models.build(family, config), store, list_images(records))


def is_preset(name: str) -> bool:
    """Whether a model is named as FAMILY:PRESET, not as a folder."""
    return re.fullmatch(r"[\w.]+:[\w-]+", name) is not None and not Path(name).exists()


def open_preset(
    name: str,
    task: Task[Any, Any],
    *,
    split: str,
    data: Path,
    store: Path,
    seed: int,
    device: str = "auto",
    limit: int | None = None,
) -> OpenedRun:
    """A preset of a family with random weights, its width of features that of the store, with the examples of a split.

    Args:
        name: FAMILY:PRESET, such as "lxmert:scenes".
        limit: only the first so many examples; None = all.
    Raises:
        ConfigError: no such preset, or one with task tokens.
        DataError, StoreError: see their messages; a split without examples.
    """
    family, _, preset = name.partition(":")
    spec = models.spec(family)
    if preset not in spec.presets:
        raise ConfigError(f"{family} has no preset {preset!r}. {nearest(preset, spec.presets)}")
    regions = NativeStore.open(store)
    config = replace(spec.presets[preset], feature_size=regions.feature_size)
    records = read_records(task, data, split)[:limit]
    if not records:
        raise DataError(f"split {split!r} of {data} holds no example.")
    check_images(records, regions)
    inputs = Inputs(family, config, regions, device)
    encoder = _draw_encoder(family, config, regions, records, seed)
    return OpenedRun(
        saved=ModelFolder(
            path=Path(name),
            model=family,
            config=config,
            task=None,
            text_only=False,
            fingerprint=regions.fingerprint,
            weights={},
            state={},
        ),
        task=task,
        model=None,
        encoder=encoder.to(inputs.device).eval(),
        extractor=None,
        inputs=inputs,
        records=records,
        notice="",
        data=data,
    )
