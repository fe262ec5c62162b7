"""Matrices of layers and heads, or of words and regions, as inline SVG on one stated scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from visling.analysis.page import escape

_CELL, _FONT, _GLYPH = 22, 12, 7.0
"""Pixels: side of a cell, height of its labels, and mean width of a letter."""


def render_matrix(
    title: str,
    values: NDArray[np.floating],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    low: float = 0.0,
    high: float = 1.0,
    means: bool = False,
    numbers: bool = False,
) -> str:
    """A matrix of coloured cells with a title and a scale; each cell says its labels and number on hover.

    Args:
        values: (rows, columns); NaN is drawn as an empty cell.
        low, high: what the palest and the fullest colour stand for; the same numbers make matrices comparable.
        means: add the mean of each row as a last column, apart.
        numbers: also write each value, rounded, into its cell.
    """
    if means:
        with np.errstate(invalid="ignore"):
            last = np.array([np.nan if np.isnan(row).all() else np.nanmean(row) for row in values])
        values, columns = np.concatenate([values, last[:, None]], 1), (*columns, "mean")
    edge = _CELL // 3 if means else 0

    def across(number: int) -> float:
        """Left side of a column."""
        return left + number * _CELL + (edge if number == len(columns) - 1 else 0)

    left = 12 + max((len(name) for name in rows), default=0) * _GLYPH
    top = 34 + max((len(name) for name in columns), default=0) * _GLYPH * 0.75
    overhang = max((len(name) for name in columns), default=0) * _GLYPH * 0.65
    width = max(left + len(columns) * _CELL + edge + max(overhang, 60), len(title) * _GLYPH * 1.1)
    height = top + len(rows) * _CELL + 44
    marks = [f'<text x="0" y="{_FONT + 2}" font-weight="600">{escape(title)}</text>']
    for number, name in enumerate(columns):
        x = across(number) + _CELL * 0.65
        marks.append(f'<text transform="translate({x:.1f} {top - 6:.1f}) rotate(-50)">{escape(name)}</text>')
    for at, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = top + at * _CELL
        marks.append(f'<text x="{left - 6:.1f}" y="{y + _CELL * 0.68:.1f}" text-anchor="end">{escape(name)}</text>')
        for number, value in enumerate(row):
            marks.append(_draw_cell(across(number), y, float(value), f"{name}, {columns[number]}", low, high))
            if numbers and not np.isnan(value):
                x = across(number) + (_CELL - 2) / 2
                marks.append(
                    f'<text x="{x:.1f}" y="{y + _CELL * 0.62:.1f}" text-anchor="middle" font-size="{_FONT - 2}" '
                    f'pointer-events="none">{value:.0f}</text>'
                )
    y = top + len(rows) * _CELL + 14
    for step in range(6):
        marks.append(_draw_cell(left + step * _CELL, y, low + (high - low) * step / 5, "scale", low, high))
    marks.append(f'<text x="{left - 6:.1f}" y="{y + 15:.1f}" text-anchor="end">{low:g}</text>')
    marks.append(f'<text x="{left + 6 * _CELL + 4:.1f}" y="{y + 15:.1f}">{high:.3g}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'style="max-width:100%;height:auto" role="img" aria-label="{escape(title)}" '
        f'font-family="system-ui, sans-serif" font-size="{_FONT}" fill="currentColor">{"".join(marks)}</svg>'
    )


def _draw_cell(x: float, y: float, value: float, label: str, low: float, high: float) -> str:
    """A square whose opacity is the value's place on the scale."""
    if np.isnan(value):
        fill, said = 'fill="none"', "none"
    else:
        share = min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.0
        fill, said = f'fill="#1d78c8" fill-opacity="{share:.3f}"', f"{value:.3f}"
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{_CELL - 2}" height="{_CELL - 2}" {fill} stroke="currentColor" '
        f'stroke-opacity="0.25"><title>{escape(label)}: {said}</title></rect>'
    )
