"""CVLP's published pre-training and fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from visling import models
from visling.data.batches.masking import RegionMasking, TokenMasking
from visling.data.corpora.base import Corpus
from visling.recipes import scenes
from visling.recipes.configs import BERT_BASE, FinetuneConfig, PretrainConfig
from visling.recipes.lxmert import (
    LXMERT_ANSWERS,
    LXMERT_DROPPED,
    LXMERT_NLVR2,
    LXMERT_VALIDATED,
    LXMERT_VQA,
    lxmert_finetuning,
    lxmert_optimiser,
)
from visling.train.config import TrainConfig

TOKEN_MASKING = TokenMasking(in_turn=True)
REGION_MASKING = RegionMasking(hide=0.8, random=0.1)

_CONTRAST: Mapping[str, Any] = {
    "projection_size": 128,
    "momentum": 0.99995,
    "temperature": 0.07,
    "clip": 10.0,
    "queue_size": 30 * 256 * 36,  # 30 batches of 256 images of 36 regions
    "max_regions": 36,
    "key_start": "init",
    "independent_heads": True,
}


def cvlp_release() -> PretrainConfig:
    """CVLP as last released: from scratch, region contrast, batch 256, 1e-4, 40 epochs.

    Region contrast replaces LXMERT's region labels and question answering. Both networks are built from BERT's text
    weights, but `--fromScratch` re-initialises the query network alone: the key network starts from BERT (`--init`).

    Source:
        run/lxmert_pretrain.bash at 7c7331b and later, src/pretrain/lxmert_pretrain.py at e2a363e (deleted in 13de5fe).
    """
    return PretrainConfig(
        recipe="cvlp-release",
        model="cvlp",
        encoder=models.spec("cvlp").presets["base_replace"],
        corpora=(Corpus(kind="lxmert"),),
        objectives={"masked_lm": 1.0, "matching": 1.0, "region_contrast": 1.0},
        objective_settings={"region_contrast": _CONTRAST},
        masking=TOKEN_MASKING,
        region_masking=REGION_MASKING,
        batch_size=256,
        start=BERT_BASE,
        train=TrainConfig(epochs=40, seed=9595, keep=("last", "epochs"), optim=lxmert_optimiser()),
        paper={
            "start": "random",
            "encoder.key_layers": "drop",
            "objective_settings.region_contrast.clip": None,
            "objective_settings.region_contrast.key_start": "query",
            "objective_settings.region_contrast.independent_heads": False,
        },
        release={
            "queue": "dealt out to the devices: each sees its part of the 30 batches",
            "momentum": "the word table follows twice per update",
            "warm-up": "the 30 batches that fill the queue count as updates of the schedule",
        },
    )


def cvlp_from_lxmert() -> PretrainConfig:
    """CVLP as first released: as cvlp-release, but 20 epochs from the weights of LXMERT, its answer head left out.

    Both networks start from them; LXMERT's files have no projection head, so those of the two networks are random and
    differ.

    Source:
        run/lxmert_pretrain.bash at 5851373 (`--loadLXMERT`).
    """
    run = cvlp_release()
    return replace(
        run,
        recipe="cvlp-from-lxmert",
        start="lxmert-20epochs-qa",
        objective_settings={"region_contrast": {**_CONTRAST, "key_start": "query"}},
        train=replace(run.train, epochs=20),
        paper={
            name: value
            for name, value in run.paper.items()
            if name not in ("start", "objective_settings.region_contrast.key_start")
        },
    )


def cvlp_paper() -> PretrainConfig:
    """CVLP as the paper describes it: layers of the key network dropped, scores without a bound; schedule as released.

    Source:
        Method section; batch, rate, epochs, temperature and queue size could not be read there and are those of the
        release.
    """
    run = cvlp_release()
    return replace(
        run,
        recipe="cvlp-paper",
        encoder=models.spec("cvlp").presets["base"],
        start="random",
        objective_settings={
            "region_contrast": {**_CONTRAST, "clip": None, "key_start": "query", "independent_heads": False}
        },
        paper={},
        release={
            **run.release,
            "start": BERT_BASE,
            "encoder.key_layers": "replace",
            "objective_settings.region_contrast.clip": 10.0,
            "objective_settings.region_contrast.key_start": "init",
            "objective_settings.region_contrast.independent_heads": True,
        },
    )


_AVERAGED: Mapping[str, Any] = {
    "predictions": "both models' are written into one file, so that the averaged model's are left, by mistake; here "
    "evaluate writes those of the model that it is given",
    "averaged model": "its last weights are kept too; here its best ones alone",
}
_ANSWER_HEAD: Mapping[str, Any] = {
    "answer head": "starts from that of the released file, which CVLP's losses never train; here from random weights, "
    "as a model of cvlp-release has none",
}


def cvlp_vqa() -> FinetuneConfig:
    """CVLP on VQA v2 as released: LXMERT's fine-tuning for 5 epochs, and a second, averaged model.

    Binary cross-entropy over 3,129 answers, batch 32, 5e-5. After each update the averaged model keeps 0.99995 of
    itself; both are validated, and the best of each is kept. The answers are those of LXMERT's release, read from the
    file that `task_settings.answers` names.

    Source:
        run/vqa_finetune.bash; src/tasks/vqa.py. The paper's numbers could not be read.
    """
    return FinetuneConfig(
        recipe="cvlp-vqa",
        model="cvlp",
        encoder=models.spec("cvlp").presets["base"],
        task="vqa",
        task_settings=LXMERT_VQA,
        batch_size=32,
        start="cvlp-release",
        train_split="train+nominival",
        valid_split="minival",
        train=_averaged(lr=5e-5, epochs=5, momentum=0.99995),
        release={**_ANSWER_HEAD, **LXMERT_VALIDATED, **LXMERT_DROPPED, **_AVERAGED},
    )


def cvlp_gqa() -> FinetuneConfig:
    """CVLP on GQA as released: LXMERT's fine-tuning for 6 epochs, and a second, averaged model.

    Binary cross-entropy over 1,842 answers, batch 32, 1e-5. After each update the averaged model keeps 0.99997 of
    itself; both are validated, and the best of each is kept. The answers are those of LXMERT's release, read from the
    file that `task_settings.answers` names.

    Source:
        run/gqa_finetune.bash; src/tasks/gqa.py. The paper's numbers could not be read.
    """
    return FinetuneConfig(
        recipe="cvlp-gqa",
        model="cvlp",
        encoder=models.spec("cvlp").presets["base"],
        task="gqa",
        task_settings=LXMERT_ANSWERS,
        batch_size=32,
        start="cvlp-release",
        train_split="train+valid",
        valid_split="testdev",
        train=_averaged(lr=1e-5, epochs=6, momentum=0.99997),
        release={**_ANSWER_HEAD, **LXMERT_DROPPED, **_AVERAGED},
    )


def cvlp_nlvr2() -> FinetuneConfig:
    """CVLP on NLVR2 as released: LXMERT's fine-tuning for 5 epochs, and a second, averaged model.

    A row for each image, two outputs, batch 32, 5e-5. After each update the averaged model keeps 0.9995 of itself; both
    are validated, and the best of each is kept.

    Source:
        run/nlvr2_finetune.bash; src/tasks/nlvr2.py. The paper's numbers could not be read.
    """
    return FinetuneConfig(
        recipe="cvlp-nlvr2",
        model="cvlp",
        encoder=models.spec("cvlp").presets["base"],
        task="nlvr2",
        task_settings=LXMERT_NLVR2,
        batch_size=32,
        start="cvlp-release",
        train_split="train",
        valid_split="valid",
        train=_averaged(lr=5e-5, epochs=5, momentum=0.9995),
        release={**LXMERT_DROPPED, **_AVERAGED},
    )


def _averaged(*, lr: float, epochs: int, momentum: float) -> TrainConfig:
    """LXMERT's fine-tuning with a second model, the average of all updates."""
    return replace(lxmert_finetuning(lr=lr, epochs=epochs), average=momentum)


