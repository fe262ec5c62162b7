"""The furniture of an HTML page that stands alone: it loads nothing and needs no script. The report, the comparison,
the claim and the inspection are built on it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from html import escape as _escape
from pathlib import Path
from typing import Any

from visling.errors import RunError


def escape(value: Any) -> str:
    """Text of a file or of a user, safe in HTML and in an attribute."""
    return _escape(str(value), quote=True)


def render_page(
    title: str, body: str, style: str, *, images: bool = False, files: bool = False, script: str = ""
) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML of the page below `<main>`.
        style: `REPORT_STYLE`, `COMPARISON_STYLE`, or a style sheet that begins with one of them.
        images: whether the page holds images, which then are data URIs.
        files: whether it loads images and scripts from its own folder, which may lie on a disk.
        script: the only script that the page may run, below its body.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if files:
        policy += "; img-src 'self' file: data:; script-src 'self' file:"
    elif images:
        policy += "; img-src data:"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
        policy += f"; script-src 'sha256-{digest}'"
        body += f"\n<script>{script}</script>"
    return _PAGE.format(title=escape(title), policy=policy, style=style, body=body)


def render_facts(facts: dict[str, str]) -> str:
    """Terms and their values, as the inside of a `<dl>`."""
    return "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(fact)}</dd></div>" for term, fact in facts.items())


def write_beside(
    file: Path, render: Callable[[Any], Mapping[str, str]], *, content: str, origin: str, remedy: str
) -> None:
    """Write what is made from a JSON file next to it.

    Args:
        render: contents of the file -> contents of others by name.
        content: what the file holds, for messages.
        origin: how to name the right folder, for a file that cannot be read.
        remedy: how to get a file of this version.
    Raises:
        RunError: the file cannot be read or holds something else, or nothing can be written.
    """
    try:
        pages = render(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {file}: {error}. {origin}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{file} is not {content} of this version: {error!r}. {remedy}") from error
    for name, page in pages.items():
        write_file(file.with_name(name), page)


def write_file(target: Path, content: str) -> None:
    """Write a result completely or not at all.

    Raises:
        RunError: it cannot be written.
    """
    try:
        replace_file(target, content)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error}. Free space or fix permissions.") from error


def replace_file(target: Path, content: str) -> None:
    """Write a file completely or not at all.

    Raises:
        OSError: it cannot be written.
    """
    part = target.with_name(f"{target.name}.part")
    part.write_text(content, encoding="utf-8")
    part.replace(target)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _palette(light: str, dark: str) -> str:
    """Colours by name, for light and dark screens: those of every page, then a page's own."""
    return (
        "\n:root { --paper: #fff; --card: #f6f7f9; --ink: #1c2028; --soft: #5c6470; --rule: #dfe3e8; "
        + light
        + " }\n@media (prefers-color-scheme: dark) { :root { "
        + "--paper: #14171c; --card: #1e2229; --ink: #e8eaee; --soft: #a2abb8; --rule: #353b45;\n  "
        + dark
        + " } }\n"
    )


# A backslash at the end of a line continues it: the rule is one line of the page.
_SHEET = """\
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
"""

_REPORT_COLOURS = _palette(
    """--accent: #1d78c8; --base: #9aa5b1;
  --good: #1b7f4d; --bad: #b3261e; --warn: #fff4d6; --look: #f2a33a;
  --c0: #1d78c8; --c1: #d1495b; --c2: #2a9d69; --c3: #b8770a; --c4: #8e4fd0; --c5: #0e8ea6;""",
    """--accent: #5fb0f5; --base: #6b7683; --good: #5fd39a; --bad: #ff8a80; --warn: #3a3014; --look: #b87514;
  --c0: #5fb0f5; --c1: #ff8593; --c2: #5fd39a; --c3: #f0b54a; --c4: #bd93f9; --c5: #56d0e6;""",
)

