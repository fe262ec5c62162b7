"""Padding, boxes, slots and labels of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visling.data.answers import AnswerVocabulary, soft_scores
from visling.data.batches.collate import Collator
from visling.data.batches.collate_regions import MIN_EXTENT
from visling.data.batches.masking import TokenMasking, mask_tokens
from visling.data.batches.slots import TAKEN_MULTIPLE
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError, StoreError
from visling.runtime import generator_for
from visling.types import IGNORE, Batch, Example, InputSpec, RegionArray, RegionStore, Targets

TOKENIZER = Tokenizer()
F = 3
SPEC = InputSpec(feature_size=F, max_regions=4)
LAYOUT = TextLayout(TOKENIZER, SPEC)
SIZE = (200, 100)


class Memory:
    """A store in memory."""

    feature_size, fingerprint = F, "memory"

    def __init__(self, **images: RegionArray) -> None:
        self.images = images

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.images

    def __getitem__(self, image_id: str) -> RegionArray:
        if image_id not in self.images:
            raise StoreError(f"image {image_id!r} is not here.")
        return self.images[image_id]

    def __len__(self) -> int:
        return len(self.images)


def regions(value: float, count: int, box: Sequence[float] = (20, 10, 100, 50)) -> RegionArray:
    features = np.full((count, F), value, np.float16) + np.arange(count, dtype=np.float16)[:, None]
    return RegionArray(features=features, boxes=np.tile(np.array(box, np.float32), (count, 1)), size=SIZE)


STORE = Memory(a=regions(10, 2), b=regions(20, 3), none=regions(0, 0), many=regions(30, 6))


def example(
    name: str,
    *texts: str,
    images: tuple[str, ...] = ("a",),
    answer: bool = False,
    layout: TextLayout = LAYOUT,
    **labels: object,
) -> Example:
    return Example(id=name, rows=tuple(layout.row(text, answer=answer) for text in texts), images=images, labels=labels)


def make(
    *examples: Example,
    store: RegionStore | None = STORE,
    spec: InputSpec = SPEC,
    masking: TokenMasking | None = None,
) -> tuple[Batch, Targets]:
    rngs = [generator_for(3, number) for number in range(len(examples))]
    batch, targets = Collator(store, spec, TOKENIZER, masking=masking)(examples, rngs)
    batch.validate()
    return batch, targets


def test_padding() -> None:
    batch, targets = make(
        example("1", "a red cat"), example("2", "dog", images=("b",)), example("3", "cat", images=("none",))
    )
    assert batch.text.ids.tolist()[1] == [TOKENIZER.cls, TOKENIZER.id("dog"), TOKENIZER.sep, 0, 0]
    assert batch.text.mask.tolist()[1] == [True, True, True, False, False]
    assert batch.text.segments.dtype == torch.int64
    assert batch.text.answer_at is None
    found = batch.regions
    assert found is not None
    assert found.features.dtype == torch.float16
    assert found.features[:, :, 0].tolist() == [[10, 11, 0], [20, 21, 22], [0, 0, 0]]
    assert found.mask.tolist() == [[True, True, False], [True] * 3, [False] * 3]
    torch.testing.assert_close(found.boxes[0, 0], torch.tensor([0.1, 0.1, 0.5, 0.5]))
    assert not found.boxes[~found.mask].any()
    assert found.size.tolist() == [[200.0, 100.0]] * 3
    assert found.row is None
    assert found.image is None
    assert all(getattr(targets, field.name) is None for field in dataclasses.fields(targets))


def test_boxes_of_stored_features_are_mirrored_alone() -> None:
    examples = [
        example("1", "left of a cat"),
        example("2", "dog", images=("b",)),
        example("3", "cat", images=("none",)),
    ]

    def made(flip: float) -> tuple[Batch, Targets]:
        rngs = [generator_for(3, number) for number in range(3)]
        batch, targets = Collator(STORE, SPEC, TOKENIZER, masking=TokenMasking(rate=0.5), flip=flip)(examples, rngs)
        batch.validate()
        return batch, targets

    plain, mirrored = made(0.0)[0].regions, made(1.0)[0].regions
    assert plain is not None
    assert mirrored is not None
    assert torch.equal(plain.features, mirrored.features)
    assert torch.equal(plain.mask, mirrored.mask)
    expected = torch.tensor([(200 - 1 - 100) / 200, 0.1, (200 - 1 - 20) / 200, 0.5])
    torch.testing.assert_close(mirrored.boxes[plain.mask], expected.expand(5, 4))
    assert not mirrored.boxes[~plain.mask].any()
    assert STORE["a"].boxes[0].tolist() == [20, 10, 100, 50], "the store stays as it is"
    unmasked, _ = Collator(STORE, SPEC, TOKENIZER, flip=1.0)(examples, [generator_for(3, n) for n in range(3)])
    assert torch.equal(unmasked.text.ids, make(*examples)[0].text.ids), "captions stay"


def test_left_and_right_follow_mirrored_images() -> None:
    about = [example("1", "left of the right cat", "up"), example("2", "right", "leftmost", images=("a", "b"))]
    rngs = [generator_for(3, number) for number in range(2)]
    with_side = Collator(STORE, SPEC, TOKENIZER, flip=1.0, swap_sides=True)
    for one, told in zip(about, (["right of the left cat", "up"], ["left", "rightmost"]), strict=True):
        batch, _ = with_side([one], rngs[:1])
        assert [TOKENIZER.decode(row) for row in batch.text.ids.tolist()] == told
    plain, _ = Collator(STORE, SPEC, TOKENIZER, flip=0.0, swap_sides=True)(about[:1], rngs[:1])
    assert torch.equal(plain.text.ids, make(about[0])[0].text.ids)
    assert TOKENIZER.decode(about[0].rows[0].ids) == "left of the right cat", "examples stay as they are"
    joined = dataclasses.replace(SPEC, pair="sequence")
    with pytest.raises(ConfigError, match="swap_sides needs one image per row"):
        Collator(STORE, joined, TOKENIZER, flip=1.0, swap_sides=True)(
            [example("1", "left", images=("a", "b"))], rngs[:1]
        )


def test_labels_follow_mirrored_images() -> None:
    one = dataclasses.replace(example("1", "left"), labels={"answer": 0}, mirrored_labels={"answer": 1})
    for flip, swap, answer in ((1.0, True, 1), (0.0, True, 0), (1.0, False, 0)):
        _, targets = Collator(STORE, SPEC, TOKENIZER, flip=flip, swap_sides=swap)([one], [generator_for(3, 0)])
        assert targets.answer is not None
        assert targets.answer.tolist() == [answer]


def test_mirroring_is_drawn_first_and_only_if_asked_for() -> None:
    examples = [example(str(number), "a red cat") for number in range(40)]
    rngs, ahead = ([generator_for(3, number) for number in range(40)] for _ in range(2))
    batch, _ = Collator(STORE, SPEC, TOKENIZER, masking=TokenMasking(), flip=0.5)(examples, rngs)
    assert batch.regions is not None
    assert (batch.regions.boxes[:, 0, 0] > 0.2).tolist() == [rng.random() < 0.5 for rng in ahead]
    # What is masked is drawn after it, from the same generators.
    unmirrored, _ = Collator(STORE, SPEC, TOKENIZER, masking=TokenMasking())(examples, ahead)
    assert torch.equal(batch.text.ids, unmirrored.text.ids)


def test_a_row_never_exceeds_the_model() -> None:
    short = dataclasses.replace(SPEC, max_tokens=6)
    assert make(example("1", "a red cat"), spec=short)[0].text.ids.shape == (1, 5)
    with pytest.raises(DataError, match=r"example '2' has 7 pieces, the model takes 6"):
        make(example("1", "cat"), example("2", "a b c d e"), spec=short)


def test_first_regions_are_kept() -> None:
    batch, _ = make(example("1", "cat", images=("many",)))
    assert batch.regions is not None
    assert batch.regions.features[0, :, 0].tolist() == [30, 31, 32, 33]


@settings(max_examples=200, deadline=None)
@given(corners=st.lists(st.floats(-400, 400, width=32), min_size=4, max_size=4))
def test_any_box_becomes_a_valid_unit_box(corners: list[float]) -> None:
    x1, x2 = sorted(corners[::2])
    y1, y2 = sorted(corners[1::2])
    batch, _ = make(example("1", "cat", images=("x",)), store=Memory(x=regions(1, 1, (x1, y1, x2, y2))))
    assert batch.regions is not None
    found = batch.regions.boxes[0, 0]
    inside = torch.tensor([x1 / 200, y1 / 100, x2 / 200, y2 / 100]).clamp(0, 1)
    torch.testing.assert_close(found, inside, rtol=0, atol=1.5 * MIN_EXTENT)


@pytest.mark.parametrize("box", [(250, 10, 300, 20), (0, 0, 0, 0), (200, 100, 200, 100), (-9, -9, -5, -5)])
def test_boxes_without_area_are_widened(box: tuple[float, ...]) -> None:
    batch, _ = make(example("1", "cat", images=("x",)), store=Memory(x=regions(1, 1, box)))
    assert batch.regions is not None
    found = batch.regions.boxes[0, 0]
    assert float((found[2:] - found[:2]).min()) > 0


def test_text_only() -> None:
    batch, _ = make(example("1", "cat", images=()), store=None)
    assert batch.regions is None


def test_missing_image_names_the_example() -> None:
    with pytest.raises(StoreError, match="example 'second' needs image 'absent'"):
        make(example("first", "cat"), example("second", "dog", images=("absent",)))


def test_features_of_another_width() -> None:
    with pytest.raises(StoreError, match="width 3, the model takes 2048"):
        make(example("1", "cat"), spec=InputSpec())


# Groups


def test_choices_share_one_region_row() -> None:
    batch, targets = make(
        example("1", "one", "two", "three", "four", choice=2), example("2", "a", "b", "c", "d", images=("b",), choice=0)
    )
    assert batch.group == 4
    assert batch.text.ids.shape[0] == 8
    assert batch.regions is not None
    assert batch.regions.row is not None
    assert batch.regions.features.shape[0] == 2
    assert batch.regions.row.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert targets.choice is not None
    assert targets.choice.tolist() == [2, 0]


def test_two_images_as_two_rows() -> None:
    batch, targets = make(example("1", "same", "same", images=("a", "b"), answer=False, matched=1))
    assert batch.regions is not None
    assert batch.regions.row is None
    assert batch.regions.features[:, 0, 0].tolist() == [10, 20]
    assert targets.matched is not None
    assert targets.matched.tolist() == [1, 1], "matched belongs to rows"


def test_two_images_in_one_row() -> None:
    joined = dataclasses.replace(SPEC, pair="sequence")
    batch, _ = make(
        example("1", "x", images=("a", "many")),
        example("2", "x", images=("none", "b")),
        example("3", "x", images=("none", "none")),
        spec=joined,
    )
    assert batch.group == 1
    found = batch.regions
    assert found is not None
    assert found.image is not None
    assert found.features[:, :, 0].tolist() == [[10, 11, 30, 31, 32, 33], [20, 21, 22, 0, 0, 0], [0] * 6]
    assert found.mask.sum(1).tolist() == [6, 3, 0]
    assert found.image[0].tolist() == [0, 0, 1, 1, 1, 1]
    assert found.image[1, :3].tolist() == [1, 1, 1]
    assert found.size.shape == (3, 2)


def test_examples_that_do_not_fit_together() -> None:
    with pytest.raises(DataError, match="images for one row"):
        make(example("1", "x", images=("a", "b")))
    with pytest.raises(DataError, match="has 2 rows where others have 1"):
        make(example("1", "x"), example("2", "x", "y"))
    with pytest.raises(DataError, match="3 images for 2 rows"):
        make(example("1", "x", "y", images=("a", "b", "a")))
    with pytest.raises(DataError, match="example '2' has 2 images where others have 1"):
        make(example("1", "x", "y"), example("2", "x", "y", images=("a", "b")))
    with pytest.raises(DataError, match="zero examples"):
        make()


# Answer slots, masks, phrases, links


def test_answer_slot_positions() -> None:
    layout = TextLayout(TOKENIZER, dataclasses.replace(SPEC, answer_slot="same_segment"))
    batch, _ = make(
        example("1", "is it red?", answer=True, layout=layout), example("2", "why?", answer=True, layout=layout)
    )
    assert batch.text.answer_at is not None
    assert batch.text.answer_at.tolist() == [5, 3]
    assert batch.text.ids.gather(1, batch.text.answer_at[:, None]).flatten().tolist() == [TOKENIZER.mask] * 2
    with pytest.raises(DataError, match="1 of 2 rows have an answer slot"):
        make(example("1", "is it red?", answer=True, layout=layout), example("2", "why?"))


@pytest.mark.parametrize("whole_word", [False, True])
def test_masked_tokens_equal_row_by_row_masking(whole_word: bool) -> None:
    masking = TokenMasking(rate=0.4, whole_word=whole_word)
    examples = [
        example(str(number), text)
        for number, text in enumerate(["a red cat sits on unaffable mats", "dog", "one two three four five six"])
    ]
    batch, targets = make(*examples, masking=masking)
    slots, original = targets.token_slots, targets.token_ids
    assert slots is not None
    assert original is not None
    assert slots.at.shape == slots.mask.shape == original.shape
    assert slots.at.shape[1] % 4 == 0
    for number, item in enumerate(examples):
        ids, at, old = mask_tokens(item.rows[0], masking, TOKENIZER, generator_for(3, number))
        assert batch.text.ids[number, : len(ids)].tolist() == ids.tolist()
        real = slots.mask[number]
        assert slots.at[number][real].tolist() == at.tolist()
        assert original[number][real].tolist() == old.tolist()
        assert not slots.at[number][~real].any()
    assert slots.mask.any()


def test_chosen_slots_of_a_batch_are_listed() -> None:
    texts = [f"a {'red ' * number}cube" for number in range(1, 9)]
    _, targets = make(
        *(example(str(number), text) for number, text in enumerate(texts)), masking=TokenMasking(rate=0.4)
    )
    slots = targets.token_slots
    assert slots is not None
    assert slots.taken is not None
    number = int(slots.mask.sum())
    listed = slots.mask.flatten()[slots.taken]
    assert listed[:number].all()
    assert not listed[number:].any()
    assert (
        len(slots.taken)
        == len(set(slots.taken.tolist()))
        == min(-(-number // TAKEN_MULTIPLE) * TAKEN_MULTIPLE, slots.mask.numel())
    )


def test_nothing_masked_leaves_empty_slots() -> None:
    _, targets = make(example("1", "cat"), masking=TokenMasking(rate=0.0))
    assert targets.token_slots is not None
    assert targets.token_slots.mask.tolist() == [[False] * 4]


def test_rows_of_a_group_are_masked_apart() -> None:
    words = "one two three four five six seven eight nine ten"
    batch, _ = make(example("1", words, words), masking=TokenMasking(rate=0.5))
    assert batch.text.ids[0].tolist() != batch.text.ids[1].tolist()


def test_phrases_and_links() -> None:
    plain = example("1", "a red cat")
    row = dataclasses.replace(plain.rows[0], phrases=(3, 2), links=((3, 0), (3, 1), (2, 3)))
    batch, _ = make(dataclasses.replace(plain, rows=(row,)), example("2", "dog", images=("many",)))
    assert batch.phrases is not None
    assert batch.phrases.at.tolist() == [[3, 2, 0, 0], [0] * 4]
    assert batch.phrases.mask.tolist() == [[True, True, False, False], [False] * 4]
    assert batch.links is not None
    assert batch.links.shape == (2, 5, 4)
    assert batch.links.nonzero().tolist() == [[0, 3, 0], [0, 3, 1]], "a link to a region that is not real is left out"
    assert make(example("1", "cat"))[0].links is None


# Labels


def test_integer_labels_may_be_missing() -> None:
    _, targets = make(example("1", "x", matched=1), example("2", "x"))
    assert targets.matched is not None
    assert targets.matched.tolist() == [1, IGNORE]
    assert targets.matched.dtype == torch.int64


def test_soft_answers_are_dense() -> None:
    vocabulary = AnswerVocabulary(["yes", "no", "red"])
    scores = [
        soft_scores(["yes"] * 2 + ["red"] * 8, vocabulary),
        soft_scores(["blue"], vocabulary),
        soft_scores(["no"] * 3, vocabulary),
    ]
    _, targets = make(*(example(str(number), "x", answer=False) for number in range(3)))
    assert targets.answer is None
    examples = [
        dataclasses.replace(example(str(number), "x"), labels={"answer": value}) for number, value in enumerate(scores)
    ]
    _, targets = make(*examples)
    assert targets.answer is not None
    torch.testing.assert_close(targets.answer, torch.tensor([[0.6, 0, 1], [0, 0, 0], [0, 0.9, 0]]))


def test_array_labels_are_padded() -> None:
    _, targets = make(
        example(
            "1", "x", region_scores=np.array([0.5, 1.0]), object_classes=np.array([4, 5]), phrase_boxes=np.ones((1, 2))
        ),
        example(
            "2",
            "x",
            images=("b",),
            region_scores=np.array([1.0, 0, 0]),
            object_classes=np.array([1, 2, 3]),
            phrase_boxes=np.ones((2, 3)),
        ),
    )
    assert targets.region_scores is not None
    assert targets.object_classes is not None
    assert targets.phrase_boxes is not None
    assert targets.region_scores.tolist() == [[0.5, 1, 0], [1, 0, 0]]
    assert targets.object_classes.tolist() == [[4, 5, IGNORE], [1, 2, 3]]
    assert targets.phrase_boxes.tolist() == [[[1, 1, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]]]


def test_labels_per_row() -> None:
    _, targets = make(
        example("1", "x", "y", matched=[1, 0]), example("2", "x", "y", matched=np.array([0, 0])), example("3", "x", "y")
    )
    assert targets.matched is not None
    assert targets.matched.tolist() == [1, 0, 0, 0, IGNORE, IGNORE]


def test_unknown_label() -> None:
    with pytest.raises(ConfigError, match=r"'matches' .* Did you mean 'matched'"):
        make(example("1", "x", matches=1))


def test_array_labels_must_not_be_missing() -> None:
    with pytest.raises(DataError, match="example '2' lacks the label 'region_scores'"):
        make(example("1", "x", region_scores=np.ones(2)), example("2", "x"))


def test_every_row_needs_its_label() -> None:
    with pytest.raises(DataError, match=r"example '1' has 3 values of the label 'matched' for 2 rows"):
        make(example("1", "x", "y", matched=[1, 0, 1]))


# Labels that are computed from the regions


def score_boxes(images: Sequence[RegionArray]) -> dict[str, Any]:
    """The first feature of every region, and how many regions there are."""
    values = np.concatenate([image.features[:, 0] for image in images])
    return {"region_scores": values, "choice": len(values)}


def test_labels_of_regions_are_padded_to_the_regions_that_are_shown() -> None:
    asked = [
        dataclasses.replace(example(name, "x", images=(name,), matched=1), region_labels=score_boxes)
        for name in ("a", "many", "none")
    ]
    batch, targets = make(*asked)
    assert batch.regions is not None
    assert targets.region_scores is not None
    assert targets.choice is not None
    assert targets.region_scores.tolist() == [[10, 11, 0, 0], [30, 31, 32, 33], [0] * 4]
    assert targets.region_scores.tolist() == batch.regions.features[:, :, 0].tolist()
    assert targets.choice.tolist() == [2, 4, 0]
    assert targets.matched is not None
    _, alone = make(dataclasses.replace(asked[0], images=("none",)))
    assert alone.region_scores is not None
    assert alone.region_scores.tolist() == [[0.0]], "one padded region, as the batch has"


def test_labels_of_regions_follow_their_order_and_the_joint_limit() -> None:
    confident = dataclasses.replace(regions(10, 3), class_confidence=np.array([0.1, 0.9, 0.5], np.float16))
    asked = dataclasses.replace(example("1", "x", images=("c",)), region_labels=score_boxes)
    spec = dataclasses.replace(SPEC, region_order="confidence")
    _, targets = make(asked, store=Memory(c=confident), spec=spec)
    assert targets.region_scores is not None
    assert targets.region_scores.tolist() == [[11, 12, 10]]
    _, targets = make(asked, store=Memory(c=confident), spec=dataclasses.replace(spec, joint_limit=5))
    assert targets.region_scores is not None
    assert targets.region_scores.tolist() == [[11, 12]]


def test_labels_of_regions_run_over_joined_images() -> None:
    asked = dataclasses.replace(example("1", "x", images=("a", "b")), region_labels=score_boxes)
    batch, targets = make(asked, spec=dataclasses.replace(SPEC, pair="sequence"))
    assert batch.regions is not None
    assert targets.region_scores is not None
    assert targets.region_scores.tolist() == batch.regions.features[:, :, 0].tolist() == [[10, 11, 20, 21, 22]]


def test_labels_of_regions_are_given_for_every_row() -> None:
    def label(images: Sequence[RegionArray]) -> dict[str, Any]:
        return {"region_scores": np.eye(2, len(images[0]))}

    _, targets = make(dataclasses.replace(example("1", "x", "y"), region_labels=label))
    assert targets.region_scores is not None
    assert targets.region_scores.tolist() == [[1, 0], [0, 1]]


def test_labels_of_regions_are_left_out_without_regions() -> None:
    _, targets = make(dataclasses.replace(example("1", "x", images=()), region_labels=score_boxes), store=None)
    assert targets.region_scores is None


def test_a_label_is_given_once() -> None:
    asked = dataclasses.replace(example("1", "x", choice=3), region_labels=score_boxes)
    with pytest.raises(ConfigError, match=r"example '1' and its region_labels both give the label 'choice'"):
        make(asked)


def test_an_empty_store_is_a_store() -> None:
    with pytest.raises(StoreError, match="example '1' needs image 'a'"):
        make(example("1", "x"), store=Memory())
