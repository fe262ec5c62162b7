"""The inputs of a run's model: its config fitted to a region store, and batches of examples."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from visling import config as configs
from visling import models, runtime
from visling.data.batches.collate import Collator
from visling.data.batches.examples import Source
from visling.data.batches.loader import Loader
from visling.data.batches.pixels import Pictures
from visling.data.batches.region_targets import DETECTED, check_labels
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, Conflicts, StoreError
from visling.objectives.masked_regions import RegionLosses
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.regions.on_device import DeviceFeatures, FeatureRows, load_features
from visling.regions.store import NativeStore
from visling.types import Batch, InputSpec, Record, RegionStore, Targets

C = TypeVar("C", PretrainConfig, FinetuneConfig)


def fit_to_store(config: C, store: NativeStore) -> C:
    """The config with the width of features and of region losses set to those of the store, where it leaves them open.

    Raises:
        StoreError: the config requires other widths, or region losses whose targets the store lacks.
    """
    if not store.manifest["regions"]:
        raise StoreError(
            f"{store.path} holds {len(store)} images and no region at all: there is nothing to see. "
            "The detector found nothing; score it with `visling detect eval`, train it longer, and extract again."
        )
    conflicts = Conflicts()
    with conflicts.collect():
        config = _fit_encoder(config, store)
    with conflicts.collect():
        if isinstance(config, PretrainConfig) and config.region_losses is not None:
            widths = _fit_losses(config.region_losses, config, store)
            config = configs.override(config, [f"region_losses.{name}={width}" for name, width in widths.items()])
    conflicts.refuse()
    return config


def _fit_encoder(config: C, store: NativeStore) -> C:
    if config.extractor is not None or config.encoder.feature_size == store.feature_size:
        return config  # with an extractor, stored features are not read
    if not config.any_features:
        here = f"{store.path} holds features of width {store.feature_size}"
        width = config.encoder.feature_size
        if "encoder.feature_size" in (config.from_init or {}):
            raise StoreError(
                f"{here}; the model that --init names reads {width}. Use features of that width, or start from another "
                "model."
            )
        raise StoreError(
            f"{here}; recipe {config.recipe} reads {width}, as its release does. Use features of that width, or "
            "--set any_features=true to train another model."
        )
    return replace(config, encoder=replace(config.encoder, feature_size=store.feature_size))


def _fit_losses(losses: RegionLosses, config: PretrainConfig, store: NativeStore) -> dict[str, int]:
    """Setting of the region losses -> width of the store, where they differ."""
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
    # A store without names does not say how many there are; then the recipe's number is trusted.
    stored = {
        "num_classes": (
            "classes",
            store.fields["probs"].width if soft else len(store.class_names) or losses.num_classes,
        ),
        "num_attributes": ("attributes", len(store.attribute_names) or losses.num_attributes),
        "feature_size": ("features", store.feature_size),
    }
    differing = {
        setting: (name, width) for setting, (name, width) in stored.items() if losses.widths.get(name, width) != width
    }
    if differing and not config.any_features:
        described = "; ".join(f"{width} {name}, not {losses.widths[name]}" for name, width in differing.values())
        raise StoreError(
            f"the regions of {store.path} have {described} as recipe {config.recipe} and its release. Use regions of "
            "that detector, or --set any_features=true to train another model."
        )
    for target, setting in (("region_classes", "num_classes"), ("region_attributes", "num_attributes")):
        if target in losses.needs:
            check_labels(store, target, stored[setting][1])
    return {setting: width for setting, (_, width) in differing.items()}


def fit_batch(config: PretrainConfig | FinetuneConfig, examples: int, started_by: int | None) -> tuple[int, str]:
    """Examples per training batch, no more than there are if one process trains, and what there is to say of it.

    Args:
        started_by: number of processes that started the run, if it is resumed; None = it starts with those of now.
    """
    asked = config.batch_size
    if examples >= asked * config.train.accumulation or (started_by or runtime.world_size()) > 1:
        return asked, ""
    fitting = max(1, examples // config.train.accumulation)
    return fitting, f"{examples} training examples do not fill a batch of {asked}: batches of {fitting} are used"


def limit_records(records: Sequence[Record], config: FinetuneConfig) -> Sequence[Record]:
    """Training records, cut to the config's limit by a draw that its seed determines."""
    if config.train_limit is None:
        return records
    order = runtime.generator_for(config.train.seed).permutation(len(records))[: config.train_limit]
    return [records[int(index)] for index in order]


