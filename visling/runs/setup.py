"""What runs share: fitting a config to a region store, opening and concluding a run folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from torch import nn

from visling import config as configs
from visling import models, runtime
from visling.data.batches.region_targets import DETECTED, check_labels
from visling.data.corpora.base import split_root
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, StoreError, VislingError
from visling.models.base import Encoder
from visling.objectives.masked_regions import RegionLosses
from visling.pretrained.features import measure_features
from visling.regions.store import NativeStore
from visling.runtime import versions
from visling.train.config import TrainConfig
from visling.train.log import Log
from visling.train.state import RunFolder, State
from visling.types import InputSpec, Loss


class TrainingConfig(Protocol):
    """What pre-training and fine-tuning runs have in common."""

    @property
    def recipe(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def encoder(self) -> Any: ...
    @property
    def any_features(self) -> bool: ...
    @property
    def train(self) -> TrainConfig: ...


R = TypeVar("R", bound=TrainingConfig)


def fit_to_store(run: R, store: NativeStore) -> R:
    """The run with feature width and the widths of region losses set to those of the store, if its plan leaves them
    open.

    Raises:
        StoreError: the plan asks for other numbers, or for region losses that the store cannot answer.
    """
    if not store.manifest["regions"]:
        raise StoreError(
            f"{store.path} holds {len(store)} images and no region at all: there is nothing to see. The detector found nothing; score it with "
            "`visling detect eval`, train it longer, and extract again."
        )
    extracts = getattr(run, "extractor", None) is not None  # of pre-training alone; stored features are not read then
    if not extracts and run.encoder.feature_size != store.feature_size:
        if not run.any_features:
            raise StoreError(
                f"{store.path} holds features of width {store.feature_size}; recipe {run.recipe} reads {run.encoder.feature_size}, as its release "
                f"does. Use features of that width, or --set any_features=true to train another model."
            )
        run = configs.override(run, [f"encoder.feature_size={store.feature_size}"])
    losses: RegionLosses | None = getattr(run, "region_losses", None)  # of pre-training alone
    return run if losses is None else _fit_losses(run, losses, store)


def _fit_losses(run: R, losses: RegionLosses, store: NativeStore) -> R:
    lacking = [
        DETECTED[name] for name in sorted(losses.needs & DETECTED.keys()) if DETECTED[name][0] not in store.fields
    ]
    if lacking:
        field, what = lacking[0]
        mend = "with a detector that names them"
        if field == "probs":
            mend = "again with --probs, or tell the best class alone: --set region_losses.classes=hard"
        raise StoreError(
            f"{store.path} holds no {what} of regions, which recipe {run.recipe} tells. Extract regions {mend}."
        )
    soft = losses.classes in ("kl", "cross_entropy")
    # A store without names does not say how many there are: it is taken at the recipe's word.
    found = {
        "num_classes": (
            "classes",
            store.fields["probs"].width if soft else len(store.class_names) or losses.num_classes,
        ),
        "num_attributes": ("attributes", len(store.attribute_names) or losses.num_attributes),
        "feature_size": ("features", store.feature_size),
    }
    differing = {
        setting: (name, width) for setting, (name, width) in found.items() if losses.widths.get(name, width) != width
    }
    if differing and not run.any_features:
        told = "; ".join(f"{width} {name}, not {losses.widths[name]}" for name, width in differing.values())
        raise StoreError(
            f"the regions of {store.path} have {told} as recipe {run.recipe} and its release. Use regions of that detector, or "
            "--set any_features=true to train another model."
        )
    for target, setting in (("region_classes", "num_classes"), ("region_attributes", "num_attributes")):
        if target in losses.needs:
            check_labels(store, target, found[setting][1])
    return configs.override(run, [f"region_losses.{setting}={width}" for setting, (_, width) in differing.items()])


def build_encoder(run: TrainingConfig, store: NativeStore | None, images: Iterable[str]) -> Encoder:
    """The run's encoder with fresh weights, fitted to the features of its training images: a store may hold those of a
    test, too."""
    encoder = models.build(run.model, run.encoder)
    return encoder if getattr(run, "extractor", None) is not None else measure_features(encoder, store, images)


def build_tokenizer(run: TrainingConfig) -> Tokenizer:
    """The tokenizer of a run's model.

    Raises:
        ConfigError: the vocabulary has more entries than the model's word table.
    """
    found = Tokenizer(models.spec(run.model).inputs(run.encoder).vocabulary)
    if found.size > run.encoder.vocab_size:
        raise ConfigError(
            f"vocabulary {run.encoder.vocabulary!r} has {found.size} entries, but encoder.vocab_size is {run.encoder.vocab_size}. "
            f"Use --set encoder.vocab_size={found.size}."
        )
    return found


@contextlib.contextmanager
def open_run(
    run: TrainingConfig,
    out: Path,
    *,
    data: Sequence[str | Path],
    store: NativeStore | None,
    task: str | None,
    resume: bool,
    stream: TextIO | None,
    command: Sequence[str],
    images: Path | None = None,
) -> Iterator[tuple[RunFolder, Log]]:
    """A run folder with everything about the run written down, and its log; `conclude` marks it as finished.

    A run that fails before anything is saved leaves no folder behind, so that the mended command can use the same one.

    Args:
        images: folder of the pictures, if it is not that of the annotations.
    """
    existed = out.exists()
    folder = RunFolder.create(out, resume=resume)
    try:
        _record_start(folder, run, data=data, store=store, task=task, command=command, images=images)
        with Log(folder.log, stream=stream) as log:
            yield folder, log
    except VislingError:
        if not resume and runtime.is_main() and not folder.has_last and not folder.model.exists():
            for file in (folder.log, folder.path / "run.json"):
                file.unlink(missing_ok=True)
            if not existed:
                folder.path.rmdir()
        raise


def _record_start(
    folder: RunFolder,
    run: TrainingConfig,
    *,
    data: Sequence[str | Path],
    store: NativeStore | None,
    task: str | None,
    command: Sequence[str],
    images: Path | None,
) -> None:
    folder.record(
        {
            "command": list(command),
            "recipe": run.recipe,
            "task": task,
            "model": run.model,
            "config": configs.to_dict(run),
            "versions": versions(),
            "seed": run.train.seed,
            "data": [os.path.abspath(root) for root in data],  # found again from another working folder
            "images": os.path.abspath(split_root(str(data[0]))[0] if images is None else images),
            "store": None if store is None else os.path.abspath(store.path),
        },
        may_differ=("train.log_every", "train.save_every", "train.max_seconds"),
    )


def record_size(folder: RunFolder, model: nn.Module, spec: InputSpec, store: NativeStore | None) -> None:
    """Write down how large the model is and what it reads."""
    folder.record(
        {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "inputs": configs.to_dict(spec),
            "fingerprint": "" if store is None else store.fingerprint,
        }
    )


def mean_over_batches(losses: Iterable[Loss], weights: Mapping[str, float]) -> dict[str, float]:
    """Exact mean of each part that has one over batches, and as "loss" the weighted sum of those that are
    objectives."""
    sums: dict[str, list[float]] = {}
    for loss in losses:
        for name, (amount, count) in loss.parts.items():
            known = sums.setdefault(name, [0.0, 0.0])
            known[0] += float(amount)
            known[1] += float(count)
    means = {name: amount / max(count, 1.0) for name, (amount, count) in sums.items() if count}
    return {"loss": sum(weight * means.get(name, 0.0) for name, weight in weights.items()), **means}


def conclude_run(folder: RunFolder, state: State, log: Log, *, layout: TextLayout, store: NativeStore | None) -> None:
    """What follows the last update: cut texts are reported, the detector is kept, and only then is the run marked as
    finished.

    A run killed before the mark does all of this again when it is resumed; one that `max_seconds` stopped stays open.
    """
    if layout.truncated:
        often = f"{layout.truncated} times, counted over all epochs,"
        log.event(f"{often} a text was longer than {layout.spec.max_tokens} word pieces and was cut", step=state.step)
    detector = None if store is None else store.settings.get("detector")
    if detector is not None and not Path(detector).is_dir():
        gone = f"no detector was kept beside the model: {detector}, which made the regions, is gone"
        log.event(f"{gone}. To predict, name one with --detector", step=state.step)
    elif detector is not None:
        folder.keep(Path(detector), "detector")
    if state.stopped != "max_seconds":
        folder.finish()
