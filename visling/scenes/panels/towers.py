"""Sentences about the towers of a panel, and what a tower may be like."""

from __future__ import annotations

import itertools
import re

import numpy as np

from visling.scenes.panels.boxes import sample_box_condition
from visling.scenes.panels.logic import (
    BoxTest,
    Sentence,
    Truth,
    all_true,
    any_true,
    both_true,
    common_truth,
    inflect_noun,
    sample_quantity,
    say_there_is,
    write_number,
)
from visling.scenes.panels.panel import COLOURS, TALLEST, Box, Panel
from visling.scenes.world import pick, shuffled


def _test_end(end: str, color: str) -> BoxTest:
    """Test of a tower: whether the block at its base or top has a colour."""
    return lambda tower: tower[0 if end == "base" else -1].color == color


def _name_end(end: str, rng: np.random.Generator) -> str:
    """A word for the base or the top."""
    return pick(rng, ("base", "base", "bottom")) if end == "base" else "top"


def _judge_stacked(tower: Box, upper: str, lower: str, words: str) -> Truth:
    """Whether a block of one colour stands directly over one of another; with others between, "above" is open to
    dispute."""
    colours = [block.color for block in tower]
    direct = any(a == lower and b == upper for a, b in itertools.pairwise(colours))
    anywhere = any(
        colours[i] == lower and colours[j] == upper for i in range(len(colours)) for j in range(i + 1, len(colours))
    )
    return common_truth(direct, anywhere) if words == "above" else direct


def _sample_number_condition(rng: np.random.Generator) -> tuple[str, str, BoxTest]:
    """How many blocks a tower has: form, words that follow "with", and the test."""
    quantity = sample_quantity(rng, TALLEST, ("bare", "bare", "exactly", "exactly", "at least", "only", "more than"))
    noun = pick(rng, ("block", "block", "block", "item", "object"))
    return (
        "number",
        f"{quantity.words} {inflect_noun(noun, quantity.singular)}",
        lambda tower: quantity.holds(len(tower)),
    )


def _sample_end_condition(rng: np.random.Generator) -> tuple[str, str, BoxTest]:
    """The colour of a tower's base or top: form, words that follow "with", and the test."""
    color, end = pick(rng, tuple(COLOURS)), pick(rng, ("base", "top"))
    place = _name_end(end, rng)
    a = pick(rng, ("a", "a", "a", "1", "one"))
    the = "the " if rng.random() < 0.85 else ""
    return f"{end}", f"{a} {color} block at {the}{place}", _test_end(end, color)


def _sample_tower_condition(rng: np.random.Generator) -> tuple[str, str, BoxTest]:
    """What a tower is like: form, words that follow "with", and the test."""
    form = pick(
        rng,
        (
            "number",
            "number",
            "end",
            "end",
            "end",
            "over",
            "over",
            "colour count",
            "two colours",
            "only",
            "stacked",
            "colours",
            "number and end",
            "number and colours",
            "below end",
        ),
    )
    one, two = pick(rng, tuple(COLOURS)), pick(rng, tuple(COLOURS))
    if form == "number":
        return _sample_number_condition(rng)
    if form == "end":
        return _sample_end_condition(rng)
    if form == "over":
        words = pick(rng, ("over", "over", "above", "above", "on", "on top of"))
        return form, f"a {one} block {words} a {two} block", lambda tower: _judge_stacked(tower, one, two, words)
    if form == "below end":
        if rng.random() < 0.3:
            return (
                "below another",
                f"a {one} block below a different colored block",
                lambda tower: any(a.color == one != b.color for a, b in itertools.pairwise(tower)),
            )
        return (
            form,
            f"a {one} block below a {two} block at the top",
            lambda tower: len(tower) > 1 and tower[-1].color == two and tower[-2].color == one,
        )
    if form == "colour count":
        quantity = sample_quantity(rng, 3, ("bare", "bare", "exactly", "at least", "only", "a"))
        if quantity.words.startswith("only"):
            # "only two blue blocks": nothing else, or two blue ones among others?
            return (
                form,
                f"{quantity.words} {one} {inflect_noun('block', quantity.singular)}",
                lambda tower: common_truth(
                    quantity.holds(sum(b.color == one for b in tower)),
                    bool(quantity.holds(len(tower))) and all(b.color == one for b in tower),
                ),
            )
        return (
            form,
            f"{quantity.words} {one} {inflect_noun('block', quantity.singular)}",
            lambda tower: quantity.holds(sum(b.color == one for b in tower)),
        )
    if form == "two colours":
        first, second = shuffled(rng, tuple(COLOURS))[:2]
        more = sample_quantity(rng, 2, ("a", "bare"))
        words = f"a {first} block and {more.words} {second} {inflect_noun('block', more.singular)}"
        return (
            form,
            words,
            lambda tower: both_true(
                any(b.color == first for b in tower), more.holds(sum(b.color == second for b in tower))
            ),
        )
    if form == "only":
        colours = shuffled(rng, tuple(COLOURS))[: int(rng.integers(1, 3))]
        return (
            form,
            f"only {' and '.join(colours)} blocks",
            lambda tower: common_truth(
                {b.color for b in tower} == set(colours), {b.color for b in tower} <= set(colours)
            ),
        )
    if form == "stacked":
        n = int(rng.integers(2, 4))

        def run(tower: Box) -> Truth:
            longest = (
                max(
                    len(m)
                    for m in re.findall(r"x+|o+", "".join("x" if b.color == one else "o" for b in tower))
                    if "x" in m
                )
                if any(b.color == one for b in tower)
                else 0
            )
            return longest == n

        return form, f"{write_number(n, rng)} {one} blocks stacked together", run
    if form == "colours":
        n = int(rng.integers(1, 4))
        texts = {
            1: (
                "only one color",
                "blocks of only one color",
                "all blocks of the same color",
                "blocks of the same color",
            ),
            2: ("exactly two colors", "blocks of 2 different colors"),
            3: ("blocks of all 3 colors", "all 3 colors", "blocks of all three colours"),
        }
        return (
            form,
            pick(rng, texts[n]),
            lambda tower: None if len(tower) < 2 and n == 1 else len({b.color for b in tower}) == n,
        )
    _, said, number = _sample_number_condition(rng)
    if form == "number and end":
        _, ending, at_end = _sample_end_condition(rng)
        link = pick(rng, ("with", "having", "which has", "and"))
        return form, f"{said} {link} {ending}", lambda tower: both_true(number(tower), at_end(tower))
    first, second = shuffled(rng, tuple(COLOURS))[:2]
    words = f"{said}, and it has a {first} block and a {second} block"
    return (
        form,
        words,
        lambda tower: both_true(
            number(tower), any(b.color == first for b in tower) and any(b.color == second for b in tower)
        ),
    )


