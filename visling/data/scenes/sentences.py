"""Sentences about panels, built from conditions and quantifiers, each with the function that says whether it is true of a panel.

The constructions and words are those that occur in NLVR's development sentences, and so are the readings:
"two towers" are exactly two, "over" is directly over.
A condition is true, false or, where readers would disagree (an item one pixel from the edge, a block above another with one between), None;
a sentence is only used for panels on which it is plainly true or false.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from visling.data.scenes.panels import COLOURS, SHAPES, SIZES, TALLEST, Box, Panel, Piece
from visling.data.scenes.world import pick, shuffled

Truth = bool | None
OnPiece = Callable[[Piece], Truth]
OnBox = Callable[[Box], Truth]

APART = 2
"""An item touches a side when no pixel lies between, and does not from this many on; with one pixel between nothing is said."""

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven")


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A sentence and its truth on a panel (None: open to dispute)."""

    form: str
    text: str
    truth: Callable[[Panel], Truth]


Maker = Callable[[np.random.Generator], Sentence]


def sample_sentences(rng: np.random.Generator, towers: bool, num_boxes: int, tries: int = 60) -> Iterator[Sentence]:
    """Random sentences of one random form for panels of towers or of scattered items, with the slips of human writers.

    The caller takes the first that suits its panels; as all have one form, forms that seldom suit are not crowded out by others.
    """
    maker = pick(rng, _TOWER_FORMS if towers else _SCATTER_FORMS)
    form = ""
    for _ in range(tries):
        sentence = maker(rng)
        form = form or sentence.form
        if sentence.form == form:
            yield Sentence(form=form, text=_as_people_write(_for_boxes(sentence.text, num_boxes), rng), truth=sentence.truth)


# --- three-valued logic ---


def _both(first: Truth, second: Truth) -> Truth:
    if first is False or second is False:
        return False
    return None if first is None or second is None else True


def _negated(truth: Truth) -> Truth:
    return None if truth is None else not truth


def _agreed(*truths: Truth) -> Truth:
    """The common truth of several readings."""
    return truths[0] if all(truth is truths[0] for truth in truths) else None


def _exists(truths: Sequence[Truth]) -> Truth:
    """Whether any is true."""
    return True if True in truths else None if None in truths else False


@dataclass(frozen=True, kw_only=True)
class _Quantity:
    """How many: its words before a noun, whether that noun is singular, and whether a number satisfies it."""

    words: str
    single: bool
    holds: Callable[[int], Truth]

    def over(self, truths: Sequence[Truth]) -> Truth:
        """Truth over things of which some are open to dispute."""
        sure = sum(truth is True for truth in truths)
        open_ones = sum(truth is None for truth in truths)
        return _agreed(*(self.holds(sure + k) for k in range(open_ones + 1)))


def _numeral(number: int, rng: np.random.Generator) -> str:
    return str(number) if rng.random() < 0.4 else _WORDS[number]


def _quantity(
    rng: np.random.Generator, most: int, kinds: Sequence[str] = ("a", "bare", "exactly", "at least", "at most", "only", "more than", "no")
) -> _Quantity:
    """A random quantity of at most `most`."""
    kind = pick(rng, kinds)
    n = int(rng.integers(1, most + 1))
    word = _numeral(n, rng)
    if kind == "a":
        return _Quantity(words="a", single=True, holds=lambda found: found >= 1)
    if kind == "no":
        return _Quantity(words="no", single=True, holds=lambda found: found == 0)
    if kind == "bare":
        # "there are two towers" is false of three: all of the twelve development labels that tell.
        return _Quantity(words=word, single=n == 1, holds=lambda found: found == n)
    if kind == "exactly":
        return _Quantity(words=f"{pick(rng, ('exactly', 'exactly', 'only'))} {word}", single=n == 1, holds=lambda found: found == n)
    if kind == "at least":
        return _Quantity(words=f"{pick(rng, ('at least', 'at least', 'atleast'))} {word}", single=n == 1, holds=lambda found: found >= n)
    if kind == "at most":
        return _Quantity(words=f"at most {word}", single=n == 1, holds=lambda found: found <= n)
    if kind == "more than":
        return _Quantity(words=f"more than {_numeral(max(1, n - 1), rng)}", single=n <= 2, holds=lambda found: found > max(1, n - 1))
    return _Quantity(words=f"only {word}", single=n == 1, holds=lambda found: found == n)