def cvlp_scenes() -> PretrainConfig:
    """CVLP on drawn scenes: masked words, matching, and contrast of each region with those of earlier batches.

    The release weighs all objectives alike and queues 30 batches, as here; its key network follows more slowly, over a
    hundred times as many updates.
    """
    run = scenes.slower(scenes.on_captions("cvlp"))
    return replace(
        run,
        objectives={**run.objectives, "region_contrast": 0.1},
        objective_settings={"region_contrast": {"projection_size": 64, "momentum": 0.99, "queue_size": 30 * 32 * 6}},
        region_masking=replace(REGION_MASKING, rate=scenes.FEW_REGIONS),
        release={
            **scenes.MASKED_IN_RELEASES,
            "objectives.matching": 1.0,
            "objectives.region_contrast": 1.0,
            "objective_settings.region_contrast.momentum": 0.99995,
            "data": "captions and questions, half of them with another image",
        },
    )


PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {
    "cvlp-release": cvlp_release,
    "cvlp-from-lxmert": cvlp_from_lxmert,
    "cvlp-paper": cvlp_paper,
}

FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {
    "cvlp-vqa": cvlp_vqa,
    "cvlp-gqa": cvlp_gqa,
    "cvlp-nlvr2": cvlp_nlvr2,
}

SCENES: Mapping[str, Callable[[], PretrainConfig]] = {"cvlp-scenes": cvlp_scenes}
"""Of ours, on drawn scenes."""
