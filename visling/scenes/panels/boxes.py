"""Sentences about boxes of a panel."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from visling.scenes.panels.items import Kind, draw_kind, draw_place, in_box, there_is, two_kinds
from visling.scenes.panels.logic import (
    OnBox,
    Quantity,
    Sentence,
    Truth,
    agreed,
    conjoin,
    draw_quantity,
    exists,
    inflect,
    numeral,
)
from visling.scenes.panels.panel import COLOURS, SHAPES, Box, Panel, Piece
from visling.scenes.world import pick, shuffled

# --- boxes ---


def box_condition(rng: np.random.Generator) -> tuple[str, str, OnBox]:
    """What a box holds: form, words after "with" and test."""
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
            draw_kind(rng, plain_rate=0.0),
            draw_quantity(rng, 3, ("a", "bare", "exactly", "at least", "only")),
        )
        return form, f"{quantity.words} {kind.said(quantity.single)}", in_box(quantity, kind.test)
    if form in ("two kinds", "without"):
        first, second = two_kinds(rng)
        one = draw_quantity(rng, 2, ("a", "a", "bare", "exactly", "at least"))
        two = draw_quantity(rng, 3, ("no",) if form == "without" else ("a", "bare", "exactly", "at least"))
        words = f"{one.words} {first.said(one.single)} and {two.words} {second.said(two.single)}"
        return (
            form,
            words,
            lambda box: conjoin(one.over([first.test(p) for p in box]), two.over([second.test(p) for p in box])),
        )
    if form == "number":
        quantity = draw_quantity(rng, 7, ("bare", "exactly", "exactly", "at least", "at most", "more than"))
        return (
            form,
            f"{quantity.words} {inflect(pick(rng, ('item', 'object')), quantity.single)}",
            lambda box: quantity.holds(len(box)),
        )
    if form == "number and one":
        quantity, kind = draw_quantity(rng, 6, ("bare", "exactly", "exactly")), draw_kind(rng, plain_rate=0.0)
        noun = inflect(pick(rng, ("item", "object")), quantity.single)
        link = "which is" if quantity.single else "one of which is"
        return (
            form,
            f"{quantity.words} {noun} {link} a {kind.said(True)}",
            lambda box: conjoin(quantity.holds(len(box)), any(kind.test(p) for p in box)),
        )
    if form == "touching":
        kind, quantity = draw_kind(rng), draw_quantity(rng, 2, ("a", "a", "bare", "at least", "exactly"))
        words, place = draw_place(rng)
        words = re.sub(r" of a box|box ", "", words)
        return (
            form,
            f"{quantity.words} {kind.said(quantity.single)} {words}",
            lambda box: quantity.over([conjoin(kind.test(p), place(p)) for p in box]),
        )
    if form == "only":
        colours = shuffled(rng, tuple(COLOURS))[: int(rng.integers(1, 3))]
        named = " and ".join(colours)
        noun = pick(rng, ("items", "items", "objects"))
        words = pick(rng, (f"only {named} {noun}", f"{noun} of only {named} color"))
        return (
            form,
            words,
            lambda box: agreed({p.color for p in box} == set(colours), {p.color for p in box} <= set(colours)),
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
                f"{numeral(n, rng)} items of all 3 different colors",
                lambda box: len(box) == n and len({p.color for p in box}) == 3,
            )
        words = pick(
            rng, (f"{numeral(n, rng)} items of only {both} color", f"only {numeral(n, rng)} items of {both} color")
        )
        return form, words, lambda box: len(box) == n and {p.color for p in box} == set(colours)
    if form == "colours and one":
        n, kind = int(rng.integers(2, 4)), draw_kind(rng, plain_rate=0.0)
        words = pick(
            rng,
            (
                f"items of {numeral(n, rng)} different colors and a {kind.said(True)}",
                f"{numeral(n, rng)} colors and a {kind.said(True)}",
            ),
        )
        return form, words, lambda box: len({p.color for p in box}) == n and any(kind.test(p) for p in box)
    if form == "three kinds":
        kinds = [draw_kind(rng, plain_rate=0.0) for _ in range(3)]
        words = f"a {kinds[0].said(True)}, a {kinds[1].said(True)} and a {kinds[2].said(True)}"
        return form, words, lambda box: _distinct(kinds, box)
    upper, lower = two_kinds(rng)
    up = rng.random() < 0.6
    words = f"a {upper.said(True)} {pick(rng, ('above', 'over')) if up else pick(rng, ('below', 'under'))} a {lower.said(True)}"

    def above(box: Box) -> Truth:
        high, low = (upper, lower) if up else (lower, upper)
        pairs = [_is_above(a, b) for a in box for b in box if a is not b and high.test(a) and low.test(b)]
        return exists(pairs)

    return form, words, above


def _distinct(kinds: Sequence[Kind], box: Box) -> bool:
    """Whether different items can be found for all kinds."""
    if not kinds:
        return True
    return any(kinds[0].test(p) and _distinct(kinds[1:], tuple(q for q in box if q is not p)) for p in box)


def _is_above(first: Piece, second: Piece) -> Truth:
    """Plainly above: ends before the other begins and they share some columns; plainly not: its middle is not
    higher."""
    if first.y + first.size / 2 >= second.y + second.size / 2:
        return False
    columns = min(first.x + first.size, second.x + second.size) - max(first.x, second.x)
    return True if first.y + first.size <= second.y and columns > 0 else None


def box_with(rng: np.random.Generator) -> Sentence:
    form, words, test = box_condition(rng)
    quantity = draw_quantity(rng, 2, ("a", "a", "a", "a", "a", "bare", "exactly", "at least", "no"))
    noun = pick(rng, ("box", "box", "box", "box", "grey box", "grey square"))
    noun = noun.replace("box", inflect("box", quantity.single)) if "box" in noun else inflect(noun, quantity.single)
    return Sentence(
        form=f"box {form}",
        text=there_is(quantity, f"{noun} with {words}"),
        truth=lambda panel: quantity.over([test(box) for box in panel.boxes]),
    )


def one_box_has(rng: np.random.Generator) -> Sentence:
    form, words, test = box_condition(rng)
    lead, quantity = pick(
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
        bare = Quantity(words="", single=True, holds=lambda n: n == quantity)
        return bare.over([test(box) for box in panel.boxes])

    return Sentence(form=f"box {form}", text=f"{lead} {words}", truth=truth)


def every_box(rng: np.random.Generator) -> Sentence:
    kind = draw_kind(rng, plain_rate=0.0, size_rate=0.05)
    quantity = draw_quantity(rng, 2, ("a", "exactly", "at least", "at least", "bare"))
    words, place = draw_place(rng) if rng.random() < 0.35 else ("", None)
    words = re.sub(r" of a box|box ", "", words)
    said = f"{quantity.words} {kind.said(quantity.single)} {words}".strip()
    box = pick(rng, ("box", "box", "grey box", "grey square"))
    verb = pick(rng, ("contains", "has", "has"))
    text = pick(
        rng,
        (
            f"Each {box} {verb} {said}",
            f"Every {box} {verb} {said}",
            f"All boxes have {said}",
            f"There {'is' if quantity.single else 'are'} {said} in each {box}",
            f"There {'is' if quantity.single else 'are'} {said} in every {box}",
        ),
    )

    def truth(panel: Panel) -> Truth:
        found = [
            quantity.over([conjoin(kind.test(p), place(p) if place else True) for p in box_]) for box_ in panel.boxes
        ]
        return False if False in found else None if None in found else True

    return Sentence(form="every box", text=text, truth=truth)
