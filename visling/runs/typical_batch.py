"""Random batches of the shapes that a pre-training's typical examples have, for estimates and tests.

Letters  B rows, T tokens, R regions, F region feature width, P slots, C classes, H and W height and width of an image.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from visling import models
from visling.data.batches.slots import SLOT_MULTIPLE
from visling.data.corpora.base import Typical
from visling.data.corpora.readers import find_reader
from visling.objectives.image_qa import NUM_ANSWERS
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.types import Batch, InputSpec, Pixels, Regions, Slots, Targets, Text

PICTURE = (640, 480)
"""Width and height of a typical picture before scaling; the padding of smaller ones in a batch is not counted."""


def typical_batch(config: PretrainConfig, size: Typical, rows: int) -> tuple[Batch, Targets]:
    """Random inputs and labels of the shapes that the typical examples of a run have."""
    spec = models.spec(config.model).inputs(config.encoder)
    tokens, regions = min(size.tokens, spec.max_tokens), count_regions(config, size)
    text = Text(
        ids=torch.randint(1, config.encoder.vocab_size, (rows, tokens)),
        mask=torch.ones(rows, tokens, dtype=torch.bool),
        segments=torch.zeros(rows, tokens, dtype=torch.int64),
        task=torch.zeros(rows, dtype=torch.int64) if spec.num_tasks else None,
        count=rows * tokens,
    )
    masking = config.region_masking
    hidden = masking.rate * masking.hide if masking is not None and masking.learned else 0.0
    shown = draw_regions(rows, regions, spec, images=size.images, hidden=hidden) if size.images else None
    pixels = None
    if shown is not None and (pixels := draw_pixels(config, rows)) is not None:
        shown = dataclasses.replace(shown, features=shown.features[..., :0])
    batch = Batch(text=text, regions=shown, pixels=pixels)
    return batch, _draw_targets(config, batch, regions)


def scaled_picture(config: PretrainConfig | FinetuneConfig) -> tuple[int, int] | None:
    """Width and height of a typical picture as the extractor sees it; None without an extractor."""
    extractor = config.extractor
    return None if extractor is None else extractor.picture_size(*PICTURE)


def draw_pixels(config: PretrainConfig | FinetuneConfig, rows: int) -> Pixels | None:
    """A typical picture for each of (S) region rows; None without an extractor."""
    if (picture := scaled_picture(config)) is None:
        return None
    wide, high = picture
    return Pixels(
        images=torch.randn(rows, 3, high, wide),
        size=torch.tensor([[high, wide]]).expand(rows, -1),
        row=torch.arange(rows),
    )


def draw_regions(rows: int, number: int, spec: InputSpec, *, images: int, hidden: float = 0.0) -> Regions:
    """Regions of (B) rows; a share of them `hidden`, if it is not 0."""
    corners = torch.rand(rows, number, 2) * 0.5
    return Regions(
        features=torch.rand(rows, number, spec.feature_size),
        boxes=torch.cat([corners, corners + 0.1 + torch.rand(rows, number, 2) * 0.4], dim=-1),
        mask=torch.ones(rows, number, dtype=torch.bool),
        size=torch.full((rows, 2), 500.0),
        hidden=torch.rand(rows, number) < hidden if hidden else None,
        image=(torch.arange(number) * images // number).expand(rows, -1) if images > 1 else None,
        count=rows * number,
    )


def _draw_targets(config: PretrainConfig, batch: Batch, regions: int) -> Targets:
    """Labels for every objective; none about regions where the batch has none."""
    rows, tokens = batch.text.ids.shape
    words = _draw_slots(rows, tokens, config.masking.rate)
    given: dict[str, Any] = {
        "token_slots": words,
        "token_ids": torch.randint(1, config.encoder.vocab_size, words.at.shape),
        "matched": torch.randint(0, 2, (rows,)),
    }
    if "image_qa" in config.objectives:
        given["answer"] = torch.randint(
            0, config.objective_settings.get("image_qa", {}).get("num_answers", NUM_ANSWERS), (rows,)
        )
    if batch.regions is None:
        return Targets(**given)
    losses, masking = config.region_losses, config.region_masking
    if "region_contrast" in config.objectives or losses is not None:
        given["region_features"] = batch.regions.features
    if losses is not None and masking is not None:
        labelled = _draw_slots(rows, regions, 1.0 if masking.labels == "all" else masking.rate)
        shape = labelled.at.shape
        given |= {
            "class_slots": labelled,
            "feature_slots": _draw_slots(rows, regions, masking.rate),
            "region_probs": torch.rand(*shape, losses.num_classes).softmax(-1)
            if losses.classes in ("kl", "cross_entropy")
            else None,
            "region_classes": torch.randint(0, losses.num_classes, shape),
            "region_weights": torch.rand(shape),
            "region_attributes": torch.randint(0, losses.num_attributes, shape),
            "attribute_weights": torch.rand(shape),
        }
    return Targets(**given)


def _draw_slots(rows: int, length: int, rate: float) -> Slots:
    """As many slots as the row with most chosen positions has, about two standard deviations above the mean."""
    most = length * rate + 2 * math.sqrt(length * rate * (1 - rate))
    number = min(math.ceil(max(most, 1) / SLOT_MULTIPLE) * SLOT_MULTIPLE, length)
    return Slots(at=torch.rand(rows, length).argsort(1)[:, :number], mask=torch.ones(rows, number, dtype=torch.bool))


def typical_sizes(config: PretrainConfig) -> dict[str, Typical]:
    """Typical sizes of the examples of each corpus."""
    return {corpus.kind: find_reader(corpus.kind).typical for corpus in config.corpora}


def count_regions(config: PretrainConfig, size: Typical) -> int:
    """Regions of a row: as many as the preset reads."""
    spec = models.spec(config.model).inputs(config.encoder)
    if spec.joint_limit is not None and size.images:
        return min(spec.max_regions, spec.joint_limit - min(size.tokens, spec.max_tokens) - 1)  # the whole image counts
    return spec.max_regions * size.images
