"""Plain words about panels, one condition each: captions of one item or one number, statements in a handful of forms.

What a small model learns first. Statements of these forms differ from people's only in what comes on top: quantifiers, two conditions, slips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from visling.data.scenes.language import NUMBERS, indefinite, plural
from visling.data.scenes.panels import COLOURS, SHAPES, SIZES, TALLEST, Panel, Piece
from visling.data.scenes.sentences import Sentence
from visling.data.scenes.world import pick

PLACES = {2: ("left", "right"), 3: ("left", "middle", "right")}
"""Words for the boxes of a panel, by their number."""
_SIZE_WORDS = {width: word for word, width in SIZES.items()}
_ITEM_RATE = 0.6
"""Share of captions that name one item; the others count."""
_MOST_ALIKE = 3
"""Most items of a kind that a statement gives to one box."""
_MOST_IN_ALL = 6
"""Most items or blocks of a kind that a statement gives to a panel."""


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


def plain_sentences(rng: np.random.Generator, towers: bool, num_boxes: int, tries: int = 60) -> Iterator[Sentence]:
    """Random statements of one random form, for panels of towers or of scattered items."""
    maker = pick(rng, _TOWER_FORMS if towers else _SCATTER_FORMS)
    for _ in range(tries):
        yield maker(rng, num_boxes)


def _counted(number: int, noun: str) -> str:
    return f"{NUMBERS[number]} {noun if number == 1 else plural(noun)}"


def _one_item(panel: Panel, rng: np.random.Generator) -> str:
    """One item, and in which box if there are items alike or by chance."""
    where, piece = pick(rng, [(where, piece) for where, box in enumerate(panel.boxes) for piece in box])
    place = PLACES[len(panel.boxes)][where]
    if panel.towers:
        return f"{indefinite(piece.color)} block in the {place} tower"
    return indefinite(piece_name(piece)) + (f" in the {place} box" if rng.integers(2) else "")


def _one_number(panel: Panel, rng: np.random.Generator) -> str:
    """How many items of one colour or shape a box or the panel holds."""
    by_color = panel.towers or bool(rng.integers(2))
    pieces = [piece for box in panel.boxes for piece in box]
    kind = pick(rng, sorted({piece.color if by_color else piece.shape for piece in pieces}))
    noun = f"{kind} {'block' if panel.towers else 'item'}" if by_color else kind
    where = int(rng.integers(len(panel.boxes) + 2))
    if where < len(panel.boxes):
        number = sum(kind in (piece.color, piece.shape) for piece in panel.boxes[where])
        return f"the {PLACES[len(panel.boxes)][where]} {'tower' if panel.towers else 'box'} has {_counted(number, noun)}"
    number = sum(kind in (piece.color, piece.shape) for piece in pieces)
    said = _counted(number, noun) if number < len(NUMBERS) else f"many {plural(noun)}"
    return f"there {'is' if number == 1 else 'are'} {said}"


Maker = Callable[[np.random.Generator, int], Sentence]


def _base(rng: np.random.Generator, num_boxes: int) -> Sentence:
    where, color = int(rng.integers(num_boxes)), pick(rng, tuple(COLOURS))
    text = f"the {PLACES[num_boxes][where]} tower has {indefinite(color)} base"
    return Sentence(form="plain base", text=text, truth=lambda panel: panel.boxes[where][0].color == color)


def _top(rng: np.random.Generator, num_boxes: int) -> Sentence:
    where, color = int(rng.integers(num_boxes)), pick(rng, tuple(COLOURS))
    text = f"the {PLACES[num_boxes][where]} tower has {indefinite(color)} block at the top"
    return Sentence(form="plain top", text=text, truth=lambda panel: panel.boxes[where][-1].color == color)


def _height(rng: np.random.Generator, num_boxes: int) -> Sentence:
    where, number = int(rng.integers(num_boxes)), int(rng.integers(1, TALLEST + 1))
    text = f"the {PLACES[num_boxes][where]} tower has {_counted(number, 'block')}"
    return Sentence(form="plain height", text=text, truth=lambda panel: len(panel.boxes[where]) == number)


def _some_height(rng: np.random.Generator, num_boxes: int) -> Sentence:
    number = int(rng.integers(1, TALLEST + 1))
    text = f"there is a tower with {_counted(number, 'block')}"
    return Sentence(form="plain some height", text=text, truth=lambda panel: number in map(len, panel.boxes))


def _blocks(rng: np.random.Generator, num_boxes: int) -> Sentence:
    number, color = int(rng.integers(1, _MOST_IN_ALL + 1)), pick(rng, tuple(COLOURS))
    return Sentence(form="plain blocks", text=_exactly(number, f"{color} block"), truth=lambda panel: _in_all(panel, {color}) == number)


def _some_item(rng: np.random.Generator, num_boxes: int) -> Sentence:
    name, words = _kind(rng)
    return Sentence(form="plain some item", text=f"there is {indefinite(name)}", truth=lambda panel: _in_all(panel, words) > 0)


def _item_in_box(rng: np.random.Generator, num_boxes: int) -> Sentence:
    where, (name, words) = int(rng.integers(num_boxes)), _kind(rng)
    text = f"the {PLACES[num_boxes][where]} box has {indefinite(name)}"
    return Sentence(form="plain item in box", text=text, truth=lambda panel: _in_box(panel, where, words) > 0)


def _number_in_box(rng: np.random.Generator, num_boxes: int) -> Sentence:
    where, (name, words), number = int(rng.integers(num_boxes)), _kind(rng), int(rng.integers(1, _MOST_ALIKE + 1))
    text = f"the {PLACES[num_boxes][where]} box has exactly {_counted(number, name)}"
    return Sentence(form="plain number in box", text=text, truth=lambda panel: _in_box(panel, where, words) == number)


def _items(rng: np.random.Generator, num_boxes: int) -> Sentence:
    (name, words), number = _kind(rng), int(rng.integers(1, _MOST_IN_ALL + 1))
    return Sentence(form="plain items", text=_exactly(number, name), truth=lambda panel: _in_all(panel, words) == number)


_TOWER_FORMS: tuple[Maker, ...] = (_base, _top, _height, _some_height, _blocks)
_SCATTER_FORMS: tuple[Maker, ...] = (_some_item, _item_in_box, _number_in_box, _items)


def _exactly(number: int, noun: str) -> str:
    return f"there {'is' if number == 1 else 'are'} exactly {_counted(number, noun)}"


def _kind(rng: np.random.Generator) -> tuple[str, set[str]]:
    """A sort of item: its name, and the words that must hold of an item."""
    named = pick(rng, (("color", "shape"), ("color", "shape"), ("size", "color", "shape"), ("size", "shape"), ("color",), ("shape",)))
    values = {"size": tuple(SIZES), "color": tuple(COLOURS), "shape": SHAPES}
    words = [pick(rng, values[name]) for name in named]
    return " ".join(words if "shape" in named else [*words, "item"]), set(words)


def _in_box(panel: Panel, where: int, words: set[str]) -> int:
    """Items of a box of which all words hold."""
    return sum(words <= {_SIZE_WORDS[piece.size], piece.color, piece.shape} for piece in panel.boxes[where])


def _in_all(panel: Panel, words: set[str]) -> int:
    """Items of the panel of which all words hold."""
    return sum(_in_box(panel, where, words) for where in range(len(panel.boxes)))