class Inputs:
    """How a model is fed: what a batch must contain, its tokenizer, its regions, its device.

    Args:
        model: family.
        config: the family's config.
        regions: source of the region features; None for a model of the words alone.
        device: auto, cpu, cuda or cuda:N.
        vocabulary: file of word pieces, or the name of an embedded one; None = the config's own.
        task_token: number of the task that every text names, for a model with task tokens.
        few_shapes: whether batches come in few shapes (`data.batches.shapes`); None = on a GPU.
    Raises:
        ConfigError: the vocabulary has more entries than the model's word table, no such device, or a task token that
            is missing, or that the model lacks.
    """

    def __init__(
        self,
        model: str,
        config: Any,
        regions: RegionStore | None,
        device: str,
        vocabulary: str | Path | None = None,
        task_token: int | None = None,
        few_shapes: bool | None = None,
    ) -> None:
        self.spec: InputSpec = models.spec(model).inputs(config)
        self.tokenizer = Tokenizer(self.spec.vocabulary if vocabulary is None else str(vocabulary))
        if vocabulary is None and self.tokenizer.size > config.vocab_size:
            raise ConfigError(
                f"vocabulary {self.spec.vocabulary!r} has {self.tokenizer.size} entries, but encoder.vocab_size is "
                f"{config.vocab_size}. Use --set encoder.vocab_size={self.tokenizer.size}."
            )
        self.layout = TextLayout(self.tokenizer, self.spec, task_token=task_token)
        self.regions = regions
        self.pictures: Pictures | None = None
        """Of all images that are shown, where an extractor computes features; set once the examples are known."""
        self.device = runtime.pick_device(device)
        self.few_shapes = self.device.type == "cuda" if few_shapes is None else few_shapes
        self.features: DeviceFeatures | None = None
        """Of the store, where they live on the device; see `move_features`."""

    def move_features(self) -> None:
        """Keep the features of the store on the device: training batches carry row numbers from now on, which `fill`
        replaces.

        Raises:
            ConfigError: they do not fit.
        """
        assert isinstance(self.regions, NativeStore)
        self.features = load_features(self.regions, self.device)

    def fill(self, batch: Batch, targets: Targets) -> tuple[Batch, Targets]:
        """A training batch and its targets, on the device, with the features that live there."""
        return (batch, targets) if self.features is None else self.features.fill(batch, targets)

    def with_regions(self, regions: RegionStore) -> Inputs:
        """The same inputs with regions of another store."""
        other = copy.copy(self)
        other.regions = regions
        return other

    def loader(
        self,
        source: Source,
        *,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        training: bool,
        order: NDArray[np.int64] | None = None,
        sort_by_length: int = 1,
        workers: int = 0,
        text_only: bool = False,
        **shown: Any,
    ) -> Loader:
        """Batches of examples: in training shuffled and complete; otherwise in order, every example once over all
        processes, and what rows of a batch have in common given once. What the source does once, such as splitting its
        texts into word pieces, is done here.

        Args:
            accumulation: batches of each process that make an update.
            order: numbers of the examples in the order in which they come outside training; None = as in the source.
            sort_by_length: global batches that are sorted by text length together; 1 = none.
            workers: processes that prepare the batches; 0 = a thread.
            text_only: the examples have no images.
            shown: further arguments of `Collator`, such as masking.
        """
        regions = self.regions
        if training and self.features is not None and isinstance(regions, NativeStore):
            regions = FeatureRows(regions)
        collator = Collator(
            None if text_only else regions,
            self.spec,
            self.tokenizer,
            pictures=self.pictures,
            shift=training,
            few_shapes=self.few_shapes,
            share=not training,
            **shown,
        )
        loader = Loader(
            source,
            collator,
            batch_size=batch_size,
            accumulation=accumulation,
            seed=seed,
            shuffle=training,
            drop_last=training,
            order=order,
            bucket=sort_by_length,
            deal="examples" if training else "batches",
            workers=workers,
            layout=self.layout,
            pin=self.device.type == "cuda",
        )
        with runtime.one_first():
            loader.source.prepare()
        return loader
