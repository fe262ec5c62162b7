"""Conversions that invert, overlaps against loops, and refusal of what is not of the stated form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor
from torch.testing import assert_close

from visling import boxes
from visling.errors import BoxError

NAN = float("nan")


def many(count: st.SearchStrategy[int] | int = 6, low: float = 0, high: float = 640) -> st.SearchStrategy[Tensor]:
    """(R, 4) proper corners, some without area."""
    return arrays.arrays(
        np.float64,
        (count, 4) if isinstance(count, int) else st.tuples(count, st.just(4)),
        elements=st.floats(low, high, allow_subnormal=False),
    ).map(lambda a: torch.tensor(np.concatenate([np.minimum(a[:, :2], a[:, 2:]), np.maximum(a[:, :2], a[:, 2:])], 1)))


def naive_iou(first: list[float], second: list[float], extra: float) -> float:
    """Overlap of two boxes in plain Python."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        width, height = x2 - x1 + extra, y2 - y1 + extra
        return width * height if width > 0 and height > 0 else 0.0

    shared = area(
        max(first[0], second[0]), max(first[1], second[1]), min(first[2], second[2]), min(first[3], second[3])
    )
    union = area(*first) + area(*second) - shared
    return shared / union if union > 0 else 0.0


# Conversions


def test_the_whole_image_ends_at_its_last_pixel() -> None:
    assert_close(
        boxes.whole_image(torch.tensor([[10.0, 5.0], [1.0, 4.0]])),
        torch.tensor([[[0, 0, 0.9, 0.8]], [[0, 0, 0, 0.75]]]),
    )


@given(many())
def test_xywh_inverts(corners: Tensor) -> None:
    assert_close(boxes.xywh_to_corners(boxes.corners_to_xywh(corners)), corners, rtol=0, atol=1e-9)


@given(many())
def test_centre_inverts(corners: Tensor) -> None:
    assert_close(boxes.centre_to_corners(boxes.corners_to_centre(corners)), corners, rtol=0, atol=1e-9)


@given(many(), st.floats(640, 2000), st.floats(640, 2000))
def test_unit_inverts(corners: Tensor, width: float, height: float) -> None:
    size = torch.tensor([width, height])
    unit = boxes.to_unit(corners, size)
    boxes.check_unit(unit, "here")
    assert_close(boxes.to_pixels(unit, size), corners, rtol=0, atol=1e-9)


def test_forms_by_hand() -> None:
    corners = torch.tensor([[10.0, 20.0, 40.0, 60.0]])
    assert boxes.corners_to_xywh(corners).tolist() == [[10, 20, 30, 40]]
    assert boxes.xywh_to_corners(torch.tensor([[10.0, 20.0, 30.0, 40.0]])).tolist() == corners.tolist()
    assert boxes.corners_to_centre(corners).tolist() == [[25, 40, 30, 40]]
    assert boxes.centre_to_corners(torch.tensor([[25.0, 40.0, 30.0, 40.0]])).tolist() == corners.tolist()
    assert boxes.to_unit(corners, torch.tensor([80.0, 200.0])).tolist() == [
        [0.125, pytest.approx(0.1), 0.5, pytest.approx(0.3)]
    ]


def test_whole_numbers_become_fractions() -> None:
    corners = torch.tensor([[1, 2, 4, 7]])
    assert boxes.corners_to_centre(corners).tolist() == [[2.5, 4.5, 3, 5]]
    assert boxes.to_unit(corners, torch.tensor([8, 8])).tolist() == [[0.125, 0.25, 0.5, 0.875]]


def test_every_row_has_its_own_size() -> None:
    corners, size = torch.tensor([10.0, 10.0, 20.0, 20.0]).expand(2, 3, 4), torch.tensor([[100.0, 50.0], [20.0, 40.0]])
    unit = boxes.to_unit(corners, size)
    assert_close(unit, torch.tensor([[0.1, 0.2, 0.2, 0.4], [0.5, 0.25, 1.0, 0.5]])[:, None].expand(2, 3, 4))
    assert_close(boxes.to_pixels(unit, size), corners)
    per_phrase = corners[:, None].expand(2, 5, 3, 4)
    assert_close(boxes.to_unit(per_phrase, size), unit[:, None].expand(2, 5, 3, 4))