def say_tower_with(rng: np.random.Generator) -> Sentence:
    """How many towers are like this."""
    form, words, test = _sample_tower_condition(rng)
    quantity = sample_quantity(rng, 2, ("a", "a", "a", "bare", "bare", "exactly", "at least", "only", "no"))
    link = pick(
        rng,
        (
            "with",
            "with",
            "with",
            "having",
            "which has" if quantity.singular else "which have",
            "that has" if quantity.singular else "that have",
        ),
    )
    if form.startswith("colour count") and rng.random() < 0.3:
        link = "that contains" if quantity.singular else "that contain"
    if "and it has" in words and not quantity.singular:
        words = words.replace("and it has", "and they have")
    return Sentence(
        form=f"tower {form}",
        text=say_there_is(quantity, f"{inflect_noun('tower', quantity.singular)} {link} {words}"),
        truth=lambda panel: quantity.judge([test(tower) for tower in panel.boxes]),
    )


def say_block_at(rng: np.random.Generator) -> Sentence:
    """How many towers have a block of a colour at an end."""
    color, end = pick(rng, tuple(COLOURS)), pick(rng, ("base", "top"))
    quantity = sample_quantity(rng, 3, ("a", "a", "bare", "exactly", "at least", "no"))
    place = "base" if end == "base" else "top"
    rest, number = "", None
    if rng.random() < 0.5:
        _, said, number = _sample_number_condition(rng)
        rest = f" with {said}"
    at = _test_end(end, color)
    test: BoxTest = lambda tower: both_true(at(tower), number(tower) if number else True)  # noqa: E731
    return Sentence(
        form="block at",
        text=say_there_is(
            quantity, f"{color} {inflect_noun('block', quantity.singular)} as the {place} of a tower{rest}"
        ),
        truth=lambda panel: quantity.judge([test(tower) for tower in panel.boxes]),
    )


def say_block_over(rng: np.random.Generator) -> Sentence:
    """That a block stands over another."""
    one, two = pick(rng, tuple(COLOURS)), pick(rng, tuple(COLOURS))
    words = pick(rng, ("above", "over", "on", "on top of"))
    noun = pick(rng, ("block", "block", "block", "object", "square"))
    quantity = sample_quantity(rng, 1, ("a", "a", "a", "at least", "no"))
    return Sentence(
        form="block over",
        text=say_there_is(quantity, f"{one} {noun} {words} a {two} {noun}"),
        truth=lambda panel: quantity.judge([_judge_stacked(tower, one, two, words) for tower in panel.boxes]),
    )


