"""Fine-tuning: a task, a model, training and validation records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from visling import config as configs
from visling import models, runtime
from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader
from visling.data.corpora.base import check_images
from visling.data.text import TextLayout
from visling.errors import ConfigError, DataError
from visling.models import head_styles
from visling.models.task_model import TaskModel
from visling.pretrained.answers import carry_over
from visling.pretrained.features import check_fingerprint
from visling.pretrained.folder import check_family, load_part, read_model_folder, save_model_folder
from visling.recipes.configs import FinetuneConfig
from visling.regions.store import NativeStore
from visling.runs.evaluate import predict_records
from visling.runs.setup import build_encoder, build_tokenizer, conclude_run, fit_to_store, open_run, record_size
from visling.tasks.base import Task, TaskSource
from visling.tasks.base import load as load_task
from visling.train.engine import fit
from visling.train.state import State
from visling.types import Batch, Loss, Record, Targets


def finetune(
    run: FinetuneConfig,
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
    if store is None and not run.text_only:
        raise ConfigError("a model that sees regions needs --store. For a model of the words alone use --text-only.")
    regions = None if store is None else NativeStore.open(store)
    saved = None if init is None else read_model_folder(init)
    if regions is not None:
        run = fit_to_store(run, regions)
    elif saved is not None:  # nothing is projected, but the weights of the projection are loaded
        run = configs.override(run, [f"encoder.feature_size={saved.config.feature_size}"])
    kind = load_task(run.task)
    task = kind(configs.from_dict(kind.settings, run.task_settings))
    train_records, valid_records = _split(run, task, data)
    if regions is not None and not run.text_only:
        check_images([*train_records, *valid_records], regions)
    task.setup(train_records)
    spec = models.spec(run.model).inputs(run.encoder)
    tokenizer = build_tokenizer(run)
    layout = TextLayout(tokenizer, spec)
    target = runtime.pick_device(device)
    with open_run(
        run, out, data=[data], store=regions, task=run.task, resume=resume, stream=stream, command=command
    ) as (folder, log):
        runtime.seed_everything(run.train.seed)
        seen = (image_id for record in train_records for image_id in record.images)
        model = TaskModel(build_encoder(run, regions, seen), task.heads, head_styles(run.model), group=task.group)
        if saved is not None:
            check_family(saved, run.model)
            if regions is not None:
                check_fingerprint(saved, regions.fingerprint, override=other_features or run.text_only)
            load_part(model.encoder, saved.weights, "encoder.", saved.path)
            carried = carry_over(model, saved, task.state().get("answers", ())) if run.carry_answers else ""
            if carried and not folder.has_last:
                log.event(carried, step=0)
        model.to(target)

        def loader(records: Sequence[Record], *, training: bool) -> Loader:
            source = TaskSource(task, records, layout, text_only=run.text_only)
            return Loader(
                source, Collator(None if run.text_only else regions, spec, tokenizer), batch_size=run.batch_size,
                seed=run.train.seed, shuffle=training, drop_last=training, pin=target.type == "cuda",
            )  # fmt: skip

        train, valid = loader(train_records, training=True), loader(valid_records, training=False)
        record_size(folder, model, spec, regions)
        folder.record({"examples": {"train": len(train_records), "valid": len(valid_records)}})

        def step(batch: Batch, targets: Targets) -> Loss:
            return task.loss(model(batch), targets)

        def validate() -> Mapping[str, float]:
            predictions = predict_records(model, task, valid, valid_records, run.train.precision)
            return {name: score.value for name, score in task.report(predictions, valid_records).scores.items()}

        state = fit(
            model,
            step,
            train,
            config=run.train,
            log=log,
            validate=validate,
            run_folder=folder,
            save_best=lambda path: save_model_folder(
                path, model, run=run, task=task, text_only=run.text_only, store=regions, tokenizer=tokenizer
            ),
        )
        conclude_run(folder, state, log, layout=layout, store=regions)
    return state


def _split(run: FinetuneConfig, task: Task[Any, Any], data: Path) -> tuple[Sequence[Record], Sequence[Record]]:
    """Training and validation records."""
    train: Sequence[Record] = task.records(data, run.train_split)
    valid: Sequence[Record] = task.records(data, run.valid_split)
    if not train or not valid:
        raise DataError(f"{data}: {len(train)} training and {len(valid)} validation examples; both are needed.")
    if run.train_limit is not None:
        order = runtime.generator_for(run.train.seed).permutation(len(train))[: run.train_limit]
        train = [train[int(index)] for index in order]
    return train, valid