REPORT_STYLE = (
    _REPORT_COLOURS
    + "* { box-sizing: border-box; }\n"
    + _SHEET
    + """\
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--rule); }
h3 { margin: 1.4rem 0 .5rem; }
small { color: var(--soft); font-weight: normal; }
.score { font-size: 1.15rem; margin: .2rem 0; }
.score strong { font-size: 2rem; color: var(--accent); }
.facts { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: 1rem 0; }
.facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.missing { background: var(--warn); border-radius: 8px; padding: .8rem 1.1rem; }
.missing h2 { margin: 0; border: 0; font-size: 1rem; }
.missing ul { margin: .3rem 0 0; padding-left: 1.2rem; }
nav { margin-top: 1rem; } nav a { margin-right: 1rem; } a { color: var(--accent); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .4rem 0 1.2rem; min-width: 22rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--rule); \
vertical-align: middle; }
thead th { color: var(--soft); font-size: .85rem; } tbody th { font-weight: 500; }
.number { display: inline-block; min-width: 4.2em; font-variant-numeric: tabular-nums; } \
.count { font-variant-numeric: tabular-nums; }
.bar { display: inline-block; width: 8rem; height: .55rem; border-radius: 4px; background: var(--rule); \
overflow: hidden; }
.bar span { display: block; height: 100%; background: var(--accent); print-color-adjust: exact; \
-webkit-print-color-adjust: exact; }
.bar.base { width: 4rem; } .bar.base span { background: var(--base); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.chart { margin: 0; background: var(--card); border-radius: 8px; padding: .8rem; break-inside: avoid; }
.chart figcaption { font-weight: 600; } .chart svg { width: 100%; height: auto; }
.chart text { fill: var(--soft); font-size: 12px; } .grid { stroke: var(--rule); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .dashed { stroke-dasharray: 5 3; } \
.dot { fill: currentColor; }
.c0 { stroke: var(--c0); color: var(--c0); } .c1 { stroke: var(--c1); color: var(--c1); } .c2 { stroke: var(--c2); \
color: var(--c2); }
.c3 { stroke: var(--c3); color: var(--c3); } .c4 { stroke: var(--c4); color: var(--c4); } .c5 { stroke: var(--c5); \
color: var(--c5); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .3rem 0 0; padding: 0; \
font-size: .85rem; }
.legend span { color: var(--soft); font-variant-numeric: tabular-nums; } .chart .swatch { width: 22px; height: 8px; \
margin-right: .4rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; \
align-items: start; }
.card { background: var(--card); border-radius: 8px; border-top: 4px solid var(--rule); overflow: hidden; \
break-inside: avoid; }
.card.right { border-color: var(--good); } .card.wrong { border-color: var(--bad); }
.card img { display: block; width: 100%; height: auto; background: #fff; }
.card img + img { border-top: 8px solid var(--rule); }
.none { margin: 0; padding: 2rem 1rem; text-align: center; color: var(--soft); font-style: italic; \
overflow-wrap: anywhere; }
.words { padding: .6rem .9rem .9rem; overflow-wrap: anywhere; } .words p { margin: .2rem 0; }
.tags { display: flex; justify-content: space-between; gap: 1rem; font-size: .8rem; } .kind { color: var(--soft); }
.right .sign { color: var(--good); } .wrong .sign { color: var(--bad); } .sign { font-weight: 600; }
.question { font-weight: 600; }
.look { border-radius: 3px; padding: 0 .12em; background: color-mix(in srgb, var(--look) \
calc(var(--strength) * 75%), transparent); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.looked { font-size: .85rem; }
.bars { list-style: none; margin: .5rem 0 0; padding: 0; font-size: .82rem; }
.bars li { display: grid; grid-template-columns: minmax(4rem, 1fr) 5rem 3rem; gap: .5rem; align-items: center; }
.bars .bar { width: 100%; } .bars li > :last-child { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: var(--card); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; \
line-height: 1.4; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { body { font-size: 11pt; } main { max-width: none; padding: 0; } nav { display: none; }
  .wide, pre { overflow: visible; } pre { white-space: pre-wrap; overflow-wrap: anywhere; } \
h2, h3 { break-after: avoid; } }
"""
)

COMPARISON_STYLE = (
    _palette("--warn: #fff4d6;", "--warn: #3a3014;")
    + _SHEET
    + """\
h1 { font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
small, dt, thead th { color: var(--soft); } dt { font-size: .8rem; } dd { margin: 0 0 .6rem; \
overflow-wrap: anywhere; }
.missing { background: var(--warn); border-radius: 8px; padding: .8rem 1.1rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .3rem 1.2rem .3rem 0; \
border-bottom: 1px solid var(--rule); }
thead th { font-size: .85rem; } tbody th { font-weight: 500; } td { font-variant-numeric: tabular-nums; \
white-space: nowrap; }
pre { background: var(--card); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; }
@media print { .wide, pre { overflow: visible; } pre { white-space: pre-wrap; } h2 { break-after: avoid; } }
"""
)

CHART_STYLE = """\
text { fill: #5c6470; font: 12px system-ui, sans-serif; } .grid { stroke: #dfe3e8; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .dashed { stroke-dasharray: 5 3; }
.c0 { stroke: #1d78c8; } .c1 { stroke: #d1495b; } .c2 { stroke: #2a9d69; } .c3 { stroke: #b8770a; }
.c4 { stroke: #8e4fd0; } .c5 { stroke: #0e8ea6; }
"""
"""Of a chart that is a file of its own, in the report's colours."""
