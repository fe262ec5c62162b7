"""The small detector on scenes, on NLVR pictures, or on any folder of images with COCO-style boxes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from visling import config as configs
from visling import runtime
from visling.data.annotations.instances import Instances, nlvr_instances, read_instances
from visling.errors import ConfigError, DataError
from visling.metrics import detection as metric
from visling.recipes.detectors import DetectConfig, preset
from visling.runs.detection_data import Samples
from visling.runtime import Precision
from visling.train.log import Log
from visling.train.state import RunFolder, State
from visling.types import IGNORE, Loss
from visling.vision.detector import Detector, Truth

_LONGEST_LINE = 1 << 20
"""Characters that are read of a file's first line; NLVR's lines have some thousands, COCO files of one line many
millions."""


@dataclass(frozen=True, kw_only=True)
class DetectionProgress:
    """What a training run says of itself from time to time."""

    step: int
    """Updates made."""
    share: float
    """Of the time or the steps, 0 to 1."""
    loss: float
    """Mean since the last report."""
    parts: Mapping[str, float]
    """Mean of each part of the loss since the last report."""
    learning_rate: float
    images_per_second: float
    seconds: float
    """Training time so far."""
    seconds_left: float
    """Training time to come, as the share so far suggests."""


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
    """Training time."""
    images: int
    """Images trained on."""
    unreadable: tuple[tuple[Path, str], ...]
    """Images left out, with the reason."""


@dataclass(frozen=True, kw_only=True)
class DetectionEvaluation:
    """Result of evaluation."""

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
    training: DetectConfig | str = "default",
    *,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "fp32",
    progress: Callable[[DetectionProgress], None] | None = None,
    resume: bool = False,
) -> TrainedDetector:
    """Train a detector and save it in `out/model`; `out/last` holds what a killed run needs to go on.

    Args:
        images: folder that the file names of the annotations are relative to.
        annotations: COCO instances JSON, or what a reader made of another format.
        training: settings, or the name of a preset.
        resume: go on with the unfinished run in `out`; the settings must be the same.
    Raises:
        ConfigError: unknown preset or device, or a negative seed.
        DataError: annotations or images cannot be used.
        RunError: `out` is taken, or cannot be resumed from.
    """
    if seed < 0:
        raise ConfigError(f"the seed is {seed}; it must be at least 0.")
    training = preset(training) if isinstance(training, str) else training
    where = runtime.pick_device(device)
    instances = annotations if isinstance(annotations, Instances) else read_instances(annotations)
    sizes = replace(training.detector, class_names=_class_names(instances), attribute_names=instances.attribute_names)
    training = replace(training, detector=sizes)
    samples = Samples(images, instances, sizes, cache_bytes=int(training.cache_gigabytes * 1e9))
    samples.check()
    folder = RunFolder.create(out, resume=resume)
    settings = {**configs.to_dict(training), "seed": seed, "precision": precision}
    folder.record(
        {
            "command": "detect train",
            "recipe": "detection",
            "task": None,
            "model": "detector",
            "config": settings,
            "versions": {"visling": version("visling"), "torch": torch.__version__},
            "seed": seed,
            "images": str(images),
            "store": None,
            "annotations": None if isinstance(annotations, Instances) else str(annotations),
        },
        may_differ=("log_every", "save_every", "cache_gigabytes"),
    )
    runtime.seed_everything(seed)
    detector = Detector(sizes).to(where).train()
    folder.record({"parameters": sum(parameter.numel() for parameter in detector.parameters())})
    optimizer = _optimizer(detector, training)
    state = State()
    if folder.has_last:
        state, _ = folder.load_last(detector, optimizer)
    with Log(folder.log) as log:
        log.start(state.step, training.steps or 0)
        _fit(detector, optimizer, samples, training, state, folder, log, seed, precision, progress)
        for path, reason in samples.unreadable:
            log.event(f"left out {path}: {reason}", step=state.step)
    detector.eval()
    folder.save_best(detector.save)
    folder.finish()
    seen = state.epoch + state.batch * training.batch_size / max(1, len(samples))
    return TrainedDetector(
        detector=detector,
        folder=out,
        steps=state.step,
        epochs=seen,
        seconds=state.elapsed,
        images=len(samples) - len(samples.unreadable),
        unreadable=tuple(samples.unreadable),
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
        limit: score the first images only.
        progress: called with (images done, images in all).
    Raises:
        CheckpointError: the folder is no detector.
        DataError: annotations or images cannot be used, or speak of classes or attributes that the detector does not
            know.
    """
    where = runtime.pick_device(device)
    detector = (Detector.load(detector) if isinstance(detector, Path) else detector).to(where).eval()
    instances = annotations if isinstance(annotations, Instances) else read_instances(annotations)
    instances = replace(instances, records=instances.records[:limit])
    samples = Samples(images, instances, detector.config, cache_bytes=0)
    samples.check()
    found: list[metric.DetectedBoxes] = []
    truths: list[metric.TrueBoxes] = []
    seconds = 0.0
    with ThreadPoolExecutor(2) as pool:
        batches = [range(start, min(start + batch_size, len(samples))) for start in range(0, len(samples), batch_size)]
        for batch, loaded in _ahead(pool, batches, lambda batch: [samples.original(index) for index in batch]):
            pairs = [pair for pair in loaded if pair is not None]
            began = time.perf_counter()
            regions = detector.detect([picture for picture, _ in pairs], precision=precision)
            seconds += time.perf_counter() - began
            usable = [index for index, pair in zip(batch, loaded, strict=True) if pair is not None]
            for region, (_, truth), index in zip(regions, pairs, usable, strict=True):
                assert region.classes is not None
                assert region.class_confidence is not None
                found.append(
                    metric.DetectedBoxes(
                        boxes=region.boxes,
                        classes=region.classes,
                        scores=region.class_confidence,
                        attributes=region.attributes,
                        attribute_scores=region.attribute_confidence,
                    )
                )
                truths.append(_true_boxes(truth, samples.classes(index)))
            if progress is not None:
                progress(batch[-1] + 1, len(samples))
    if not found:
        raise DataError(
            f"none of the {len(samples)} images in {images} can be read; the first: {samples.unreadable[0][1]}"
        )
    scores = metric.score(found, truths)
    return DetectionEvaluation(
        scores=scores,
        ap={detector.config.class_names[number]: value for number, value in scores.ap.items()},
        images=len(found),
        unreadable=tuple(samples.unreadable),
        images_per_second=len(found) / max(seconds, 1e-9),
    )


