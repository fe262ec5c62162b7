"""ViLBERT's published fine-tuning, of both releases.

The multi-task release trains each of its tasks by the same numbers alone and together with the others: `TASKS` holds
them once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from visling import models
from visling.models.vilbert import VilbertConfig
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
