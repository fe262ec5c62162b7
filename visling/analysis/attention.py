"""Where a model looks when it reads one question: its attention maps by layer, head and direction, with names.

attention = model.attend("photo.jpg", "what colour is the star?")
attention.map("layers.2", head=3)            # words x regions
attention.top("star")                        # the regions that the word looks at most
attention.heads                              # statistics of all heads

Attention says where information could flow, not what decided the answer: see `analysis.relevance` for that.

Letters  H heads, M queries, N keys.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling.analysis import notebook
from visling.analysis.encoding import EncodedRow, Encoding, NamedRegion
from visling.analysis.head_statistics import CAUTION, DIRECTIONS, HeadStatistics, head_statistics, maps_by_direction
from visling.analysis.matrices import render_matrix
from visling.errors import ConfigError, DataError, nearest

Over = Literal["mean", "max"]
"""How several heads or layers become one map."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LabelledMap:
    """A map whose rows attend to its columns."""

    direction: str
    layers: tuple[str, ...]
    """One, or those that were joined."""
    heads: tuple[int, ...]
    """One, or those that were joined."""
    over: Over
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: NDArray[np.float32]
    """(rows, columns) shares of a row's attention."""

    def __repr__(self) -> str:
        """One line."""
        return f"LabelledMap({self._describe()}: {len(self.rows)} x {len(self.columns)})"

    def _describe(self) -> str:
        layers = self.layers[0] if len(self.layers) == 1 else f"{len(self.layers)} layers"
        heads = f"head {self.heads[0]}" if len(self.heads) == 1 else f"{self.over} of {len(self.heads)} heads"
        return f"{self.direction.replace('_', ' ')}, {layers}, {heads}"

    def _repr_html_(self) -> str:
        """The map as coloured cells, from 0 to its largest value."""
        high = float(self.values.max()) if self.values.size else 1.0
        return render_matrix(self._describe(), self.values, self.rows, self.columns, high=high)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "direction": self.direction,
            "layers": list(self.layers),
            "heads": list(self.heads),
            "over": self.over,
            "rows": list(self.rows),
            "columns": list(self.columns),
            "values": self.values.tolist(),
        }


@dataclass(frozen=True, kw_only=True)
class LookedAt:
    """A region that a word attends to."""

    region: NamedRegion
    mass: float
    """Share of the word's attention."""


@dataclass(frozen=True, eq=False, repr=False)
class Attention:
    """The attention of a model over one question. Tasks with several rows (a pair of images, choices) have maps of
    each: `row` chooses."""

    encoding: Encoding
    """Captured."""
    text_only: bool = False
    """Whether the model was trained without any region."""

    def __repr__(self) -> str:
        """A line, and one per direction."""
        row = self.encoding.rows[0]
        several = f", {len(self.encoding.rows)} rows" if len(self.encoding.rows) > 1 else ""
        question = textwrap.shorten(self.encoding.question, 60, placeholder=" ...")
        lines = [f'Attention("{question}", {len(row.regions)} regions{several})']
        lines += [f"  {name}: {', '.join(layers)}" for name, layers in self.directions.items()]
        return "\n".join(lines)

    @cached_property
    def heads(self) -> HeadStatistics:
        """Statistics of all heads over all rows of the question."""
        return head_statistics([self.encoding])

    @property
    def directions(self) -> dict[str, tuple[str, ...]]:
        """Direction -> the layers that have maps of it, in the order of computation."""
        return self._layers_by_direction(0)

    def map(
        self,
        layer: str | Sequence[str] | None = None,
        head: int | Sequence[int] | None = None,
        direction: str = "text_to_regions",
        words: bool = True,
        *,
        over: Over = "mean",
        row: int = 0,
    ) -> LabelledMap:
        """A map with names.

        Args:
            layer: name, or names of layers that are joined; None = all that have maps of this direction.
            head: number, from 0, or numbers of heads that are joined; None = all.
            direction: one of `DIRECTIONS`.
            words: join the pieces of a word: sum over the pieces that are attended to, mean over those that attend.
            over: mean or maximum over what is joined; pieces are joined first.
            row: of a question with several.
        Raises:
            ConfigError: no such direction, layer, head or row.
            DataError: the model has no maps of this direction, or none of this question.
        """
        maps = self._find_maps(direction, row)
        if isinstance(layer, str):
            names = [layer]
        else:
            names = list(maps) if layer is None else list(layer)
        if not names:
            raise ConfigError(f"an empty list of layers. Layers with maps {direction}: {', '.join(maps)}.")
        for name in names:
            _check_layer(name, maps, direction, self._layers_by_direction(row))
        numbers = _choose_heads(head, min(len(maps[name]) for name in names))
        own = self.encoding.rows[row]
        chosen = torch.cat([maps[name][list(numbers)] for name in names]).float()
        source, target = direction.split("_to_")
        if words:
            chosen = join_pieces(chosen, own, source, target)
        joined = chosen.amax(0) if over == "max" else chosen.mean(0)
        return LabelledMap(
            direction=direction,
            layers=tuple(names),
            heads=tuple(numbers),
            over=over,
            rows=_label(own, source, words),
            columns=_label(own, target, words),
            values=joined.cpu().numpy(),
        )

    def top(
        self,
        word: str,
        most: int = 5,
        *,
        nth: int | None = None,
        layer: str | Sequence[str] | None = None,
        head: int | Sequence[int] | None = None,
        over: Over = "mean",
        row: int = 0,
    ) -> tuple[LookedAt, ...]:
        """The detected regions that a word attends to most, the best first.

        Args:
            word, nth: see `EncodedRow.word`.
            layer, head, over, row: see `map`.
        Raises:
            ConfigError: see `map`.
            DataError: no such word, or the detector found nothing; see `map`.
        """
        found = self.map(layer, head, over=over, row=row)
        own = self.encoding.rows[row]
        masses = found.values[own.words.index(own.word(word, nth))]
        if all(region.special for region in own.regions):
            raise DataError(
                f"the detector found no region in the image that {word!r} could attend to. Ask about another image."
            )
        seen = [(float(mass), region) for mass, region in zip(masses, own.regions, strict=True) if not region.special]
        ranked = sorted(seen, key=lambda pair: -pair[0])
        return tuple(LookedAt(region=region, mass=mass) for mass, region in ranked[:most])

    def _repr_html_(self) -> str:
        """What a notebook shows: a matrix of layers and heads for each direction."""
        parts = [notebook.render_text(self.encoding.question, strong=True), self.heads._repr_html_()]
        return notebook.render_fragment([*parts, notebook.render_text(CAUTION)])

    def _layers_by_direction(self, row: int) -> dict[str, tuple[str, ...]]:
        maps = self.encoding.rows[row].maps
        assert maps is not None
        return {direction: tuple(layers) for direction, layers in maps_by_direction(maps).items()}

    def _find_maps(self, direction: str, row: int) -> dict[str, Tensor]:
        """Layer -> (H, M, N) of a direction."""
        if direction not in DIRECTIONS:
            raise ConfigError(f"no direction {direction!r}. {nearest(direction, DIRECTIONS)}")
        rows = self.encoding.rows
        if not 0 <= row < len(rows):
            raise ConfigError(f"no row {row}: the question has {len(rows)}, numbered from 0.")
        maps = rows[row].maps
        assert maps is not None
        known = maps_by_direction(maps)
        if self.text_only and "regions" in direction:
            raise DataError(
                f"this model was trained on the words alone: its maps {direction} would show nothing of an image. It "
                "has: text_to_text."
            )
        if direction in known:
            return known[direction]
        has = f"It has: {', '.join(known)}."
        if not rows[row].regions:
            raise DataError(
                f"the detector found no region in the image, so there are no maps {direction} of this question. {has} "
                "Ask about another image."
            )
        raise DataError(f"this model has no maps {direction}: no layer attends that way. {has}")


