"""Training and scoring a detector on scenes, on NLVR's pictures, or on any folder of images with COCO-style boxes."""

from __future__ import annotations

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
from visling import damage, runtime
from visling.data.annotations.instances import Instances, nlvr_instances, read_instances
from visling.errors import ConfigError, DataError
from visling.metrics import detection as metric
from visling.recipes.detectors import DetectConfig
from visling.runs.detection_data import DetectionBatches, Samples, load_ahead
from visling.runs.setup import claim_run_folder, record_layout
from visling.runtime import Precision
from visling.train.config import MAY_CHANGE
from visling.train.engine import fit
from visling.train.exchange import from_main, gather
from visling.train.log import Log
from visling.train.loggers import check_loggers, open_loggers
from visling.train.restarts import was_restarted
from visling.train.state import RunFolder
from visling.types import IGNORE, RegionArray
from visling.vision.detector_config import DetectorConfig
from visling.vision.detector_start import build_detector, read_trainable, start_from_detector, start_from_resnet
from visling.vision.detectors import load_detector
from visling.vision.region_detector import RegionDetector
from visling.vision.trainable import TrainableDetector, Truth

_FEW_BOXES = 1000
"""Below this many boxes a run says what else can be done."""

_LONGEST_LINE = 1 << 20
"""Characters read of a file's first line; NLVR's lines have a few thousand, a COCO file on one line many millions."""


@dataclass(frozen=True, kw_only=True)
class TrainedDetector:
    """Result of training."""

    detector: TrainableDetector
    """In evaluation mode."""
    folder: Path
    """Run folder; `load_detector` takes it."""
    steps: int
    epochs: float
    """Passes over the images."""
    seconds: float
    """Time spent on the run."""
    stopped: str
    """Why training ended: finished, or max_seconds or terminated if it is to be resumed."""
    images: int
    """Images trained on."""
    unreadable: tuple[tuple[Path, str], ...]
    """Images left out, with the reason."""


@dataclass(frozen=True, kw_only=True)
class DetectionExample:
    """What was found in one image, next to what is in it."""

    image: Path
    truth: RegionArray
    """Annotated objects as regions without features."""
    found: RegionArray


