"""The small detector on scenes, on NLVR pictures, or on any folder of images with COCO-style boxes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from visling import config as configs
from visling import runtime
from visling.data.annotations.instances import InstanceRecord, Instances, nlvr_instances, read_instances
from visling.errors import ConfigError, DataError, nearest
from visling.metrics import detection as metric
from visling.runtime import Precision
from visling.train.log import Log
from visling.train.state import RunFolder, State
from visling.types import IGNORE, Loss
from visling.vision.detector import Detector, DetectorConfig, Truth
from visling.vision.images import fit, read_image

_LONGEST_LINE = 1 << 20
"""Characters that are read of a file's first line; NLVR's lines have some thousands, COCO files of one line many millions."""

Picture = NDArray[np.uint8]
"""(H, W, 3) RGB pixels."""


@dataclass(frozen=True, kw_only=True)
class DetectionTraining:
    """How a detector is trained."""

    detector: DetectorConfig = field(default_factory=DetectorConfig)
    """Size and thresholds; the names of classes and attributes are taken from the annotations."""
    seconds: float = 75.0
    """Training time; the learning rate falls to nearly nothing over it. Reading annotations and saving do not count."""
    steps: int | None = None
    """Updates; takes the place of `seconds` and makes a run repeatable."""
    batch_size: int = 16
    """Images per update."""
    learning_rate: float = 3e-3
    """Highest rate of AdamW, reached after the warm-up."""
    warmup_steps: int = 30
    """Updates over which the rate rises linearly."""
    weight_decay: float = 0.01
    """Of matrices and kernels; biases and norms have none."""
    max_gradient_norm: float = 10.0
    """Longer gradients are scaled to this length."""
    flip_rate: float = 0.0
    """Probability that an image is mirrored left to right; leave at 0 where an attribute means a side."""
    cache_gigabytes: float = 4.0
    """Memory for decoded images; those that do not fit are decoded again every epoch."""
    log_every: int = 25
    """Updates between log lines."""
    save_every: float = 60.0
    """Seconds between states from which a killed run can go on."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        least = {"seconds": 0, "steps": 0, "batch_size": 0, "learning_rate": 0, "log_every": 0, "warmup_steps": -1, "save_every": -1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value > bound:
                raise ConfigError(f"{name} is {value}; it must be {'at least 0' if bound < 0 else 'more than 0'}.")
        if not 0 <= self.flip_rate <= 1:
            raise ConfigError(f"flip_rate is {self.flip_rate}; it is a probability from 0 to 1.")


PRESETS: Mapping[str, DetectionTraining] = {
    "scenes": DetectionTraining(
        detector=DetectorConfig(
            channels=(32, 64, 96), blocks=(0, 1, 1), proposal_size=32, anchor_sizes=(16.0, 24.0, 36.0), proposals=48, max_regions=36, max_attributes=3
        ),
    ),
    "nlvr": DetectionTraining(
        detector=DetectorConfig(
            long_side=400,
            channels=(32, 64),
            blocks=(0, 1),
            proposal_size=32,
            anchor_sizes=(10.0, 20.0, 30.0),
            candidates=256,
            proposals=64,
            max_regions=36,
            max_attributes=2,
        ),
        seconds=120.0,
        batch_size=8,
    ),
    "default": DetectionTraining(
        detector=DetectorConfig(
            long_side=320,
            stem_stride=2,
            channels=(32, 64, 128, 192),
            blocks=(0, 1, 2, 2),
            stride=8,
            anchor_sizes=(16.0, 32.0, 64.0, 128.0, 256.0),
            anchor_ratios=(0.5, 1.0, 2.0),
            proposal_size=128,
            feature_size=256,
            suppress_across_classes=False,
            anchor_samples=128,
            region_samples=64,
            candidates=512,
            proposals=100,
            max_regions=36,
        ),
        seconds=1800.0,
        batch_size=8,
        learning_rate=1e-3,
        warmup_steps=200,
        flip_rate=0.5,
    ),
}
"""scenes: 128 x 128 drawings; nlvr: 400 x 100 pictures of 10 to 30 pixel shapes; default: photographs."""


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
    training: DetectionTraining | str = "default",
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
    samples = _Samples(images, instances, sizes, cache_bytes=int(training.cache_gigabytes * 1e9))
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
        DataError: annotations or images cannot be used, or speak of classes or attributes that the detector does not know.
    """
    where = runtime.pick_device(device)
    detector = (Detector.load(detector) if isinstance(detector, Path) else detector).to(where).eval()
    instances = annotations if isinstance(annotations, Instances) else read_instances(annotations)
    instances = replace(instances, records=instances.records[:limit])
    samples = _Samples(images, instances, detector.config, cache_bytes=0)
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
        raise DataError(f"none of the {len(samples)} images in {images} can be read; the first: {samples.unreadable[0][1]}")
    scores = metric.score(found, truths)
    return DetectionEvaluation(
        scores=scores,
        ap={detector.config.class_names[number]: value for number, value in scores.ap.items()},
        images=len(found),
        unreadable=tuple(samples.unreadable),
        images_per_second=len(found) / max(seconds, 1e-9),
    )


def preset(name: str) -> DetectionTraining:
    """The preset of a name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in PRESETS:
        raise ConfigError(f"no detector preset {name!r}. {nearest(name, PRESETS)}")
    return PRESETS[name]


