"""VL-BERT's fine-tuning: published, VQA on stored features, RefCOCO+ and VCR with its region extractor trained jointly;
and ours on drawn scenes with a small extractor.

Rates are the release's `LR` times the examples of an update, over all GPUs and micro-batches. The paper's own numbers
could not be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from visling import models
from visling.recipes import scenes
from visling.recipes.configs import FinetuneConfig
from visling.train.config import TrainConfig
from visling.train.optim import OptimConfig
from visling.vision.end_to_end import PRESETS as EXTRACTORS
from visling.vision.end_to_end import ExtractorConfig

TEXT_LIMIT: Mapping[str, Any] = {"encoder.max_tokens": "no limit"}
REFCOCO_PLUS: Mapping[str, Any] = {
    **TEXT_LIMIT,
    "encoder.max_regions": "no limit",
    "batches": "of pictures that are all wide or all high (aspect-ratio grouping)",
    "labels": "overlaps are computed in the scaled picture, where the pixel that is added to every extent is smaller",
    "validation": "an overlap has to exceed 0.5; its script for the test sets, and this recipe, accept 0.5",
}
VCR: Mapping[str, str] = {
    "pictures": "padded to 600 x 1200 pixels, or 1200 x 600, also where no picture of the batch is as large",
    "pooler": "starts from BERT's; in a folder that was converted from a released file it is randomly initialised",
    "names of people": "go on where the last question stopped, so that they differ at every visit, in validation too",
}


def vlbert_base_vqa() -> FinetuneConfig:
    """VL-BERT base on VQA v2 as released: binary cross-entropy over 3,129 answers, batch 256, 1.6e-4, 5 epochs.

    Features are stored, of 10 to 100 regions. The answers are those of the release, read from the file that
    `task_settings.answers` names; each starts from its word vectors. Trained on train2014 and val2014; val2014 chooses
    the best epoch, so it was seen.

    Source:
        cfgs/vqa/base_4x16G_fp32.yaml: 4 GPUs x 64, LR 6.25e-7.
    """
    return _vqa("base", batch_size=256, accumulation=1)


def vlbert_large_vqa() -> FinetuneConfig:
    """VL-BERT large on VQA v2 as released: as vlbert-base-vqa, in four micro-batches.

    Source:
        cfgs/vqa/large_4x16G_fp32.yaml: 4 GPUs x 16 x 4.
    """
    return _vqa("large", batch_size=64, accumulation=4)


def _vqa(size: str, *, batch_size: int, accumulation: int) -> FinetuneConfig:
    return FinetuneConfig(
        recipe=f"vlbert-{size}-vqa",
        model="vlbert",
        encoder=models.spec("vlbert").presets[f"{size}_vqa"],
        task="vqa",
        task_settings={"min_count": None},
        batch_size=batch_size,
        train_split="train+val",
        valid_split="val",
        flip=0.5,
        start=f"vlbert-{size}-prec",
        train=_train(epochs=5, **_accumulate(accumulation), optim=_adamw(lr=6.25e-7 * 256, warmup_steps=500)),
        release={
            **TEXT_LIMIT,
            "validation": "the mean of the scores of the predicted answers among the listed ones; here the official "
            "script's accuracy",
        },
    )


def vlbert_base_refcoco_plus() -> FinetuneConfig:
    """VL-BERT base on RefCOCO+ as released, among detections: AdamW 2.56e-5, 2 x 16 sentences per update, 20 epochs.

    The network that computes the features is trained jointly. `--store` holds MAttNet's detections followed by the
    annotated boxes, `--valid-store` the detections alone; only their boxes are read.

    Source:
        cfgs/refcoco/base_detected_regions_4x16G.yaml: 4 GPUs x 4 x 2, LR 8e-7, boxes "proposal+gt" in training,
            "proposal" in validation and test.
    """
    return _refcoco_plus("base", annotated=False, batch_size=16, accumulation=2)


def vlbert_base_refcoco_plus_gt() -> FinetuneConfig:
    """VL-BERT base on RefCOCO+ as released, among the annotated boxes of the image.

    As vlbert-base-refcoco+, but `--store` holds COCO's annotated boxes, for training and validation.

    Source:
        cfgs/refcoco/base_gt_boxes_4x16G.yaml.
    """
    return _refcoco_plus("base", annotated=True, batch_size=16, accumulation=2)


def vlbert_large_refcoco_plus() -> FinetuneConfig:
    """VL-BERT large on RefCOCO+ as released, among detections: as vlbert-base-refcoco+, 4 x 8 sentences per update.

    Source:
        cfgs/refcoco/large_detected_regions_4x16G.yaml: 4 GPUs x 2 x 4.
    """
    return _refcoco_plus("large", annotated=False, batch_size=8, accumulation=4)


def vlbert_large_refcoco_plus_gt() -> FinetuneConfig:
    """VL-BERT large on RefCOCO+ as released, among the annotated boxes of the image.

    As vlbert-large-refcoco+, but `--store` holds COCO's annotated boxes, for training and validation.

    Source:
        cfgs/refcoco/large_gt_boxes_4x16G.yaml.
    """
    return _refcoco_plus("large", annotated=True, batch_size=8, accumulation=4)


def _refcoco_plus(size: str, *, annotated: bool, batch_size: int, accumulation: int) -> FinetuneConfig:
    return FinetuneConfig(
        recipe=f"vlbert-{size}-refcoco+{'-gt' if annotated else ''}",
        model="vlbert",
        encoder=models.spec("vlbert").presets[f"{size}_refcoco"],
        task="referring",
        task_settings={"dataset": "refcoco+", "rule": "inclusive"},
        batch_size=batch_size,
        extractor=EXTRACTORS["resnet101"],
        flip=0.5,
        start=f"vlbert-{size}-e2e",
        train=_train(epochs=20, **_accumulate(accumulation), optim=_adamw(lr=8e-7 * 32, warmup_steps=3750)),
        release=REFCOCO_PLUS,
    )


def vlbert_base_vcr() -> FinetuneConfig:
    """VL-BERT base on VCR's answers as released: SGD 4.48e-3, 4 x 16 questions per update, 20 epochs.

    The rate falls to a tenth after 14 and after 18 epochs. The network that computes the features is trained jointly on
    pictures of at most 600 x 1200 pixels, whose regions are the annotated objects under their masks. The classes of all
    regions are predicted too. Words stay as they are where a picture is mirrored.

    Source:
        cfgs/vcr/base_q2a_4x16G_fp32.yaml: 4 GPUs x 4 x 4, LR 7e-5.
    """
    return _vcr("base", "answer")


def vlbert_base_vcr_rationale() -> FinetuneConfig:
    """VL-BERT base on VCR's rationales as released: as vlbert-base-vcr, given question and right answer.

    Source:
        cfgs/vcr/base_qa2r_4x16G_fp32.yaml.
    """
    return _vcr("base", "rationale")


def vlbert_large_vcr() -> FinetuneConfig:
    """VL-BERT large on VCR's answers as released: as vlbert-base-vcr, 64 questions at once, in half precision.

    Source:
        cfgs/vcr/large_q2a_16x16G_fp16.yaml: 16 GPUs x 4. large_q2a_4x16G_fp16.yaml has 4 GPUs x 4 x 4.
    """
    return _vcr("large", "answer")


def vlbert_large_vcr_rationale() -> FinetuneConfig:
    """VL-BERT large on VCR's rationales as released: as vlbert-large-vcr, given question and right answer.

    Source:
        cfgs/vcr/large_qa2r_16x16G_fp16.yaml: 16 GPUs x 4. large_qa2r_4x16G_fp16.yaml has 4 GPUs x 4 x 4.
    """
    return _vcr("large", "rationale")


def _vcr(size: str, phase: str) -> FinetuneConfig:
    large = size == "large"
    optim = OptimConfig(
        name="sgd",
        lr=7e-5 * 64,
        momentum=0.9,
        weight_decay=1e-4,
        no_decay=(),
        clip="global",
        clip_norm=10.0,
        schedule="warmup_constant",
        warmup_steps=1000,
        drop_epochs=(14.0, 18.0),
        drop_factor=0.1,
        evaluate="after",
    )
    return FinetuneConfig(
        recipe=f"vlbert-{size}-vcr{'' if phase == 'answer' else '-rationale'}",
        model="vlbert",
        encoder=models.spec("vlbert").presets[f"{size}_vcr"],
        task="vcr",
        task_settings={"phase": phase},
        batch_size=64 if large else 16,
        extractor=EXTRACTORS["resnet101_vcr"],
        flip=0.5,
        swap_sides=False,
        start=f"vlbert-{size}-e2e",
        train=_train(epochs=20, **_accumulate(1 if large else 4), precision="bf16" if large else "fp32", optim=optim),
        release={
            **VCR,
            **({"train.precision": "fp16"} if large else {}),
            **({} if phase == "answer" else {"test texts": "not cut, however long"}),
        },
    )


SCENES_EXTRACTOR = ExtractorConfig(
    blocks=(1, 1, 1),
    stem_size=16,
    widths=(16, 24, 32, 32),
    dilated=False,
    frozen_stages=0,
    shorter_side=128,
    longer_side=128,
)
"""For drawn scenes of 128 pixels: small enough to be trained from scratch, so that no stage is frozen."""
SCENES_E2E_RATE = 4e-4
"""The rate of the runs on stored features, 1e-3 and more, breaks the network down after some hundred updates
(docs/log.md)."""


def vlbert_vqa_scenes_e2e() -> FinetuneConfig:
    """VL-BERT on questions about drawn scenes, small model end to end.

    As vlbert-vqa-scenes, but a small network computes the features of regions from the pictures (`--images`) and is
    trained jointly, from scratch unless `--init` names a model that has one. The store gives the boxes alone.
    """
    return _end_to_end_on_scenes("vqa")


def vlbert_referring_scenes_e2e() -> FinetuneConfig:
    """VL-BERT on expressions about drawn scenes, small model end to end.

    As vlbert-referring-scenes, but a small network computes the features of regions from the pictures (`--images`) and
    is trained jointly, from scratch unless `--init` names a model that has one. The store gives the boxes alone.
    """
    return _end_to_end_on_scenes("referring")


def _end_to_end_on_scenes(task: str) -> FinetuneConfig:
    run = scenes.on_scenes("vlbert", task)
    return replace(
        run,
        recipe=f"{run.recipe}-e2e",
        encoder=reading_network(run.encoder),
        any_features=False,
        extractor=SCENES_EXTRACTOR,
        train=replace(run.train, optim=scenes.small_optimiser(SCENES_E2E_RATE)),
    )


def reading_network(encoder: Any) -> Any:
    """VL-BERT's config for features that the network for scenes computes while it is trained."""
    return replace(encoder, feature_size=SCENES_EXTRACTOR.feature_size, whiten_features=False, masks_features=False)


