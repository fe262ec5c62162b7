"""The index of a gallery as HTML: what the script `static/gallery.js` fills, and a plain list where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visling.analysis.gallery_entries import NOTHING_GAINED, Grouping, GroupScore
from visling.analysis.inspection_page import read_static
from visling.analysis.page import REPORT_STYLE, escape, render_facts, render_page

_SCRIPTS = ("gallery.js", "inspect.js")
_STYLES = ("gallery.css", "inspect.css")
_MOST_GROUPS = 40
"""Groups listed of one property."""


def write_static(out: Path) -> None:
    """Write the scripts of the pages.

    Raises:
        OSError: they cannot be written.
    """
    (out / "static").mkdir(exist_ok=True)
    for name in _SCRIPTS:
        (out / "static" / name).write_text(read_static(name), encoding="utf-8")


def render_index(
    *,
    title: str,
    facts: Mapping[str, str],
    groupings: Sequence[Grouping],
    notes: Sequence[str],
    entries: Sequence[Mapping[str, Any]],
    runs: Sequence[str],
) -> str:
    """The page.

    Args:
        facts: shown below the title.
        notes: what is missing.
        entries: what `examples.js` holds.
        runs: name of the run, and of the one that it is compared with.
    """
    missing = "".join(f"<li>{escape(note)}</li>" for note in notes)
    body = "\n".join(
        [
            f'<header><h1>{escape(title)}</h1><dl class="facts">{render_facts(dict(facts))}</dl></header>',
            f'<section class="missing"><h2>What is missing</h2><ul>{missing}</ul></section>' if notes else "",
            _render_alone(entries),
            _render_groupings(groupings, runs),
            _render_filters(entries, groupings, runs),
            f'<section id="gallery" data-runs="{escape(" | ".join(runs))}" aria-label="Examples"></section>',
            f"<noscript>{_render_list(entries)}</noscript>",
            '<dialog id="view" aria-label="Example"></dialog>',
            *(f'<script src="static/{name}"></script>' for name in reversed(_SCRIPTS)),
            '<script src="examples.js"></script>',
        ]
    )
    style = REPORT_STYLE + "".join(map(read_static, _STYLES))
    return render_page(title, body, style, files=True)


def _render_alone(entries: Sequence[Mapping[str, Any]]) -> str:
    """How many right answers need no image; only where the model was asked without one."""
    right = [entry for entry in entries if entry["even"] and entry["right"] and entry["blind"] is not None]
    if not right:
        return ""
    alone = sum(entry["blind"]["alone"] for entry in right)
    return (
        f"<p><strong>{100 * alone / len(right):.0f} %</strong> of the right answers rest on the words alone "
        f"({alone} of {len(right)} at even distances): the model answers the same without the image, and "
        f"the image adds less than {100 * NOTHING_GAINED:.0f} points to the answer's probability.</p>"
    )


def _render_groupings(groupings: Sequence[Grouping], runs: Sequence[str]) -> str:
    """Tables of groups, closed at first; a click on a group filters by it."""
    tables = []
    for grouping in groupings:
        heads = ["", "examples", "right", *[f"right, {name}" for name in runs[1:]], "confidence"]
        rows = "".join(_render_group(grouping.key, one, len(runs) > 1) for one in grouping.groups[:_MOST_GROUPS])
        tables.append(
            f"<table><caption>By {grouping.title}</caption><thead><tr>"
            + "".join(f'<th scope="col">{head}</th>' for head in heads)
            + f"</tr></thead><tbody>{rows}</tbody></table>"
        )
    if not tables:
        return ""
    return (
        "<details><summary>Scores of groups, over the whole split</summary>"
        f'<div class="tables">{"".join(tables)}</div></details>'
    )


def _render_group(key: str, one: GroupScore, compared: bool) -> str:
    cells = [_render_share(one.right), *([_render_share(one.other)] if compared else []), _render_share(one.confidence)]
    name = f'<button type="button" data-key="{key}" data-group="{escape(one.label)}">{escape(one.label)}</button>'
    return f'<tr><th scope="row">{name}</th><td class="count">{one.count:,}</td>{"".join(cells)}</tr>'


def _render_share(share: float | None) -> str:
    if share is None:
        return "<td>–</td>"
    return (
        f'<td><span class="number">{100 * share:.1f} %</span>'
        f'<span class="bar"><span style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></span></span></td>'
    )


def _render_filters(entries: Sequence[Mapping[str, Any]], groupings: Sequence[Grouping], runs: Sequence[str]) -> str:
    """The form above the examples; the script reads it."""
    fields = ['<label class="wide">Search <input type="search" name="words" placeholder="words, answers, ids"></label>']
    if any(entry["right"] is not None for entry in entries):
        options = {"": "right and wrong", "right": "right", "wrong": "wrong"}
        if len(runs) > 1:
            options |= {"gained": f"right only in {runs[0]}", "lost": f"right only in {runs[1]}"}
        fields.append(_render_select("Verdict", "verdict", options))
    answers = sorted({entry["answer"] for entry in entries})
    if 1 < len(answers) <= _MOST_ANSWERS:
        fields.append(_render_select("Answer", "answer", {"": "all"} | {name: name for name in answers}))
    for grouping in groupings:
        there = {entry["groups"][grouping.key] for entry in entries}
        names = [one.label for one in grouping.groups if one.label in there]
        title = grouping.title.capitalize()
        if 1 < len(names) <= _MOST_ANSWERS:
            fields.append(_render_select(title, grouping.key, {"": "all"} | {name: name for name in names}))
    if any(entry["blind"] is not None for entry in entries):
        options = {"": "all", "alone": "rests on the words alone", "image": "needs the image"}
        fields.append(_render_select("Without the image", "blind", options))
    if any(entry["removal"] is not None for entry in entries):
        options = {"": "all", "proven": "better than chance", "unproven": "not better"}
        fields.append(_render_select("Removal test", "removal", options))
    orders = {"": "as in the file", "unsure": "least confident first", "sure": "most confident first"}
    if len(runs) > 1:
        orders["difference"] = "runs differ most first"
    if any(entry["blind"] is not None for entry in entries):
        orders |= {"words": "image adds least first", "image": "image adds most first"}
    if any(entry["removal"] is not None for entry in entries):
        orders |= {"proven": "removal test, best first", "unproven": "removal test, worst first"}
    fields.append(_render_select("Order", "order", orders))
    return (
        f'<form id="filters" role="search" aria-label="Filters">{"".join(fields)}'
        '<button type="reset">Clear</button></form>'
        '<p id="count" role="status"></p>'
        '<p class="keys"><kbd>←</kbd> <kbd>→</kbd> <kbd>↑</kbd> <kbd>↓</kbd> move, <kbd>Enter</kbd> opens, '
        "<kbd>Esc</kbd> closes, <kbd>/</kbd> searches</p>"
    )


_MOST_ANSWERS = 200
"""Longest list to choose from; the search finds what has more values."""


def _render_select(label: str, name: str, options: Mapping[str, str]) -> str:
    listed = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options.items())
    return f'<label>{escape(label)} <select name="{escape(name)}">{listed}</select></label>'


def _render_list(entries: Sequence[Mapping[str, Any]]) -> str:
    """All examples as a plain table."""
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{escape(entry[name] or '')}</td>" for name in ("id", "text", "answer", "truth"))
        + f"<td>{'' if entry['right'] is None else 'right' if entry['right'] else 'wrong'}</td></tr>"
        for entry in entries
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("id", "text", "answer", "truth", ""))
    return (
        "<p>Filters and linked views need JavaScript; here is the plain list.</p>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    )
