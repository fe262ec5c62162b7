"""Sentences about the boxes of a panel of scattered items, and what a box may hold."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from visling.scenes.panels.items import Kind, count_in_box, sample_contact, sample_kind, sample_two_kinds
from visling.scenes.panels.logic import (
    BoxTest,
    Quantity,
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
from visling.scenes.panels.panel import COLOURS, SHAPES, Box, Panel, Piece
from visling.scenes.world import pick, shuffled


def sample_box_condition(rng: np.random.Generator) -> tuple[str, str, BoxTest]:
    """What a box holds: form, words that follow "with", and the test."""
    form = pick(
        rng,
        (
            "holds",
            "holds",
            "two kinds",
            "two kinds",
            "without",
            "number",
            "number and one",
            "touching",
            "only",
            "colours",
            "shape",
            "above",
            "three kinds",
            "all of a kind",
            "number and colours",
            "colours and one",
        ),
    )
    if form == "holds":
        kind, quantity = (
            sample_kind(rng, plain_rate=0.0),
            sample_quantity(rng, 3, ("a", "bare", "exactly", "at least", "only")),
        )
        return form, f"{quantity.words} {kind.words(quantity.singular)}", count_in_box(quantity, kind.test)
    if form in ("two kinds", "without"):
        first, second = sample_two_kinds(rng)
        one = sample_quantity(rng, 2, ("a", "a", "bare", "exactly", "at least"))
        two = sample_quantity(rng, 3, ("no",) if form == "without" else ("a", "bare", "exactly", "at least"))
        words = f"{one.words} {first.words(one.singular)} and {two.words} {second.words(two.singular)}"
        return (
            form,
            words,
            lambda box: both_true(one.judge([first.test(p) for p in box]), two.judge([second.test(p) for p in box])),
        )
    if form == "number":
        quantity = sample_quantity(rng, 7, ("bare", "exactly", "exactly", "at least", "at most", "more than"))
        return (
            form,
            f"{quantity.words} {inflect_noun(pick(rng, ('item', 'object')), quantity.singular)}",
            lambda box: quantity.holds(len(box)),
        )
    if form == "number and one":
        quantity, kind = sample_quantity(rng, 6, ("bare", "exactly", "exactly")), sample_kind(rng, plain_rate=0.0)
        noun = inflect_noun(pick(rng, ("item", "object")), quantity.singular)
        link = "which is" if quantity.singular else "one of which is"
        return (
            form,
            f"{quantity.words} {noun} {link} a {kind.words(True)}",
            lambda box: both_true(quantity.holds(len(box)), any(kind.test(p) for p in box)),
        )
    if form == "touching":
        kind, quantity = sample_kind(rng), sample_quantity(rng, 2, ("a", "a", "bare", "at least", "exactly"))
        words, touches = sample_contact(rng)
        words = re.sub(r" of a box|box ", "", words)
        return (
            form,
            f"{quantity.words} {kind.words(quantity.singular)} {words}",
            lambda box: quantity.judge([both_true(kind.test(p), touches(p)) for p in box]),
        )
    if form == "only":
        colours = shuffled(rng, tuple(COLOURS))[: int(rng.integers(1, 3))]
        named = " and ".join(colours)
        noun = pick(rng, ("items", "items", "objects"))
        words = pick(rng, (f"only {named} {noun}", f"{noun} of only {named} color"))
        return (
            form,
            words,
            lambda box: common_truth({p.color for p in box} == set(colours), {p.color for p in box} <= set(colours)),
        )
    if form == "colours":
        n = int(rng.integers(1, 4))
        texts = {
            1: ("items of only one color", "only one color", "items of the same color"),
            2: ("items of 2 different colors", "exactly two colors", "items of only two colors"),
            3: ("items of all 3 different colors", "all 3 colors", "items of all three colors"),
        }
        return form, pick(rng, texts[n]), lambda box: None if len(box) < 2 else len({p.color for p in box}) == n
    if form in ("shape", "all of a kind"):
        name = pick(rng, SHAPES)
        if form == "shape":
            return form, f"only {name}s", lambda box: None if len(box) < 2 else all(p.shape == name for p in box)
        words = pick(rng, ("items of the same shape", "all items of the same shape", "only one type of shape"))
        return form, words, lambda box: None if len(box) < 2 else len({p.shape for p in box}) == 1
    if form == "number and colours":
        n, colours = int(rng.integers(2, 7)), shuffled(rng, tuple(COLOURS))[:2]
        both = " and ".join(colours)
        if rng.random() < 0.4 and n >= 3:
            return (
                form,
                f"{write_number(n, rng)} items of all 3 different colors",
                lambda box: len(box) == n and len({p.color for p in box}) == 3,
            )
        words = pick(
            rng,
            (
                f"{write_number(n, rng)} items of only {both} color",
                f"only {write_number(n, rng)} items of {both} color",
            ),
        )
        return form, words, lambda box: len(box) == n and {p.color for p in box} == set(colours)
    if form == "colours and one":
        n, kind = int(rng.integers(2, 4)), sample_kind(rng, plain_rate=0.0)
        words = pick(
            rng,
            (
                f"items of {write_number(n, rng)} different colors and a {kind.words(True)}",
                f"{write_number(n, rng)} colors and a {kind.words(True)}",
            ),
        )
        return form, words, lambda box: len({p.color for p in box}) == n and any(kind.test(p) for p in box)
    if form == "three kinds":
        kinds = [sample_kind(rng, plain_rate=0.0) for _ in range(3)]
        words = f"a {kinds[0].words(True)}, a {kinds[1].words(True)} and a {kinds[2].words(True)}"
        return form, words, lambda box: _match_distinct(kinds, box)
    upper, lower = sample_two_kinds(rng)
    up = rng.random() < 0.6
    relation = pick(rng, ("above", "over")) if up else pick(rng, ("below", "under"))
    words = f"a {upper.words(True)} {relation} a {lower.words(True)}"

    def above(box: Box) -> Truth:
        high, low = (upper, lower) if up else (lower, upper)
        pairs = [_judge_above(a, b) for a in box for b in box if a is not b and high.test(a) and low.test(b)]
        return any_true(pairs)

    return form, words, above


def _match_distinct(kinds: Sequence[Kind], box: Box) -> bool:
    """Whether the box holds a different item for each kind."""
    if not kinds:
        return True
    return any(kinds[0].test(p) and _match_distinct(kinds[1:], tuple(q for q in box if q is not p)) for p in box)


def _judge_above(first: Piece, second: Piece) -> Truth:
    """Whether one item is above another: true if it ends before the other begins and they share a column, false if its
    middle is not higher."""
    if first.y + first.size / 2 >= second.y + second.size / 2:
        return False
    columns = min(first.x + first.size, second.x + second.size) - max(first.x, second.x)
    return True if first.y + first.size <= second.y and columns > 0 else None


def say_box_with(rng: np.random.Generator) -> Sentence:
    """How many boxes hold something."""
    form, words, test = sample_box_condition(rng)
    quantity = sample_quantity(rng, 2, ("a", "a", "a", "a", "a", "bare", "exactly", "at least", "no"))
    noun = pick(rng, ("box", "box", "box", "box", "grey box", "grey square"))
    noun = (
        noun.replace("box", inflect_noun("box", quantity.singular))
        if "box" in noun
        else inflect_noun(noun, quantity.singular)
    )
    return Sentence(
        form=f"box {form}",
        text=say_there_is(quantity, f"{noun} with {words}"),
        truth=lambda panel: quantity.judge([test(box) for box in panel.boxes]),
    )


def say_one_box_has(rng: np.random.Generator) -> Sentence:
    """That exactly one box, or two, hold something."""
    form, words, test = sample_box_condition(rng)
    lead, number = pick(
        rng,
        (
            ("One of the grey box has", 1),
            ("One of the grey square contains", 1),
            ("One of the grey square has", 1),
            ("One box has", 1),
            ("One of the boxes contains", 1),
            ("Two of the boxes have", 2),
            ("Two boxes have", 2),
            ("Exactly one box has", 1),
        ),
    )

    def truth(panel: Panel) -> Truth:
        exactly = Quantity(words="", singular=True, holds=lambda n: n == number)
        return exactly.judge([test(box) for box in panel.boxes])

    return Sentence(form=f"box {form}", text=f"{lead} {words}", truth=truth)


def say_every_box(rng: np.random.Generator) -> Sentence:
    """That every box holds items of a sort."""
    kind = sample_kind(rng, plain_rate=0.0, size_rate=0.05)
    quantity = sample_quantity(rng, 2, ("a", "exactly", "at least", "at least", "bare"))
    words, touches = sample_contact(rng) if rng.random() < 0.35 else ("", None)
    words = re.sub(r" of a box|box ", "", words)
    said = f"{quantity.words} {kind.words(quantity.singular)} {words}".strip()
    box = pick(rng, ("box", "box", "grey box", "grey square"))
    verb = pick(rng, ("contains", "has", "has"))
    text = pick(
        rng,
        (
            f"Each {box} {verb} {said}",
            f"Every {box} {verb} {said}",
            f"All boxes have {said}",
            f"There {'is' if quantity.singular else 'are'} {said} in each {box}",
            f"There {'is' if quantity.singular else 'are'} {said} in every {box}",
        ),
    )

    def truth(panel: Panel) -> Truth:
        return all_true(
            [quantity.judge([both_true(kind.test(p), touches(p) if touches else True) for p in b]) for b in panel.boxes]
        )

    return Sentence(form="every box", text=text, truth=truth)
