"""The tasks of ViLBERT's multi-task release, each trained alone from the pre-trained model.

The release trains a task by the same numbers alone and together with the others: `TASKS` holds them once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from visling import models
from visling.models.vilbert import VilbertConfig
from visling.recipes.configs import FinetuneConfig
from visling.train.config import TrainConfig
from visling.train.optim import OptimConfig

HEAD_RATE = 1e-4
"""Rate of answer heads in both releases, whatever the rate of the rest."""

NO_DECAY: Mapping[str, Any] = {
    "weight_decay": 0.01,
    "no_decay": ("bias", "norm"),
    # bias, LayerNorm.bias, LayerNorm.weight: biOutput.LayerNorm1.weight and LayerNorm2.weight are none of these
    # Nor is vil_prediction.logit_fc.2.weight, the norm inside the multi-task release's answer heads
    "no_decay_except": (
        "text_attention.norm.weight",
        "region_attention.norm.weight",
        "heads.classify.norm.weight",
        "heads.pair.norm.weight",
    ),
}
"""What both releases mean to decay, by the patterns that they look for."""

ANNOTATED_BOXES: Mapping[str, str] = {
    "training regions": "the annotated boxes of an image follow the detected ones, as far as there is room; so they do "
    "here if --store has both, and --valid-store the detected ones"
}
VCR_REGIONS: Mapping[str, str] = {
    "regions": "the annotated objects follow the detected regions, of which as many are left out as do not fit",
    "names of people": "drawn from unisex_names_table.csv, which task_settings.name_table names; here from R2C's "
    "neutral names",
}
RETRIEVAL_SPLITS: Mapping[str, Any] = {"valid_images": 100}
"""To rank all captions of 1,000 images takes five million pairs."""
FOUR_ALTERNATIVES: Mapping[str, Any] = {
    "valid_split": "test",
    "valid_images": "all; scored is the choice among four alternatives that are drawn at random",
}


@dataclass(frozen=True, kw_only=True)
class MultitaskTask:
    """A task of the multi-task release: an entry of its vilbert_tasks.yml."""

    number: int
    """In that file; with task tokens also the row of the task's own vector."""
    task: str
    """Module of `visling.tasks`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the task, where they differ from its defaults for the family."""
    max_tokens: int
    """Longest text row, without the task's own token (release: `max_seq_length`)."""
    max_regions: int = 100
    """Regions of an image, the whole image not counted (release: `max_region_num`, which counts it)."""
    batch_size: int
    lr: float
    """Rate of everything except the heads in `head_rates`."""
    epochs: int = 20
    train_split: str = "train"
    valid_split: str = "val"
    cleaned: Mapping[str, str] = field(default_factory=dict)
    """Setting of `FinetuneConfig` -> its value for the training set without the images that other tasks are tested on,
    which the release trains on, also where it trains one task."""

    @property
    def encoder(self) -> VilbertConfig:
        """ViLBERT with six co-attention layers, fed by the numbers of the task; without task tokens."""
        preset: VilbertConfig = models.spec("vilbert").presets["connect6"]
        return replace(preset, max_tokens=self.max_tokens, max_regions=self.max_regions)

    @property
    def head_rates(self) -> Mapping[str, float]:
        """Factors of `lr`: parameters called `vil_...` have a rate of their own; the scores of regions are
        `vision_logit`."""
        return {} if self.task == "referring" else {"heads.": HEAD_RATE / self.lr}


def _referring(number: int, dataset: str) -> MultitaskTask:
    return MultitaskTask(
        number=number,
        task="referring",
        settings={"dataset": dataset},
        max_tokens=20,
        batch_size=256,
        lr=2e-5,
        cleaned={"without_images": "coco_test_ids.npy"},
    )


