"""No matrix product is computed for padding or for a state that nobody reads: the operations of every family, counted
while it runs, against those computed from lengths and settings."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from visling import models
from visling.models.base import Encoder
from visling.runs.count_products import MatrixProducts
from visling.runs.needed_products import Reading, encoder_products
from visling.types import Batch, Encoded, Regions, Text

TOKENS, REGIONS = 7, 9
BESIDE_REGIONS = {"vilbert_baseline": 1, "vlbert": 2}
"""The whole image; and [END], whose state is computed in the last layer only where all are."""


def build_tiny(name: str) -> Encoder:
    """The tiny preset with a small vocabulary: else that head would outweigh the layers."""
    config = dataclasses.replace(
        models.spec(name).presets["tiny"], vocabulary="scenes", vocab_size=318, attention_dropout_rate=0.0
    )
    torch.manual_seed(0)
    return models.build(name, config)


def full_batch(encoder: Encoder, texts: int, images: int, *, share: bool) -> Batch:
    """Rows without padding; with `share` every text meets every image."""
    config = encoder.config
    corners = torch.rand(images, REGIONS, 2) * 0.5
    rows = torch.cartesian_prod(torch.arange(texts), torch.arange(images))
    return Batch(
        text=Text(
            ids=torch.randint(5, 300, (texts, TOKENS)),
            mask=torch.ones(texts, TOKENS, dtype=torch.bool),
            segments=torch.zeros(texts, TOKENS, dtype=torch.int64),
            row=rows[:, 0] if share else None,
        ),
        regions=Regions(
            features=torch.rand(images, REGIONS, config.feature_size),
            boxes=torch.cat([corners, corners + 0.3], dim=-1),
            mask=torch.ones(images, REGIONS, dtype=torch.bool),
            size=torch.full((images, 2), 500.0),
            row=rows[:, 1] if share else None,
        ),
    )


def everything(encoded: Encoded) -> Tensor:
    """A number into which all states enter."""
    states = [encoded.text, encoded.regions, encoded.pooled]
    states += [] if encoded.whole is None else [encoded.whole]
    return torch.stack([state.sum() for state in states]).sum()


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", models.names())
def test_the_formulas_are_exact_where_nothing_can_be_spared(name: str, share: bool) -> None:
    encoder = build_tiny(name).train()
    batch = full_batch(encoder, 3, 2 if share else 3, share=share)
    rows = 6 if share else 3
    # The summary reads the first token, and in ViLBERT the whole image.
    reading = Reading(tokens=np.full(rows, TOKENS - 1), regions=np.full(rows, REGIONS + BESIDE_REGIONS.get(name, 0)))
    needed = encoder_products(encoder.config, batch, reading)
    with MatrixProducts() as products:
        loss = everything(encoder(batch))
        forward = products.linear, products.attention
        loss.backward()  # type: ignore[no-untyped-call]
    assert forward == (needed.forward.linear, needed.forward.attention)
    assert (products.linear, products.attention) == (needed.step.linear, needed.step.attention)