def say_blocks(rng: np.random.Generator) -> Sentence:
    """How many blocks of a colour there are."""
    color = pick(rng, tuple(COLOURS))
    quantity = sample_quantity(rng, 5, ("bare", "bare", "exactly", "at least", "at most"))
    return Sentence(
        form="blocks",
        text=say_there_is(
            quantity, f"{color} {inflect_noun(pick(rng, ('block', 'block', 'square')), quantity.singular)}"
        ),
        truth=lambda panel: quantity.judge([b.color == color for b in panel.pieces]),
    )


def say_every_tower(rng: np.random.Generator) -> Sentence:
    """That every tower is like this."""
    form, words, test = _sample_tower_condition(rng)
    lead = pick(
        rng,
        (
            "Each tower has",
            "Every tower has",
            "All towers have",
            "All towers contain",
            "All the towers have",
            "All 3 towers have",
        ),
    )

    def truth(panel: Panel) -> Truth:
        return all_true([test(tower) for tower in panel.boxes])

    return Sentence(form=f"every tower {form}", text=f"{lead} {words.replace('it has', 'they have')}", truth=truth)


def say_the_tower(rng: np.random.Generator) -> Sentence:
    """The colour at an end of the tower with so many blocks."""
    n = int(rng.integers(1, TALLEST + 1))
    color, end = pick(rng, tuple(COLOURS)), pick(rng, ("base", "top"))
    at = _test_end(end, color)
    word = write_number(n, rng)
    block = inflect_noun("block", n == 1)
    text = pick(
        rng,
        (
            f"The tower with {word} {block} has a {color} block at the {end}",
            f"The {end} of the {word} {block} tower is {color}",
            f"The {end} of the tower with {word} {block} is {color}",
            f"The {end} of a {word} {block} tower is {color}",
        ),
    )

    def truth(panel: Panel) -> Truth:
        truths = [at(tower) for tower in panel.boxes if len(tower) == n]
        return common_truth(*truths) if truths else None

    return Sentence(form="the tower", text=text, truth=truth)


def say_same_height(rng: np.random.Generator) -> Sentence:
    """Which towers have the same height."""
    wording = pick(rng, ("two", "all", "different", "both"))
    a, b = sorted(shuffled(rng, range(1, TALLEST + 1))[:2])

    def truth(panel: Panel) -> Truth:
        heights = {len(tower) for tower in panel.boxes}
        if wording == "both":
            return {a, b} <= heights
        if wording == "two":
            return len(heights) < len(panel.boxes)
        return len(heights) == 1 if wording == "all" else len(heights) == len(panel.boxes)

    texts = {
        "two": (
            "There are at least two towers with the same height",
            "At least two of the towers have the same height",
        ),
        "all": ("All towers have the same height", "All the towers have the same number of blocks"),
        "both": (
            f"There are two towers which has {write_number(a, rng)} and {write_number(b, rng)} blocks each",
            f"There are towers with {a} and {b} blocks",
        ),
        "different": ("All towers have different height", "All towers have a different number of blocks"),
    }
    return Sentence(form="same height", text=pick(rng, texts[wording]), truth=truth)


def say_same_end(rng: np.random.Generator) -> Sentence:
    """How many towers have the same colour at an end."""
    end = pick(rng, ("base", "top"))
    wording = pick(rng, ("only two", "at least two", "all"))

    def truth(panel: Panel) -> Truth:
        colours = [tower[0 if end == "base" else -1].color for tower in panel.boxes]
        most = max(colours.count(color) for color in colours)
        return most == 2 if wording == "only two" else most >= 2 if wording == "at least two" else most == len(colours)

    texts = {
        "only two": (
            f"There are only two towers which has the same {end} color",
            f"Exactly two towers have the same color at the {end}",
        ),
        "at least two": (
            f"There are at least two towers with the same {end} color",
            f"At least two of the towers have the same color at the {end}",
        ),
        "all": (f"All towers have the same {end} color", f"All towers have the same color at the {end}"),
    }
    return Sentence(form="same end", text=pick(rng, texts[wording]), truth=truth)


def say_some_end(rng: np.random.Generator) -> Sentence:
    """How many towers have a colour at an end."""
    color, end = pick(rng, tuple(COLOURS)), pick(rng, ("base", "top"))
    lead, n, more = pick(
        rng,
        (
            ("One tower has", 1, False),
            ("Two of the three towers has", 2, False),
            ("At least two of the towers have", 2, True),
            ("Two towers have", 2, False),
        ),
    )

    def truth(panel: Panel) -> Truth:
        number = sum(tower[0 if end == "base" else -1].color == color for tower in panel.boxes)
        return number >= n if more else number == n

    return Sentence(form="some end", text=f"{lead} a {color} {end}", truth=truth)