TASKS: Mapping[str, MultitaskTask] = {
    "vqa": MultitaskTask(
        number=1,
        task="vqa",
        settings={"min_count": None},
        max_tokens=23,
        batch_size=128,
        lr=4e-5,
        train_split="train+nominval",
        valid_split="minval",
        cleaned={"without_images": "coco_test_ids.npy"},
    ),
    "vcr": MultitaskTask(
        number=5, task="vcr", settings={"cut": "second"}, max_tokens=60, batch_size=64, lr=2e-5, epochs=10
    ),
    "vcr-rationale": MultitaskTask(
        number=6,
        task="vcr",
        settings={"phase": "rationale", "cut": "second"},
        max_tokens=80,
        batch_size=64,
        lr=2e-5,
        epochs=10,
    ),
    "retrieval-coco": MultitaskTask(
        number=7,
        task="retrieval",
        settings={"image_field": "id"},
        max_tokens=30,
        batch_size=128,
        lr=2e-5,
        cleaned={"without_images": "coco_test_ids.npy"},
    ),
    "retrieval": MultitaskTask(
        number=8, task="retrieval", max_tokens=30, batch_size=128, lr=2e-5, cleaned={"train_split": "train_clean"}
    ),
    "refcoco": _referring(9, "refcoco"),
    "refcoco+": _referring(10, "refcoco+"),
    "refcocog": _referring(11, "refcocog"),
    "nlvr2": MultitaskTask(number=12, task="nlvr2", max_tokens=40, batch_size=64, lr=2e-5, valid_split="dev"),
    "gqa": MultitaskTask(
        number=15,
        task="gqa",
        settings={"min_count": None},
        max_tokens=26,
        batch_size=128,
        lr=4e-5,
        train_split="trainval",
        valid_split="minval",
        cleaned={"train_split": "trainval_clean"},
    ),
}
"""The tasks of the multi-task release that are offered here, in its order.

Source:
    vilbert-multi-task, vilbert_tasks.yml; the rates of heads from train_tasks.py.
"""


def multitask_optim(lr: float, head_rates: Mapping[str, float]) -> OptimConfig:
    """AdamW without bias correction or clipping; warm-up over a tenth, then linear to 0 (`--lr_scheduler
    warmup_linear` of the README's commands)."""
    return OptimConfig(
        name="release_adamw",
        lr=lr,
        betas=(0.9, 0.999),
        eps=1e-6,
        bias_correction=False,
        **NO_DECAY,
        rates=head_rates,
        clip="none",
        schedule="warmup_linear",
        warmup_share=0.1,
        evaluate="before",
    )


def multitask_vqa() -> FinetuneConfig:
    """ViLBERT on VQA v2 as in the multi-task release, alone: batch 128, AdamW 4e-5 (head 1e-4), 20 epochs.

    The answers are the 3,129 of the release, read from the file that `task_settings.answers` names.

    Source:
        vilbert-multi-task, train_tasks.py and vilbert_tasks.yml (TASK1).
    """
    return _alone("vqa")


def multitask_gqa() -> FinetuneConfig:
    """ViLBERT on GQA as in the multi-task release, alone: batch 128, AdamW 4e-5 (head 1e-4), 20 epochs.

    The answers are the 1,533 of the release, read from the file that `task_settings.answers` names. Trains on the
    balanced questions of train and val except for the last 3,000 by id, which validate.

    Source:
        vilbert-multi-task, train_tasks.py and vilbert_tasks.yml (TASK15).
    """
    return _alone("gqa")


def multitask_nlvr2() -> FinetuneConfig:
    """ViLBERT on NLVR2 as in the multi-task release, alone: batch 64, AdamW 2e-5 (head 1e-4), 20 epochs.

    A row for each of the two images, which the head joins; binary cross-entropy of both outputs.

    Source:
        vilbert-multi-task, train_tasks.py and vilbert_tasks.yml (TASK12).
    """
    return _alone("nlvr2")


def multitask_retrieval() -> FinetuneConfig:
    """ViLBERT on Flickr30K retrieval as in the multi-task release, alone: batch 128, AdamW 2e-5 (head 1e-4), 20 epochs.

    The right pair against three wrong ones. Validated on the captions of 100 images.

    Source:
        vilbert-multi-task, train_tasks.py and vilbert_tasks.yml (TASK8).
    """
    return _alone("retrieval", splits=RETRIEVAL_SPLITS, release=FOUR_ALTERNATIVES)


def multitask_retrieval_coco() -> FinetuneConfig:
    """ViLBERT on COCO retrieval as in the multi-task release, alone: batch 128, AdamW 2e-5 (head 1e-4), 20 epochs.

    The right pair against three wrong ones. Validated on the captions of 100 images.

    Source:
        vilbert-multi-task, train_tasks.py and vilbert_tasks.yml (TASK7).
    """
    return _alone("retrieval-coco", splits=RETRIEVAL_SPLITS, release=FOUR_ALTERNATIVES)


