"""What a detector's training starts from: a trained detector, whose classes may be others, or a plain ResNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from visling.checkpoints import files
from visling.checkpoints.keymap import KeyMap
from visling.errors import CheckpointError, ConfigError
from visling.vision.backbones import ResNetBackbone
from visling.vision.detector import Detector
from visling.vision.detector_config import DetectorConfig
from visling.vision.detectors import load_detector
from visling.vision.resnet import PLAIN_NETWORK
from visling.vision.trainable import TrainableDetector
from visling.vision.visual_genome import VisualGenomeDetector
from visling.vision.visual_genome_config import VisualGenomeConfig

_NAMES_SHOWN = 6
"""Names in a row of a printed report."""


@dataclass(frozen=True, kw_only=True)
class StartReport:
    """What became of the weights that a training starts from. Prints as a table."""

    source: str
    """What was read."""
    taken: tuple[str, ...]
    """Tensors that were taken whole."""
    rows: tuple[str, ...]
    """Classes and attributes of the new detector whose rows were taken from the source's heads."""
    new_rows: tuple[str, ...]
    """Classes and attributes that the source does not know: their rows are random."""
    random: tuple[str, ...]
    """Tensors that keep their random values, because the source lacks them or has another shape."""
    dropped: tuple[str, ...]
    """Tensors, classes and attributes of the source that the new detector has no place for."""

    def __str__(self) -> str:
        rows = [
            ("taken", "tensors", self.taken),
            ("taken", "classes and attributes of the same name", self.rows),
            ("random", "classes and attributes that it does not know", self.new_rows),
            ("random", "tensors", self.random),
            ("dropped", "", self.dropped),
        ]
        lines = [f"starts from {self.source}"]
        for word, kind, names in rows:
            if names:
                what = f" {kind}" if kind else ""
                shown = "" if kind == "tensors" and word == "taken" else f": {_list_names(names)}"
                lines.append(f"  {word:<8}{len(names):>5}{what}{shown}")
        return "\n".join(lines)


def build_detector(config: DetectorConfig | VisualGenomeConfig) -> TrainableDetector:
    """A detector with random weights."""
    return Detector(config) if isinstance(config, DetectorConfig) else VisualGenomeDetector(config)


def read_trainable(folder: Path) -> TrainableDetector:
    """The detector of a folder, if it can be trained.

    Raises:
        CheckpointError: the folder is no detector, or holds one without a training loss.
    """
    detector = load_detector(folder)
    if not isinstance(detector, TrainableDetector):
        raise CheckpointError(
            f"{folder} holds a detector that finds regions, but cannot be trained here: {type(detector).__name__}. "
            "Start from one that `visling detect train` or `visling detect convert` wrote, or from a ResNet with "
            "--backbone."
        )
    return detector


def start_from_detector(detector: TrainableDetector, trained: TrainableDetector, source: str) -> StartReport:
    """Give a detector the weights of a trained one: every tensor of equal shape; of heads, which have a row or several
    for each class or attribute, the rows of the names that both have.

    Args:
        source: what `trained` was read from.
    """
    own, theirs = detector.state_dict(), trained.state_dict()
    own_rows, their_rows = detector.row_names(), trained.row_names()
    # A layer whose matrix does not fit does not take the biases either.
    unfit = {_layer_of(name) for name in own_rows if not _have_like_rows(name, own, theirs, own_rows, their_rows)}
    taken, random = [], []
    matched: dict[str, None] = {}
    with torch.no_grad():
        for name, tensor in own.items():
            other = theirs.get(name)
            if name in own_rows and _layer_of(name) not in unfit:
                shared = _copy_rows(tensor, theirs[name], own_rows[name], their_rows[name])
                matched |= dict.fromkeys(shared)
                random += [] if shared else [name]
            elif name not in own_rows and other is not None and other.shape == tensor.shape:
                tensor.copy_(other)
                taken.append(name)
            else:
                random.append(name)
    names = dict.fromkeys(name for rows in own_rows.values() for name in rows)
    left = dict.fromkeys(name for rows in their_rows.values() for name in rows if name not in matched)
    partly = {name for name in own_rows if name in theirs and name not in random}
    return StartReport(
        source=source,
        taken=tuple(taken),
        rows=tuple(name for name in names if name in matched and name),
        new_rows=tuple(name for name in names if name not in matched and name),
        random=tuple(random),
        dropped=(*(name for name in theirs if name not in taken and name not in partly), *filter(None, left)),
    )


def start_from_resnet(detector: TrainableDetector, file: Path) -> StartReport:
    """Give the backbone of a detector the weights of a plain ResNet under torchvision's names; its layer that
    classifies whole images is left out.

    Raises:
        CheckpointError: no such file, or not a network of this size.
        ConfigError: the detector's backbone is no ResNet.
    """
    backbone = detector.backbone if isinstance(detector, Detector) else None
    if not isinstance(backbone, ResNetBackbone):
        raise ConfigError("--backbone fills a ResNet, which this detector's backbone is not. Use --preset resnet50.")
    try:
        coverage = KeyMap(PLAIN_NETWORK).load(files.read(file), {"extractor": backbone})
    except CheckpointError as error:
        raise CheckpointError(
            f"{file} does not fill the backbone, read as a plain ResNet under torchvision's names: {error} Give a file "
            "of the preset's depth, or change detector.resnet.blocks."
        ) from error
    taken = tuple(f"backbone.{name.partition('.')[2]}" for name in coverage.mapped)
    return StartReport(
        source=str(file),
        taken=taken,
        rows=(),
        new_rows=(),
        random=tuple(name for name, _ in detector.named_parameters() if name not in taken),
        dropped=tuple(coverage.dropped),
    )


def _layer_of(name: str) -> str:
    return name.rpartition(".")[0]


def _have_like_rows(
    name: str,
    own: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    own_rows: Mapping[str, Sequence[str]],
    their_rows: Mapping[str, Sequence[str]],
) -> bool:
    """Whether the rows of a tensor are as many for each name, and as long, in both detectors."""
    if name not in theirs or name not in their_rows:
        return False
    count = len(own[name]) // len(own_rows[name])
    return own[name].shape[1:] == theirs[name].shape[1:] and len(theirs[name]) == count * len(their_rows[name])


def _copy_rows(own: Tensor, other: Tensor, names: Sequence[str], their_names: Sequence[str]) -> list[str]:
    """Copy the rows of the names that both have; returns these names. A name has as many rows as it needs."""
    count = len(own) // len(names)
    places = {name: place for place, name in enumerate(their_names)}
    shared = [name for name in names if name in places]
    for at, name in enumerate(names):
        if name in places:
            there = places[name] * count
            own[at * count : (at + 1) * count] = other[there : there + count]
    return shared


def _list_names(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
