"""What a scene holds: objects with a shape, a colour, a size and a texture, and how their traits are sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "moon", "ring")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "brown", "black")
SIZES = ("small", "medium", "large")
TEXTURES = ("solid", "striped", "dotted")

VALUES: Mapping[str, tuple[str, ...]] = {"size": SIZES, "color": COLOURS, "texture": TEXTURES, "shape": SHAPES}
"""Trait -> its values, in the order in which English puts them before a noun. The word is "color" as in VQA v2."""

WIDTHS = {"small": (13, 16), "medium": (21, 25), "large": (32, 37)}
"""Least and largest drawn width of each size, in pixels of a 128-pixel picture."""

Traits = Mapping[str, str]
"""Trait -> value; a description of some objects. Empty: every object."""

ODD_RATE = 0.3
"""Share of scenes in which all objects but one share a trait, so that "the odd one" exists."""
PALETTE_RATE = 0.7
"""Share of the other scenes that use few colours and few shapes, so that counts above one are common."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One object of a scene."""

    shape: str
    color: str
    size: str
    texture: str
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Tight pixel corners x1, y1, x2, y2 of the drawn object."""

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box, in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def trait(self, name: str) -> str:
        """Value of a trait."""
        return str(getattr(self, name))

    def fits(self, traits: Traits) -> bool:
        """Whether a description is true of this object."""
        # A plain loop: all() with a generator takes twice as long, and this is half of the time spent on questions.
        for name, value in traits.items():  # noqa: SIM110
            if getattr(self, name) != value:
                return False
        return True


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A drawn picture's objects."""

    image_id: int
    size: int
    """Width and height, pixels."""
    items: tuple[Item, ...]

    @property
    def margin(self) -> float:
        """Pixels by which two centres must differ for a sentence to call one left of or above the other."""
        return 0.08 * self.size

    def fitting(self, traits: Traits) -> tuple[Item, ...]:
        """Objects of which a description is true."""
        return tuple(item for item in self.items if item.fits(traits))

    def count(self, traits: Traits) -> int:
        """Number of objects of which a description is true."""
        return len([item for item in self.items if item.fits(traits)])


def pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    """One value, each equally likely."""
    return values[int(rng.integers(len(values)))]


def shuffled(rng: np.random.Generator, values: Sequence[T]) -> list[T]:
    """The values in random order."""
    return [values[int(i)] for i in rng.permutation(len(values))]


CROWDING = {"small": 0.04, "medium": 0.09, "large": 0.17}
"""Share of a picture's room that an object takes up; objects that sum to more than 1 could not be placed at random
without touching."""


def sample_items(rng: np.random.Generator, fewest: int, most: int) -> list[Item]:
    """Random objects that have no place yet.

    The values of every trait are exchangeable, so the words of a question alone say nothing about its answer.
    """
    number = int(rng.integers(fewest, most + 1))
    values = {name: list(all_values) for name, all_values in VALUES.items()}
    draw = rng.random()
    if draw >= ODD_RATE and rng.random() < PALETTE_RATE:
        values["color"] = shuffled(rng, COLOURS)[: int(rng.integers(2, 6))]
        values["shape"] = shuffled(rng, SHAPES)[: int(rng.integers(2, 6))]
    items = [{name: pick(rng, options) for name, options in values.items()} for _ in range(number)]
    if draw < ODD_RATE:
        name = pick(rng, list(VALUES))
        common, odd = shuffled(rng, VALUES[name])[:2]
        for item in items:
            item[name] = common
        chosen = pick(rng, items)
        chosen[name] = odd
        items.remove(chosen)
        items.insert(0, chosen)  # never left out when there are too many
    while sum(CROWDING[item["size"]] for item in items) > 1 and len(items) > fewest:
        largest = max(CROWDING[item["size"]] for item in items[1:])
        items.pop(max(k for k, item in enumerate(items) if k and CROWDING[item["size"]] == largest))
    return [Item(shape=one["shape"], color=one["color"], size=one["size"], texture=one["texture"]) for one in items]
