"""Batches of few shapes: how many there are in an epoch, what rounding costs, and that nothing but padding is added."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from visling import models, runtime
from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader
from visling.data.batches.shapes import FEWEST_SLOTS, give_few_shapes, round_up, steps_of
from visling.data.text import TextLayout, Tokenizer
from visling.recipes.tables import PUBLISHED_PRETRAINING
from visling.types import IGNORE, Batch, Example, InputSpec, Pixels, RegionArray, Slots, Targets

TOKENIZER = Tokenizer()
CLASSES, WIDTH = 5, 4
RECIPES = (
    "visualbert-coco",
    "vlbert-base-prec-without-text",
    "vilbert-conceptual",
    "lxmert-20epochs-qa",
    "cvlp-release",
)


@given(
    st.integers(1, 3000).flatmap(lambda whole: st.tuples(st.integers(0, whole), st.just(whole))),
    st.sampled_from([2, 4, 8]),
)
def test_sizes_are_rounded_up_to_few_shares(pair: tuple[int, int], steps: int) -> None:
    number, whole = pair
    size = round_up(number, whole, steps=steps)
    assert number <= size <= min(whole, number + number / steps + 1)
    assert round_up(whole, whole, steps=steps) == whole


def test_few_sizes_exist() -> None:
    assert {round_up(number, 100) for number in range(25, 101)} == {25, 38, 50, 75, 100}
    assert {round_up(number, 36) for number in range(18, 37)} == {18, 27, 36}
    assert [steps_of(rows) for rows in (1, 32, 255, 256, 1024)] == [4, 4, 4, 8, 16]


class Store:
    """Ten to a hundred regions an image, as bottom-up features have them."""

    feature_size, fingerprint = WIDTH, "drawn"

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = counts

    def __contains__(self, image_id: str) -> bool:
        return int(image_id) < len(self.counts)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, image_id: str) -> RegionArray:
        count = self.counts[int(image_id)]
        left = np.arange(count, dtype=np.float32)
        return RegionArray(
            features=np.full((count, WIDTH), 1 + int(image_id) % 7, np.float16),
            boxes=np.stack([left, 0 * left, left + 1, 0 * left + 5], axis=1),
            size=(200, 100),
            classes=(np.arange(count) % CLASSES).astype(np.int16),
            class_confidence=np.full(count, 0.5, np.float16),
            attributes=(np.arange(count) % CLASSES)[:, None].astype(np.int16),
            attribute_confidence=np.full((count, 1), 0.5, np.float16),
            probs=np.full((count, CLASSES), 1 / CLASSES, np.float16),
        )


class Captions:
    """Captions of COCO's lengths, twelve pieces on average, about drawn images; in pairs if asked."""

    def __init__(self, layout: TextLayout, number: int, images: int, *, pairs: bool) -> None:
        self.layout, self.number, self.images, self.pairs = layout, number, images, pairs

    def __len__(self) -> int:
        return self.number

    def example(self, index: int, rng: np.random.Generator) -> Example:
        texts = [" ".join(["cat"] * max(6, round(rng.normal(12, 3)))) for _ in range(1 + self.pairs)]
        labels = {"matched": int(rng.integers(2)), "answer": int(rng.integers(9))}
        return Example(
            id=str(index), rows=(self.layout.row(*texts),), images=(str(index % self.images),), labels=labels
        )


def epoch(recipe: str, *, few_shapes: bool, batches: int = 40) -> Iterator[tuple[Batch, Targets]]:
    """An epoch of random batches as a published pre-training makes them, of 64 rows."""
    config = PUBLISHED_PRETRAINING[recipe]()
    spec = dataclasses.replace(models.spec(config.model).inputs(config.encoder), feature_size=WIDTH)
    fewest = 10 if spec.max_regions == 100 else spec.max_regions
    counts = runtime.generator_for(0).integers(fewest, spec.max_regions + 1, 500).tolist()
    needs = set() if config.region_losses is None else set(config.region_losses.needs)
    if "region_contrast" in config.objectives:
        needs.add("region_features")
    collator = Collator(
        Store(counts), spec, TOKENIZER, masking=config.masking, region_masking=config.region_masking,
        needs=needs, pool=[str(number) for number in range(500)], few_shapes=few_shapes,
    )  # fmt: skip
    source = Captions(TextLayout(TOKENIZER, spec), 64 * batches, 500, pairs=recipe.startswith("visualbert"))
    yield from Loader(source, collator, batch_size=64, seed=0, bucket=config.sort_by_length, prefetch=0)


