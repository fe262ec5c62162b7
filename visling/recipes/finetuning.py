"""Fine-tuning and evaluation runs: a task, a model, its published numbers. A recipe is a function that returns a `Finetuning`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from visling import config as configs
from visling import models, runtime
from visling.data.loader import Loader
from visling.data.store import NativeStore
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError, RunError
from visling.recipes import answer_tables, assembly, releases, scenes
from visling.recipes.assembly import TaskModel
from visling.recipes.plans import Finetuning
from visling.tasks.base import Report, Task, TaskSource
from visling.tasks.base import load as load_task
from visling.train import engine
from visling.train.state import State
from visling.types import Batch, InputSpec, Loss, Prediction, Record, Targets

RECIPES: Mapping[str, Callable[[], Finetuning]] = {**scenes.FINETUNING, **releases.FINETUNING}


def finetune(
    run: Finetuning,
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
        ConfigError, DataError, StoreError, RunError: see their messages; nothing is trained before all inputs have been looked at.
    """
    if store is None and not run.text_only:
        raise ConfigError("a model that sees regions needs --store. For a model of the words alone use --text-only.")
    regions = None if store is None else NativeStore.open(store)
    saved = None if init is None else assembly.read(init)
    if regions is not None:
        run = assembly.fit_to_store(run, regions)
    elif saved is not None:  # nothing is projected, but the weights of the projection are loaded
        run = configs.override(run, [f"encoder.feature_size={saved.config.feature_size}"])
    kind = load_task(run.task)
    task = kind(configs.from_dict(kind.settings, run.task_settings))
    train_records, valid_records = _split(run, task, data)
    if regions is not None and not run.text_only:
        assembly.check_images([*train_records, *valid_records], regions)
    task.setup(train_records)
    spec = models.spec(run.model).inputs(run.encoder)
    tokenizer = assembly.tokenizer(run)
    layout = TextLayout(tokenizer, spec)
    target = runtime.pick_device(device)
    with assembly.started(run, out, data=[data], store=regions, task=run.task, resume=resume, stream=stream, command=command) as (folder, log):
        runtime.seed_everything(run.train.seed)
        seen = (image_id for record in train_records for image_id in record.images)
        model = TaskModel(assembly.fresh_encoder(run, regions, seen), task, assembly.head_styles(run.model))
        if saved is not None:
            assembly.check_family(saved, run.model)
            if regions is not None:
                assembly.check_fingerprint(saved, regions.fingerprint, override=other_features or run.text_only)
            assembly.load_part(model.encoder, saved.weights, "encoder.", saved.path)
            carried = answer_tables.carry_over(model, saved, task.state().get("answers", ())) if run.carry_answers else ""
            if carried and not folder.has_last:
                log.event(carried, step=0)
        model.to(target)

        def loader(records: Sequence[Record], *, training: bool) -> Loader:
            source = TaskSource(task, records, layout, text_only=run.text_only)
            return Loader(
                source, None if run.text_only else regions, spec, tokenizer, batch_size=run.batch_size, seed=run.train.seed,
                shuffle=training, drop_last=training, pin=target.type == "cuda",
            )  # fmt: skip

        train, valid = loader(train_records, training=True), loader(valid_records, training=False)
        assembly.record_size(folder, model, spec, regions)
        folder.record({"examples": {"train": len(train_records), "valid": len(valid_records)}})

        def step(batch: Batch, targets: Targets) -> Loss:
            return task.loss(model(batch), targets)

        def validate() -> Mapping[str, float]:
            predictions = _predictions(model, task, valid, valid_records, run.train.precision)
            return {name: score.value for name, score in task.report(predictions, valid_records).scores.items()}

        state = engine.fit(
            model,
            step,
            train,
            config=run.train,
            log=log,
            validate=validate,
            run_folder=folder,
            save_best=lambda path: assembly.save(path, model, run=run, task=task, text_only=run.text_only, store=regions, tokenizer=tokenizer),
        )
        assembly.conclude(folder, state, log, layout=layout, store=regions)
    return state


