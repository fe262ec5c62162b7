"""Anchors and shifts between boxes; what is sampled from them for training."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from visling.types import IGNORE
from visling.vision.anchors import (
    base_anchors,
    cell_centres,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    has_area,
    sample_anchors,
    sample_regions,
)


def test_box_coding_inverts() -> None:
    corner = torch.rand(50, 2) * 30
    boxes = torch.cat([corner, corner + 1 + torch.rand(50, 2) * 20], 1)
    base = boxes.roll(1, 0)
    assert_close(decode_boxes(encode_boxes(boxes, base), base), boxes, rtol=0, atol=1e-4)
    wild = decode_boxes(torch.full((1, 4), 1e3), torch.tensor([[0.0, 0.0, 4.0, 4.0]]))
    assert wild.isfinite().all()


def test_anchors_have_equal_area_at_every_ratio() -> None:
    anchors = base_anchors((16.0, 32.0), (1.0, 4.0))
    assert_close(anchors, torch.tensor([[-8.0, -8, 8, 8], [-4, -16, 4, 16], [-16, -16, 16, 16], [-8, -32, 8, 32]]))
    assert cell_centres(2, 3, 4, anchors.device).tolist() == [[2, 2], [6, 2], [10, 2], [2, 6], [6, 6], [10, 6]]


def test_boxes_are_clipped_to_their_image() -> None:
    clipped = clip_boxes(torch.tensor([[-5.0, 2, 50, 9], [41, 1, 45, 2]]), torch.tensor([40.0, 8, 40, 8]))
    assert clipped.tolist() == [[0, 2, 40, 8], [40, 1, 40, 2]]
    assert has_area(clipped).tolist() == [True, False]


def test_sampled_anchors_are_half_positive_at_most_and_every_object_has_one() -> None:
    anchors = cell_centres(8, 8, 4, torch.device("cpu")).repeat(1, 2) + base_anchors((4.0,), (1.0,))
    boxes = torch.tensor([[[0.0, 0, 4, 4], [9.0, 9, 11, 11], [16.0, 16, 32, 32]]])  # equal, small, a crowd
    classes = torch.tensor([[0, 1, IGNORE]])
    inside = torch.ones(1, 64, dtype=torch.bool)
    inside[0, 1] = False
    for _ in range(5):
        sample = sample_anchors(anchors, inside, boxes, classes, positive=0.6, negative=0.02, count=20)
        assert sample.positive.nonzero().tolist() == [[0, 0], [0, 18]], "an equal one, and the best of a small object"
        assert sample.owner[sample.positive].tolist() == [0, 1]
        assert int(sample.chosen.sum()) == 20
        assert not sample.chosen[0, 1], "it is outside"
        crowd = (anchors[:, :2] >= 16).all(1)
        assert not sample.chosen[0, crowd].any(), "nothing is learnt in a crowd"
    one = sample_anchors(anchors, inside, boxes, classes, positive=0.6, negative=0.02, count=2)
    assert (int(one.positive.sum()), int(one.chosen.sum())) == (1, 2)


def test_sampled_regions_hold_the_objects_themselves() -> None:
    boxes = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 0, 0]]])
    classes = torch.tensor([[3, IGNORE]])
    candidates = torch.tensor([[[8.0, 8, 9, 9], [0, 0, 4, 3], [5, 5, 6, 6]]])
    real = torch.tensor([[True, True, False]])
    sample = sample_regions(candidates, real, boxes, classes, positive=0.5, count=8)
    assert sample.boxes[sample.real].tolist() == [[0, 0, 4, 4], [8, 8, 9, 9], [0, 0, 4, 3]]
    assert sample.overlap[sample.real].tolist() == [1, 0, 0.75]
    assert sample.real.shape == (1, 5)
