"""Batches that are refused and passed, copies, pytrees under the compiler, and losses whose means are exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from visling.types import (
    IGNORE,
    Batch,
    Encoded,
    Example,
    Loss,
    Maps,
    Pixels,
    RegionArray,
    Regions,
    RegionStore,
    Slots,
    Targets,
    Text,
)

B, T, R, F = 4, 5, 3, 2


def text(rows: int = B) -> Text:
    """Rows of 5, 4, 3, 2 real tokens, over again."""
    mask = torch.arange(T)[None] < torch.tensor([T - row % 4 for row in range(rows)])[:, None]
    return Text(ids=mask * torch.arange(1, T + 1), mask=mask, segments=torch.zeros(rows, T, dtype=torch.int64))


def regions(rows: int = B) -> Regions:
    """Rows of 3, 2, 1, 0 real regions, over again; boxes of padding are zero."""
    mask = torch.arange(R)[None] < torch.tensor([R - row % 4 for row in range(rows)])[:, None]
    boxes = torch.tensor([0.0, 0.25, 0.5, 1.0]) * mask[:, :, None]
    return Regions(features=torch.randn(rows, R, F), boxes=boxes, mask=mask, size=torch.full((rows, 2), 100.0))


def batch(*, group: int = 1) -> Batch:
    """Every row's last real token names its first region, where there is one."""
    words, seen = text(), regions()
    links = torch.zeros(B, T, R, dtype=torch.bool)
    links[torch.arange(B), words.mask.sum(1) - 1, 0] = seen.mask[:, 0]
    return Batch(text=words, regions=seen, links=links, group=group)


def with_text(**changes: Any) -> Batch:
    return dataclasses.replace(batch(), text=dataclasses.replace(text(), **changes))


def with_regions(**changes: Any) -> Batch:
    return dataclasses.replace(batch(), regions=dataclasses.replace(regions(), **changes))


def with_pixels(**changes: Any) -> Batch:
    """Two pictures, each of two region rows."""
    pixels = Pixels(images=torch.zeros(2, 3, 4, 6), size=torch.tensor([[4, 6], [2, 2]]), row=torch.tensor([0, 1, 1, 0]))
    return dataclasses.replace(batch(), pixels=dataclasses.replace(pixels, **changes))


