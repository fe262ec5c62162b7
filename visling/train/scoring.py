"""Scores of a model in training: how they are measured, and which are the best so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

from torch import nn

from visling.errors import ConfigError, nearest
from visling.train.config import TrainConfig
from visling.train.exchange import from_main
from visling.train.generators import capture_generators, restore_generators
from visling.train.state import State


def evaluate(model: nn.Module, validate: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """Scores in evaluation mode; what validation draws does not change the training after it."""
    generators = capture_generators()
    model.eval()
    try:
        return from_main({name: float(score) for name, score in validate().items()})
    finally:
        model.train()
        restore_generators(generators)


def improves(scores: Mapping[str, float], state: State, config: TrainConfig) -> bool:
    """Whether the scores are the best so far; records it in the state."""
    if config.metric not in scores:
        raise ConfigError(
            f"train.metric is {config.metric!r}, but validation reports no such score. {nearest(config.metric, scores)}"
        )
    score = scores[config.metric]
    better = is_better(score, state.best, config.direction)
    if better:
        state.best, state.best_step, state.stale = score, state.step, 0
    else:
        state.stale += 1
    return better


def is_better(score: float, best: float | None, direction: Literal["max", "min"]) -> bool:
    return not math.isnan(score) and (best is None or (score > best if direction == "max" else score < best))
