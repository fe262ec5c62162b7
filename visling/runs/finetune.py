"""Fine-tuning: a task, a model, training and validation records."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from visling import config as configs
from visling import models
from visling.data.annotations.image_lists import without_images
from visling.data.annotations.problems import Problems
from visling.data.annotations.tables import ImageNames
from visling.data.batches.loader import Loader
from visling.data.corpora.base import check_images
from visling.errors import ConfigError, Conflicts, DataError, StoreError, VislingError
from visling.models.base import TaskStart
from visling.models.task_model import TaskModel
from visling.pretrained.answers import carry_over, continue_task_head
from visling.pretrained.features import check_features, start_encoder
from visling.pretrained.folder import (
    ModelFolder,
    check_family,
    objective_heads,
    read_model_folder,
    save_model_folder,
)
from visling.pretrained.several import continue_heads, find_token
from visling.recipes.changes import describe_followed
from visling.recipes.configs import FinetuneConfig
from visling.recipes.releases import describe_start
from visling.regions.store import NativeStore
from visling.runs.configure import follow_init
from visling.runs.evaluate import predict_records
from visling.runs.inputs import Inputs, fit_batch, fit_to_store, limit_records
from visling.runs.needed_products import count_for_task
from visling.runs.own_files import TRAIN, VALID, OwnFiles, check_records
from visling.runs.own_regions import check_ids, prepare_regions
from visling.runs.pictures import build_extractor, check_images_option, find_pictures
from visling.runs.retrieve import limit_images
from visling.runs.setup import Training, carry_out, describe_origin, hold_run_folder
from visling.runs.spelling import SpelledWords
from visling.tasks.answers import AnswerTask
from visling.tasks.base import JoinedRecords, Task, TaskSource, TextOnly, list_images, read_records
from visling.tasks.base import load as load_task
from visling.train.claim import REGIONS
from visling.train.layout import fit_layout
from visling.train.parallel import Counts
from visling.train.state import RunFolder, State
from visling.types import Batch, Loss, Record, Targets
from visling.vision.extract import Progress
from visling.vision.pictures import PictureFiles

ANSWER_LISTS = ("answers", "labels")
"""Settings of tasks that name a file of what a classifier's outputs stand for."""