def test_to_unit_clips_to_the_image() -> None:
    unit = boxes.to_unit(torch.tensor([[-5.0, 10.0, 130.0, 55.0]]), torch.tensor([100.0, 50.0]))
    assert_close(unit, torch.tensor([[0.0, 0.2, 1.0, 1.0]]), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "size", [[[100.0, 50.0], [0.0, 50.0]], [[100.0, -1.0], [100.0, 50.0]], [[100.0, 50.0], [NAN, 50.0]]]
)
def test_to_unit_refuses_impossible_sizes(size: list[list[float]]) -> None:
    with pytest.raises(
        BoxError, match=r"image sizes must be positive; found (0|-1|nan)\. Give width and height in pixels"
    ):
        boxes.to_unit(torch.zeros(2, 1, 4), torch.tensor(size))


@pytest.mark.parametrize(
    ("corner", "found"), [(30.0, "0 to 30"), (-0.01, "-0.01 to 0.5"), (1.01, "0 to 1.01"), (NAN, "nan to nan")]
)
def test_check_unit_refuses(corner: float, found: str) -> None:
    with pytest.raises(
        BoxError, match=rf"boxes of image 7 must be unit corners in \[0, 1\]; found {found}\. .*to_unit"
    ):
        boxes.check_unit(torch.tensor([[0.0, 0.0, 0.5, corner]]), "image 7")


def test_check_unit_passes_rounding_and_nothing() -> None:
    boxes.check_unit(torch.tensor([[-1e-6, 0.0, 1.0 + 1e-6, 1.0]]), "here")
    boxes.check_unit(torch.zeros(0, 4), "here")


# Overlap


@pytest.mark.parametrize(
    ("box", "inclusive", "expected"),
    [
        ([0.0, 0.0, 3.0, 4.0], False, 12),
        ([0.0, 0.0, 3.0, 4.0], True, 20),
        ([2.0, 2.0, 2.0, 5.0], False, 0),
        ([2.0, 2.0, 2.0, 2.0], True, 1),  # a single pixel
        ([5.0, 5.0, 2.0, 1.0], False, 0),  # inverted on both axes: no product of two negatives
        ([5.0, 5.0, 2.0, 1.0], True, 0),
    ],
)
def test_area(box: list[float], inclusive: bool, expected: float) -> None:
    assert boxes.area(torch.tensor(box), inclusive=inclusive).item() == expected


@pytest.mark.parametrize("inclusive", [False, True])
@given(first=many(st.integers(0, 5), 0, 20), second=many(st.integers(0, 5), 0, 20), whole=st.booleans())
def test_iou_equals_loops(inclusive: bool, first: Tensor, second: Tensor, whole: bool) -> None:
    if whole:  # corners of whole numbers touch, coincide and collapse often
        first, second = first.round(), second.round()
    expected = [naive_iou(a, b, float(inclusive)) for a in first.tolist() for b in second.tolist()]
    found = boxes.iou(first, second, inclusive=inclusive)
    assert found.shape == (len(first), len(second))
    assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert ((found >= 0) & (found <= 1)).all(), found


def test_iou_by_hand() -> None:
    first = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    second = torch.tensor([[1.0, 0.0, 3.0, 2.0], [2.0, 0.0, 4.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert_close(boxes.iou(first, second), torch.tensor([[1 / 3, 0, 0], [0, 0, 0]]))
    assert_close(boxes.iou(first, second, inclusive=True), torch.tensor([[6 / 12, 3 / 15, 1 / 9], [1 / 9, 0, 1]]))


def test_iou_of_batches_pairs_within_a_row() -> None:
    corners = torch.rand(3, 8, 4)
    first, second = boxes.centre_to_corners(corners[:, :5]), boxes.centre_to_corners(corners[:, 5:])
    rows = [boxes.iou(a, b) for a, b in zip(first, second, strict=True)]
    assert_close(boxes.iou(first, second), torch.stack(rows), rtol=0, atol=0)
    assert boxes.iou(first, second).shape == (3, 5, 3)


def test_iou_of_whole_number_boxes() -> None:
    assert boxes.iou(torch.tensor([[0, 0, 2, 2]]), torch.tensor([[0, 0, 2, 1]])).tolist() == [[0.5]]


# Locations


def test_locate() -> None:
    found = boxes.locate(torch.tensor([[[0.0, 0.25, 0.5, 1.0]], [[0.5, 0.5, 0.5, 0.75]]]))
    assert found.tolist() == [[[0.0, 0.25, 0.5, 1.0, 0.375]], [[0.5, 0.5, 0.5, 0.75, 0.0]]]


def test_spatial_six() -> None:
    found = boxes.spatial_six(torch.tensor([[0.0, 0.25, 0.5, 1.0]]))
    assert found.tolist() == [[0.0, 0.25, 0.5, 1.0, 0.5, 0.75]]
