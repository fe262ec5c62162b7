"""VisualBERT's training as recorded from its own script (`golden/visualbert_tasks/optimizer_groups.json`): which
parameters are updated and how, the rate of every recorded update. At full size, without memory.

A second recording may be of the pre-training configurations, and of QA -> R on VCR. The release pre-trains on VCR with
the network that computes the features, our recipes from precomputed ones: there the network's parameters are left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import finetuning_optimisers as optimisers
import pytest

from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.recipes.tables import PUBLISHED_FINETUNING, PUBLISHED_PRETRAINING
from visling.runs import estimate
from visling.runs.typical_task import count_examples

Config = FinetuneConfig | PretrainConfig
TASKS = ("vqa", "nlvr2", "vcr", "flickr")
RECIPES: Mapping[str, Callable[[], Config]] = {
    "vqa/fine-tune.json": PUBLISHED_FINETUNING["visualbert-vqa"],
    "nlvr2/fine-tune.json": PUBLISHED_FINETUNING["visualbert-nlvr2"],
    "flickr/fine-tune.json": PUBLISHED_FINETUNING["visualbert-flickr30k"],
    "vcr/fine-tune-qa.json": PUBLISHED_FINETUNING["visualbert-vcr"],
    "vcr/fine-tune-qar.json": PUBLISHED_FINETUNING["visualbert-vcr-rationale"],
    "vqa/coco-pre-train.json": PUBLISHED_PRETRAINING["visualbert-coco"],
    "vcr/coco-pre-train.json": PUBLISHED_PRETRAINING["visualbert-vcr-coco"],
    "nlvr2/coco-pre-train.json": PUBLISHED_PRETRAINING["visualbert-nlvr2-coco"],
    "flickr/coco-pre-train.json": PUBLISHED_PRETRAINING["visualbert-flickr30k-coco"],
    "vqa/pre-train.json": PUBLISHED_PRETRAINING["visualbert-vqa"],
    "vcr/pre-train.json": PUBLISHED_PRETRAINING["visualbert-vcr"],
    "nlvr2/pre-train.json": PUBLISHED_PRETRAINING["visualbert-nlvr2"],
    "flickr/pre-train.json": PUBLISHED_PRETRAINING["visualbert-flickr30k"],
}
"""Configuration of the release -> recipe."""
LAYOUT = "official"
PARTS = {
    "heads.classify": "classifier",
    "heads.score": "classifier",
    "heads.phrases": "slots_regions",
    "objectives.masked_lm.head": "vocabulary",
    "objectives.matching.head": "matching",
}
NARROW = {"hidden_size": 8, "num_heads": 2, "intermediate_size": 8, "vocab_size": 30, "max_regions": 3}
CLOSE: dict[str, Any] = {"rel": 1e-8, "abs": 1e-15}
"""Rates are recorded with ten digits."""
OURS = Path(__file__).parents[1] / "golden"
"""The recording of fine-tunings: in that of pre-training not every rule makes a difference."""


def recorded(golden: Path, task: str) -> Any:
    return json.loads((golden / "visualbert_tasks/optimizer_groups.json").read_text(encoding="utf-8"))[task]


def recipe(told: Mapping[str, Any]) -> Config:
    return RECIPES[told["config"]]()


def compared(names: Iterable[str], config: Config) -> set[str]:
    """Those of the release's names that a recipe can have: without its network if it reads precomputed features."""
    return {name for name in names if config.extractor is not None or not name.startswith("detector.")}


def changed(config: Config, **optim: Any) -> Config:
    train = dataclasses.replace(config.train, optim=dataclasses.replace(config.train.optim, **optim))
    return dataclasses.replace(config, train=train)


