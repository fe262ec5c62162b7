"""Small runs of our own, from scratch: on drawn scenes, on drawn panels, and on NLVR's thousand sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from visling import models
from visling.data.masking import TokenMasking
from visling.recipes.plans import Corpus, Finetuning, Pretraining
from visling.train.engine import TrainConfig
from visling.train.optim import OptimConfig

_WRONG_CAPTIONS = Corpus(kind="single_captions", weight=0.05)
"""To learn matching from. Half of them are of another image and teach no word of this one, so they are few: a small model has no time to spare."""


def visualbert_scenes() -> Pretraining:
    """VisualBERT's COCO phase on drawn scenes: masked words of captions, and caption pairs."""
    return _on_captions("visualbert", wrong=Corpus(kind="caption_pairs", weight=_WRONG_CAPTIONS.weight))


def vlbert_scenes() -> Pretraining:
    """VL-BERT's captions on drawn scenes: masked words. It has no matching objective."""
    return _on_captions("vlbert", wrong=None)


def vilbert_scenes() -> Pretraining:
    """ViLBERT's captions on drawn scenes: masked words, and does the caption fit."""
    return _on_captions("vilbert")


def lxmert_scenes() -> Pretraining:
    """LXMERT's captions on drawn scenes: masked words, and does the caption fit."""
    return _on_captions("lxmert")


def cvlp_scenes() -> Pretraining:
    """CVLP's captions on drawn scenes: masked words, and does the caption fit."""
    return _on_captions("cvlp")


def _on_captions(model: str, *, wrong: Corpus | None = _WRONG_CAPTIONS) -> Pretraining:
    """Masked words of captions, and matching if there are texts that do not fit."""
    return Pretraining(
        recipe=f"{model}-scenes",
        model=model,
        encoder=models.spec(model).presets["scenes"],
        any_features=True,
        corpora=(Corpus(kind="captions"), *([] if wrong is None else [wrong])),
        objectives={"masked_lm": 1.0} if wrong is None else {"masked_lm": 1.0, "matching": 1.0},
        masking=TokenMasking(rate=0.4),
        batch_size=32,
        train=TrainConfig(epochs=10, precision="auto", log_every=200, validate_every=5, save_every=2000, optim=_small_optimiser(1.5e-3)),
    )


def visualbert_panels() -> Pretraining:
    """VisualBERT's caption phase on drawn NLVR panels: masked words of captions that name every attribute. First step towards visualbert-nlvr."""
    return Pretraining(
        recipe="visualbert-panels",
        model="visualbert",
        encoder=models.spec("visualbert").presets["nlvr"],
        any_features=True,
        corpora=(Corpus(kind="captions"),),
        objectives={"masked_lm": 1.0},
        masking=TokenMasking(rate=0.35),
        batch_size=32,
        train=TrainConfig(epochs=4, precision="auto", log_every=200, save_every=2000, optim=_small_optimiser(2e-3)),
    )


def visualbert_nlvr() -> Pretraining:
    """VisualBERT's task-specific phase for NLVR on drawn panels and NLVR sentences: masked words, and is the statement true.

    The release hides words of the very statement it judges. NLVR shows each sentence with pictures it is true of and as many it is false of, so
    hidden words cannot be told from the picture and the label is a guess: nothing was learnt that way (docs/log.md). Words are hidden in true
    statements, and statements are judged with every word shown.
    """
    return Pretraining(
        recipe="visualbert-nlvr",
        model="visualbert",
        encoder=models.spec("visualbert").presets["nlvr"],
        any_features=True,
        corpora=(Corpus(kind="true_statements"), Corpus(kind="unmasked_statements")),
        objectives={"masked_lm": 1.0, "matching": 1.0},
        masking=TokenMasking(rate=0.25),
        batch_size=64,
        train=TrainConfig(epochs=8, precision="auto", save_every=2000, log_every=200, optim=_small_optimiser(1e-3)),
    )


def vqa_scenes(model: str) -> Finetuning:
    """VQA on drawn scenes, small model; loss and read-out as the family's release."""
    return Finetuning(
        recipe=f"{model}-vqa-scenes",
        model=model,
        encoder=models.spec(model).presets["scenes"],
        any_features=True,
        task="vqa",
        task_settings={"min_count": 1},
        batch_size=32,
        train=TrainConfig(
            epochs=6,
            precision="auto",
            metric="accuracy",
            direction="max",
            log_every=200,
            validate_every=2,
            save_every=2000,
            optim=_small_optimiser(1e-3),
        ),
    )


def visualbert_nlvr_tuned() -> Finetuning:
    """NLVR v1's development split, from the PNGs; part of its presentations is held out to choose the best epoch."""
    return Finetuning(
        recipe="visualbert-nlvr",
        model="visualbert",
        encoder=models.spec("visualbert").presets["nlvr"],
        any_features=True,
        task="nlvr",
        train_split="dev.train",
        valid_split="dev.held",
        train=TrainConfig(epochs=6, precision="auto", metric="accuracy", direction="max", optim=_small_optimiser(1e-4)),
    )


def _small_optimiser(lr: float) -> OptimConfig:
    """For models of width 96 to 192, found by trial (docs/log.md): the rate stays high until words are bound to regions, then falls."""
    return OptimConfig(
        name="adamw", lr=lr, betas=(0.9, 0.98), weight_decay=0.01, schedule="warmup_stable_decay", warmup_share=0.05, decay_share=0.3, clip="global"
    )


PRETRAINING: Mapping[str, Callable[[], Pretraining]] = {
    "visualbert-scenes": visualbert_scenes,
    "vlbert-scenes": vlbert_scenes,
    "vilbert-scenes": vilbert_scenes,
    "lxmert-scenes": lxmert_scenes,
    "cvlp-scenes": cvlp_scenes,
    "visualbert-panels": visualbert_panels,
    "visualbert-nlvr": visualbert_nlvr,
}
FINETUNING: Mapping[str, Callable[[], Finetuning]] = {
    **{f"{model}-vqa-scenes": partial(vqa_scenes, model) for model in models.names()},
    "visualbert-nlvr": visualbert_nlvr_tuned,
}
