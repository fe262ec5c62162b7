"""Runs over several tasks: ViLBERT's 12-in-1 and its joint training on VCR, and a small one on drawn scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from visling import models
from visling.recipes import scenes, vilbert
from visling.recipes.multitask_configs import JointTask, MultitaskConfig
from visling.recipes.vilbert_tasks import (
    ANNOTATED_BOXES,
    FOUR_ALTERNATIVES,
    HEAD_RATE,
    RETRIEVAL_SPLITS,
    TASKS,
    MultitaskTask,
    multitask_optim,
)
from visling.train.config import TrainConfig
from visling.train.multitask import StopAndGo
from visling.train.optim import OptimConfig

POINTING, CHOOSING = "pointing", "choosing"
"""Heads that tasks share in both releases: `vision_logit`, a score of each region; `vil_logit`, one of each
alternative."""

RANKING = "image_r1"
"""Score of retrieval: in percent as those of the other tasks, whose mean is shown; the task's own is a sum of six."""

_SHARED: Mapping[str, str] = {"referring": POINTING, "retrieval": CHOOSING, "vcr": CHOOSING}
"""Task -> the name of its shared heads."""

_FOLDERS: Mapping[str, str] = {
    "vqa": "VQA",
    "retrieval-coco": "cocoRetreival",
    "retrieval": "flickr30k",
    "refcoco": "refcoco",
    "refcoco+": "refcoco",
    "refcocog": "refcoco",
    "nlvr2": "nlvr2",
    "snli-ve": "visual_entailment",
    "gqa": "gqa",
}
"""Task -> its folder in the release's `datasets`."""

LACKING: Mapping[str, str] = {
    "GenomeQA": "questions of Visual Genome, with the answers and the head of VQA",
    "Visual7w": "pointing among given boxes",
    "GuessWhatPointing": "pointing among given boxes after a dialogue",
}
"""Of the twelve, those that no task of this package reads."""


_EVERY_EPOCH: Mapping[str, str] = {"models kept": "one after each of the 20 parts; the last is used"}


def vilbert_12in1() -> MultitaskConfig:
    """ViLBERT on nine of the tasks of 12-in-1 in turn, each with a token of its own, with dynamic stop-and-go.

    Visual Genome's questions, Visual7W and GuessWhat are not among the tasks here. The folders of the tasks are those
    of the release's `datasets`; lists of images that other tasks test on (`coco_test_ids.npy`, `flickr_test_ids.npy`)
    are read from the working folder.

    Source:
        vilbert-multi-task, train_tasks.py and vilbert_tasks.yml, by the README's command
        `--tasks 1-2-4-7-8-9-10-11-12-13-15-17 --lr_scheduler warmup_linear --train_iter_gap 4 --task_specific_tokens`.
    """
    lr = min(task.lr for task in TASKS.values())
    names = ("vqa", "retrieval-coco", "retrieval", "refcoco", "refcoco+", "refcocog", "nlvr2", "snli-ve", "gqa")
    tasks = {name: _from_release(name, TASKS[name], lr) for name in names if name in TASKS}
    tasks["snli-ve"] = JointTask(
        task="classification",
        task_settings={"text_field": "sentence2", "image_field": "Flikr30kID", "label_field": "gold_label"},
        folder=_FOLDERS["snli-ve"],
        task_token=13,
        batch_size=256,
        max_tokens=56,
        max_regions=100,
        train_split="snli_ve_train",
        valid_split="snli_ve_dev",
        without_images=Path("flickr_test_ids.npy"),
    )
    head_rate = HEAD_RATE / lr
    optim = multitask_optim(lr, {f"heads.{POINTING}_": 1.0, "heads.": head_rate})
    return MultitaskConfig(
        recipe="vilbert-12in1",
        model="vilbert",
        encoder=models.spec("vilbert").presets["multitask"],
        tasks={name: tasks[name] for name in names},
        stop_and_go=StopAndGo(reset_after=(6, 8)),
        start="vilbert-multitask",
        train=TrainConfig(
            epochs=20,
            seed=0,
            metric="mean",
            direction="max",
            keep=("last",),
            optim=replace(optim, no_decay_except=_name_norms(optim)),
        ),
        release={
            **_EVERY_EPOCH,
            "further tasks": "three: " + ", ".join(f"{name} ({what})" for name, what in LACKING.items()),
            "snli-ve": "a linear head of three outputs, trained by the mean of binary cross-entropies",
            **{
                f"tasks.{name}.{setting}": value
                for name in ("retrieval-coco", "retrieval")
                for setting, value in FOUR_ALTERNATIVES.items()
            },
            **ANNOTATED_BOXES,
            "length": "that of the longest task times the epochs of the last task in the list (20, as of all of them)",
            "heads of other tasks": "in the framework of its time their gradients in an update are zero, not absent, "
            "so that their moments and their decay still move them",
        },
    )


