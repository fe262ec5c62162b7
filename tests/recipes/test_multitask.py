"""Recipes of several tasks: their numbers, and the parameter groups of ViLBERT's multi-task release at full depth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning_optimisers import official_names

from visling import config as configs
from visling import models
from visling.errors import ConfigError
from visling.models.task_model import JointModel
from visling.recipes.configs import differences
from visling.recipes.multitask import LACKING, PUBLISHED
from visling.recipes.multitask_configs import MultitaskConfig
from visling.recipes.tables import FINETUNING, MULTITASK, find_finetuning, find_multitask
from visling.recipes.vilbert_tasks import TASKS
from visling.runs.typical_task import untrained_task
from visling.train.optim import parameter_groups

TWELVE = (1, 2, 4, 7, 8, 9, 10, 11, 12, 13, 15, 17)
"""Tasks of 12-in-1 by the number in the release's file; 2, 4 and 17 are lacking here."""
PARTS = {
    "heads.vqa_classify": "classifier",
    "heads.gqa_classify": "classifier_gqa",
    "heads.nlvr2_classify": "pair",
    "heads.choosing_score": "score",
    "heads.pointing_regions": "regions",
}
"""Head of 12-in-1 -> part of the key map of the release."""
OTHER_HEADS = ("cls.", "vil_tri_prediction.", "linguisic_logit.")
NEVER_READ = (".biOutput.q_dense1.", ".biOutput.q_dense2.")


def joint_model(config: MultitaskConfig) -> JointModel:
    """The model of a recipe at its full size, without memory."""
    with torch.device("meta"):
        tasks = {name: untrained_task(config.finetuning(name))[1] for name in config.tasks}
        return JointModel(
            models.build(config.model, config.encoder),
            {name: (task.heads, task.group) for name, task in tasks.items()},
            {name: {own: config.head_name(name, own) for own in task.heads} for name, task in tasks.items()},
            models.head_styles(config.model),
        )


def groups(config: MultitaskConfig) -> dict[str, tuple[float, float]]:
    """Official name of every parameter that the optimiser updates -> rate and decay."""
    model = joint_model(config)
    ours = {
        name: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, config.train.optim)
        for name in group["names"]
    }
    known = [name for name in ours if not name.startswith("heads.snli-ve_")]  # the release's head is another
    found = {}
    for theirs, made_of in official_names(models.spec("vilbert").keys["multitask"], known, PARTS).items():
        (setting,) = {ours[name] for name in made_of}
        found[theirs] = setting
    return found


def recorded_groups(golden: Path) -> Mapping[str, tuple[float, float]]:
    content = json.loads((golden / "vilbert_tasks" / "optimizer_groups.json").read_text(encoding="utf-8"))
    release = content["multi_task_release"]
    (task,) = (task for title, task in release["tasks"].items() if title.endswith("(TASK12)"))  # 2e-5, the smallest
    rates = task["learning_rates"]
    return {
        name: (rates[group], each["weight_decay"])
        for group, each in release["parameter_groups"]["groups"].items()
        for name in each["names"]
    }


def test_the_parameters_of_all_tasks_have_the_rates_and_the_decay_of_the_release(golden: Path) -> None:
    ours, theirs = groups(PUBLISHED["vilbert-12in1"]()), recorded_groups(golden)
    assert ours == {name: (pytest.approx(theirs[name][0]), theirs[name][1]) for name in ours}
    left = theirs.keys() - ours.keys()
    assert all(name.startswith(OTHER_HEADS) or any(part in name for part in NEVER_READ) for name in left), sorted(left)
    assert "bert.embeddings.task_embeddings.weight" in ours


@pytest.mark.parametrize("change", ["rates={'heads.' = 5.0}", "no_decay_except=['attention.norm.weight']"])
def test_other_groups_are_noticed(golden: Path, change: str) -> None:
    config = configs.override(PUBLISHED["vilbert-12in1"](), [f"train.optim.{change}"])
    theirs = recorded_groups(golden)
    assert any(setting != pytest.approx(theirs[name]) for name, setting in groups(config).items())


def test_twelve_in_one_has_the_numbers_of_the_release() -> None:
    run = PUBLISHED["vilbert-12in1"]()
    tokens = {task.task_token for task in run.tasks.values()}
    assert tokens == set(TWELVE) - {2, 4, 17}
    assert len(LACKING) == len(TWELVE) - len(tokens)
    assert run.encoder.num_tasks == 20
    assert run.train.optim.lr == 2e-5
    scales = {name: task.loss_scale for name, task in run.tasks.items()}
    assert scales == {**dict.fromkeys(run.tasks, 1.0), "vqa": 2.0, "gqa": 2.0}
    for name, row in TASKS.items():
        if name in run.tasks:
            task = run.tasks[name]
            assert (task.batch_size, task.max_tokens, task.max_regions) == (
                row.batch_size,
                row.max_tokens,
                row.max_regions,
            )
            assert row.lr == pytest.approx(task.loss_scale * run.train.optim.lr)
    assert {task.epochs for task in run.tasks.values()} == {20}
    rule = run.stop_and_go
    assert rule is not None
    assert (rule.every, rule.patience, rule.threshold, rule.resume_below, rule.cooldown) == (4, 1, 0.001, 0.005, 1)
    assert rule.reset_after == (6, 8)


@pytest.mark.parametrize("name", MULTITASK)
def test_every_recipe_is_a_config_that_survives_a_round_trip(name: str) -> None:
    config = MULTITASK[name]()
    assert config.recipe == name
    again = configs.from_dict(MultitaskConfig, json.loads(json.dumps(configs.to_dict(config))))
    assert configs.to_dict(again) == configs.to_dict(config)
    assert {"paper", "release"} <= differences(config, config).keys()


def test_a_recipe_of_another_command_is_named() -> None:
    with pytest.raises(ConfigError, match="is a recipe of multitask: use visling multitask"):
        find_finetuning("vilbert-12in1")
    with pytest.raises(ConfigError, match="is a recipe of finetune: use visling finetune"):
        find_multitask(next(iter(FINETUNING)))


def test_a_task_alone_reads_what_it_reads_among_the_others() -> None:
    run = PUBLISHED["vilbert-12in1"]()
    alone: Any = run.finetuning("refcoco")
    assert (alone.task, alone.encoder.max_tokens, alone.encoder.max_regions, alone.task_token) == (
        "referring",
        20,
        100,
        9,
    )
    assert alone.encoder.num_tasks == 20
