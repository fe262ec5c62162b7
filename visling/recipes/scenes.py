"""Small runs of our own on drawn scenes, from scratch: what is the same for every family.

A family's own pre-training on scenes stands in its file and starts from `on_captions`; a task on scenes is one recipe
for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from visling import models
from visling.data.batches.masking import TokenMasking
from visling.data.corpora.base import Corpus
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.train.config import TrainConfig
from visling.train.optim import OptimConfig

SORTED_TOGETHER = 16
"""Batches that are sorted by text length together (`sort_by_length`), 1 in the releases: padding is what a small model
spends its time on."""

WRONG_CAPTIONS = Corpus(kind="single_captions", weight=0.05)
"""To learn matching from. Half of them belong to another image and teach no word of this one, so they are few: a small
model has no time to spare."""

MATCHING_WEIGHT = 0.1
"""Of matching, 1 in the releases: a batch has one or two examples to match, and at weight 1 their noisy loss kept
ViLBERT from learning to use its poolers."""

FEW_REGIONS = 0.05
"""Share of regions that are masked, 0.15 in the releases: a word whose region is hidden cannot be predicted, and with
six regions an image many are."""

MASKED_IN_RELEASES: Mapping[str, Any] = {"masking.rate": 0.15, "region_masking.rate": 0.15}
"""What all releases that mask regions do instead."""


def on_captions(model: str, *, wrong: Corpus | None = WRONG_CAPTIONS) -> PretrainConfig:
    """Masked words of captions, and matching if some texts belong to another image."""
    return PretrainConfig(
        recipe=f"{model}-scenes",
        model=model,
        encoder=models.spec(model).presets["scenes"],
        any_features=True,
        corpora=(Corpus(kind="captions"), *([] if wrong is None else [wrong])),
        objectives={"masked_lm": 1.0} if wrong is None else {"masked_lm": 1.0, "matching": MATCHING_WEIGHT},
        masking=TokenMasking(rate=0.4),
        batch_size=32,
        sort_by_length=SORTED_TOGETHER,
        train=TrainConfig(
            epochs=10, precision="auto", log_every=200, validate_every=5, save_every=2000, optim=small_optimiser(1.5e-3)
        ),
    )


def slower(run: PretrainConfig) -> PretrainConfig:
    """The config with a high learning rate for longer.

    For families that learn later than VisualBERT which word belongs to which region: they learn no more of it once the
    rate falls.
    """
    return replace(run, train=replace(run.train, optim=replace(run.train.optim, decay_share=0.15)))


@dataclass(frozen=True, kw_only=True)
class OnScenes:
    """How a task is fine-tuned on drawn scenes, by any family."""

    title: str
    """What the recipe is listed as."""
    task: str = ""
    """The task, where it is called otherwise than the recipe."""
    metric: str = "accuracy"
    """By which the best weights are chosen."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the task, where they differ from its defaults."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `FinetuneConfig` that differ from the other tasks'."""
    epochs: int = 6


TASKS: Mapping[str, OnScenes] = {
    # All families have VisualBERT's loss, so that they can be compared.
    "vqa": OnScenes(title="Visual question answering", settings={"min_count": 1, "loss": "kl", "mask_unknown": True}),
    "grounding": OnScenes(title="Phrase grounding", metric="recall_at_1"),
    "referring": OnScenes(title="Referring expressions", settings={"loss": "softmax"}),
    "classification": OnScenes(title="Classification of a text with an image"),
    "nlvr2": OnScenes(
        title="Judging a sentence about two images",
        settings={"loss": "cross_entropy"},
        changes={"valid_split": "dev"},
    ),
    "retrieval": OnScenes(title="Caption retrieval", metric="rsum", changes={"valid_images": 100}),
    "gqa": OnScenes(title="Compositional questions (GQA)", settings={"loss": "kl"}),
    "vcr": OnScenes(title="Visual commonsense reasoning, answers"),
    "vcr-rationale": OnScenes(
        title="Visual commonsense reasoning, rationales", task="vcr", settings={"phase": "rationale"}
    ),
}
"""Tasks that the drawn scenes have files of."""


def on_scenes(model: str, task: str) -> FinetuneConfig:
    """A task on drawn scenes, small model."""
    how = TASKS[task]
    return FinetuneConfig(
        recipe=f"{model}-{task}-scenes",
        model=model,
        encoder=models.spec(model).presets["scenes"],
        any_features=True,
        task=how.task or task,
        task_settings=dict(how.settings),
        batch_size=32,
        sort_by_length=SORTED_TOGETHER,
        train=TrainConfig(
            epochs=how.epochs,
            precision="auto",
            metric=how.metric,
            direction="max",
            log_every=200,
            validate_every=2,
            save_every=2000,
            optim=small_optimiser(1e-3),
        ),
        **how.changes,
    )


def small_optimiser(lr: float) -> OptimConfig:
    """For models of width 96 to 192, found by trial (docs/log.md).

    The rate stays high until the model knows which word belongs to which region, then falls.
    """
    return OptimConfig(
        name="adamw",
        lr=lr,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        schedule="warmup_stable_decay",
        warmup_share=0.05,
        decay_share=0.3,
        clip="global",
    )


FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {
    **{f"{model}-{task}-scenes": partial(on_scenes, model, task) for model in models.names() for task in TASKS},
}
