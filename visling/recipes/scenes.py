"""Small runs of our own, from scratch: on drawn scenes, on drawn panels, and on NLVR's thousand sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from visling import models
from visling.data.batches.masking import REGION_RELEASES, TokenMasking
from visling.data.corpora.base import Corpus
from visling.objectives.masked_regions import RELEASES as REGION_LOSSES
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.train.config import TrainConfig
from visling.train.optim import OptimConfig

_WRONG_CAPTIONS = Corpus(kind="single_captions", weight=0.05)
"""To learn matching from. Half of them are of another image and teach no word of this one, so they are few: a small
model has no time to spare."""


_MATCHING = 0.1
"""Weight of matching, 1 in the releases: a batch has one or two examples to match, and so loud a guess kept ViLBERT
from ever using its poolers."""

_FEW_REGIONS = 0.05
"""Share of regions that are chosen, 0.15 in the releases: a word whose region is hidden cannot be told, and with six
regions an image many are."""

_ELSEWHERE: Mapping[str, Any] = {"masking.rate": 0.15, "region_masking.rate": 0.15}
"""What all releases that hide regions do otherwise."""


def visualbert_scenes() -> PretrainConfig:
    """VisualBERT's COCO phase on drawn scenes: masked words of captions, and caption pairs."""
    run = _on_captions("visualbert", wrong=Corpus(kind="caption_pairs", weight=_WRONG_CAPTIONS.weight))
    return replace(
        run,
        release={
            "masking.rate": 0.15,
            "objectives.matching": 1.0,
            "data": "caption pairs alone, half of the second captions wrong",
        },
    )


def vlbert_scenes() -> PretrainConfig:
    """VL-BERT on drawn scenes: masked words, and the detector's distribution over classes of masked regions, by
    cross-entropy. It matches nothing.

    The release weighs both alike and hides regions three times as often; here words have to be bound to regions first,
    which regions do not teach.
    """
    run = _slower(_on_captions("vlbert", wrong=None))
    return replace(
        run,
        objectives={**run.objectives, "masked_regions": 0.1},
        region_masking=replace(REGION_RELEASES["vlbert"], rate=_FEW_REGIONS),
        region_losses=REGION_LOSSES["vlbert"],
        release={
            **_ELSEWHERE,
            "objectives.masked_regions": 1.0,
            "data": "passages of text beside the captions, one to one",
        },
    )


def vilbert_scenes() -> PretrainConfig:
    """ViLBERT on drawn scenes: masked words, does the caption fit, and the detector's distribution over classes of
    masked regions, by KL divergence.

    The release weighs all alike, hides regions three times as often and shows a wrong caption half of the time.
    """
    run = _slower(_on_captions("vilbert"))
    return replace(
        run,
        objectives={**run.objectives, "masked_regions": 0.1},
        region_masking=replace(REGION_RELEASES["vilbert"], rate=_FEW_REGIONS),
        region_losses=REGION_LOSSES["vilbert"],
        release={
            **_ELSEWHERE,
            "objectives.matching": 1.0,
            "objectives.masked_regions": 1.0,
            "data": "half of all captions are wrong",
        },
    )


def lxmert_scenes() -> PretrainConfig:
    """LXMERT on drawn scenes: masked words, does the sentence fit, classes, attributes and features of regions, and
    answers to training questions.

    The release weighs all alike, hides regions three times as often and reads captions and questions in full. Here
    questions are few: half of them are shown with another image, and those teach no word.
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


def cvlp_scenes() -> PretrainConfig:
    """CVLP on drawn scenes: masked words, does the caption fit, and contrast of each region with those of earlier
    batches.

    The release weighs all alike and queues 30 batches, as here; its key network follows more slowly, over a hundred
    times as many updates.
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


def _on_captions(model: str, *, wrong: Corpus | None = _WRONG_CAPTIONS) -> PretrainConfig:
    """Masked words of captions, and matching if there are texts that do not fit."""
    return PretrainConfig(
        recipe=f"{model}-scenes",
        model=model,
        encoder=models.spec(model).presets["scenes"],
        any_features=True,
        corpora=(Corpus(kind="captions"), *([] if wrong is None else [wrong])),
        objectives={"masked_lm": 1.0} if wrong is None else {"masked_lm": 1.0, "matching": _MATCHING},
        masking=TokenMasking(rate=0.4),
        batch_size=32,
        train=TrainConfig(
            epochs=10, precision="auto", log_every=200, validate_every=5, save_every=2000, optim=small_optimiser(1.5e-3)
        ),
    )


def _slower(run: PretrainConfig) -> PretrainConfig:
    """The run with the rate high for longer, for families that bind words to regions later than VisualBERT: nothing is
    bound once it falls."""
    return replace(run, train=replace(run.train, optim=replace(run.train.optim, decay_share=0.15)))


def vqa_scenes(model: str) -> FinetuneConfig:
    """VQA on drawn scenes, small model; loss and read-out as the family's release."""
    return FinetuneConfig(
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
            optim=small_optimiser(1e-3),
        ),
    )


def small_optimiser(lr: float) -> OptimConfig:
    """For models of width 96 to 192, found by trial (docs/log.md): the rate stays high until words are bound to
    regions, then falls."""
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


PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {
    "visualbert-scenes": visualbert_scenes,
    "vlbert-scenes": vlbert_scenes,
    "vilbert-scenes": vilbert_scenes,
    "lxmert-scenes": lxmert_scenes,
    "cvlp-scenes": cvlp_scenes,
}

FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {
    **{f"{model}-vqa-scenes": partial(vqa_scenes, model) for model in models.names()},
}
