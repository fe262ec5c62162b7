"""Hidden states in two dimensions: the first two principal components of a layer, words and regions together.

Components are computed over all positions of an export, shard by shard, in double precision; memory holds one shard and
a square matrix of the layer's width. A page and its JSON show an even sample of the positions.

Letters  N positions, D width of a state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from visling.analysis.page import REPORT_STYLE, escape, render_page
from visling.analysis.states import StateRow, States
from visling.errors import ConfigError, DataError, nearest

FORMAT: Final = "visling-projection-1"

_KINDS: Final = {"text": "word", "regions": "region"}
"""Stream -> what one of its positions is."""
_COLOURS: Final = ("#1d78c8", "#d1495b", "#2a9d69", "#b8770a", "#8e4fd0", "#0e8ea6", "#c2569b", "#7b8a12")
_CALLED: Final = {"modality": "modality", "class": "region class", "word": "word"}
"""Colouring in the style sheet -> its label on the page."""
_OTHER: Final = "#9aa5b1"
"""Of what is too rare for a colour of its own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Components:
    """The first principal components of many states."""

    mean: NDArray[np.float64]
    """(D,)."""
    axes: NDArray[np.float64]
    """(2, D), each of length 1; the loading that is largest in size is positive."""
    shares: NDArray[np.float64]
    """(2,) of the variance."""
    positions: int
    """N."""

    def project(self, states: NDArray[Any]) -> NDArray[np.float64]:
        """(n, 2) of states (n, D)."""
        return (states.astype(np.float64) - self.mean) @ self.axes.T


