"""How much room on the disk a run needs."""

from __future__ import annotations

from torch import nn

from visling.train.config import TrainConfig


def estimate_space(model: nn.Module, config: TrainConfig, epochs: int | None) -> int:
    """Most bytes that a run's folder needs: the states that are kept, one that is being written before the oldest of
    them is deleted, the models that are kept, and one that is about to replace another.

    Args:
        epochs: that are still to come; None = unknown, counted as one.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    averages = config.average is not None
    models = 2 + averages + ("best" in config.keep and "last" in config.keep)
    if "epochs" in config.keep:
        models += 1 if epochs is None else epochs
    states = config.keep_states + 1
    return int(states * (weights + (2 + averages) * trained) + models * weights)
