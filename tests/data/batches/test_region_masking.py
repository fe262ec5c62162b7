"""Which regions are hidden, what the model sees of them, and what is asked: prescribed draws, rates, and batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.releases import REGION_MASKING, TOKEN_MASKING
from numpy.typing import NDArray

from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader
from visling.data.batches.masking import (
    MaskedRegions,
    RegionMasking,
    TokenMasking,
    count_numbers,
    hide_pixels,
    mask_regions,
)
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, StoreError
from visling.runtime import generator_for
from visling.types import IGNORE, Batch, Example, InputSpec, RegionArray, Slots, Targets

TOKENIZER = Tokenizer()
F, C = 3, 5
SPEC = InputSpec(feature_size=F, max_regions=4)
LAYOUT = TextLayout(TOKENIZER, SPEC)
DRAWS = 100_000
LABELS = {"region_probs", "region_classes", "region_attributes", "region_weights", "attribute_weights"}
ALL = frozenset({"class_slots", "feature_slots", "region_features", *LABELS})


def within(count: int, expected_rate: float, total: int) -> None:
    """Five standard deviations of a binomial count."""
    spread = 5 * (total * expected_rate * (1 - expected_rate)) ** 0.5
    assert abs(count - expected_rate * total) <= spread, f"got {count / total:.4f}, expected {expected_rate:.4f}"


def boxes(count: int) -> NDArray[np.float32]:
    """Boxes that do not touch."""
    left = np.arange(count, dtype=np.float32) * 10
    return np.stack([left, 0 * left, left + 5, 0 * left + 5], axis=1)


UNREAD = 0.999
"""Stands for the example and the region of a feature that is not replaced."""


class Script:
    """A generator that gives prescribed draws; (k, n) is one that means the k-th of n."""

    def __init__(self, draws: Sequence[Any]) -> None:
        self.draws = list(draws)

    def random(self, count: int | None = None) -> Any:
        if count is not None:
            return np.array([self.random() for _ in range(count)])
        draw = self.draws.pop(0)
        return (draw[0] + 0.5) / draw[1] if isinstance(draw, tuple) else draw


class Memory:
    """A store in memory."""

    feature_size, fingerprint = F, "memory"

    def __init__(self, **images: RegionArray) -> None:
        self.images = images

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.images

    def __getitem__(self, image_id: str) -> RegionArray:
        return self.images[image_id]

    def __len__(self) -> int:
        return len(self.images)


def image(value: float, count: int, **changes: Any) -> RegionArray:
    numbers = np.arange(count)
    given: dict[str, Any] = {
        "features": (np.full((count, F), value) + numbers[:, None]).astype(np.float16),
        "boxes": boxes(count),
        "size": (200, 100),
        "classes": (numbers + 1).astype(np.int16),
        "class_confidence": ((numbers + 1) / 10).astype(np.float16),
        "attributes": np.where(numbers[:, None] % 2, -1, numbers[:, None] + 2).astype(np.int16),
        "attribute_confidence": ((numbers[:, None] + 1) / 20).astype(np.float16),
        "probs": np.eye(C, dtype=np.float16)[numbers % C],
    }
    return RegionArray(**{**given, **changes})


STORE = Memory(a=image(10, 2), b=image(20, 3), none=image(0, 0), many=image(30, 6))


def example(name: str, text: str = "a red cat", images: tuple[str, ...] = ("a",), **labels: Any) -> Example:
    return Example(
        id=name, rows=(LAYOUT.row(text),) * max(len(labels.pop("rows", "x")), 1), images=images, labels=labels
    )


def make(
    *examples: Example, spec: InputSpec = SPEC, draws: Sequence[Sequence[Any]] | None = None, **settings: Any
) -> tuple[Batch, Targets]:
    rngs: Any = (
        [generator_for(3, number) for number in range(len(examples))]
        if draws is None
        else [Script(row) for row in draws]
    )
    settings = {"store": STORE, "masking": None, "needs": ALL, **settings}
    batch, targets = Collator(settings.pop("store"), spec, TOKENIZER, **settings)(examples, rngs)
    batch.validate()
    if draws is not None:
        assert not any(rng.draws for rng in rngs), "draws are left over"
    return batch, targets


def chosen(slots: Slots | None) -> list[list[int]]:
    assert slots is not None
    return [row[mask].tolist() for row, mask in zip(slots.at, slots.mask, strict=True)]


# Draws


def count_stored(names: Sequence[str]) -> NDArray[np.int64]:
    return np.array([len(STORE[name]) for name in names], np.int64)


def mask_image(
    corners: NDArray[np.float32], masking: RegionMasking, rng: Any, *, pool: Sequence[str] = ("a", "many")
) -> MaskedRegions:
    """`mask_regions` for a single image."""
    numbers = rng.random(len(corners) * count_numbers(masking))
    real = np.ones((1, len(corners)), bool)
    return mask_regions(corners[None], real, masking, numbers, pool=pool, count=count_stored)


def test_lxmert_draws_an_example_and_a_region_for_each_feature() -> None:
    script = Script(
        [
            *(0.15 * 0.85, (1, 3), (2, 6)),
            *(0.2, UNREAD, UNREAD),
            *(0.15 * 0.79, UNREAD, UNREAD),
            *(0.15 * 0.95, UNREAD, UNREAD),
            *(0.0, UNREAD, UNREAD),
            *(0.15 * 0.81, (0, 3), (0, 2)),
        ]
    )
    found = mask_image(boxes(6), REGION_MASKING["lxmert"], script, pool=("a", "many", "b"))
    assert not script.draws
    assert found.chosen.tolist() == [[True, False, True, True, True, True]]
    assert found.hidden.tolist() == [[False, False, True, False, True, False]]
    assert found.replaced.tolist() == [[True, False, False, False, False, True]]
    assert found.donors[0] == ["many", "a"]
    assert found.donors[1].tolist() == [2, 0]


def test_a_random_image_without_regions_hides_the_feature() -> None:
    script = Script([0.15 * 0.85, (1, 2), UNREAD, 0.15 * 0.85, (0, 2), (1, 2)])
    found = mask_image(boxes(2), REGION_MASKING["lxmert"], script, pool=("a", "none"))
    assert found.hidden.tolist() == [[True, False]]
    assert found.replaced.tolist() == [[False, True]]
    assert (found.donors[0], found.donors[1].tolist()) == (["a"], [1])


@pytest.mark.parametrize("release", list(REGION_MASKING))
def test_a_batch_is_masked_as_its_images_one_by_one(release: str) -> None:
    masking, rng = dataclasses.replace(REGION_MASKING[release], rate=0.5), generator_for(8)
    counts = [5, 0, 1, 40, 40]
    corners = np.zeros((len(counts), 40, 4), np.float32)
    for row, count in enumerate(counts):
        low = rng.uniform(0, 20, (count, 2))
        corners[row, :count] = np.concatenate([low, low + rng.uniform(5, 20, (count, 2))], axis=1)
    real = np.arange(40) < np.array(counts)[:, None]
    numbers = [rng.random(count * count_numbers(masking)) for count in counts]
    pool = ("a", "none", "many")
    together = mask_regions(corners, real, masking, np.concatenate(numbers), pool=pool, count=count_stored)
    donors = list(zip(together.donors[0], together.donors[1].tolist(), strict=True))
    for row, count in enumerate(counts):
        alone = mask_regions(
            corners[row : row + 1, :count], real[row : row + 1, :count], masking, numbers[row],
            pool=pool, count=count_stored,
        )  # fmt: skip
        for name in ("chosen", "hidden", "replaced", "overlapping"):
            found = getattr(together, name)[row]
            assert found[:count].tolist() == getattr(alone, name)[0].tolist(), name
            assert not found[count:].any(), "padding is left alone"
        own = list(zip(alone.donors[0], alone.donors[1].tolist(), strict=True))
        assert donors[: len(own)] == own
        del donors[: len(own)]
    assert not donors
    assert together.chosen.any()
    assert together.replaced.any() == (masking.random > 0)
    assert together.overlapping.any() == (release == "vilbert-multitask")


@pytest.mark.parametrize("release", list(REGION_MASKING))
def test_rates_over_many_draws(release: str) -> None:
    masking = dataclasses.replace(REGION_MASKING[release], whole="model")
    found = mask_image(boxes(DRAWS), masking, generator_for(4))
    number, replaced = int(found.chosen.sum()), int(found.replaced.sum())
    within(number, 0.15, DRAWS)
    within(int(found.hidden.sum()), masking.hide, number)
    within(replaced, masking.random, number)
    assert not (found.hidden & ~found.chosen).any()
    assert not (found.replaced & (found.hidden | ~found.chosen)).any()
    if release == "lxmert":
        assert masking.hide == 0.8
        assert replaced == len(found.donors[0]) == len(found.donors[1])
        from_many = [region for name, region in zip(*found.donors, strict=True) if name == "many"]
        within(len(from_many), 0.5, replaced)
        for region in range(6):
            within(from_many.count(region), 1 / 6, len(from_many))
    else:
        assert masking.hide == (0.8 if release == "cvlp" else 0.9)


@pytest.mark.parametrize("masking", [RegionMasking(rate=0.4), RegionMasking(rate=0.4, hide=0.5, random=0.4)])
def test_the_same_generator_gives_the_same_regions(masking: RegionMasking) -> None:
    found = [mask_image(boxes(50), masking, generator_for(7)) for _ in range(2)]
    assert np.array_equal(found[0].chosen, found[1].chosen)
    assert np.array_equal(found[0].hidden, found[1].hidden)
    assert found[0].donors[0] == found[1].donors[0]
    assert np.array_equal(found[0].donors[1], found[1].donors[1])


def test_overlapping_regions_are_hidden_but_not_asked_for() -> None:
    corners = np.array(
        [[0, 0, 99, 99], [0, 0, 99, 79], [0, 0, 99, 38], [50, 0, 149, 99], [300, 300, 310, 310]], np.float32
    )
    masking = RegionMasking(hide_overlapping=True)
    found = mask_image(corners, masking, Script([0.0, 0.5, 0.5, 0.5, 0.149]))
    assert found.chosen.tolist() == [[True, False, False, False, True]]
    assert found.hidden.tolist() == [[True, True, False, False, False]], (
        "IoU 0.8 hides; 0.39 and 1/3 do not; a chosen region that stays visible stays"
    )
    assert not mask_image(corners, masking, Script([0.149, 0.5, 0.5, 0.5, 0.5])).hidden.any(), (
        "an overlap with a region that is not hidden hides nothing"
    )


def test_overlap_counts_both_end_pixels() -> None:
    corners = np.array(
        [[0, 0, 9, 9], [0, 0, 9, 3]], np.float32
    )  # 40 of 100 pixels: 0.4 is not above 0.4; without the ends it is a third
    at = RegionMasking(hide_overlapping=True, overlap=0.39)
    for masking, hidden in ((at, True), (RegionMasking(hide_overlapping=True), False)):
        assert mask_image(corners, masking, Script([0.0, 0.5])).hidden.tolist() == [[True, hidden]]


def test_a_feature_that_an_overlap_hides_is_not_replaced() -> None:
    corners = np.array([[0, 0, 99, 99], [0, 0, 99, 89], [300, 300, 310, 310]], np.float32)
    masking = RegionMasking(hide=0.8, random=0.2, hide_overlapping=True)
    script = Script([0.0, UNREAD, UNREAD, 0.149, (0, 2), (1, 2), 0.149, (1, 2), (3, 6)])
    found = mask_image(corners, masking, script)
    assert found.hidden.tolist() == [[True, True, False]]
    assert found.replaced.tolist() == [[False, False, True]]
    assert (found.donors[0], found.donors[1].tolist()) == (["many"], [3])


def test_rate_zero_and_no_region() -> None:
    assert not mask_image(boxes(5), RegionMasking(rate=0.0), generator_for(0)).chosen.any()
    for release in REGION_MASKING:
        found = mask_image(boxes(0), REGION_MASKING[release], generator_for(0))
        assert found.chosen.shape == found.overlapping.shape == (1, 0)


@pytest.mark.parametrize("shares", [{"rate": 1.5}, {"hide": -0.1}, {"hide": 0.9, "random": 0.2}, {"overlap": 2.0}])
def test_impossible_shares(shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"region masking: .* must lie in"):
        RegionMasking(**shares)  # type: ignore[arg-type]


def test_random_features_need_a_pool() -> None:
    with pytest.raises(ConfigError, match="as `pool`"):
        mask_image(boxes(1), RegionMasking(hide=0.8, random=0.1), generator_for(0), pool=())
    with pytest.raises(ConfigError, match="as `pool`"):
        Collator(STORE, SPEC, TOKENIZER, region_masking=REGION_MASKING["lxmert"])


# Batches


def test_hidden_regions_are_zeros_and_their_labels_lie_at_the_slots() -> None:
    masking = REGION_MASKING["vilbert"]
    batch, targets = make(
        example("1", images=("b",)),
        example("2", images=("none",)),
        region_masking=masking,
        draws=[[0.0, 0.5, 0.149], []],
    )
    assert batch.regions is not None
    assert batch.regions.features[0, :, 0].tolist() == [0, 21, 22]
    assert batch.regions.hidden is None
    assert batch.regions.whole is None
    assert chosen(targets.class_slots) == chosen(targets.feature_slots) == [[0, 2], []]
    assert targets.region_features is not None
    assert targets.region_features[0, :, 0].tolist() == [20, 21, 22], "clean"
    assert targets.region_probs is not None
    assert targets.region_probs.shape == (2, 4, C)
    assert targets.region_probs[0, :2].argmax(-1).tolist() == [0, 2]
    assert not targets.region_probs[0, 2:].any()
    assert targets.region_classes is not None
    assert targets.region_classes.tolist() == [[1, 3, IGNORE, IGNORE], [IGNORE] * 4]
    assert targets.region_attributes is not None
    assert targets.region_attributes.tolist()[0] == [2, 4, IGNORE, IGNORE]
    assert targets.region_weights is not None
    torch.testing.assert_close(targets.region_weights[0], torch.tensor([0.1, 0.3, 0, 0]), rtol=1e-3, atol=0)
    assert targets.attribute_weights is not None
    torch.testing.assert_close(targets.attribute_weights[0], torch.tensor([0.05, 0.15, 0, 0]), rtol=1e-3, atol=0)
    assert STORE["b"].features[0, 0] == 20, "the store itself is not changed"


def test_lxmert_asks_for_all_labels_and_takes_features_from_other_images() -> None:
    masking = REGION_MASKING["lxmert"]
    batch, targets = make(
        example("1", images=("b",)), example("2"), region_masking=masking, pool=("a", "many"),
        draws=[
            [0.15 * 0.85, (1, 2), (3, 4), 0.5, UNREAD, UNREAD, 0.0, UNREAD, UNREAD],
            [0.5, UNREAD, UNREAD, 0.15 * 0.95, UNREAD, UNREAD],
        ],
    )  # fmt: skip
    assert batch.regions is not None
    assert batch.regions.features[..., 0].tolist() == [[33, 21, 0], [10, 11, 0]], (
        "of 6 regions the model reads 4: region 3 is the last to be drawn"
    )
    assert chosen(targets.class_slots) == [[0, 1, 2], [0, 1]]
    assert chosen(targets.feature_slots) == [[0, 2], [1]]
    assert targets.region_attributes is not None
    assert targets.region_attributes.tolist()[0] == [2, IGNORE, 4, IGNORE], "-1 in the store means none"


def test_vlbert_flags_hidden_regions_and_averages_the_visible_ones() -> None:
    masking = REGION_MASKING["vlbert"]
    batch, _ = make(
        example("1", images=("b",)), example("2"), example("3", images=("none",)), region_masking=masking,
        draws=[[0.0, 0.5, 0.149], [0.5, 0.5], []],
    )  # fmt: skip
    assert batch.regions is not None
    assert batch.regions.hidden is not None
    assert batch.regions.hidden.tolist() == [[True, False, False], [False] * 3, [False] * 3]
    assert batch.regions.whole is not None
    expected = torch.tensor([(21 + 22) / (2 + 1e-5), 10.5, 0.0])[:, None].expand(3, F)
    torch.testing.assert_close(batch.regions.whole, expected, rtol=1e-6, atol=0)


def test_an_image_whose_regions_are_all_hidden_has_an_empty_mean() -> None:
    batch, _ = make(example("1"), region_masking=REGION_MASKING["vlbert"], draws=[[0.0, 0.0]])
    assert batch.regions is not None
    assert batch.regions.whole is not None
    assert not batch.regions.whole.any()


@pytest.mark.parametrize(("release", "told"), [("vilbert", True), ("vilbert-multitask", False), ("lxmert", True)])
def test_pairs_that_do_not_match(release: str, told: bool) -> None:
    tokens, masking = (
        dataclasses.replace(TOKEN_MASKING[release], rate=1.0),
        dataclasses.replace(REGION_MASKING[release], rate=1.0),
    )
    batch, targets = make(
        example("1", matched=0),
        example("2", matched=1),
        example("3", matched=IGNORE),
        masking=tokens,
        region_masking=masking,
        pool=("a",),
    )
    assert batch.regions is not None
    for slots in (targets.token_slots, targets.class_slots, targets.feature_slots):
        assert [bool(row) for row in chosen(slots)] == [told, True, True]
    assert targets.token_ids is not None
    assert targets.token_slots is not None
    rows = [LAYOUT.row("a red cat").ids[at] for at in chosen(targets.token_slots)]
    assert [row[mask].tolist() for row, mask in zip(targets.token_ids, targets.token_slots.mask, strict=True)] == [
        row.tolist() for row in rows
    ]
    plain, _ = make(example("1"), example("2"), example("3"), masking=tokens, region_masking=masking, pool=("a",))
    assert plain.regions is not None
    assert torch.equal(batch.text.ids, plain.text.ids), "they are hidden all the same"
    assert torch.equal(batch.regions.features, plain.regions.features)


def test_a_question_about_another_image_has_no_answer() -> None:
    _, targets = make(
        example("1", matched=0, answer=3), example("2", matched=1, answer=4), example("3", matched=1), needs=()
    )
    assert targets.answer is not None
    assert targets.answer.tolist() == [IGNORE, 4, IGNORE]


def test_text_is_drawn_before_regions() -> None:
    tokens = TokenMasking(in_turn=True)
    batch, targets = make(
        example("1"), masking=tokens, region_masking=RegionMasking(), draws=[[0.5, 0.0, 0.5, 0.0, 0.5]]
    )
    assert chosen(targets.token_slots) == [[2]]
    assert chosen(targets.class_slots) == [[0]]
    assert batch.text.ids[0, 2] == TOKENIZER.mask


def test_rows_with_images_of_their_own_and_shared_images() -> None:
    masking = RegionMasking()
    pair = example("1", images=("a", "b"), rows="xy")
    _, targets = make(pair, region_masking=masking, draws=[[0.0, 0.5, 0.5, 0.5, 0.0]])
    assert chosen(targets.class_slots) == [[0], [2]]
    shared = example("1", images=("b",), rows="xy")
    batch, targets = make(shared, region_masking=masking, draws=[[0.5, 0.0, 0.5]])
    assert batch.regions is not None
    assert batch.regions.features.shape[0] == 1
    assert chosen(targets.class_slots) == [[1], [1]]
    assert targets.region_features is not None
    assert targets.region_features.shape[0] == 2


def test_joined_images_and_unmasked_regions_have_no_targets() -> None:
    joined = dataclasses.replace(SPEC, pair="sequence")
    with pytest.raises(ConfigError, match="one image per row"):
        make(example("1", images=("a", "b")), spec=joined, region_masking=RegionMasking())
    with pytest.raises(ConfigError, match="targets class_slots are asked for, but no region is masked"):
        make(example("1"), needs={"class_slots"})
    _, targets = make(example("1"), needs={"region_features"})
    assert targets.region_features is not None
    assert targets.class_slots is None


def test_only_what_is_asked_for_is_made() -> None:
    _, targets = make(example("1"), region_masking=RegionMasking(), needs={"class_slots", "region_probs", "matched"})
    made = {field.name for field in dataclasses.fields(targets) if getattr(targets, field.name) is not None}
    assert made == {"class_slots", "region_probs"}


def test_a_store_without_distributions_says_so() -> None:
    store = Memory(a=image(1, 2, probs=None))
    with pytest.raises(StoreError, match="holds no class distributions, from which region_probs is computed"):
        make(example("1"), store=store, region_masking=RegionMasking())


def test_text_alone_makes_no_region_targets() -> None:
    batch, targets = make(example("1", images=()), store=None, region_masking=RegionMasking())
    assert batch.regions is None
    assert targets.class_slots is None


# Joint limit


@pytest.mark.parametrize(
    ("tokens", "regions", "limit", "kept"),
    [
        (5, 4, 64, (5, 4)),
        (5, 4, 10, (5, 4)),  # the whole image counts: 5 + 5
        (5, 4, 9, (4, 4)),  # a tie cuts the text
        (5, 4, 8, (4, 3)),
        (9, 4, 10, (5, 4)),
        (4, 4, 6, (3, 2)),
        (9, 0, 5, (4, 0)),  # the whole image stays
        (9, 1, 2, (2, 0)),  # two pieces and the whole image stay, whatever the limit
    ],
)
def test_the_longer_of_text_and_regions_loses_its_end(
    tokens: int, regions: int, limit: int, kept: tuple[int, int]
) -> None:
    spec = dataclasses.replace(SPEC, joint_limit=limit)
    text = " ".join(["cat"] * (tokens - 2))
    batch, _ = make(example("1", text, images=("x",)), spec=spec, store=Memory(x=image(10, regions)), needs=())
    assert batch.regions is not None
    assert (int(batch.text.mask.sum()), int(batch.regions.mask.sum())) == kept
    assert batch.text.ids[0, kept[0] - 1] == TOKENIZER.sep
    assert batch.text.ids[0, 0] == TOKENIZER.cls
    assert batch.regions.whole is not None
    expected = 10 + (regions - 1) / 2 if regions else 0.0
    assert batch.regions.whole[0, 0] == expected, "the whole image is averaged before regions are cut"


def test_masks_are_drawn_before_the_cut_and_cut_alike() -> None:
    spec = dataclasses.replace(SPEC, joint_limit=6)
    masking = REGION_MASKING["vlbert"]
    batch, targets = make(
        example("1", "cats dogs birds", images=("many",)), example("2", "cats", images=("b",)), spec=spec,
        masking=TOKEN_MASKING["vlbert"], region_masking=masking,
        draws=[[0.0, 0.5, 0.0, 0.0, 0.5, 0.0, 0.5], [0.5, 0.5, 0.5, 0.0]],
    )  # fmt: skip
    assert batch.regions is not None
    assert batch.text.mask.sum(1).tolist() == [3, 3]
    assert batch.text.ids[0].tolist() == [TOKENIZER.cls, TOKENIZER.mask, TOKENIZER.sep]
    assert chosen(targets.token_slots) == [[1], []], "the third word was chosen, and is gone"
    assert batch.regions.mask.sum(1).tolist() == [2, 2]
    assert chosen(targets.class_slots) == [[0], []]
    assert batch.regions.features.shape[1] == 2
    assert targets.region_features is not None
    assert targets.region_features[..., 0].tolist() == [[30, 31], [20, 21]]
    assert batch.regions.hidden is not None
    assert batch.regions.hidden.tolist() == [[True, False], [False, False]]
    assert batch.regions.whole is not None
    torch.testing.assert_close(batch.regions.whole[:, 0], torch.tensor([(31 + 33) / 2.00001, (20 + 21) / 2.00001]))


def test_links_and_phrases_of_cut_pieces_are_left_out() -> None:
    row = dataclasses.replace(LAYOUT.row("cats dogs birds"), links=((1, 0), (3, 1)), phrases=(1, 3))
    spec = dataclasses.replace(SPEC, joint_limit=6)
    batch, _ = make(Example(id="1", rows=(row,), images=("a",)), spec=spec, needs=())
    assert int(batch.text.mask.sum()) == 3
    assert batch.links is not None
    assert batch.links.nonzero().tolist() == [[0, 1, 0]]
    assert batch.phrases is not None
    assert chosen(batch.phrases) == [[1]]


def test_a_joint_limit_bounds_one_text_and_one_image() -> None:
    spec = dataclasses.replace(SPEC, joint_limit=6, answer_slot="second_segment")
    with pytest.raises(ConfigError, match="one text and one image"):
        make(example("1", rows="xy"), spec=spec, needs=())
    row = TextLayout(TOKENIZER, spec).row("is it red?", answer=True)
    with pytest.raises(ConfigError, match="answer slot"):
        make(Example(id="1", rows=(row,), images=("a",)), spec=spec, needs=())


# Examples depend on (seed, epoch, index) alone


class Pictures:
    """One text about every image."""

    def __init__(self, count: int) -> None:
        self.images = [("a", "b", "many")[number % 3] for number in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        return example(str(index), "a red cat on a mat", images=(self.images[index],), matched=int(rng.integers(2)))


@pytest.mark.parametrize("release", list(REGION_MASKING))
def test_examples_do_not_depend_on_batch_order_or_processes(release: str) -> None:
    def by_index(**settings: Any) -> dict[int, Any]:
        source = Pictures(24)
        settings = {"batch_size": 4, "bucket": 2, **settings}
        collator = Collator(
            STORE, SPEC, TOKENIZER, masking=dataclasses.replace(TOKEN_MASKING[release], rate=0.5),
            region_masking=dataclasses.replace(REGION_MASKING[release], rate=0.5), needs=ALL, pool=source.images,
        )  # fmt: skip
        loader = Loader(source, collator, seed=5, **settings)
        found = {}
        for indices, batch, targets in loader.batches_with_index():
            assert batch.regions is not None
            for row, index in enumerate(indices):
                real = batch.regions.mask[row]
                found[int(index)] = (
                    batch.text.ids[row][batch.text.mask[row]].tolist(),
                    batch.regions.features[row][real].tolist(),
                    chosen(targets.class_slots)[row],
                    chosen(targets.feature_slots)[row],
                )
        return found

    whole = by_index()
    assert len(whole) == 24
    assert by_index(batch_size=6, bucket=1, prefetch=0) == whole
    assert {**by_index(batch_size=2, rank=0, world_size=2), **by_index(batch_size=2, rank=1, world_size=2)} == whole
    assert by_index(shuffle=False) == whole


# Pixels of hidden regions (VL-BERT end to end)


def holes(corners: Sequence[Sequence[float]], hidden: Sequence[bool], *, height: int = 4, width: int = 6) -> list[str]:
    """Rows of an image of ones with its holes drawn as dots; every channel has the same."""
    image = torch.ones(3, height, width)
    cut = hide_pixels(image, np.array(corners, np.float32).reshape(-1, 4), np.array(hidden, bool))
    assert bool((image == 1).all()), "the image itself stays"
    assert torch.equal(cut, cut[:1].expand(3, -1, -1))
    return ["".join("." if value == 0 else "#" for value in row) for row in cut[0].tolist()]


def test_hidden_regions_are_cut_out_of_the_picture() -> None:
    # int(1.9) to int(3.2) and int(0.5) to int(1.99), all four included
    assert holes([[1.9, 0.5, 3.2, 1.99], [0, 0, 5, 3]], [True, False]) == ["#...##", "#...##", "######", "######"]
    assert holes([[1, 1, 1, 1], [3, 2, 4, 2]], [True, True]) == ["######", "#.####", "###..#", "######"]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([4.7, 2.2, 6.0, 4.0], ["######", "######", "####..", "####.."]),  # on the right and lower edge
        ([-2.5, -0.5, 0.5, 0.5], [".#####", "######", "######", "######"]),  # beyond the left and upper edge
        ([-5, -5, -2, -2], ["######"] * 4),  # outside
        ([8, 8, 9, 9], ["######"] * 4),
        ([0, 0, 5, 3], ["......"] * 4),
    ],
)
def test_holes_at_the_edge_of_the_picture(box: list[float], expected: list[str]) -> None:
    assert holes([box], [True]) == expected


def test_no_hidden_region_leaves_the_picture_whole() -> None:
    assert holes([[0, 0, 5, 3]], [False]) == ["######"] * 4
    assert holes([], []) == ["######"] * 4


def test_what_is_cut_out_is_drawn_as_the_release_draws_it() -> None:
    corners = boxes(4)
    script = Script([0.134, 0.136, 0.15, 0.0])  # hidden; told but shown; not chosen; hidden
    masked = mask_image(corners, REGION_MASKING["vlbert"], script)
    cut = hide_pixels(torch.ones(3, 6, 36), corners, masked.hidden[0])
    seen = cut[0].all(0)
    assert [bool(seen[int(left) : int(left) + 6].all()) for left, *_ in corners] == [False, True, True, False]
    assert int((cut[0] == 0).sum()) == 2 * 36
    assert masked.chosen.tolist() == [[True, True, False, True]]


def test_the_share_of_regions_that_are_cut_out() -> None:
    at = np.arange(1000, dtype=np.float32)
    corners = np.stack([at, 0 * at, at, 0 * at], axis=1)  # one pixel each
    count = 0
    for seed in range(DRAWS // 1000):
        masked = mask_image(corners, REGION_MASKING["vlbert"], generator_for(7, seed))
        count += int((hide_pixels(torch.ones(3, 1, 1000), corners, masked.hidden[0])[0] == 0).sum())
    within(count, 0.15 * 0.9, DRAWS)
