"""Pre-training: corpora, objectives, an encoder."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from visling import models, runtime
from visling.data.answers import AnswerVocabulary
from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader, Source
from visling.data.batches.paired import PairedLoader
from visling.data.corpora.reading import Corpora, answer_table, images_of, read
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError, nearest
from visling.models import head_styles
from visling.models.base import Encoder
from visling.objectives.base import Objective, PretrainStep
from visling.objectives.image_qa import ImageQA
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.masked_regions import MaskedRegions
from visling.objectives.matching import Matching
from visling.objectives.pretrain_model import PretrainModel
from visling.objectives.region_contrast import RegionContrast
from visling.pretrained.answers import continue_head, save_answers
from visling.pretrained.features import check_fingerprint, load_backbone
from visling.pretrained.folder import (
    ModelFolder,
    check_family,
    load_heads,
    load_part,
    read_model_folder,
    save_model_folder,
)
from visling.recipes.configs import PretrainConfig
from visling.regions.store import NativeStore
from visling.runs.pictures import find_pictures
from visling.runs.question_scores import AnsweredQuestions, record_answers
from visling.runs.setup import (
    build_encoder,
    build_tokenizer,
    conclude_run,
    fit_to_store,
    mean_over_batches,
    open_run,
    record_size,
)
from visling.train.engine import fit, predict
from visling.train.state import State
from visling.types import Batch, InputSpec, Loss, Targets
from visling.vision.end_to_end import PictureFiles, RegionExtractor


def pretrain(
    run: PretrainConfig,
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
        store: region store of the images of the corpora; boxes and classes alone are read of it if the recipe has an
            extractor.
        other_features: accept that `init` was trained on features of another detector.
        images: folder of the pictures, for a recipe with an extractor.
        backbone: weight file that the extractor starts from; fresh weights without it, or those of `init`.
        stream: where progress is written.
    Returns:
        How far it came; `stopped` says why it ended.
    Raises:
        ConfigError, DataError, StoreError, RunError: see their messages; nothing is trained before all inputs have been
            looked at.
    """
    check_names(run)
    _check_pictures(run, images, backbone)
    regions = NativeStore.open(store)
    run = fit_to_store(run, regions)
    spec = models.spec(run.model).inputs(run.encoder)
    tokenizer = build_tokenizer(run)
    layout = TextLayout(tokenizer, spec)
    answers = run_answers(run, data)
    training, validation = (
        read_corpora(run, data, layout, regions, valid=valid, answers=answers) for valid in (False, True)
    )
    if not len(validation.images):
        raise DataError(
            f"split {run.valid_split!r} of {', '.join(data)} holds no example to validate on. Name another with --set valid_split=NAME."
        )
    pictures = None
    if run.extractor is not None and images is not None:
        pictures = PictureFiles(
            find_pictures(run, images, (training.images, validation.images), regions), run.extractor
        )
    target = runtime.pick_device(device)
    with open_run(
        run, out, data=data, store=regions, task=None, resume=resume, stream=stream, command=command, images=images
    ) as (
        folder,
        log,
    ):
        runtime.seed_everything(run.train.seed)
        encoder = build_encoder(run, regions, images_of(training.images))
        saved = None if init is None else read_model_folder(init)
        if saved is not None:
            check_family(saved, run.model)
            check_fingerprint(saved, regions.fingerprint, override=other_features, extracts=run.extractor is not None)
            load_part(encoder, saved.weights, "encoder.", saved.path)
        extractor, notes = _extractor(run, saved, backbone)
        objectives = _objectives(run, encoder, answers)
        notes += [] if saved is None else _load_heads(objectives, saved, encoder, answers)
        model = PretrainModel(encoder, objectives, run.objectives, extractor).to(target)
        needs = frozenset[str]().union(*(objective.reads() for objective in objectives.values()))
        pool = images_of(training.images) if run.region_masking is not None and run.region_masking.random else []

        def loader(source: Source, *, shuffle: bool) -> Loader:
            collator = Collator(
                regions, spec, tokenizer, masking=run.masking, region_masking=run.region_masking, needs=needs, pool=pool,
                pictures=pictures, flip=run.flip if shuffle else 0.0,
            )  # fmt: skip
            return Loader(
                source, collator, batch_size=run.batch_size, seed=run.train.seed, shuffle=shuffle, drop_last=shuffle,
                pin=target.type == "cuda",
            )  # fmt: skip

        captioned, valid = loader(training.images, shuffle=True), loader(validation.images, shuffle=False)
        train: Loader | PairedLoader = captioned
        text_loader = partial(_text_loader, run, tokenizer=tokenizer, spec=spec, pin=target.type == "cuda")
        if training.text is not None:
            train = PairedLoader(captioned, text_loader(training.text, share=training.text_share, shuffle=True))
        record_size(folder, model, spec, regions)
        if answers is not None:
            record_answers(folder, answers)
        if not folder.has_last:
            for note in dict.fromkeys((*training.notes, *validation.notes)):
                log.event(note, step=0)

        def step(batch: Batch, targets: Targets) -> Loss:
            model.weights = run.weights(train.epoch)
            loss: Loss = model(batch, targets)
            return loss

        def paired_step(about_images: Pair, text: Pair) -> Loss:
            return step(*about_images) + text_loss(*text)

        def text_loss(batch: Batch, targets: Targets) -> Loss:
            return _text_loss(model, batch, targets)

        if init is None and run.start != "fresh":
            notes.append(
                f"starts from fresh weights; the published run starts from {run.start}: name such a model with --init"
            )
        for note in notes if not folder.has_last else ():
            log.event(note, step=0)
        contrast = objectives.get("region_contrast")
        if isinstance(contrast, RegionContrast) and not folder.has_last:
            _fill(contrast, captioned, epoch=run.train.epochs, device=target, precision=run.train.precision)

        def validate() -> Mapping[str, float]:
            asked = (
                None
                if answers is None
                else AnsweredQuestions(objectives["image_qa"], valid, validation.images, answers)
            )
            with asked or contextlib.nullcontext():
                scores = mean_over_batches(
                    predict(step, asked or valid, model=model, precision=run.train.precision), run.objectives
                )
            if asked is not None:
                scores |= asked.scores()
            if validation.text is not None:
                text = text_loader(validation.text, share=validation.text_share, shuffle=False)
                scores = {
                    **mean_over_batches(predict(text_loss, text, model=model, precision=run.train.precision), {}),
                    **scores,
                }
            return scores

        def keep(path: Path) -> None:
            save_model_folder(path, model, run=run, task=None, text_only=False, store=regions, tokenizer=tokenizer)
            if answers is not None:
                save_answers(path, answers)

        state = fit(
            model,
            step if training.text is None else paired_step,
            train,
            config=run.train,
            log=log,
            validate=validate,
            run_folder=folder,
            save_best=keep,
            after_update=model.after_update,
        )
        conclude_run(folder, state, log, layout=layout, store=regions)
    return state


