"""Evaluation: predictions of a fine-tuned model for a split, official scores, details and the submission file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from visling import models, runtime
from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader
from visling.data.corpora.base import check_images
from visling.data.text import TextLayout, Tokenizer
from visling.errors import DataError, RunError
from visling.models.task_model import TaskModel
from visling.pretrained.features import check_fingerprint
from visling.pretrained.folder import read_model_folder
from visling.regions.store import NativeStore
from visling.tasks.base import Report, Task, TaskSource
from visling.train.engine import predict
from visling.types import Batch, InputSpec, Prediction, Record, Targets


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
    """Score a fine-tuned run on a split; writes evaluation_SPLIT.json, details_SPLIT.jsonl and the official submission
    file into the run folder.

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
        RunError: the split was evaluated before, a model folder without `data` or `store`, or the results cannot be
            written.
    """
    result = run / f"evaluation_{split}.json"
    if result.exists() and not overwrite:
        raise RunError(f"{result} exists: this run has been scored on {split!r}. Use --overwrite to replace it.")
    saved = read_model_folder(run)
    model, task = saved.task_model()
    known = read_run_json(run) if (run / "run.json").exists() else {}
    unknown = [
        name for name, given in (("data", data), ("store", saved.text_only or store)) if not given and name not in known
    ]
    if unknown:
        raise RunError(
            f"{run} is not a run folder: it has no run.json that says what the model was trained on. "
            f"Give {' and '.join(f'--{name}' for name in unknown)}, or the folder that finetune wrote with --out."
        )
    data = Path(known["data"][0]) if data is None else data
    regions = None
    if not saved.text_only:
        regions = NativeStore.open(store if store is not None else Path(known["store"]))
        check_fingerprint(saved, regions.fingerprint, override=other_features)
    records = task.records(data, split)
    if not records:
        raise DataError(f"split {split!r} of {data} holds no example to score.")
    if regions is not None:
        check_images(records, regions)
    spec = models.spec(saved.model).inputs(saved.config)
    tokenizer = Tokenizer(str(saved.path / "vocab.txt"))
    layout = TextLayout(tokenizer, spec)
    model.to(runtime.pick_device(device))
    loader = _evaluation_loader(task, records, layout, regions, spec, tokenizer, batch_size, text_only=saved.text_only)
    predictions = predict_records(model, task, loader, records, precision)
    found: dict[str, Any] = {"task": saved.task, "split": split, "scores": {}, "by": {}, "baselines": {}}
    if task.labelled(records):
        found |= task.report(predictions, records).to_dict(task.name, split)
        found["baselines"] = {
            name: part.to_dict(task.name, split) for name, part in _baselines(task, known, records).items()
        }
    found |= {"text_only": saved.text_only, "truncated": layout.truncated}
    details = "".join(json.dumps(row) + "\n" for row in task.details(predictions, records))
    submission = task.submission(predictions)
    name, text = (
        (f"predictions_{split}.csv", submission)
        if isinstance(submission, str)
        else (f"predictions_{split}.json", json.dumps(submission))
    )
    try:
        (run / f"details_{split}.jsonl").write_text(details, encoding="utf-8")
        (run / name).write_text(text, encoding="utf-8")
        result.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"cannot write the results to {run}: {error}. Free space or fix permissions, then repeat with --overwrite."
        ) from error
    return found


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
    collator = Collator(store, spec, tokenizer)
    return Loader(source, collator, batch_size=batch_size, seed=0, shuffle=False, drop_last=False)


def predict_records(
    model: TaskModel, task: Task[Any, Any], loader: Loader, records: Sequence[Record], precision: runtime.Precision
) -> list[Prediction]:
    """Decoded predictions for every record; the loader must go through them in order."""

    def step(batch: Batch, targets: Targets) -> dict[str, Tensor]:
        return model(batch)  # type: ignore[no-any-return]

    predictions: list[Prediction] = []
    for logits in predict(step, loader, model=model, precision=precision):
        rows = next(iter(logits.values())).shape[0]
        predictions += task.decode(logits, records[len(predictions) : len(predictions) + rows])
    return predictions


def _baselines(task: Task[Any, Any], known: Mapping[str, Any], records: Sequence[Any]) -> dict[str, Report]:
    """Scores of predictors that look at nothing, on the same records by the same metric; none where the training data
    is unknown or gone."""
    data = Path(known["data"][0]) if known else None
    if data is None or not data.is_dir():
        return {}
    found = task.baselines(task.records(data, known["config"]["train_split"]), records)
    return {name: task.report(predictions, records) for name, predictions in found.items()}


def read_run_json(run: Path) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(
            f"{run} is not a run folder: cannot read run.json ({error}). Give the folder that finetune wrote with --out."
        ) from error
    return known