def _fit(
    detector: Detector,
    optimizer: torch.optim.Optimizer,
    samples: _Samples,
    training: DetectionTraining,
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


def _rate(training: DetectionTraining, step: int, share: float) -> float:
    """Learning rate: linear warm-up, then half a cosine down to a fiftieth."""
    warm = min(1.0, (step + 1) / (training.warmup_steps + 1))
    return training.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


def _optimizer(detector: Detector, training: DetectionTraining) -> torch.optim.Optimizer:
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


def _report(state: State, training: DetectionTraining, rate: float, log: Log, progress: Callable[[DetectionProgress], None] | None) -> None:
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


Batch = tuple[int, int, list[int]]
"""Epoch, number in the epoch, sample numbers."""


class _Samples:
    """Annotated images: read, scaled and kept in memory while there is room."""

    def __init__(self, folder: Path, instances: Instances, config: DetectorConfig, *, cache_bytes: int) -> None:
        self.folder, self.records, self.config = folder, instances.records, config
        self.unreadable: list[tuple[Path, str]] = []
        self._bad: set[int] = set()
        self._room = cache_bytes
        self._cache: dict[int, tuple[Picture, Truth]] = {}
        self._classes = {name: number for number, name in enumerate(config.class_names)}
        self._attributes = {name: number for number, name in enumerate(config.attribute_names)}

    def __len__(self) -> int:
        return len(self.records)

    def check(self) -> None:
        """Raise `DataError` unless there are images and all names are the detector's."""
        if not self.records:
            raise DataError("the annotations list no image: there is nothing to learn or to score.")
        if not any((self.folder / record.file_name).is_file() for record in self.records):
            raise DataError(f"none of the {len(self.records)} annotated images is in {self.folder}; the first should be {self.records[0].file_name}.")
        for record in self.records:
            for name in record.categories:
                if name not in self._classes:
                    raise DataError(f"image {record.id} has an object of class {name!r}, unknown to the detector. {nearest(name, self._classes)}")
            for name in (name for names in record.attributes for name in names or ()):
                if self._attributes and name not in self._attributes:
                    raise DataError(f"image {record.id} has attribute {name!r}, unknown to the detector. {nearest(name, self._attributes)}")

    def original(self, index: int) -> tuple[Picture, Truth] | None:
        """Pixels and objects of one image; None if it cannot be used, which is noted."""
        record = self.records[index]
        if index in self._bad:
            return None
        path = self.folder / record.file_name
        try:
            picture = read_image(path)
            size = (picture.shape[1], picture.shape[0])
            if record.size is not None and record.size != size:
                raise DataError(f"{path} is {size[0]} x {size[1]} pixels, but annotated as {record.size[0]} x {record.size[1]}.")
        except DataError as error:
            self._bad.add(index)
            self.unreadable.append((path, str(error)))
            return None
        return picture, self._truth(record)

    def classes(self, index: int) -> NDArray[np.int64]:
        """Class numbers of one image's objects, crowds included."""
        return np.array([self._classes[name] for name in self.records[index].categories], np.int64)

    def load(self, batch: Batch, seed: int, flip_rate: float) -> list[tuple[Picture, Truth]]:
        """The usable samples of a batch, scaled to the detector's input."""
        epoch, _, indices = batch
        loaded = []
        for index in indices:
            sample = self._scaled(index)
            if sample is not None:
                mirror = flip_rate > 0 and runtime.generator_for(seed, epoch, index).random() < flip_rate
                loaded.append(_mirrored(*sample) if mirror else sample)
        return loaded

    def batches(self, seed: int, state: State, training: DetectionTraining) -> Iterator[Batch]:
        """Batches without end, from where the state stands; images of similar shape come together, so that little is padded."""
        count = min(training.batch_size, len(self))
        shapes = np.array([1.0 if record.size is None else record.size[1] / record.size[0] for record in self.records])
        epoch, skip = state.epoch, state.batch
        while True:
            rng = runtime.generator_for(seed, epoch)
            order = rng.permutation(len(self))
            pool = 16 * count
            order = np.concatenate([part[shapes[part].argsort(kind="stable")] for part in np.split(order, range(pool, len(self), pool))])
            groups = [order[start : start + count].tolist() for start in range(0, len(self) - count + 1, count)]
            for number in range(skip, len(groups)):
                yield epoch, number, groups[number]
            epoch, skip = epoch + 1, 0
            if len(self._bad) == len(self):
                raise DataError(f"none of the {len(self)} images in {self.folder} can be read; the first: {self.unreadable[0][1]}")

    def _scaled(self, index: int) -> tuple[Picture, Truth] | None:
        if index in self._cache:
            return self._cache[index]
        sample = self.original(index)
        if sample is None:
            return None
        picture, truth = sample
        small = fit(picture, self.config.long_side)
        factor = np.array([small.shape[1] / picture.shape[1], small.shape[0] / picture.shape[0]] * 2, np.float32)
        sample = small, replace(truth, boxes=truth.boxes * factor)
        if small.nbytes <= self._room:
            self._room -= small.nbytes
            self._cache[index] = sample
        return sample

    def _truth(self, record: InstanceRecord) -> Truth:
        attributes = np.zeros((len(record.categories), len(self._attributes)), np.bool_)
        for row, names in enumerate(record.attributes):
            attributes[row, [self._attributes[name] for name in names or () if self._attributes]] = True
        numbers = np.array([self._classes[name] for name in record.categories], np.int64)
        return Truth(
            boxes=record.boxes,
            classes=np.where(np.array(record.crowd, np.bool_), IGNORE, numbers),
            attributes=attributes,
            has_attributes=np.array([names is not None for names in record.attributes], np.bool_),
        )


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


def _mirrored(picture: Picture, truth: Truth) -> tuple[Picture, Truth]:
    width = picture.shape[1]
    boxes = truth.boxes[:, [2, 1, 0, 3]] * np.array([-1, 1, -1, 1], np.float32) + np.array([width, 0, width, 0], np.float32)
    return np.ascontiguousarray(picture[:, ::-1]), replace(truth, boxes=boxes)


def _true_boxes(truth: Truth, classes: NDArray[np.int64]) -> metric.TrueBoxes:
    annotated = bool(truth.has_attributes.all()) and truth.attributes.shape[1] > 0
    return metric.TrueBoxes(boxes=truth.boxes, classes=classes, ignored=truth.classes == IGNORE, attributes=truth.attributes if annotated else None)


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
        raise DataError(f"{path} is of NLVR's layout: its name must be that of its folder, SPLIT/SPLIT.json, with the pictures in SPLIT/images.")
    return nlvr_instances(folder.parent, path.stem)


def _is_nlvr(path: Path) -> bool:
    """Whether a file holds one NLVR statement a line; of a COCO file the first line is all of it, or a lone brace."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = json.loads(file.readline(_LONGEST_LINE))
    except (OSError, ValueError):
        return False  # whoever reads the file says what is wrong with it
    return isinstance(first, dict) and "structured_rep" in first


def settings_from(values: Sequence[str], name: str) -> DetectionTraining:
    """A preset with dotted settings replaced, as the command line gives them."""
    return configs.override(preset(name), values)
