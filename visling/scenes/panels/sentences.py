"""Sentences about panels, built from conditions and quantifiers, each with the function that says whether it is true of
a panel.

The constructions and words are those that occur in NLVR's development sentences, and so are the readings:
"two towers" are exactly two, "over" is directly over.
A condition is true, false or, where readers would disagree (an item one pixel from the edge, a block above another with
one between), None; a sentence is only used for panels on which it is plainly true or false.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from visling.scenes.panels.boxes import box_with, every_box, one_box_has
from visling.scenes.panels.items import (
    all_touching,
    colours_touching,
    items_sentence,
    items_touching,
    not_coloured,
    same_box,
    two_touching,
)
from visling.scenes.panels.logic import Maker, Sentence
from visling.scenes.panels.towers import (
    block_at,
    block_over,
    blocks_sentence,
    every_tower,
    high_tower,
    one_colour_tower,
    same_end,
    same_height,
    second,
    some_end,
    the_tower,
    touching_stack,
    tower_as_box,
    tower_with,
)
from visling.scenes.world import pick


def sample_sentences(rng: np.random.Generator, towers: bool, num_boxes: int, tries: int = 60) -> Iterator[Sentence]:
    """Random sentences of one random form for panels of towers or of scattered items, with the slips of human writers.

    The caller takes the first that suits its panels; as all have one form, forms that seldom suit are not crowded out
    by others.
    """
    maker = pick(rng, _TOWER_FORMS if towers else _SCATTER_FORMS)
    form = ""
    for _ in range(tries):
        sentence = maker(rng)
        form = form or sentence.form
        if sentence.form == form:
            yield Sentence(
                form=form, text=_as_people_write(_for_boxes(sentence.text, num_boxes), rng), truth=sentence.truth
            )


_SCATTER_FORMS: Sequence[Maker] = (
    items_sentence,
    items_touching,
    items_touching,
    items_touching,
    all_touching,
    not_coloured,
    two_touching,
    same_box,
    colours_touching,
    box_with,
    box_with,
    box_with,
    box_with,
    one_box_has,
    every_box,
)

_TOWER_FORMS: Sequence[Maker] = (
    tower_with,
    tower_with,
    tower_with,
    tower_with,
    tower_with,
    tower_with,
    block_at,
    block_at,
    block_over,
    block_over,
    blocks_sentence,
    every_tower,
    the_tower,
    same_height,
    same_end,
    some_end,
    second,
    tower_as_box,
    tower_as_box,
    one_colour_tower,
    high_tower,
    touching_stack,
)
"""Repeated entries are more frequent, roughly as in the development sentences."""


def _for_boxes(text: str, num_boxes: int) -> str:
    return (
        text
        if num_boxes == 3
        else text.replace("of the three towers", "of the towers").replace("All 3 towers", "All 2 towers")
    )


_SLIPS: Sequence[tuple[float, str, str]] = (
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


def _as_people_write(text: str, rng: np.random.Generator) -> str:
    """The sentence with or without capital and period, and now and then with a slip of a human writer that leaves the
    meaning alone."""
    for rate, pattern, other in _SLIPS:
        if rng.random() < rate:
            text = re.sub(pattern, other, text, count=1)
    if rng.random() < 0.3:
        text = text[0].lower() + text[1:]
    return text + ("." if rng.random() < 0.5 else "")