def finetune(
    config: FinetuneConfig,
    out: Path,
    *,
    data: Path | OwnFiles,
    store: Path | None,
    init: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    other_features: bool = False,
    images: Path | None = None,
    detector: Path | None = None,
    backbone: Path | None = None,
    valid_store: Path | None = None,
    stream: TextIO | None = None,
    progress: Progress | None = None,
    log_to: Sequence[str] = (),
    command: Sequence[str] = (),
) -> State:
    """Train a model on a task; leaves a run folder.

    Args:
        config: a recipe's, as it is or with changed settings (`runs.configure`).
        data: folder of annotations, or files of one's own.
        store: region store that holds every image; may be None for a text-only run, or for files of one's own with
            `images`. If the recipe has an extractor, only boxes are read from it.
        init: pre-trained model or run folder, whose encoder's settings the run has (`runs.configure`); None starts from
            scratch.
        other_features: accept that `init` was trained on features of another detector.
        images: folder of the images, for a recipe with an extractor, or of files of one's own: without a store, their
            regions are extracted into `out/regions` first.
        detector: folder of the detector that extracts them; None = the one that `init` carries.
        backbone: weight file that the extractor starts from; without it the extractor starts from that of `init`, or is
            randomly initialised.
        valid_store: region store of the validation images, where they are shown with other regions than in training
            (VL-BERT's RefCOCO+: detected ones without the annotated ones); also of later evaluations.
        stream: where progress is written.
        progress: called with (images done, images in all) while regions are extracted.
        log_to: where losses and scores go in addition to `out/log.jsonl`: tensorboard, wandb, trackio.
    Returns:
        How far it came; `stopped` says why it ended.
    Raises:
        ConfigError, DataError, StoreError, RunError: see their messages; nothing is trained before all inputs have been
            checked.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(data, OwnFiles) and images is not None and store is None:
            stack.enter_context(hold_run_folder(out, resume=resume))
            store = out / REGIONS
            _extract_regions(config, data, images, detector, store, init=init, device=device, progress=progress)
        run = Finetuning(
            config, data=data, store=store, init=init, device=device, other_features=other_features, images=images,
            backbone=backbone, valid_store=valid_store,
        )  # fmt: skip
        return carry_out(run, out, resume=resume, stream=stream, log_to=log_to, command=command)


class Finetuning:
    """A fine-tuning run that is ready to start; the arguments are those of `finetune`."""

    def __init__(
        self,
        config: FinetuneConfig,
        *,
        data: Path | OwnFiles,
        store: Path | None,
        init: Path | None,
        device: str,
        other_features: bool,
        images: Path | None = None,
        backbone: Path | None = None,
        valid_store: Path | None = None,
    ) -> None:
        self.notice = ""
        """How the features differ from those that `init` was trained on, where they only come near."""
        conflicts = Conflicts()
        if store is None and not config.text_only:
            conflicts.errors.append(
                ConfigError("a model that sees regions needs --store. For a model of the words alone use --text-only.")
            )
        extracted = isinstance(data, OwnFiles) and config.extractor is None  # the images were read before
        with conflicts.collect():
            check_images_option(config, None if extracted else images, backbone)
        self.store: NativeStore | None = None
        with conflicts.collect():
            self.store = None if store is None else NativeStore.open(store)
        self.train_records: Sequence[Record] = ()
        self.valid_records: Sequence[Record] = ()
        self.named = ImageNames()
        """Images as files of one's own name them."""
        self.start: ModelFolder | None = None
        with conflicts.collect():
            self.start = None if init is None else read_model_folder(init)
            config = follow_init(config, init)
        if isinstance(data, OwnFiles):
            config = replace(config, train_split=TRAIN, valid_split=VALID)
        with conflicts.collect():
            config = fit_to_family(config)
            self.task = _open_task(config, conflicts)
            self._read_records(config, data)
        conflicts.refuse()
        self.config, regions = config, None if config.text_only else self.store
        with conflicts.collect():
            self.config = self._fit_encoder(config)
        valid_regions = regions
        with conflicts.collect():
            valid_regions = _open_valid_store(valid_store, regions, config, other_features) or regions
        with conflicts.collect():
            if regions is not None:
                if valid_store is None:
                    check_ids(self.named, regions)
                check_images(self.train_records, regions)
        with conflicts.collect():
            if valid_regions is not None:
                check_images(self.valid_records, valid_regions)
        with conflicts.collect():
            if self.start is not None:
                check_family(self.start, config.model)
        with conflicts.collect():
            if self.start is not None and self.store is not None:
                override, extracts = other_features or config.text_only, config.extractor is not None
                self.notice = check_features(self.start, self.store, override=override, extracts=extracts)
        with conflicts.collect():
            self.inputs = Inputs(
                config.model, self.config.encoder, regions, device, task_token=self.config.task_token,
                few_shapes=config.train.few_shapes,
            )  # fmt: skip
        conflicts.refuse()
        self.layouts = [self.inputs.layout]
        if regions is not None:
            self.train_records = self.task.with_regions(self.train_records, regions)
        try:
            self.task.setup(self.train_records)
        except DataError as error:
            source = str(data.train) if isinstance(data, OwnFiles) else f"{data}, split {config.train_split}"
            raise DataError(f"{source}: {error}") from error
        place = data.valid if isinstance(data, OwnFiles) else f"{data}, split {config.valid_split}"
        check_records(self.task, self.valid_records, str(place))
        self.config, self.notes = _choose_metric(self.config, self.task, self.train_records, self.valid_records)
        if config.extractor is not None and images is not None and regions is not None:
            shown = list_images(JoinedRecords(self.train_records, self.valid_records))
            self.inputs.pictures = PictureFiles(find_pictures(shown, images, regions), config.extractor)
        self.valid_inputs = self.inputs if valid_regions is None else self.inputs.with_regions(valid_regions)
        examples = TaskSource(self.task, self.train_records, self.inputs.layout)
        self.spelled = SpelledWords(self.config, self.inputs, [examples], init)
        self.backbone = backbone
        root = data.train.parent if isinstance(data, OwnFiles) else data
        self.origin = describe_origin(data=[root], images=images, task=config.task, valid_store=valid_store)
        if isinstance(data, OwnFiles):
            self.origin["files"] = data.describe()

    def _read_records(self, config: FinetuneConfig, data: Path | OwnFiles) -> None:
        """Read the training and validation records, as far as the config asks for them."""
        if isinstance(data, OwnFiles):
            own = data.read(self.task)
            self.named, read, valid = own.images, own.splits[TRAIN], own.splits[VALID]
        else:
            conflicts = Conflicts()
            with conflicts.collect():
                read = read_records(self.task, data, config.train_split)
            with conflicts.collect():
                valid = read_records(self.task, data, config.valid_split)
            conflicts.refuse()
        kept = read if config.without_images is None else without_images(read, config.without_images)
        self.left_out = len(read) - len(kept)
        self.train_records = limit_records(kept, config)
        self.valid_records = valid
        if not self.train_records or not self.valid_records:
            raise DataError(
                f"{data}: {len(self.train_records)} training and {len(self.valid_records)} validation examples; both "
                "are needed."
            )
        self.valid_records = limit_images(self.valid_records, config.valid_images)

    def _fit_encoder(self, config: FinetuneConfig) -> FinetuneConfig:
        """The config with the feature width of the store, and with the task tokens of the model that it starts from."""
        if self.store is not None:
            config = fit_to_store(config, self.store)
        return config if self.start is None else follow_task_token(config, self.start)

    def build(self, started_by: int | None = None) -> Training:
        """The model, its batches and its validation."""
        config, task, inputs, asked = self.config, self.task, self.inputs, {"examples": self.fit_batch(started_by)[0]}
        sizes, accumulation = fit_layout(asked, config.train.accumulation, started_by)
        model, notes = self._build_model()
        if config.store_on_device:
            inputs.move_features()

        def step(batch: Batch, targets: Targets) -> Loss:
            batch, targets = inputs.fill(batch, targets)
            logits, own = model.respond(batch)
            loss = task.loss(logits, targets)
            return loss if own is None else loss + own

        def count(batch: Batch, targets: Targets) -> Counts:
            return {**task.count(targets, whole=model.shows_whole), **model.count_extracted(batch)}

        def save(path: Path) -> None:
            save_model_folder(
                path, model, run=config, task=task, text_only=config.text_only, store=self.store,
                tokenizer=inputs.tokenizer,
            )  # fmt: skip

        def record(folder: RunFolder) -> None:
            examples = {"train": len(self.train_records), "valid": len(self.valid_records)}
            folder.record({"examples": examples, **self.spelled.record()})

        return Training(
            model=model,
            step=step,
            batches=self.load_batches(sizes["examples"], accumulation),
            batch_sizes=sizes,
            accumulation=accumulation,
            validate=lambda: self.validate(model),
            save=save,
            record=record,
            notes=[*filter(None, [self.notice]), *notes, *self.notes, *self.describe_examples(started_by)],
            variant=lambda: None,
            count=count,
            products=count_for_task(model),
        )

    def fit_batch(self, started_by: int | None) -> tuple[int, str]:
        """Examples per training batch of a process that starts the run, and what there is to say of it."""
        return fit_batch(self.config, len(self.train_records), started_by)

    def load_batches(self, batch_size: int, accumulation: int) -> Loader:
        """The training batches."""
        config = self.config
        source = TaskSource(self.task, self.train_records, self.inputs.layout)
        return self.inputs.loader(
            TextOnly(source) if config.text_only else source,
            batch_size=batch_size,
            accumulation=accumulation,
            seed=config.train.seed,
            training=True,
            sort_by_length=config.sort_by_length,
            workers=config.workers,
            flip=config.flip,
            swap_sides=config.flip > 0 and config.swap_sides,
        )

    def validate(self, model: TaskModel) -> dict[str, float]:
        """Scores of a model of the task on the validation records, in percent."""
        config, task, records = self.config, self.task, self.valid_records
        predictions = predict_records(
            model, task, self.valid_inputs, records, batch_size=config.batch_size, precision=config.train.precision
        )
        return {name: score.value for name, score in task.report(predictions, records).scores.items()}

    def describe_examples(self, started_by: int | None) -> list[str]:
        """What there is to say about the examples, for the log."""
        notes = []
        if self.left_out:
            left_out = f"{self.left_out} training examples of the images in {self.config.without_images}"
            notes.append(f"{left_out} are left out")
        _, shrunk = self.fit_batch(started_by)
        return [
            *notes,
            *filter(None, [shrunk]),
            *self.spelled.note(),
            *self.task.notes(JoinedRecords(self.train_records, self.valid_records)),
        ]

    def _build_model(self) -> tuple[TaskModel, list[str]]:
        """The model with its initial weights, and notes on its heads."""
        config, task, start = self.config, self.task, self.start
        encoder = models.build(config.model, config.encoder)
        store = self.store if config.extractor is None else None
        started = start_encoder(encoder, start, store, list_images(self.train_records))
        extractor, notes = build_extractor(config, start, self.backbone)
        styles = models.head_styles(config.model, config.head_layout)
        model = TaskModel(encoder, task.heads, styles, group=task.group, extractor=extractor)
        if start is None:
            if published := describe_start(config):
                notes.append(f"starts from random weights; {published}")
            return model.to(self.inputs.device), notes
        notes += [*describe_followed(config, start.path), *started]
        notes += self.start_heads(model, start)
        return model.to(self.inputs.device), notes

    def start_heads(self, model: TaskModel, start: ModelFolder) -> list[str]:
        """Start the heads of the task from another model, whose encoder has been loaded; returns notes for the log."""
        config, notes = self.config, []
        if start.tasks:
            return continue_heads(model, self.task, start, config.task_token)
        answers = () if self.task.answers is None else list(self.task.answers)
        if (start_task := models.spec(config.model).start_task) is not None and config.release_start:
            notes += start_task(
                TaskStart(
                    encoder=model.encoder,
                    heads=dict(model.heads.items()),
                    kinds=model.kinds,
                    objectives=objective_heads(start),
                    answers=[self.inputs.tokenizer.encode(answer) for answer in answers],
                )
            )
        if config.carry_answers and (note := carry_over(model, start, answers)):
            notes.append(note)
        if config.carry_answers and self.task.answers is not None:
            given = any(config.task_settings.get(name) is not None for name in ANSWER_LISTS)
            name, vocabulary = self.task.name, self.task.answers
            if note := continue_task_head(model, start, name, vocabulary, given=given):
                notes.append(note)
        return notes