def _adamw(*, lr: float, warmup_steps: int) -> OptimConfig:
    """As in pre-training, but clipped at 1."""
    return OptimConfig(
        name="release_adamw",
        lr=lr,
        betas=(0.9, 0.999),
        eps=1e-6,
        bias_correction=True,
        weight_decay=1e-4,
        no_decay=(),
        clip="global",
        clip_norm=1.0,
        schedule="triangle",
        warmup_steps=warmup_steps,
        evaluate="after",
    )


def _accumulate(batches: int) -> dict[str, Any]:
    """Settings of updates of several micro-batches, whose means the release averages."""
    return {"accumulation": batches, **({"normalise": "micro_steps"} if batches > 1 else {})}


_train = partial(TrainConfig, seed=12345, metric="accuracy", direction="max", keep=("best", "epochs"))


FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {
    "vlbert-base-vqa": vlbert_base_vqa,
    "vlbert-large-vqa": vlbert_large_vqa,
    "vlbert-base-refcoco+": vlbert_base_refcoco_plus,
    "vlbert-base-refcoco+-gt": vlbert_base_refcoco_plus_gt,
    "vlbert-large-refcoco+": vlbert_large_refcoco_plus,
    "vlbert-large-refcoco+-gt": vlbert_large_refcoco_plus_gt,
    "vlbert-base-vcr": vlbert_base_vcr,
    "vlbert-base-vcr-rationale": vlbert_base_vcr_rationale,
    "vlbert-large-vcr": vlbert_large_vcr,
    "vlbert-large-vcr-rationale": vlbert_large_vcr_rationale,
}

SCENES: Mapping[str, Callable[[], FinetuneConfig]] = {
    "vlbert-vqa-scenes-e2e": vlbert_vqa_scenes_e2e,
    "vlbert-referring-scenes-e2e": vlbert_referring_scenes_e2e,
}
"""Of ours, on drawn scenes."""
