"""The runs of ViLBERT's single-stream baseline, the rows "Single-Stream" of the paper's table 1.

The release names no command for them: they are ViLBERT's own with `--baseline` and `bert_base_baseline.json`. The rows
without pre-training start from BERT: `--init` names a converted `bert-base-uncased`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from visling import models
from visling.recipes import scenes, vilbert
from visling.recipes.configs import FinetuneConfig, PretrainConfig

MODEL = "vilbert-baseline"


def baseline_conceptual() -> PretrainConfig:
    """ViLBERT's baseline on Conceptual Captions: batch 512, 1e-4 (BERT's weights 1e-5), 10 epochs.

    One BERT over words and regions, with the objectives, masking and optimiser of ViLBERT's first release.

    Source:
        vilbert_beta, train_baseline.py with --from_pretrained and bert_base_baseline.json.
    """
    run = vilbert.vilbert_conceptual()
    optim = replace(
        run.train.optim,
        # the same names as in ViLBERT: not BERT's pooler and prediction heads, which start from BERT too
        rates={"encoder.embeddings.": 0.1, "encoder.norm.": 0.1, "encoder.layers.": 0.1},
    )
    return replace(
        run,
        recipe="vilbert-baseline-conceptual",
        model=MODEL,
        encoder=models.spec(MODEL).presets["base"],
        train=replace(run.train, optim=optim),
        paper={},
        release={
            "program": "stops at the first batch: it calls the heads with four arguments, and they take three",
            "order": run.release["order"],
        },
    )


def baseline_vqa() -> FinetuneConfig:
    """ViLBERT's baseline on VQA v2: 99 regions of width 2048, batch 256, BertAdam 4e-5, 20 epochs.

    The answers are the 3,129 of the release, read from the file that `task_settings.answers` names; the classifier has
    a rate of 1e-4.

    Source:
        vilbert_beta, train_tasks.py with --baseline, vlbert_tasks.yml (TASK0).
    """
    return _of_baseline(vilbert.vilbert_vqa(), "vqa")


def baseline_vcr() -> FinetuneConfig:
    """ViLBERT's baseline on VCR's answers: 99 regions of width 2048, batch 64, BertAdam 2e-5, 20 epochs.

    Source:
        vilbert_beta, train_tasks.py with --baseline, vlbert_tasks.yml (TASK1).
    """
    return _of_baseline(vilbert.vilbert_vcr(), "vcr", max_tokens=60)


def baseline_vcr_rationale() -> FinetuneConfig:
    """ViLBERT's baseline on VCR's rationales: 99 regions of width 2048, batch 64, BertAdam 2e-5, 20 epochs.

    Source:
        vilbert_beta, train_tasks.py with --baseline, vlbert_tasks.yml (TASK2).
    """
    return _of_baseline(vilbert.vilbert_vcr_rationale(), "vcr")


def baseline_refcoco_plus() -> FinetuneConfig:
    """ViLBERT's baseline on RefCOCO+: 99 regions of width 2048, batch 256, BertAdam 4e-5, 20 epochs.

    Source:
        vilbert_beta, train_tasks.py with --baseline, vlbert_tasks.yml (TASK4).
    """
    return _of_baseline(vilbert.vilbert_refcoco_plus(), "referring")


def _of_baseline(run: FinetuneConfig, preset: str, **changes: Any) -> FinetuneConfig:
    """ViLBERT's run with the other encoder, whose main layout is that of the first release."""
    return replace(
        run,
        recipe=run.recipe.replace("vilbert", MODEL),
        model=MODEL,
        encoder=replace(models.spec(MODEL).presets[preset], **changes),
        head_layout=None,
        start="vilbert-baseline-conceptual",
    )


def baseline_scenes() -> PretrainConfig:
    """ViLBERT's baseline on drawn scenes: one stream, everything else as in vilbert-scenes."""
    return replace(
        vilbert.vilbert_scenes(),
        recipe="vilbert-baseline-scenes",
        model=MODEL,
        encoder=models.spec(MODEL).presets["scenes"],
    )


def baseline_vqa_scenes() -> FinetuneConfig:
    """Visual question answering on drawn scenes, by ViLBERT's baseline."""
    return scenes.on_scenes(MODEL, "vqa")


PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {"vilbert-baseline-conceptual": baseline_conceptual}

FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {
    "vilbert-baseline-vqa": baseline_vqa,
    "vilbert-baseline-vcr": baseline_vcr,
    "vilbert-baseline-vcr-rationale": baseline_vcr_rationale,
    "vilbert-baseline-refcoco+": baseline_refcoco_plus,
}

SCENES: Mapping[str, Callable[[], PretrainConfig]] = {"vilbert-baseline-scenes": baseline_scenes}
"""Of ours, on drawn scenes."""

SCENES_FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {"vilbert-baseline-vqa-scenes": baseline_vqa_scenes}
