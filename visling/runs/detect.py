"""Training and scoring a detector on scenes, on NLVR's pictures, or on any folder of images with COCO-style boxes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from visling import config as configs
from visling import runtime
from visling.data.annotations.instances import Instances, nlvr_instances, read_instances
from visling.errors import DataError
from visling.metrics import detection as metric
from visling.recipes.detectors import DetectConfig
from visling.runs.detection_data import DetectionBatches, Samples, load_ahead
from visling.runs.setup import claim_run_folder
from visling.runtime import Precision
from visling.train.engine import fit
from visling.train.log import Log
from visling.train.loggers import check_loggers, open_loggers
from visling.train.state import RunFolder, gather
from visling.types import IGNORE
from visling.vision.detector import Detector, Truth

_LONGEST_LINE = 1 << 20
"""Characters read of a file's first line; NLVR's lines have a few thousand, a COCO file on one line many millions."""


@dataclass(frozen=True, kw_only=True)
class TrainedDetector:
    """Result of training."""

    detector: Detector
    """In evaluation mode."""
    folder: Path
    """Run folder; `Detector.load` takes it."""
    steps: int
    epochs: float
    """Passes over the images."""
    seconds: float
    """Time spent on the run."""
    stopped: str
    """Why training ended: finished, or max_seconds if it is to be resumed."""
    images: int
    """Images trained on."""
    unreadable: tuple[tuple[Path, str], ...]
    """Images left out, with the reason."""


@dataclass(frozen=True, kw_only=True)
class DetectionEvaluation:
    """Result of scoring."""

    scores: metric.DetectionScores
    ap: Mapping[str, float]
    """Average precision by class name."""
    images: int
    """Images scored."""
    unreadable: tuple[tuple[Path, str], ...]
    """Images left out, with the reason."""
    images_per_second: float
    """Of detection alone."""


def train_detector(
    images: Path,
    annotations: Path | Instances,
    out: Path,
    config: DetectConfig,
    *,
    device: str = "auto",
    resume: bool = False,
    stream: TextIO | None = None,
    log_to: Sequence[str] = (),
) -> TrainedDetector:
    """Train a detector and save it in `out/model`; `out/last` holds what an interrupted run needs to resume exactly.

    Args:
        images: folder that the file names of the annotations are relative to.
        annotations: COCO instances JSON, or what a reader returned for another format.
        resume: continue the unfinished run in `out`; the settings must be the same.
        stream: where progress is written.
        log_to: where losses and scores go in addition to `out/log.jsonl`: tensorboard, wandb, trackio.
    Raises:
        ConfigError: unknown device, or too few images for the number of processes.
        DataError: annotations or images cannot be used.
        RunError: `out` is taken or cannot be resumed from, or training failed.
    """
    target = runtime.pick_device(device)
    instances = annotations if isinstance(annotations, Instances) else read_instances(annotations)
    config = _name_outputs(config, instances)
    samples = Samples(images, instances, config.detector, cache_bytes=int(config.cache_gigabytes * 1e9))
    samples.check()
    batches = DetectionBatches(
        samples, batch_size=config.batch_size, seed=config.train.seed, flip_rate=config.flip_rate
    )
    check_loggers(log_to)
    with claim_run_folder(out, resume=resume) as folder:
        _record_start(folder, config, images, None if isinstance(annotations, Instances) else annotations)
        runtime.seed_everything(config.train.seed)
        detector = Detector(config.detector).to(target)
        folder.record({"parameters": sum(parameter.numel() for parameter in detector.parameters())})
        if not runtime.is_main():  # weights are equal everywhere, the sampled anchors and regions are not
            runtime.seed_everything(config.train.seed + runtime.rank())

        loggers = open_loggers(log_to, folder, configs.to_dict(config))
        with Log(folder.log, stream=stream, loggers=loggers, unit="images") as log:
            if not folder.has_last:
                log.event(_describe_task(instances, config, target), step=0)
            state = fit(
                detector,
                detector.losses,
                batches,
                config=config.train,
                log=log,
                run_folder=folder,
                save_model=detector.save,
                reseed=False,  # sampling continues the stream that the weights were drawn from
            )
            unreadable = dict(entry for share in gather(samples.unreadable) for entry in share)
            for path, reason in unreadable.items():
                log.event(f"left out {path}: {reason}", step=state.step)
    if state.stopped != "max_seconds":
        folder.finish()
    return TrainedDetector(
        detector=detector.eval(),
        folder=out,
        steps=state.step,
        epochs=state.epoch + state.batch / len(batches),
        seconds=state.elapsed,
        stopped=state.stopped,
        images=len(samples) - len(unreadable),
        unreadable=tuple(unreadable.items()),
    )


def evaluate_detector(
    detector: Detector | Path,
    images: Path,
    annotations: Path | Instances,
    *,
    batch_size: int = 32,
    device: str = "auto",
    precision: Precision = "fp32",
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DetectionEvaluation:
    """Score a detector, or the folder of one, on annotated images.

    Args:
        limit: score only the first images.
        progress: called with (images done, images in all).
    Raises:
        CheckpointError: the folder is not a detector.
        DataError: annotations or images cannot be used, or have classes or attributes that the detector does not know.
    """
    target = runtime.pick_device(device)
    detector = (Detector.load(detector) if isinstance(detector, Path) else detector).to(target).eval()
    instances = annotations if isinstance(annotations, Instances) else read_instances(annotations)
    instances = replace(instances, records=instances.records[:limit])
    samples = Samples(images, instances, detector.config, cache_bytes=0)
    samples.check()
    detections: list[metric.DetectedBoxes] = []
    truths: list[metric.TrueBoxes] = []
    seconds = 0.0
    with ThreadPoolExecutor(2) as pool:
        batches = [range(start, min(start + batch_size, len(samples))) for start in range(0, len(samples), batch_size)]
        for batch, loaded in load_ahead(pool, batches, lambda batch: [samples.original(index) for index in batch]):
            pairs = [pair for pair in loaded if pair is not None]
            began = time.perf_counter()
            regions = detector.detect([picture for picture, _ in pairs], precision=precision)
            seconds += time.perf_counter() - began
            usable = [index for index, pair in zip(batch, loaded, strict=True) if pair is not None]
            for region, (_, truth), index in zip(regions, pairs, usable, strict=True):
                assert region.classes is not None
                assert region.class_confidence is not None
                detections.append(
                    metric.DetectedBoxes(
                        boxes=region.boxes,
                        classes=region.classes,
                        scores=region.class_confidence,
                        attributes=region.attributes,
                        attribute_scores=region.attribute_confidence,
                    )
                )
                truths.append(_build_true_boxes(truth, samples.classes(index)))
            if progress is not None:
                progress(batch[-1] + 1, len(samples))
    if not detections:
        samples.refuse()
    scores = metric.score(detections, truths)
    return DetectionEvaluation(
        scores=scores,
        ap={detector.config.class_names[number]: value for number, value in scores.ap.items()},
        images=len(detections),
        unreadable=tuple(samples.unreadable),
        images_per_second=len(detections) / max(seconds, 1e-9),
    )


def _name_outputs(config: DetectConfig, instances: Instances) -> DetectConfig:
    """The config with the annotations' names of classes and attributes."""
    if not instances.category_names:
        raise DataError("the annotations list no category: a detector needs at least one class.")
    detector = replace(config.detector, class_names=instances.category_names, attribute_names=instances.attribute_names)
    return replace(config, detector=detector)


