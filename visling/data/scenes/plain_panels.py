"""Plain words about panels, one claim at a time: what a small model learns first.

A claim names an item, a number of items, or the end of a tower. True ones are captions; a false one differs from a true one in one word or in the
box it speaks of, so that a model which has learnt to guess hidden words of captions can tell it by that word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from visling.data.scenes.language import NUMBERS, indefinite, plural
from visling.data.scenes.panels import COLOURS, SHAPES, SIZES, Panel, Piece
from visling.data.scenes.sentences import Sentence
from visling.data.scenes.world import pick

PLACES = {2: ("left", "right"), 3: ("left", "middle", "right")}
"""Words for the boxes of a panel, by their number."""
_SIZE_WORDS = {width: word for word, width in SIZES.items()}
_KINDS = (tuple(SIZES), tuple(COLOURS), SHAPES)
"""Words of one kind, in the order in which they are said."""
_FEWER_WORDS = 0.4
"""Share of named items of which not everything is said."""


@dataclass(frozen=True, kw_only=True)
class _Claim:
    """What is said of a panel."""

    about: Literal["item", "number", "base", "top"]
    towers: bool
    num_boxes: int
    words: tuple[str, ...] = ()
    """What must hold of an item; none holds of all."""
    where: int | None = None
    """Box spoken of; None = any."""
    number: int = 1

    def text(self) -> str:
        """The claim in words."""
        place = "" if self.where is None else f"{PLACES[self.num_boxes][self.where]} {'tower' if self.towers else 'box'}"
        if self.about in ("base", "top"):
            (color,) = self.words
            return f"the {place} has {indefinite(color)} {'base' if self.about == 'base' else 'block at the top'}"
        named = any(word in SHAPES for word in self.words)
        noun = " ".join([*self.words, *([] if named else ["block" if self.towers else "item"])])
        if self.about == "item":
            return f"there is {indefinite(noun)}" + (f" in the {place}" if place else "")
        counted = f"{NUMBERS[self.number]} {noun if self.number == 1 else plural(noun)}"
        return f"the {place} has {counted}" if place else f"there {'is' if self.number == 1 else 'are'} {counted}"

    def truth(self, panel: Panel) -> bool:
        """Whether it is so."""
        boxes = panel.boxes if self.where is None else (panel.boxes[self.where],)
        if self.about in ("base", "top"):
            return boxes[0][0 if self.about == "base" else -1].color in self.words
        found = sum(set(self.words) <= {_SIZE_WORDS[piece.size], piece.color, piece.shape} for box in boxes for piece in box)
        return found == self.number if self.about == "number" else found > 0


def piece_name(piece: Piece) -> str:
    """Everything that can be said of an item: "small black square"."""
    return f"{_SIZE_WORDS[piece.size]} {piece.color} {piece.shape}"


def plain_captions(panel: Panel, rng: np.random.Generator, count: int) -> list[str]:
    """Different true captions of a panel, at most `count`."""
    captions: list[str] = []
    for _ in range(8 * count):
        text = _true_claim(panel, rng).text()
        if text not in captions:
            captions.append(text)
        if len(captions) == count:
            break
    return captions


def plain_sentences(panel: Panel, rng: np.random.Generator, tries: int = 60) -> Iterator[Sentence]:
    """Random statements about a panel, true and false of it in turn."""
    for k in range(tries):
        claim = _true_claim(panel, rng)
        if k % 2:
            claim = next((one for one in (_changed(claim, rng) for _ in range(20)) if not one.truth(panel)), claim)
        yield Sentence(form=f"plain {claim.about}", text=claim.text(), truth=claim.truth)


def _true_claim(panel: Panel, rng: np.random.Generator) -> _Claim:
    """What a panel shows: half of the time an item."""
    about: Literal["item", "number", "base", "top"] = pick(
        rng, ("item", "item", "number", "base", "top") if panel.towers else ("item", "item", "number")
    )
    where, piece = pick(rng, [(where, piece) for where, box in enumerate(panel.boxes) for piece in box])
    claim = _Claim(about=about, towers=panel.towers, num_boxes=len(panel.boxes), where=where)
    if about in ("base", "top"):
        return replace(claim, words=(panel.boxes[where][0 if about == "base" else -1].color,))
    somewhere = where if rng.integers(2) else None
    if about == "item":
        if panel.towers:
            return replace(claim, words=(piece.color,))
        said = [word for word in piece_name(piece).split() if rng.random() >= _FEWER_WORDS or word == piece.color]
        return replace(claim, words=tuple(said), where=somewhere)
    if panel.towers and somewhere is not None and rng.integers(2):
        return replace(claim, number=len(panel.boxes[where]))
    claim = replace(claim, words=(piece.color if panel.towers or rng.integers(2) else piece.shape,), where=somewhere)
    for number in range(1, len(NUMBERS)):
        if replace(claim, number=number).truth(panel):
            return replace(claim, number=number)
    return replace(claim, about="item")  # more than there are words for


def _changed(claim: _Claim, rng: np.random.Generator) -> _Claim:
    """The claim with one word or its box changed."""
    parts = [*claim.words, *(["box"] if claim.where is not None else []), *(["number"] if claim.about == "number" else [])]
    part = pick(rng, parts)
    if part == "box":
        return replace(claim, where=pick(rng, [place for place in range(claim.num_boxes) if place != claim.where]))
    if part == "number":
        return replace(claim, number=pick(rng, [number for number in (claim.number - 1, claim.number + 1) if 1 <= number < len(NUMBERS)]))
    (kind,) = (kind for kind in _KINDS if part in kind)
    other = pick(rng, [word for word in kind if word != part])
    return replace(claim, words=tuple(other if word == part else word for word in claim.words))
