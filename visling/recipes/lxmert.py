"""LXMERT's published pre-training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from visling import models
from visling.data.batches.masking import REGION_RELEASES, TOKEN_RELEASES
from visling.data.corpora.base import Corpus
from visling.objectives.image_qa import NUM_ANSWERS
from visling.objectives.masked_regions import RELEASES as REGION_LOSSES
from visling.recipes.configs import PretrainConfig
from visling.train.config import TrainConfig
from visling.train.optim import OptimConfig


def lxmert_20epochs_qa() -> PretrainConfig:
    """LXMERT as released: from scratch, question answering from the first epoch on, batch 256, 1e-4, 20 epochs.

    Source:
        run/lxmert_pretrain.bash, lxmert_pretrain.py.
    """
    return PretrainConfig(
        recipe="lxmert-20epochs-qa",
        model="lxmert",
        encoder=models.spec("lxmert").presets["base"],
        corpora=(Corpus(kind="lxmert"),),
        objectives={"masked_lm": 1.0, "matching": 1.0, "masked_regions": 1.0, "image_qa": 1.0},
        objective_settings={"image_qa": {"num_answers": NUM_ANSWERS}},
        masking=TOKEN_RELEASES["lxmert"],
        region_masking=REGION_RELEASES["lxmert"],
        region_losses=REGION_LOSSES["lxmert"],
        batch_size=256,
        train=TrainConfig(epochs=20, seed=9595, optim=lxmert_optimiser()),
        paper={
            "from_epoch.image_qa": 10,
            "region_masking.hide": 1.0,
            "region_masking.random": 0.0,
            "region_masking.labels": "chosen",
            "region_losses.weighted": False,
            "region_losses.over": "chosen",
            "region_losses.scale": 1.0,
        },
        release={"losses": "means over each of four devices, then the mean of these"},
    )


def lxmert_two_phase_qa() -> PretrainConfig:
    """LXMERT in two phases, as a comment in the release describes an earlier run: ten epochs without question
    answering, ten with it at weight 2.

    Source:
        lxmert_pretrain.py. Its author found it about as good as lxmert-20epochs-qa.
    """
    run = lxmert_20epochs_qa()
    return replace(
        run,
        recipe="lxmert-two-phase-qa",
        objectives={**run.objectives, "image_qa": 2.0},
        from_epoch={"image_qa": 10},
        paper={
            **{name: value for name, value in run.paper.items() if name != "from_epoch.image_qa"},
            "objectives.image_qa": 1.0,
        },
        release={**run.release, "objectives.image_qa": 1.0, "from_epoch.image_qa": 0},
    )


def lxmert_paper() -> PretrainConfig:
    """LXMERT as the paper describes it: ten epochs without question answering, ten with it; hidden regions become
    zeros, only they are told.

    The learning rate falls in one line over both, so question answering is learnt at the smaller rates that it needs.

    Source:
        Sections 3.1 and 3.3; numbers that the paper leaves open as released.
    """
    run = lxmert_20epochs_qa()
    assert run.region_losses is not None
    return replace(
        run,
        recipe="lxmert-paper",
        from_epoch={"image_qa": 10},
        region_masking=replace(REGION_RELEASES["lxmert"], hide=1.0, random=0.0, labels="chosen"),
        region_losses=replace(run.region_losses, weighted=False, over="chosen", scale=1.0),
        paper={},
        release={
            **run.release,
            "from_epoch.image_qa": 0,
            "region_masking.hide": 0.8,
            "region_masking.random": 0.1,
            "region_masking.labels": "all",
            "region_losses.weighted": True,
            "region_losses.over": "regions",
            "region_losses.scale": 1 / 0.15,
        },
    )


def lxmert_optimiser() -> OptimConfig:
    """LXMERT and CVLP: BertAdam, every parameter decayed, one norm over all gradients."""
    return OptimConfig(
        name="bert_adam",
        lr=1e-4,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        no_decay=(),
        clip="global",
        clip_norm=1.0,
        schedule="warmup_linear",
        warmup_share=0.05,
        evaluate="before",
    )


PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {
    "lxmert-20epochs-qa": lxmert_20epochs_qa,
    "lxmert-two-phase-qa": lxmert_two_phase_qa,
    "lxmert-paper": lxmert_paper,
}
