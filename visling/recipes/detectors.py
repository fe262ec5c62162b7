"""Detectors: size, input and training for drawn scenes, for NLVR's pictures and for photographs.

Each preset trains for a number of updates, so that its result does not depend on what else the machine does;
`train.seconds` bounds a run by time instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from visling import config as configs
from visling.errors import ConfigError, nearest
from visling.train.config import TrainConfig
from visling.train.optim import OptimConfig
from visling.vision.detector_config import DetectorConfig, ResNetConfig
from visling.vision.visual_genome_config import VisualGenomeConfig


def _train(*, max_steps: int, lr: float = 3e-3, warmup_steps: int = 30) -> TrainConfig:
    """AdamW whose rate falls over the whole run, to a fiftieth of `lr`.

    What a detector learns from is drawn in the forward pass, so its counts are not known before it: micro-batches and
    processes have the same weight.
    """
    optim = OptimConfig(
        name="adamw",
        lr=lr,
        betas=(0.9, 0.98),
        eps=1e-8,
        weight_decay=0.01,
        no_decay=(),
        decay_vectors=False,
        clip="global_in_order",
        clip_norm=10.0,
        schedule="cosine",
        warmup_steps=warmup_steps,
    )
    return TrainConfig(
        max_steps=max_steps,
        normalise="micro_steps",
        optim=optim,
        log_every=25,
        log_seconds=10.0,
        save_every=250,
    )


@dataclass(frozen=True, kw_only=True)
class DetectConfig:
    """How a detector is built and trained."""

    detector: DetectorConfig | VisualGenomeConfig = field(default_factory=DetectorConfig)
    """Size and thresholds; the names of classes and attributes are taken from the annotations."""
    batch_size: int = 16
    """Images per update and process."""
    frozen_stages: int = 0
    """How many parts of the backbone keep the weights that they start from, counted from the pixels on: levels of the
    small backbone; the first convolution, then the stages, of a ResNet, whose norms are frozen anyway."""
    flip_rate: float = 0.0
    """Probability that an image is mirrored left to right; leave it at 0 where an attribute names a side."""
    cache_gigabytes: float = 4.0
    """Memory for decoded images; those that do not fit are decoded again in every epoch."""
    train: TrainConfig = field(default_factory=lambda: _train(max_steps=450))
    """How long and how."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more; found {self.batch_size}.")
        if self.frozen_stages < 0:
            raise ConfigError(f"frozen_stages must be 0 or more; found {self.frozen_stages}.")
        if not 0 <= self.flip_rate <= 1:
            raise ConfigError(f"flip_rate is a probability from 0 to 1; found {self.flip_rate}.")


def scenes() -> DetectConfig:
    """Drawings of 128 x 128 pixels. 450 updates take 86 s on two quiet cores
    (docs/results/runs/demo-visualbert.txt)."""
    detector = DetectorConfig(
        channels=(32, 64, 96),
        blocks=(0, 1, 1),
        proposal_size=32,
        anchor_sizes=(16.0, 24.0, 36.0),
        proposals=48,
        max_regions=36,
        max_attributes=3,
    )
    return DetectConfig(detector=detector)


def nlvr() -> DetectConfig:
    """NLVR's pictures of 400 x 100 pixels, with shapes of 10 to 30 pixels. 750 updates take two minutes on one quiet
    core (docs/results/nlvr.md: 500 in 80 s)."""
    detector = DetectorConfig(
        long_side=400,
        channels=(32, 64),
        blocks=(0, 1),
        proposal_size=32,
        anchor_sizes=(10.0, 20.0, 30.0),
        candidates=256,
        proposals=64,
        max_regions=36,
        max_attributes=2,
    )
    return DetectConfig(detector=detector, batch_size=8, train=_train(max_steps=750))


def photographs() -> DetectConfig:
    """Photographs, scaled to 320 pixels on their longer side. 900 updates take about half an hour on two
    quiet cores, estimated from four CPU seconds an update."""
    detector = DetectorConfig(
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
    )
    train = _train(max_steps=900, lr=1e-3, warmup_steps=200)
    return DetectConfig(detector=detector, batch_size=8, flip_rate=0.5, train=train)


def resnet50() -> DetectConfig:
    """Photographs, by a ResNet-50 that starts from a file (`--backbone`); its first convolution and first stage are
    frozen (detectron's `FREEZE_AT = 2`). Meant for a GPU; the numbers are a starting point and have not been tuned."""
    detector = DetectorConfig(
        long_side=640,
        resnet=ResNetConfig(),
        stride=16,
        anchor_sizes=(32.0, 64.0, 128.0, 256.0, 512.0),
        anchor_ratios=(0.5, 1.0, 2.0),
        proposal_size=512,
        feature_size=2048,
        suppress_across_classes=False,
        anchor_samples=256,
        region_samples=128,
        candidates=1000,
        proposals=300,
        max_regions=36,
    )
    train = _train(max_steps=5000, lr=1e-4, warmup_steps=500)
    return DetectConfig(detector=detector, batch_size=4, frozen_stages=2, flip_rate=0.5, train=train)


PRESETS: Mapping[str, Callable[[], DetectConfig]] = {
    "scenes": scenes,
    "nlvr": nlvr,
    "default": photographs,
    "resnet50": resnet50,
}


def detect_config(
    settings: Sequence[str], name: str, start: DetectorConfig | VisualGenomeConfig | None = None
) -> DetectConfig:
    """The preset of a name with dotted settings replaced, as on the command line.

    `train.seconds` takes the place of the preset's updates, unless `train.max_steps` is set as well.

    Args:
        start: config of the trained detector that training starts from, in place of the preset's. One on a ResNet is
            trained as `resnet50` is, where `name` is "default".
    Raises:
        ConfigError: there is no such preset or setting; names the nearest.
    """
    if name not in PRESETS:
        raise ConfigError(f"no detector preset {name!r}. {nearest(name, PRESETS)}")
    keys = {setting.partition("=")[0].strip() for setting in settings}
    unbound = ["train.max_steps=none"] if "train.seconds" in keys and "train.max_steps" not in keys else []
    on_resnet = isinstance(start, VisualGenomeConfig) or (start is not None and start.resnet is not None)
    preset = PRESETS["resnet50" if on_resnet and name == "default" else name]()
    if start is not None:
        preset = replace(preset, detector=start)
    return configs.override(preset, [*unbound, *settings])
