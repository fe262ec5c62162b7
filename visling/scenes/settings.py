"""Settings of the embedded data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from visling.errors import ConfigError, nearest
from visling.scenes.drawing import STYLES
from visling.scenes.panels.panel import MOST_ITEMS

LANGUAGES = ("plain", "people")
"""How panels can be described."""


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """How many pictures are drawn, how they look and what is said about them."""

    images: int = 10_000
    """Number of scenes over all splits."""
    seed: int = 0
    """What is written depends on this and the settings below, never on the number of processes."""
    style: Literal["plain", "sketch"] = "plain"
    """plain: flat colours on a plain sheet; sketch: pencil on paper."""
    size: int = 128
    """Width and height of a picture, pixels; objects grow with it."""
    min_objects: int = 3
    """Fewest objects in a scene."""
    max_objects: int = 10
    """Most objects in a scene."""
    train: float = 0.8
    """Share of the images in split train."""
    val: float = 0.1
    """Share of the images in split val; the rest is test."""
    questions_per_image: int = 10
    """Most questions per scene; fewer where more would unbalance the answers."""
    captions_per_image: int = 5
    """Captions per scene."""
    statements_per_image: int = 4
    """Most true or false sentences per scene."""
    answer_noise: float = 0.0
    """Share of the ten answers of a question that are replaced by another answer of its kind, 0 to 1."""
    panels: int = 0
    """Number of NLVR-like panel pictures over all splits."""
    panel_boxes: int = 3
    """Grey boxes in a panel, 2 or 3; NLVR has 3."""
    panel_items: int = MOST_ITEMS
    """Most scattered items in a box of a panel; few make an easier picture."""
    panel_towers: float = 0.65
    """Share of presentations that show towers; 0.68 in NLVR's development split."""
    panel_language: Literal["plain", "people"] = "people"
    """What is said about panels. plain: one item, one number or one condition at a time; people: sentences as NLVR's
    writers put them, and captions that name every attribute."""
    panel_first: int = 100_000
    """Number of the first presentation. Official numbers are below 5,000, so drawn and official pictures can share a
    region store; give two drawn sets different ones."""
    permutations: int = 1
    """Pictures written per panel, each with its boxes in another order: up to 6 (2 for two boxes); NLVR has 6."""
    statements_per_panel: int = 1
    """Sentences per panel; the first is written in NLVR's layout, the others in statements.json."""
    processes: int = 1
    """Worker processes; with more than 1 the calling script needs `if __name__ == "__main__"`."""
    overwrite: bool = False
    """Replace an output folder that is not empty."""

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ConfigError(f"style is {self.style!r}. {nearest(self.style, STYLES)}")
        if self.panel_language not in LANGUAGES:
            raise ConfigError(f"panel_language is {self.panel_language!r}. {nearest(self.panel_language, LANGUAGES)}")
        counts = {
            "images": 0,
            "panels": 0,
            "seed": 0,
            "questions_per_image": 0,
            "captions_per_image": 0,
            "statements_per_image": 0,
        }
        for name, least in (
            counts
            | {
                "size": 48,
                "min_objects": 2,
                "permutations": 1,
                "statements_per_panel": 1,
                "processes": 1,
                "panel_first": 0,
            }
        ).items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        limits = {
            "size": 1024,
            "max_objects": 10,
            "questions_per_image": 30,
            "captions_per_image": 12,
            "statements_per_image": 12,
        }
        for name, most in (limits | {"statements_per_panel": 50, "images": 999_999, "panels": 999_999}).items():
            if getattr(self, name) > most:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at most {most}.")
        if self.max_objects < self.min_objects:
            raise ConfigError(f"max_objects is {self.max_objects}, below min_objects ({self.min_objects}). Raise it.")
        if self.images + self.panels == 0:
            raise ConfigError("images and panels are both 0: there is nothing to draw. Set one of them.")
        for name in ("answer_noise", "panel_towers"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is a share from 0 to 1.")
        if self.train < 0 or self.val < 0 or self.train + self.val > 1 + 1e-9:
            raise ConfigError(
                f"train ({self.train}) and val ({self.val}) are shares of the images and may add up to 1 at most; the "
                "rest is test."
            )
        if not 1 <= self.panel_items <= MOST_ITEMS:
            raise ConfigError(f"panel_items is {self.panel_items}; it must lie between 1 and {MOST_ITEMS}.")
        if self.panel_boxes not in (2, 3):
            raise ConfigError(f"panel_boxes is {self.panel_boxes}; a panel has 2 or 3 boxes.")
        most = 6 if self.panel_boxes == 3 else 2
        if self.permutations > most:
            raise ConfigError(f"permutations is {self.permutations}; {self.panel_boxes} boxes have only {most} orders.")

    def bounds(self, number: int) -> dict[str, range]:
        """Positions of each split among `number` things: first train, then val, then test."""
        first = round(self.train * number)
        second = min(number, first + round(self.val * number))
        return {"train": range(first), "val": range(first, second), "test": range(second, number)}