def compare_groups(told: Mapping[str, Any], config: Config) -> None:
    expected = {
        name: (group["lr_multiplier"], group["weight_decay"])
        for group in told["groups"]
        for name in compared(group["names"], config)
    }
    still = compared(told["frozen_after_optimizer_was_made"], config)
    found = optimisers.groups(config, LAYOUT, PARTS)
    # A model of the release has heads that its task does not read; they are never updated.
    absent = expected.keys() - found.keys() - still
    assert absent <= set(told["without_gradient_in_this_task"])
    assert found == {name: group for name, group in expected.items() if name not in absent | still}
    assert optimisers.excluded(config, LAYOUT, PARTS) == set(told["not_in_optimizer"]) | still
    assert optimisers.frozen(config, LAYOUT, PARTS) == still


def compare_rates(told: Mapping[str, Any], config: Config) -> None:
    updates, rates = zip(*told["lr_of_update"], strict=True)
    found = optimisers.rates(config, told["t_total"], [update - 1 for update in updates])
    assert found == pytest.approx(list(rates), **CLOSE)


@pytest.mark.parametrize("task", TASKS)
def test_the_numbers_are_those_of_the_configuration(golden: Path, task: str) -> None:
    told = recorded(golden, task)
    config = recipe(told)
    optim = config.train.optim
    assert config.batch_size == told["batch"]
    assert config.train.epochs == told["epochs"]
    assert (told["optimizer"], optim.name) == ("BertAdam", "bert_adam")
    assert (optim.lr, *optim.betas, optim.eps) == (told["lr"], told["b1"], told["b2"], told["eps"])
    assert optim.warmup_share == told["warmup_proportion"]
    assert (optim.clip, optim.clip_norm) == ("per_tensor", told["clip_each_tensor_norm"])
    assert told["t_total"] == told["items"] // told["batch"] * told["epochs"]
    if isinstance(config, FinetuneConfig) and count_examples(config) == told["items"]:
        assert estimate.updates(config) == told["t_total"]


@pytest.mark.parametrize("task", TASKS)
def test_parameter_groups_and_what_is_frozen(golden: Path, task: str) -> None:
    told = recorded(golden, task)
    compare_groups(told, recipe(told))


@pytest.mark.parametrize("task", TASKS)
def test_names_without_gradient(golden: Path, task: str) -> None:
    """In the network of VCR only what predicts classes, whose loss has no weight."""
    told = recorded(golden, task)
    config = recipe(told)
    if config.extractor is not None:
        small: dict[str, Any] = {"widths": (4, 4, 4, 8), "mask_channels": 2, "picture_width": 48, "picture_height": 32}
        config = dataclasses.replace(config, extractor=dataclasses.replace(config.extractor, **small))
    found = optimisers.without_gradient(config, LAYOUT, PARTS, **NARROW)
    held = {name for group in told["groups"] for name in group["names"]} | set(told["not_in_optimizer"])
    absent = compared(held, config) - optimisers.listed(config, LAYOUT, PARTS)
    assert found | absent == compared(told["without_gradient_in_this_task"], config)


@pytest.mark.parametrize("task", TASKS)
def test_rate_of_every_recorded_update(golden: Path, task: str) -> None:
    """The first is 0, the peak comes after the warm-up, and nothing is left after the last."""
    told = recorded(golden, task)
    compare_rates(told, recipe(told))


@pytest.mark.parametrize(
    "change",
    [{"no_decay": ("bias", "norm")}, {"no_decay": ("bias",)}, {"exclude": ()}, {"rates": {"extractor": 2.0}}],
)
def test_other_groups_are_noticed(change: dict[str, Any]) -> None:
    told = recorded(OURS, "vcr")
    with pytest.raises(AssertionError):
        compare_groups(told, changed(recipe(told), **change))


@pytest.mark.parametrize("change", [{"warmup_share": 0.11}, {"lr": 2.1e-5}, {"evaluate": "after"}])
def test_other_rates_are_noticed(change: dict[str, Any]) -> None:
    told = recorded(OURS, "flickr")
    with pytest.raises(AssertionError):
        compare_rates(told, changed(recipe(told), **change))
