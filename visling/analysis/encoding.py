"""What a model makes of one question, with names: which word and which region each state and each map speaks of.

Letters  T tokens, R regions, M and N positions that attend and that are attended to, H heads, Dt Dr Dp widths of text,
         region and pooled states. Nothing is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visling.analysis import notebook
from visling.analysis.drawing import draw_regions, place_side_by_side
from visling.errors import DataError, nearest
from visling.types import Maps, RegionArray

_MOST_DRAWN = 36
"""Regions of an image."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Word:
    """A word or a special token of a row."""

    text: str
    tokens: tuple[int, ...]
    """Positions of its pieces in the row, hence in states and maps."""
    pieces: tuple[str, ...]
    """As the vocabulary writes them ("##ing")."""
    special: bool = False
    """Whether it is no word of the text: [CLS], [SEP], [MASK], a task token."""

    def __repr__(self) -> str:
        """Its text and its places."""
        return f"Word({self.text!r}, tokens={self.tokens})"


@dataclass(frozen=True, kw_only=True, repr=False)
class NamedRegion:
    """A region of a row, or what stands behind the regions."""

    at: int
    """Position in the row's regions, hence in states and maps."""
    name: str
    """Attributes and class ("red star"), or its number where the detector has no names."""
    box: tuple[float, float, float, float] | None
    """Corners in pixels of its image; None for what is nowhere ([END])."""
    image: int = 0
    """Which of the question's images it is in."""
    confidence: float | None = None
    """Of its class."""
    class_name: str = ""
    """Empty where the detector has no names."""
    special: bool = False
    """Whether it is no detected region: the whole image, [END]."""

    def __repr__(self) -> str:
        """Its name, its place and its box."""
        box = "" if self.box is None else f", box=({', '.join(f'{corner:.0f}' for corner in self.box)})"
        return f"NamedRegion({self.name!r}, at={self.at}{box})"