def changed(values: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    values = values.clone()
    values[at] = value
    return values


# Batch.validate


BROKEN: dict[str, tuple[Callable[[], Batch], str]] = {
    "segments of another length": (
        lambda: with_text(segments=torch.zeros(B, T + 1, dtype=torch.int64)),
        "text ids, mask and segments differ in shape",
    ),
    "mask of another length": (
        lambda: with_text(mask=torch.ones(B, T - 1, dtype=torch.bool)),
        "text ids, mask and segments differ in shape",
    ),
    "text mask of numbers": (
        lambda: with_text(mask=text().mask.long()),
        r"text mask must be boolean; found torch\.int64",
    ),
    "a row without tokens": (
        lambda: with_text(mask=text().mask & (torch.arange(B) != 2)[:, None]),
        "a text row has no real token",
    ),
    "rows that fill no group": (lambda: batch(group=3), "4 rows are not a multiple of the group of 3"),
    "region mask of numbers": (
        lambda: with_regions(mask=regions().mask.float()),
        r"region mask must be boolean; found torch\.float32",
    ),
    "features of other regions": (
        lambda: with_regions(features=torch.zeros(B, R + 1, F)),
        "region features and mask differ in shape",
    ),
    "boxes of five numbers": (
        lambda: with_regions(boxes=torch.zeros(B, R, 5)),
        r"boxes must be \(S, R, 4\); found \(4, 3, 5\)",
    ),
    "a hole among regions": (
        lambda: with_regions(mask=changed(regions().mask, (0, 1), False)),
        "real regions must come before padding",
    ),
    "fewer region rows": (lambda: dataclasses.replace(batch(), regions=regions(2)), "2 region rows meet 4 text rows"),
    "a region row too many": (
        lambda: with_regions(row=torch.tensor([0, 0, 1, 1, 2])),
        "5 region rows meet 4 text rows",
    ),
    "pixels": (lambda: with_regions(boxes=regions().boxes * 100), r"unit corners in \[0, 1\]; pixels\?"),
    "a negative corner": (
        lambda: with_regions(boxes=changed(regions().boxes, (0, 2, 0), -0.01)),
        r"unit corners in \[0, 1\]",
    ),
    "a corner that is no number": (
        lambda: with_regions(boxes=changed(regions().boxes, (1, 1, 3), float("nan"))),
        r"unit corners in \[0, 1\]",
    ),
    "a box without width": (
        lambda: with_regions(boxes=changed(regions().boxes, (0, 0, 2), 0.0)),
        "a real box has no area",
    ),
    "an inverted box": (lambda: with_regions(boxes=changed(regions().boxes, (0, 0, 3), 0.1)), "a real box has no area"),
    "links of other regions": (
        lambda: dataclasses.replace(batch(), links=torch.zeros(B, T, R + 1, dtype=torch.bool)),
        r"links must be \(B, T, R\) = \(4, 5, 3\); found \(4, 5, 4\)",
    ),
    "a link from padding": (
        lambda: dataclasses.replace(batch(), links=changed(torch.zeros(B, T, R).bool(), (1, 4, 0), True)),
        "starts at a padded token",
    ),
    "a link to padding": (
        lambda: dataclasses.replace(batch(), links=changed(torch.zeros(B, T, R).bool(), (1, 0, 2), True)),
        "ends at a padded region",
    ),
    "pixels in half precision": (
        lambda: with_pixels(images=torch.zeros(2, 3, 4, 6).half()),
        r"pixels must be float32; found torch\.float16",
    ),
    "pixels of other rows": (
        lambda: with_pixels(row=torch.tensor([0, 1])),
        "names the image of 2 region rows; found 4",
    ),
    "an image that the batch lacks": (
        lambda: with_pixels(row=torch.tensor([0, 1, 2, 0])),
        "names an image that the batch lacks",
    ),
    "a picture beyond its padding": (
        lambda: with_pixels(size=torch.tensor([[4, 7], [2, 2]])),
        "exceeds the padded pixels",
    ),
    "a picture beyond its canvas": (
        lambda: with_pixels(size=torch.tensor([[4, 4], [2, 2]]), corner=torch.tensor([[3, 0], [0, 0]])),
        "exceeds the padded pixels",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_batches_are_refused(name: str) -> None:
    make, message = BROKEN[name]
    with pytest.raises(ValueError, match=f"^invalid batch: .*{message}"):
        make().validate()


def test_valid_batches_pass() -> None:
    batch().validate()
    batch(group=2).validate()
    with_pixels().validate()
    with_pixels(size=torch.tensor([[4, 4], [2, 2]]), corner=torch.tensor([[2, 0], [4, 2]])).validate()
    Batch(text=text(), regions=None, group=4).validate()


def test_boxes_of_padding_are_not_looked_at() -> None:
    with_regions(boxes=regions().boxes.masked_fill(~regions().mask[:, :, None], -7.0)).validate()


def test_rows_without_regions_pass() -> None:
    empty = Regions(
        features=torch.zeros(B, 0, F),
        boxes=torch.zeros(B, 0, 4),
        mask=torch.zeros(B, 0, dtype=torch.bool),
        size=torch.ones(B, 2),
    )
    Batch(text=text(), regions=empty).validate()


def test_a_shared_image_passes_and_its_links_follow_the_row() -> None:
    links = torch.zeros(B, T, R, dtype=torch.bool)
    links[2, 0, 1] = True  # text row 2 reads region row 1, which has two real regions
    shared = dataclasses.replace(regions(2), row=torch.tensor([0, 0, 1, 1]))
    Batch(text=text(), regions=shared, links=links, group=2).validate()
    with pytest.raises(ValueError, match="ends at a padded region"):
        Batch(text=text(), regions=shared, links=changed(links, (3, 0, 2), True), group=2).validate()


def test_a_shared_text_passes_and_its_links_follow_the_row() -> None:
    links = torch.zeros(B, T, R, dtype=torch.bool)
    links[1, 4, 0] = True  # batch row 1 reads text row 0, which has five real tokens
    one = dataclasses.replace(text(2), row=torch.tensor([0, 0, 1, 1]))
    Batch(text=one, regions=regions(), links=links, group=4).validate()
    with pytest.raises(ValueError, match="starts at a padded token"):
        Batch(text=one, regions=regions(), links=changed(links, (2, 4, 0), True)).validate()
    with pytest.raises(ValueError, match="4 rows are not a multiple of the group of 3"):
        Batch(text=one, regions=regions(), group=3).validate()  # rows of the batch count, not rows of text


# Copies


def test_map_changes_every_tensor_of_a_copy() -> None:
    given = dataclasses.replace(batch(group=2), phrases=Slots(at=torch.ones(B, 2).long(), mask=torch.ones(B, 2).bool()))
    copy = given.map(torch.zeros_like)
    assert copy.group == 2
    assert copy.regions is not None
    assert copy.regions.row is None
    assert copy.links is not None
    assert copy.phrases is not None
    leaves = [leaf for leaf in pytree.tree_leaves(copy) if leaf is not None]
    assert len(leaves) == 3 + 4 + 1 + 2
    assert not any(leaf.any() for leaf in leaves)
    assert given.text.ids.any(), "the original must stay"
    assert copy.phrases.at.shape == (B, 2)


def test_map_reaches_captured_maps() -> None:
    maps = Maps(
        text_to_text={"0": torch.ones(2)},
        text_to_regions={},
        regions_to_text={"1": torch.ones(3)},
        regions_to_regions={},
    )
    encoded = Encoded(
        text=torch.ones(1), regions=torch.ones(1), pooled=torch.ones(1), maps=maps, states={"0": torch.ones(4)}
    )
    copy = encoded.map(lambda tensor: tensor * 2)
    assert copy.maps is not None
    assert copy.states is not None
    assert copy.maps.text_to_text["0"].tolist() == [2, 2]
    assert copy.maps.regions_to_text["1"].tolist() == [2] * 3
    assert copy.states["0"].tolist() == [2] * 4
    assert maps.text_to_text["0"].tolist() == [1, 1], "the original must stay"


def test_to_moves_every_tensor() -> None:
    moved = batch().to("meta")
    devices = {leaf.device.type for leaf in pytree.tree_leaves(moved) if leaf is not None}
    assert devices == {"meta"}, devices


def test_contracts_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch().group = 2  # type: ignore[misc]


# Pytrees


def test_batch_survives_flatten_and_unflatten() -> None:
    given = batch(group=2)
    leaves, structure = pytree.tree_flatten(given)
    assert not any(isinstance(leaf, int) for leaf in leaves), "the group belongs to the structure"
    back = pytree.tree_unflatten(leaves, structure)
    assert isinstance(back, Batch)
    assert back.group == 2
    assert back.regions is not None
    assert back.text.ids is given.text.ids
    assert back.text.answer_at is None
    assert structure != pytree.tree_structure(batch(group=4))
    assert structure == pytree.tree_structure(batch(group=2))


def test_targets_survive_flatten_and_unflatten() -> None:
    given = Targets(
        token_slots=Slots(at=torch.zeros(1, 2).long(), mask=torch.ones(1, 2).bool()), matched=torch.tensor([1, IGNORE])
    )
    back = pytree.tree_unflatten(*pytree.tree_flatten(given))
    assert [f.name for f in dataclasses.fields(back) if getattr(back, f.name) is not None] == ["token_slots", "matched"]
    assert back.matched is given.matched


def test_compiled_function_takes_a_batch_and_gives_encoded() -> None:
    def encode(given: Batch) -> Encoded:
        assert given.regions is not None
        pooled = given.regions.features.sum(1).reshape(-1, given.group, F).sum(1)
        return Encoded(text=given.text.ids.float(), regions=given.regions.features, pooled=pooled)

    graphs: list[torch.fx.GraphModule] = []

    def eager(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        """What backend="eager" does, counted."""
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(encode, backend=eager, fullgraph=True)
    for group, count in ((1, 1), (2, 2), (2, 2)):
        given = batch(group=group)
        found = compiled(given)
        assert isinstance(found, Encoded)
        torch.testing.assert_close(found.pooled, encode(given).pooled, rtol=0, atol=0)
        assert found.pooled.shape == (B // group, F)
        assert len(graphs) == count, "another group is another graph; the same group is not compiled again"
    torch.compiler.reset()


# Loss


def test_loss_mean_is_exact() -> None:
    values, mask = (
        torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True),
        torch.tensor([[True, False, True], [False, True, False]]),
    )
    loss = Loss.mean("a", values, mask)
    assert loss.value.item() == 7.0
    total, count = loss.parts["a"]
    assert (total.item(), count.item()) == (21.0, 3)
    assert not total.requires_grad
    (gradient,) = torch.autograd.grad(loss.value, values)
    torch.testing.assert_close(gradient, mask / 3)


def test_loss_mean_without_a_mask_counts_all() -> None:
    loss = Loss.mean("a", torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert loss.value.item() == 3.0
    assert [part.item() for part in loss.parts["a"]] == [12.0, 4]


@pytest.mark.parametrize("shape", [(3,), (0,)])
def test_loss_of_nothing_is_zero_with_a_gradient_of_zero(shape: tuple[int, ...]) -> None:
    values = torch.full(shape, float("inf"), requires_grad=True)
    loss = Loss.mean("a", values, torch.zeros(shape, dtype=torch.bool))
    assert loss.value.item() == 0.0
    assert [part.item() for part in loss.parts["a"]] == [0.0, 0]
    (gradient,) = torch.autograd.grad(loss.value, values)
    assert gradient.tolist() == [0.0] * shape[0]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_masked_values_never_count(bad: float) -> None:
    values = torch.tensor([2.0, bad, 4.0], requires_grad=True)
    loss = Loss.mean("a", values, torch.tensor([True, False, True]))
    assert loss.value.item() == 3.0
    (gradient,) = torch.autograd.grad(loss.value, values)
    assert gradient.tolist() == [0.5, 0.0, 0.5]


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"a: mask \(2, 1\) and values \(2, 3\) differ in shape"):
        Loss.mean("a", torch.ones(2, 3), torch.ones(2, 1, dtype=torch.bool))


def test_losses_add_and_scale() -> None:
    first, second = Loss.mean("a", torch.tensor([1.0, 3.0])), Loss.mean("b", torch.tensor([10.0]))
    both = first + second.scaled(0.5)
    assert both.value.item() == 7.0
    assert {name: (total.item(), count.item()) for name, (total, count) in both.parts.items()} == {
        "a": (4.0, 2),
        "b": (10.0, 1),
    }, "parts keep unscaled"
    assert second.value.item() == 10.0, "the original must stay"


def test_terms_of_several_losses_are_one_average() -> None:
    """Two batches of different counts, by their terms, are the loss of both together."""
    values, masks = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([5.0, 9.0, 3.0])], [[True] * 3, [False, True, False]]
    losses = [
        (Loss.mean("a", each, torch.tensor(mask)) + Loss.mean("b", each.square())).scaled(0.5).prefixed("t.")
        for each, mask in zip(values, masks, strict=True)
    ]
    both = Loss.mean("a", torch.cat(values), torch.tensor(masks[0] + masks[1])) + Loss.mean(
        "b", torch.cat(values).square()
    )
    terms = [loss.terms for loss in losses if loss.terms is not None]
    counts = {name: sum((each[name].count for each in terms), start=torch.tensor(0)) for name in terms[0]}
    assert counts == {"t.a": 4, "t.b": 6}
    exact = sum(term.over(counts[name]) for each in terms for name, term in each.items())
    torch.testing.assert_close(exact, both.value * 0.5)
    assert not torch.isclose(torch.stack([loss.value for loss in losses]).mean(), both.value * 0.5)
    for loss in losses:
        torch.testing.assert_close(sum(term.over(term.count) for term in (loss.terms or {}).values()), loss.value)


def test_terms_live_on_in_what_is_made_of_a_loss_and_are_not_invented() -> None:
    loss = Loss.ratio("a", torch.tensor(6.0), torch.tensor(2), added=1.0)
    assert loss.value == 2.0
    reporting = loss.reporting({"hits": (torch.tensor(1), torch.tensor(2))})
    assert reporting.terms == loss.terms
    assert reporting.parts.keys() == {"a", "hits"}
    unknown = Loss(value=torch.tensor(1.0), parts={"c": (torch.tensor(1.0), torch.tensor(1))})
    assert (loss + unknown).terms is None
    assert unknown.scaled(2.0).prefixed("x.").terms is None


def test_losses_of_one_name_clash() -> None:
    with pytest.raises(AssertionError, match=r"the same parts: \['a'\]"):
        Loss.mean("a", torch.ones(1)) + Loss.mean("a", torch.ones(1))


# Stores


def test_region_array_counts_regions_and_a_store_is_known_by_its_methods() -> None:
    class Memory:
        feature_size, fingerprint = F, "memory"

        def __contains__(self, image_id: str) -> bool:
            return True

        def __getitem__(self, image_id: str) -> RegionArray:
            return RegionArray(features=np.zeros((7, F), np.float16), boxes=np.zeros((7, 4), np.float32), size=(10, 10))

        def __len__(self) -> int:
            return 1

    assert len(Memory()["x"]) == 7
    assert isinstance(Memory(), RegionStore)
    assert not isinstance({}, RegionStore)


def test_examples_do_not_share_labels() -> None:
    first, second = (Example(id=name, rows=(), images=()) for name in "ab")
    assert first.labels == {}
    assert first.labels is not second.labels


def test_an_unshared_batch_has_every_row_of_its_own() -> None:
    own, row, texts = batch(), torch.tensor([2, 0, 0, 1]), torch.tensor([1, 1, 0, 3])
    seen = dataclasses.replace(regions(), row=row, labels=torch.arange(B * R).view(B, R))
    pixels = Pixels(
        images=torch.randn(2, 3, 4, 4),
        size=torch.full((2, 2), 4),
        row=torch.tensor([0, 1, 1, 0]),
        classes=torch.arange(B * R).view(B, R),
    )
    shared = Batch(text=dataclasses.replace(text(), row=texts), regions=seen, pixels=pixels, group=2)
    found = shared.unshared()
    assert found.regions is not None
    assert found.regions.labels is not None
    assert found.pixels is not None
    assert found.pixels.classes is not None
    assert (found.text.row, found.regions.row, found.group) == (None, None, 2)
    assert torch.equal(found.text.ids, shared.text.ids[texts])
    assert torch.equal(found.regions.boxes, seen.boxes[row])
    assert torch.equal(found.regions.labels[:, 0], R * row)
    assert found.pixels.row.tolist() == [1, 0, 0, 1]
    assert torch.equal(found.pixels.classes[:, 0], R * row)
    assert found.pixels.images is pixels.images
    assert own.unshared().text is own.text, "a batch that shares nothing is left as it is"