def run_answers(run: PretrainConfig, data: Sequence[str]) -> AnswerVocabulary | None:
    """The answers that a run learns to give; None for one that learns none."""
    if "image_qa" not in run.objectives:
        return None
    return answer_table(run.corpora, data, split=run.train_split, min_count=run.min_answer_count)


def read_corpora(
    run: PretrainConfig,
    data: Sequence[str],
    layout: TextLayout,
    store: NativeStore,
    *,
    valid: bool,
    answers: AnswerVocabulary | None,
) -> Corpora:
    """The training or validation examples of a run."""
    split, matching = run.valid_split if valid else run.train_split, "matching" in run.objectives
    return read(run.corpora, data, layout, store, split=split, valid=valid, matching=matching, answers=answers)


def _check_pictures(run: PretrainConfig, images: Path | None, backbone: Path | None) -> None:
    """Refuse a recipe with an extractor without pictures, and pictures without one."""
    if run.extractor is not None and images is None:
        raise ConfigError(
            f"recipe {run.recipe} makes the features of regions of pictures: name their folder with --images."
        )
    given = [option for option, value in (("--images", images), ("--backbone", backbone)) if value is not None]
    if run.extractor is None and given:
        raise ConfigError(
            f"recipe {run.recipe} reads the features of the store and no picture: leave {' and '.join(given)} out, or take a recipe with an "
            "extractor (vlbert-base-e2e)."
        )


