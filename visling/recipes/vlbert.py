"""VL-BERT's published pre-training; its fine-tuning is in `vlbert_tasks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from visling import models
from visling.data.batches.masking import RegionMasking, TokenMasking
from visling.data.corpora.base import Corpus
from visling.objectives.masked_regions import RegionLosses
from visling.recipes import scenes, vlbert_tasks
from visling.recipes.configs import BERT_BASE, BERT_LARGE, FinetuneConfig, PretrainConfig
from visling.train.config import TrainConfig
from visling.train.optim import OptimConfig
from visling.vision.end_to_end import PRESETS as EXTRACTORS

TOKEN_MASKING = TokenMasking(whole_word=True, in_turn=True)
REGION_MASKING = RegionMasking(learned=True, whole="visible")
REGION_LOSSES = RegionLosses(classes="cross_entropy")


def vlbert_base_prec() -> PretrainConfig:
    """VL-BERT base on precomputed features, as released: captions and plain text one to one, 2.56e-5, 10 epochs.

    Source:
        cfgs/pretrain/base_prec_4x16G_fp32.yaml: 4 GPUs x (32 captions + 32 passages), LR 1e-7 x 256.
    """
    return _vlbert("vlbert-base-prec", "base_prec", BERT_BASE)


def vlbert_base_prec_without_text() -> PretrainConfig:
    """VL-BERT base on precomputed features, captions alone: batch 256, 2.56e-5, half the warm-up, 10 epochs.

    Source:
        cfgs/pretrain/base_prec_withouttextonly_4x16G_fp32.yaml: 4 GPUs x 64 captions; paper, ablation without the text
            corpus.
    """
    run = _vlbert("vlbert-base-prec-without-text", "base_prec", BERT_BASE)
    train = replace(run.train, optim=replace(run.train.optim, warmup_steps=8000))
    return replace(run, corpora=(Corpus(kind="conceptual_captions"),), batch_size=256, train=train)


def vlbert_large_prec() -> PretrainConfig:
    """VL-BERT large on precomputed features, as released: as vlbert-base-prec, in half precision.

    Source:
        cfgs/pretrain/large_prec_4x16G_fp16.yaml.
    """
    run = _vlbert("vlbert-large-prec", "large_prec", BERT_LARGE)
    return replace(run, train=replace(run.train, precision="bf16"), release={**run.release, "train.precision": "fp16"})


def vlbert_base_e2e() -> PretrainConfig:
    """VL-BERT base end to end, as released: the network that computes the features is trained jointly.

    Masked regions are cut out of the image. The network starts from a detector of Visual Genome as a plain ResNet
    (`--backbone`), the Transformer from BERT (`--init`).

    Source:
        cfgs/pretrain/base_e2e_16x16G_fp16.yaml: 16 GPUs x (8 captions + 8 passages), LR 1e-7 x 256; paper, section 4.1.
    """
    return _end_to_end(_vlbert("vlbert-base-e2e", "base_e2e", BERT_BASE))


def vlbert_large_e2e() -> PretrainConfig:
    """VL-BERT large end to end, as released: as vlbert-base-e2e, in two micro-batches.

    Source:
        cfgs/pretrain/large_e2e_16x16G_fp16.yaml: 16 GPUs x (4 captions + 4 passages) x 2.
    """
    run = _end_to_end(_vlbert("vlbert-large-e2e", "large_e2e", BERT_LARGE))
    return replace(run, batch_size=64, train=replace(run.train, accumulation=2, normalise="micro_steps"))


def _end_to_end(run: PretrainConfig) -> PretrainConfig:
    """A run whose features are computed by a network that is trained jointly, in half precision."""
    return replace(
        run,
        extractor=EXTRACTORS["resnet101"],
        train=replace(run.train, precision="bf16"),
        paper={name: value for name, value in run.paper.items() if name != "features"},
        release={"pictures": "one that cannot be read is shown in the mean colour", "train.precision": "fp16"},
    )


def _vlbert(name: str, preset: str, start: str) -> PretrainConfig:
    optim = OptimConfig(
        name="release_adamw",
        lr=1e-7 * 256,  # LR times all examples of a step, captions and passages
        betas=(0.9, 0.999),
        eps=1e-6,
        bias_correction=True,
        weight_decay=1e-4,
        no_decay=(),
        clip="global",
        clip_norm=10.0,
        schedule="triangle",
        warmup_steps=16_000,
        evaluate="after",
    )
    return PretrainConfig(
        recipe=name,
        model="vlbert",
        encoder=models.spec("vlbert").presets[preset],
        corpora=(Corpus(kind="conceptual_captions"), Corpus(kind="text")),
        objectives={"masked_lm": 1.0, "masked_regions": 1.0},
        masking=TOKEN_MASKING,
        region_masking=REGION_MASKING,
        region_losses=REGION_LOSSES,
        flip=0.5,  # of the boxes; features and captions stay as they are
        batch_size=128,
        start=start,
        train=TrainConfig(
            epochs=10,
            seed=12345,
            metric="masked_lm_accuracy",
            direction="max",
            keep=("best", "epochs"),
            optim=optim,
        ),
        paper={
            "region_losses.classes": "hard",  # the detector's best class
            "features": "computed by a Fast R-CNN that is trained jointly, masked regions cut out of the image",
            "devices": "16 V100, 250,000 updates",
        },
    )


def vlbert_scenes() -> PretrainConfig:
    """VL-BERT on drawn scenes: masked words, and the class distribution of masked regions by cross-entropy.

    There is no matching. The release weighs both objectives alike and masks regions three times as often; here the
    model first has to learn which word belongs to which region, and masked regions do not teach that.
    """
    run = scenes.slower(scenes.on_captions("vlbert", wrong=None))
    return replace(
        run,
        objectives={**run.objectives, "masked_regions": 0.1},
        region_masking=replace(REGION_MASKING, rate=scenes.FEW_REGIONS),
        region_losses=REGION_LOSSES,
        release={
            **scenes.MASKED_IN_RELEASES,
            "objectives.masked_regions": 1.0,
            "data": "passages of text in addition to the captions, one to one",
        },
    )


def vlbert_scenes_e2e() -> PretrainConfig:
    """VL-BERT on drawn scenes, small model end to end.

    As vlbert-scenes, but a small network computes the features of regions from the pictures (`--images`) and is trained
    jointly, from scratch; masked regions are cut out of the pictures. The store gives boxes and the detector's classes.
    """
    run = vlbert_scenes()
    return replace(
        run,
        recipe="vlbert-scenes-e2e",
        encoder=vlbert_tasks.reading_network(run.encoder),
        extractor=vlbert_tasks.SCENES_EXTRACTOR,
        train=replace(run.train, optim=replace(run.train.optim, lr=vlbert_tasks.SCENES_E2E_RATE)),
    )


PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {
    "vlbert-base-prec": vlbert_base_prec,
    "vlbert-base-prec-without-text": vlbert_base_prec_without_text,
    "vlbert-large-prec": vlbert_large_prec,
    "vlbert-base-e2e": vlbert_base_e2e,
    "vlbert-large-e2e": vlbert_large_e2e,
}

FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = vlbert_tasks.FINETUNING

SCENES_FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = vlbert_tasks.SCENES

SCENES: Mapping[str, Callable[[], PretrainConfig]] = {
    "vlbert-scenes": vlbert_scenes,
    "vlbert-scenes-e2e": vlbert_scenes_e2e,
}
"""Of ours, on drawn scenes."""
