"""Line charts of a page, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from visling.analysis.page import CHART_STYLE, escape

Point = tuple[float, float]

_WIDTH, _HEIGHT, _LEFT = 560, 250, 58
"""Size of a chart, and the space for the numbers on its left."""
_MOST_POINTS = 240
"""Most points of a curve; more are averaged in equal stretches of steps."""


def render_chart(title: str, series: Mapping[str, Sequence[Point]]) -> str:
    """A line chart with a legend that gives the first and last values; empty if there is no point.

    Args:
        series: name of a curve -> its (step, value) points, in any order; of one step the later point counts.
    """
    # A resumed run may have logged a step twice; the later record counts.
    lines = {name: _thin_out(sorted(dict(points).items())) for name, points in series.items() if points}
    if not lines:
        return ""
    xs, ys = [x for p in lines.values() for x, _ in p], [y for p in lines.values() for _, y in p]
    x0, x1 = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    y0, y1 = min(ys), max(ys)
    pad = (y1 - y0) * 0.06 or abs(y1) * 0.1 or 1.0
    # A quantity that is never negative is not shown on an axis that is.
    y0, y1 = (max(y0 - pad, 0.0) if y0 >= 0 else y0 - pad), y1 + pad
    marks = _draw_lines(lines, (x0, x1), (y0, y1), "step")
    legend, spoken = [], []
    for number, (name, points) in enumerate(lines.items()):
        story = " → ".join(_format_short(value) for _, value in dict.fromkeys((points[0], points[-1])))
        swatch = (
            '<svg class="swatch" viewBox="0 0 22 8" aria-hidden="true">'
            f'<line class="{_choose_look(number)}" x1="1" x2="21" y1="4" y2="4"/></svg>'
        )
        legend.append(f"<li>{swatch}{escape(name)} <span>{story}</span></li>")
        spoken.append(f"{name} {story}")
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}: {escape("; ".join(spoken))}">'
        f"{marks}</svg>"
        f'<ul class="legend">{"".join(legend)}</ul></figure>'
    )


def render_shares(title: str, series: Mapping[str, Sequence[Point]], *, across: str) -> str:
    """A chart that is a file of its own, of curves whose values on both axes are shares from 0 to 1.

    Args:
        series: name of a curve -> its points, in the order in which they are joined.
        across: what the horizontal axis is.
    """
    marks = _draw_lines(series, (0.0, 1.0), (0.0, 1.0), across)
    rows = "".join(
        f'<line class="{_choose_look(number)}" x1="{_LEFT}" x2="{_LEFT + 22}" y1="{y}" y2="{y}"/>'
        f'<text x="{_LEFT + 30}" y="{y + 4}">{escape(name)}</text>'
        for number, name in enumerate(series)
        for y in [_HEIGHT + 16 + 18 * number]
    )
    height = _HEIGHT + 14 + 18 * len(series)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -24 {_WIDTH} {height + 24}" width="{_WIDTH}">'
        f"<title>{escape(title)}</title><style>{CHART_STYLE}</style>"
        f'<rect x="0" y="-24" width="{_WIDTH}" height="{height + 24}" fill="#fff"/>'
        f'<text x="{_LEFT}" y="-8">{escape(title)}</text>{marks}{rows}</svg>\n'
    )


def _choose_look(number: int) -> str:
    """Classes of the style sheet for a curve."""
    return f"line c{number % 6}" + (" dashed" if number % 12 >= 6 else "")


def _draw_lines(
    lines: Mapping[str, Sequence[Point]], reach: tuple[float, float], range_: tuple[float, float], across: str
) -> str:
    """Axes and curves as the inside of an SVG of `_WIDTH` x `_HEIGHT`.

    Args:
        reach: of the horizontal axis.
        range_: of the vertical axis.
        across: what the horizontal axis is.
    """
    (x0, x1), (y0, y1) = reach, range_
    width, height, left, bottom, top, right = _WIDTH, _HEIGHT, _LEFT, 34, 12, 14

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    marks = []
    for tick in _find_ticks(y0, y1):
        y = at(x0, tick)[1]
        marks.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{_format_short(tick)}</text>')
    for tick in _find_ticks(x0, x1):
        x = at(tick, y0)[0]
        marks.append(f'<text x="{x:.1f}" y="{height - bottom + 17}" text-anchor="middle">{_format_short(tick)}</text>')
    middle = (left + width - right) / 2
    marks.append(f'<text x="{middle:.0f}" y="{height - 2}" text-anchor="middle">{escape(across)}</text>')
    for number, points in enumerate(lines.values()):
        look = _choose_look(number)
        places = [at(x, y) for x, y in points]
        if len(places) == 1:
            marks.append(f'<circle class="{look} dot" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="4"/>')
        else:
            marks.append(f'<polyline class="{look}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
    return "".join(marks)


def _thin_out(points: list[Point]) -> list[Point]:
    """At most `_MOST_POINTS` points, each the mean of an equal share of them."""
    if len(points) <= _MOST_POINTS:
        return points
    edges = [round(i * len(points) / _MOST_POINTS) for i in range(_MOST_POINTS + 1)]
    parts = [points[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _find_ticks(low: float, high: float) -> list[float]:
    """Round numbers within a range, three to six of them."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _format_short(value: float) -> str:
    """A number for an axis or a legend."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