@dataclass(frozen=True, kw_only=True)
class DetectionEvaluation:
    """Result of scoring."""

    detector: RegionDetector
    """What was scored."""
    scores: metric.DetectionScores
    ap: Mapping[str, float]
    """Average precision by class name, best first."""
    objects: Mapping[str, int]
    """Objects by class name, in the same order."""
    curve: metric.PrecisionRecall
    examples: tuple[DetectionExample, ...]
    """At even distances over the images; as many as were asked for."""
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
    init: Path | None = None,
    backbone: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    stream: TextIO | None = None,
    log_to: Sequence[str] = (),
) -> TrainedDetector:
    """Train a detector and save it in `out/model`; `out/last` holds what an interrupted run needs to resume exactly.

    Args:
        images: folder that the file names of the annotations are relative to.
        annotations: COCO instances JSON, or what a reader returned for another format.
        init: folder of a trained detector that training starts from; what fits is taken (`vision.detector_start`).
            Take its settings with `detect_config(..., start=read_trainable(init).config)`.
        backbone: weight file of the ResNet that the backbone starts from.
        resume: continue the unfinished run in `out`; the settings must be the same.
        stream: where progress is written.
        log_to: where losses and scores go in addition to `out/log.jsonl`: tensorboard, wandb, trackio.
    Raises:
        CheckpointError: `init` or `backbone` cannot be read or does not fit.
        ConfigError: unknown device, too few images for the number of processes, more frozen stages than there are, or
            a ResNet without weights to start from.
        DataError: annotations or images cannot be used.
        RunError: `out` is taken or cannot be resumed from, or training failed.
    """
    target = runtime.pick_device(device)
    instances = annotations if isinstance(annotations, Instances) else read_instances(annotations)
    config = _name_outputs(config, instances)
    _check_start(config, init, backbone)
    runtime.seed_everything(config.train.seed)
    detector = build_detector(config.detector)
    detector.freeze(config.frozen_stages)
    start = None
    # With the weights that it has reached
    resumed = (resume or was_restarted(out)) and from_main(RunFolder(out).has_last)
    if init is not None and not resumed:
        start = start_from_detector(detector, read_trainable(init), str(init))
    elif backbone is not None and not resumed:
        start = start_from_resnet(detector, backbone)
    detector.to(target)
    started_by = RunFolder(out).find_started_by() if resumed else runtime.world_size()
    samples = Samples(images, instances, detector, cache_bytes=int(config.cache_gigabytes * 1e9))
    samples.check()
    batches = DetectionBatches(
        samples,
        batch_size=config.batch_size,
        accumulation=config.train.accumulation,
        seed=config.train.seed,
        flip_rate=config.flip_rate,
        started_by=started_by,
    )
    check_loggers(log_to)
    with claim_run_folder(out, resume=resume) as folder:
        _record_start(folder, config, images, None if isinstance(annotations, Instances) else annotations)
        folder.record(
            {
                "parameters": sum(parameter.numel() for parameter in detector.parameters()),
                "init": None if init is None else str(init),
                "backbone": None if backbone is None else str(backbone),
            }
        )
        record_layout(folder, {"images": batches.batch_size}, batches.accumulation, started_by)
        if not runtime.is_main():  # weights are equal everywhere, the sampled anchors and regions are not
            runtime.seed_everything(config.train.seed + runtime.rank())

        loggers = open_loggers(log_to, folder, configs.to_dict(config))
        with Log(folder.log, stream=stream, loggers=loggers, unit="images") as log:
            if not resumed:
                log.event(_describe_task(instances, config, batches, target), step=0)
                if start is not None:
                    log.event(str(start), step=0)
                if warning := _warn_of_few_boxes(instances, started=start is not None):
                    log.event(warning, step=0)
            state = fit(
                detector,
                detector.losses_scaled,
                batches,
                config=replace(config.train, accumulation=batches.accumulation),
                log=log,
                run_folder=folder,
                save_model=detector.save,
                reseed=False,  # sampling continues the stream that the weights were drawn from
            )
            unreadable = dict(entry for share in gather(samples.unreadable) for entry in share)
            for path, reason in unreadable.items():
                log.event(f"left out {path}: {reason}", step=state.step)
            warmup = config.train.optim.warmup_steps or 0
            if state.stopped == "finished" and state.step <= warmup:
                log.event(
                    f"the run ended after {state.step} updates, before its learning rate had risen to its full height "
                    f"(update {warmup + 1}): the detector has learned next to nothing. Train longer with --steps.",
                    step=state.step,
                )
    if not state.unfinished:
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
    detector: RegionDetector | Path,
    images: Path,
    annotations: Path | Instances,
    *,
    batch_size: int = 32,
    device: str = "auto",
    precision: Precision = "fp32",
    limit: int | None = None,
    examples: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> DetectionEvaluation:
    """Score a detector, or the folder of one, on annotated images.

    Args:
        limit: score only the first images.
        examples: of how many images the result keeps what was found.
        progress: called with (images done, images in all).
    Raises:
        CheckpointError: the folder is not a detector.
        DataError: annotations or images cannot be used, or have classes or attributes that the detector does not know.
    """
    target = runtime.pick_device(device)
    detector = (load_detector(detector) if isinstance(detector, Path) else detector).to(target).eval()
    instances = annotations if isinstance(annotations, Instances) else read_instances(annotations)
    instances = replace(instances, records=instances.records[:limit])
    samples = Samples(images, instances, detector, cache_bytes=0)
    samples.check()
    detections: list[metric.DetectedBoxes] = []
    truths: list[metric.TrueBoxes] = []
    kept: list[DetectionExample] = []
    shown = {round((place + 0.5) * len(samples) / examples - 0.5) for place in range(examples)}
    seconds = 0.0
    with ThreadPoolExecutor(2) as pool:
        batches = [range(start, min(start + batch_size, len(samples))) for start in range(0, len(samples), batch_size)]
        for batch, loaded in load_ahead(pool, batches, lambda batch: [samples.original(index) for index in batch]):
            usable = [(index, *pair) for index, pair in zip(batch, loaded, strict=True) if pair is not None]
            began = time.perf_counter()
            regions = detector.detect([picture for _, picture, _ in usable], precision=precision)
            seconds += time.perf_counter() - began
            for region, (index, _, truth) in zip(regions, usable, strict=True):
                detections.append(_build_detected_boxes(region))
                truths.append(_build_true_boxes(truth, samples.classes(index)))
                if index in shown:
                    file = samples.folder / samples.records[index].file_name
                    kept.append(DetectionExample(image=file, truth=_build_regions(truth, region.size), found=region))
            if progress is not None:
                progress(batch[-1] + 1, len(samples))
    if not detections:
        samples.refuse()
    scores = metric.score(detections, truths)
    ranked = sorted(scores.ap, key=lambda number: (-scores.ap[number], detector.class_names[number]))
    return DetectionEvaluation(
        detector=detector,
        scores=scores,
        ap={detector.class_names[number]: scores.ap[number] for number in ranked},
        objects={detector.class_names[number]: scores.objects_by_class[number] for number in ranked},
        curve=metric.precision_recall(detections, truths),
        examples=tuple(kept),
        images=len(detections),
        unreadable=tuple(samples.unreadable),
        images_per_second=len(detections) / max(seconds, 1e-9),
    )


