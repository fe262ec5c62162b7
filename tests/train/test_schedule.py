"""Shapes of the learning rate, drops, and the plateau against torch's."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import nn

from visling.errors import ConfigError
from visling.train.optim import OptimConfig, apply_schedule, build_optimizer, build_schedule
from visling.train.schedule import Plateau, PlateauState


def test_schedule_shapes() -> None:
    def factors(name: Any, **settings: Any) -> list[float]:
        schedule = build_schedule(OptimConfig(schedule=name, **settings), 8)
        return [round(schedule.factor(done), 4) for done in range(9)]

    assert factors("constant") == [1.0] * 9
    assert factors("warmup_constant", warmup_share=0.25) == [0.0, 0.5, *[1.0] * 7]
    assert factors("warmup_linear", warmup_steps=2) == [0.0, 0.5, 1.0, 0.8333, 0.6667, 0.5, 0.3333, 0.1667, 0.0]
    assert factors("triangle", warmup_steps=3, evaluate="after") == [0.3333, 0.6667, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0]
    assert factors("warmup_cosine", warmup_steps=2) == [0.0, 0.5, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067, 0.0]
    assert factors("warmup_stable_decay", warmup_steps=2, decay_share=0.5) == [
        0.0,
        0.5,
        1.0,
        1.0,
        1.0,
        0.75,
        0.5,
        0.25,
        0.0,
    ]
    assert factors("warmup_linear", warmup_share=1.0) == [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.0]


def test_cosine_is_a_warm_up_times_half_a_cosine_down_to_a_fiftieth() -> None:
    schedule = build_schedule(OptimConfig(schedule="cosine", warmup_steps=3), 8)
    whole = [0.02 + 0.49 * (1 + math.cos(math.pi * done / 8)) for done in range(9)]
    expected = [whole[0] / 4, whole[1] / 2, whole[2] * 3 / 4, *whole[3:]]
    assert [schedule.factor(done) for done in range(9)] == pytest.approx(expected)
    assert schedule.factor(20) == pytest.approx(0.02)


def test_a_schedule_without_a_total_follows_the_share_of_the_time() -> None:
    def factors(name: Any, **settings: Any) -> list[float]:
        schedule = build_schedule(OptimConfig(schedule=name, **settings), None)
        return [round(schedule.factor(100, share), 4) for share in (0.0, 0.125, 0.5, 1.0)]

    assert factors("constant") == [1.0, 1.0, 1.0, 1.0]
    assert factors("warmup_linear", warmup_share=0.25) == [0.0, 0.5, 0.6667, 0.0]
    assert factors("cosine", warmup_steps=0) == [1.0, 0.9627, 0.51, 0.02]
    with pytest.raises(ConfigError, match=r"5 should warm up\. Use optim\.warmup_share"):
        build_schedule(OptimConfig(schedule="warmup_linear", warmup_steps=5), None)
    with pytest.raises(ConfigError, match=r"bert_adam reads its schedule .* Use train\.max_steps"):
        build_schedule(OptimConfig(name="bert_adam"), None)


def test_cosine_restarts_return_to_the_peak() -> None:
    def factors(**settings: Any) -> list[float]:
        schedule = build_schedule(OptimConfig(schedule="warmup_cosine", warmup_steps=2, **settings), 10)
        return [round(schedule.factor(done), 4) for done in range(11)]

    assert factors(restarts=1) == [0.0, 0.5, 1.0, 0.8536, 0.5, 0.1464, 1.0, 0.8536, 0.5, 0.1464, 0.0]
    whole = [round(0.5 * (1 + math.cos(math.pi * past / 10)), 4) for past in range(8)]
    assert factors(cosine_period="run") == [0.0, 0.5, *whole, 0.0]
    assert factors(cosine_period="run", restarts=1)[2:9] == [1.0, 0.9045, 0.6545, 0.3455, 0.0955, 1.0, 0.9045]


def test_a_period_of_the_run_equals_torch_restarts() -> None:
    """As ViLBERT's release steps them: once for every update past the warm-up."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    official = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=20)
    schedule = build_schedule(
        OptimConfig(schedule="warmup_cosine", warmup_share=0.12, restarts=1, cosine_period="run"), 40
    )
    warmup = 0.12 * 40
    for done in range(1, 40):
        optimizer.step()
        if done > warmup:
            official.step()
            assert schedule.factor(done) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_drops_multiply_any_schedule_and_are_read_by_the_run() -> None:
    """BertAdam reads the shape by each parameter's own count, but drops by that of the run."""
    config = OptimConfig(schedule="warmup_constant", warmup_steps=2, drop_epochs=(2.0, 2.5), drop_factor=0.5)
    schedule = build_schedule(config, 12, per_epoch=3)
    assert [schedule.drop(done) for done in range(12)] == [1.0] * 6 + [0.5] + [0.25] * 5
    read_after = build_schedule(OptimConfig(drop_epochs=(2.0,), evaluate="after"), 12, per_epoch=3)
    assert [read_after.drop(done) for done in range(4, 7)] == [1.0, 0.1, 0.1]

    net = nn.ModuleDict({"early": nn.Linear(1, 1, bias=False), "late": nn.Linear(1, 1, bias=False)})
    config = OptimConfig(
        name="bert_adam", lr=1.0, betas=(0.0, 0.0), eps=1e-30, weight_decay=0.0, clip="none",
        schedule="warmup_constant", warmup_steps=4, drop_epochs=(2.0,), drop_factor=0.5,
    )  # fmt: skip
    optimizer, schedule = build_optimizer(net, config, 12, per_epoch=3)
    moved = []
    for done in range(7):
        for name, parameter in net.named_parameters():
            parameter.data.zero_()
            parameter.grad = None if name == "late.weight" and done < 5 else torch.ones_like(parameter)
        assert apply_schedule(optimizer, schedule, done) == min(done / 4, 1) * (0.5 if done == 6 else 1)
        optimizer.step()
        moved.append([-float(parameter.detach()) for parameter in net.parameters()])
    assert [early for early, _ in moved] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 0.5])
    assert [late for _, late in moved] == pytest.approx([0.0] * 6 + [0.125])


@pytest.mark.parametrize("direction", ["max", "min"])
@pytest.mark.parametrize("plateau", [Plateau(), Plateau(patience=0, cooldown=0), Plateau(patience=2, threshold=0.1)])
def test_a_plateau_equals_that_of_torch(plateau: Plateau, direction: Literal["max", "min"]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    official = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode=direction,
        factor=plateau.factor,
        patience=plateau.patience,
        cooldown=plateau.cooldown,
        threshold=plateau.threshold,
        eps=0.0,
    )
    state, fallen = PlateauState(), 0
    torch.manual_seed(5)
    for metric in [math.nan, 0.5, *(0.5 + 0.05 * torch.randn(60, dtype=torch.float64)).tolist(), math.nan]:
        official.step(metric)
        fallen += state.add(metric, plateau, direction)
        assert state.level == optimizer.param_groups[0]["lr"]
    assert fallen > 5
    assert state.level == pytest.approx(plateau.factor**fallen)