def _name_norms(optim: OptimConfig) -> tuple[str, ...]:
    """Norms that the release decays by mistake, with those inside the answer heads as the heads are called here."""
    return (*(name for name in optim.no_decay_except if "heads." not in name), "_classify.norm.weight")


def _from_release(name: str, task: MultitaskTask, lr: float) -> JointTask:
    """A task with the numbers that it has alone, its loss scaled by its rate over `lr`."""
    splits: dict[str, Any] = {"train_split": task.train_split, "valid_split": task.valid_split, **task.cleaned}
    if task.task == "retrieval":
        splits |= {**RETRIEVAL_SPLITS, "metric": RANKING}
    if "without_images" in splits:
        splits["without_images"] = Path(splits["without_images"])
    return JointTask(
        task=task.task,
        task_settings=task.settings,
        folder=_FOLDERS[name],
        shares=_SHARED.get(task.task),
        task_token=task.number,
        batch_size=task.batch_size,
        max_tokens=task.max_tokens,
        max_regions=task.max_regions,
        loss_scale=task.lr / lr,
        epochs=task.epochs,
        **splits,
    )


def vilbert_vcr_joint() -> MultitaskConfig:
    """ViLBERT on both tasks of VCR in turn with one head, as first released: answers of 60 tokens, rationales of 80.

    Both make an update in every iteration of 20 epochs.

    Source:
        vilbert_beta, train_tasks.py and vlbert_tasks.yml, by the README's command `--tasks 1-2 --learning_rate 2e-5`.
    """
    phases = {"answer": vilbert.vilbert_vcr(), "rationale": vilbert.vilbert_vcr_rationale()}
    alone = phases["answer"]
    # The warm-up is a tenth of the iterations, but counts updates, of which an iteration makes two
    optim = replace(alone.train.optim, warmup_share=alone.train.optim.warmup_share / len(phases))
    return MultitaskConfig(
        recipe="vilbert-vcr-joint",
        model="vilbert",
        encoder=phases["rationale"].encoder,
        tasks={
            name: JointTask(
                task=run.task,
                task_settings=run.task_settings,
                shares=CHOOSING,
                batch_size=run.batch_size,
                max_tokens=run.encoder.max_tokens,
                max_regions=run.encoder.max_regions,
                epochs=run.train.epochs,
                train_split=run.train_split,
                valid_split=run.valid_split,
            )
            for name, run in phases.items()
        },
        stop_and_go=None,
        start=alone.start,
        train=replace(alone.train, metric="mean", keep=("best", "last"), optim=optim),
        paper=alone.paper,
        release={**_EVERY_EPOCH, **{name: value for name, value in alone.release.items() if name != "training"}},
    )


_SCENES: Mapping[str, tuple[int, str | None]] = {
    "vqa": (1, None),
    "gqa": (15, None),
    "referring": (9, POINTING),
    "retrieval": (8, CHOOSING),
    "vcr": (5, CHOOSING),
    "nlvr2": (12, None),
}
"""Task on drawn scenes -> its token in ViLBERT's release, and the name of its shared heads."""


def on_scenes(model: str) -> MultitaskConfig:
    """Six tasks on drawn scenes in turn with dynamic stop-and-go, small model: up to 500 examples of each, a minute.

    Validated on the examples of 50 images, retrieval on the pairs of 20.
    """
    encoder = models.spec(model).presets["scenes"]
    tokens = hasattr(encoder, "num_tasks")
    alone = {name: scenes.on_scenes(model, name) for name in _SCENES}
    tasks = {
        name: JointTask(
            task=run.task,
            task_settings=run.task_settings,
            shares=_SCENES[name][1],
            task_token=_SCENES[name][0] if tokens else None,
            batch_size=run.batch_size,
            epochs=3,
            valid_split=run.valid_split,
            valid_images=20 if name == "retrieval" else 50,
            train_limit=500,
            metric=RANKING if name == "retrieval" else run.train.metric,
        )
        for name, run in alone.items()
    }
    return MultitaskConfig(
        recipe=f"{model}-multitask-scenes",
        model=model,
        encoder=replace(encoder, num_tasks=20) if tokens else encoder,
        any_features=True,
        tasks=tasks,
        stop_and_go=StopAndGo(),
        sort_by_length=scenes.SORTED_TOGETHER,
        train=TrainConfig(
            epochs=3,
            precision="auto",
            metric="mean",
            direction="max",
            keep=("last",),
            log_every=50,
            save_every=2000,
            optim=scenes.small_optimiser(1e-3),
        ),
    )


PUBLISHED: Mapping[str, Callable[[], MultitaskConfig]] = {
    "vilbert-12in1": vilbert_12in1,
    "vilbert-vcr-joint": vilbert_vcr_joint,
}
"""Of the releases."""

MULTITASK: Mapping[str, Callable[[], MultitaskConfig]] = {
    **{f"{model}-multitask-scenes": partial(on_scenes, model) for model in models.names()},
    **PUBLISHED,
}