@dataclass(frozen=True, kw_only=True, repr=False)
class EncodedRow:
    """One row of the model's input and what the encoder returned for it."""

    words: tuple[Word, ...]
    """Of T tokens, and of what stands behind them in captured states and maps (`Encoder.behind_text`)."""
    regions: tuple[NamedRegion, ...]
    """R regions, in the order in which the model sees them; if captured, also what stands behind them
    (`Encoder.behind_regions`)."""
    text_states: Tensor
    """(T, Dt)."""
    region_states: Tensor
    """(R, Dr)."""
    pooled: Tensor
    """(Dp,)."""
    whole: Tensor | None
    """(Dr,), of models with a state of the whole image."""
    maps: Maps | None
    """(H, M, N) per layer name in each direction, what stands behind tokens and regions included; None unless
    captured."""
    states: dict[str, Tensor] | None
    """Hidden states by layer name: (T, Dt), (R, Dr), or of one stream (T + R, Dt), what stands behind included."""

    def __repr__(self) -> str:
        """One line."""
        words = " ".join(word.text for word in self.words)
        detected = [region.name for region in self.regions if not region.special]
        regions = ", ".join(detected[:4]) + (", ..." if len(detected) > 4 else "")
        layers = "" if self.states is None else f"; {len(self.states)} states and maps captured"
        return f'EncodedRow("{words}"; {len(detected)} regions: {regions or "none"}{layers})'

    def word(self, text: str, nth: int | None = None) -> Word:
        """The word that reads so, whatever its case; special tokens are words here ("[CLS]").

        Args:
            nth: which of several, from 1.
        Raises:
            DataError: there is none, or there are several and `nth` is None, or fewer than `nth`.
        """
        found = [word for word in self.words if word.text.casefold() == text.casefold()]
        return choose_one("word", text, found, [word.text for word in self.words], nth)

    def region(self, name: str, nth: int | None = None) -> NamedRegion:
        """The region of this name; if there is none, the one whose name has all these words ("star" finds the red
        star).

        Args:
            nth: which of several, from 1, in the order in which the model sees them.
        Raises:
            DataError: there is none, or there are several and `nth` is None, or fewer than `nth`.
        """
        wanted = name.casefold().split()
        found = [region for region in self.regions if region.name.casefold() == name.casefold()]
        found = found or [region for region in self.regions if {*wanted} <= {*region.name.casefold().split()}]
        return choose_one("region", name, found, [region.name for region in self.regions], nth)

    def to(self, device: torch.device | str) -> EncodedRow:
        """A copy whose tensors are on another device."""
        return replace(
            self,
            text_states=self.text_states.to(device),
            region_states=self.region_states.to(device),
            pooled=self.pooled.to(device),
            whole=None if self.whole is None else self.whole.to(device),
            maps=None if self.maps is None else self.maps.to(device),
            states=None if self.states is None else {name: one.to(device) for name, one in self.states.items()},
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: words, regions, and shapes of states and maps."""
        return notebook.render_fragment(_describe_row(self))


@dataclass(frozen=True, kw_only=True, repr=False)
class Encoding:
    """A question as the model encodes it. Most tasks have one row; its fields are offered here too."""

    question: str
    images: tuple[Image.Image, ...]
    """As the detector saw them."""
    rows: tuple[EncodedRow, ...]
    """One for each image of a pair (NLVR2), one for each choice (VCR), else one."""

    def __repr__(self) -> str:
        """One line for each row."""
        return "\n".join(map(repr, self.rows))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator[EncodedRow]:
        """The rows."""
        return iter(self.rows)

    def word(self, text: str, nth: int | None = None) -> Word:
        """A word of the first row, see `EncodedRow.word`."""
        return self.rows[0].word(text, nth)

    def region(self, name: str, nth: int | None = None) -> NamedRegion:
        """A region of the first row, see `EncodedRow.region`."""
        return self.rows[0].region(name, nth)

    def to(self, device: torch.device | str) -> Encoding:
        """A copy whose tensors are on another device."""
        return replace(self, rows=tuple(row.to(device) for row in self.rows))

    def draw(self, highlight: Sequence[float] | Tensor | None = None, *, row: int = 0) -> Image.Image:
        """The images of a row, next to each other, with its named regions.

        Args:
            highlight: a weight, at least 0, for each of the row's regions, such as the attention of a word or the
                relevance of an answer; the heavier, the stronger a region is drawn.
        Raises:
            DataError: there is no such row, or not one weight per region.
        """
        if not 0 <= row < len(self.rows):
            raise DataError(f"no row {row}: the question has {len(self.rows)}, numbered from 0.")
        own = self.rows[row]
        weights = None if highlight is None else [float(weight) for weight in highlight]
        if weights is not None and len(weights) != len(own.regions):
            raise DataError(
                f"highlight must hold one weight for each of the row's {len(own.regions)} regions; found "
                f"{len(weights)}. Maps have what stands behind the regions, which is named with capture=True alone."
            )
        detected = [] if weights is None else [weights[region.at] for region in own.regions if not region.special]
        return place_side_by_side(
            [
                _draw_row(self.images[image], own, image, weights, max(detected, default=None))
                for image in _list_images(own)
            ]
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: each row's images with their named regions, its words, and shapes."""
        parts = [notebook.render_text(self.question, strong=True)]
        for number, row in enumerate(self.rows, 1):
            if len(self.rows) > 1:
                parts.append(notebook.render_text(f"row {number} of {len(self.rows)}", strong=True))
            pictures = [
                notebook.render_picture(_draw_row(self.images[image], row, image), f"image {image + 1}")
                for image in _list_images(row)
            ]
            parts.append(notebook.render_row([*pictures, f"<div>{''.join(_describe_row(row))}</div>"]))
        return notebook.render_fragment(parts)

    @property
    def words(self) -> tuple[Word, ...]:
        """Words of the first row."""
        return self.rows[0].words

    @property
    def regions(self) -> tuple[NamedRegion, ...]:
        """Regions of the first row."""
        return self.rows[0].regions

    @property
    def text_states(self) -> Tensor:
        """(T, Dt) of the first row."""
        return self.rows[0].text_states

    @property
    def region_states(self) -> Tensor:
        """(R, Dr) of the first row."""
        return self.rows[0].region_states

    @property
    def pooled(self) -> Tensor:
        """(Dp,) of the first row."""
        return self.rows[0].pooled

    @property
    def whole(self) -> Tensor | None:
        """(Dr,) of the first row, of models with a state of the whole image."""
        return self.rows[0].whole

    @property
    def maps(self) -> Maps | None:
        """Maps of the first row."""
        return self.rows[0].maps

    @property
    def states(self) -> dict[str, Tensor] | None:
        """States of the first row."""
        return self.rows[0].states


_Named = TypeVar("_Named", Word, NamedRegion)


def choose_one(kind: str, wanted: str, found: Sequence[_Named], names: Sequence[str], nth: int | None) -> _Named:
    """The only one found, or the nth.

    Args:
        kind: what is looked for, in a message.
        names: all that there are, in a message.
    Raises:
        DataError: none was found, or several and `nth` is None, or fewer than `nth`.
    """
    if not found:
        raise DataError(f"there is no {kind} {wanted!r}. {nearest(wanted, set(names), _list_names(names))}")
    if nth is None and len(found) > 1:
        raise DataError(f"{len(found)} {kind}s are called {wanted!r}: choose one with nth=1 to nth={len(found)}.")
    if nth is not None and not 1 <= nth <= len(found):
        raise DataError(f"nth must be 1 to {len(found)}, the number of {kind}s called {wanted!r}; found {nth}.")
    return found[0 if nth is None else nth - 1]


def _list_names(names: Sequence[str]) -> str:
    return f"There are: {', '.join(names) or 'none'}."


def _describe_row(row: EncodedRow) -> list[str]:
    """HTML parts: a table of words, one of regions, and the shapes of states and maps."""
    words = [
        (" ".join(map(str, word.tokens)), word.text + (f" ({' '.join(word.pieces)})" if len(word.pieces) > 1 else ""))
        for word in row.words
    ]
    regions = [
        (
            region.at,
            region.name,
            "" if region.confidence is None else f"{region.confidence:.0%}",
            "" if region.box is None else ", ".join(f"{corner:.0f}" for corner in region.box),
        )
        for region in row.regions
    ]
    parts = [
        notebook.render_row(
            [
                notebook.render_table(("tokens", "word"), words),
                notebook.render_table(("region", "name", "confidence", "box"), regions),
            ]
        )
    ]
    shapes = [("text_states", row.text_states), ("region_states", row.region_states), ("pooled", row.pooled)]
    shapes += [(f"states[{name!r}]", states) for name, states in (row.states or {}).items()]
    if row.maps is not None:
        shapes += [
            (f"maps.{field.name}[{name!r}]", probs)
            for field in fields(row.maps)
            for name, probs in getattr(row.maps, field.name).items()
        ]
    listed = notebook.render_table(("tensor", "shape"), [(name, tuple(one.shape)) for name, one in shapes])
    return [*parts, f"<details><summary>{len(shapes)} tensors</summary>{listed}</details>"]


def _list_images(row: EncodedRow) -> list[int]:
    """Numbers of the images that a row shows."""
    return sorted({region.image for region in row.regions if region.box is not None})


def _draw_row(
    image: Image.Image,
    row: EncodedRow,
    number: int,
    weights: Sequence[float] | None = None,
    full: float | None = None,
) -> Image.Image:
    """An image with the regions that a row has in it.

    Args:
        weights: one for each of the row's regions.
        full: weight that is drawn at full strength.
    """
    shown = [
        region for region in row.regions if region.box is not None and region.image == number and not region.special
    ]
    regions = RegionArray(
        features=np.zeros((len(shown), 0), np.float32),
        boxes=np.array([region.box for region in shown], np.float32).reshape(-1, 4),
        size=image.size,
        classes=np.arange(len(shown)),
    )
    highlight = None if weights is None else [weights[region.at] for region in shown]
    names = [region.name for region in shown]
    return draw_regions(image, regions, class_names=names, highlight=highlight, full=full, top=_MOST_DRAWN)
