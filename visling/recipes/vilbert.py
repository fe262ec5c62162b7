"""ViLBERT's published pre-training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from visling import models
from visling.data.batches.masking import REGION_RELEASES, TOKEN_RELEASES
from visling.data.corpora.base import Corpus
from visling.objectives.masked_regions import RELEASES as REGION_LOSSES
from visling.recipes.configs import BERT_BASE, PretrainConfig
from visling.train.config import TrainConfig
from visling.train.optim import OptimConfig

_VILBERT_NO_DECAY: Mapping[str, Any] = {
    "weight_decay": 0.01,
    "no_decay": ("bias", "norm"),
    # bias, LayerNorm.bias, LayerNorm.weight: biOutput.LayerNorm1.weight and LayerNorm2.weight are none of these
    "no_decay_except": ("text_attention.norm.weight", "region_attention.norm.weight"),
}


def vilbert_conceptual() -> PretrainConfig:
    """ViLBERT on Conceptual Captions as first released: batch 512, 1e-4 and a tenth of it for what starts from BERT, 10
    epochs.

    Source:
        vilbert_beta, train_concap.py and the README's command with bert_base_6layer_6conect.json.
    """
    optim = OptimConfig(
        name="bert_adam",
        lr=1e-4,
        betas=(0.9, 0.999),
        eps=1e-6,
        **_VILBERT_NO_DECAY,
        swap_decay=True,
        # the names in config/bert-base-uncased_weight_name.json; BERT's prediction head is not among them
        rates={"encoder.embeddings.": 0.1, "encoder.text_norm.": 0.1, "encoder.text_layers.": 0.1},
        clip="per_tensor",
        clip_norm=1.0,
        schedule="warmup_linear",
        warmup_share=0.1,
        evaluate="before",
    )
    return _vilbert(
        "vilbert-conceptual",
        "vilbert",
        optim,
        paper={
            "batch_size": "512 over 8 devices together (recalled)",
            "regions": "10 to 36 above a threshold of the detector",
        },
        release={"batch_size": "512 for every process"},
    )


def vilbert_multitask() -> PretrainConfig:
    """ViLBERT on Conceptual Captions as the multi-task release runs it for 12-in-1: batch 512, AdamW 1e-4 for
    everything, 10 epochs.

    Pairs that do not match teach no words and no regions (`--objective 1`). The training on twelve tasks that follows
    is no pre-training.

    Source:
        vilbert-multi-task, train_concap.py and the README's command.
    """
    optim = OptimConfig(
        name="release_adamw",
        lr=1e-4,  # a tenth for BERT's weights is meant, but the names that it asks for never match
        betas=(0.9, 0.98),
        eps=1e-8,
        bias_correction=True,
        **_VILBERT_NO_DECAY,
        clip="none",
        schedule="warmup_linear",
        warmup_share=0.1,
        evaluate="after",
    )
    run = _vilbert(
        "vilbert-multitask",
        "vilbert-multitask",
        optim,
        paper={
            "region_masking.hide_overlapping": True
        },  # 12-in-1, recalled; the code only counts them in the whole-image feature
    )
    return replace(run, corpora=(Corpus(kind="vilbert_captions", keep_above=False),))


def _vilbert(
    name: str, masking: str, optim: OptimConfig, *, paper: Mapping[str, Any], release: Mapping[str, Any] | None = None
) -> PretrainConfig:
    return PretrainConfig(
        recipe=name,
        model="vilbert",
        encoder=models.spec("vilbert").presets["connect6"],
        corpora=(Corpus(kind="vilbert_captions"),),
        objectives={"masked_lm": 1.0, "matching": 1.0, "masked_regions": 1.0},
        masking=TOKEN_RELEASES[masking],
        region_masking=REGION_RELEASES[masking],
        region_losses=REGION_LOSSES["vilbert"],
        batch_size=512,
        start=BERT_BASE,
        train=TrainConfig(epochs=10, seed=42, optim=optim),
        paper=paper,
        release=release or {},
    )


PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {
    "vilbert-conceptual": vilbert_conceptual,
    "vilbert-multitask": vilbert_multitask,
}
