"""VL-BERT's fine-tuning as recorded from its own training scripts (`golden/vlbert_tasks`): which parameters are
updated and how, the rate of every recorded update, and what a task takes of a pre-trained file. At full size, without
memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import finetuning_optimisers as optimisers
import pytest
import torch

from visling import config as configs
from visling import models
from visling.pretrained.folder import read_model_folder, save_model_folder
from visling.recipes.configs import FinetuneConfig
from visling.recipes.tables import FINETUNING, PRETRAINING, PUBLISHED_FINETUNING
from visling.regions.store import NativeStore
from visling.runs.finetune import Finetuning
from visling.runs.inputs import Inputs, fit_to_store
from visling.runs.pretrain import untrained_model
from visling.vision import end_to_end

TASKS = ("vqa", "refcoco", "vcr")
PARTS: Mapping[str, Mapping[str, str]] = {
    "vqa": {"heads.classify": "classifier"},
    "refcoco": {"heads.regions": "regions"},
    "vcr": {"heads.score": "classifier", "heads.objects": "objects"},
}
"""Task -> head of ours -> part of the key map."""
UNREAD = {
    "object_mask_word_embedding.weight",
    "object_mask_visual_embedding.weight",
    "aux_text_visual_embedding.weight",
}
"""What only pre-training reads; the models of the release's tasks lack them, ours hold them untouched."""
CLOSE: dict[str, Any] = {"rel": 1e-8, "abs": 1e-15}
"""Rates are recorded with ten digits."""


def recorded(golden: Path, name: str) -> Any:
    return json.loads((golden / "vlbert_tasks" / f"{name}.json").read_text(encoding="utf-8"))


def recipe(told: Mapping[str, Any], task: str) -> FinetuneConfig:
    """The recipe of a recorded configuration file, `base_4x16G_fp32.yaml`."""
    size = told["config"].partition("_")[0]
    name = {
        "vqa": "vqa",
        "refcoco": "refcoco+" if "detected" in told["config"] else "refcoco+-gt",
        "vcr": "vcr-rationale" if "qa2r" in told["config"] else "vcr",
    }[task]
    return PUBLISHED_FINETUNING[f"vlbert-{size}-{name}"]()


def compare_groups(told: Mapping[str, Any], task: str, config: FinetuneConfig) -> None:
    (group,) = told["groups"]
    found = optimisers.groups(config, task, PARTS[task])
    unread = UNREAD | {name for name in found if ".pooler." in name and task != "vcr"}
    still = set(told["frozen"])
    assert {name: setting for name, setting in found.items() if name not in unread} == dict.fromkeys(
        set(group["names"]) - still, (group["lr_multiplier"], group["weight_decay"])
    )
    assert optimisers.frozen(config, task, PARTS[task]) == still
    assert optimisers.excluded(config, task, PARTS[task]) == still


def compare_rates(told: Mapping[str, Any], config: FinetuneConfig) -> None:
    updates, rates = zip(*told["lr_of_update"], strict=True)
    found = optimisers.rates(config, told["updates"], [update - 1 for update in updates])
    assert found == pytest.approx(list(rates), **CLOSE)


@pytest.mark.parametrize("task", TASKS)
def test_the_numbers_are_those_of_the_configuration(golden: Path, task: str) -> None:
    told = recorded(golden, "optimizer_groups")[task]
    config = recipe(told, task)
    optim, (group,) = config.train.optim, told["groups"]
    assert config.batch_size * config.train.accumulation == told["items_per_update"]
    if not told["config"].startswith(("large_q2a_4x16G", "large_qa2r_4x16G")):  # the same run on fewer GPUs
        assert config.train.accumulation == told["accumulation"]
    assert config.train.epochs == told["epochs"]
    assert (optim.clip, optim.clip_norm) == ("global", told["clip_global_norm"])
    assert optim.lr == pytest.approx(told["base_lr"], rel=1e-12)
    assert list(optim.drop_epochs) == told["lr_step_epochs"]
    if told["optimizer"] == "SGD":
        assert (optim.name, optim.momentum) == ("sgd", group["momentum"])
        assert (group["nesterov"], group["dampening"]) == (False, 0)
    else:
        assert (told["optimizer"], optim.name) == ("AdamW", "release_adamw")
        assert (list(optim.betas), optim.eps) == (list(group["betas"]), group["eps"])
        assert optim.bias_correction == group["correct_bias"]


