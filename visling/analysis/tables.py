"""Tables of results: text in cells, as Markdown and as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visling.analysis.page import escape


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text in cells; the first column names the rows."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def format_number(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else form.format(value)


def format_spread(values: Mapping[str, Any] | None, form: str, unit: str = "") -> str:
    """Mean ± spread; a dash without values, no spread with only one."""
    if values is None or values["mean"] is None:
        return "–"
    around = "" if values["spread"] is None else f" ± {form.replace('+', '').format(values['spread'])}"
    return f"{form.format(values['mean'])}{around}{unit}"


def render_markdown(table: Table) -> str:
    """A table below its title, with its note."""
    lines = render_rows([[escape_markdown(cell) for cell in row] for row in (table.head, *table.rows)])
    return "\n\n".join(
        [f"## {escape_markdown(table.title)}", lines, *([escape_markdown(table.note)] if table.note else [])]
    )


def render_rows(rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown from cells that are Markdown; the first row is the head."""
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest))


def escape_markdown(text: str) -> str:
    """Text of a file or of a user on one line of Markdown, which neither ends a cell nor begins a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def render_html(table: Table) -> str:
    """A section of a page."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in table.rows
    )
    note = f"<p><small>{escape(table.note)}</small></p>" if table.note else ""
    return (
        f"<section><h2>{escape(table.title)}</h2>"
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}</section>"
    )