def _check_start(config: DetectConfig, init: Path | None, backbone: Path | None) -> None:
    if init is not None and backbone is not None:
        raise ConfigError(
            f"training starts from a detector ({init}), which has a backbone, or from a backbone ({backbone}): give "
            "--init or --backbone."
        )
    on_resnet = not isinstance(config.detector, DetectorConfig) or config.detector.resnet is not None
    if on_resnet and init is None and backbone is None:
        raise ConfigError(
            "a ResNet with frozen norms learns nothing from random weights: name torchvision's file with --backbone, "
            "a detector that has one with --init, or use --preset default, which trains a small network from scratch."
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
        may_differ=(*MAY_CHANGE, "cache_gigabytes"),
    )


def _describe_task(instances: Instances, config: DetectConfig, batches: DetectionBatches, device: torch.device) -> str:
    """What is trained on what, in one line."""
    boxes = sum(len(record.boxes) for record in instances.records)
    occurring = {name for record in instances.records for name in record.categories}
    absent = len(instances.category_names) - len(occurring)
    return (
        f"{_count(len(instances.records), 'image')}, {_count(boxes, 'box', 'boxes')} of "
        f"{_count(len(instances.category_names), 'class', 'classes')}{f' ({absent} without any)' if absent else ''}, "
        f"{_count(len(instances.attribute_names), 'attribute')}; longer side up to {config.detector.long_side} pixels; "
        f"{_describe_length(config, batches)}, on {device}"
    )


def _describe_length(config: DetectConfig, batches: DetectionBatches) -> str:
    train = config.train
    images = _count(batches.global_size, "image")
    if train.max_steps is None and train.seconds is not None:
        return f"{train.seconds:.0f} s of updates with {images} each"
    return (
        f"{_count(train.max_steps or train.epochs * len(batches) // batches.accumulation, 'update')} with {images} each"
    )


def _count(number: int, name: str, several: str = "") -> str:
    return f"{number:,} {name if number == 1 else several or f'{name}s'}"


def _warn_of_few_boxes(instances: Instances, *, started: bool) -> str:
    """What to do if there are too few boxes to learn photographs from; empty if there are enough."""
    boxes = sum(len(record.boxes) for record in instances.records)
    if boxes >= _FEW_BOXES:
        return ""
    more = "" if started else "start from a detector of photographs with --init, "
    return (
        f"{_count(boxes, 'box', 'boxes')} are few: a detector of photographs needs thousands. Annotate more, {more}"
        "take regions from a released detector (`visling detect convert`), or released features (`visling regions "
        "convert`); docs/detectors/own.md says more."
    )


def _build_detected_boxes(regions: RegionArray) -> metric.DetectedBoxes:
    assert regions.classes is not None
    assert regions.class_confidence is not None
    return metric.DetectedBoxes(
        boxes=regions.boxes,
        classes=regions.classes,
        scores=regions.class_confidence,
        attributes=regions.attributes,
        attribute_scores=regions.attribute_confidence,
    )


def _build_regions(truth: Truth, size: tuple[int, int]) -> RegionArray:
    """Annotated objects as regions without features, crowds left out, to be drawn."""
    counted = truth.classes != IGNORE
    most = int(truth.attributes[counted].sum(1).max(initial=0))
    # The attributes that hold come first; the rest of a row is -1.
    order = np.argsort(~truth.attributes[counted], axis=1, kind="stable")[:, :most]
    held = np.take_along_axis(truth.attributes[counted], order, axis=1)
    return RegionArray(
        features=np.zeros((int(counted.sum()), 0), np.float32),
        boxes=truth.boxes[counted],
        size=size,
        classes=truth.classes[counted],
        attributes=np.where(held, order, -1) if most else None,
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
            first = damage.parse_json(file.readline(_LONGEST_LINE))
    except (OSError, ValueError):
        return False  # the reader of the file reports what is wrong with it
    return isinstance(first, dict) and "structured_rep" in first
