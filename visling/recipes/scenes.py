"""Small runs of our own, from scratch: on drawn scenes, on drawn panels, and on NLVR's thousand sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from visling import models
from visling.data.masking import REGION_RELEASES, TokenMasking
from visling.objectives.masked_regions import RELEASES as REGION_LOSSES
from visling.recipes.plans import Corpus, Finetuning, Pretraining
from visling.train.engine import TrainConfig
from visling.train.optim import OptimConfig

_WRONG_CAPTIONS = Corpus(kind="single_captions", weight=0.05)
"""To learn matching from. Half of them are of another image and teach no word of this one, so they are few: a small model has no time to spare."""


_MATCHING = 0.1
"""Weight of matching, 1 in the releases: a batch has one or two examples to match, and so loud a guess kept ViLBERT from ever using its poolers."""

_FEW_REGIONS = 0.05
"""Share of regions that are chosen, 0.15 in the releases: a word whose region is hidden cannot be told, and with six regions an image many are."""

_ELSEWHERE: Mapping[str, Any] = {"masking.rate": 0.15, "region_masking.rate": 0.15}
"""What all releases that hide regions do otherwise."""


def visualbert_scenes() -> Pretraining:
    """VisualBERT's COCO phase on drawn scenes: masked words of captions, and caption pairs."""
    run = _on_captions("visualbert", wrong=Corpus(kind="caption_pairs", weight=_WRONG_CAPTIONS.weight))
    return replace(run, release={"masking.rate": 0.15, "objectives.matching": 1.0, "data": "caption pairs alone, half of the second captions wrong"})


def vlbert_scenes() -> Pretraining:
    """VL-BERT on drawn scenes: masked words, and the detector's distribution over classes of masked regions, by cross-entropy. It matches nothing.

    The release weighs both alike and hides regions three times as often; here words have to be bound to regions first, which regions do not teach.
    """
    run = _slower(_on_captions("vlbert", wrong=None))
    return replace(
        run,
        objectives={**run.objectives, "masked_regions": 0.1},
        region_masking=replace(REGION_RELEASES["vlbert"], rate=_FEW_REGIONS),
        region_losses=REGION_LOSSES["vlbert"],
        release={**_ELSEWHERE, "objectives.masked_regions": 1.0, "data": "passages of text beside the captions, one to one"},
    )


def vilbert_scenes() -> Pretraining:
    """ViLBERT on drawn scenes: masked words, does the caption fit, and the detector's distribution over classes of masked regions, by KL divergence.

    The release weighs all alike, hides regions three times as often and shows a wrong caption half of the time.
    """
    run = _slower(_on_captions("vilbert"))
    return replace(
        run,
        objectives={**run.objectives, "masked_regions": 0.1},
        region_masking=replace(REGION_RELEASES["vilbert"], rate=_FEW_REGIONS),
        region_losses=REGION_LOSSES["vilbert"],
        release={**_ELSEWHERE, "objectives.matching": 1.0, "objectives.masked_regions": 1.0, "data": "half of all captions are wrong"},
    )


def lxmert_scenes() -> Pretraining:
    """LXMERT on drawn scenes: masked words, does the sentence fit, classes, attributes and features of regions, and answers to training questions.

    The release weighs all alike, hides regions three times as often and reads captions and questions in full. Here questions are few: half of them
    are shown with another image, and those teach no word.
    """
    run = _slower(_on_captions("lxmert"))
    return replace(
        run,
        corpora=(*run.corpora, Corpus(kind="answered_questions", weight=0.2)),
        objectives={**run.objectives, "masked_regions": 0.05, "image_qa": 0.2},
        min_answer_count=1,
        region_masking=replace(REGION_RELEASES["lxmert"], rate=_FEW_REGIONS),
        region_losses=REGION_LOSSES["lxmert"],
        release={
            **_ELSEWHERE,
            "objectives.matching": 1.0,
            "objectives.masked_regions": 1.0,
            "objectives.image_qa": 1.0,
            "min_answer_count": 9,
            "data": "every sentence once, half of them with another image",
        },
    )


def cvlp_scenes() -> Pretraining:
    """CVLP on drawn scenes: masked words, does the caption fit, and contrast of each region with those of earlier batches.

    The release weighs all alike and queues 30 batches, as here; its key network follows more slowly, over a hundred times as many updates.
    """
    run = _slower(_on_captions("cvlp"))
    return replace(
        run,
        objectives={**run.objectives, "region_contrast": 0.1},
        objective_settings={"region_contrast": {"projection_size": 64, "momentum": 0.99, "queue_size": 30 * 32 * 6}},
        region_masking=replace(REGION_RELEASES["cvlp"], rate=_FEW_REGIONS),
        release={
            **_ELSEWHERE,
            "objectives.matching": 1.0,
            "objectives.region_contrast": 1.0,
            "objective_settings.region_contrast.momentum": 0.99995,
            "data": "captions and questions, half of them with another image",
        },
    )


def _on_captions(model: str, *, wrong: Corpus | None = _WRONG_CAPTIONS) -> Pretraining:
    """Masked words of captions, and matching if there are texts that do not fit."""
    return Pretraining(
        recipe=f"{model}-scenes",
        model=model,
        encoder=models.spec(model).presets["scenes"],
        any_features=True,
        corpora=(Corpus(kind="captions"), *([] if wrong is None else [wrong])),
        objectives={"masked_lm": 1.0} if wrong is None else {"masked_lm": 1.0, "matching": _MATCHING},
        masking=TokenMasking(rate=0.4),
        batch_size=32,
        train=TrainConfig(epochs=10, precision="auto", log_every=200, validate_every=5, save_every=2000, optim=_small_optimiser(1.5e-3)),
    )


def _slower(run: Pretraining) -> Pretraining:
    """The run with the rate high for longer, for families that bind words to regions later than VisualBERT: nothing is bound once it falls."""
    return replace(run, train=replace(run.train, optim=replace(run.train.optim, decay_share=0.15)))


def visualbert_panels() -> Pretraining:
    """Masked words of captions of drawn NLVR panels, best of easy ones in plain words. First step towards visualbert-nlvr: words meet items here."""
    return Pretraining(
        recipe="visualbert-panels",
        model="visualbert",
        encoder=models.spec("visualbert").presets["nlvr"],
        any_features=True,
        corpora=(Corpus(kind="captions"),),
        objectives={"masked_lm": 1.0},
        masking=TokenMasking(rate=0.4),
        batch_size=32,
        train=TrainConfig(epochs=3, precision="auto", log_every=200, save_every=2000, optim=_small_optimiser(2e-3)),
    )


def visualbert_nlvr() -> Pretraining:
    """VisualBERT's task-specific phase for NLVR on drawn panels, then on NLVR sentences too: is the statement true, and masked words of captions.

    The release hides words of the very statement it judges. NLVR shows each sentence with pictures it is true of and as many it is false of, so
    hidden words cannot be told from the picture and the label is a guess: nothing was learnt that way (docs/log.md). Here words are hidden in
    captions, and statements are judged with every word shown.
    """
    return Pretraining(
        recipe="visualbert-nlvr",
        model="visualbert",
        encoder=models.spec("visualbert").presets["nlvr"],
        any_features=True,
        corpora=(Corpus(kind="captions", weight=0.4), Corpus(kind="unmasked_statements")),
        objectives={"masked_lm": 1.0, "matching": 1.0},
        masking=TokenMasking(rate=0.4),
        batch_size=64,
        train=TrainConfig(epochs=4, precision="auto", save_every=2000, log_every=200, optim=_small_optimiser(1e-3)),
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
