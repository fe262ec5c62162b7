"""Fine-tuning: a task, a model, training and validation records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from visling import config as configs
from visling import models, runtime
from visling.data.corpora.base import check_images
from visling.errors import ConfigError, DataError
from visling.models.task_model import TaskModel
from visling.pretrained.answers import carry_over
from visling.pretrained.features import check_fingerprint, measure_features
from visling.pretrained.folder import ModelFolder, check_family, load_part, read_model_folder, save_model_folder
from visling.recipes.configs import FinetuneConfig
from visling.regions.store import NativeStore
from visling.runs.evaluate import predict_records
from visling.runs.setup import Inputs, conclude_run, fit_to_store, open_run, record_size
from visling.tasks.base import Task, TaskSource, TextOnly
from visling.tasks.base import load as load_task
from visling.train.engine import fit
from visling.train.state import State
from visling.types import Batch, Loss, Record, Targets


def finetune(
    config: FinetuneConfig,
    out: Path,
    *,
    data: Path,
    store: Path | None,
    init: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    other_features: bool = False,
    stream: TextIO | None = None,
    command: Sequence[str] = (),
) -> State:
    """Train a model on a task; leaves a run folder.

    Args:
        data: folder of annotations.
        store: region store that holds every image; may be None for a text-only run.
        init: pre-trained model or run folder; None starts from scratch.
        other_features: accept that `init` was trained on features of another detector.
        stream: where progress is written.
    Returns:
        How far it came; `stopped` says why it ended.
    Raises:
        ConfigError, DataError, StoreError, RunError: see their messages; nothing is trained before all inputs have been
            looked at.
    """
    if store is None and not config.text_only:
        raise ConfigError("a model that sees regions needs --store. For a model of the words alone use --text-only.")
    start = None if init is None else read_model_folder(init)
    regions = None if store is None else NativeStore.open(store)
    if regions is not None:
        config = fit_to_store(config, regions)
    elif start is not None:  # nothing is projected, but the weights of the projection are loaded
        config = configs.override(config, [f"encoder.feature_size={start.config.feature_size}"])
    shown = None if config.text_only else regions
    task, train_records, valid_records = _read_records(config, data, shown)
    inputs = Inputs(config.model, config.encoder, shown, device)
    with open_run(
        config, out, data=[data], store=regions, task=config.task, resume=resume, stream=stream, command=command
    ) as (folder, log):
        model, note = _build_model(config, task, train_records, regions, start, other_features=other_features)
        if note and not folder.has_last:
            log.event(note, step=0)
        model.to(inputs.device)
        record_size(folder, model, inputs.spec, regions)
        folder.record({"examples": {"train": len(train_records), "valid": len(valid_records)}})

        def step(batch: Batch, targets: Targets) -> Loss:
            return task.loss(model(batch), targets)

        def validate() -> Mapping[str, float]:
            predictions = predict_records(
                model, task, inputs, valid_records, batch_size=config.batch_size, precision=config.train.precision
            )
            return {name: score.value for name, score in task.report(predictions, valid_records).scores.items()}

        def save(path: Path) -> None:
            save_model_folder(
                path, model, run=config, task=task, text_only=config.text_only, store=regions,
                tokenizer=inputs.tokenizer,
            )  # fmt: skip

        source = TaskSource(task, train_records, inputs.layout)
        batches = inputs.loader(
            TextOnly(source) if config.text_only else source,
            batch_size=config.batch_size,
            seed=config.train.seed,
            training=True,
        )
        state = fit(
            model, step, batches, config=config.train, log=log, validate=validate, run_folder=folder, save_best=save
        )
        conclude_run(folder, state, log, layout=inputs.layout, store=regions)
    return state


def _read_records(
    config: FinetuneConfig, data: Path, regions: NativeStore | None
) -> tuple[Task[Any, Any], Sequence[Record], Sequence[Record]]:
    """The task with its answers, its training and its validation records."""
    kind = load_task(config.task)
    task = kind(configs.from_dict(kind.settings, config.task_settings))
    train: Sequence[Record] = task.records(data, config.train_split)
    valid: Sequence[Record] = task.records(data, config.valid_split)
    if not train or not valid:
        raise DataError(f"{data}: {len(train)} training and {len(valid)} validation examples; both are needed.")
    if config.train_limit is not None:
        order = runtime.generator_for(config.train.seed).permutation(len(train))[: config.train_limit]
        train = [train[int(index)] for index in order]
    if regions is not None:
        check_images([*train, *valid], regions)
    task.setup(train)
    return task, train, valid


def _build_model(
    config: FinetuneConfig,
    task: Task[Any, Any],
    records: Sequence[Record],
    store: NativeStore | None,
    start: ModelFolder | None,
    *,
    other_features: bool,
) -> tuple[TaskModel, str]:
    """The model with the weights that it starts from, and what there is to say about its answer head.

    Raises:
        CheckpointError: `start` is of another family, or knows other features.
    """
    runtime.seed_everything(config.train.seed)
    seen = (image_id for record in records for image_id in record.images)
    encoder = measure_features(models.build(config.model, config.encoder), store, seen)
    model = TaskModel(encoder, task.heads, models.head_styles(config.model), group=task.group)
    if start is None:
        return model, ""
    check_family(start, config.model)
    if store is not None:
        check_fingerprint(start, store.fingerprint, override=other_features or config.text_only)
    load_part(encoder, start.weights, "encoder.", start.path)
    answers = () if task.answers is None else list(task.answers)
    return model, carry_over(model, start, answers) if config.carry_answers else ""