def shape(pair: tuple[Batch, Targets]) -> Any:
    """What a compiled or recorded step is bound to."""
    leaves, structure = pytree.tree_flatten(pair)
    return structure, tuple(leaf if leaf is None else leaf.shape for leaf in leaves)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_epoch_has_a_handful_of_shapes(recipe: str) -> None:
    pairs = list(epoch(recipe, few_shapes=True))
    shapes = {shape(pair) for pair in pairs}
    assert len(pairs) == 40
    assert len(shapes) <= 8, f"{recipe}: {len(shapes)} shapes in {len(pairs)} batches"
    for batch, _ in pairs:
        batch.validate()
        assert batch.regions is not None
        for part in (batch.text, batch.regions):
            assert part.count is not None
            real = int(part.mask.sum())
            assert real <= part.count <= 1.25 * real + 1


def test_without_rounding_every_batch_has_its_own() -> None:
    pairs = list(epoch("visualbert-coco", few_shapes=False))
    assert len({shape(pair) for pair in pairs}) > 20
    assert all(batch.text.count is None for batch, _ in pairs)


def trimmed(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor[tuple(slice(length) for length in like.shape)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_padding_is_added(recipe: str) -> None:
    exact, few = epoch(recipe, few_shapes=False, batches=3), epoch(recipe, few_shapes=True, batches=3)
    for (batch, targets), (wider, labelled) in zip(exact, few, strict=True):
        for part, wide in ((batch.text, wider.text), (batch.regions, wider.regions), (targets, labelled)):
            for field in dataclasses.fields(part):  # type: ignore[arg-type]
                before, after = getattr(part, field.name), getattr(wide, field.name)
                if isinstance(before, Tensor):
                    assert torch.equal(trimmed(after, before), before), field.name
                    assert int(after.sum() - before.sum()) in (0, IGNORE * (after.numel() - before.numel())) or (
                        field.name == "size"
                    ), field.name
                elif isinstance(before, Slots):
                    assert positions(after) == positions(before), field.name
                    assert int(after.mask.sum()) == int(before.mask.sum())


def positions(slots: Slots) -> list[tuple[int, int]]:
    """(row, position) of the chosen ones among those that are taken."""
    assert slots.taken is not None
    width, at, mask = slots.at.shape[1], slots.at.flatten(), slots.mask.flatten()
    assert len(set(slots.taken.tolist())) == len(slots.taken)
    return [(number // width, int(at[number])) for number in slots.taken.tolist() if mask[number]]


SPEC = InputSpec(feature_size=WIDTH, max_tokens=32, max_regions=12)
LAYOUT = TextLayout(TOKENIZER, SPEC)


def make(*examples: Example, spec: InputSpec = SPEC, counts: Sequence[int] = (3, 0, 5), **settings: Any) -> Any:
    rngs = [runtime.generator_for(0, number) for number in range(len(examples))]
    return [
        Collator(Store(counts), spec, TOKENIZER, few_shapes=few, **settings)(examples, rngs) for few in (False, True)
    ]


def test_one_word_and_no_region_at_all() -> None:
    (_, _), (batch, _) = make(Example(id="1", rows=(LAYOUT.row("cat"),), images=("1",)))
    assert (batch.text.count, batch.regions.count) == (3, 0)
    batch.validate()


def test_a_text_of_three_hundred_words_is_cut_before_it_is_rounded() -> None:
    (_, _), (batch, _) = make(Example(id="1", rows=(LAYOUT.row("cat " * 300),), images=("0",)))
    assert batch.text.ids.shape == (1, 32)
    assert batch.text.count == 32


def test_text_alone() -> None:
    rngs = [runtime.generator_for(0)]
    example = Example(id="1", rows=(LAYOUT.row("a red cat"),), images=())
    batch, _ = Collator(None, SPEC, TOKENIZER, few_shapes=True)([example], rngs)
    assert batch.regions is None
    assert batch.text.count in (5, 6)
    assert batch.text.ids.shape == (1, 6)


def test_regions_that_rows_share_have_few_numbers_of_rows() -> None:
    """NLVR2: an image that an example names twice is given once."""
    row = LAYOUT.row("a cat")
    examples = [
        Example(id=str(number), rows=(row, row), images=("0", "2") if number % 3 else ("0", "0")) for number in range(8)
    ]
    (batch, _), (wider, _) = make(*examples)
    assert (len(batch.regions.mask), len(wider.regions.mask)) == (13, 16)
    assert torch.equal(wider.regions.row, batch.regions.row)
    assert (wider.regions.size > 0).all()


def test_rows_that_are_shared_keep_their_counts_when_each_gets_its_own() -> None:
    row = LAYOUT.row("a cat")
    examples = [Example(id=str(number), rows=(row, row), images=("2",)) for number in range(3)]
    _, (batch, _) = make(*examples)
    own = batch.unshared()
    assert (batch.regions.count, batch.regions.shared) == (16, 32)  # of 15 and 30
    assert (own.regions.count, own.regions.shared) == (32, None)
    own.validate()


def test_joined_images_have_room_for_each() -> None:
    spec = dataclasses.replace(SPEC, pair="sequence", max_regions=6)
    (batch, _), (wider, _) = make(Example(id="1", rows=(LAYOUT.row("a cat"),), images=("0", "2")), spec=spec)
    assert (batch.regions.mask.shape[1], wider.regions.mask.shape[1]) == (8, 9)


@pytest.mark.parametrize("images", [("0", "2"), ("1", "1")], ids=["some regions", "no region"])
def test_labels_of_regions_keep_the_whole_image_apart(images: tuple[str, str]) -> None:
    """Referring expressions: one label more than there are regions."""

    def labels(regions: Sequence[RegionArray]) -> dict[str, Any]:
        count = len(regions[0])
        return {"region_scores": np.arange(count + 1) / 10, "object_classes": np.arange(count + 1)}

    examples = [
        Example(id=image, rows=(LAYOUT.row("a cat"),), images=(image,), region_labels=labels) for image in images
    ]
    (_, targets), (wider, labelled) = make(*examples)
    width = wider.regions.mask.shape[1] + 1
    assert labelled.region_scores.shape == labelled.object_classes.shape == (2, width)
    assert torch.equal(trimmed(labelled.object_classes, targets.object_classes), targets.object_classes)
    assert (labelled.object_classes[:, targets.object_classes.shape[1] :] == IGNORE).all()
    assert (labelled.region_scores[:, targets.region_scores.shape[1] :] == 0).all()


def test_phrases_and_links() -> None:
    row = dataclasses.replace(LAYOUT.row("a red cat"), phrases=(3, 2), links=((3, 1),))

    def labels(regions: Sequence[RegionArray]) -> dict[str, Any]:
        return {"phrase_boxes": np.full((2, len(regions[0])), 0.5)}

    (batch, targets), (wider, labelled) = make(Example(id="1", rows=(row,), images=("2",), region_labels=labels))
    assert positions(wider.phrases) == positions(batch.phrases) == [(0, 3), (0, 2)]
    assert wider.links.shape == (1, wider.text.ids.shape[1], wider.regions.mask.shape[1])
    assert wider.links.nonzero().tolist() == batch.links.nonzero().tolist() == [[0, 3, 1]]
    assert labelled.phrase_boxes.shape == (1, wider.phrases.at.shape[1], wider.regions.mask.shape[1])
    assert labelled.phrase_boxes.sum() == targets.phrase_boxes.sum()
    assert wider.phrases.at.shape[1] >= FEWEST_SLOTS or wider.phrases.at.shape[1] == wider.text.ids.shape[1] == 6


def test_row_numbers_of_a_store_on_the_device() -> None:
    """What describes the average of an image has a number for each of its regions, behind a divisor."""
    examples = [Example(id=image, rows=(LAYOUT.row("a cat"),), images=(image,)) for image in ("0", "2")]
    (batch, targets), _ = make(*examples)
    rows, width = batch.regions.mask.shape
    numbers, whole = torch.arange(1, 1 + rows * width).view(rows, width, 1), torch.ones(rows, 1 + width)
    regions = dataclasses.replace(batch.regions, features=numbers * batch.regions.mask[..., None], whole=whole.double())
    wider, _ = give_few_shapes(dataclasses.replace(batch, regions=regions), targets, SPEC)
    most = wider.regions.mask.shape[1]
    assert most > width
    assert wider.regions.features.shape == (rows, most, 1)
    assert wider.regions.whole.shape == (rows, 1 + most)
    assert wider.regions.whole.sum() == whole.sum()
    assert wider.regions.features.sum() == regions.features.sum(), "row 0 holds zeros"


def test_pixels_are_left_as_they_are() -> None:
    (batch, targets), _ = make(Example(id="1", rows=(LAYOUT.row("a cat"),), images=("0",)))
    pixels = Pixels(images=torch.zeros(1, 3, 8, 8), size=torch.tensor([[8, 8]]), row=torch.zeros(1, dtype=torch.int64))
    batch = dataclasses.replace(batch, pixels=pixels)
    assert give_few_shapes(batch, targets, SPEC) == (batch, targets)


def test_a_wrong_count_is_named() -> None:
    (_, _), (batch, _) = make(Example(id="1", rows=(LAYOUT.row("a cat"),), images=("0",)))
    for count in (1, 1000):
        wrong = dataclasses.replace(batch, text=dataclasses.replace(batch.text, count=count))
        with pytest.raises(
            ValueError, match=f"a count of {count} tokens for 4 real ones in {math.prod(batch.text.ids.shape)}"
        ):
            wrong.validate()
