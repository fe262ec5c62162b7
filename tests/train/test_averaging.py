"""Averaged weights: what they are, how a run validates and keeps them, alone and with other processes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from visling.train.averaging import WeightAverage
from visling.train.engine import fit
from visling.train.log import Log, read
from visling.train.space import estimate_space
from visling.train.state import RunFolder, State


def train(toy: ModuleType, path: Path, validate: Any = "accuracy", **changes: Any) -> tuple[Any, State, list[Any]]:
    """A toy run, and the weights after each of its updates."""
    model, step = toy.make()
    after: list[dict[str, Tensor]] = [{name: p.detach().clone() for name, p in model.named_parameters()}]
    folder = RunFolder.create(path)
    with Log(folder.log) as log:
        state = fit(
            model,
            step,
            toy.Pairs(),
            config=toy.config(**{"average": 0.8, **changes}),
            log=log,
            validate=toy.accuracy(model) if validate == "accuracy" else validate,
            run_folder=folder,
            after_update=lambda: after.append({name: p.detach().clone() for name, p in model.named_parameters()}),
        )
    return model, state, after


def test_the_average_follows_every_update(toy: ModuleType, tmp_path: Path) -> None:
    model, _, after = train(toy, tmp_path / "run", validate=None)
    average = {name: value.double() for name, value in after[0].items()}
    for weights in after[1:]:
        average = {name: 0.8 * value + 0.2 * weights[name].double() for name, value in average.items()}
    found = load_file(tmp_path / "run" / "models" / "averaged" / "model.safetensors")
    assert "second.weight" not in found, "it is tied to first.weight"
    assert found.keys() == average.keys()
    for name, value in average.items():
        assert_close(found[name].double(), value, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(found["out.weight"], model.out.weight, atol=1e-3)
    own = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert torch.equal(own["out.weight"], model.out.weight)


def test_an_average_does_not_change_the_training(toy: ModuleType, tmp_path: Path) -> None:
    averaged, _, _ = train(toy, tmp_path / "one")
    plain, _, _ = train(toy, tmp_path / "other", average=None)
    assert all(torch.equal(a, b) for a, b in zip(averaged.parameters(), plain.parameters(), strict=True))
    assert not (tmp_path / "other" / "models").exists()


def test_both_models_are_validated_and_each_has_its_own_best(toy: ModuleType, tmp_path: Path) -> None:
    """The model is best at first, the average later."""
    scores = iter([0.9, 0.1, 0.8, 0.3, 0.7, 0.2])
    _, state, _ = train(toy, tmp_path / "run", validate=lambda: {"accuracy": next(scores)}, keep=("best", "last"))
    lines = read(tmp_path / "run" / "log.jsonl")
    assert [line["scores"] for line in lines if line["kind"] == "valid"] == [
        {"accuracy": 0.9, "averaged_accuracy": 0.1},
        {"accuracy": 0.8, "averaged_accuracy": 0.3},
        {"accuracy": 0.7, "averaged_accuracy": 0.2},
    ]
    assert (state.best, state.best_step) == (0.9, 5)
    assert (state.averaged_best, state.averaged_best_step) == (0.3, 10)
    told = [line["message"] for line in lines if line["kind"] == "event"]
    assert [text for text in told if "averaged" in text] == [
        "step 5: best averaged accuracy so far, 0.1000",
        "step 10: best averaged accuracy so far, 0.3000",
    ]
    assert sorted(folder.name for folder in (tmp_path / "run" / "models").iterdir()) == ["averaged", "last"]


def test_the_averaged_weights_are_those_that_were_validated(toy: ModuleType, tmp_path: Path) -> None:
    model, step = toy.make()
    seen = []

    def validate() -> dict[str, float]:
        seen.append(model.out.weight.detach().clone())
        return {"accuracy": float(len(seen))}

    folder = RunFolder.create(tmp_path / "run")
    fit(model, step, toy.Pairs(), config=toy.config(average=0.8), log=Log(), validate=validate, run_folder=folder)
    assert len(seen) == 6
    assert torch.equal(seen[-2], model.out.weight)
    assert torch.equal(load_file(folder.averaged / "model.safetensors")["out.weight"], seen[-1])


def test_the_model_has_its_own_weights_again_after_a_failure(toy: ModuleType) -> None:
    model, _ = toy.make()
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.out.weight.add_(1.0)
    own = model.out.weight.detach().clone()
    average.update()
    seen = []

    def fail() -> None:
        with average.in_place_of_model():
            seen.append(model.out.weight.detach().clone())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert_close(seen[0], own - 0.5)
    assert torch.equal(model.out.weight, own)


def test_frozen_weights_and_buffers_are_those_of_the_model(toy: ModuleType) -> None:
    model, _ = toy.make()
    model.pooler.requires_grad_(False)
    model.register_buffer("count", torch.zeros(()))
    average = WeightAverage(model, 0.5)
    assert not {"pooler.weight", "pooler.bias", "count", "second.weight"} & average.state_dict().keys()
    with torch.no_grad():
        model.count += 3
        model.pooler.bias.fill_(2.0)
    average.update()
    with average.in_place_of_model():
        assert float(model.count) == 3
        assert bool((model.pooler.bias == 2).all())


def test_space_for_the_averaged_weights_is_asked_for(toy: ModuleType) -> None:
    model, _ = toy.make()
    trained = sum(4 * p.numel() for p in model.parameters())
    stored = sum(4 * tensor.numel() for tensor in model.state_dict().values())
    more = estimate_space(model, toy.config(average=0.9), 3) - estimate_space(model, toy.config(), 3)
    assert more == 3 * trained + stored, "three times in last/ while a state is written, once in models/averaged"
