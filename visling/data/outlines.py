"""Masks of objects from the polygons of their outlines, as cells of a grid over the object's box.

Region extractors that are trained jointly read them on VCR: VL-BERT's multiplies the maps of regions by them,
VisualBERT's adds what it makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

ON_CORNER = 1e-12
"""Cells by which a corner may miss a centre that lies on it."""


def outline_mask(
    polygons: Sequence[ArrayLike], box: Sequence[float], *, size: int = 14, inclusive: bool = True
) -> NDArray[np.bool_]:
    """Which cells of a box belong to an object.

    A cell is set if its sample point lies in any of the polygons, counted by even and odd crossings, or on an edge or
    a corner.

    Args:
        polygons: (corners, 2) each, x and y in pixels.
        box: pixel corners x1, y1, x2, y2.
        inclusive: both ends belong to the box, cells are sampled at their first corner, and polygons are clamped to the
            box (VL-BERT); else cells are sampled in their middle (VisualBERT).
    Returns:
        (size, size): row y, column x.
    Source:
        VL-BERT release, `common/utils/mask.py`, with scikit-image's `grid_points_in_poly`.
        Quirk: what lies beyond the box is clamped to its edge, where it leaves single cells.
        VisualBERT release, `dataloaders/mask_utils.py`, with matplotlib's `contains_points`, which leaves open to which
        side a point on an outline belongs.
    """
    origin = np.array(box[:2], np.float32)
    scale = size / (np.array(box[2:4], np.float32) - origin + inclusive)
    mask = np.zeros((size, size), bool)
    for polygon in polygons:
        corners = (np.asarray(polygon, np.float32).reshape(-1, 2) - origin) * scale
        corners = corners.clip(0, size - 1) if inclusive else corners - np.float32(0.5)
        mask |= _is_inside(corners.astype(np.float64), size)
    return mask


def _is_inside(corners: NDArray[np.float64], size: int) -> NDArray[np.bool_]:
    """(size, size) cells whose centre lies in a polygon (corners, 2) or on its outline."""
    rows, columns = np.mgrid[:size, :size]
    x, y = corners[:, 0] - columns[..., None], corners[:, 1] - rows[..., None]  # (size, size, corners)
    before_x, before_y = np.roll(x, 1, axis=-1), np.roll(y, 1, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):  # level edges cross nothing and are left out below
        crossed = (x * before_y - before_x * y) / (before_y - y)
    right = (((y > 0) != (before_y > 0)) & (crossed > 0)).sum(-1) % 2
    left = (((y < 0) != (before_y < 0)) & (crossed < 0)).sum(-1) % 2
    on_corner = ((np.abs(x) < ON_CORNER) & (np.abs(y) < ON_CORNER)).any(-1)
    found: NDArray[np.bool_] = on_corner | (right == 1) | (right != left)
    return found
