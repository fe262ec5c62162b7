"""The optimisers against trajectories recorded from the releases' own code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from visling.train.optim import BertAdam, OptimConfig, apply_schedule, build_optimizer, clip_gradients
from visling.train.schedule import Schedule

ATOL, RTOL = 1e-6, 1e-5  # stated by golden/bert_adam/config.json
SCENARIOS = ("pretrain", "finetune", "constant", "warmup_constant")


def schedule_of(given: dict[str, Any]) -> Schedule:
    return Schedule(
        name="constant" if given["t_total"] == -1 else given["schedule"], total=given["t_total"], warmup=given["warmup"]
    )


def compare_bert_adam(
    golden: Path, scenario: str, *, evaluate: Literal["before", "after"] = "before", moved: str = "", **factors: float
) -> None:
    """Everything recorded of a scenario; settings may be multiplied by factors, and one parameter may start
    elsewhere."""
    described = json.loads((golden / "bert_adam" / "config.json").read_text())
    given = {**described["defaults"], **described["scenarios"][scenario]}
    given |= {name: given[name] * factor for name, factor in factors.items()}
    tensors = {
        key.removeprefix(f"{scenario}."): value
        for key, value in load_file(golden / "bert_adam" / "bert_adam.safetensors").items()
        if key.startswith(f"{scenario}.")
    }
    parameters = {
        key.removeprefix("param.init."): nn.Parameter(value)
        for key, value in tensors.items()
        if key.startswith("param.init.")
    }
    if moved:
        parameters[moved].data.view(-1)[0] += 1e-3
    optimizer = BertAdam(
        parameters.values(),
        given["lr"],
        betas=(given["b1"], given["b2"]),
        eps=given["e"],
        weight_decay=given["weight_decay"],
        schedule=replace(schedule_of(given), evaluate=evaluate).factor,
    )
    compared = 0
    for step in range(1, given["steps"] + 1):
        for name, parameter in parameters.items():
            parameter.grad = tensors.get(f"grad.{step}.{name}")
        if given["clip"] is not None:
            total = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
            assert_close(total.reshape(1), tensors[f"total_norm.{step}"], atol=ATOL, rtol=RTOL)
            clip_gradients(optimizer, OptimConfig(clip="global", clip_norm=given["clip"]))
        optimizer.step()
        for name, parameter in parameters.items():
            if f"param.{step}.{name}" not in tensors:
                continue
            assert_close(
                parameter.detach(),
                tensors[f"param.{step}.{name}"],
                atol=ATOL,
                rtol=RTOL,
                msg=lambda m, n=name, s=step: f"{n} at {s}: {m}",
            )
            state = optimizer.state.get(parameter, {})
            assert (f"m.{step}.{name}" in tensors) == bool(state)
            if state:
                assert_close(state["mean"], tensors[f"m.{step}.{name}"], atol=ATOL, rtol=RTOL)
                assert_close(state["square"], tensors[f"v.{step}.{name}"], atol=ATOL, rtol=RTOL)
                compared += 1
    assert compared >= 12


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_bert_adam_follows_the_lxmert_release(golden: Path, scenario: str) -> None:
    compare_bert_adam(golden, scenario)


@pytest.mark.parametrize(
    ("scenario", "change"),
    [
        *(
            (scenario, change)
            for scenario in ("pretrain", "finetune")
            for change in (
                {"lr": 1.01},
                {"warmup": 1.5},
                {"t_total": 2},
                {"weight_decay": 0},
                {"clip": 0.5},
                {"evaluate": "after"},
            )
        ),
        *(("constant", change) for change in ({"lr": 1.01}, {"b1": 0.99}, {"b2": 0.999}, {"e": 100})),
        *(
            ("warmup_constant", change)
            for change in ({"warmup": 0.5}, {"weight_decay": 0.9}, {"b1": 0.99}, {"b2": 0.99}, {"e": 10000})
        ),
    ],
)
def test_the_lxmert_trajectory_notices_each_rule(golden: Path, scenario: str, change: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        compare_bert_adam(golden, scenario, **change)


@pytest.mark.parametrize("name", ["weight", "bias", "layernorm_weight", "zero_grad", "late_grad"])
def test_a_moved_first_value_is_noticed(golden: Path, name: str) -> None:
    with pytest.raises(AssertionError):
        compare_bert_adam(golden, "pretrain", moved=name)


def test_schedules_equal_the_recorded_factors(golden: Path) -> None:
    tables = json.loads((golden / "bert_adam" / "config.json").read_text())["factor_tables"]
    assert set(tables) == {"warmup_linear", "warmup_constant"}
    for name, rows in tables.items():
        for row in rows:
            schedule = Schedule(name=name, total=row["t_total"], warmup=row["warmup"])
            found = [schedule.factor(done) for done in range(len(row["factor_by_step_from_0"]))]
            assert found == pytest.approx(row["factor_by_step_from_0"], abs=1e-12)


def replay(module: nn.Module, config: OptimConfig, gradients: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Values after each step and learning rate at each, with prescribed gradients, through the same calls as the
    engine."""
    steps = len(next(iter(gradients.values())))
    optimizer, schedule = build_optimizer(module, config, steps)
    values: dict[str, list[Tensor]] = {name: [] for name in gradients}
    rates = []
    for step in range(steps):
        for name, parameter in module.named_parameters():
            parameter.grad = gradients[name][step].clone()
        rates.append(apply_schedule(optimizer, schedule, step))
        clip_gradients(optimizer, config)
        optimizer.step()
        for name, parameter in module.named_parameters():
            values[name].append(parameter.detach().clone())
    return {name: torch.stack(value) for name, value in values.items()}, torch.tensor(rates)