@pytest.mark.parametrize("task", TASKS)
def test_parameter_groups_and_what_is_frozen(golden: Path, task: str) -> None:
    told = recorded(golden, "optimizer_groups")[task]
    compare_groups(told, task, recipe(told, task))


@pytest.mark.parametrize("task", TASKS)
def test_rate_of_every_recorded_update(golden: Path, task: str) -> None:
    told = recorded(golden, "optimizer_groups")[task]
    compare_rates(told, recipe(told, task))


def changed(config: FinetuneConfig, **optim: Any) -> FinetuneConfig:
    train = dataclasses.replace(config.train, optim=dataclasses.replace(config.train.optim, **optim))
    return dataclasses.replace(config, train=train)


@pytest.mark.parametrize("change", [{"no_decay": ("norm",)}, {"exclude": ("extractor",)}, {"rates": {"head": 2.0}}])
def test_other_groups_are_noticed(golden: Path, change: dict[str, Any]) -> None:
    told = recorded(golden, "optimizer_groups")["vcr"]
    with pytest.raises(AssertionError):
        compare_groups(told, "vcr", changed(recipe(told, "vcr"), **change))


def test_another_frozen_stage_is_noticed(golden: Path) -> None:
    told = recorded(golden, "optimizer_groups")["refcoco"]
    config = recipe(told, "refcoco")
    assert config.extractor is not None
    thawed = dataclasses.replace(config, extractor=dataclasses.replace(config.extractor, frozen_stages=1))
    with pytest.raises(AssertionError):
        compare_groups(told, "refcoco", thawed)


@pytest.mark.parametrize(
    ("task", "change"),
    [("vcr", {"drop_epochs": (14.0,)}), ("vcr", {"evaluate": "before"}), ("vqa", {"warmup_steps": 501})],
)
def test_other_rates_are_noticed(golden: Path, task: str, change: dict[str, Any]) -> None:
    told = recorded(golden, "optimizer_groups")[task]
    with pytest.raises(AssertionError):
        compare_rates(told, changed(recipe(told, task), **change))


# --------------------------------------------------------------------------- what a task takes of a pre-trained file


NARROW = (
    "encoder.hidden_size=8", "encoder.visual_size=8", "encoder.num_heads=2",
    "encoder.intermediate_size=16", "encoder.whiten_features=false", "encoder.coordinate_size=2",
)  # fmt: skip
NETWORK = (
    "extractor={stem_size = 4, widths = [4, 4, 4, 8]}", "encoder.feature_size=32", "encoder.masks_features=false",
)  # fmt: skip
ON_SCENES = {"vqa": "vqa", "refcoco": "referring", "vcr": "vcr"}
OBJECTIVES = {
    "objectives.masked_lm.head": "vocabulary",
    "objectives.masked_regions.head": "region_targets",
    "objectives.matching.head": "matching",
}


def write_pretrained(world: Any, path: Path, *settings: str) -> Path:
    """A model folder of pre-training, as deep as the released files, in which no two tensors are the same."""
    store = NativeStore.open(world.regions)
    config = fit_to_store(configs.override(PRETRAINING["vlbert-scenes"](), [*NARROW, *settings]), store)
    model = untrained_model(config)
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values()):
            tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(number + 1))
    path.mkdir()
    save_model_folder(
        path, model, run=config, task=None, text_only=False, store=store,
        tokenizer=Inputs(config.model, config.encoder, store, "cpu").tokenizer,
    )  # fmt: skip
    return path


def official(names: list[str], layout: str, parts: Mapping[str, str]) -> dict[str, set[str]]:
    """Official name -> names of ours that it is made of; copies of the network's last stage are left out."""
    network = [name for name in names if name.startswith("extractor.")]
    keys = models.spec("vlbert").keys[layout]
    return {
        **optimisers.official_names(keys, (name for name in names if name not in network), parts),
        **optimisers.official_names(end_to_end.KEYS["official"], network, {}),
    }


