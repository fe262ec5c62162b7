"""Detectors: presets of size, input and schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from visling import config as configs
from visling.errors import ConfigError, nearest
from visling.vision.detector import DetectorConfig


@dataclass(frozen=True, kw_only=True)
class DetectConfig:
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
        least = {
            "seconds": 0,
            "steps": 0,
            "batch_size": 0,
            "learning_rate": 0,
            "log_every": 0,
            "warmup_steps": -1,
            "save_every": -1,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value > bound:
                raise ConfigError(f"{name} is {value}; it must be {'at least 0' if bound < 0 else 'more than 0'}.")
        if not 0 <= self.flip_rate <= 1:
            raise ConfigError(f"flip_rate is {self.flip_rate}; it is a probability from 0 to 1.")


PRESETS: Mapping[str, DetectConfig] = {
    "scenes": DetectConfig(
        detector=DetectorConfig(
            channels=(32, 64, 96),
            blocks=(0, 1, 1),
            proposal_size=32,
            anchor_sizes=(16.0, 24.0, 36.0),
            proposals=48,
            max_regions=36,
            max_attributes=3,
        ),
    ),
    "nlvr": DetectConfig(
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
    "default": DetectConfig(
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


def preset(name: str) -> DetectConfig:
    """The preset of a name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in PRESETS:
        raise ConfigError(f"no detector preset {name!r}. {nearest(name, PRESETS)}")
    return PRESETS[name]


def detect_config(values: Sequence[str], name: str) -> DetectConfig:
    """A preset with dotted settings replaced, as the command line gives them."""
    return configs.override(preset(name), values)
