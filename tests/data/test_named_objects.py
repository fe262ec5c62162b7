"""What objects are called, and which regions show them."""

from __future__ import annotations

import numpy as np
import pytest

from visling.data.named_objects import (
    CLASSES,
    LISTED_NAMES,
    bind_objects,
    draw_names,
    find_first_object,
    list_names,
    shows_whole_image,
)

OBJECTS = np.array([[0, 0, 30, 30], [10, 10, 50, 40], [40, 0, 60, 60]], np.float32)
WHOLE = np.array([[0, 0, 64, 64]], np.float32)


def test_people_are_named_in_the_order_of_the_objects() -> None:
    assert list_names(("person", "dog", "person")) == {0: "Casey", 1: "dog", 2: "Riley"}
    last = len(LISTED_NAMES) - 1
    assert list(list_names(("person",) * 2, last).values()) == ["Quinn", "Casey"], "they start again"
    assert list_names(()) == {}


def test_drawn_names_may_occur_twice_and_are_drawn_for_people_alone() -> None:
    asked = []

    def draw(entries: int) -> int:
        asked.append(entries)
        return 1

    assert draw_names(("person", "cup", "person"), ("Bo", "Pat"), draw) == {0: "Pat", 1: "cup", 2: "Pat"}
    assert asked == [2, 2]


def test_classes_are_coco_s() -> None:
    assert (len(CLASSES), len(set(CLASSES)), CLASSES[0], CLASSES[16], CLASSES[-1]) == (
        80, 80, "person", "dog", "toothbrush",
    )  # fmt: skip
    assert not [name for name in CLASSES if " " in name]


@pytest.mark.parametrize(
    ("regions", "first"),
    [
        (OBJECTS, 0),
        (np.concatenate([WHOLE, OBJECTS]), 1),
        (OBJECTS + 0.9, 0),
        (OBJECTS + 1.1, None),
        (OBJECTS[::-1], None),
        (np.concatenate([WHOLE, WHOLE, OBJECTS]), None),
        (OBJECTS[:2], None),
    ],
)
def test_regions_that_are_the_objects(regions: np.ndarray, first: int | None) -> None:
    assert find_first_object(OBJECTS, regions) == first


def test_other_regions_show_the_object_that_they_overlap_most() -> None:
    regions = np.concatenate([OBJECTS[::-1], WHOLE])
    assert bind_objects(OBJECTS, regions, least_overlap=0.5).tolist() == [2, 1, 0]
    shifted = OBJECTS[:1] + np.array([6, 0, 6, 0], np.float32)  # overlap 24 / 36
    assert bind_objects(OBJECTS[:1], np.concatenate([WHOLE, WHOLE, shifted]), least_overlap=0.66).tolist() == [2]
    assert bind_objects(OBJECTS[:1], np.concatenate([WHOLE, WHOLE, shifted]), least_overlap=0.67).tolist() == [-1]
    assert bind_objects(OBJECTS[:0], regions, least_overlap=0.5).tolist() == []
    assert bind_objects(OBJECTS, regions[:0], least_overlap=0.5).tolist() == [-1, -1, -1]


def test_the_region_of_the_whole_image() -> None:
    regions = np.array([[0, 0, 63, 63], [0, 0, 64, 64], [2, 0, 64, 64]], np.float32)
    assert shows_whole_image(regions, (64, 64)).tolist() == [True, True, False]