def follow_task_token(config: FinetuneConfig, start: ModelFolder) -> FinetuneConfig:
    """The config with the task tokens of the model that it starts from, and the number of its task there, where it
    leaves them open.

    Raises:
        ConfigError: several of the model's tasks could be meant.
    """
    count = models.spec(start.model).inputs(start.config).num_tasks
    if start.model != config.model or not count:
        return config
    if not models.spec(config.model).inputs(config.encoder).num_tasks:
        config = replace(config, encoder=replace(config.encoder, num_tasks=count))
    if config.task_token is not None:
        return config
    return replace(config, task_token=find_token(start, load_task(config.task).configured(config.task_settings)))


def _open_valid_store(
    path: Path | None, regions: NativeStore | None, config: FinetuneConfig, other_features: bool
) -> NativeStore | None:
    """The region store of the validation images, if they have one of their own.

    Raises:
        ConfigError: no regions are shown.
        StoreError: its features are of another detector or width than those that the run trains on.
    """
    if path is None:
        return None
    if regions is None:
        raise ConfigError("a run without regions has none to validate on: leave out --valid-store.")
    store = NativeStore.open(path)
    if store.fingerprint != regions.fingerprint and not other_features:
        raise StoreError(
            f"{path} holds regions of another detector than {regions.path}. Extract both with the same one, or pass "
            "--other-features."
        )
    if config.extractor is None and store.feature_size != regions.feature_size:
        raise StoreError(
            f"{path} holds features of width {store.feature_size}, {regions.path} of width {regions.feature_size}: a "
            "model reads one width."
        )
    return store