def say_second_block(rng: np.random.Generator) -> Sentence:
    """How many towers have a colour at their second or third block."""
    color = pick(rng, tuple(COLOURS))
    at, number = pick(rng, (("second", 1), ("second", 1), ("third", 2)))
    quantity = sample_quantity(rng, 2, ("a", "a", "exactly", "only", "bare"))
    where = pick(rng, ("", " from the base", " from the bottom", " from the top"))
    link = pick(rng, ("where the", "that the", "in which the"))

    def test(tower: Box) -> Truth:
        if len(tower) <= number:
            return False
        low, high = tower[number].color == color, tower[-1 - number].color == color
        return high if "top" in where else low if where else common_truth(low, high)

    return Sentence(
        form="second block",
        text=say_there_is(quantity, f"{inflect_noun('tower', quantity.singular)} {link} {at} block{where} is {color}"),
        truth=lambda panel: quantity.judge([test(tower) for tower in panel.boxes]),
    )


def say_tower_as_box(rng: np.random.Generator) -> Sentence:
    """How many boxes hold a tower that is like this."""
    color, n = pick(rng, tuple(COLOURS)), int(rng.integers(2, TALLEST + 1))
    quantity = sample_quantity(rng, 2, ("a", "a", "a", "bare", "exactly"))
    top = pick(
        rng,
        (
            f"a {color} item on top",
            f"the {color} one on top",
            f"a {color} one on top",
            f"{color} one on top",
            f"the {color} one is on top",
        ),
    )
    noun = pick(rng, ("items", "items", "blocks"))
    if rng.random() < 0.25:
        words, test = pick(
            rng,
            (
                (f"a {color} item on top", _test_end("top", color)),
                (f"{write_number(n, rng)} items", lambda tower: len(tower) == n),
                (
                    f"all 3 colors and a {color} item on top",
                    lambda tower: len({b.color for b in tower}) == 3 and tower[-1].color == color,
                ),
            ),
        )
    elif rng.random() < 0.4:
        form, words, test = sample_box_condition(rng)
        while form not in ("colours", "only", "number"):
            form, words, test = sample_box_condition(rng)
    else:
        words, test = (
            f"{write_number(n, rng)} {noun} and {top}",
            lambda tower: len(tower) == n and tower[-1].color == color,
        )
    chosen = test
    return Sentence(
        form="tower as box",
        text=say_there_is(quantity, f"{inflect_noun('box', quantity.singular)} with {words}"),
        truth=lambda panel: quantity.judge([chosen(tower) for tower in panel.boxes]),
    )


def say_one_colour_tower(rng: np.random.Generator) -> Sentence:
    """How many towers are of one colour."""
    color = pick(rng, tuple(COLOURS))
    n = int(rng.integers(1, 4))
    with_number = rng.random() < 0.5
    quantity = sample_quantity(rng, 2, ("a", "a", "exactly", "no"))
    rest = f" with only {write_number(n, rng)} {inflect_noun('block', n == 1)}" if with_number else ""

    def test(tower: Box) -> Truth:
        return all(b.color == color for b in tower) and (not with_number or len(tower) == n)

    return Sentence(
        form="one colour tower",
        text=say_there_is(quantity, f"{color} {inflect_noun('tower', quantity.singular)}{rest}"),
        truth=lambda panel: quantity.judge([test(tower) for tower in panel.boxes]),
    )


def say_high_tower(rng: np.random.Generator) -> Sentence:
    """That a tower of so many blocks is like this."""
    n = int(rng.integers(1, TALLEST + 1))
    form, words, test = _sample_tower_condition(rng)
    while "number" in form:
        form, words, test = _sample_tower_condition(rng)
    block = pick(rng, ("block", inflect_noun("block", n == 1)))
    link = pick(rng, ("that has", "which has", "with"))
    return Sentence(
        form="high tower",
        text=f"There is a {write_number(n, rng)} {block} tower {link} {words}",
        truth=lambda panel: any_true([both_true(len(tower) == n, test(tower)) for tower in panel.boxes]),
    )


def say_touching_stack(rng: np.random.Generator) -> Sentence:
    """That a block touches the base, with another on top of it."""
    one, two = pick(rng, tuple(COLOURS)), pick(rng, tuple(COLOURS))
    wall = pick(rng, ("wall", "base", "edge"))
    more = pick(rng, (" with a {} square right on top of it", " with a {} square on top of it", ""))

    def test(tower: Box) -> Truth:
        return tower[0].color == one and (not more or (len(tower) > 1 and tower[1].color == two))

    noun = pick(rng, ("square", "square", "item"))
    return Sentence(
        form="touching stack",
        text=f"There is a {one} {noun} touching the {wall}{more.format(two)}",
        truth=lambda panel: any(test(tower) for tower in panel.boxes),
    )