def _fit(
    detector: Detector,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    training: DetectConfig,
    state: State,
    folder: RunFolder,
    log: Log,
    seed: int,
    precision: Precision,
    progress: Callable[[DetectionProgress], None] | None,
) -> None:
    """The loop: next batch, loss, gradient, step, log, save."""
    last_save = time.perf_counter()
    began = last_save - state.elapsed
    paused = rate = 0.0  # paused: seconds spent saving
    with ThreadPoolExecutor(1) as pool:
        plan = samples.batches(seed, state, training)
        for (epoch, number, _), batch in _ahead(pool, plan, lambda item: samples.load(item, seed, training.flip_rate)):
            share = state.step / training.steps if training.steps else state.elapsed / training.seconds
            if share >= 1:
                break
            rate = _rate(training, state.step, share)
            for group in optimizer.param_groups:
                group["lr"] = rate
            if batch:
                with runtime.autocast(detector.device, precision):
                    loss = detector.losses([picture for picture, _ in batch], [truth for _, truth in batch])
                optimizer.zero_grad(set_to_none=True)
                loss.value.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(detector.parameters(), training.max_gradient_norm)
                optimizer.step()
                _add(state, loss, len(batch))
                state.step += 1
            state.epoch, state.batch = epoch, number + 1
            now = time.perf_counter()
            state.sums.seconds += now - began - paused - state.elapsed
            state.elapsed = now - began - paused
            if state.step % training.log_every == 0 and state.sums.steps:
                _report(state, training, rate, log, progress)
            if now - last_save >= training.save_every:
                folder.save_last(detector, optimizer, state, {})
                last_save = time.perf_counter()
                paused += last_save - now
    if state.sums.steps:
        _report(state, training, rate, log, progress)