def _extractor(
    run: PretrainConfig, saved: ModelFolder | None, backbone: Path | None
) -> tuple[RegionExtractor | None, list[str]]:
    """The run's region extractor with the weights that it starts from, and what there is to say about them.

    Raises:
        ConfigError: two places to start from.
        CheckpointError: they do not fit.
    """
    if run.extractor is None:
        return None, []
    extractor = RegionExtractor(run.extractor)
    if saved is not None and saved.extractor is not None:
        if backbone is not None:
            raise ConfigError(
                f"the region extractor can start from {saved.path}, which has one, or from {backbone}: give --init or --backbone."
            )
        load_part(extractor, saved.weights, "extractor.", saved.path)
        return extractor, []
    if backbone is not None:
        return extractor, [load_backbone(extractor, backbone)]
    return extractor, [
        "the region extractor starts from fresh weights, whose norms stay as they are; the published run starts from a detector of Visual Genome: "
        "name a file of a ResNet with --backbone"
    ]


def _fill(
    contrast: RegionContrast, batches: Loader, *, epoch: int, device: torch.device, precision: runtime.Precision
) -> None:
    """Fill the queue before anything is optimised, with batches of epochs that training does not reach (CVLP's release:
    its first 30).

    Raises:
        DataError: no image has a region.
    """
    filled = -1
    while filled < int(contrast.queue.filled):
        batches.epoch, filled = epoch, int(contrast.queue.filled)
        for batch, targets in batches:
            with runtime.autocast(device, precision):
                contrast.fill(batch.to(device), targets.to(device))
            if contrast.queue.full:
                batches.epoch = 0
                return
        epoch += 1
    raise DataError("an epoch holds no region: region contrast has nothing to compare. Check the region store.")


Pair = tuple[Batch, Targets]


def _text_loader(
    run: PretrainConfig,
    source: Source,
    *,
    tokenizer: Tokenizer,
    spec: InputSpec,
    share: float,
    shuffle: bool,
    pin: bool,
) -> Loader:
    """Batches of text without images, in the given share of the run's batch size."""
    if "masked_lm" not in run.objectives:
        raise ConfigError(
            "text without images teaches masked_lm alone, which the recipe's objectives lack. Add it, or leave the text corpus out."
        )
    return Loader(
        source, Collator(None, spec, tokenizer, masking=run.masking), batch_size=max(1, round(share * run.batch_size)),
        seed=run.train.seed + _TEXT_SEED, shuffle=shuffle, drop_last=shuffle, pin=pin,
    )  # fmt: skip


_TEXT_SEED = 0x74657874
"""Keeps what is drawn for a passage apart from what is drawn for the sentence of the same number."""


def _text_loss(model: PretrainModel, batch: Batch, targets: Targets) -> Loss:
    """Masked words of text without images; its parts are named after it."""
    objective = model.objectives["masked_lm"]
    found: Loss = objective(
        PretrainStep(model=model.encoder, batch=batch, encoded=model.encoder(batch), targets=targets)
    )
    return Loss(
        value=found.value * model.weights["masked_lm"],
        parts={f"text_{name}": part for name, part in found.parts.items()},
    )


