"""How the learning rate changes over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from visling.errors import ConfigError

ScheduleName = Literal[
    "constant", "warmup_constant", "warmup_linear", "warmup_cosine", "warmup_stable_decay", "cosine", "triangle"
]


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """When the learning rate falls because the validation metric has stopped improving.

    Source:
        ViLBERT, both releases (`--lr_scheduler automatic`), whose values are the defaults: torch's ReduceLROnPlateau
        with a relative threshold.
    """

    factor: float = 0.2
    """What the rate is multiplied by, again and again."""
    patience: int = 1
    """Validations in a row without an improvement that change nothing; the next one lowers the rate."""
    cooldown: int = 1
    """Validations after a fall of the rate that do not count, whatever they say."""
    threshold: float = 0.001
    """An improvement is a metric above best x (1 + threshold) where higher is better, below best x (1 - threshold)
    where lower is better."""

    def __post_init__(self) -> None:
        if not 0 < self.factor < 1:
            raise ConfigError(f"plateau.factor must lie between 0 and 1; found {self.factor}.")
        if self.patience < 0 or self.cooldown < 0 or self.threshold < 0:
            raise ConfigError(
                "plateau.patience, plateau.cooldown and plateau.threshold must be 0 or more; found "
                f"{self.patience}, {self.cooldown}, {self.threshold}."
            )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Factor of the peak learning rate at each update."""

    name: ScheduleName
    total: int | None
    """Updates of the whole run; None = not known, the run is bounded by time."""
    warmup: float
    """Share of the run spent warming up."""
    warmup_steps: int = 0
    """Updates over which cosine warms up."""
    evaluate: Literal["before", "after"] = "before"
    decay: float = 0.3
    """Share of the run in which warmup_stable_decay falls."""

    def factor(self, done: int, share: float | None = None) -> float:
        """Factor of the next update when `done` updates have been made.

        Args:
            share: of the time of a run without a `total` that has passed.
        Source:
            warmup_linear, warmup_constant: BertAdam, x / w, then (1 - x) / (1 - w) or 1. VL-BERT's triangle is the same
                line read one update later.
            warmup_cosine: ours, half a cosine from the end of the warm-up (BertAdam's own jumps there).
            cosine: ours, half a cosine over the whole run down to a fiftieth, times a linear warm-up that is never 0.
            warmup_stable_decay: the peak rate until the last part of the run, then linear to 0.
        """
        if self.name == "constant":
            return 1.0
        x = share if self.total is None else (done + (self.evaluate == "after")) / self.total
        assert x is not None, "a schedule without a total is read by the share of the time"
        if self.name == "cosine":
            warm = min(1.0, (done + 1) / (self.warmup_steps + 1))
            return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(x, 1.0))))
        if x < self.warmup:
            return x / self.warmup
        if self.name == "warmup_constant":
            return 1.0
        if x >= 1:
            return 0.0
        if self.name == "warmup_cosine":
            return 0.5 * (1 + math.cos(math.pi * (x - self.warmup) / (1 - self.warmup)))
        if self.name == "warmup_stable_decay":
            return min(1.0, (1 - x) / self.decay)
        return (x - 1) / (self.warmup - 1)
