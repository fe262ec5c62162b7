"""What a notebook shows of a result: HTML fragments that load nothing, hold their pictures and follow the notebook's
colours, light or dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from PIL import Image

from visling.analysis.drawing import encode_picture
from visling.analysis.page import escape

_BOX = "max-width:60rem;font-family:system-ui,sans-serif;line-height:1.4;overflow-wrap:anywhere"
_CELL = "text-align:left;padding:.15rem .8rem .15rem 0;vertical-align:middle"
_BAR = (
    "width:8rem;height:.6rem;border-radius:4px;background:linear-gradient(to right,#1d78c8 {percent:.1f}%,"
    "rgba(127,127,127,.25) {percent:.1f}%)"
)
_ROW = "display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start"


def render_fragment(parts: Iterable[str]) -> str:
    """HTML parts as one block."""
    return f'<div style="{_BOX}">{"".join(parts)}</div>'


def render_row(parts: Iterable[str]) -> str:
    """HTML parts next to each other where there is room."""
    return f'<div style="{_ROW}">{"".join(parts)}</div>'


def render_text(text: str, *, strong: bool = False) -> str:
    """A paragraph of plain text."""
    return f'<p style="margin:.3rem 0;font-weight:{600 if strong else 400}">{escape(text)}</p>'


def render_picture(picture: Image.Image, alt: str, *, widest: int = 420) -> str:
    """A picture inside the page.

    Args:
        alt: plain text for those who do not see it.
        widest: pixels.
    """
    return (
        f'<img alt="{escape(alt)}" style="width:100%;max-width:{min(widest, picture.width)}px;height:auto" '
        f'src="{encode_picture(picture)}">'
    )


def render_bars(top: Sequence[tuple[str, float]]) -> str:
    """Answers with their probabilities as bars, in the order of the list."""
    rows = "".join(
        f'<tr><th scope="row" style="{_CELL};font-weight:400">{escape(name)}</th><td style="{_CELL}">'
        f'<div style="{_BAR.format(percent=_to_percent(share))}"></div></td>'
        f'<td style="{_CELL}">{_to_percent(share):.1f} %</td></tr>'
        for name, share in top
    )
    return f'<table style="border-collapse:collapse">{rows}</table>'


def render_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of plain text."""
    head = "".join(f'<th scope="col" style="{_CELL}">{escape(name)}</th>' for name in columns)
    lines = ("".join(f'<td style="{_CELL}">{escape(value)}</td>' for value in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table style="border-collapse:collapse;font-size:.85em"><thead><tr>{head}</tr></thead>{body}</table>'


def _to_percent(share: float) -> float:
    return 100 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
