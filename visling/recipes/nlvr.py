"""NLVR on its own drawn images: pre-training on generated panels, fine-tuning on human sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from visling import models
from visling.data.batches.masking import TokenMasking
from visling.data.corpora.base import Corpus
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.recipes.scenes import SORTED_TOGETHER, small_optimiser
from visling.train.config import TrainConfig


def visualbert_panels() -> PretrainConfig:
    """Masked words of captions of drawn NLVR panels, the first step towards visualbert-nlvr.

    It teaches which word belongs to which item; easy panels described in plain words serve best.
    """
    return PretrainConfig(
        recipe="visualbert-panels",
        model="visualbert",
        encoder=models.spec("visualbert").presets["nlvr"],
        any_features=True,
        corpora=(Corpus(kind="captions"),),
        objectives={"masked_lm": 1.0},
        masking=TokenMasking(rate=0.4),
        batch_size=32,
        sort_by_length=SORTED_TOGETHER,
        train=TrainConfig(epochs=3, precision="auto", log_every=200, save_every=2000, optim=small_optimiser(2e-3)),
    )


def visualbert_nlvr() -> PretrainConfig:
    """VisualBERT's task-specific phase for NLVR: masked words of captions, and is a statement true.

    It runs on drawn panels, then on NLVR's sentences too. The release masks words of the very statement it judges. NLVR
    shows each sentence with images it is true of and as many it is false of, so masked words cannot be predicted from
    the image and the label is a guess: nothing was learnt that way (docs/log.md). Here words are masked in captions,
    and statements are judged with every word visible.
    """
    return PretrainConfig(
        recipe="visualbert-nlvr",
        model="visualbert",
        encoder=models.spec("visualbert").presets["nlvr"],
        any_features=True,
        corpora=(Corpus(kind="captions", weight=0.4), Corpus(kind="unmasked_statements")),
        objectives={"masked_lm": 1.0, "matching": 1.0},
        masking=TokenMasking(rate=0.4),
        batch_size=64,
        sort_by_length=SORTED_TOGETHER,
        train=TrainConfig(epochs=4, precision="auto", save_every=2000, log_every=200, optim=small_optimiser(1e-3)),
    )


def visualbert_nlvr_tuned() -> FinetuneConfig:
    """NLVR v1's development split, from the PNGs; part of its presentations is held out to choose the best epoch."""
    return FinetuneConfig(
        recipe="visualbert-nlvr",
        model="visualbert",
        encoder=models.spec("visualbert").presets["nlvr"],
        any_features=True,
        task="nlvr",
        sort_by_length=SORTED_TOGETHER,
        train_split="dev.train",
        valid_split="dev.held",
        train=TrainConfig(epochs=6, precision="auto", metric="accuracy", direction="max", optim=small_optimiser(1e-4)),
    )


PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {
    "visualbert-panels": visualbert_panels,
    "visualbert-nlvr": visualbert_nlvr,
}

FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {"visualbert-nlvr": visualbert_nlvr_tuned}
