"""Images and texts that rows of a batch have in common are given once; whatever makes a row its own keeps it apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from visling.data.batches.collate import Collator
from visling.data.batches.masking import RegionMasking, TokenMasking
from visling.data.batches.sharing import Scope, number_images, order_by_images, share_texts
from visling.data.text import TextLayout, Tokenizer
from visling.runtime import generator_for
from visling.types import (
    Batch,
    Canvas,
    Example,
    InputSpec,
    MaskGrid,
    RegionArray,
    RegionObjects,
    Targets,
    Text,
)

TOKENIZER = Tokenizer()
F = 3
COUNTS = {"a": 2, "b": 4, "c": 0}
SPEC = InputSpec(feature_size=F, max_regions=4)


class Store:
    """Images of 20 x 10 pixels with as many regions as `COUNTS` says; it notes which are read."""

    feature_size, fingerprint = F, "memory"

    def __init__(self) -> None:
        self.read: list[str] = []

    def __contains__(self, image_id: str) -> bool:
        return image_id in COUNTS

    def __len__(self) -> int:
        return len(COUNTS)

    def __getitem__(self, image_id: str) -> RegionArray:
        self.read.append(image_id)
        count = COUNTS[image_id]
        corners = np.arange(count, dtype=np.float32)[:, None] + np.array([0, 0, 5, 5], np.float32)
        return RegionArray(
            features=np.full((count, F), ord(image_id), np.float16), boxes=corners.reshape(-1, 4), size=(20, 10)
        )


def ask(*about: tuple[tuple[str, ...], Sequence[str]], spec: InputSpec = SPEC, **fields: Any) -> list[Example]:
    """Examples about images, in texts."""
    layout = TextLayout(TOKENIZER, spec)
    return [
        Example(id=str(number), rows=tuple(map(layout.row, texts)), images=images, **fields)
        for number, (images, texts) in enumerate(about)
    ]


def collate(
    examples: Sequence[Example], *, share: bool = True, spec: InputSpec = SPEC, store: Store | None = None, **given: Any
) -> tuple[Batch, Targets]:
    rngs = [generator_for(0, number) for number in range(len(examples))]
    batch, targets = Collator(store or Store(), spec, TOKENIZER, share=share, **given)(examples, rngs)
    batch.validate()
    return batch, targets


def assert_equal(found: Any, expected: Any) -> None:
    """Two contracts hold the same tensors."""
    for name in type(expected).__dataclass_fields__:
        ours, theirs = getattr(found, name), getattr(expected, name)
        if isinstance(theirs, Tensor):
            assert torch.equal(ours, theirs), name
        elif hasattr(theirs, "__dataclass_fields__"):
            assert_equal(ours, theirs)
        else:
            assert ours == theirs, name


QUESTIONS = (
    (("b",), ["what is red?"]),
    (("a",), ["what is it?"]),
    (("b",), ["what is it?"]),
    (("c",), ["moon"]),
    (("a",), ["how many stars are left of the moon?"]),
)


def test_questions_about_one_image_read_it_once() -> None:
    store = Store()
    batch, _ = collate(ask(*QUESTIONS), store=store)
    assert store.read == ["b", "a", "c"]
    assert batch.regions is not None
    assert batch.regions.row is not None
    assert batch.regions.row.tolist() == [0, 1, 0, 2, 1]
    assert batch.text.row is not None
    assert batch.text.row.tolist() == [0, 1, 1, 2, 3]
    apart, _ = collate(ask(*QUESTIONS), share=False)
    assert apart.regions is not None
    assert (apart.regions.row, apart.text.row) == (None, None)
    assert_equal(batch.unshared(), apart)


@pytest.mark.parametrize(
    ("about", "pair", "row"),
    [
        # one image for the choices of an example
        (((("a",), ["one", "two"]), (("b",), ["one", "two"]), (("a",), ["two", "one"])), "rows", [0, 0, 1, 1, 0, 0]),
        # an image for each row
        (((("a", "b"), ["it"] * 2), (("b", "c"), ["it"] * 2), (("a", "a"), ["on"] * 2)), "rows", [0, 1, 1, 2, 0, 0]),
        # images that are joined in one row: shared as pairs
        (((("a", "b"), ["it"]), (("b", "a"), ["on"]), (("a", "b"), ["on"])), "sequence", [0, 1, 0]),
    ],
)  # fmt: skip
def test_every_way_in_which_examples_show_images(about: Any, pair: Any, row: list[int]) -> None:
    spec = replace(SPEC, pair=pair)
    batch, _ = collate(ask(*about, spec=spec), spec=spec)
    assert batch.regions is not None
    assert batch.regions.row is not None
    assert batch.regions.row.tolist() == row
    apart, _ = collate(ask(*about, spec=spec), spec=spec, share=False)
    assert_equal(batch.unshared(), apart.unshared())


def test_labels_links_and_phrases_stay_with_their_rows() -> None:
    def label(images: Sequence[RegionArray]) -> dict[str, Any]:
        return {"region_scores": images[0].boxes[:, 0]}

    examples = ask(
        (("b",), ["the red star"]), (("b",), ["the red star"]), (("a",), ["the red star"]), region_labels=label
    )
    marks: list[dict[str, Any]] = [
        {"links": ((1, 3),)},
        {"links": ((2, 0),), "phrases": (2,)},
        {"links": ((0, 2),), "phrases": (1, 3)},
    ]
    examples = [
        replace(example, rows=(replace(example.rows[0], **mark),))
        for example, mark in zip(examples, marks, strict=True)
    ]
    (batch, targets), (apart, expected) = collate(examples), collate(examples, share=False)
    assert len(batch.text.ids) == 1
    assert batch.regions is not None
    assert len(batch.regions.features) == 2
    assert batch.links is not None
    assert batch.links.nonzero().tolist() == [[0, 1, 3], [1, 2, 0]], (
        "a link to a region that an image lacks is left out"
    )
    assert_equal(batch.unshared(), apart)
    assert_equal(targets, expected)


def know_links(regions: Sequence[int]) -> Any:
    return lambda _: np.array(regions)


def test_links_to_objects_are_those_of_each_question() -> None:
    examples = ask((("b",), ["red star"]), (("a",), ["red star"]), (("b",), ["red star"]))
    objects = ([3, 1], [0, 1], [2, -1])
    examples = [
        replace(
            example,
            rows=(replace(example.rows[0], links=((1, 0), (2, 1))),),
            linked_regions=know_links(at),
        )
        for example, at in zip(examples, objects, strict=True)
    ]
    batch, _ = collate(examples)
    assert batch.links is not None
    assert batch.links.nonzero().tolist() == [[0, 1, 3], [0, 2, 1], [1, 1, 0], [1, 2, 1], [2, 1, 2]]
    assert_equal(batch.unshared(), collate(examples, share=False)[0])


@pytest.mark.parametrize(
    "own",
    [
        {"region_masking": RegionMasking(rate=0.5)},
        {"flip": 0.5},
        {"spec": replace(SPEC, joint_limit=6)},
        {"spec": replace(SPEC, joint_limit=6), "masking": TokenMasking()},
    ],
)
def test_what_is_drawn_or_cut_for_every_row_is_its_own(own: dict[str, Any]) -> None:
    batch, _ = collate(ask(*QUESTIONS), **own)
    assert batch.regions is not None
    assert batch.regions.row is None
    apart, _ = collate(ask(*QUESTIONS), share=False, **own)
    assert_equal(batch.unshared(), apart)


def test_examples_that_choose_their_regions_read_their_own() -> None:
    examples = ask((("b",), ["one"]), (("b",), ["two"]))
    examples[0] = replace(examples[0], chosen_regions=lambda regions: np.array([2, 0]))
    batch, _ = collate(examples)
    assert batch.regions is not None
    assert batch.regions.mask.sum(1).tolist() == [2, 4]
    assert_equal(batch, collate(examples, share=False)[0])


def test_training_shares_within_an_example_alone() -> None:
    batch, _ = collate(ask((("a", "a"), ["one", "one"]), (("a", "b"), ["one", "one"])), share=False)
    assert batch.regions is not None
    assert batch.regions.row is not None
    assert batch.regions.row.tolist() == [0, 0, 1, 2]
    assert batch.text.row is None


# Pixels


class Pictures:
    """Pictures that differ from image to image."""

    mask_grid = MaskGrid(size=2, inclusive=True)
    whole_image = False

    def __init__(self, canvas: Canvas | None) -> None:
        self.canvas, self.asked = canvas, list[str]()

    def read(self, image_ids: Sequence[str], mirrored: Sequence[bool]) -> list[Tensor]:
        self.asked += image_ids
        return [torch.full((3, 10, 20), float(ord(image))) for image in image_ids]


def know(classes: Sequence[int]) -> Any:
    return lambda regions, grid: RegionObjects(
        classes=np.array(classes), masks=np.ones((len(classes), grid.size, grid.size), bool)
    )


@pytest.mark.parametrize("canvas", [None, Canvas(width=30, height=30, colour=(0.0, 0.0, 0.0))])
@pytest.mark.parametrize("objects", [False, True])
def test_a_picture_of_several_questions_is_read_once(canvas: Canvas | None, objects: bool) -> None:
    """Questions that know the objects of their image have regions of their own, in one picture."""
    examples = ask((("b",), ["one", "two"]), (("a",), ["one", "two"]), (("b",), ["two", "on"]))
    if objects:
        known = ([1, 2, 3, 4], [5, 6], [7, 8, 9, 10])
        examples = [replace(each, region_objects=know(own)) for each, own in zip(examples, known, strict=True)]
    pictures, alone = Pictures(canvas), Pictures(canvas)
    batch, _ = collate(examples, pictures=pictures)
    apart, _ = collate(examples, share=False, pictures=alone)
    assert (pictures.asked, alone.asked) == (["b", "a"], ["b", "a", "b"])
    assert batch.pixels is not None
    assert apart.pixels is not None
    assert batch.regions is not None
    assert len(batch.regions.mask) == (3 if objects else 2)
    seen, expected = batch.unshared(), apart.unshared()
    assert_equal(seen.regions, expected.regions)
    for ours, theirs in zip(pictures_of(seen), pictures_of(expected), strict=True):
        assert torch.equal(ours, theirs)
    if objects:
        assert batch.pixels.classes is not None
        assert batch.pixels.classes.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 10]]


def pictures_of(batch: Batch) -> list[Tensor]:
    """Picture, size and corner of each row, and what objects its regions show."""
    pixels = batch.pixels
    assert pixels is not None
    found = [pixels.images[pixels.row], pixels.size[pixels.row]]
    found += [] if pixels.corner is None else [pixels.corner[pixels.row]]
    return found + [each for each in (pixels.classes, pixels.masks) if each is not None]


# The parts


@pytest.mark.parametrize("scope", ["nothing", "example", "batch"])
@given(data=st.data())
def test_numbers_lead_to_the_images_that_were_named(scope: Scope, data: Any) -> None:
    images, group = data.draw(st.sampled_from([(1, 1), (1, 4), (2, 2), (2, 1), (3, 1)]))
    named = data.draw(st.lists(st.tuples(*[st.sampled_from("abc")] * images), min_size=1, max_size=8))
    joined = images if group == 1 else 1
    ids, shown, row = number_images(named, group=group, scope=scope)
    assert [tuple(ids[at] for at in own) for own in shown] == named
    rows = np.arange(len(ids) // joined) if row is None else row
    units = [tuple(ids[at : at + joined]) for at in range(0, len(ids), joined)]
    expected = [
        tuple(own) if joined > 1 else (own[place if images > 1 else 0],) for own in named for place in range(group)
    ]
    assert [units[at] for at in rows] == expected
    if scope == "batch":
        assert len(units) == len(set(units))
    if scope == "nothing":
        assert ids == [image for own in named for image in own]


def test_texts_that_differ_in_anything_stay_apart() -> None:
    ids = torch.tensor([[5, 6, 0]] * 8)
    text = Text(
        ids=ids.index_put((torch.tensor([1]), torch.tensor([1])), torch.tensor(7)),
        mask=torch.tensor([[True, True, place == 2] for place in range(8)]),
        segments=torch.tensor([[0, int(place == 3), 0] for place in range(8)]),
        answer_at=torch.tensor([1 - int(place == 4) for place in range(8)]),
        task=torch.tensor([int(place == 5) for place in range(8)]),
    )
    shared = share_texts(text)
    assert shared.row is not None
    assert shared.row.tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert_equal(replace(shared, row=None).map(lambda tensor: tensor[shared.row]), text)
    assert share_texts(replace(shared, row=None)).row is None


def test_groups_come_in_the_order_of_their_images() -> None:
    named = [("b",), ("a",), ("b",), ("c",), ("a",), ("b",)]
    assert order_by_images(named).tolist() == [0, 2, 5, 1, 4, 3]
    assert order_by_images([("a", "b"), ("b", "a"), ("a", "b")]).tolist() == [0, 2, 1]
    assert order_by_images([()] * 3).tolist() == [0, 1, 2]
    assert order_by_images([]).tolist() == []


@given(named=st.lists(st.sampled_from("abcdefgh").map(lambda name: (name,))), size=st.integers(1, 9))
def test_a_batch_reads_at_most_one_image_that_another_has_read(named: list[tuple[str, ...]], size: int) -> None:
    order = order_by_images(named)
    assert sorted(order) == list(range(len(named)))
    batches = [order[first : first + size] for first in range(0, len(named), size)]
    reads = sum(len({named[at] for at in batch}) for batch in batches)
    assert reads <= len(set(named)) + max(len(batches) - 1, 0)