@dataclass(frozen=True, kw_only=True)
class Point:
    """A word piece or a region on the map."""

    x: float
    y: float
    kind: str
    """"word" or "region"."""
    text: str
    """The word, or the region's name."""
    label: str
    """The word piece, or the region's class."""
    id: str
    """Of its example."""
    row: int
    """Of the export."""
    position: int
    """In its row."""
    context: str
    """The words of its row."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Projection:
    """A layer in two dimensions."""

    layer: str
    components: Components
    points: tuple[Point, ...]
    """An even sample of the positions."""

    def __repr__(self) -> str:
        """One line."""
        first, second = self.components.shares
        return (
            f"Projection({self.layer}: {len(self.points)} of {self.components.positions} positions, "
            f"{first:.0%} and {second:.0%} of the variance)"
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "format": FORMAT,
            "layer": self.layer,
            "positions": self.components.positions,
            "variance_shares": self.components.shares.tolist(),
            "mean": self.components.mean.tolist(),
            "axes": self.components.axes.tolist(),
            "points": [{name: getattr(point, name) for name in Point.__dataclass_fields__} for point in self.points],
        }

    def to_html(self) -> str:
        """A page of its own: the points, coloured by modality, by region class or by word."""
        return _render(self)


def principal_components(blocks: Callable[[], Iterable[NDArray[Any]]]) -> Components:
    """The first two principal components of states that are read in blocks (n, D), twice: once for their mean, once for
    their covariance.

    Raises:
        DataError: fewer than three states, or states that are all alike.
    """
    count, total = 0, np.zeros(0)
    for block in blocks():
        if len(block):
            total = block.sum(0, dtype=np.float64) + (total if len(total) else 0.0)
            count += len(block)
    if count < 3:
        raise DataError(f"two components need at least three states; found {count}. Export more examples.")
    mean = total / count
    scatter = np.zeros((len(mean), len(mean)))
    for block in blocks():
        centred = block.astype(np.float64) - mean
        scatter += centred.T @ centred
    values, vectors = np.linalg.eigh(scatter)
    if not values[-1] > 0:
        raise DataError("the states are all alike: there is no direction in which they differ.")
    axes = vectors[:, :-3:-1].T
    axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1))
    return Components(mean=mean, axes=axes, shares=values[:-3:-1] / values.sum(), positions=count)


def project(states: States, layer: str, *, most: int = 4000, special: bool = False) -> Projection:
    """A layer of exported states in two dimensions.

    Args:
        layer: name; of a layer with states of text and regions, both are on the map.
        most: points on the map; components are computed over all positions.
        special: also what is no word or detected region ([CLS], the whole image).
    Raises:
        ConfigError: no such layer, its text and regions have different widths, or a number of points below 1.
        DataError: see `principal_components`.
    """
    if layer not in states.layers:
        raise ConfigError(f"{states.folder} holds no layer {layer!r}. {nearest(layer, states.layers)}")
    if most < 1:
        raise ConfigError(f"a map needs at least one point; found {most}.")
    streams = states.layers[layer]
    if len(set(streams.values())) > 1:
        widths = " and ".join(f"{stream} {width}" for stream, width in streams.items())
        raise ConfigError(
            f"the states of {layer!r} have different widths ({widths}), so that words and regions cannot be on one "
            f"map. Choose a layer of one stream: {', '.join(name for name, s in states.layers.items() if len(s) == 1)}."
        )

    def blocks() -> Iterable[NDArray[Any]]:
        for stream in streams:
            for values, _, hidden in states.blocks(layer, stream):
                yield values if special else values[~hidden]

    components = principal_components(blocks)
    step = max(1, -(-components.positions // most))
    points: list[Point] = []
    seen = 0
    for stream in streams:
        for values, rows, hidden in states.blocks(layer, stream):
            shown = np.arange(len(values)) if special else (~hidden).nonzero()[0]
            chosen = shown[(-seen) % step :: step]
            seen += len(shown)
            starts = np.searchsorted(rows, rows[chosen])
            placed = components.project(values[chosen])
            points += [
                _describe(states[row], row, stream, at, x, y)
                for row, at, (x, y) in zip(
                    rows[chosen].tolist(), (chosen - starts).tolist(), placed.tolist(), strict=True
                )
            ]
    return Projection(layer=layer, components=components, points=tuple(points))


def _describe(row: StateRow, number: int, stream: str, at: int, x: float, y: float) -> Point:
    if stream == "text":
        word = next(word for word in row.words if at in word.tokens)
        text, label = word.text, word.pieces[word.tokens.index(at)]
    else:
        region = row.regions[at]
        text, label = region.name, region.class_name or region.name
    context = " ".join(word.text for word in row.words if not word.special)
    return Point(
        x=x, y=y, kind=_KINDS[stream], text=text, label=label, id=row.id, row=number, position=at, context=context
    )


_WIDTH, _HEIGHT, _EDGE = 1000, 680, 24


def _render(projection: Projection) -> str:
    """The page. Which colouring is shown is a choice of style sheets: it needs no script."""
    points = projection.points
    colourings = {
        "modality": [point.kind for point in points],
        "class": [point.label if point.kind == "region" else "" for point in points],
        "word": [point.label if point.kind == "word" else "" for point in points],
    }
    ranks = {name: _rank(labels) for name, labels in colourings.items() if any(labels)}
    xs, ys = np.array([point.x for point in points]), np.array([point.y for point in points])
    across, down = _fit(xs, _WIDTH), _HEIGHT - _fit(ys, _HEIGHT)
    marks = []
    for number, (point, x, y) in enumerate(zip(points, across.tolist(), down.tolist(), strict=True)):
        labels = {name: colourings[name][number] for name in ranks}
        classes = " ".join(f"{name}-{ranks[name][label]}" for name, label in labels.items() if label in ranks[name])
        shape = (
            f'<circle class="{classes}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
            if point.kind == "word"
            else f'<rect class="{classes}" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7">'
        )
        title = f"{point.text} ({point.kind}) in “{point.context}”, example {point.id}"
        marks.append(f"{shape}<title>{escape(title)}</title></{shape[1:].partition(' ')[0]}>")
    choices, legends, rules = [], [], []
    for name, rank in ranks.items():
        checked = " checked" if name == "modality" else ""
        choices.append(
            f'<input type="radio" name="by" id="by-{name}"{checked}><label for="by-{name}">by {_CALLED[name]}</label>'
        )
        legends.append(_render_legend(name, rank))
        rules += [
            f"#by-{name}:checked ~ figure .{name}-{number} {{ fill: {colour}; fill-opacity: .8; }}"
            for number, colour in enumerate(_COLOURS[: len(rank)])
        ]
        rules.append(f"#by-{name}:checked ~ figure .legend-{name} {{ display: flex; }}")
    first, second = projection.components.shares
    sampled = (
        f"{len(points)} of {projection.components.positions} positions are drawn, evenly chosen"
        if len(points) < projection.components.positions
        else f"all {len(points)} positions are drawn"
    )
    body = (
        f"<h1>Words and regions in {escape(projection.layer)}</h1>"
        f"<p>The first two principal components of the hidden states, with {first:.1%} and {second:.1%} of the "
        f"variance; {sampled}. Circles are word pieces, squares are regions. Point at one to see what it is.</p>"
        f'<div class="map">{"".join(choices)}<figure>{"".join(legends)}'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{len(points)} positions of {escape(projection.layer)} in two dimensions">{"".join(marks)}</svg>'
        "</figure></div>"
    )
    return render_page(f"Projection of {projection.layer}", body, REPORT_STYLE + _STYLE + "\n".join(rules))


def _rank(labels: Sequence[str]) -> dict[str, int]:
    """The most frequent labels, each with the number of its colour."""
    counts = Counter(label for label in labels if label)
    ordered = sorted(counts, key=lambda label: (-counts[label], label))
    return {label: number for number, label in enumerate(ordered[: len(_COLOURS)])}


def _fit(values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Values spread from one edge of the drawing to the other."""
    low, high = float(values.min()), float(values.max())
    return _EDGE + (values - low) / (high - low or 1.0) * (length - 2 * _EDGE)


def _render_legend(name: str, rank: dict[str, int]) -> str:
    entries = "".join(
        f'<li><svg class="swatch" viewBox="0 0 12 12" aria-hidden="true"><rect width="12" height="12" rx="3" '
        f'fill="{_COLOURS[number]}"/></svg>{escape(label)}</li>'
        for label, number in rank.items()
    )
    return f'<ul class="legend legend-{name}">{entries}</ul>'


_STYLE = f"""
.map input {{ margin: 0 .3rem 0 0; }} .map label {{ margin-right: 1.4rem; white-space: nowrap; }}
.map figure {{ margin: .8rem 0; background: var(--card); border-radius: 8px; padding: .8rem; }}
.map figure > svg {{ width: 100%; height: auto; }} .map figure > svg * {{ fill: {_OTHER}; fill-opacity: .35; }}
.map .legend {{ display: none; }} .map .swatch {{ width: 12px; height: 12px; margin-right: .4rem; }}
"""
