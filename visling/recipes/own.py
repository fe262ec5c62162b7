"""Small runs on one's own data, from scratch or from a model of the same recipe: BERT's vocabulary, region features of
any width.

Sizes    The presets "small" are 128 wide and have four blocks, or six in families with two streams. Most of their five
         million parameters are the 3.9 million of BERT's word table, of which a small text trains a few rows. On one
         core an epoch of 3,000 questions takes about eight seconds, so that a run takes minutes; a width of 192 took
         twice the time and scored less (docs/log.md).
Data     Dropout is 0.1 as in all releases; on scenes, where it is 0, examples can be drawn without end. The rate falls
         linearly from the end of the warm-up: the plateau of the recipes for scenes, which binds words to regions in
         long runs, scored less here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

from visling import models
from visling.recipes import cvlp, scenes
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.tasks.base import load as load_task
from visling.train.config import TrainConfig


def on_own_data(model: str, task: str = "vqa") -> FinetuneConfig:
    """One's own data, small model: visual question answering, or the task that --task names.

    Every answer of the training questions is listed. The best epoch is that of the task's own score; training ends when
    it has not risen for six.

    Args:
        task: a task, or a variant of one in `scenes.TASKS`; a task of one's own by its module.
    """
    how = scenes.TASKS.get(task, scenes.OnScenes(title=task))
    name = how.task or task
    return FinetuneConfig(
        recipe=f"{model}-small",
        model=model,
        encoder=models.spec(model).presets["small"],
        any_features=True,
        task=name,
        task_settings=dict(how.settings),
        batch_size=32,
        sort_by_length=scenes.SORTED_TOGETHER,
        train=_small_training(epochs=20, lr=1e-3, metric=load_task(name).metric, direction="max"),
        **how.changes,
    )


def on_own_captions(model: str) -> PretrainConfig:
    """One's own captions, small model: masked words, matching, and region contrast in CVLP.

    Captions are read in COCO's layout. Apart from the family's encoder, only objectives that any region features can
    serve are learned: no class, attribute or distribution of a detector.
    """
    run = scenes.on_captions(model, wrong=None if model == "vlbert" else scenes.WRONG_CAPTIONS)
    if model == "cvlp":
        run = replace(
            run,
            objectives={**run.objectives, "region_contrast": 0.1},
            objective_settings={"region_contrast": {"projection_size": 64, "momentum": 0.99, "queue_size": 8192}},
            region_masking=replace(cvlp.REGION_MASKING, rate=scenes.FEW_REGIONS),
        )
    return replace(
        run,
        recipe=f"{model}-small",
        encoder=models.spec(model).presets["small"],
        train=_small_training(epochs=20, lr=1e-3, metric="loss", direction="min"),
    )


def _small_training(*, epochs: int, lr: float, metric: str, direction: Literal["max", "min"]) -> TrainConfig:
    return TrainConfig(
        epochs=epochs,
        precision="auto",
        metric=metric,
        direction=direction,
        patience=6,
        log_every=50,
        save_every=1000,
        optim=replace(scenes.small_optimiser(lr), schedule="warmup_linear", warmup_share=0.1),
    )


FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {
    **{f"{model}-small": partial(on_own_data, model) for model in models.names()},
}

PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {
    **{f"{model}-small": partial(on_own_captions, model) for model in models.names()},
}