def _rate(training: DetectConfig, step: int, share: float) -> float:
    """Learning rate: linear warm-up, then half a cosine down to a fiftieth."""
    warm = min(1.0, (step + 1) / (training.warmup_steps + 1))
    return training.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


def _optimizer(detector: Detector, training: DetectConfig) -> torch.optim.Optimizer:
    kernels = [parameter for parameter in detector.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in detector.parameters() if parameter.dim() <= 1]
    groups = [{"params": kernels, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.98), fused=True)


def _add(state: State, loss: Loss, images: int) -> None:
    """Add a step to the sums of the next log line."""
    sums = state.sums
    sums.loss += float(loss.value.detach())
    sums.steps += 1
    sums.examples += images
    for name, (amount, count) in loss.parts.items():
        part = sums.parts.setdefault(name, [0.0, 0.0])
        part[0] += float(amount)
        part[1] += float(count)


def _report(
    state: State, training: DetectConfig, rate: float, log: Log, progress: Callable[[DetectionProgress], None] | None
) -> None:
    sums = state.sums
    parts = {name: amount / max(count, 1.0) for name, (amount, count) in sums.parts.items()}
    speed = sums.examples / max(sums.seconds, 1e-9)
    log.train(
        step=state.step,
        epoch=state.epoch + 1,
        loss=sums.loss / sums.steps,
        parts=parts,
        lr=rate,
        examples_per_second=speed,
        seconds=state.elapsed,
        seconds_per_step=sums.seconds / sums.steps,
    )
    if progress is not None:
        share = min(1.0, state.step / training.steps if training.steps else state.elapsed / training.seconds)
        progress(
            DetectionProgress(
                step=state.step,
                share=share,
                loss=sums.loss / sums.steps,
                parts=parts,
                learning_rate=rate,
                images_per_second=speed,
                seconds=state.elapsed,
                seconds_left=state.elapsed * (1 - share) / share,
            )
        )
    state.sums = type(sums)()


def _ahead(pool: ThreadPoolExecutor, items: Any, load: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
    """Each item with what was loaded for it; a background thread loads the next ones meanwhile."""
    waiting: list[tuple[Any, Any]] = []
    for item in items:
        waiting.append((item, pool.submit(load, item)))
        if len(waiting) > 2:
            ready, future = waiting.pop(0)
            yield ready, future.result()
    for ready, future in waiting:
        yield ready, future.result()


def _true_boxes(truth: Truth, classes: NDArray[np.int64]) -> metric.TrueBoxes:
    annotated = bool(truth.has_attributes.all()) and truth.attributes.shape[1] > 0
    return metric.TrueBoxes(
        boxes=truth.boxes,
        classes=classes,
        ignored=truth.classes == IGNORE,
        attributes=truth.attributes if annotated else None,
    )


def _class_names(instances: Instances) -> tuple[str, ...]:
    if not instances.category_names:
        raise DataError("the annotations list no category: a detector needs at least one class.")
    return instances.category_names


def read_annotations(path: Path) -> Instances:
    """Objects of a COCO instances file, or of NLVR v1's SPLIT/SPLIT.json; told by what is in the file.

    Raises:
        DataError: the file is missing or damaged, or an NLVR file that is not called like its folder.
    """
    if not _is_nlvr(path):
        return read_instances(path)
    folder = path.absolute().parent
    if path.stem != folder.name:
        raise DataError(
            f"{path} is of NLVR's layout: its name must be that of its folder, SPLIT/SPLIT.json, with the pictures in SPLIT/images."
        )
    return nlvr_instances(folder.parent, path.stem)


def _is_nlvr(path: Path) -> bool:
    """Whether a file holds one NLVR statement a line; of a COCO file the first line is all of it, or a lone brace."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = json.loads(file.readline(_LONGEST_LINE))
    except (OSError, ValueError):
        return False  # whoever reads the file says what is wrong with it
    return isinstance(first, dict) and "structured_rep" in first
