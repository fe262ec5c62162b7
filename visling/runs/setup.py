"""What runs share: fitting a config to a region store, opening and concluding a run folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from torch import nn

from visling import config as configs
from visling import models, runtime
from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader, Source
from visling.data.batches.region_targets import DETECTED, check_labels
from visling.data.corpora.base import split_root
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, StoreError, VislingError
from visling.objectives.masked_regions import RegionLosses
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.regions.store import NativeStore
from visling.runtime import versions
from visling.train.log import Log
from visling.train.state import RunFolder, State
from visling.types import InputSpec, RegionStore

TrainingConfig = PretrainConfig | FinetuneConfig

C = TypeVar("C", PretrainConfig, FinetuneConfig)


def fit_to_store(config: C, store: NativeStore) -> C:
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
    extracts = isinstance(config, PretrainConfig) and config.extractor is not None  # stored features are not read then
    if not extracts and config.encoder.feature_size != store.feature_size:
        if not config.any_features:
            raise StoreError(
                f"{store.path} holds features of width {store.feature_size}; recipe {config.recipe} reads {config.encoder.feature_size}, as its release "
                f"does. Use features of that width, or --set any_features=true to train another model."
            )
        config = configs.override(config, [f"encoder.feature_size={store.feature_size}"])
    losses = config.region_losses if isinstance(config, PretrainConfig) else None
    return config if losses is None else _fit_losses(config, losses, store)


def _fit_losses(config: C, losses: RegionLosses, store: NativeStore) -> C:
    lacking = [
        DETECTED[name] for name in sorted(losses.needs & DETECTED.keys()) if DETECTED[name][0] not in store.fields
    ]
    if lacking:
        field, what = lacking[0]
        mend = "with a detector that names them"
        if field == "probs":
            mend = "again with --probs, or predict the best class alone: --set region_losses.classes=hard"
        raise StoreError(
            f"{store.path} holds no {what} of regions, which recipe {config.recipe} predicts. Extract regions {mend}."
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
    if differing and not config.any_features:
        told = "; ".join(f"{width} {name}, not {losses.widths[name]}" for name, width in differing.values())
        raise StoreError(
            f"the regions of {store.path} have {told} as recipe {config.recipe} and its release. Use regions of that detector, or "
            "--set any_features=true to train another model."
        )
    for target, setting in (("region_classes", "num_classes"), ("region_attributes", "num_attributes")):
        if target in losses.needs:
            check_labels(store, target, found[setting][1])
    return configs.override(config, [f"region_losses.{setting}={width}" for setting, (_, width) in differing.items()])


class Inputs:
    """How a model reads: what a batch must deliver, the words it knows, the regions it sees, the device it is on.

    Args:
        model: family.
        config: the family's config.
        regions: where the features of regions are read; None for a model of the words alone.
        device: auto, cpu, cuda or cuda:N.
        vocabulary: file of word pieces, or the name of an embedded one; None = the config's own.
    Raises:
        ConfigError: the vocabulary has more entries than the model's word table, or no such device.
    """

    def __init__(
        self, model: str, config: Any, regions: RegionStore | None, device: str, vocabulary: str | Path | None = None
    ) -> None:
        self.spec: InputSpec = models.spec(model).inputs(config)
        self.tokenizer = Tokenizer(self.spec.vocabulary if vocabulary is None else str(vocabulary))
        if vocabulary is None and self.tokenizer.size > config.vocab_size:
            raise ConfigError(
                f"vocabulary {self.spec.vocabulary!r} has {self.tokenizer.size} entries, but encoder.vocab_size is "
                f"{config.vocab_size}. Use --set encoder.vocab_size={self.tokenizer.size}."
            )
        self.layout = TextLayout(self.tokenizer, self.spec)
        self.regions = regions
        self.device = runtime.pick_device(device)

    def loader(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int = 0,
        training: bool,
        text_only: bool = False,
        **shown: Any,
    ) -> Loader:
        """Batches of examples: in training shuffled and whole; else in order, every example once over all processes.

        Args:
            text_only: the examples have no images.
            shown: what else `Collator` takes: masking and the like.
        """
        collator = Collator(None if text_only else self.regions, self.spec, self.tokenizer, **shown)
        return Loader(
            source,
            collator,
            batch_size=batch_size,
            seed=seed,
            shuffle=training,
            drop_last=training,
            deal="examples" if training else "batches",
            pin=self.device.type == "cuda",
        )


@contextlib.contextmanager
def open_run(
    config: TrainingConfig,
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
        _record_start(folder, config, data=data, store=store, task=task, command=command, images=images)
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
    config: TrainingConfig,
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
            "recipe": config.recipe,
            "task": task,
            "model": config.model,
            "config": configs.to_dict(config),
            "versions": versions(),
            "seed": config.train.seed,
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