def fit_to_family(config: FinetuneConfig) -> FinetuneConfig:
    """The config with the task's settings that it leaves open (None) as the family's release has them.

    Raises:
        ConfigError: a published recipe without the list of its release's answers.
    """
    if listed := describe_needed_answers(config):
        least = load_task(config.task).settings().min_count
        raise ConfigError(
            f"recipe {config.recipe} trains on the answers of its release, in their order: name their list with "
            f"--set task_settings.answers=FILE. For {config.model} it is {listed}. To list the answers of the training "
            f"questions instead: --set task_settings.min_count={least}."
        )
    return fill_task_settings(config)


def describe_needed_answers(config: FinetuneConfig) -> str:
    """Which file lists the answers that a run is trained on; empty where it names one, counts them or has none."""
    kind, spec = load_task(config.task), models.spec(config.model)
    settings = configs.from_dict(kind.settings, config.task_settings)
    if not issubclass(kind, AnswerTask) or settings.answers is not None or settings.min_count is not None:
        return ""
    return spec.answer_list(spec.layout).file


def fill_task_settings(config: FinetuneConfig) -> FinetuneConfig:
    """The config with the task's settings that it leaves open (None) as the family's release has them."""
    kind, spec = load_task(config.task), models.spec(config.model)
    settings = configs.from_dict(kind.settings, config.task_settings)
    names = [parent.name for parent in kind.__mro__ if issubclass(parent, Task) and "name" in vars(parent)]
    released = next((spec.tasks[name] for name in names if name in spec.tasks), {})
    left_open = {name: value for name, value in released.items() if getattr(settings, name) is None}
    return replace(config, task_settings={**config.task_settings, **left_open}) if left_open else config


