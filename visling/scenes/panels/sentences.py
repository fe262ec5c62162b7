"""Random sentences about panels, each with the function that says whether it is true of a panel.

Constructions, words and readings are those of NLVR's development sentences: "two towers" are exactly two, "over" is
directly over. Where readers would disagree (an item one pixel from the edge, a block above another with one between)
the truth is open to dispute (`logic.Truth`); a sentence is used only for panels on which it is plainly true or false.
`items`, `boxes` and `towers` hold the constructions; this file chooses among them and adds the slips of human writers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from visling.scenes.panels.boxes import say_box_with, say_every_box, say_one_box_has
from visling.scenes.panels.items import (
    say_all_touching,
    say_colours_touching,
    say_items,
    say_items_touching,
    say_not_coloured,
    say_same_box,
    say_two_touching,
)
from visling.scenes.panels.logic import Maker, Sentence
from visling.scenes.panels.towers import (
    say_block_at,
    say_block_over,
    say_blocks,
    say_every_tower,
    say_high_tower,
    say_one_colour_tower,
    say_same_end,
    say_same_height,
    say_second_block,
    say_some_end,
    say_the_tower,
    say_touching_stack,
    say_tower_as_box,
    say_tower_with,
)
from visling.scenes.world import pick


def sample_sentences(rng: np.random.Generator, towers: bool, num_boxes: int, tries: int = 60) -> Iterator[Sentence]:
    """Random sentences of one random form for panels of towers or of scattered items.

    The caller takes the first that suits its panels. As all are of one form, forms that seldom suit are not crowded out
    by the others.
    """
    maker = pick(rng, _TOWER_FORMS if towers else _SCATTER_FORMS)
    form = ""
    for _ in range(tries):
        sentence = maker(rng)
        form = form or sentence.form
        if sentence.form == form:
            yield Sentence(
                form=form, text=_add_slips(_fit_to_boxes(sentence.text, num_boxes), rng), truth=sentence.truth
            )


_SCATTER_FORMS: Sequence[Maker] = (
    say_items,
    say_items_touching,
    say_items_touching,
    say_items_touching,
    say_all_touching,
    say_not_coloured,
    say_two_touching,
    say_same_box,
    say_colours_touching,
    say_box_with,
    say_box_with,
    say_box_with,
    say_box_with,
    say_one_box_has,
    say_every_box,
)

_TOWER_FORMS: Sequence[Maker] = (
    say_tower_with,
    say_tower_with,
    say_tower_with,
    say_tower_with,
    say_tower_with,
    say_tower_with,
    say_block_at,
    say_block_at,
    say_block_over,
    say_block_over,
    say_blocks,
    say_every_tower,
    say_the_tower,
    say_same_height,
    say_same_end,
    say_some_end,
    say_second_block,
    say_tower_as_box,
    say_tower_as_box,
    say_one_colour_tower,
    say_high_tower,
    say_touching_stack,
)
"""A maker that is listed n times is n times as frequent, roughly as in the development sentences."""


def _fit_to_boxes(text: str, num_boxes: int) -> str:
    """The sentence without the number three, for panels of two boxes."""
    return (
        text
        if num_boxes == 3
        else text.replace("of the three towers", "of the towers").replace("All 3 towers", "All 2 towers")
    )


_SLIPS: Sequence[tuple[float, str, str]] = (  # rate, pattern, what is written in its place
    (0.3, r"\bgrey\b", "gray"),
    (0.12, r"\bcolor", "colour"),
    (0.08, r"\bat least\b", "atleast"),
    (0.05, r"\bhave\b", "has"),
    (0.03, r"\bThere are\b", "There is"),
    (0.02, r"blocks\b", "block"),
    (0.05, r"\ban edge\b", "a edge"),
    (0.04, r"^All\b", "ll"),
    (0.04, r"^At least\b", "tleast"),
    (0.015, r"^There (?:is|are) ", ""),
    (0.02, r" a (?=\w+ (?:block|item|square))", " "),
)


def _add_slips(text: str, rng: np.random.Generator) -> str:
    """The sentence with or without capital and full stop, and now and then with a human writer's slip that does not
    change the meaning."""
    for rate, pattern, other in _SLIPS:
        if rng.random() < rate:
            text = re.sub(pattern, other, text, count=1)
    if rng.random() < 0.3:
        text = text[0].lower() + text[1:]
    return text + ("." if rng.random() < 0.5 else "")
