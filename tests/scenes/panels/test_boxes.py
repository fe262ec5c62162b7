"""Sentences about boxes: different items for different kinds, and what "above" means."""

from __future__ import annotations

from visling.runtime import generator_for
from visling.scenes.panels.boxes import sample_box_condition, say_every_box
from visling.scenes.panels.panel import Box, Panel, Piece


def place(x: int, y: int, color: str = "blue", shape: str = "circle") -> Piece:
    return Piece(x=x, y=y, shape=shape, color=color, size=20)


def conditions(form: str, count: int) -> dict[str, list[bool | None]]:
    """Words of sampled conditions of one form -> truth on a few boxes."""
    boxes: list[Box] = [
        (place(0, 0, "yellow"), place(5, 40, "blue")),
        (place(0, 0, "yellow"), place(60, 40, "blue")),
        (place(0, 40, "yellow"), place(0, 0, "blue")),
    ]
    found: dict[str, list[bool | None]] = {}
    for seed in range(count):
        sampled, words, test = sample_box_condition(generator_for(seed))
        if sampled == form:
            found[words] = [test(box) for box in boxes]
    return found


def test_above_needs_a_shared_column() -> None:
    found = {words: truths for words, truths in conditions("above", 6000).items() if "big" not in words}
    judged = [
        truths
        for words, truths in found.items()
        if words.replace("over", "above").replace("item", "circle").replace("object", "circle")
        == "a yellow circle above a blue circle"
    ]
    assert judged
    for truths in judged:
        assert truths == [True, None, False]


def test_three_kinds_need_three_items() -> None:
    for words, truths in conditions("three kinds", 2000).items():
        assert not any(truths), words


def test_every_box_is_false_of_an_empty_box() -> None:
    panel = Panel(boxes=((place(0, 0),), (), (place(0, 0),)), towers=False)
    for seed in range(80):
        sentence = say_every_box(generator_for(seed))
        assert sentence.truth(panel) is False, sentence.text
