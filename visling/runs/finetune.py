"""Fine-tuning: a task, a model, training and validation records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from visling import config as configs
from visling import models, runtime
from visling.data.annotations.image_lists import without_images
from visling.data.annotations.problems import Problems
from visling.data.corpora.base import check_images
from visling.errors import ConfigError, DataError
from visling.models.base import TaskStart
from visling.models.task_model import TaskModel
from visling.pretrained.answers import carry_over
from visling.pretrained.features import check_fingerprint, measure_features
from visling.pretrained.folder import (
    check_family,
    load_part,
    objective_heads,
    read_model_folder,
    save_model_folder,
)
from visling.recipes.configs import FinetuneConfig
from visling.regions.store import NativeStore
from visling.runs.evaluate import predict_records
from visling.runs.inputs import Inputs, fit_to_store
from visling.runs.own_files import TRAIN, VALID, OwnFiles
from visling.runs.own_regions import carried_detector, check_ids, prepare_regions
from visling.runs.retrieve import limit_images
from visling.runs.setup import Training, carry_out, describe_origin
from visling.tasks.base import JoinedRecords, Task, TaskSource, TextOnly, read_records
from visling.tasks.base import load as load_task
from visling.tasks.vqa import VQA
from visling.train.claim import REGIONS, refuse_taken
from visling.train.state import RunFolder, State
from visling.types import Batch, Loss, Record, Targets
from visling.vision.extract import Progress


def finetune(
    config: FinetuneConfig,
    out: Path,
    *,
    data: Path | OwnFiles,
    store: Path | None,
    images: Path | None = None,
    detector: Path | None = None,
    init: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    other_features: bool = False,
    stream: TextIO | None = None,
    progress: Progress | None = None,
    tensorboard: bool = False,
    command: Sequence[str] = (),
) -> State:
    """Train a model on a task; leaves a run folder.

    Args:
        data: folder of annotations, or files of one's own.
        store: region store that holds every image; may be None for a text-only run, or with `images`.
        images: folder of the images of files of one's own; their regions are extracted into `out/regions` first.
        detector: folder of the detector that extracts them; None = the one that `init` carries.
        init: pre-trained model or run folder; None starts from scratch.
        other_features: accept that `init` was trained on features of another detector.
        stream: where progress is written.
        progress: called with (images done, images in all) while regions are extracted.
        tensorboard: whether losses and scores are also written as event files, into `out/tensorboard`.
    Returns:
        How far it came; `stopped` says why it ended.
    Raises:
        ConfigError, DataError, StoreError, RunError: see their messages; nothing is trained before all inputs have been
            checked.
    """
    if isinstance(data, OwnFiles) and images is not None and store is None:
        refuse_taken(out, resume)
        task = load_task(config.task).configured(config.task_settings)
        store = out / REGIONS
        problems = Problems()
        prepare_regions(
            data.collect(task, problems).images,
            images,
            detector if detector is not None else carried_detector(init),
            store,
            problems,
            device=device,
            progress=progress,
        )
    run = Finetuning(
        config, data=data, store=store, images=images, init=init, device=device, other_features=other_features
    )
    return carry_out(run, out, resume=resume, stream=stream, tensorboard=tensorboard, command=command)


class Finetuning:
    """A fine-tuning run that is ready to start; the arguments are those of `finetune`."""

    def __init__(
        self,
        config: FinetuneConfig,
        *,
        data: Path | OwnFiles,
        store: Path | None,
        images: Path | None = None,
        init: Path | None,
        device: str,
        other_features: bool,
    ) -> None:
        if store is None and not config.text_only:
            raise ConfigError(
                "a model that sees regions needs --store. For a model of the words alone use --text-only."
            )
        config = fit_to_family(config)
        self.store = None if store is None else NativeStore.open(store)
        self.start = None if init is None else read_model_folder(init)
        if self.store is not None:
            config = fit_to_store(config, self.store)
        elif self.start is not None:  # no feature is projected, but the weights of the projection are loaded
            encoder = replace(config.encoder, feature_size=self.start.config.feature_size)
            config = replace(config, encoder=encoder)
        self.config = config
        regions = None if config.text_only else self.store
        self.task = load_task(config.task).configured(config.task_settings)
        if isinstance(data, OwnFiles):
            own = data.read(self.task)
            config = self.config = replace(config, train_split=TRAIN, valid_split=VALID)
            if regions is not None:
                check_ids(own.images, regions)
            read, valid = own.splits[TRAIN], own.splits[VALID]
        else:
            read = read_records(self.task, data, config.train_split)
            valid = read_records(self.task, data, config.valid_split)
        kept = read if config.without_images is None else without_images(read, config.without_images)
        self.left_out = len(read) - len(kept)
        self.train_records = _limit_records(kept, config)
        self.valid_records: Sequence[Record] = valid
        if not self.train_records or not self.valid_records:
            raise DataError(
                f"{data}: {len(self.train_records)} training and {len(self.valid_records)} validation examples; both "
                "are needed."
            )
        self.valid_records = limit_images(self.valid_records, config.valid_images)
        if regions is not None:
            check_images(JoinedRecords(self.train_records, self.valid_records), regions)
            self.train_records = self.task.with_regions(self.train_records, regions)
        self.task.setup(self.train_records)
        try:
            self.task.check(self.valid_records)
        except DataError as error:
            place = data.valid if isinstance(data, OwnFiles) else f"{data}, split {config.valid_split}"
            raise DataError(f"{place}, {error}") from error
        self.config, self.notes = _choose_metric(self.config, self.task, self.train_records, self.valid_records)
        if self.start is not None:
            check_family(self.start, config.model)
            if self.store is not None:
                override = other_features or config.text_only
                check_fingerprint(self.start, self.store.fingerprint, override=override)
        self.inputs = Inputs(config.model, config.encoder, regions, device)
        if isinstance(data, OwnFiles):
            self.origin = describe_origin(data=[data.train.parent], images=images, task=config.task)
            self.origin["files"] = data.describe()
        else:
            self.origin = describe_origin(data=[data], task=config.task)

    def build(self) -> Training:
        """The model, its batches and its validation."""
        config, task, inputs = self.config, self.task, self.inputs
        model, notes = self._build_model()
        notes = [*notes, *self.notes]
        if self.left_out:
            notes.append(f"{self.left_out} training examples of the images in {config.without_images} are left out")
        batch_size, shrunk = self._fit_batch()

        def step(batch: Batch, targets: Targets) -> Loss:
            return task.loss(model(batch), targets)

        def validate() -> Mapping[str, float]:
            predictions = predict_records(
                model, task, inputs, self.valid_records, batch_size=config.batch_size, precision=config.train.precision
            )
            return {name: score.value for name, score in task.report(predictions, self.valid_records).scores.items()}

        def save(path: Path) -> None:
            save_model_folder(
                path, model, run=config, task=task, text_only=config.text_only, store=self.store,
                tokenizer=inputs.tokenizer,
            )  # fmt: skip

        def record(folder: RunFolder) -> None:
            folder.record({"examples": {"train": len(self.train_records), "valid": len(self.valid_records)}})

        source = TaskSource(task, self.train_records, inputs.layout)
        return Training(
            model=model,
            step=step,
            batches=inputs.loader(
                TextOnly(source) if config.text_only else source,
                batch_size=batch_size,
                seed=config.train.seed,
                training=True,
                sort_by_length=config.sort_by_length,
                flip=config.flip,
                swap_sides=config.flip > 0,
            ),
            validate=validate,
            save=save,
            record=record,
            notes=[
                *notes,
                *filter(None, [shrunk]),
                *task.notes(JoinedRecords(self.train_records, self.valid_records)),
            ],
        )

    def _fit_batch(self) -> tuple[int, str]:
        """Examples per training batch, no more than there are if one process trains, and what there is to say of it."""
        asked, have = self.config.batch_size, len(self.train_records)
        if have >= asked or runtime.world_size() > 1:
            return asked, ""
        fitting = max(1, have // self.config.train.accumulation)
        return fitting, f"{have} training examples do not fill a batch of {asked}: batches of {fitting} are used"

    def _build_model(self) -> tuple[TaskModel, list[str]]:
        """The model with its initial weights, and notes on its heads."""
        config, task, start = self.config, self.task, self.start
        seen = (image_id for record in self.train_records for image_id in record.images)
        encoder = measure_features(models.build(config.model, config.encoder), self.store, seen)
        model = TaskModel(encoder, task.heads, models.head_styles(config.model), group=task.group)
        if start is None:
            return model.to(self.inputs.device), []
        load_part(encoder, start.weights, "encoder.", start.path)
        answers = () if task.answers is None else list(task.answers)
        notes = []
        if (start_task := models.spec(config.model).start_task) is not None and config.release_start:
            notes += start_task(
                TaskStart(
                    encoder=encoder,
                    heads=dict(model.heads.items()),
                    kinds=model.kinds,
                    objectives=objective_heads(start),
                    answers=[self.inputs.tokenizer.encode(answer) for answer in answers],
                )
            )
        if config.carry_answers and (note := carry_over(model, start, answers)):
            notes.append(note)
        return model.to(self.inputs.device), notes


def fit_to_family(config: FinetuneConfig) -> FinetuneConfig:
    """The config with the task's settings that it leaves open (None) as the family's release has them.

    Raises:
        ConfigError: a published recipe without the list of its release's answers.
    """
    kind = load_task(config.task)
    settings = configs.from_dict(kind.settings, config.task_settings)
    spec = models.spec(config.model)
    if issubclass(kind, VQA) and settings.answers is None and settings.min_count is None:
        raise ConfigError(
            f"recipe {config.recipe} trains on the answers of its release, in their order: name their list with "
            f"--set task_settings.answers=FILE. For {config.model} it is {spec.answer_list(spec.layout).file}. To list "
            "the answers of the training questions instead: --set task_settings.min_count=9."
        )
    names = [parent.name for parent in kind.__mro__ if issubclass(parent, Task) and "name" in vars(parent)]
    released = next((spec.tasks[name] for name in names if name in spec.tasks), {})
    left_open = {name: value for name, value in released.items() if getattr(settings, name) is None}
    return replace(config, task_settings={**config.task_settings, **left_open}) if left_open else config


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


def _limit_records(records: Sequence[Record], config: FinetuneConfig) -> Sequence[Record]:
    """The training records, cut to the config's limit by a draw that its seed determines."""
    if config.train_limit is None:
        return records
    order = runtime.generator_for(config.train.seed).permutation(len(records))[: config.train_limit]
    return [records[int(index)] for index in order]