def evaluate(
    run: Path,
    *,
    split: str,
    data: Path | None = None,
    store: Path | None = None,
    device: str = "auto",
    precision: runtime.Precision = "fp32",
    batch_size: int = 256,
    other_features: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score a fine-tuned run on a split; writes evaluation_SPLIT.json, details_SPLIT.jsonl and the official submission file into the run folder.

    Args:
        run: run folder, or a model folder, which needs `data` and `store`.
        data: folder of annotations; the one it was trained on if left out.
        store: region store; the one it was trained on if left out.
        other_features: accept features of another detector.
        overwrite: replace the results of an earlier evaluation of this split.
    Returns:
        Contents of evaluation_SPLIT.json.
    Raises:
        CheckpointError, DataError, StoreError: see their messages.
        RunError: the split was evaluated before, a model folder without `data` or `store`, or the results cannot be written.
    """
    result = run / f"evaluation_{split}.json"
    if result.exists() and not overwrite:
        raise RunError(f"{result} exists: this run has been scored on {split!r}. Use --overwrite to replace it.")
    saved = assembly.read(run)
    model, task = saved.task_model()
    known = _run_json(run) if (run / "run.json").exists() else {}
    unknown = [name for name, given in (("data", data), ("store", saved.text_only or store)) if not given and name not in known]
    if unknown:
        raise RunError(
            f"{run} is not a run folder: it has no run.json that says what the model was trained on. "
            f"Give {' and '.join(f'--{name}' for name in unknown)}, or the folder that finetune wrote with --out."
        )
    data = Path(known["data"][0]) if data is None else data
    regions = None
    if not saved.text_only:
        regions = NativeStore.open(store if store is not None else Path(known["store"]))
        assembly.check_fingerprint(saved, regions.fingerprint, override=other_features)
    records = task.records(data, split)
    if not records:
        raise DataError(f"split {split!r} of {data} holds no example to score.")
    if regions is not None:
        assembly.check_images(records, regions)
    spec = models.spec(saved.model).inputs(saved.config)
    tokenizer = Tokenizer(str(saved.path / "vocab.txt"))
    layout = TextLayout(tokenizer, spec)
    model.to(runtime.pick_device(device))
    loader = _evaluation_loader(task, records, layout, regions, spec, tokenizer, batch_size, text_only=saved.text_only)
    predictions = _predictions(model, task, loader, records, precision)
    found: dict[str, Any] = {"task": saved.task, "split": split, "scores": {}, "by": {}, "baselines": {}}
    if task.labelled(records):
        found |= task.report(predictions, records).to_dict(task.name, split)
        found["baselines"] = {name: part.to_dict(task.name, split) for name, part in _baselines(task, known, records).items()}
    found |= {"text_only": saved.text_only, "truncated": layout.truncated}
    details = "".join(json.dumps(row) + "\n" for row in task.details(predictions, records))
    submission = task.submission(predictions)
    name, text = (f"predictions_{split}.csv", submission) if isinstance(submission, str) else (f"predictions_{split}.json", json.dumps(submission))
    try:
        (run / f"details_{split}.jsonl").write_text(details, encoding="utf-8")
        (run / name).write_text(text, encoding="utf-8")
        result.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write the results to {run}: {error}. Free space or fix permissions, then repeat with --overwrite.") from error
    return found


def _split(run: Finetuning, task: Task[Any, Any], data: Path) -> tuple[Sequence[Record], Sequence[Record]]:
    """Training and validation records."""
    train: Sequence[Record] = task.records(data, run.train_split)
    valid: Sequence[Record] = task.records(data, run.valid_split)
    if not train or not valid:
        raise DataError(f"{data}: {len(train)} training and {len(valid)} validation examples; both are needed.")
    if run.train_limit is not None:
        order = runtime.generator_for(run.train.seed).permutation(len(train))[: run.train_limit]
        train = [train[int(index)] for index in order]
    return train, valid


def _evaluation_loader(
    task: Task[Any, Any],
    records: Sequence[Record],
    layout: TextLayout,
    store: NativeStore | None,
    spec: InputSpec,
    tokenizer: Tokenizer,
    batch_size: int,
    *,
    text_only: bool,
) -> Loader:
    source = TaskSource(task, records, layout, text_only=text_only)
    return Loader(source, store, spec, tokenizer, batch_size=batch_size, seed=0, shuffle=False, drop_last=False)


def _predictions(model: TaskModel, task: Task[Any, Any], loader: Loader, records: Sequence[Record], precision: runtime.Precision) -> list[Prediction]:
    """Decoded predictions for every record; the loader must go through them in order."""

    def step(batch: Batch, targets: Targets) -> dict[str, Tensor]:
        return model(batch)  # type: ignore[no-any-return]

    predictions: list[Prediction] = []
    for logits in engine.predict(step, loader, model=model, precision=precision):
        rows = next(iter(logits.values())).shape[0]
        predictions += task.decode(logits, records[len(predictions) : len(predictions) + rows])
    return predictions


def _baselines(task: Task[Any, Any], known: Mapping[str, Any], records: Sequence[Any]) -> dict[str, Report]:
    """Scores of predictors that look at nothing, on the same records by the same metric; none where the training data is unknown or gone."""
    data = Path(known["data"][0]) if known else None
    if data is None or not data.is_dir():
        return {}
    found = task.baselines(task.records(data, known["config"]["train_split"]), records)
    return {name: task.report(predictions, records) for name, predictions in found.items()}


def _run_json(run: Path) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"{run} is not a run folder: cannot read run.json ({error}). Give the folder that finetune wrote with --out.") from error
    return known