def _record_start(folder: RunFolder, config: DetectConfig, images: Path, annotations: Path | None) -> None:
    folder.record(
        {
            "command": "detect train",
            "recipe": "detection",
            "task": None,
            "model": "detector",
            "config": configs.to_dict(config),
            "versions": runtime.versions(),
            "seed": config.train.seed,
            "images": str(images),
            "store": None,
            "annotations": None if annotations is None else str(annotations),
        },
        may_differ=("train.log_every", "train.log_seconds", "train.save_every", "train.max_seconds", "cache_gigabytes"),
    )


def _describe_task(instances: Instances, config: DetectConfig, device: torch.device) -> str:
    """What is trained on what, in one line."""
    boxes = sum(len(record.boxes) for record in instances.records)
    classes, attributes = len(instances.category_names), len(instances.attribute_names)
    return (
        f"{len(instances.records)} images, {boxes} boxes, {classes} classes, {attributes} attributes; "
        f"longer side {config.detector.long_side} pixels, on {device}"
    )


def _build_true_boxes(truth: Truth, classes: NDArray[np.int64]) -> metric.TrueBoxes:
    annotated = bool(truth.has_attributes.all()) and truth.attributes.shape[1] > 0
    return metric.TrueBoxes(
        boxes=truth.boxes,
        classes=classes,
        ignored=truth.classes == IGNORE,
        attributes=truth.attributes if annotated else None,
    )


def read_annotations(path: Path) -> Instances:
    """Objects of a COCO instances file, or of NLVR v1's SPLIT/SPLIT.json; the contents of the file decide which.

    Raises:
        DataError: the file is missing or damaged, or an NLVR file that is not named after its folder.
    """
    if not _is_nlvr(path):
        return read_instances(path)
    folder = path.absolute().parent
    if path.stem != folder.name:
        raise DataError(
            f"{path} is of NLVR's layout: its name must be that of its folder, SPLIT/SPLIT.json, with the pictures in "
            "SPLIT/images."
        )
    return nlvr_instances(folder.parent, path.stem)


def _is_nlvr(path: Path) -> bool:
    """Whether a file holds one NLVR statement per line; the first line of a COCO file is the whole file, or one
    brace."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = json.loads(file.readline(_LONGEST_LINE))
    except (OSError, ValueError):
        return False  # the reader of the file reports what is wrong with it
    return isinstance(first, dict) and "structured_rep" in first