def attend(encoding: Encoding, *, text_only: bool = False) -> Attention:
    """The attention of an encoded question.

    Args:
        encoding: captured (`capture=True`).
        text_only: whether the model was trained without any region.
    Raises:
        DataError: it was encoded without its maps.
    """
    if any(row.maps is None for row in encoding.rows):
        raise DataError("the question was encoded without attention maps: use encode(..., capture=True).")
    return Attention(encoding, text_only=text_only)


def join_pieces(maps: Tensor, row: EncodedRow, source: str, target: str) -> Tensor:
    """Maps (H, M, N) between pieces as maps between words: the mean over the pieces of a word that attends, the sum
    over the pieces of one that is attended to. Regions stay as they are.

    Args:
        source, target: "text" or "regions".
    """
    if target == "text":
        maps = torch.stack([maps[..., list(word.tokens)].sum(-1) for word in row.words], -1)
    if source == "text":
        maps = torch.stack([maps[:, list(word.tokens)].mean(1) for word in row.words], 1)
    return maps


def _label(row: EncodedRow, stream: str, words: bool) -> tuple[str, ...]:
    """Names of the positions of one side of a map."""
    if stream == "regions":
        return tuple(region.name for region in row.regions)
    return tuple(name for word in row.words for name in ((word.text,) if words else word.pieces))


def _check_layer(name: str, maps: dict[str, Tensor], direction: str, directions: dict[str, tuple[str, ...]]) -> None:
    if name in maps:
        return
    if elsewhere := [other for other, layers in directions.items() if name in layers]:
        raise ConfigError(
            f"layer {name!r} has no maps {direction}; it has: {', '.join(elsewhere)}. Layers with maps {direction}: "
            f"{', '.join(maps)}."
        )
    raise ConfigError(f"no layer {name!r}. {nearest(name, maps)} Layers with maps {direction}: {', '.join(maps)}.")


def _choose_heads(head: int | Sequence[int] | None, count: int) -> list[int]:
    """Numbers of the heads that are meant."""
    numbers = list(range(count)) if head is None else [head] if isinstance(head, int) else list(head)
    wrong = [number for number in numbers if not 0 <= number < count]
    if wrong or not numbers:
        found = f"head {wrong[0]}" if wrong else "an empty list of heads"
        raise ConfigError(f"{found} is not there: a layer has {count} heads, numbered from 0 to {count - 1}.")
    return numbers
