"""UNITER's recipes, as a user would add them: named sixth_family.recipes:uniter-scenes and so on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from visling.data.batches.masking import RegionMasking
from visling.objectives.masked_regions import RegionLosses
from visling.recipes import scenes
from visling.recipes.configs import FinetuneConfig, PretrainConfig

MODEL = "sixth_family.uniter"
REGION_LOSSES = RegionLosses(classes="kl")


def uniter_scenes() -> PretrainConfig:
    """UNITER on drawn scenes: masked words, matching, and the class distribution of masked regions by KL divergence."""
    config = scenes.on_captions(MODEL)
    return replace(
        config,
        recipe="uniter-scenes",
        objectives={**config.objectives, "masked_regions": 0.1},
        region_masking=RegionMasking(rate=scenes.FEW_REGIONS),
        region_losses=REGION_LOSSES,
    )


def uniter_vqa_scenes() -> FinetuneConfig:
    """UNITER's VQA on drawn scenes."""
    return replace(scenes.on_scenes(MODEL, "vqa"), recipe="uniter-vqa-scenes")


PRETRAINING: Mapping[str, Callable[[], PretrainConfig]] = {"uniter-scenes": uniter_scenes}
FINETUNING: Mapping[str, Callable[[], FinetuneConfig]] = {"uniter-vqa-scenes": uniter_vqa_scenes}
