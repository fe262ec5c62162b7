"""CVLP's published pre-training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from visling import models
from visling.data.batches.masking import RegionMasking, TokenMasking
from visling.data.corpora.base import Corpus
from visling.recipes import scenes
from visling.recipes.configs import BERT_BASE, FinetuneConfig, PretrainConfig
from visling.recipes.lxmert import lxmert_optimiser
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

FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {}

SCENES: Mapping[str, Callable[[], PretrainConfig]] = {"cvlp-scenes": cvlp_scenes}
"""Of ours, on drawn scenes."""
