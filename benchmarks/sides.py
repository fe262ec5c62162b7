"""visling's side of the comparisons: pre-training as a published recipe does it, and answering questions (VQA).

The recipes are the published ones at their base size: LXMERT with masked words, matching, masked regions and question
answering; VisualBERT's COCO phase with two captions; ViLBERT and VL-BERT on captions. `--preset tiny` and `--layers`
make them small.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from drawn_data import QUESTIONS_PER_IMAGE, draw_pretraining, draw_questions
from torch import Tensor

from visling import models
from visling.models.task_model import TaskModel
from visling.recipes.configs import PretrainConfig
from visling.recipes.lxmert import lxmert_20epochs_qa
from visling.recipes.vilbert import vilbert_conceptual
from visling.recipes.visualbert import visualbert_coco
from visling.recipes.vlbert import vlbert_base_prec_without_text
from visling.runs.layer_products import Needed
from visling.runs.needed_products import pretraining_products, task_products
from visling.runs.pretrain import untrained_model
from visling.tasks.answers import answer_loss
from visling.types import Batch, Head, InputSpec, Targets

RECIPES: Mapping[str, Callable[[], PretrainConfig]] = {
    "lxmert": lxmert_20epochs_qa,
    "visualbert": visualbert_coco,
    "vilbert": vilbert_conceptual,
    "vlbert": vlbert_base_prec_without_text,
}
"""Family -> its pre-training."""
VQA_PRESETS: Mapping[str, str] = {"lxmert": "base", "visualbert": "vqa", "vilbert": "vqa", "vlbert": "base_vqa"}
"""Family -> the preset that its release answers questions with."""
NUM_ANSWERS = 3129
"""Of VQA v2, in all releases."""


def shrink(config: Any, layers: int | None) -> Any:
    """An encoder's config with at most so many layers of each kind; of ViLBERT the last ones, which alternate.

    visling's small presets lose their whitening, which no other implementation has.
    """
    if getattr(config, "whiten_features", False):
        config = replace(config, whiten_features=False)
    if layers is None:
        return config
    if hasattr(config, "text_layers_before"):
        depth, regions = min(config.num_layers, layers + 1), min(config.num_region_layers, layers)
        return replace(
            config,
            num_layers=depth,
            num_region_layers=regions,
            text_layers_before=tuple(range(depth - regions, depth)),
            region_layers_before=tuple(range(regions)),
        )
    counts = [field.name for field in dataclasses.fields(config) if field.name.endswith("layers")]
    return replace(config, **{name: min(getattr(config, name), layers) for name in counts if name.startswith("num_")})


def pretraining_config(model: str, options: argparse.Namespace) -> PretrainConfig:
    """The recipe of a family, as small as the options ask for."""
    run = RECIPES[model]()
    encoder = run.encoder if options.preset is None else models.spec(model).presets[options.preset]
    run = replace(run, encoder=shrink(encoder, options.layers))
    if run.region_losses is not None:
        run = replace(run, region_losses=replace(run.region_losses, feature_size=run.encoder.feature_size))
    return run


def vqa_config(model: str, options: argparse.Namespace) -> Any:
    """The encoder's config with which a family answers questions, as small as the options ask for."""
    return shrink(models.spec(model).presets[options.preset or VQA_PRESETS[model]], options.layers)


class Pretraining:
    """visling's encoder with a recipe's objectives, as `visling pretrain` runs them; accuracies are computed too."""

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.config = config
        self.module = untrained_model(config).to(device)

    @property
    def needs(self) -> frozenset[str]:
        """`Targets` fields that the objectives read."""
        return frozenset[str]().union(*(objective.reads() for objective in self.module.all_objectives()))

    def draw(self, batch_size: int, number: int, device: torch.device) -> list[tuple[Batch, Targets]]:
        """Random batches of the recipe."""
        return draw_pretraining(self.config, batch_size, number, device, needs=self.needs)

    def needed(self, batch: Batch, targets: Targets) -> Needed:
        """Products that a step needs."""
        return pretraining_products(self.module, batch, targets)

    def feed(self, batch: Batch, targets: Targets) -> tuple[Batch, Targets]:
        """As they are."""
        return batch, targets

    def loss(self, fed: tuple[Batch, Targets]) -> Tensor:
        """Weighted sum of the objectives."""
        value: Tensor = self.module(*fed).value
        return value


class Answering:
    """visling's encoder with the answer head of its family, and the loss of its release."""

    def __init__(self, model: str, config: Any, device: torch.device) -> None:
        self.model, self.config = model, config
        self.kind: Literal["kl", "bce"] = models.spec(model).tasks["vqa"]["loss"]
        heads = {"classify": Head(kind="classify", outputs=NUM_ANSWERS)}
        self.module = TaskModel(models.build(model, config), heads, models.head_styles(model)).to(device)

    @property
    def spec(self) -> InputSpec:
        """What the encoder reads."""
        return models.spec(self.model).inputs(self.config)

    def draw(self, batch_size: int, number: int, device: torch.device) -> list[tuple[Batch, Targets]]:
        """Random batches of questions, each with its image."""
        return draw_questions(self.model, self.spec, batch_size, number, device, num_answers=NUM_ANSWERS)

    def needed(self, batch: Batch, targets: Targets) -> Needed:
        """Products that the logits and their gradient need."""
        return task_products(self.module, batch)

    def feed(self, batch: Batch, targets: Targets) -> tuple[Batch, Targets]:
        """As they are."""
        return batch, targets

    def loss(self, fed: tuple[Batch, Targets]) -> Tensor:
        """Of soft answer scores."""
        batch, targets = fed
        assert targets.answer is not None
        return answer_loss(self.logits(batch), targets.answer, self.kind).value

    def logits(self, batch: Batch) -> Tensor:
        """(B, A)."""
        found: Tensor = self.module(batch)["classify"]
        return found


def share_images(batch: Batch) -> Batch:
    """A batch of questions of which as many follow one another as an image has, with each image once."""
    regions = batch.regions
    assert regions is not None
    rows = len(regions.mask)
    assert rows % QUESTIONS_PER_IMAGE == 0
    shared = regions.map(lambda tensor: tensor[::QUESTIONS_PER_IMAGE])
    row = torch.arange(rows, device=regions.mask.device) // QUESTIONS_PER_IMAGE
    return replace(batch, regions=replace(shared, row=row))
