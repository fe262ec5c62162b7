"""Plain words about panels, one condition at a time: captions of one item or one number, and statements. What a small
model learns first."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from visling.scenes.language import NUMBERS, indefinite, plural
from visling.scenes.panels.logic import Sentence
from visling.scenes.panels.panel import COLOURS, SHAPES, SIZES, TALLEST, Panel, Piece
from visling.scenes.world import pick

PLACES = {2: ("left", "right"), 3: ("left", "middle", "right")}
"""Words for the boxes of a panel, by their number."""
_SIZE_WORDS = {width: word for word, width in SIZES.items()}
_ITEM_RATE = 0.8
"""Share of captions that name one item; the others count. Words are bound to items by those that name one alone."""
_PLACE_RATE = 0.3
"""Share of named items whose box is named too."""
_TRIES = 30


def piece_name(piece: Piece) -> str:
    """Everything that can be said of an item: "small black square"."""
    return f"{_SIZE_WORDS[piece.size]} {piece.color} {piece.shape}"


def plain_captions(panel: Panel, rng: np.random.Generator, count: int) -> list[str]:
    """Different true captions of a panel, at most `count`."""
    captions: list[str] = []
    for _ in range(8 * count):
        text = (_one_item if rng.random() < _ITEM_RATE else _one_number)(panel, rng)
        if text not in captions:
            captions.append(text)
        if len(captions) == count:
            break
    return captions


def plain_statements(panel: Panel, rng: np.random.Generator, count: int) -> list[tuple[Sentence, bool]]:
    """Different statements with their truth, true and false in turn, at most `count`.

    Words alone tell a little about the truth (a tower of four is rare): a model that begins gets a hold there, and none
    of statements that are as often true as false (docs/log.md).
    """
    found: dict[str, tuple[Sentence, bool]] = {}
    for k in range(count):
        for _ in range(_TRIES):
            sentence = pick(rng, _TOWER_FORMS if panel.towers else _SCATTER_FORMS)(panel, rng)
            if sentence.truth(panel) is (k % 2 == 0) and sentence.text not in found:
                found[sentence.text] = (sentence, k % 2 == 0)
                break
    return list(found.values())


def _one_item(panel: Panel, rng: np.random.Generator) -> str:
    """One item, and sometimes in which box it is."""
    where, piece = pick(rng, [(where, piece) for where, box in enumerate(panel.boxes) for piece in box])
    place = PLACES[len(panel.boxes)][where]
    if panel.towers:
        return f"{indefinite(piece.color)} block in the {place} tower"
    return indefinite(piece_name(piece)) + (f" in the {place} box" if rng.random() < _PLACE_RATE else "")


def _one_number(panel: Panel, rng: np.random.Generator) -> str:
    """How many items of a colour or shape a box or the panel holds."""
    piece = pick(rng, [piece for box in panel.boxes for piece in box])
    kind = piece.color if panel.towers or rng.integers(2) else piece.shape
    noun = kind if kind in SHAPES else f"{kind} {'block' if panel.towers else 'item'}"
    where = int(rng.integers(len(panel.boxes) + 2))
    if where < len(panel.boxes):
        place = f"{PLACES[len(panel.boxes)][where]} {'tower' if panel.towers else 'box'}"
        return f"the {place} has {_counted(_number(panel, {kind}, where), noun)}"
    number = _number(panel, {kind})
    return f"there {'is' if number == 1 else 'are'} {_counted(number, noun) if number < len(NUMBERS) else f'many {plural(noun)}'}"


# Statements. Numbers asked for lie near the true ones, as people's do.

Maker = Callable[[Panel, np.random.Generator], Sentence]


def _end(panel: Panel, rng: np.random.Generator) -> Sentence:
    (where, place), color = _place(panel, rng), pick(rng, tuple(COLOURS))
    end, words = pick(rng, ((0, "base"), (-1, "block at the top")))
    text = f"the {place} tower has {indefinite(color)} {words}"
    return Sentence(form="plain end", text=text, truth=lambda panel: panel.boxes[where][end].color == color)


def _height(panel: Panel, rng: np.random.Generator) -> Sentence:
    (where, place), number = _place(panel, rng), int(rng.integers(1, TALLEST + 1))
    text = f"the {place} tower has {_counted(number, 'block')}"
    return Sentence(form="plain height", text=text, truth=lambda panel: len(panel.boxes[where]) == number)


def _some_height(panel: Panel, rng: np.random.Generator) -> Sentence:
    number = int(rng.integers(1, TALLEST + 1))
    text = f"there is a tower with {_counted(number, 'block')}"
    return Sentence(form="plain some height", text=text, truth=lambda panel: number in map(len, panel.boxes))


def _blocks(panel: Panel, rng: np.random.Generator) -> Sentence:
    color = pick(rng, tuple(COLOURS))
    return _in_all(f"{color} block", {color}, panel, rng)


def _items(panel: Panel, rng: np.random.Generator) -> Sentence:
    return _in_all(*_kind(rng), panel, rng)


def _some_item(panel: Panel, rng: np.random.Generator) -> Sentence:
    name, words = _kind(rng)
    return Sentence(
        form="plain some item", text=f"there is {indefinite(name)}", truth=lambda panel: _number(panel, words) > 0
    )


def _item_in_box(panel: Panel, rng: np.random.Generator) -> Sentence:
    (where, place), (name, words) = _place(panel, rng), _kind(rng)
    text = f"the {place} box has {indefinite(name)}"
    return Sentence(form="plain item in box", text=text, truth=lambda panel: _number(panel, words, where) > 0)


def _number_in_box(panel: Panel, rng: np.random.Generator) -> Sentence:
    (where, place), (name, words) = _place(panel, rng), _kind(rng)
    number = _near(_number(panel, words, where), rng)
    text = f"the {place} box has exactly {_counted(number, name)}"
    return Sentence(form="plain number in box", text=text, truth=lambda panel: _number(panel, words, where) == number)


_TOWER_FORMS: tuple[Maker, ...] = (_end, _end, _height, _some_height, _blocks)
_SCATTER_FORMS: tuple[Maker, ...] = (_some_item, _item_in_box, _number_in_box, _items)


def _in_all(name: str, words: set[str], panel: Panel, rng: np.random.Generator) -> Sentence:
    number = _near(_number(panel, words), rng)
    text = f"there {'is' if number == 1 else 'are'} exactly {_counted(number, name)}"
    return Sentence(form="plain number", text=text, truth=lambda panel: _number(panel, words) == number)


def _place(panel: Panel, rng: np.random.Generator) -> tuple[int, str]:
    """A box: its place, and the word for it."""
    where = int(rng.integers(len(panel.boxes)))
    return where, PLACES[len(panel.boxes)][where]


def _kind(rng: np.random.Generator) -> tuple[str, set[str]]:
    """A sort of item: its name, and the words that must hold of an item."""
    named = pick(
        rng,
        (("color", "shape"), ("color", "shape"), ("size", "color", "shape"), ("size", "shape"), ("color",), ("shape",)),
    )
    values = {"size": tuple(SIZES), "color": tuple(COLOURS), "shape": SHAPES}
    words = [pick(rng, values[name]) for name in named]
    return " ".join(words if "shape" in named else [*words, "item"]), set(words)


def _number(panel: Panel, words: set[str], where: int | None = None) -> int:
    """Items of a box or of the panel of which all words hold."""
    boxes = panel.boxes if where is None else (panel.boxes[where],)
    return sum(words <= {_SIZE_WORDS[piece.size], piece.color, piece.shape} for box in boxes for piece in box)


def _near(number: int, rng: np.random.Generator) -> int:
    """The number or a neighbour, within what there are words for."""
    return min(max(number + pick(rng, (-1, 0, 0, 1)), 0), len(NUMBERS) - 1)


def _counted(number: int, noun: str) -> str:
    return f"{NUMBERS[number]} {noun if number == 1 else plural(noun)}"