_OBJECTIVES: Mapping[str, tuple[Callable[..., Objective], str]] = {
    "masked_lm": (MaskedLM, "vocabulary"),
    "matching": (Matching, "matching"),
    "masked_regions": (MaskedRegions, "region_targets"),
    "image_qa": (ImageQA, "classify"),
    "region_contrast": (RegionContrast, "projection"),
}
"""Name -> class and the kind under which a model names the style of its head."""


def fresh_model(run: PretrainConfig) -> PretrainModel:
    """Encoder, objectives and extractor of a run with fresh weights, before any data is read.

    Raises:
        ConfigError: an objective that is not known, lacks its settings, or that the family has no head for.
    """
    encoder, extractor = (
        models.build(run.model, run.encoder),
        None if run.extractor is None else RegionExtractor(run.extractor),
    )
    return PretrainModel(encoder, _objectives(run, encoder, None), run.objectives, extractor)


def check_names(run: PretrainConfig) -> None:
    """Refuse objectives and settings of objectives that do not exist.

    Raises:
        ConfigError: names the nearest one that does.
    """
    for name in run.objectives:
        if name not in _OBJECTIVES:
            raise ConfigError(f"unknown objective {name!r}. {nearest(name, _OBJECTIVES)}")
    for name, settings in run.objective_settings.items():
        kind, _ = _OBJECTIVES[name]
        known = [key for key in inspect.signature(kind).parameters if key not in _GIVEN]
        for key in settings:
            if key not in known:
                raise ConfigError(
                    f"objective {name} has no setting {key!r}. {nearest(key, known) if known else 'It has none: leave it out.'}"
                )


_GIVEN = ("dims", "style", "words", "encoder", "losses")
"""What an objective is built with by the run itself."""


def _objectives(run: PretrainConfig, encoder: Encoder, answers: AnswerVocabulary | None) -> dict[str, Objective]:
    styles = head_styles(run.model)
    built = {}
    for name in run.objectives:
        kind, head = _OBJECTIVES[name]
        if head not in styles:
            raise ConfigError(
                f"{run.model} has no head for the objective {name}. Leave it out of the recipe's objectives."
            )
        built[name] = kind(
            encoder.dims, styles[head], encoder.word_embeddings, **_settings(run, encoder, name, answers)
        )
    return built


def _load_heads(
    objectives: Mapping[str, Objective], saved: ModelFolder, encoder: Encoder, answers: AnswerVocabulary | None
) -> list[str]:
    """Load what a model has learnt for these objectives; what there is to say about it."""
    by_answers = answers is not None and "image_qa" in objectives
    fresh = load_heads(
        {name: objective for name, objective in objectives.items() if not (by_answers and name == "image_qa")}, saved
    )
    notes = [f"{saved.path} brings no head for {', '.join(fresh)}: fresh ones"] if fresh else []
    if answers is not None and by_answers:
        carried = continue_head(objectives["image_qa"], encoder.dims, saved, list(answers))
        notes += [carried or f"{saved.path} brings no head for image_qa: a fresh one"]
    contrast = objectives.get("region_contrast")
    if isinstance(contrast, RegionContrast):
        contrast.follow_head()
    return notes


def _settings(
    run: PretrainConfig, encoder: Encoder, objective: str, answers: AnswerVocabulary | None
) -> dict[str, Any]:
    """What an objective takes beside its head."""
    given = dict(run.objective_settings.get(objective, {}))
    if objective == "masked_regions":
        if run.region_losses is None or run.region_masking is None:
            raise ConfigError(
                "the objective masked_regions needs region_losses and region_masking in the recipe; found none."
            )
        return {"losses": run.region_losses, **given}
    if (
        objective == "image_qa"
        and answers is not None
        and given.setdefault("num_answers", len(answers)) != len(answers)
    ):
        raise ConfigError(
            f"the recipe's image_qa tells {given['num_answers']} answers apart, but the data's answer table has {len(answers)}. "
            "Give the table that belongs to it (all_ans.json), or leave num_answers out."
        )
    return {"encoder": encoder, **given} if objective == "region_contrast" else given