def _noun(word: str, single: bool) -> str:
    return word if single else "boxes" if word == "box" else word + "s"


# --- items ---


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A sort of item: adjectives, noun, test."""

    adjectives: str
    noun: str
    test: Callable[[Piece], bool]

    def said(self, single: bool) -> str:
        """Its words."""
        return f"{self.adjectives} {_noun(self.noun, single)}".strip()


def _kind(rng: np.random.Generator, *, plain_rate: float = 0.1, size_rate: float = 0.12, noun: str = "") -> _Kind:
    """A random sort of item: mostly a colour, a shape or both."""
    draw = rng.random()
    color = pick(rng, tuple(COLOURS)) if draw > plain_rate else ""
    colours: tuple[str, ...]
    shape = pick(rng, SHAPES) if rng.random() < 0.6 and not noun else ""
    size = pick(rng, tuple(SIZES)) if rng.random() < size_rate else ""
    if color and rng.random() < 0.05:
        other = pick(rng, [c for c in COLOURS if c != color])
        adjectives, colours = f"{color} or {other}", (color, other)
    else:
        adjectives, colours = color, ((color,) if color else tuple(COLOURS))
    word = pick(rng, ("big", "large")) if size == "large" else size
    return _Kind(
        adjectives=f"{word} {adjectives}".strip(),
        noun=noun or shape or pick(rng, ("item", "item", "object")),
        test=lambda piece: piece.color in colours and (not shape or piece.shape == shape) and (not size or piece.size == SIZES[size]),
    )


def _two_kinds(rng: np.random.Generator) -> tuple[_Kind, _Kind]:
    """Two sorts of items with different words."""
    first, second = _kind(rng, plain_rate=0.0), _kind(rng, plain_rate=0.0)
    while second.said(True) == first.said(True):
        second = _kind(rng, plain_rate=0.0)
    return first, second


def _touches(piece: Piece, sides: Sequence[str]) -> Truth:
    gap = min(piece.edges[side] for side in sides)
    return True if gap == 0 else False if gap >= APART else None


def _in_corner(piece: Piece) -> Truth:
    return _both(_touches(piece, ("left", "right")), _touches(piece, ("top", "bottom")))


def _place(rng: np.random.Generator) -> tuple[str, OnPiece]:
    """Where an item touches its box: words after the noun, test."""
    draw = rng.random()
    closely = "closely " if rng.random() < 0.25 else ""
    if draw < 0.42:
        wall = pick(rng, ("the wall", "the edge", "the edge", "an edge", "the side", "a wall"))
        return f"{closely}touching {wall}", lambda piece: _touches(piece, ("left", "right", "top", "bottom"))
    if draw < 0.62:
        return f"not touching {pick(rng, ('any edge', 'any edge', 'the edge', 'the wall'))}", lambda piece: _negated(
            _touches(piece, ("left", "right", "top", "bottom"))
        )
    if draw < 0.78:
        base = pick(rng, ("the base", "the bottom", "the bottom of a box", "the bottom edge"))
        return f"{closely}touching {base}", lambda piece: _touches(piece, ("bottom",))
    if draw < 0.9:
        corner = pick(rng, ("a corner", "the corner", "a box corner", "a corner of a box"))
        return f"{closely}touching {corner}", _in_corner
    side = pick(rng, ("right", "right", "left", "top"))
    wall = pick(rng, (f"{side} wall of a box", f"the {side} wall", f"the {side} edge"))
    return f"{closely}touching {wall}", lambda piece: _touches(piece, (side,))


def _in_box(quantity: _Quantity, test: OnPiece) -> OnBox:
    return lambda box: quantity.over([test(piece) for piece in box])


def _pieces(panel: Panel) -> list[Piece]:
    return [piece for box in panel.boxes for piece in box]


def _there(quantity: _Quantity, rest: str) -> str:
    return f"There {'is' if quantity.single else 'are'} {quantity.words} {rest}"


def _items(rng: np.random.Generator) -> Sentence:
    kind, quantity = _kind(rng, plain_rate=0.0), _quantity(rng, 5)
    return Sentence(
        form="items", text=_there(quantity, kind.said(quantity.single)), truth=lambda panel: quantity.over([kind.test(p) for p in _pieces(panel)])
    )


def _items_touching(rng: np.random.Generator) -> Sentence:
    kind, quantity = _kind(rng), _quantity(rng, 3)
    words, place = _place(rng)
    return Sentence(
        form="items touching",
        text=_there(quantity, f"{kind.said(quantity.single)} {words}"),
        truth=lambda panel: quantity.over([_both(kind.test(p), place(p)) for p in _pieces(panel)]),
    )


def _not_coloured(rng: np.random.Generator) -> Sentence:
    color, shape = pick(rng, tuple(COLOURS)), pick(rng, SHAPES)
    words, place = _place(rng)
    return Sentence(
        form="not coloured",
        text=f"There is a {shape} {words} that is not {color}",
        truth=lambda panel: _exists([_both(p.shape == shape and p.color != color, place(p)) for p in _pieces(panel)]),
    )


def _two_touching(rng: np.random.Generator) -> Sentence:
    colours, n, m = shuffled(rng, tuple(COLOURS)), int(rng.integers(1, 4)), int(rng.integers(1, 4))
    wall = pick(rng, ("the wall", "the edge"))

    def truth(panel: Panel) -> Truth:
        touching = [(p.color, _touches(p, ("left", "right", "top", "bottom"))) for p in _pieces(panel)]
        if any(touches is None for _, touches in touching):
            return None
        return [sum(bool(touches) for color, touches in touching if color == c) for c in colours] == [n, m, 0]

    text = f"Only {_numeral(n, rng)} {colours[0]} and {_numeral(m, rng)} {colours[1]} {_noun('item', m == 1)} are touching {wall}"
    return Sentence(form="two touching", text=text, truth=truth)


def _all_touching(rng: np.random.Generator) -> Sentence:
    kind = _kind(rng, plain_rate=0.0)
    words, place = _place(rng)
    lead, wanted = pick(rng, (("All the ", True), ("All ", True), ("", True), ("None of the ", False)))

    def truth(panel: Panel) -> Truth:
        found = [place(p) if wanted else _negated(place(p)) for p in _pieces(panel) if kind.test(p)]
        if len(found) < 2:
            return None
        return False if False in found else None if None in found else True

    return Sentence(form="all touching", text=f"{lead}{kind.said(False)} are {words}", truth=truth)


def _same_box(rng: np.random.Generator) -> Sentence:
    kind = _kind(rng, plain_rate=0.0)

    def truth(panel: Panel) -> Truth:
        number = [sum(kind.test(p) for p in box) for box in panel.boxes]
        return None if sum(number) < 2 else sum(n > 0 for n in number) == 1

    return Sentence(
        form="same box", text=f"{pick(rng, ('All', 'All the'))} {kind.said(False)} are in {pick(rng, ('the same', 'one'))} box", truth=truth
    )


def _colours_touching(rng: np.random.Generator) -> Sentence:
    n = int(rng.integers(1, 4))

    def truth(panel: Panel) -> Truth:
        sides = ("left", "right", "top", "bottom")
        sure = {p.color for p in _pieces(panel) if _touches(p, sides)}
        most = {p.color for p in _pieces(panel) if _touches(p, sides) is not False}
        return (len(sure) == n) if sure == most else None

    wall = pick(rng, ("the wall", "the edge"))
    lead = {1: "There is only one color", 2: "There are only 2 colors", 3: "All 3 different colors are"}[n]
    return Sentence(form="colours touching", text=f"{lead} touching {wall}", truth=truth)


# --- boxes ---


def _box_condition(rng: np.random.Generator) -> tuple[str, str, OnBox]:
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
        kind, quantity = _kind(rng, plain_rate=0.0), _quantity(rng, 3, ("a", "bare", "exactly", "at least", "only"))
        return form, f"{quantity.words} {kind.said(quantity.single)}", _in_box(quantity, kind.test)
    if form in ("two kinds", "without"):
        first, second = _two_kinds(rng)
        one = _quantity(rng, 2, ("a", "a", "bare", "exactly", "at least"))
        two = _quantity(rng, 3, ("no",) if form == "without" else ("a", "bare", "exactly", "at least"))
        words = f"{one.words} {first.said(one.single)} and {two.words} {second.said(two.single)}"
        return form, words, lambda box: _both(one.over([first.test(p) for p in box]), two.over([second.test(p) for p in box]))
    if form == "number":
        quantity = _quantity(rng, 7, ("bare", "exactly", "exactly", "at least", "at most", "more than"))
        return form, f"{quantity.words} {_noun(pick(rng, ('item', 'object')), quantity.single)}", lambda box: quantity.holds(len(box))
    if form == "number and one":
        quantity, kind = _quantity(rng, 6, ("bare", "exactly", "exactly")), _kind(rng, plain_rate=0.0)
        noun = _noun(pick(rng, ("item", "object")), quantity.single)
        link = "which is" if quantity.single else "one of which is"
        return (
            form,
            f"{quantity.words} {noun} {link} a {kind.said(True)}",
            lambda box: _both(quantity.holds(len(box)), any(kind.test(p) for p in box)),
        )
    if form == "touching":
        kind, quantity = _kind(rng), _quantity(rng, 2, ("a", "a", "bare", "at least", "exactly"))
        words, place = _place(rng)
        words = re.sub(r" of a box|box ", "", words)
        return form, f"{quantity.words} {kind.said(quantity.single)} {words}", lambda box: quantity.over([_both(kind.test(p), place(p)) for p in box])
    if form == "only":
        colours = shuffled(rng, tuple(COLOURS))[: int(rng.integers(1, 3))]
        both = " and ".join(colours)
        noun = pick(rng, ("items", "items", "objects"))
        words = pick(rng, (f"only {both} {noun}", f"{noun} of only {both} color"))
        return form, words, lambda box: _agreed({p.color for p in box} == set(colours), {p.color for p in box} <= set(colours))
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
            return form, f"{_numeral(n, rng)} items of all 3 different colors", lambda box: len(box) == n and len({p.color for p in box}) == 3
        words = pick(rng, (f"{_numeral(n, rng)} items of only {both} color", f"only {_numeral(n, rng)} items of {both} color"))
        return form, words, lambda box: len(box) == n and {p.color for p in box} == set(colours)
    if form == "colours and one":
        n, kind = int(rng.integers(2, 4)), _kind(rng, plain_rate=0.0)
        words = pick(
            rng, (f"items of {_numeral(n, rng)} different colors and a {kind.said(True)}", f"{_numeral(n, rng)} colors and a {kind.said(True)}")
        )
        return form, words, lambda box: len({p.color for p in box}) == n and any(kind.test(p) for p in box)
    if form == "three kinds":
        kinds = [_kind(rng, plain_rate=0.0) for _ in range(3)]
        words = f"a {kinds[0].said(True)}, a {kinds[1].said(True)} and a {kinds[2].said(True)}"
        return form, words, lambda box: _distinct(kinds, box)
    upper, lower = _two_kinds(rng)
    up = rng.random() < 0.6
    words = f"a {upper.said(True)} {pick(rng, ('above', 'over')) if up else pick(rng, ('below', 'under'))} a {lower.said(True)}"

    def above(box: Box) -> Truth:
        high, low = (upper, lower) if up else (lower, upper)
        pairs = [_is_above(a, b) for a in box for b in box if a is not b and high.test(a) and low.test(b)]
        return _exists(pairs)

    return form, words, above


def _distinct(kinds: Sequence[_Kind], box: Box) -> bool:
    """Whether different items can be found for all kinds."""
    if not kinds:
        return True
    return any(kinds[0].test(p) and _distinct(kinds[1:], tuple(q for q in box if q is not p)) for p in box)


def _is_above(first: Piece, second: Piece) -> Truth:
    """Plainly above: ends before the other begins and they share some columns; plainly not: its middle is not higher."""
    if first.y + first.size / 2 >= second.y + second.size / 2:
        return False
    columns = min(first.x + first.size, second.x + second.size) - max(first.x, second.x)
    return True if first.y + first.size <= second.y and columns > 0 else None


def _box_with(rng: np.random.Generator) -> Sentence:
    form, words, test = _box_condition(rng)
    quantity = _quantity(rng, 2, ("a", "a", "a", "a", "a", "bare", "exactly", "at least", "no"))
    noun = pick(rng, ("box", "box", "box", "box", "grey box", "grey square"))
    noun = noun.replace("box", _noun("box", quantity.single)) if "box" in noun else _noun(noun, quantity.single)
    return Sentence(
        form=f"box {form}", text=_there(quantity, f"{noun} with {words}"), truth=lambda panel: quantity.over([test(box) for box in panel.boxes])
    )


def _one_box_has(rng: np.random.Generator) -> Sentence:
    form, words, test = _box_condition(rng)
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
        bare = _Quantity(words="", single=True, holds=lambda n: n == quantity)
        return bare.over([test(box) for box in panel.boxes])

    return Sentence(form=f"box {form}", text=f"{lead} {words}", truth=truth)


def _every_box(rng: np.random.Generator) -> Sentence:
    kind = _kind(rng, plain_rate=0.0, size_rate=0.05)
    quantity = _quantity(rng, 2, ("a", "exactly", "at least", "at least", "bare"))
    words, place = _place(rng) if rng.random() < 0.35 else ("", None)
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
        found = [quantity.over([_both(kind.test(p), place(p) if place else True) for p in box_]) for box_ in panel.boxes]
        return False if False in found else None if None in found else True

    return Sentence(form="every box", text=text, truth=truth)


# --- towers ---


def _at(end: str, color: str) -> OnBox:
    return lambda tower: tower[0 if end == "base" else -1].color == color


def _base_word(end: str, rng: np.random.Generator) -> str:
    return pick(rng, ("base", "base", "bottom")) if end == "base" else "top"


def _stacked(tower: Box, upper: str, lower: str, words: str) -> Truth:
    """Whether a block of one colour stands over one of another: directly, except that "above" is open to dispute with others between."""
    colours = [block.color for block in tower]
    direct = any(a == lower and b == upper for a, b in itertools.pairwise(colours))
    anywhere = any(colours[i] == lower and colours[j] == upper for i in range(len(colours)) for j in range(i + 1, len(colours)))
    return _agreed(direct, anywhere) if words == "above" else direct


def _number_condition(rng: np.random.Generator) -> tuple[str, str, OnBox]:
    quantity = _quantity(rng, TALLEST, ("bare", "bare", "exactly", "exactly", "at least", "only", "more than"))
    noun = pick(rng, ("block", "block", "block", "item", "object"))
    return "number", f"{quantity.words} {_noun(noun, quantity.single)}", lambda tower: quantity.holds(len(tower))


def _end_condition(rng: np.random.Generator) -> tuple[str, str, OnBox]:
    color, end = pick(rng, tuple(COLOURS)), pick(rng, ("base", "top"))
    place = _base_word(end, rng)
    a = pick(rng, ("a", "a", "a", "1", "one"))
    the = "the " if rng.random() < 0.85 else ""
    return f"{end}", f"{a} {color} block at {the}{place}", _at(end, color)


def _tower_condition(rng: np.random.Generator) -> tuple[str, str, OnBox]:
    """What a tower is like: form, words after "with" and test."""
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
        return _number_condition(rng)
    if form == "end":
        return _end_condition(rng)
    if form == "over":
        words = pick(rng, ("over", "over", "above", "above", "on", "on top of"))
        return form, f"a {one} block {words} a {two} block", lambda tower: _stacked(tower, one, two, words)
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
        quantity = _quantity(rng, 3, ("bare", "bare", "exactly", "at least", "only", "a"))
        if quantity.words.startswith("only"):
            # "only two blue blocks": nothing else, or two blue ones among others?
            return (
                form,
                f"{quantity.words} {one} {_noun('block', quantity.single)}",
                lambda tower: _agreed(
                    quantity.holds(sum(b.color == one for b in tower)), bool(quantity.holds(len(tower))) and all(b.color == one for b in tower)
                ),
            )
        return form, f"{quantity.words} {one} {_noun('block', quantity.single)}", lambda tower: quantity.holds(sum(b.color == one for b in tower))
    if form == "two colours":
        first, second = shuffled(rng, tuple(COLOURS))[:2]
        more = _quantity(rng, 2, ("a", "bare"))
        words = f"a {first} block and {more.words} {second} {_noun('block', more.single)}"
        return form, words, lambda tower: _both(any(b.color == first for b in tower), more.holds(sum(b.color == second for b in tower)))
    if form == "only":
        colours = shuffled(rng, tuple(COLOURS))[: int(rng.integers(1, 3))]
        return (
            form,
            f"only {' and '.join(colours)} blocks",
            lambda tower: _agreed({b.color for b in tower} == set(colours), {b.color for b in tower} <= set(colours)),
        )
    if form == "stacked":
        n = int(rng.integers(2, 4))

        def run(tower: Box) -> Truth:
            longest = (
                max(len(m) for m in re.findall(r"x+|o+", "".join("x" if b.color == one else "o" for b in tower)) if "x" in m)
                if any(b.color == one for b in tower)
                else 0
            )
            return longest == n

        return form, f"{_numeral(n, rng)} {one} blocks stacked together", run
    if form == "colours":
        n = int(rng.integers(1, 4))
        texts = {
            1: ("only one color", "blocks of only one color", "all blocks of the same color", "blocks of the same color"),
            2: ("exactly two colors", "blocks of 2 different colors"),
            3: ("blocks of all 3 colors", "all 3 colors", "blocks of all three colours"),
        }
        return form, pick(rng, texts[n]), lambda tower: None if len(tower) < 2 and n == 1 else len({b.color for b in tower}) == n
    _, said, number = _number_condition(rng)
    if form == "number and end":
        _, ending, at_end = _end_condition(rng)
        link = pick(rng, ("with", "having", "which has", "and"))
        return form, f"{said} {link} {ending}", lambda tower: _both(number(tower), at_end(tower))
    first, second = shuffled(rng, tuple(COLOURS))[:2]
    words = f"{said}, and it has a {first} block and a {second} block"
    return form, words, lambda tower: _both(number(tower), any(b.color == first for b in tower) and any(b.color == second for b in tower))


def _tower_with(rng: np.random.Generator) -> Sentence:
    form, words, test = _tower_condition(rng)
    quantity = _quantity(rng, 2, ("a", "a", "a", "bare", "bare", "exactly", "at least", "only", "no"))
    link = pick(
        rng, ("with", "with", "with", "having", "which has" if quantity.single else "which have", "that has" if quantity.single else "that have")
    )
    if form.startswith("colour count") and rng.random() < 0.3:
        link = "that contains" if quantity.single else "that contain"
    if "and it has" in words and not quantity.single:
        words = words.replace("and it has", "and they have")
    return Sentence(
        form=f"tower {form}",
        text=_there(quantity, f"{_noun('tower', quantity.single)} {link} {words}"),
        truth=lambda panel: quantity.over([test(tower) for tower in panel.boxes]),
    )


def _block_at(rng: np.random.Generator) -> Sentence:
    color, end = pick(rng, tuple(COLOURS)), pick(rng, ("base", "top"))
    quantity = _quantity(rng, 3, ("a", "a", "bare", "exactly", "at least", "no"))
    place = "base" if end == "base" else "top"
    rest, number = "", None
    if rng.random() < 0.5:
        _, said, number = _number_condition(rng)
        rest = f" with {said}"
    at = _at(end, color)
    test: OnBox = lambda tower: _both(at(tower), number(tower) if number else True)  # noqa: E731
    return Sentence(
        form="block at",
        text=_there(quantity, f"{color} {_noun('block', quantity.single)} as the {place} of a tower{rest}"),
        truth=lambda panel: quantity.over([test(tower) for tower in panel.boxes]),
    )


def _block_over(rng: np.random.Generator) -> Sentence:
    one, two = pick(rng, tuple(COLOURS)), pick(rng, tuple(COLOURS))
    words = pick(rng, ("above", "over", "on", "on top of"))
    noun = pick(rng, ("block", "block", "block", "object", "square"))
    quantity = _quantity(rng, 1, ("a", "a", "a", "at least", "no"))
    return Sentence(
        form="block over",
        text=_there(quantity, f"{one} {noun} {words} a {two} {noun}"),
        truth=lambda panel: quantity.over([_stacked(tower, one, two, words) for tower in panel.boxes]),
    )


def _blocks(rng: np.random.Generator) -> Sentence:
    color = pick(rng, tuple(COLOURS))
    quantity = _quantity(rng, 5, ("bare", "bare", "exactly", "at least", "at most"))
    return Sentence(
        form="blocks",
        text=_there(quantity, f"{color} {_noun(pick(rng, ('block', 'block', 'square')), quantity.single)}"),
        truth=lambda panel: quantity.over([b.color == color for b in _pieces(panel)]),
    )


def _every_tower(rng: np.random.Generator) -> Sentence:
    form, words, test = _tower_condition(rng)
    lead = pick(rng, ("Each tower has", "Every tower has", "All towers have", "All towers contain", "All the towers have", "All 3 towers have"))

    def truth(panel: Panel) -> Truth:
        found = [test(tower) for tower in panel.boxes]
        return False if False in found else None if None in found else True

    return Sentence(form=f"every tower {form}", text=f"{lead} {words.replace('it has', 'they have')}", truth=truth)


def _the_tower(rng: np.random.Generator) -> Sentence:
    n = int(rng.integers(1, TALLEST + 1))
    color, end = pick(rng, tuple(COLOURS)), pick(rng, ("base", "top"))
    at = _at(end, color)
    word = _numeral(n, rng)
    block = _noun("block", n == 1)
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
        found = [at(tower) for tower in panel.boxes if len(tower) == n]
        return _agreed(*found) if found else None

    return Sentence(form="the tower", text=text, truth=truth)


def _same_height(rng: np.random.Generator) -> Sentence:
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
        "two": ("There are at least two towers with the same height", "At least two of the towers have the same height"),
        "all": ("All towers have the same height", "All the towers have the same number of blocks"),
        "both": (
            f"There are two towers which has {_numeral(a, rng)} and {_numeral(b, rng)} blocks each",
            f"There are towers with {a} and {b} blocks",
        ),
        "different": ("All towers have different height", "All towers have a different number of blocks"),
    }
    return Sentence(form="same height", text=pick(rng, texts[wording]), truth=truth)


def _same_end(rng: np.random.Generator) -> Sentence:
    end = pick(rng, ("base", "top"))
    wording = pick(rng, ("only two", "at least two", "all"))

    def truth(panel: Panel) -> Truth:
        colours = [tower[0 if end == "base" else -1].color for tower in panel.boxes]
        most = max(colours.count(color) for color in colours)
        return most == 2 if wording == "only two" else most >= 2 if wording == "at least two" else most == len(colours)

    texts = {
        "only two": (f"There are only two towers which has the same {end} color", f"Exactly two towers have the same color at the {end}"),
        "at least two": (f"There are at least two towers with the same {end} color", f"At least two of the towers have the same color at the {end}"),
        "all": (f"All towers have the same {end} color", f"All towers have the same color at the {end}"),
    }
    return Sentence(form="same end", text=pick(rng, texts[wording]), truth=truth)


def _some_end(rng: np.random.Generator) -> Sentence:
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


def _second(rng: np.random.Generator) -> Sentence:
    color = pick(rng, tuple(COLOURS))
    at, number = pick(rng, (("second", 1), ("second", 1), ("third", 2)))
    quantity = _quantity(rng, 2, ("a", "a", "exactly", "only", "bare"))
    where = pick(rng, ("", " from the base", " from the bottom", " from the top"))
    link = pick(rng, ("where the", "that the", "in which the"))

    def test(tower: Box) -> Truth:
        if len(tower) <= number:
            return False
        low, high = tower[number].color == color, tower[-1 - number].color == color
        return high if "top" in where else low if where else _agreed(low, high)

    return Sentence(
        form="second block",
        text=_there(quantity, f"{_noun('tower', quantity.single)} {link} {at} block{where} is {color}"),
        truth=lambda panel: quantity.over([test(tower) for tower in panel.boxes]),
    )


def _tower_as_box(rng: np.random.Generator) -> Sentence:
    color, n = pick(rng, tuple(COLOURS)), int(rng.integers(2, TALLEST + 1))
    quantity = _quantity(rng, 2, ("a", "a", "a", "bare", "exactly"))
    top = pick(
        rng, (f"a {color} item on top", f"the {color} one on top", f"a {color} one on top", f"{color} one on top", f"the {color} one is on top")
    )
    noun = pick(rng, ("items", "items", "blocks"))
    if rng.random() < 0.25:
        words, test = pick(
            rng,
            (
                (f"a {color} item on top", _at("top", color)),
                (f"{_numeral(n, rng)} items", lambda tower: len(tower) == n),
                (f"all 3 colors and a {color} item on top", lambda tower: len({b.color for b in tower}) == 3 and tower[-1].color == color),
            ),
        )
    elif rng.random() < 0.4:
        form, words, test = _box_condition(rng)
        while form not in ("colours", "only", "number"):
            form, words, test = _box_condition(rng)
    else:
        words, test = f"{_numeral(n, rng)} {noun} and {top}", lambda tower: len(tower) == n and tower[-1].color == color
    chosen = test
    return Sentence(
        form="tower as box",
        text=_there(quantity, f"{_noun('box', quantity.single)} with {words}"),
        truth=lambda panel: quantity.over([chosen(tower) for tower in panel.boxes]),
    )


def _one_colour_tower(rng: np.random.Generator) -> Sentence:
    color = pick(rng, tuple(COLOURS))
    n = int(rng.integers(1, 4))
    with_number = rng.random() < 0.5
    quantity = _quantity(rng, 2, ("a", "a", "exactly", "no"))
    rest = f" with only {_numeral(n, rng)} {_noun('block', n == 1)}" if with_number else ""

    def test(tower: Box) -> Truth:
        return all(b.color == color for b in tower) and (not with_number or len(tower) == n)

    return Sentence(
        form="one colour tower",
        text=_there(quantity, f"{color} {_noun('tower', quantity.single)}{rest}"),
        truth=lambda panel: quantity.over([test(tower) for tower in panel.boxes]),
    )


def _high_tower(rng: np.random.Generator) -> Sentence:
    n = int(rng.integers(1, TALLEST + 1))
    form, words, test = _tower_condition(rng)
    while "number" in form:
        form, words, test = _tower_condition(rng)
    block = pick(rng, ("block", _noun("block", n == 1)))
    link = pick(rng, ("that has", "which has", "with"))
    return Sentence(
        form="high tower",
        text=f"There is a {_numeral(n, rng)} {block} tower {link} {words}",
        truth=lambda panel: _exists([_both(len(tower) == n, test(tower)) for tower in panel.boxes]),
    )


def _touching_stack(rng: np.random.Generator) -> Sentence:
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


_SCATTER_FORMS: Sequence[Maker] = (
    _items,
    _items_touching,
    _items_touching,
    _items_touching,
    _all_touching,
    _not_coloured,
    _two_touching,
    _same_box,
    _colours_touching,
    _box_with,
    _box_with,
    _box_with,
    _box_with,
    _one_box_has,
    _every_box,
)
_TOWER_FORMS: Sequence[Maker] = (
    _tower_with,
    _tower_with,
    _tower_with,
    _tower_with,
    _tower_with,
    _tower_with,
    _block_at,
    _block_at,
    _block_over,
    _block_over,
    _blocks,
    _every_tower,
    _the_tower,
    _same_height,
    _same_end,
    _some_end,
    _second,
    _tower_as_box,
    _tower_as_box,
    _one_colour_tower,
    _high_tower,
    _touching_stack,
)
"""Repeated entries are more frequent, roughly as in the development sentences."""


def _for_boxes(text: str, num_boxes: int) -> str:
    return text if num_boxes == 3 else text.replace("of the three towers", "of the towers").replace("All 3 towers", "All 2 towers")


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
    """The sentence with or without capital and period, and now and then with a slip of a human writer that leaves the meaning alone."""
    for rate, pattern, other in _SLIPS:
        if rng.random() < rate:
            text = re.sub(pattern, other, text, count=1)
    if rng.random() < 0.3:
        text = text[0].lower() + text[1:]
    return text + ("." if rng.random() < 0.5 else "")
