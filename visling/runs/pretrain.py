"""Pre-training: corpora, objectives, an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from visling import models, runtime
from visling.data.answers import AnswerVocabulary
from visling.data.batches.loader import Loader, Source
from visling.data.batches.paired import PairedLoader
from visling.data.corpora.reading import Corpora, answer_table, images_of, read
from visling.data.text import TextLayout
from visling.errors import ConfigError, DataError
from visling.objectives.pretrain_model import PretrainModel
from visling.objectives.region_contrast import RegionContrast
from visling.pretrained.answers import save_answers
from visling.pretrained.features import check_fingerprint, load_backbone, measure_features
from visling.pretrained.folder import ModelFolder, check_family, load_part, read_model_folder, save_model_folder
from visling.recipes.configs import PretrainConfig
from visling.regions.store import NativeStore
from visling.runs.objectives import build_objectives, check_objectives, load_objective_heads
from visling.runs.pictures import find_pictures
from visling.runs.question_scores import record_answers
from visling.runs.setup import Inputs, conclude_run, fit_to_store, open_run, record_size
from visling.runs.validate import Validation, text_loss
from visling.train.engine import fit
from visling.train.state import State
from visling.types import Batch, Loss, Targets
from visling.vision.end_to_end import PictureFiles, RegionExtractor

Pair = tuple[Batch, Targets]

_TEXT_SEED = 0x74657874
"""Keeps what is drawn for a passage apart from what is drawn for the sentence of the same number."""


def pretrain(
    config: PretrainConfig,
    out: Path,
    *,
    data: Sequence[str],
    store: Path,
    init: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    other_features: bool = False,
    images: Path | None = None,
    backbone: Path | None = None,
    stream: TextIO | None = None,
    command: Sequence[str] = (),
) -> State:
    """Train an encoder from scratch or from another model folder; leaves a run folder.

    Args:
        data: folders of annotations (a text corpus may be a file); every corpus is read from every folder that has it.
            `DIR@SPLIT` reads that split instead of the recipe's training split and takes nothing from it for validation
            (NLVR: dev.train leaves out what fine-tuning holds out).
        store: region store of the images of the corpora; boxes and classes alone are read from it if the recipe has an
            extractor.
        other_features: accept that `init` was trained on features of another detector.
        images: folder of the images, for a recipe with an extractor.
        backbone: weight file that the extractor starts from; without it the extractor is randomly initialised, or
            starts from that of `init`.
        stream: where progress is written.
    Returns:
        How far it came; `stopped` says why it ended.
    Raises:
        ConfigError, DataError, StoreError, RunError: see their messages; nothing is trained before all inputs have been
            looked at.
    """
    check_objectives(config)
    _check_images_option(config, images, backbone)
    regions = NativeStore.open(store)
    config = fit_to_store(config, regions)
    inputs = Inputs(config.model, config.encoder, regions, device)
    answers = run_answers(config, data)
    training, validation = (
        read_corpora(config, data, inputs.layout, regions, valid=valid, answers=answers) for valid in (False, True)
    )
    if not len(validation.images):
        raise DataError(
            f"split {config.valid_split!r} of {', '.join(data)} holds no example to validate on. Name another with "
            "--set valid_split=NAME."
        )
    pictures = None
    if config.extractor is not None and images is not None:
        files = find_pictures(config, images, (training.images, validation.images), regions)
        pictures = PictureFiles(files, config.extractor)
    with open_run(
        config, out, data=data, store=regions, task=None, resume=resume, stream=stream, command=command, images=images
    ) as (folder, log):
        start = None if init is None else read_model_folder(init)
        model, notes = _build_model(
            config, regions, training, answers, start, backbone=backbone, other_features=other_features
        )
        model.to(inputs.device)
        needs = frozenset[str]().union(*(objective.reads() for objective in model.all_objectives()))
        random_regions = config.region_masking is not None and config.region_masking.random
        pool = images_of(training.images) if random_regions else []

        def loader(source: Source, *, training: bool) -> Loader:
            return inputs.loader(
                source, batch_size=config.batch_size, seed=config.train.seed, training=training,
                masking=config.masking, region_masking=config.region_masking, needs=needs, pool=pool,
                pictures=pictures, flip=config.flip if training else 0.0,
            )  # fmt: skip

        captioned = loader(training.images, training=True)
        batches = (
            captioned if training.text is None else PairedLoader(captioned, _text_loader(config, inputs, training))
        )
        record_size(folder, model, inputs.spec, regions)
        if answers is not None:
            record_answers(folder, answers)
        if not folder.has_last:
            for note in dict.fromkeys((*training.notes, *validation.notes, *notes)):
                log.event(note, step=0)
            _fill_queue(model, captioned, config, inputs.device)

        def step(batch: Batch, targets: Targets) -> Loss:
            model.weights = config.weights(batches.epoch)
            loss: Loss = model(batch, targets)
            return loss

        def paired_step(about_images: Pair, text: Pair) -> Loss:
            return step(*about_images) + text_loss(model, *text)

        def save(path: Path) -> None:
            save_model_folder(
                path, model, run=config, task=None, text_only=False, store=regions, tokenizer=inputs.tokenizer
            )
            if answers is not None:
                save_answers(path, answers)

        state = fit(
            model,
            step if training.text is None else paired_step,
            batches,
            config=config.train,
            log=log,
            validate=Validation(
                model,
                loader(validation.images, training=False),
                validation.images,
                weights=config.objectives,
                text=None if validation.text is None else _text_loader(config, inputs, validation, training=False),
                answers=answers,
                precision=config.train.precision,
            ),
            run_folder=folder,
            save_best=save,
            after_update=model.after_update,
        )
        conclude_run(folder, state, log, layout=inputs.layout, store=regions)
    return state


def run_answers(config: PretrainConfig, data: Sequence[str]) -> AnswerVocabulary | None:
    """The answers that a run learns to give; None for one that learns none."""
    if "image_qa" not in config.objectives:
        return None
    return answer_table(config.corpora, data, split=config.train_split, min_count=config.min_answer_count)


def read_corpora(
    config: PretrainConfig,
    data: Sequence[str],
    layout: TextLayout,
    store: NativeStore,
    *,
    valid: bool,
    answers: AnswerVocabulary | None,
) -> Corpora:
    """The training or validation examples of a run."""
    split, matching = config.valid_split if valid else config.train_split, "matching" in config.objectives
    return read(config.corpora, data, layout, store, split=split, valid=valid, matching=matching, answers=answers)


def untrained_model(config: PretrainConfig) -> PretrainModel:
    """Randomly initialised encoder, objectives and extractor of a config, before any data is read.

    Raises:
        ConfigError: an objective that is not known, lacks its settings, or that the family has no head for.
    """
    encoder = models.build(config.model, config.encoder)
    extractor = None if config.extractor is None else RegionExtractor(config.extractor)
    return PretrainModel(encoder, build_objectives(config, encoder, None), config.objectives, extractor)


def _check_images_option(config: PretrainConfig, images: Path | None, backbone: Path | None) -> None:
    """Refuse a recipe with an extractor without images, and images without one."""
    if config.extractor is not None and images is None:
        raise ConfigError(
            f"recipe {config.recipe} computes region features from pixels: name the folder of the images with --images."
        )
    options = [option for option, value in (("--images", images), ("--backbone", backbone)) if value is not None]
    if config.extractor is None and options:
        raise ConfigError(
            f"recipe {config.recipe} reads the features of the store and no image: leave {' and '.join(options)} out, "
            "or take a recipe with an extractor (vlbert-base-e2e)."
        )


def _build_model(
    config: PretrainConfig,
    store: NativeStore,
    training: Corpora,
    answers: AnswerVocabulary | None,
    start: ModelFolder | None,
    *,
    backbone: Path | None,
    other_features: bool,
) -> tuple[PretrainModel, list[str]]:
    """The model with the weights that it starts from, and what there is to say about them.

    Raises:
        CheckpointError: `start` is of another family, or knows other features.
    """
    runtime.seed_everything(config.train.seed)
    encoder = models.build(config.model, config.encoder)
    if config.extractor is None:
        measure_features(encoder, store, images_of(training.images))
    if start is not None:
        check_family(start, config.model)
        check_fingerprint(start, store.fingerprint, override=other_features, extracts=config.extractor is not None)
        load_part(encoder, start.weights, "encoder.", start.path)
    extractor, notes = _build_extractor(config, start, backbone)
    objectives = build_objectives(config, encoder, answers)
    if start is not None:
        notes += load_objective_heads(objectives, start, encoder, answers)
    elif config.start != "fresh":
        notes.append(
            f"starts from random weights; the published run starts from {config.start}: name such a model with --init"
        )
    return PretrainModel(encoder, objectives, config.objectives, extractor), notes


def _build_extractor(
    config: PretrainConfig, start: ModelFolder | None, backbone: Path | None
) -> tuple[RegionExtractor | None, list[str]]:
    """The region extractor with the weights that it starts from, and what there is to say about them.

    Raises:
        ConfigError: two places to start from.
        CheckpointError: they do not fit.
    """
    if config.extractor is None:
        return None, []
    extractor = RegionExtractor(config.extractor)
    if start is not None and start.extractor is not None:
        if backbone is not None:
            raise ConfigError(
                f"the region extractor can start from {start.path}, which has one, or from {backbone}: give --init or "
                "--backbone."
            )
        load_part(extractor, start.weights, "extractor.", start.path)
        return extractor, []
    if backbone is not None:
        return extractor, [load_backbone(extractor, backbone)]
    return extractor, [
        "the region extractor is randomly initialised, and its norms stay as they are; the published run starts from a "
        "detector of Visual Genome: name a file of a ResNet with --backbone"
    ]


def _fill_queue(model: PretrainModel, batches: Loader, config: PretrainConfig, device: torch.device) -> None:
    """Fill the queue of region contrast before anything is optimised, with batches of epochs that training does not
    reach (CVLP's release: its first 30).

    Raises:
        DataError: no image has a region.
    """
    contrast = next((objective for objective in model.all_objectives() if isinstance(objective, RegionContrast)), None)
    if contrast is None:
        return
    epoch, filled = config.train.epochs, -1
    while filled < int(contrast.queue.filled):
        batches.epoch, filled = epoch, int(contrast.queue.filled)
        for batch, targets in batches:
            with runtime.autocast(device, config.train.precision):
                contrast.fill(batch.to(device), targets.to(device))
            if contrast.queue.full:
                batches.epoch = 0
                return
        epoch += 1
    raise DataError("an epoch holds no region: region contrast has nothing to compare. Check the region store.")


def _text_loader(config: PretrainConfig, inputs: Inputs, corpora: Corpora, *, training: bool = True) -> Loader:
    """Batches of text without images, in the corpora's share of the run's batch size."""
    if "masked_lm" not in config.objectives:
        raise ConfigError(
            "text without images trains masked_lm alone, which the recipe's objectives lack. Add it, or leave the text "
            "corpus out."
        )
    assert corpora.text is not None
    return inputs.loader(
        corpora.text,
        batch_size=max(1, round(corpora.text_share * config.batch_size)),
        seed=config.train.seed + _TEXT_SEED,
        training=training,
        text_only=True,
        masking=config.masking,
    )