def multitask_refcoco() -> FinetuneConfig:
    """ViLBERT on RefCOCO as in the multi-task release, alone: batch 256, AdamW 2e-5, 20 epochs.

    The model learns the overlaps of the regions with the object.

    Source:
        vilbert-multi-task, train_tasks.py and vilbert_tasks.yml (TASK9).
    """
    return _alone("refcoco", release=ANNOTATED_BOXES)


def multitask_refcoco_plus() -> FinetuneConfig:
    """ViLBERT on RefCOCO+ as in the multi-task release, alone: batch 256, AdamW 2e-5, 20 epochs.

    The model learns the overlaps of the regions with the object.

    Source:
        vilbert-multi-task, train_tasks.py and vilbert_tasks.yml (TASK10).
    """
    return _alone("refcoco+", release=ANNOTATED_BOXES)


def multitask_refcocog() -> FinetuneConfig:
    """ViLBERT on RefCOCOg as in the multi-task release, alone: batch 256, AdamW 2e-5, 20 epochs.

    The model learns the overlaps of the regions with the object.

    Source:
        vilbert-multi-task, train_tasks.py and vilbert_tasks.yml (TASK11).
    """
    return _alone("refcocog", release=ANNOTATED_BOXES)


def multitask_vcr() -> FinetuneConfig:
    """ViLBERT on VCR's answers as in the multi-task release, alone: batch 64, AdamW 2e-5 (head 1e-4), 10 epochs.

    Source:
        vilbert-multi-task, train_tasks.py and vilbert_tasks.yml (TASK5).
    """
    return _alone("vcr", release=_VCR)


def multitask_vcr_rationale() -> FinetuneConfig:
    """ViLBERT on VCR's rationales as in the multi-task release, alone: batch 64, AdamW 2e-5 (head 1e-4), 10 epochs.

    Source:
        vilbert-multi-task, train_tasks.py and vilbert_tasks.yml (TASK6).
    """
    return _alone("vcr-rationale", release=_VCR)


def training(task: str, epochs: int, optim: OptimConfig) -> TrainConfig:
    """How both releases train a task: a file for every epoch, of which the last is used."""
    return TrainConfig(
        epochs=epochs,
        metric="rsum" if task == "retrieval" else "accuracy",
        direction="max",
        keep=("last", "epochs"),
        optim=optim,
    )


_VCR: Mapping[str, Any] = {
    **VCR_REGIONS,
    "words": "split once more after their pieces were joined by spaces: ##s becomes #, #, s",
    "program": "does not start: its loader passes an argument that the data set does not take",
}


def _alone(
    name: str, *, splits: Mapping[str, Any] | None = None, release: Mapping[str, Any] | None = None
) -> FinetuneConfig:
    """A row of `TASKS` as a run of its own, without task tokens."""
    row = TASKS[name]
    return FinetuneConfig(
        recipe=f"vilbert-multitask-{name}",
        model="vilbert",
        encoder=row.encoder,
        task=row.task,
        task_settings=row.settings,
        batch_size=row.batch_size,
        train_split=row.train_split,
        valid_split=row.valid_split,
        **(splits or {}),
        start="vilbert-multitask",
        train=training(row.task, row.epochs, multitask_optim(row.lr, row.head_rates)),
        release={
            **row.cleaned,
            **(release or {}),
            "updates": "in every fourth iteration only while the validation score stands still (stop-and-go)",
        },
    )


FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {
    "vilbert-multitask-vqa": multitask_vqa,
    "vilbert-multitask-vcr": multitask_vcr,
    "vilbert-multitask-vcr-rationale": multitask_vcr_rationale,
    "vilbert-multitask-retrieval-coco": multitask_retrieval_coco,
    "vilbert-multitask-retrieval": multitask_retrieval,
    "vilbert-multitask-refcoco": multitask_refcoco,
    "vilbert-multitask-refcoco+": multitask_refcoco_plus,
    "vilbert-multitask-refcocog": multitask_refcocog,
    "vilbert-multitask-nlvr2": multitask_nlvr2,
    "vilbert-multitask-gqa": multitask_gqa,
}
