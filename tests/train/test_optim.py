"""Parameter groups, clipping, schedules, and the fast updates against one-parameter-at-a-time ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from visling import config as configs
from visling.errors import ConfigError
from visling.train.optim import (
    BertAdam,
    OptimConfig,
    ReleaseAdamW,
    apply_schedule,
    build_optimizer,
    clip_each,
    clip_gradients,
    parameter_groups,
)
from visling.train.schedule import Plateau, Schedule


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(3, 4)
        self.LayerNorm = nn.LayerNorm(4)
        self.pooler = nn.Linear(4, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def names(groups: list[dict[str, Any]]) -> dict[float, list[str]]:
    return {group["weight_decay"]: group["names"] for group in groups}


def test_groups_by_name() -> None:
    found = names(parameter_groups(Net(), OptimConfig(weight_decay=0.1, exclude=("pooler",))))
    assert found == {0.1: ["dense.weight"], 0.0: ["dense.bias", "LayerNorm.weight", "LayerNorm.bias"]}
    everything = names(parameter_groups(Net(), OptimConfig(weight_decay=0.1, no_decay=())))
    assert everything == {
        0.1: ["dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias", "pooler.weight", "pooler.bias"]
    }


def test_vectors_need_no_name_to_stay_undecayed() -> None:
    everything = names(parameter_groups(Net(), OptimConfig(weight_decay=0.1, no_decay=(), decay_vectors=False)))
    assert everything == {
        0.1: ["dense.weight", "pooler.weight"],
        0.0: ["dense.bias", "LayerNorm.weight", "LayerNorm.bias", "pooler.bias"],
    }


def test_an_excluded_name_must_exist_and_something_must_be_left() -> None:
    with pytest.raises(ConfigError, match="'poolr'"):
        parameter_groups(Net(), OptimConfig(exclude=("poolr",)))
    with pytest.raises(ConfigError, match="no parameter left"):
        parameter_groups(Net().requires_grad_(False), OptimConfig())


def test_exceptions_and_swapped_decay() -> None:
    found = names(
        parameter_groups(
            Net(), OptimConfig(weight_decay=0.1, exclude=("pooler",), no_decay_except=("LayerNorm.weight",))
        )
    )
    assert found == {0.1: ["dense.weight", "LayerNorm.weight"], 0.0: ["dense.bias", "LayerNorm.bias"]}
    found = names(
        parameter_groups(
            Net(),
            OptimConfig(weight_decay=0.1, exclude=("pooler",), no_decay_except=("LayerNorm.weight",), swap_decay=True),
        )
    )
    assert found == {0.1: ["dense.bias", "LayerNorm.bias"], 0.0: ["dense.weight", "LayerNorm.weight"]}


def test_rates_by_name() -> None:
    config = OptimConfig(
        lr=0.5, rates={"dense.weight": 0.1, "dense": 0.5, "pooler": 2.0}, weight_decay=0.0, no_decay=()
    )
    groups = parameter_groups(Net(), config)
    assert [(group["lr"], group["names"]) for group in groups] == [
        (0.5, ["LayerNorm.weight", "LayerNorm.bias"]),  # the rate that is shown
        (0.05, ["dense.weight"]),
        (0.25, ["dense.bias"]),
        (1.0, ["pooler.weight", "pooler.bias"]),
    ]
    with pytest.raises(ConfigError, match=r"optim\.rates names 'dence'"):
        parameter_groups(Net(), OptimConfig(rates={"dence": 0.1}))


@pytest.mark.parametrize("name", ["adamw", "release_adamw", "bert_adam"])
def test_every_optimiser_keeps_the_ratio_of_rates(name: Any) -> None:
    net = Net()
    before = {parameter: value.detach().clone() for parameter, value in net.named_parameters()}
    config = OptimConfig(
        name=name,
        lr=0.01,
        rates={"dense": 0.1},
        weight_decay=0.0,
        schedule="warmup_linear",
        warmup_steps=2,
        clip="none",
    )
    optimizer, schedule = build_optimizer(net, config, 8)
    for done in range(3):
        assert apply_schedule(optimizer, schedule, done) == pytest.approx(0.01 * schedule.factor(done))
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    moved = {
        parameter: float((before[parameter] - value.detach()).mean()) for parameter, value in net.named_parameters()
    }
    assert moved["dense.weight"] == pytest.approx(0.1 * moved["pooler.weight"], rel=1e-3)
    assert moved["dense.weight"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": {"dense": -1.0}}, "rates"),
        ({"warmup_share": 500.0}, "warmup_steps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"lr": -1.0}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"schedule": "cosine"}, "set warmup_steps, 0 for none"),
        ({"momentum": 1.0}, "momentum"),
        ({"schedule": "warmup_cosine", "restarts": -1}, "restarts"),
        ({"restarts": 1}, 'belong to schedule "warmup_cosine"'),
        ({"cosine_period": "run"}, 'belong to schedule "warmup_cosine"'),
        ({"drop_epochs": (0.0,)}, "drop_epochs"),
        ({"drop_epochs": (18.0, 14.0)}, "drop_epochs"),
        ({"drop_factor": -0.1}, "drop_factor"),
    ],
)
def test_impossible_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**change)


@pytest.mark.parametrize("change", [{"factor": 1.0}, {"patience": -1}, {"cooldown": -1}, {"threshold": -0.1}])
def test_impossible_plateaus(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"plateau.*{next(iter(change))}"):
        Plateau(**change)


def test_config_survives_plain_values() -> None:
    config = OptimConfig(name="bert_adam", exclude=("pooler",), warmup_steps=3, drop_epochs=(14, 18), plateau=Plateau())
    assert configs.from_dict(OptimConfig, configs.to_dict(config)) == config


def reference_bert_adam(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, lr: float, decay: float, clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    if clip is not None:
        g = g * min(1.0, clip / (float(g.norm()) + 1e-6))
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    return p - lr * (m / (v.sqrt() + 1e-6) + decay * p), m, v


@pytest.mark.parametrize("clip", [None, 0.5])
def test_bert_adam_equals_one_parameter_at_a_time(clip: float | None) -> None:
    start = [torch.randn(4, 3), torch.randn(()), torch.randn(0), torch.randn(7)]
    parameters = [nn.Parameter(value.clone()) for value in start]
    optimizer = BertAdam(parameters, 0.1, weight_decay=0.01, max_grad_norm=clip)
    expected = [(value, torch.zeros_like(value), torch.zeros_like(value)) for value in start]
    for step in range(4):
        for at, parameter in enumerate(parameters):
            given = torch.randn_like(parameter) if (at + step) % 3 else None
            parameter.grad = None if given is None else given.clone()
            if given is not None:
                expected[at] = reference_bert_adam(
                    expected[at][0], given, *expected[at][1:], lr=0.1, decay=0.01, clip=clip
                )
        optimizer.step()
    for parameter, (value, _, _) in zip(parameters, expected, strict=True):
        assert_close(parameter.detach(), value, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("correction", [True, False])
def test_release_adamw_equals_its_formula(correction: bool) -> None:
    value, m, v = torch.randn(5), torch.zeros(5), torch.zeros(5)
    parameter = nn.Parameter(value.clone())
    optimizer = ReleaseAdamW([parameter], 0.1, eps=0.01, weight_decay=0.2, bias_correction=correction)
    for step in range(1, 4):
        g = torch.randn(5)
        parameter.grad = g.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        size = 0.1 * math.sqrt(1 - 0.999**step) / (1 - 0.9**step) if correction else 0.1
        value = value - size * m / (v.sqrt() + 0.01)
        value = value - 0.1 * 0.2 * value
        assert_close(parameter.detach(), value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [BertAdam, ReleaseAdamW])
def test_step_takes_a_closure(kind: type[BertAdam] | type[ReleaseAdamW]) -> None:
    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = kind([parameter], 0.1)

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 4.0
    assert float(parameter.detach()) < 2.0


def gradients() -> list[Tensor]:
    return [torch.full((4,), 3.0), torch.full((2,), 0.01)]


def clipped(config: OptimConfig) -> list[Tensor]:
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients()]
    for parameter, gradient in zip(parameters, gradients(), strict=True):
        parameter.grad = gradient
    clip_gradients(torch.optim.SGD(parameters), config)
    return [p.grad for p in parameters if p.grad is not None]


def test_clip_modes() -> None:
    large, small = gradients()
    assert all(torch.equal(a, b) for a, b in zip(clipped(OptimConfig(clip="none")), gradients(), strict=True))
    each = clipped(OptimConfig(clip="per_tensor", clip_norm=1.0))
    assert_close(each, [large / (6 + 1e-6), small])
    total = math.sqrt(36 + 2e-4)
    both = clipped(OptimConfig(clip="global", clip_norm=1.0))
    assert_close(both, [large / total, small / total], atol=1e-6, rtol=1e-5)
    clip_each([], 1.0)


def test_a_global_norm_is_added_up_in_the_order_of_the_model() -> None:
    """Large and small gradients alternate, so that their order shows in the last bit of the norm."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(7, 7) for _ in range(40)))
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter) * 10 ** float(torch.rand(()) * 4)
    config = OptimConfig(weight_decay=0.1, decay_vectors=False, clip="global_in_order", clip_norm=1.0)
    optimizer, _ = build_optimizer(net, config, 10)
    assert [group["positions"] for group in optimizer.param_groups] == [[*range(0, 80, 2)], [*range(1, 80, 2)]]
    expected = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
    copies = [nn.Parameter(torch.zeros_like(gradient)) for gradient in expected]
    for copy, gradient in zip(copies, expected, strict=True):
        copy.grad = gradient
    nn.utils.clip_grad_norm_(copies, 1.0)
    clip_gradients(optimizer, config)
    assert all(
        torch.equal(p.grad, copy.grad)
        for p, copy in zip(net.parameters(), copies, strict=True)
        if p.grad is not None and copy.grad is not None
    )


