"""Pictures of a batch: boxes in their frame, holes, padding, and what is refused. Whole runs:
tests/runs/test_end_to_end.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from visling.data.batches.collate import Collator
from visling.data.batches.masking import RegionMasking
from visling.data.batches.pixels import (
    BoxesAlone,
    WithWholeImage,
    lay_on_canvas,
    mirror_boxes,
    pad_pictures,
    place_boxes,
)
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError
from visling.runtime import generator_for
from visling.types import Canvas, Example, InputSpec, MaskGrid, RegionArray, RegionObjects

BOXES = np.array([[[0, 0, 20, 10], [5, 2, 9, 6], [0, 0, 0, 0]]], np.float32)
TOKENIZER = Tokenizer()


def placed(
    boxes: Any, picture: tuple[int, int], *, size: tuple[int, int] = (20, 10), mirrored: bool = False
) -> list[list[float]]:
    """Boxes of one image in a picture of height and width `picture`."""
    pictures = [torch.zeros(3, *picture)]
    found, frame = place_boxes(
        np.asarray(boxes, np.float32)[None], np.array([size], np.float32), pictures, [mirrored], ["9"]
    )
    assert frame.tolist() == [[picture[1], picture[0]]]
    assert found.dtype == np.float32
    return found[0].tolist()  # type: ignore[no-any-return]


def test_boxes_follow_their_picture() -> None:
    assert placed(BOXES[0, :2], (20, 40)) == [[0, 0, 39, 19], [10, 4, 18, 12]]  # the last pixel ends a box
    assert placed(BOXES[0, :2], (20, 40), mirrored=True) == [[0, 0, 39, 19], [21, 4, 29, 12]]  # 39 - 18, 39 - 10
    assert placed([[-3, -3, 50, 50]], (10, 20)) == [[0, 0, 19, 9]]


def test_only_mirrored_pictures_are_turned() -> None:
    boxes, size = np.repeat(BOXES, 3, axis=0), np.array([[20, 10]] * 3, np.float32)
    found, _ = place_boxes(boxes, size, [torch.zeros(3, 10, 20)] * 3, [True, False, True], list("abc"))
    assert found[:, 1].tolist() == [[10, 2, 14, 6], [5, 2, 9, 6], [10, 2, 14, 6]]


def test_mirroring_twice_changes_nothing() -> None:
    boxes, size = np.repeat(BOXES, 2, axis=0), np.array([[20, 10]] * 2, np.float32)
    once = mirror_boxes(boxes, size, [True, False])
    assert once[0, 1].tolist() == [10, 2, 14, 6]
    assert once[1].tolist() == BOXES[0].tolist()
    np.testing.assert_array_equal(mirror_boxes(once, size, [True, False]), boxes)
    assert mirror_boxes(boxes, size, [False, False]) is boxes


@pytest.mark.parametrize("picture", [(20, 10), (10, 30), (10, 10)])
def test_a_picture_of_another_shape_is_refused(picture: tuple[int, int]) -> None:
    with pytest.raises(
        DataError,
        match=r"the picture of '9' is shaped like \d+ x \d+, but .* image of 200 x 100 pixels .* rotated or cropped",
    ):
        placed(BOXES[0], (picture[0] * 10, picture[1] * 10), size=(200, 100))


@pytest.mark.parametrize(
    ("size", "picture"),
    [((500, 333), (600, 900)), ((5000, 1), (1, 1000)), ((333, 500), (901, 600)), ((21, 32), (31, 21))],
)
def test_scaled_copies_are_the_same_picture(size: tuple[int, int], picture: tuple[int, int]) -> None:
    placed([[0, 0, 1, 1]], picture, size=size)


def test_pictures_stand_side_by_side_with_their_holes() -> None:
    pictures = [torch.ones(3, 2, 4), torch.ones(3, 3, 2)]
    boxes = np.array([[[1, 0, 2, 0], [0, 1, 0, 1]], [[0, 0, 0, 0], [0, 0, 0, 0]]], np.float32)
    pixels = pad_pictures(pictures, boxes, np.array([[True, False], [False, False]]))
    assert pixels.size.tolist() == [[2, 4], [3, 2]]
    assert pixels.row.tolist() == [0, 1]
    assert pixels.images[:, 0].tolist() == [
        [[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]],
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]],
    ]
    assert all(bool((picture == 1).all()) for picture in pictures)
    assert bool((pad_pictures(pictures, boxes, None).images[0, :, :2] == 1).all())


class Store:
    """Two images of 20 x 10 pixels, of one and three regions; whoever reads the features fails."""

    feature_size, fingerprint = 7, "test"

    def __contains__(self, image_id: str) -> bool:
        return image_id in ("one", "three")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, image_id: str) -> RegionArray:
        boxes = (
            BOXES[0, :1] if image_id == "one" else np.array([[0, 0, 4, 4], [6, 0, 9, 4], [12, 0, 16, 9]], np.float32)
        )
        return RegionArray(features=np.full((len(boxes), 7), np.nan, np.float16), boxes=boxes, size=(20, 10))


class Ones:
    """Pictures of ones."""

    mask_grid = MaskGrid(size=3, inclusive=True)
    whole_image = False
    canvas: Canvas | None = None

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []

    def read(self, image_ids: Sequence[str], mirrored: Sequence[bool]) -> list[Tensor]:
        self.asked += zip(image_ids, mirrored, strict=True)
        return [torch.ones(3, 10, 20) for _ in image_ids]


def collated(*images: str, joint_limit: int | None = None, **settings: Any) -> Any:
    """A batch of one text about each image."""
    spec = InputSpec(feature_size=16, joint_limit=joint_limit)
    layout = TextLayout(TOKENIZER, spec)
    examples = [Example(id=image, rows=(layout.row("a cat"),), images=(image,)) for image in images]
    rngs = [generator_for(1, number) for number in range(len(images))]
    given = {
        "masking": None,
        "region_masking": RegionMasking(rate=1.0, hide=1.0, learned=True),
        "pictures": Ones(),
        **settings,
    }
    return Collator(Store(), spec, TOKENIZER, **given)(examples, rngs)[0]


def test_a_batch_holds_pixels_and_no_features() -> None:
    batch = collated("three", "one", region_masking=None)
    batch.validate()
    assert batch.regions.features.shape == (2, 3, 0)
    assert batch.regions.whole is None
    assert batch.regions.size.tolist() == [[20, 10], [20, 10]]
    torch.testing.assert_close(batch.regions.boxes[0, 1], torch.tensor([0.3, 0.0, 0.45, 0.4]))
    assert batch.pixels.images.shape == (2, 3, 10, 20)
    assert bool((batch.pixels.images == 1).all())
    assert BoxesAlone(Store())["one"].features.shape == (1, 0)


def test_regions_beyond_the_limit_leave_their_hole() -> None:
    batch = collated("three", joint_limit=4)
    assert batch.regions.mask.tolist() == [[True]]
    assert batch.regions.hidden.tolist() == [[True]]
    holes = [bool((batch.pixels.images[0, :, 0, x] == 0).all()) for x in (0, 5, 6, 12)]
    assert holes == [True, False, True, True]


def test_mirrored_regions_leave_mirrored_holes() -> None:
    pictures = Ones()
    batch = collated("three", flip=1.0, pictures=pictures)
    assert pictures.asked == [("three", True)]
    seen = "".join("#" if shown else "." for shown in (batch.pixels.images[0, 0, 0] == 1).tolist())
    assert seen == "###.....##....#....."  # 12 to 16, 6 to 9 and 0 to 4 from the right
    torch.testing.assert_close(batch.regions.boxes[0, 0], torch.tensor([15 / 20, 0, 19 / 20, 4 / 10]))


def test_pictures_of_images_that_share_a_row_are_refused() -> None:
    spec = InputSpec(feature_size=16, pair="sequence")
    example = Example(id="1", rows=(TextLayout(TOKENIZER, spec).row("a cat"),), images=("one", "three"))
    with pytest.raises(ConfigError, match="pictures need one image per row"):
        Collator(Store(), spec, TOKENIZER, pictures=Ones())([example], [generator_for(1)])


def test_pictures_lie_in_the_middle_of_their_canvas_or_anywhere() -> None:
    canvas = Canvas(width=9, height=6, colour=(-1.0, -2.0, -3.0))
    pictures = [torch.ones(3, 4, 4), torch.full((3, 6, 9), 2.0)]
    boxes, hidden = np.array([[[0, 0, 1, 1]], [[0, 0, 0, 0]]], np.float32), np.array([[True], [False]])
    found = lay_on_canvas(pictures, canvas, boxes, hidden, None)
    assert found.corner is not None
    assert found.corner.tolist() == [[2, 1], [0, 0]]
    assert found.size.tolist() == [[4, 4], [6, 9]]
    expected = torch.tensor(canvas.colour)[:, None, None].expand(3, 6, 9).clone()
    expected[:, 1:5, 2:6] = 1
    expected[:, 1:3, 2:4] = 0  # the hidden region
    assert torch.equal(found.images, torch.stack([expected, pictures[1]]))
    places = set()
    for seed in range(200):
        corner = lay_on_canvas(pictures, canvas, boxes, None, [generator_for(seed), generator_for(0)]).corner
        assert corner is not None
        assert corner[1].tolist() == [0, 0]
        places.add(tuple(corner[0].tolist()))
    assert places == {(x, y) for x in range(6) for y in range(3)}


def test_boxes_reach_the_edge_of_a_picture_on_a_canvas() -> None:
    boxes, size = BOXES[:, :2], np.array([[20, 10]], np.float32)
    found, _ = place_boxes(boxes, size, [torch.zeros(3, 20, 40)], [False], ["9"], last_pixel=False)
    assert found[0].tolist() == [[0, 0, 40, 20], [10, 4, 18, 12]]


def test_the_whole_image_comes_first_once() -> None:
    view = WithWholeImage(BoxesAlone(Store()))
    assert view["three"].boxes[:2].tolist() == [[0, 0, 20, 10], [0, 0, 4, 4]]
    assert view["three"].features.shape == (4, 0)
    assert view["one"].boxes.tolist() == [[0, 0, 20, 10]], "the store has it"
    assert ("one" in view, "two" in view, len(view)) == (True, False, 2)


def describe(regions: RegionArray, grid: MaskGrid) -> RegionObjects:
    """Region k shows an object of class k + 1, which covers the left column of its box."""
    masks = np.zeros((len(regions), grid.size, grid.size), bool)
    masks[:, :, 0] = True
    return RegionObjects(classes=np.arange(len(regions)) + 1, masks=masks)


def collate_objects(*images: str, joint_limit: int | None = None, **known: Any) -> Any:
    """A batch of examples with annotated objects: those that `known` has for an image, else `describe`."""
    spec = InputSpec(feature_size=16, joint_limit=joint_limit)
    layout = TextLayout(TOKENIZER, spec)
    examples = [
        Example(id=image, rows=(layout.row("a cat"),), images=(image,), region_objects=known.get(image, describe))
        for image in images
    ]
    rngs = [generator_for(1, number) for number in range(len(images))]
    collator = Collator(Store(), spec, TOKENIZER, pictures=Ones(), flip=known.get("flip", 0.0))
    return collator(examples, rngs)[0]


def test_classes_and_masks_of_objects_come_with_the_pixels() -> None:
    pixels = collate_objects("one", "three").pixels
    assert pixels.classes.tolist() == [[1, 0, 0], [1, 2, 3]]
    assert pixels.masks.shape == (2, 3, 3, 3)
    assert pixels.masks[1, 2].tolist() == [[True, False, False]] * 3
    assert bool(pixels.masks[0, 1:].all()), "padding"
    assert collated("one").pixels.masks is None


def test_masks_are_mirrored_with_their_picture() -> None:
    pixels = collate_objects("three", flip=1.0).pixels
    assert pixels.masks[0, 0].tolist() == [[False, False, True]] * 3


def test_objects_of_regions_beyond_the_limit_are_left_out() -> None:
    pixels = collate_objects("three", joint_limit=4).pixels
    assert pixels.classes.tolist() == [[1]]
    assert pixels.masks.shape == (1, 1, 3, 3)


def test_all_examples_of_a_batch_know_their_objects_or_none() -> None:
    with pytest.raises(ConfigError, match="1 of 2 examples, of 1 images each, know the objects"):
        collate_objects("one", "three", one=None)