def _extract_regions(
    config: FinetuneConfig,
    files: OwnFiles,
    images: Path,
    detector: Path | None,
    target: Path,
    **how: Any,
) -> None:
    """Write the regions of the images that files of one's own name; see `prepare_regions`."""
    problems, conflicts = Problems(), Conflicts()
    task = _open_task(config, conflicts)
    named = files.collect(task, problems).images
    for error in conflicts.errors:
        problems.add_error(files.train, error)
    prepare_regions(named, images, detector, target, problems, **how)


def _open_task(config: FinetuneConfig, conflicts: Conflicts) -> Task[Any, Any]:
    """The task of a run. If its list of answers or labels cannot be read, that is added to the conflicts, and the task
    reads examples without one: what is wrong with them is reported together with it."""
    kind, settings = load_task(config.task), config.task_settings
    try:
        return kind.configured(settings)
    except VislingError as error:
        conflicts.errors.append(error)
    return kind.configured({name: value for name, value in settings.items() if name not in ANSWER_LISTS})


def _choose_metric(
    config: FinetuneConfig, task: Task[Any, Any], train: Sequence[Record], valid: Sequence[Record]
) -> tuple[FinetuneConfig, list[str]]:
    """The config with a score that these validation examples define, and a note if it is another one: an area under
    the ROC curve needs examples with and without a label."""
    if config.train.metric == task.metric or not task.labelled(valid):
        return config, []
    predictions = next(iter(task.baselines(train, valid).values()), None)
    if predictions is None:
        return config, []
    report = task.report(predictions, valid)
    why = report.variants.get(config.train.metric)
    if config.train.metric in report.scores or why is None:
        return config, []
    note = f"validation has no {config.train.metric} ({why}): the best weights are chosen by {task.metric}"
    return replace(config, train=replace(config.train, metric=task.metric, direction="max")), [note]
