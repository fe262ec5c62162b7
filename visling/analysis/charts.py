"""Line charts, as inline SVG of a page or as a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from visling.analysis.page import CHART_STYLE, escape

Point = tuple[float, float]
Series = Mapping[str, Sequence[Point]]
"""Name of a curve -> its points. A curve without any keeps its place in the order of colours."""

_WIDTH, _HEIGHT, _LEFT = 560, 250, 58
"""Size of a chart, and the space for the numbers on its left."""
_MOST_POINTS = 240
"""Most points of a curve; more are averaged in equal stretches of steps."""


@dataclass(frozen=True, kw_only=True)
class _Chart:
    """Curves, and the axes on which they are drawn."""

    title: str
    lines: Series
    across: str
    """What the horizontal axis is."""
    reach: tuple[float, float]
    """Of the horizontal axis."""
    range_: tuple[float, float]
    """Of the vertical axis."""


def render_chart(title: str, series: Series) -> str:
    """A line chart with a legend that gives the first and last values; empty if there is no point.

    Args:
        series: curves of (step, value) points, in any order; of one step the later point counts.
    """
    chart = _fit_axes(title, series)
    if chart is None:
        return ""
    legend = [
        f'<li><svg class="swatch" viewBox="0 0 22 8" aria-hidden="true">'
        f'<line class="{_choose_look(number)}" x1="1" x2="21" y1="4" y2="4"/></svg>'
        f"{escape(name)} <span>{_format_ends(points)}</span></li>"
        for number, (name, points) in enumerate(chart.lines.items())
        if points
    ]
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(_describe(chart))}">'
        f"{_draw_lines(chart)}</svg>"
        f'<ul class="legend">{"".join(legend)}</ul></figure>'
    )


def render_charts(charts: Mapping[str, Series]) -> str:
    """A file with the charts that `render_chart` draws, one below another; empty if there is no point.

    Args:
        charts: title -> curves.
    """
    return _render_file(_fit_all(charts))


def describe_charts(charts: Mapping[str, Series]) -> str:
    """The first and last values of every curve, for who cannot see the picture of `render_charts`."""
    return ". ".join(map(_describe, _fit_all(charts)))


def render_shares(title: str, series: Series, *, across: str) -> str:
    """A file with one chart of curves whose values on both axes are shares from 0 to 1.

    Args:
        series: curves of points in the order in which they are joined.
        across: what the horizontal axis is.
    """
    return _render_file([_Chart(title=title, lines=series, across=across, reach=(0.0, 1.0), range_=(0.0, 1.0))])


def _fit_all(charts: Mapping[str, Series]) -> list[_Chart]:
    return [chart for title, series in charts.items() if (chart := _fit_axes(title, series)) is not None]


def _fit_axes(title: str, series: Series) -> _Chart | None:
    """A chart over steps; None if there is no point."""
    # A resumed run may have logged a step twice; the later record counts.
    lines = {name: _thin_out(sorted(dict(points).items())) for name, points in series.items()}
    xs, ys = [x for p in lines.values() for x, _ in p], [y for p in lines.values() for _, y in p]
    if not xs:
        return None
    x0, x1 = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    y0, y1 = min(ys), max(ys)
    pad = (y1 - y0) * 0.06 or abs(y1) * 0.1 or 1.0
    # A quantity that is never negative is not shown on an axis that is.
    y0, y1 = (max(y0 - pad, 0.0) if y0 >= 0 else y0 - pad), y1 + pad
    return _Chart(title=title, lines=lines, across="step", reach=(x0, x1), range_=(y0, y1))


def _describe(chart: _Chart) -> str:
    spoken = [f"{name} {_format_ends(points)}" for name, points in chart.lines.items() if points]
    return f"{chart.title}: {'; '.join(spoken)}"


def _format_ends(points: Sequence[Point]) -> str:
    """First and last value of a curve."""
    return " → ".join(_format_short(value) for _, value in dict.fromkeys((points[0], points[-1])))


def _render_file(charts: Sequence[_Chart]) -> str:
    """An SVG file; empty without a chart."""
    if not charts:
        return ""
    drawn, top = [], 24
    for chart in charts:
        named = [(number, name) for number, (name, points) in enumerate(chart.lines.items()) if points]
        legend = "".join(
            f'<line class="{_choose_look(number)}" x1="{_LEFT}" x2="{_LEFT + 22}" y1="{y}" y2="{y}"/>'
            f'<text x="{_LEFT + 30}" y="{y + 4}">{escape(name)}</text>'
            for row, (number, name) in enumerate(named)
            for y in [_HEIGHT + 16 + 18 * row]
        )
        drawn.append(
            f'<g transform="translate(0 {top})">'
            f'<text x="{_LEFT}" y="-8">{escape(chart.title)}</text>{_draw_lines(chart)}{legend}</g>'
        )
        top += _HEIGHT + 18 * len(named) + 50
    height = top - 36
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}">'
        f"<title>{escape('; '.join(chart.title for chart in charts))}</title><style>{CHART_STYLE}</style>"
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>{"".join(drawn)}</svg>\n'
    )


def _choose_look(number: int) -> str:
    """Classes of the style sheet for a curve."""
    return f"line c{number % 6}" + (" dashed" if number % 12 >= 6 else "")


def _draw_lines(chart: _Chart) -> str:
    """Axes and curves as the inside of an SVG of `_WIDTH` x `_HEIGHT`."""
    (x0, x1), (y0, y1) = chart.reach, chart.range_
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
    marks.append(f'<text x="{middle:.0f}" y="{height - 2}" text-anchor="middle">{escape(chart.across)}</text>')
    for number, points in enumerate(chart.lines.values()):
        look = _choose_look(number)
        places = [at(x, y) for x, y in points]
        if len(places) == 1:
            marks.append(f'<circle class="{look} dot" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="4"/>')
        elif places:
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