@dataclass(frozen=True)
class Started:
    """Where the tensors of a task's model come from, in official names."""

    sources: dict[str, str]
    """Tensor of the task's model -> tensor of the file with the same values."""
    others: set[str]
    """Tensors of the task's model with other values than any of the file."""
    unused: set[str]
    """Tensors of the file whose values are nowhere in the task's model."""
    tuned: dict[str, torch.Tensor]
    """The task's model, in our names."""


def start(world: Any, task: str, init: Path, *settings: str) -> Started:
    """A task's model before its first update, compared with the pre-trained one."""
    config = configs.override(FINETUNING[f"vlbert-{ON_SCENES[task]}-scenes"](), [*NARROW, *settings])
    given = {"data": world.scenes, "store": world.regions, "init": init, "device": "cpu", "other_features": False}
    run = Finetuning(config, images=None if config.extractor is None else world.scenes, **given)
    tuned, saved = run.build().model.state_dict(), dict(read_model_folder(init).weights)
    before = official(list(saved), "official", OBJECTIVES)
    whole = {frozenset(made_of): theirs for theirs, made_of in before.items()}
    known = {tensor.numpy().tobytes(): name for name, tensor in saved.items()}
    found = {
        theirs: whole.get(frozenset(known.get(tuned[name].numpy().tobytes(), "") for name in made_of))
        for theirs, made_of in official(list(tuned), task, PARTS[task]).items()
    }
    sources = {theirs: source for theirs, source in found.items() if source is not None}
    return Started(sources, found.keys() - sources.keys(), before.keys() - set(sources.values()), tuned)


@pytest.mark.parametrize("case", [*TASKS, "vcr_from_a_file_with_relationship_head"])
def test_what_a_task_takes_of_a_pretrained_file(world: Any, golden: Path, tmp_path: Path, case: str) -> None:
    told, task, matching = recorded(golden, "start_from_pretraining")[case], case.partition("_")[0], "_" in case
    depth = recipe(told, task).encoder.num_layers
    settings = (f"encoder.num_layers={depth}", *(() if task == "vqa" else NETWORK))
    assert told["file"] == recipe(told, task).start.replace("vlbert", "vl-bert") + ".model"
    init = write_pretrained(world, tmp_path / "init", *settings, *(["objectives.matching=1.0"] if matching else []))
    started = start(world, task, init, *settings)

    prefixes = told["renamed_by_prefix"].items()
    renamed = {ours: theirs for ours, theirs in started.sources.items() if ours != theirs}
    for new, old in prefixes:
        renamed = {ours: theirs for ours, theirs in renamed.items() if ours.replace(new, old) != theirs}
    assert renamed == told["renamed"]
    # A file has no pooler, unless it learned matching: the release takes BERT's, which our folder holds.
    aside = {name for name in started.sources if name in UNREAD or (".pooler." in name and not matching)}
    stages = sum(name.startswith("image_feature_extractor.roi_head") for name in started.sources)  # and their copies
    mended = sum("overwritten" in what for what in told["special"].values())
    assert len(started.sources.keys() - aside) + stages + mended == told["tensors_loaded"]
    fresh = {name for name in told["not_loaded_so_fresh_or_from_bert_or_cnn"] if ".pooler." not in name}
    assert started.others == fresh | set(told["special"])
    tied = "vlbert.mlm_head.predictions.decoder.weight"
    special = {"vlbert.token_type_embeddings.weight"} if matching or task == "vcr" else set()
    unused = started.unused - special | {started.sources[name] for name in aside if name in UNREAD} | {tied}
    assert unused == set(told["unused_of_the_file"])
    if matching:
        weights = read_model_folder(init).weights
        for kind in ("weight", "bias"):
            unlike, alike = weights[f"objectives.matching.head.linear.{kind}"]
            assert torch.equal(started.tuned[f"heads.score.linear.{kind}"][0], alike - unlike)
