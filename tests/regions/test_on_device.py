"""Features that live on the device: batches made of row numbers and filled there equal those made of features."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.releases import REGION_MASKING
from torch.utils import _pytree as pytree

from visling.data.batches.collate import Collator
from visling.data.batches.masking import RegionMasking
from visling.data.text import TextLayout, Tokenizer
from visling.draws import KeyedDraws
from visling.errors import ConfigError
from visling.regions import on_device
from visling.regions.on_device import FeatureRows, load_features
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.runtime import generator_for
from visling.types import Batch, Example, InputSpec, RegionArray, Targets

F, C = 6, 4
TOKENIZER = Tokenizer()
SPEC = InputSpec(feature_size=F, max_regions=7)
CPU = torch.device("cpu")
COUNTS = {"a": 3, "b": 9, "none": 0, "one": 1, "c": 7}
ALL = frozenset({"class_slots", "feature_slots", "region_features", "region_probs", "region_classes"})


@pytest.fixture(params=[2_000_000_000, 200], ids=["one-shard", "shards"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> NativeStore:
    rng = generator_for(1)
    with StoreWriter(tmp_path / "store", feature_size=F, fingerprint="x", shard_bytes=request.param) as writer:
        for name, count in COUNTS.items():
            low = rng.uniform(0, 50, (count, 2))
            writer.add(
                name,
                RegionArray(
                    features=rng.normal(size=(count, F)).astype(np.float16),
                    boxes=np.concatenate([low, low + rng.uniform(5, 50, (count, 2))], axis=1).astype(np.float32),
                    size=(100, 100),
                    classes=rng.integers(C, size=count),
                    probs=rng.dirichlet(np.ones(C), count).astype(np.float16),
                ),
            )
    return NativeStore.open(tmp_path / "store")


def both(
    store: NativeStore, spec: InputSpec = SPEC, *, images: int = 1, needs: Collection[str] = (), **settings: Any
) -> tuple[tuple[Batch, Targets], tuple[Batch, Targets]]:
    """A batch of the stored features, and the same of row numbers, filled."""
    row, names = TextLayout(TOKENIZER, spec).row("cats and dogs"), list(COUNTS) * 4
    examples = [
        Example(id=str(number), rows=(row,), images=tuple(names[number : number + images])) for number in range(16)
    ]
    made = []
    for source in (store, FeatureRows(store)):
        collator = Collator(source, spec, TOKENIZER, pool=list(COUNTS), needs=needs, **settings)
        made.append(collator(examples, KeyedDraws(3, 0, np.arange(16))))
    numbered = made[1][0].regions
    assert numbered is not None
    assert numbered.features.shape[-1] == 1
    assert numbered.features.dtype == torch.int64
    return made[0], load_features(store, CPU).fill(*made[1])


def check(found: tuple[Batch, Targets], expected: tuple[Batch, Targets]) -> None:
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for ours, theirs in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("release", list(REGION_MASKING))
@pytest.mark.parametrize("order", ["store", "confidence"])
@pytest.mark.parametrize("limit", [None, 8])
def test_masked_batches_are_equal(store: NativeStore, release: str, order: Any, limit: int | None) -> None:
    masking = dataclasses.replace(REGION_MASKING[release], rate=0.6)
    spec = dataclasses.replace(SPEC, region_order=order, joint_limit=limit)
    expected, found = both(store, spec, region_masking=masking, needs=ALL)
    check(found, expected)
    assert expected[0].regions is not None
    assert (expected[0].regions.whole is None) == (masking.whole == "model" and limit is None)


def test_joined_images_are_equal(store: NativeStore) -> None:
    expected, found = both(store, dataclasses.replace(SPEC, pair="sequence"), images=2)
    check(found, expected)
    assert found[0].regions is not None
    assert found[0].regions.image is not None


def test_chosen_regions_are_equal(store: NativeStore) -> None:
    row = TextLayout(TOKENIZER, SPEC).row("cats")

    def choose(regions: RegionArray) -> np.ndarray[Any, Any]:
        return np.arange(len(regions))[::-2]

    examples = [Example(id=name, rows=(row,), images=(name,), chosen_regions=choose) for name in COUNTS]
    expected, numbered = (
        Collator(source, SPEC, TOKENIZER, region_masking=RegionMasking(rate=1.0, hide=0.5), needs=ALL)(
            examples, KeyedDraws(0, 0, np.arange(len(examples)))
        )
        for source in (store, FeatureRows(store))
    )
    check(load_features(store, CPU).fill(*numbered), expected)
    assert expected[0].regions is not None
    shown = expected[0].regions.mask.sum(1).tolist()
    assert shown == [(min(count, 7) + 1) // 2 for count in COUNTS.values()]
    # Of image "c" the regions 6, 4, 2, 0 are shown, and their classes are asked for.
    assert store["c"].classes is not None
    assert expected[1].region_classes is not None
    assert expected[1].region_classes[4].tolist() == store["c"].classes[[6, 4, 2, 0]].tolist()


def test_text_alone_stays_as_it_is(store: NativeStore) -> None:
    row = TextLayout(TOKENIZER, SPEC).row("cats")
    batch, targets = Collator(None, SPEC, TOKENIZER)([Example(id="1", rows=(row,), images=())], [generator_for(0)])
    assert load_features(store, CPU).fill(batch, targets) == (batch, targets)


def test_features_are_copied_in_pieces_and_none_is_lost(store: NativeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "_COPY_BYTES", 2 * 2 * F)
    rows = load_features(store, CPU).rows
    assert rows.dtype == torch.float16
    assert not rows[0].any()
    assert np.array_equal(rows[1:].numpy(), np.concatenate([store[name].features for name in COUNTS]))


def test_features_that_do_not_fit_are_refused(store: NativeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (200, 1000))
    with pytest.raises(ConfigError, match=r"take 0\.0 GB.*--set store_on_device=false"):
        load_features(store, torch.device("cuda", 0))


def test_a_view_knows_what_its_store_knows(store: NativeStore) -> None:
    view = FeatureRows(store)
    assert (len(view), view.feature_size, view.fingerprint) == (len(COUNTS), F, "x")
    assert "a" in view
    assert "z" not in view
    assert np.array_equal(view["a"].features, store["a"].features)
    assert view.take("attributes", ["a"], np.array([0]), np.array([1])) is None
