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
        with a relative threshold, without its refusal to lower a rate by less than 1e-8.
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


@dataclass(kw_only=True)
class PlateauState:
    """What a plateau has seen so far."""

    best: float | None = None
    """Last metric that counted as an improvement."""
    stale: int = 0
    """Validations in a row without an improvement."""
    cooldown: int = 0
    """Validations that are still not to count."""
    level: float = 1.0
    """What the rate is multiplied by now."""

    def add(self, metric: float, plateau: Plateau, direction: Literal["max", "min"]) -> bool:
        """Add a validation; returns whether the rate falls."""
        if self.best is None:
            better = math.isfinite(metric)
        elif direction == "max":
            better = metric > self.best * (1 + plateau.threshold)
        else:
            better = metric < self.best * (1 - plateau.threshold)
        if better:
            self.best, self.stale = metric, 0
        else:
            self.stale += 1
        if self.cooldown:
            self.cooldown, self.stale = self.cooldown - 1, 0
        if self.stale <= plateau.patience:
            return False
        self.level, self.stale, self.cooldown = self.level * plateau.factor, 0, plateau.cooldown
        return True


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Factors of the peak learning rate at each update: a shape, and drops by epoch."""

    name: ScheduleName
    total: int | None
    """Updates of the whole run; None = not known: the run is bounded by time or by stop-and-go."""
    warmup: float
    """Share of the run spent warming up."""
    warmup_steps: int = 0
    """Updates over which cosine warms up."""
    evaluate: Literal["before", "after"] = "before"
    decay: float = 0.3
    """Share of the run in which warmup_stable_decay falls."""
    restarts: int = 0
    """How often warmup_cosine returns to the peak."""
    cosine_period: Literal["rest", "run"] = "rest"
    drops: tuple[int, ...] = ()
    """Numbers of updates after each of which the rate is multiplied by `drop_factor`."""
    drop_factor: float = 0.1

    def factor(self, done: int, share: float | None = None) -> float:
        """The shape at the next update when `done` updates have been made.

        Args:
            share: of a run without a `total` that has passed.
        Source:
            warmup_linear, warmup_constant: BertAdam, x / w, then (1 - x) / (1 - w) or 1. VL-BERT's triangle is the same
                line read one update later.
            warmup_cosine: half a cosine from the end of the warm-up (BertAdam's own jumps there), as often as there are
                restarts and once more (pytorch_transformers, hard restarts). Period "run": torch's CosineAnnealingLR
                and CosineAnnealingWarmRestarts as ViLBERT's multi-task release steps them after its warm-up.
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
            return 0.5 * (1 + math.cos(math.pi * self._find_phase(x)))
        if self.name == "warmup_stable_decay":
            return min(1.0, (1 - x) / self.decay)
        return (x - 1) / (self.warmup - 1)

    def _find_phase(self, x: float) -> float:
        """Share of its half cosine that warmup_cosine has covered after a share `x` of the run."""
        if self.cosine_period == "rest":
            past = (x - self.warmup) / (1 - self.warmup)
        else:  # release: it counts whole updates from the last one of the warm-up
            past = x - (self.warmup if self.total is None else math.floor(self.warmup * self.total) / self.total)
        halves = past * (self.restarts + 1)
        return halves - math.floor(halves + 1e-9)  # the update of a restart begins the next one, whatever the rounding

    def drop(self, done: int) -> float:
        """Factor by which the drops have lowered the rate of the next update."""
        read = done + (self.evaluate == "after")
        return float(self.drop_factor ** sum(at <= read for at in self.drops))
