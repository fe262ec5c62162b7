"""Which parameters the fine-tuning of LXMERT and CVLP updates, and at which rate, against their own code
(`golden/{lxmert,cvlp}_tasks/optimizer_groups.json`).

The releases' "names_without_gradient_on_one_device" are the picture half of the last cross-modality layer.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import finetuning_optimisers as optimisers
import pytest

from visling.recipes.configs import FinetuneConfig
from visling.recipes.tables import PUBLISHED_FINETUNING

CASES = [(family, task) for family in ("lxmert", "cvlp") for task in ("vqa", "gqa", "nlvr2")]
LAYOUT = "official_finetuned"
PARTS = {"heads.classify": "classifier"}
NARROW = {"hidden_size": 8, "num_heads": 2, "intermediate_size": 8, "vocab_size": 30, "feature_size": 6}
CLOSE: dict[str, Any] = {"rel": 1e-6, "abs": 1e-12}
"""Rates are recorded with nine digits."""


def recorded(golden: Path, family: str) -> Any:
    return json.loads((golden / f"{family}_tasks" / "optimizer_groups.json").read_text(encoding="utf-8"))


def recipe(family: str, task: str) -> FinetuneConfig:
    return PUBLISHED_FINETUNING[f"{family}-{task}"]()


@pytest.mark.parametrize(("family", "task"), CASES)
def test_the_numbers_are_those_of_the_script(golden: Path, family: str, task: str) -> None:
    config = recipe(family, task)
    published = recorded(golden, family)["tasks"][task]["published"]
    assert published == {
        "batch_size": config.batch_size,
        "lr": config.train.optim.lr,
        "epochs": config.train.epochs,
        "train": config.train_split.replace("+", ","),
        "valid": config.valid_split,
    }


@pytest.mark.parametrize(("family", "task"), CASES)
def test_parameter_groups(golden: Path, family: str, task: str) -> None:
    compare_groups(golden, recipe(family, task))


def compare_groups(golden: Path, config: FinetuneConfig) -> None:
    expected = recorded(golden, config.model)
    told = expected["tasks"][config.task]
    group = (told["lr_multiplier_of_every_parameter"], told["weight_decay_of_every_parameter"])
    found = optimisers.groups(config, LAYOUT, PARTS)
    assert optimisers.by_group(found) == {group: set(expected["parameter_names"])}
    assert optimisers.excluded(config, LAYOUT, PARTS) == set(told["excluded"])
    assert optimisers.frozen(config, LAYOUT, PARTS) == set(told["frozen"])


@pytest.mark.parametrize(("family", "task"), CASES)
def test_names_without_gradient(golden: Path, family: str, task: str) -> None:
    found = optimisers.without_gradient(recipe(family, task), LAYOUT, PARTS, **NARROW)
    assert found == set(recorded(golden, family)["tasks"][task]["names_without_gradient_on_one_device"])


@pytest.mark.parametrize(("family", "task"), CASES)
def test_rate_of_every_update_and_clipping(golden: Path, family: str, task: str) -> None:
    told, optim = recorded(golden, family)["tasks"][task], recipe(family, task).train.optim
    compare_rates(told, recipe(family, task))
    given = told["optimizer"]
    assert optim.name == "bert_adam"
    assert (*optim.betas, optim.eps) == (given["b1"], given["b2"], given["e"])
    norm = re.search(r"over all parameters, ([\d.]+),", told["gradient_clipping"])
    assert norm is not None
    assert (optim.clip, optim.clip_norm) == ("global", float(norm[1]))


def compare_rates(told: Any, config: FinetuneConfig) -> None:
    schedule = told["schedule"]
    total = schedule["updates_per_epoch"] * schedule["epochs"]
    assert total == schedule["t_total"] == len(schedule["lr_per_update"])
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=schedule["epochs"]))
    assert optimisers.rates(config, total, range(total)) == pytest.approx(schedule["lr_per_update"], **CLOSE)


@pytest.mark.parametrize("task", ["vqa", "gqa", "nlvr2"])
def test_the_averaged_model(golden: Path, task: str) -> None:
    told, config = recorded(golden, "cvlp")["tasks"][task]["averaged_model"], recipe("cvlp", task)
    assert config.train.average == told["momentum"]
    assert told["parameters"] == len(optimisers.groups(config, LAYOUT, PARTS))
    assert recipe("lxmert", task).train.average is None


@pytest.mark.parametrize("change", [{"no_decay": ("bias",)}, {"exclude": ("pooler",)}, {"rates": {"head": 2.0}}])
def test_other_groups_are_noticed(golden: Path, change: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        compare_groups(golden, changed("vqa", **change))


@pytest.mark.parametrize("change", [{"warmup_share": 0.11}, {"lr": 5.1e-5}, {"evaluate": "after"}])
def test_other_rates_are_noticed(golden: Path, change: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        compare_rates(recorded(golden, "lxmert")["tasks"]["vqa"], changed("vqa", **change))


def changed(task: str, **optim: Any) -> FinetuneConfig:
    """LXMERT's recipe with other settings of its optimiser."""
    config = recipe("lxmert", task)
    train = dataclasses.replace(config.train, optim=dataclasses.replace(config.train.optim, **optim))
    return dataclasses.replace(config, train=train)
