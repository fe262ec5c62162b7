"""Plain sentences about panels, one condition at a time: captions of one item or one number, and statements. A small
model learns from these first."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from visling.scenes.language import NUMBERS, indefinite, plural
from visling.scenes.panels.logic import Sentence
from visling.scenes.panels.panel import COLOURS, SHAPES, SIZES, TALLEST, Panel, Piece
from visling.scenes.world import pick

PLACES = {2: ("left", "right"), 3: ("left", "middle", "right")}
"""Number of boxes -> words for them, from left to right."""
_SIZE_WORDS = {width: word for word, width in SIZES.items()}
_ITEM_RATE = 0.8
"""Share of captions that name one item; the others count. A model learns which word belongs to which item from captions
of one item (docs/log.md)."""
_PLACE_RATE = 0.3
"""Share of named items whose box is named too."""
_TRIES = 30


def piece_name(piece: Piece) -> str:
    """All three attributes of an item: "small black square"."""
    return f"{_SIZE_WORDS[piece.size]} {piece.color} {piece.shape}"


def plain_captions(panel: Panel, rng: np.random.Generator, count: int) -> list[str]:
    """Different true captions of a panel, at most `count`."""
    captions: list[str] = []
    for _ in range(8 * count):
        text = (_describe_item if rng.random() < _ITEM_RATE else _describe_number)(panel, rng)
        if text not in captions:
            captions.append(text)
        if len(captions) == count:
            break
    return captions


def plain_statements(panel: Panel, rng: np.random.Generator, count: int) -> list[tuple[Sentence, bool]]:
    """Different statements with their truth, true and false in turn, at most `count`.

    The words alone hint at the truth (a tower of four is rare), and an untrained model starts from that hint; from
    statements that are true as often as false it learned nothing (docs/log.md).
    """
    chosen: dict[str, tuple[Sentence, bool]] = {}
    for k in range(count):
        for _ in range(_TRIES):
            sentence = pick(rng, _TOWER_FORMS if panel.towers else _SCATTER_FORMS)(panel, rng)
            if sentence.truth(panel) is (k % 2 == 0) and sentence.text not in chosen:
                chosen[sentence.text] = (sentence, k % 2 == 0)
                break
    return list(chosen.values())


def _describe_item(panel: Panel, rng: np.random.Generator) -> str:
    """One item, and sometimes in which box it is."""
    where, piece = pick(rng, [(where, piece) for where, box in enumerate(panel.boxes) for piece in box])
    place = PLACES[len(panel.boxes)][where]
    if panel.towers:
        return f"{indefinite(piece.color)} block in the {place} tower"
    return indefinite(piece_name(piece)) + (f" in the {place} box" if rng.random() < _PLACE_RATE else "")


def _describe_number(panel: Panel, rng: np.random.Generator) -> str:
    """How many items of a colour or shape a box or the panel holds."""
    piece = pick(rng, [piece for box in panel.boxes for piece in box])
    kind = piece.color if panel.towers or rng.integers(2) else piece.shape
    noun = kind if kind in SHAPES else f"{kind} {'block' if panel.towers else 'item'}"
    where = int(rng.integers(len(panel.boxes) + 2))
    if where < len(panel.boxes):
        place = f"{PLACES[len(panel.boxes)][where]} {'tower' if panel.towers else 'box'}"
        return f"the {place} has {_write_count(_count_items(panel, {kind}, where), noun)}"
    number = _count_items(panel, {kind})
    many = _write_count(number, noun) if number < len(NUMBERS) else f"many {plural(noun)}"
    return f"there {'is' if number == 1 else 'are'} {many}"


# Statements. The numbers in them lie near the true ones, as in people's statements.

Maker = Callable[[Panel, np.random.Generator], Sentence]


def _say_end(panel: Panel, rng: np.random.Generator) -> Sentence:
    """The colour at an end of a tower."""
    (where, place), color = _pick_box(panel, rng), pick(rng, tuple(COLOURS))
    end, words = pick(rng, ((0, "base"), (-1, "block at the top")))
    text = f"the {place} tower has {indefinite(color)} {words}"
    return Sentence(form="plain end", text=text, truth=lambda panel: panel.boxes[where][end].color == color)


def _say_height(panel: Panel, rng: np.random.Generator) -> Sentence:
    """How many blocks a tower has."""
    (where, place), number = _pick_box(panel, rng), int(rng.integers(1, TALLEST + 1))
    text = f"the {place} tower has {_write_count(number, 'block')}"
    return Sentence(form="plain height", text=text, truth=lambda panel: len(panel.boxes[where]) == number)


def _say_some_height(panel: Panel, rng: np.random.Generator) -> Sentence:
    """That some tower has so many blocks."""
    number = int(rng.integers(1, TALLEST + 1))
    text = f"there is a tower with {_write_count(number, 'block')}"
    return Sentence(form="plain some height", text=text, truth=lambda panel: number in map(len, panel.boxes))


def _say_blocks(panel: Panel, rng: np.random.Generator) -> Sentence:
    """How many blocks of a colour there are."""
    color = pick(rng, tuple(COLOURS))
    return _say_number(f"{color} block", {color}, panel, rng)


def _say_items(panel: Panel, rng: np.random.Generator) -> Sentence:
    """How many items of a sort there are."""
    return _say_number(*_sample_kind(rng), panel, rng)


def _say_some_item(panel: Panel, rng: np.random.Generator) -> Sentence:
    """That there is an item of a sort."""
    name, words = _sample_kind(rng)
    return Sentence(
        form="plain some item", text=f"there is {indefinite(name)}", truth=lambda panel: _count_items(panel, words) > 0
    )


def _say_item_in_box(panel: Panel, rng: np.random.Generator) -> Sentence:
    """That a box holds an item of a sort."""
    (where, place), (name, words) = _pick_box(panel, rng), _sample_kind(rng)
    text = f"the {place} box has {indefinite(name)}"
    return Sentence(form="plain item in box", text=text, truth=lambda panel: _count_items(panel, words, where) > 0)


def _say_number_in_box(panel: Panel, rng: np.random.Generator) -> Sentence:
    """How many items of a sort a box holds."""
    (where, place), (name, words) = _pick_box(panel, rng), _sample_kind(rng)
    number = _vary_number(_count_items(panel, words, where), rng)
    text = f"the {place} box has exactly {_write_count(number, name)}"
    return Sentence(
        form="plain number in box", text=text, truth=lambda panel: _count_items(panel, words, where) == number
    )


_TOWER_FORMS: tuple[Maker, ...] = (_say_end, _say_end, _say_height, _say_some_height, _say_blocks)
_SCATTER_FORMS: tuple[Maker, ...] = (_say_some_item, _say_item_in_box, _say_number_in_box, _say_items)


def _say_number(name: str, words: set[str], panel: Panel, rng: np.random.Generator) -> Sentence:
    """How many items of the panel all words apply to."""
    number = _vary_number(_count_items(panel, words), rng)
    text = f"there {'is' if number == 1 else 'are'} exactly {_write_count(number, name)}"
    return Sentence(form="plain number", text=text, truth=lambda panel: _count_items(panel, words) == number)


def _pick_box(panel: Panel, rng: np.random.Generator) -> tuple[int, str]:
    """A random box: its place, and the word for it."""
    where = int(rng.integers(len(panel.boxes)))
    return where, PLACES[len(panel.boxes)][where]


def _sample_kind(rng: np.random.Generator) -> tuple[str, set[str]]:
    """A random sort of item: its name, and the words that must apply to an item."""
    named = pick(
        rng,
        (("color", "shape"), ("color", "shape"), ("size", "color", "shape"), ("size", "shape"), ("color",), ("shape",)),
    )
    values = {"size": tuple(SIZES), "color": tuple(COLOURS), "shape": SHAPES}
    words = [pick(rng, values[name]) for name in named]
    return " ".join(words if "shape" in named else [*words, "item"]), set(words)


def _count_items(panel: Panel, words: set[str], where: int | None = None) -> int:
    """Number of items, of box `where` or of the panel, that all words apply to."""
    boxes = panel.boxes if where is None else (panel.boxes[where],)
    return sum(words <= {_SIZE_WORDS[piece.size], piece.color, piece.shape} for box in boxes for piece in box)


def _vary_number(number: int, rng: np.random.Generator) -> int:
    """The number or a neighbour of it, as far as there are words for it."""
    return min(max(number + pick(rng, (-1, 0, 0, 1)), 0), len(NUMBERS) - 1)


def _write_count(number: int, noun: str) -> str:
    """A number word and a noun."""
    return f"{NUMBERS[number]} {noun if number == 1 else plural(noun)}"
