"""Sentences about towers: base and top, "over" against "above", and the tower with so many blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from visling.runtime import generator_for
from visling.scenes.panels.logic import Sentence
from visling.scenes.panels.panel import Panel, Piece
from visling.scenes.panels.towers import say_block_over, say_second_block, say_some_end, say_the_tower

COLOURS = {"b": "blue", "k": "black", "y": "yellow"}


def stack(*towers: str) -> Panel:
    """A panel of towers, each written by its colours from the base up."""
    boxes = (
        tuple(
            Piece(x=40, y=80 - 21 * k, shape="square", color=COLOURS[letter], size=20)
            for k, letter in enumerate(letters)
        )
        for letters in towers
    )
    return Panel(boxes=tuple(boxes), towers=True)


def judgements(say: Callable[[np.random.Generator], Sentence], panel: Panel, *, seeds: int) -> dict[str, bool | None]:
    """Each text that so many seeds give, and whether it is true of the panel."""
    sentences = (say(generator_for(seed)) for seed in range(seeds))
    return {sentence.text: sentence.truth(panel) for sentence in sentences}


def test_above_is_open_to_dispute_with_a_block_between_and_over_is_not() -> None:
    judged = judgements(say_block_over, stack("bky", "k", "k"), seeds=3000)
    assert judged["There is a yellow block above a blue block"] is None
    assert judged["There is a yellow block over a blue block"] is False
    assert judged["There is a yellow block over a black block"] is True
    assert judged["There is no yellow block over a black block"] is False


def test_the_end_of_the_tower_with_so_many_blocks() -> None:
    judged = judgements(say_the_tower, stack("by", "yb", "kky"), seeds=4000)
    assert judged["The top of the tower with three blocks is yellow"] is True
    assert judged["The base of the tower with three blocks is yellow"] is False
    assert judged["The top of the tower with two blocks is yellow"] is None, "two towers, which differ"
    assert judged["The top of the tower with four blocks is yellow"] is None, "there is none"


def test_the_second_block_counts_from_the_named_end() -> None:
    judged = judgements(say_second_block, stack("bkyy", "b", "b"), seeds=6000)
    assert judged["There is a tower where the second block from the base is black"] is True
    assert judged["There is a tower where the second block from the top is black"] is False
    assert judged["There is a tower where the second block is black"] is None


def test_numbers_of_ends_are_exact_unless_at_least_is_said() -> None:
    judged = judgements(say_some_end, stack("by", "by", "by"), seeds=2000)
    assert judged["At least two of the towers have a yellow top"] is True
    assert judged["Two towers have a yellow top"] is False
