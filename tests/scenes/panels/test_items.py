"""Sentences about items: contact with a side is open to dispute at one pixel, and only then."""

from __future__ import annotations

import pytest

from visling.runtime import generator_for
from visling.scenes.panels.items import sample_contact, sample_kind, sample_two_kinds, say_same_box
from visling.scenes.panels.logic import Truth
from visling.scenes.panels.panel import Panel, Piece


@pytest.mark.parametrize(("gap", "expected"), [(0, True), (1, None), (2, False)])
def test_an_item_one_pixel_from_the_bottom_is_open_to_dispute(gap: int, expected: Truth) -> None:
    piece = Piece(x=40, y=80 - gap, shape="circle", color="blue", size=20)
    seen = set()
    for seed in range(200):
        words, touches = sample_contact(generator_for(seed))
        if words.startswith("not"):
            assert touches(piece) is (None if expected is None else not expected), words
        elif any(place in words for place in ("corner", "left", "right", "top")):
            assert touches(piece) is False, words
        else:
            assert touches(piece) is expected, words
        seen.add(words)
    assert len(seen) > 15


def test_a_kind_fits_what_its_words_say() -> None:
    for seed in range(200):
        kind = sample_kind(generator_for(seed), size_rate=0.5)
        words = kind.words(True).split()
        for color in ("yellow", "blue", "black"):
            for shape in ("circle", "square", "triangle"):
                for size, sizes in ((10, {"small"}), (20, {"medium"}), (30, {"big", "large"})):
                    fits = (
                        (color in words or not {"yellow", "blue", "black"} & set(words))
                        and (shape == words[-1] or words[-1] in ("item", "object"))
                        and (bool(sizes & set(words)) or not {"small", "medium", "big", "large"} & set(words))
                    )
                    assert kind.test(Piece(x=0, y=0, shape=shape, color=color, size=size)) is fits, words
        first, second = sample_two_kinds(generator_for(seed))
        assert first.words(True) != second.words(True)


def test_one_item_is_never_said_to_be_in_the_same_box() -> None:
    blue = Piece(x=0, y=0, shape="circle", color="blue", size=10)
    for seed in range(60):
        sentence = say_same_box(generator_for(seed))
        assert sentence.truth(Panel(boxes=((blue,), (), ()), towers=False)) is None
        pair, apart = ((blue, blue), (), ()), ((blue,), (blue,), ())
        assert sentence.truth(Panel(boxes=pair, towers=False)) in (True, None)
        assert sentence.truth(Panel(boxes=apart, towers=False)) in (False, None)
