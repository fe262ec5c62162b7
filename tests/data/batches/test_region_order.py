"""The most confident regions first: the view of a store, what a limit cuts off, and targets that follow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from visling.data.batches.collate import Collator
from visling.data.batches.masking import RegionMasking
from visling.data.batches.region_order import ByConfidence
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, StoreError
from visling.regions.store import gather
from visling.regions.writer import StoreWriter
from visling.runtime import generator_for
from visling.types import Batch, Example, InputSpec, RegionArray, Targets

TOKENIZER = Tokenizer()
F = 2
SPEC = InputSpec(feature_size=F, max_regions=4, region_order="confidence")
SCORES: dict[str, list[float]] = {"a": [0.25, 0.5, 0.125, 0.5, 1.0], "b": [0.5, 0.75], "none": []}
"""Image -> highest share of each region."""
ORDER = {"a": [4, 1, 3, 0, 2], "b": [1, 0], "none": []}


def image(name: str) -> RegionArray:
    """Regions whose feature, class and box say their number in the store."""
    numbers = np.arange(len(SCORES[name]))
    probs = np.zeros((len(numbers), 6), np.float16)
    probs[numbers, numbers] = SCORES[name]
    left = numbers.astype(np.float32)
    return RegionArray(
        features=np.stack([np.full(len(numbers), ord(name[0])), numbers], axis=1).astype(np.float16).reshape(-1, F),
        boxes=np.stack([left, 0 * left, left + 1, 0 * left + 1], axis=1),
        size=(20, 10),
        classes=numbers.astype(np.int16),
        class_confidence=np.linspace(0.1, 0.9, len(numbers)).astype(
            np.float16
        ),  # another order: distributions go first
        probs=probs,
    )


class Memory:
    """A store in memory."""

    feature_size, fingerprint = F, "memory"

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    def __contains__(self, image_id: str) -> bool:
        return image_id in SCORES

    def __getitem__(self, image_id: str) -> RegionArray:
        return dataclasses.replace(image(image_id), **self.changes)

    def __len__(self) -> int:
        return len(SCORES)


def numbers_of(features: NDArray[Any]) -> list[int]:
    return [int(number) for number in features[:, 1]]


def test_every_field_follows_and_equals_keep_their_order() -> None:
    view = ByConfidence(Memory())
    assert (len(view), view.feature_size, view.fingerprint) == (3, F, "memory")
    assert "a" in view
    assert "c" not in view
    for name, order in ORDER.items():
        found = view[name]
        assert numbers_of(found.features) == found.boxes[:, 0].tolist() == order
        assert found.classes is not None
        assert found.classes.tolist() == order
        assert found.probs is not None
        assert found.probs.max(axis=1, initial=0).tolist() == sorted(SCORES[name], reverse=True)
        assert found.attributes is None
        assert found.size == (20, 10)


def test_without_distributions_by_the_confidence_of_the_class() -> None:
    assert numbers_of(ByConfidence(Memory(probs=None))["a"].features) == [4, 3, 2, 1, 0]


def test_a_store_without_confidences_is_refused() -> None:
    with pytest.raises(StoreError, match=r"image 'a'.*region_order=store"):
        gather(ByConfidence(Memory(probs=None, class_confidence=None)), ["a"])


@pytest.mark.parametrize("most", [None, 1, 3, 9])
def test_gathered_alike_from_disk_and_from_memory(tmp_path: Path, most: int | None) -> None:
    with StoreWriter(tmp_path / "store", feature_size=F, fingerprint="disk") as writer:
        for name in ("b", "none", "a"):
            writer.add(name, image(name))
    found = [gather(ByConfidence(store), ["b", "a", "none"], most) for store in (writer.close(), Memory())]
    for name, array in found[0].items():
        assert np.array_equal(array, found[1][name]), name
    kept = [ORDER[name][:most] for name in ("b", "a", "none")]
    assert found[0]["mask"].sum(1).tolist() == [len(numbers) for numbers in kept]
    for row, numbers in enumerate(kept):
        assert (
            numbers_of(found[0]["features"][row, : len(numbers)])
            == found[0]["boxes"][row, : len(numbers), 0].tolist()
            == numbers
        )


def make(spec: InputSpec, *images: str, text: str = "cats", **settings: Any) -> tuple[Batch, Targets]:
    row = TextLayout(TOKENIZER, spec).row(text)
    examples = [Example(id=name, rows=(row,), images=(name,)) for name in images]
    rngs = [generator_for(0, number) for number in range(len(images))]
    batch, targets = Collator(Memory(), spec, TOKENIZER, **settings)(examples, rngs)
    batch.validate()
    return batch, targets


def shown(batch: Batch) -> list[list[int]]:
    assert batch.regions is not None
    return [numbers_of(row[mask].numpy()) for row, mask in zip(batch.regions.features, batch.regions.mask, strict=True)]


def test_a_preset_says_which_regions_come_first() -> None:
    assert shown(make(SPEC, "a", "b")[0]) == [[4, 1, 3, 0], [1, 0]], (
        "of five regions the least confident one is left out"
    )
    assert shown(make(dataclasses.replace(SPEC, region_order="store"), "a", "b")[0]) == [[0, 1, 2, 3], [0, 1]]


def test_the_joint_limit_leaves_out_the_least_confident() -> None:
    spec = dataclasses.replace(SPEC, joint_limit=6)  # three pieces, two regions and the whole image
    assert shown(make(spec, "a", "b")[0]) == [[4, 1], [1, 0]]


def test_targets_follow() -> None:
    needs = {"class_slots", "feature_slots", "region_features", "region_classes", "region_probs"}
    _, targets = make(SPEC, "a", "b", region_masking=RegionMasking(rate=1.0, hide=0.0), needs=needs)
    assert targets.region_classes is not None
    assert targets.region_classes.tolist() == [[4, 1, 3, 0], [1, 0, -100, -100]]
    assert targets.region_probs is not None
    assert targets.region_probs[0].argmax(-1).tolist() == [4, 1, 3, 0]
    assert targets.region_features is not None
    assert numbers_of(targets.region_features[0].numpy()) == [4, 1, 3, 0]


def test_random_features_come_from_the_regions_that_are_read() -> None:
    masking = RegionMasking(rate=1.0, hide=0.0, random=1.0)
    drawn = {number for row in shown(make(SPEC, *["b"] * 64, region_masking=masking, pool=["a"])[0]) for number in row}
    assert drawn == {4, 1, 3, 0}, "never the fifth, which the model does not read"


def test_examples_that_count_regions_as_the_store_does_are_refused() -> None:
    row = TextLayout(TOKENIZER, SPEC).row("cats")
    linked = Example(id="linked", rows=(dataclasses.replace(row, links=((1, 0),)),), images=("a",))
    scored = Example(id="scored", rows=(row,), images=("a",), labels={"region_scores": np.zeros(5)})
    for example in (linked, scored):
        with pytest.raises(ConfigError, match=rf"{example.id}.*region_order='store'"):
            Collator(Memory(), SPEC, TOKENIZER)([example], [generator_for(0)])
        unsorted = dataclasses.replace(SPEC, region_order="store")
        Collator(Memory(), unsorted, TOKENIZER)([example], [generator_for(0)])
