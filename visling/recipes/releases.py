"""The published runs at full size, with the numbers of the releases."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from visling import models
from visling.recipes.plans import Corpus, Finetuning, Pretraining
from visling.train.engine import TrainConfig
from visling.train.optim import OptimConfig


def visualbert_coco() -> Pretraining:
    """VisualBERT's COCO phase as released (VQA configuration): caption pairs on COCO, 100 regions of width 2048."""
    return Pretraining(
        recipe="visualbert-coco",
        model="visualbert",
        encoder=models.spec("visualbert").presets["vqa"],
        corpora=(Corpus(kind="caption_pairs"),),
        objectives={"masked_lm": 1.0, "matching": 1.0},
        batch_size=48,
        train=TrainConfig(epochs=10, optim=_visualbert_optimiser(5e-5), patience=3),
    )


def visualbert_vqa_pretraining() -> Pretraining:
    """VisualBERT's task-specific phase for VQA as released: masked words over question and answer."""
    return Pretraining(
        recipe="visualbert-vqa",
        model="visualbert",
        encoder=models.spec("visualbert").presets["vqa"],
        corpora=(Corpus(kind="questions"),),
        objectives={"masked_lm": 1.0},
        batch_size=64,
        train=TrainConfig(epochs=10, optim=_visualbert_optimiser(5e-5), patience=3),
    )


def visualbert_vqa_finetuning() -> Finetuning:
    """VisualBERT on VQA v2 as released: 100 regions of width 2048, KL loss, BertAdam 2e-5, batch 64, 10 epochs."""
    return Finetuning(
        recipe="visualbert-vqa",
        model="visualbert",
        encoder=models.spec("visualbert").presets["vqa"],
        task="vqa",
        batch_size=64,
        train=TrainConfig(
            epochs=10,
            metric="accuracy",
            direction="max",
            patience=3,
            optim=_visualbert_optimiser(2e-5),
        ),
    )


def _visualbert_optimiser(lr: float) -> OptimConfig:
    """VisualBERT release: BertAdam, each tensor clipped by itself, the pooler left out."""
    return OptimConfig(name="bert_adam", lr=lr, clip="per_tensor", clip_norm=1.0, exclude=("pooler",), warmup_share=0.1)


PRETRAINING: Mapping[str, Callable[[], Pretraining]] = {
    "visualbert-coco": visualbert_coco,
    "visualbert-vqa": visualbert_vqa_pretraining,
}
FINETUNING: Mapping[str, Callable[[], Finetuning]] = {"visualbert-vqa": visualbert_vqa_finetuning}
