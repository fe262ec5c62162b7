"""Captions of panels: different, true of the box they name, and complete."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from visling.runtime import generator_for
from visling.scenes.panels.captions import panel_captions
from visling.scenes.panels.panel import sample_panel

SIZES = {"small": 10, "medium": 20, "large": 30}
PLACES = {"left": 0, "middle": 1, "right": -1}


@pytest.mark.parametrize("towers", [True, False])
def test_captions_are_different_and_at_most_as_many_as_asked_for(towers: bool) -> None:
    for seed in range(60):
        rng = generator_for(seed)
        captions = panel_captions(sample_panel(rng, 3, towers), rng, 5)
        assert 0 < len(captions) == len(set(captions)) <= 5


def test_items_are_named_with_all_their_attributes() -> None:
    read = 0
    for seed in range(120):
        rng = generator_for(seed)
        panel = sample_panel(rng, 3, False)
        for caption in panel_captions(panel, rng, 6):
            (place,) = re.findall(r"the (left|middle|right) box", caption)
            held = [(piece.size, piece.color, piece.shape) for piece in panel.boxes[PLACES[place]]]
            for size, color, shape in re.findall(r"(small|medium|large) (\w+) (\w+)", caption):
                assert (SIZES[size], color, shape) in held, caption
                read += 1
    assert read > 400


def test_towers_are_listed_from_the_end_that_is_named() -> None:
    read = set()
    for seed in range(120):
        rng = generator_for(seed)
        panel = sample_panel(rng, 3, True)
        for caption in panel_captions(panel, rng, 6):
            (place,) = re.findall(r"the (left|middle|right) tower", caption)
            colours = [piece.color for piece in panel.boxes[PLACES[place]]]
            if m := re.search(r"from (base|top) to \w+ : (.*)", caption):
                assert m[2].split(", ") == (colours if m[1] == "base" else colours[::-1]), caption
                read.add(m[1])
            elif m := re.search(r"an? (\w+) block (on top of|below) an? (\w+) block", caption):
                lower, upper = (m[3], m[1]) if m[2] == "on top of" else (m[1], m[3])
                assert (lower, upper) in pairwise(colours), caption
                read.add(m[2])
    assert read == {"base", "top", "on top of", "below"}
