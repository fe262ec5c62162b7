"""Evaluation: predictions of a fine-tuned model for a split, official scores, details and the submission file.

Questions about one image follow one another, so that most of them are in one batch, where the image is read once and a
stream of regions runs over it once. Every process scores whole batches, the ones that a single process would form, and
the predictions are gathered everywhere: neither predictions nor scores depend on the number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visling import runtime
from visling.data.batches.loader import Loader
from visling.data.batches.sharing import order_by_images
from visling.errors import RunError
from visling.models.task_model import TaskModel
from visling.pretrained.folder import read_model_folder
from visling.runs.examples import open_examples
from visling.runs.inputs import Inputs
from visling.runs.own_files import TRAIN, OwnFiles
from visling.runs.retrieve import Progress, retrieval_model, score_pairs
from visling.tasks.answers import read_predictions
from visling.tasks.base import Report, Task, TaskSource, TextOnly, read_records
from visling.train import engine
from visling.train.exchange import gather
from visling.types import Batch, Prediction, Record, Targets

_T = TypeVar("_T")


def evaluate(
    run: Path,
    *,
    split: str,
    data: Path | None = None,
    file: Path | None = None,
    store: Path | None = None,
    images: Path | None = None,
    device: str = "auto",
    precision: runtime.Precision = "fp32",
    batch_size: int = 256,
    other_features: bool = False,
    overwrite: bool = False,
    compare: Sequence[Path] = (),
    joint: Path | None = None,
    zero_shot: bool = False,
    task: str | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a fine-tuned run on a split; writes evaluation_SPLIT.json, details_SPLIT.jsonl and the official submission
    file into the run folder.

    Args:
        run: run folder, or a model folder, which needs `data` and `store` unless it is in the run folder that it was
            trained in (RUN/models/averaged); its results are then its own.
        data: folder of annotations; None = the one, or the files, that it was trained on.
        file: examples of one's own to score in place of a split; the results are named after it, not after `split`.
        store: region store; None = the one it was validated on, which is the one it was trained on, unless the run has
            a store for validation.
        images: folder of the images; None = that of the training run. Read for a model that computes the features of
            regions from pixels, and for the images of `file`, whose regions are added to those in the run folder.
        other_features: accept features of another detector.
        overwrite: replace the results of an earlier evaluation of this split.
        compare: other runs that were scored on this split, such as a model that saw no image; their scores are kept
            next to this one's.
        joint: run of the other phase of a task in two phases (VCR) that was evaluated on this split: both are scored
            together, or make the official result file together, predictions_joint_SPLIT.csv.
        zero_shot: of a pre-trained run or model folder: rank captions and images by its matching head.
        task: of a model of several tasks: the name of the one to score; the files are then those of tasks/NAME in the
            run folder.
        out: folder for the results in place of the run folder, for a split of the same name in other data.
        progress: of a task that ranks: called with (pairs done, pairs in all).
    Returns:
        Contents of evaluation_SPLIT.json.
    Raises:
        CheckpointError, DataError, StoreError: see their messages.
        RunError: the split was evaluated before, a model folder without `data` or `store`, or the results cannot be
            written.
    """
    split = split if file is None else file.stem
    place = out or (run if task is None else run / "tasks" / task)
    result = place / f"evaluation_{split}.json"
    if result.exists() and not overwrite:
        raise RunError(f"{result} exists: this run has been scored on {split!r}. Use --overwrite to replace it.")
    saved = read_model_folder(run).for_task(task)
    model, scored = retrieval_model(saved) if zero_shot else saved.task_model()
    compared = {str(other): _read_scores(other, split, scored.name) for other in compare}
    others = None if joint is None else _read_other_phase(joint, split)
    examples = open_examples(
        run,
        saved,
        scored,
        split=split,
        name=task,
        data=data,
        file=file,
        store=store,
        images=images,
        device=device,
        other_features=other_features,
        progress=progress,
    )
    inputs, records, notice = examples.inputs, examples.records, examples.notice
    predictions = predict_records(
        model.to(inputs.device),
        scored,
        inputs,
        records,
        batch_size=batch_size,
        precision=precision,
        progress=progress,
    )
    truncated = sum(gather(inputs.layout.truncated))
    found: dict[str, Any] = {"task": scored.name, "split": split, "scores": {}, "by": {}, "baselines": {}}
    if scored.labelled(records):
        found |= scored.report(predictions, records).to_dict(scored.name, split)
        baselines = _score_baselines(scored, examples.known, records)
        found["baselines"] = {name: part.to_dict(scored.name, split) for name, part in baselines.items()}
    if compared:
        found["compared"] = compared
    joint_file = None
    if others is not None:
        together, joint_file = scored.join_phases(predictions, others, records)
        if together is not None:
            found["joint"] = together.to_dict(scored.name, split)
    found |= {"text_only": saved.text_only, "truncated": truncated}
    if notes := [*filter(None, [notice]), *scored.notes(records)]:
        found["notes"] = notes
    details = "".join(json.dumps(row) + "\n" for row in scored.details(predictions, records))
    submission = scored.submission(predictions)
    files = {f"details_{split}.jsonl": details}
    if isinstance(submission, str):
        files[f"predictions_{split}.csv"] = submission
    else:
        files[f"predictions_{split}.json"] = json.dumps(submission)
    if joint_file is not None:
        files[f"predictions_joint_{split}.csv"] = joint_file
    files[result.name] = json.dumps(found, indent=2) + "\n"  # last: it says that the others are complete
    if runtime.is_main():
        _write_results(place, files)
    return found