def read(folder: Path) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """A module with the recorded first values under the recorded names, gradients, and what the release made of
    them."""
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    module = nn.Module()
    for key, value in inputs.items():
        if key.startswith("init/"):
            *parents, leaf = key.removeprefix("init/").split(".")
            owner = module
            for parent in parents:
                if not hasattr(owner, parent):
                    owner.add_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
            owner.register_parameter(leaf, nn.Parameter(value))
    return (
        module,
        {key.removeprefix("grad/"): value for key, value in inputs.items() if key.startswith("grad/")},
        outputs,
    )


def test_bert_adam_follows_the_visualbert_release(golden: Path) -> None:
    module, gradients, expected = read(golden / "visualbert" / "bertadam")
    config = OptimConfig(
        name="bert_adam",
        lr=0.05,
        warmup_share=0.25,
        no_decay=("bias", "LayerNorm"),
        exclude=("pooler",),
        clip="per_tensor",
    )
    values, rates = replay(module, config, gradients)
    assert_close(rates, expected["lr"], atol=1e-8, rtol=RTOL)
    for name, value in values.items():
        assert_close(value, expected[f"trajectory/{name}"], atol=ATOL, rtol=RTOL, msg=lambda m, n=name: f"{n}: {m}")
    pooler = values["pooler.dense.weight"]
    assert torch.equal(pooler, pooler[:1].expand_as(pooler))


@pytest.mark.parametrize(
    "change", [{"clip": "global"}, {"no_decay": ()}, {"evaluate": "after"}, {"eps": 1e-3}, {"weight_decay": 0.0}]
)
def test_the_visualbert_trajectory_notices_each_rule(golden: Path, change: dict[str, Any]) -> None:
    module, gradients, expected = read(golden / "visualbert" / "bertadam")
    config = OptimConfig(
        **{"name": "bert_adam", "lr": 0.05, "warmup_share": 0.25, "exclude": ("pooler",), "clip": "per_tensor"} | change
    )
    values, _ = replay(module, config, gradients)
    assert not all(
        torch.allclose(values[name], expected[f"trajectory/{name}"], atol=ATOL, rtol=RTOL) for name in values
    )


def compare_release_adamw(golden: Path, **changes: Any) -> None:
    """Everything recorded of VL-BERT's optimiser."""
    module, gradients, expected = read(golden / "vlbert" / "adamw")
    settings = {
        "lr": 0.05,
        "weight_decay": 0.1,
        "no_decay": (),
        "schedule": "triangle",
        "warmup_steps": 3,
        "evaluate": "after",
    }
    values, rates = replay(module, OptimConfig(**{"name": "release_adamw"} | settings | changes), gradients)
    assert_close(rates, expected["lr"], atol=1e-8, rtol=RTOL)
    for name, value in values.items():
        assert_close(value, expected[f"trajectory/{name}"], atol=ATOL, rtol=RTOL, msg=lambda m, n=name: f"{n}: {m}")


def test_release_adamw_follows_the_vlbert_release(golden: Path) -> None:
    compare_release_adamw(golden)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "adamw"},  # decays before the step, and adds eps after the bias correction
        {"bias_correction": False},
        {"betas": (0.89, 0.999)},
        {"betas": (0.9, 0.998)},
        {"eps": 1e-4},
        {"weight_decay": 0.0},
        {"no_decay": ("b",)},
        {"clip": "none"},
        {"clip": "per_tensor"},
        {"evaluate": "before"},
        {"warmup_steps": 4},
        {"lr": 0.0501},
    ],
)
def test_the_vlbert_trajectory_notices_each_rule(golden: Path, change: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        compare_release_adamw(golden, **change)
