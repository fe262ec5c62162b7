"""NLVR on its own drawn images: pre-training on generated panels, fine-tuning on human sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from visling import models
from visling.data.batches.masking import TokenMasking
from visling.data.corpora.base import Corpus
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.recipes.scenes import SORTED_TOGETHER, small_optimiser
from visling.train.config import TrainConfig


def panels(model: str) -> PretrainConfig:
    """Masked words of captions of drawn NLVR panels, the first step towards the model's recipe nlvr.

    It teaches which word belongs to which item; easy panels described in plain words serve best.
    """
    return PretrainConfig(
        recipe=f"{model}-panels",
        model=model,
        encoder=_small_encoder(model),
        any_features=True,
        corpora=(Corpus(kind="captions"),),
        objectives={"masked_lm": 1.0},
        masking=TokenMasking(rate=0.4),
        batch_size=32,
        sort_by_length=SORTED_TOGETHER,
        train=TrainConfig(epochs=3, precision="auto", log_every=200, save_every=2000, optim=small_optimiser(2e-3)),
    )


def nlvr(model: str) -> PretrainConfig:
    """Task-specific phase for NLVR, an idea of VisualBERT's: masked words of captions, and whether a statement is true.

    It runs on drawn panels, then on NLVR's sentences too. VisualBERT's release masks words of the very statement it
    judges. NLVR shows each sentence with images it is true of and as many it is false of, so masked words cannot be
    predicted from the image and the label is a guess: nothing was learnt that way (docs/log.md). Here words are masked
    in captions, and statements are judged with every word visible.
    """
    return PretrainConfig(
        recipe=f"{model}-nlvr",
        model=model,
        encoder=_small_encoder(model),
        any_features=True,
        corpora=(Corpus(kind="captions", weight=0.4), Corpus(kind="unmasked_statements")),
        objectives={"masked_lm": 1.0, "matching": 1.0},
        masking=TokenMasking(rate=0.4),
        batch_size=64,
        sort_by_length=SORTED_TOGETHER,
        train=TrainConfig(epochs=4, precision="auto", save_every=2000, log_every=200, optim=small_optimiser(1e-3)),
    )


def nlvr_tuned(model: str) -> FinetuneConfig:
    """NLVR v1's development split, from the PNGs; part of its presentations is held out to choose the best epoch."""
    return FinetuneConfig(
        recipe=f"{model}-nlvr",
        model=model,
        encoder=_small_encoder(model),
        any_features=True,
        task="nlvr",
        sort_by_length=SORTED_TOGETHER,
        train_split="dev.train",
        valid_split="dev.held",
        train=TrainConfig(epochs=6, precision="auto", metric="accuracy", direction="max", optim=small_optimiser(1e-4)),
    )


def _small_encoder(model: str) -> Any:
    """VisualBERT has four layers here; the others have the size of their recipes on scenes."""
    presets = models.spec(model).presets
    return presets.get("nlvr", presets["scenes"])


PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {
    **{f"{model}-panels": partial(panels, model) for model in models.names()},
    **{f"{model}-nlvr": partial(nlvr, model) for model in models.names()},
}

FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {
    **{f"{model}-nlvr": partial(nlvr_tuned, model) for model in models.names()},
}
