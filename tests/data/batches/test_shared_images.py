"""An image that rows of an example share is gathered once, and nothing else changes: models, labels and heads see what
they saw with an image for every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from visling import models
from visling.data.batches.collate import Collator
from visling.data.batches.masking import RegionMasking
from visling.data.text import TextLayout, Tokenizer
from visling.regions.store import NativeStore
from visling.runtime import generator_for
from visling.types import Batch, Example, RegionArray, Targets

TOKENIZER = Tokenizer()


@pytest.fixture
def store(world: Any) -> NativeStore:
    return NativeStore.open(world.regions)


def score_boxes(images: Sequence[RegionArray]) -> dict[str, Any]:
    """A label that differs from image to image, for four rows."""
    most = max(len(image) for image in images)
    return {"region_scores": np.stack([np.pad(i.boxes[:, 0], (0, most - len(i))) for i in images])}


def make(store: NativeStore, spec: Any, *, share: bool, images: Sequence[Sequence[int]], **settings: Any) -> Any:
    """A batch of examples of four rows; without sharing, as if every row had an image of its own."""
    layout = TextLayout(TOKENIZER, spec)
    rows = tuple(layout.row(text) for text in ("a red star", "two rings", "a red star", "a blue moon above"))
    examples = [
        Example(
            id=str(number),
            rows=rows,
            images=tuple(store.ids[at] for at in shown),
            labels={"choice": 0},
            region_labels=score_boxes,
        )
        for number, shown in enumerate(images)
    ]
    collator = Collator(store, spec, TOKENIZER, **settings)
    if not share:
        assert collator.regions is not None
        collator.regions.spec = replace(spec, joint_limit=10_000)  # a text might cut regions, so none is shared
    return collator(examples, [generator_for(0, number) for number in range(len(examples))])


IMAGES = ((0, 0, 1, 0), (2, 2, 3, 2), (4, 4, 4, 4))


def spec_of(name: str, store: NativeStore) -> tuple[Any, Any]:
    family = models.spec(name)
    config = replace(family.presets["tiny"], feature_size=store.feature_size)
    return config, replace(family.inputs(config), pair="rows")


@pytest.mark.parametrize("name", sorted(models.names()))
def test_every_family_sees_the_same(store: NativeStore, name: str) -> None:
    config, spec = spec_of(name, store)
    shared, targets = make(store, spec, share=True, images=IMAGES)
    apart, same_targets = make(store, spec, share=False, images=IMAGES)
    assert isinstance(shared, Batch)
    assert isinstance(targets, Targets)
    shared.validate()
    assert shared.regions is not None
    assert shared.regions.row is not None
    assert shared.regions.row.tolist() == [0, 0, 1, 0, 2, 2, 3, 2, 4, 4, 4, 4]
    assert len(shared.regions.features) == 5
    assert apart.regions.row is None
    for kind in ("features", "boxes", "mask", "size"):
        assert torch.equal(getattr(shared.regions, kind)[shared.regions.row], getattr(apart.regions, kind))
    assert targets.region_scores is not None
    assert torch.equal(targets.region_scores, same_targets.region_scores)
    encoder = models.build(name, config)
    encoder.fit_features(torch.cat(tuple(shared.regions.features.float())))
    encoder.eval()
    with torch.inference_mode():
        ours, theirs = encoder(shared), encoder(apart)
    assert_close(ours.pooled, theirs.pooled, rtol=0, atol=1e-6)
    assert_close(ours.regions, theirs.regions, rtol=0, atol=1e-6)


def test_different_images_keep_a_row_each(store: NativeStore) -> None:
    _, spec = spec_of("lxmert", store)
    batch, _ = make(store, spec, share=True, images=((0, 1, 2, 3), (4, 5, 6, 7)))
    assert batch.regions.row is None
    assert len(batch.regions.features) == 8


@pytest.mark.parametrize("settings", [{"region_masking": RegionMasking(rate=0.5)}, {"flip": 0.5}])
def test_what_is_drawn_for_every_row_is_not_shared(store: NativeStore, settings: dict[str, Any]) -> None:
    _, spec = spec_of("lxmert", store)
    batch, _ = make(store, spec, share=True, images=IMAGES, **settings)
    assert batch.regions.row is None
    assert len(batch.regions.features) == 12
