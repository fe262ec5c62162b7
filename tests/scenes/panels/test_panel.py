"""Panels: drawn as NLVR draws them, items apart and inside their boxes."""

from __future__ import annotations

import numpy as np
import pytest

from visling.runtime import generator_for
from visling.scenes.panels.panel import Panel, Piece, draw_panel, sample_panel, vary_panel


def test_drawing_matches_measured_pixels_of_the_real_pictures() -> None:
    """Coverage of a 10-pixel triangle and circle, and the two grounds, as measured on NLVR's development pictures."""
    boxes = (
        (
            Piece(x=10, y=10, shape="triangle", color="black", size=10),
            Piece(x=40, y=40, shape="circle", color="black", size=10),
        ),
        (Piece(x=70, y=70, shape="square", color="blue", size=30),),
        (),
    )
    picture = np.asarray(draw_panel(Panel(boxes=boxes, towers=False))).astype(int)
    assert picture.shape == (100, 400, 4)
    assert picture[50, 5].tolist() == [211, 211, 211, 255]
    assert picture[50, 120].tolist() == [128, 128, 128, 255]
    assert picture[99, 249].tolist() == [0, 153, 255, 255]
    cover = np.rint(255 * (1 - picture[10:20, 10:20, 0] / 211))
    np.testing.assert_allclose(cover[0], [0, 0, 0, 0, 64, 64, 0, 0, 0, 0], atol=2)
    np.testing.assert_allclose(cover[9], [192, 255, 255, 255, 255, 255, 255, 255, 255, 191], atol=2)
    cover = np.rint(255 * (1 - picture[40:50, 40:50, 0] / 211))
    np.testing.assert_allclose(cover[0], [0, 0, 64, 191, 238, 238, 191, 64, 0, 0], atol=16)


@pytest.mark.parametrize("towers", [True, False])
def test_items_keep_apart_and_inside(towers: bool) -> None:
    for seed in range(40):
        rng = generator_for(seed)
        panel = sample_panel(rng, 3, towers)
        varied = vary_panel(panel, rng)
        for one in (panel, varied):
            for box in one.boxes:
                for i, a in enumerate(box):
                    assert min(a.edges.values()) >= 0
                    for b in box[i + 1 :]:
                        gap_x = max(a.x, b.x) - min(a.x + a.size, b.x + b.size)
                        gap_y = max(a.y, b.y) - min(a.y + a.size, b.y + b.size)
                        assert max(gap_x, gap_y) >= 1
        assert sum(map(len, varied.boxes)) == sum(map(len, panel.boxes))