def test_an_inner_clip_is_not_doubled() -> None:
    net = Net()
    optimizer, _ = build_optimizer(net, OptimConfig(name="bert_adam", clip="per_tensor"), 10)
    net.dense.weight.grad = torch.full_like(net.dense.weight, 9.0)
    clip_gradients(optimizer, OptimConfig(name="bert_adam", clip="per_tensor"))
    assert float(net.dense.weight.grad[0, 0]) == 9.0
    optimizer.step()
    assert float(net.dense.weight.grad.norm()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_repeats_its_updates_and_decays_the_gradient(momentum: float) -> None:
    net = Net()
    config = OptimConfig(name="sgd", lr=0.1, momentum=momentum, weight_decay=0.01, schedule="constant", no_decay=())
    optimizer, schedule = build_optimizer(net, config, 10)
    assert isinstance(optimizer, torch.optim.SGD)
    expected, velocity = net.dense.weight.detach().clone(), torch.zeros_like(net.dense.weight)
    for done in range(3):
        gradient = torch.full_like(expected, 0.5 - done)
        net.dense.weight.grad = gradient.clone()
        apply_schedule(optimizer, schedule, done)
        optimizer.step()
        velocity = momentum * velocity + gradient + 0.01 * expected
        expected = expected - 0.1 * velocity
    assert_close(net.dense.weight.detach(), expected)


def test_rates_are_set_from_the_peak_at_every_update() -> None:
    optimizer, schedule = build_optimizer(
        Net(), OptimConfig(name="adamw", lr=0.5, schedule="warmup_linear", warmup_steps=2), 8
    )
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [apply_schedule(optimizer, schedule, done) for done in (1, 1, 2, 7)] == pytest.approx(
        [0.25, 0.25, 0.5, 0.5 / 6]
    )
    assert {group["lr"] for group in optimizer.param_groups} == {0.5 * schedule.factor(7)}


def test_bert_adam_counts_each_parameter_by_itself() -> None:
    early, late = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    schedule = Schedule(name="warmup_linear", total=10, warmup=0.5)
    optimizer = BertAdam([early, late], 1.0, weight_decay=0.0, schedule=schedule.factor)
    early.grad = torch.ones(1)
    optimizer.step()
    late.grad = torch.ones(1)
    optimizer.step()
    assert float(late.detach()) == 1.0  # its own first update has rate 0
    assert float(early.detach()) != 1.0


@pytest.mark.parametrize("clip", ["global", "per_tensor"])
@pytest.mark.parametrize("name", ["adamw", "bert_adam"])
def test_known_norms_clip_as_measured_ones_and_are_used_once(name: Any, clip: Any) -> None:
    config = OptimConfig(name=name, clip=clip, clip_norm=0.1)
    trained = []
    for known in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer, _ = build_optimizer(model, config, 10)
        for _ in range(2):
            model(torch.randn(5, 4)).square().sum().backward()
            grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            clip_gradients(optimizer, config, {grad: grad.norm() for grad in grads} if known else None)
            optimizer.step()
            model.zero_grad()
        trained.append(model.weight)
    assert torch.equal(*trained)
