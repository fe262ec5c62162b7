"""Pre-training: corpora, objectives, an encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from visling import models, runtime
from visling.data.answers import AnswerVocabulary
from visling.data.batches.examples import Source
from visling.data.batches.loader import Loader
from visling.data.batches.paired import PairedLoader
from visling.data.corpora.reading import Corpora, answer_table, images_of, read
from visling.data.text import TextLayout
from visling.errors import ConfigError, Conflicts, DataError
from visling.objectives.pretrain_model import PretrainModel
from visling.objectives.region_contrast import RegionContrast
from visling.pretrained.answers import save_answers
from visling.pretrained.features import check_features, start_encoder
from visling.pretrained.folder import ModelFolder, check_family, read_model_folder, save_model_folder
from visling.recipes.changes import describe_followed
from visling.recipes.configs import PretrainConfig
from visling.recipes.releases import describe_start
from visling.regions.store import NativeStore
from visling.runs.configure import follow_init
from visling.runs.inputs import Inputs, fit_batch, fit_to_store
from visling.runs.needed_products import are_known, pretraining_products
from visling.runs.objectives import build_objectives, check_objectives, init_starts_key_alone, load_objective_heads
from visling.runs.pictures import build_extractor, check_images_option, find_corpus_pictures
from visling.runs.question_scores import record_answers
from visling.runs.setup import Training, carry_out, describe_origin
from visling.runs.spelling import SpelledWords
from visling.runs.validate import Validation, count_text, text_loss
from visling.train.layout import fit_layout
from visling.train.parallel import Counts
from visling.train.state import RunFolder, State
from visling.types import Batch, Loss, Targets
from visling.vision.pictures import PictureFiles

Pair = tuple[Batch, Targets]

_TEXT_SEED = 0x74657874
"""Separates the random draws for a passage from those for the sentence of the same number."""


def pretrain(
    config: PretrainConfig,
    out: Path,
    *,
    data: Sequence[str],
    store: Path | None,
    init: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    other_features: bool = False,
    images: Path | None = None,
    backbone: Path | None = None,
    stream: TextIO | None = None,
    log_to: Sequence[str] = (),
    command: Sequence[str] = (),
) -> State:
    """Train an encoder from scratch or from another model folder; leaves a run folder.

    Args:
        config: a recipe's, as it is or with changed settings (`runs.configure`).
        data: folders of annotations (a text corpus may be a file); every corpus is read from each folder that has it.
            `DIR@SPLIT` reads that split instead of the recipe's training split and uses none of it for validation
            (NLVR: dev.train leaves out what fine-tuning holds out).
        store: region store of the images of the corpora; if the recipe has an extractor, only boxes and classes are
            read from it. Of a run on text alone nothing but the width of features is, and it may be None.
        init: model or run folder, whose encoder's settings the run has (`runs.configure`); None starts from scratch.
        other_features: accept that `init` was trained on features of another detector.
        images: folder of the images, for a recipe with an extractor.
        backbone: weight file that the extractor starts from; without it the extractor is randomly initialised, or
            starts from that of `init`.
        stream: where progress is written.
        log_to: where losses and scores go in addition to `out/log.jsonl`: tensorboard, wandb, trackio.
    Returns:
        How far it came; `stopped` says why it ended.
    Raises:
        ConfigError, DataError, StoreError, RunError: see their messages; nothing is trained before all inputs have been
            checked.
    """
    run = Pretraining(
        config, data=data, store=store, init=init, device=device, other_features=other_features, images=images,
        backbone=backbone,
    )  # fmt: skip
    return carry_out(run, out, resume=resume, stream=stream, log_to=log_to, command=command)


class Pretraining:
    """A pre-training run that is ready to start; the arguments are those of `pretrain`."""

    def __init__(
        self,
        config: PretrainConfig,
        *,
        data: Sequence[str],
        store: Path | None,
        init: Path | None,
        device: str,
        other_features: bool,
        images: Path | None,
        backbone: Path | None,
    ) -> None:
        self.notice = ""
        """How the features differ from those that `init` was trained on, where they only come near."""
        conflicts = Conflicts()
        with conflicts.collect():
            check_objectives(config)
        with conflicts.collect():
            check_images_option(config, images, backbone)
        self.store: NativeStore | None = None
        with conflicts.collect():
            self.store = None if store is None else NativeStore.open(store)
        self.start: ModelFolder | None = None
        with conflicts.collect():
            self.start = None if init is None else read_model_folder(init)
            config = follow_init(config, init)
        if store is None:
            conflicts.errors += _find_need_of_store(config, self.start)
        conflicts.refuse()
        self.config = config
        with conflicts.collect():
            if self.store is not None:
                self.config = config = fit_to_store(config, self.store)
        with conflicts.collect():
            if self.start is not None:
                check_family(self.start, config.model)
        with conflicts.collect():
            if self.start is not None and self.store is not None:
                extracts = config.extractor is not None
                self.notice = check_features(self.start, self.store, override=other_features, extracts=extracts)
        with conflicts.collect():
            regions = None if config.text_only else self.store
            self.inputs = Inputs(config.model, config.encoder, regions, device, few_shapes=config.train.few_shapes)
            self._read_data(data)
        conflicts.refuse()
        self.layouts = [self.inputs.layout]
        if config.extractor is not None and images is not None and self.store is not None:
            sources = (self.training.examples, self.validation.examples)
            files = find_corpus_pictures(config.corpora, images, sources, self.store)
            self.inputs.pictures = PictureFiles(files, config.extractor)
        texts = [source for source in (self.training.examples, self.training.text) if source is not None]
        self.spelled = SpelledWords(config, self.inputs, texts, init)
        self.backbone = backbone
        self.origin = describe_origin(data=data, images=images)

    def _read_data(self, data: Sequence[str]) -> None:
        """Read the answers and the examples."""
        config, layout = self.config, self.inputs.layout
        conflicts = Conflicts()
        self.answers: AnswerVocabulary | None = None
        with conflicts.collect():
            self.answers = run_answers(config, data)
        with conflicts.collect():
            self.training = read_corpora(config, data, layout, self.store, valid=False, answers=self.answers)
        with conflicts.collect():
            self.validation = read_corpora(config, data, layout, self.store, valid=True, answers=self.answers)
        conflicts.refuse()
        if not len(self.validation.examples):
            raise DataError(
                f"split {config.valid_split!r} of {', '.join(data)} holds no example to validate on. Name another with "
                "--set valid_split=NAME."
            )

    def build(self, started_by: int | None = None) -> Training:
        """The model, its batches and its validation."""
        config, answers = self.config, self.answers
        model, notes = self._build_model()
        if config.store_on_device:
            self.inputs.move_features()
        asked, shrunk = fit_batch(config, len(self.training.examples), started_by)
        main = "text" if config.text_only else "images"
        sizes = {main: asked}
        if self.training.text is not None:
            sizes["text"] = max(1, round(self.training.text_share * asked))
        valid_text = sizes.get("text", 0)
        sizes, accumulation = fit_layout(sizes, config.train.accumulation, started_by)
        examples = self._load_examples(model, self.training.examples, sizes[main], accumulation)
        batches = (
            examples
            if self.training.text is None
            else PairedLoader(examples, self._load_text(self.training.text, sizes["text"], accumulation))
        )

        def step(batch: Batch, targets: Targets) -> Loss:
            model.weights = config.weights(batches.epoch)
            loss: Loss = model(*self.inputs.fill(batch, targets))
            return loss

        def count(batch: Batch, targets: Targets) -> Counts:
            model.weights = config.weights(batches.epoch)
            return model.count(batch, targets)

        def count_paired(about_images: Pair, text: Pair) -> Counts:
            return {**count(*about_images), **count_text(model, *text)}

        def paired_step(about_images: Pair, text: Pair) -> Loss:
            return step(*about_images) + text_loss(model, *text)

        def products(pair: Pair) -> float:
            computed = [name for name, weight in config.weights(batches.epoch).items() if weight]
            return pretraining_products(model, *pair, only=computed).step.total

        def paired_products(pairs: tuple[Pair, Pair]) -> float:
            about_images, text = pairs
            return products(about_images) + pretraining_products(model, *text, only=["masked_lm"]).step.total

        def save(path: Path) -> None:
            save_model_folder(
                path,
                model,
                run=config,
                task=None,
                text_only=config.text_only and (self.start is None or self.start.text_only),
                store=self.store,
                tokenizer=self.inputs.tokenizer,
            )
            if answers is not None:
                save_answers(path, answers)

        def record(folder: RunFolder) -> None:
            folder.record(self.spelled.record())
            if answers is not None:
                record_answers(folder, answers)

        return Training(
            model=model,
            step=step if self.training.text is None else paired_step,
            count=count if self.training.text is None else count_paired,
            batches=batches,
            batch_sizes=sizes,
            accumulation=accumulation,
            validate=Validation(
                model,
                self._load_examples(model, self.validation.examples, config.batch_size),
                self.validation.examples,
                weights=config.objectives,
                text=None if self.validation.text is None else self._load_text(self.validation.text, valid_text),
                answers=answers,
                precision=config.train.precision,
            ),
            save=save,
            record=record,
            notes=(
                *self.training.notes,
                *self.validation.notes,
                *filter(None, [shrunk]),
                *self.spelled.note(),
                *filter(None, [self.notice]),
                *notes,
                *([] if self.store is not None else [_describe_width(config)]),
            ),
            begin=lambda: _fill_queue(model, examples, config, self.inputs),
            after_update=model.after_update,
            after_skip=model.after_skip,
            # The key network of region contrast draws the layers that it skips
            variant=None
            if "region_contrast" in config.objectives
            else lambda: tuple(config.weights(batches.epoch).values()),
            products=None
            if not are_known(config.encoder, model.extractor)
            else products
            if self.training.text is None
            else paired_products,
        )

    def _build_model(self) -> tuple[PretrainModel, list[str]]:
        """The model with its initial weights, and notes on them for the log."""
        config, start = self.config, self.start
        # Text alone does not read the store, and an extractor makes other features
        store = None if config.text_only or config.extractor is not None else self.store
        images = [] if store is None else images_of(self.training.examples)
        encoder, key_encoder = models.build(config.model, config.encoder), None
        key_alone = init_starts_key_alone(config)
        if start is not None and key_alone:
            start_encoder(encoder, None, store, images)
            key_encoder = models.build(config.model, config.encoder)
        started = start_encoder(encoder if key_encoder is None else key_encoder, start, store, images)
        extractor, notes = build_extractor(config, start, self.backbone)
        objectives = build_objectives(config, encoder, self.answers, key_encoder)
        if start is not None:
            notes += [*describe_followed(config, start.path), *started]
        if start is None:
            if published := describe_start(config):
                notes.append(f"starts from random weights; {published}")
        elif key_alone:
            notes.append(f"the key network starts from {start.path}, the trained network from random weights")
        else:
            notes += load_objective_heads(objectives, start, encoder, self.answers)
        model = PretrainModel(encoder, objectives, config.objectives, extractor)
        return model.to(self.inputs.device), notes

    def _load_examples(
        self, model: PretrainModel, source: Source, batch_size: int, accumulation: int | None = None
    ) -> Loader:
        """Batches of examples, masked, and with the targets that the objectives read.

        Args:
            accumulation: micro-batches per update; None = not for training.
        """
        config, training = self.config, accumulation is not None
        random_regions = config.region_masking is not None and config.region_masking.random
        return self.inputs.loader(
            source,
            batch_size=batch_size, accumulation=accumulation or 1, seed=config.train.seed, training=training,
            workers=config.workers if training else 0,
            sort_by_length=config.sort_by_length if training else 1, masking=config.masking,
            region_masking=config.region_masking, flip=config.flip if training else 0.0,
            needs=frozenset[str]().union(*(objective.reads() for objective in model.all_objectives())),
            pool=images_of(self.training.examples) if random_regions else [],
        )  # fmt: skip

    def _load_text(self, source: Source, batch_size: int, accumulation: int | None = None) -> Loader:
        """Batches of text next to those with images; arguments as those of `_load_examples`."""
        config, training = self.config, accumulation is not None
        return self.inputs.loader(
            source,
            batch_size=batch_size,
            accumulation=accumulation or 1,
            seed=config.train.seed + _TEXT_SEED,
            training=training,
            sort_by_length=config.sort_by_length if training else 1,
            text_only=True,
            masking=config.masking,
        )


def _find_need_of_store(config: PretrainConfig, start: ModelFolder | None) -> Iterator[ConfigError]:
    """Why a run cannot do without a region store."""
    if not config.text_only:
        yield ConfigError("a model that sees regions needs --store. Only a run on text alone does without.")
    elif start is not None and not start.text_only:
        yield ConfigError(
            f"{start.path} was trained on regions, which its successors read as well: name their store with --store, "
            "so that the model is saved with the identity of its features."
        )


def _describe_width(config: PretrainConfig) -> str:
    """What a run without a store leaves open."""
    return (
        f"no --store: a run with regions that starts from this model reads features of width "
        f"{config.encoder.feature_size}"
    )


def run_answers(config: PretrainConfig, data: Sequence[str]) -> AnswerVocabulary | None:
    """The answers that a run is trained to predict; None without image_qa."""
    if "image_qa" not in config.objectives:
        return None
    return answer_table(
        config.corpora,
        data,
        split=config.train_split,
        min_count=config.min_answer_count,
        sources=config.answer_sources,
    )


def read_corpora(
    config: PretrainConfig,
    data: Sequence[str],
    layout: TextLayout,
    store: NativeStore | None,
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
        ConfigError: an objective is unknown or lacks its settings, or the family has no head for it.
    """
    encoder = models.build(config.model, config.encoder)
    extractor = None if config.extractor is None else config.extractor.build()
    return PretrainModel(encoder, build_objectives(config, encoder, None), config.objectives, extractor)


def _fill_queue(model: PretrainModel, batches: Loader, config: PretrainConfig, inputs: Inputs) -> None:
    """Fill the queue of region contrast before the first update, with batches from epochs that training does not reach
    (CVLP's release: its first 30).

    Raises:
        DataError: no image has a region.
    """
    contrast = next((objective for objective in model.all_objectives() if isinstance(objective, RegionContrast)), None)
    if contrast is None:
        return
    epoch, filled = config.train.epochs, -1
    while filled < int(contrast.queue.filled):
        batches.epoch, filled = epoch, int(contrast.queue.filled)
        update: list[Pair] = []
        for batch, targets in batches:
            update.append(inputs.fill(batch.to(inputs.device), targets.to(inputs.device)))
            if len(update) < batches.accumulation:
                continue
            with runtime.autocast(inputs.device, config.train.precision):
                contrast.fill(*update)
            update = []
            if contrast.queue.full:
                batches.epoch = 0
                return
        epoch += 1
    raise DataError("an epoch holds no region: region contrast has nothing to compare. Check the region store.")