def predict_records(
    model: TaskModel,
    task: Task[Any, Any],
    inputs: Inputs,
    records: Sequence[Record],
    *,
    batch_size: int,
    precision: runtime.Precision,
    progress: Progress | None = None,
) -> list[Prediction]:
    """Predictions for all records, in their order, on every process; of a task that ranks, as its `AllPairs` makes
    them.

    Args:
        inputs: without regions the examples lose their images.
        batch_size: examples, or pairs of a tile.
        progress: of a task that ranks: called with (pairs done, pairs in all).
    """
    if (ranking := task.all_pairs()) is not None:
        scores = score_pairs(
            model, ranking, inputs, records, batch_size=batch_size, precision=precision, progress=progress
        )
        return ranking.predictions(scores, records)
    source = TaskSource(task, records, inputs.layout)
    loader = inputs.loader(
        source if inputs.regions is not None else TextOnly(source),
        batch_size=batch_size,
        training=False,
        order=order_by_images(record.images for record in records),
    )
    return [
        prediction
        for _, prediction in _gather_sorted(
            zip(numbers.tolist(), task.decode(logits, batch.unshared(), [records[n] for n in numbers]), strict=True)
            for numbers, batch, logits in _predict_logits(model, loader, precision)
        )
    ]


def _predict_logits(
    model: TaskModel, loader: Loader, precision: runtime.Precision
) -> Iterator[tuple[NDArray[np.int64], Batch, Mapping[str, Tensor]]]:
    """This process's batches: the numbers of their examples, the inputs, and the logits."""

    def step(
        numbers: NDArray[np.int64], batch: Batch, targets: Targets
    ) -> tuple[NDArray[np.int64], Batch, Mapping[str, Tensor]]:
        return numbers, batch, model(batch)

    return engine.predict(step, loader.batches_with_index(), model=model, precision=precision)


def _gather_sorted(batches: Iterable[Iterable[tuple[int, _T]]]) -> list[tuple[int, _T]]:
    """The items of all processes, in the order of their examples."""
    own = [item for batch in batches for item in batch]
    return sorted((item for process in gather(own) for item in process), key=lambda item: item[0])


def _write_results(run: Path, files: Mapping[str, str]) -> None:
    """Write the files one after another, each whole or not at all; while they are written, the last one is absent."""
    *_, last = files
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / last).unlink(missing_ok=True)
        for name, text in files.items():
            part = run / f"{name}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(run / name)
    except OSError as error:
        raise RunError(
            f"cannot write the results to {run}: {error}. Free space or fix permissions, then repeat with --overwrite."
        ) from error


def _read_other_phase(run: Path, split: str) -> list[Prediction]:
    """Predictions of another run on the split.

    Raises:
        RunError: it was not evaluated there.
    """
    file = run / f"details_{split}.jsonl"
    if not file.exists():
        raise RunError(f"{run} has not been evaluated on {split!r}. First: visling evaluate {run} --split {split}")
    return read_predictions(file)


def _read_scores(run: Path, split: str, task: str | None) -> dict[str, Any]:
    """Scores of another run on the split.

    Raises:
        RunError: it was not scored there, or it is of another task.
    """
    file = run / f"evaluation_{split}.json"
    if not file.exists():
        raise RunError(f"{run} has not been scored on {split!r}. First: visling evaluate {run} --split {split}")
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["task"] != task:
        raise RunError(f"{run} is a model of the task {found['task']}, not of {task}: there is nothing to compare.")
    return {"scores": found["scores"], "text_only": found["text_only"]}


def _score_baselines(task: Task[Any, Any], known: Mapping[str, Any], records: Sequence[Any]) -> dict[str, Report]:
    """Scores of predictors that look at nothing, on the same records by the same metric; empty where the training data
    is unknown or gone."""
    data = Path(known["data"][0]) if known else None
    files = OwnFiles.from_run(known)
    if data is None or not (data.is_dir() if files is None else files.train.is_file()):
        return {}
    if files is None:
        train = read_records(task, data, known["config"]["train_split"])
    else:
        train = files.read_split(task, TRAIN).splits[TRAIN]
    found = task.baselines(train, records)
    return {name: task.report(predictions, records) for name, predictions in found.items()}
