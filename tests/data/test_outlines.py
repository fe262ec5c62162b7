"""Masks sampled in the middle of their cells, as VisualBERT's network reads them. VL-BERT's are compared with its
recording in tests/parity/test_vlbert_vcr.py."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from visling.data.outlines import outline_mask

TRIANGLE = [[2.3, 1.1], [37.2, 8.4], [11.7, 29.6]]
STAR = [[20, 0.5], [27.1, 38.2], [1.3, 13.9], [39.4, 14.2], [13.6, 37.7]]
BEYOND = [[-9.1, -7.3], [21.2, -3.4], [19.8, 61.7], [-8.8, 50.6]]


def crosses(point: tuple[float, float], polygon: list[list[float]]) -> bool:
    """Whether a ray to the right crosses the outline an odd number of times."""
    x, y = point
    inside = False
    for (x1, y1), (x2, y2) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) * (x2 - x1) / (y2 - y1):
            inside = not inside
    return inside


def spaced(low: float, high: float, number: int) -> NDArray[np.float64]:
    """Points that keep half a step from both ends (release, `_spaced_points`)."""
    half = (high - low) / (2 * number)
    return np.linspace(low + half, high - half, number)


@pytest.mark.parametrize("polygons", [[TRIANGLE], [STAR], [BEYOND], [TRIANGLE, BEYOND]])
@pytest.mark.parametrize("box", [(0.0, 0.0, 40.0, 40.0), (3.7, -2.2, 33.1, 21.9)])
def test_cells_are_sampled_in_their_middle(polygons: list[list[list[float]]], box: tuple[float, ...]) -> None:
    expected = [
        [any(crosses((x, y), polygon) for polygon in polygons) for x in spaced(box[0], box[2], 14)]
        for y in spaced(box[1], box[3], 14)
    ]
    found = outline_mask(polygons, box, inclusive=False)
    assert found.tolist() == expected
    assert found.any()
    assert not found.all()
    assert found.tolist() != outline_mask(polygons, box).tolist(), "VL-BERT samples elsewhere"


def test_an_object_without_outline_covers_no_cell() -> None:
    assert not outline_mask([], (0, 0, 5, 5), inclusive=False).any()
