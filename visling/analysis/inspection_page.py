"""The page of one or several inspections: one file that holds its script, style, numbers and pictures.

The script (static/inspect.js) draws the page from the documents in it. Where no script runs, the figure that is written
here stays: picture, boxes, words, answers. The policy in the page's head forbids every request to the outside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from visling.analysis.page import escape, render_page, replace_file
from visling.errors import RunError

Document = Mapping[str, Any]
"""Of `Inspection.to_json`."""

_MOST_NAMED, _NAMED, _MOST_LISTED = 3, 0.2, 12
"""Boxes that are filled and named, what they need of the largest score, and boxes in the list; as in inspect.js."""
_STRONG = 0.5
"""Strength from which a colour needs the other ink."""
_LABEL = 17
"""Height of a label on the still picture, which is 640 wide."""
_WIDTH = 640

_STYLE = """\
body { margin: 0; background: #fff; } main { max-width: 1320px; margin: 0 auto; padding: 1.6rem 1.2rem 3rem; }
@media (prefers-color-scheme: dark) { body { background: #14171c; } }
@media (max-width: 720px) { main { padding: 1rem 0.8rem 2rem; } }
@media print { body { background: #fff; } main { max-width: none; padding: 0; } }
"""
_STILL_STYLE = ".vl-still .vl-strong { color: var(--vl-paper); }\n"
_START = """
const visling_data = JSON.parse(document.getElementById("visling-data").textContent);
visling.open(document.getElementById("visling"), visling_data.documents, visling_data.state);
"""


@lru_cache
def read_static(name: str) -> str:
    """A file that pages are made of: inspect.js, inspect.css."""
    return resources.files("visling.analysis").joinpath("static", name).read_text(encoding="utf-8")


def write_page(target: Path, documents: Sequence[Document], state: Mapping[str, Any] | None = None) -> None:
    """Write the page of documents, side by side if there are several.

    Args:
        state: what is shown first, see DEFAULTS in inspect.js.
    Raises:
        RunError: it cannot be written.
    """
    try:
        replace_file(target, render_inspection(documents, state))
    except OSError as error:
        raise RunError(f"cannot write the page {target}: {error}. Name another file with --out.") from error


def render_inspection(documents: Sequence[Document], state: Mapping[str, Any] | None = None) -> str:
    """The page as HTML; see `write_page`."""
    data = json.dumps({"documents": documents, "state": state or {}}, separators=(",", ":"), allow_nan=False)
    body = (
        f'<div id="visling">{_draw_still(documents)}</div>\n'
        # "<" could end the element or begin a comment in it.
        f'<script type="application/json" id="visling-data">{data.replace("<", chr(92) + "u003c")}</script>'
    )
    title = f"{documents[0]['question']} · {', '.join(document['model']['name'] for document in documents)}"
    style = read_static("inspect.css") + _STILL_STYLE + _STYLE
    return render_page(title, body, style, images=True, script=read_static("inspect.js") + _START)


def render_still(document: Document) -> str:
    """The still figure of a document, as HTML that stands alone in a notebook."""
    return f"<style>{read_static('inspect.css')}{_STILL_STYLE}</style>{_draw_still([document])}"


def _draw_still(documents: Sequence[Document]) -> str:
    """The still figures of documents, side by side."""
    figures = "".join(_draw_document(document) for document in documents)
    columns = f'<div class="vl-columns" style="--vl-count:{len(documents)}">{figures}</div>'
    return f'<div class="vl vl-still">{columns}</div>'


def _draw_document(document: Document) -> str:
    """The still figure of a document: relevance of the first answer, as far as it is known."""
    model, answers = document["model"], document["answers"]
    bars = "".join(
        _draw_bar("vl-answer", answer["text"], answer["probability"], first=n == 0)
        for n, answer in enumerate(answers[:5])
    )
    notice = f'<p class="vl-notice">{escape(document["notice"])}</p>' if document["notice"] else ""
    blocks = "".join(_draw_row(document, number) for number in range(len(document["rows"])))
    facts = f"{model['name']} · {model['task']} · weights {model['checkpoint']}"
    return (
        f'<article class="vl-doc"><header class="vl-head"><h2>{escape(document["question"])}</h2>'
        f'<p class="vl-small">{escape(facts)}</p>{notice}</header>'
        f'<div class="vl-top"><section class="vl-answer-part">{bars}</section></div>'
        f'<p class="vl-small">{escape(_say_what_is_shown(document))}</p>{blocks}</article>'
    )


def _say_what_is_shown(document: Document) -> str:
    if not document["relevance"].get("relevance"):
        return "The model weighed no answer, so that nothing is highlighted."
    found = [
        (regions[n], region["name"])
        for number, row in enumerate(document["rows"])
        for regions in [_find_scores(document, number)[1]]
        for n, region in enumerate(row["regions"])
        if not region["special"] and regions[n] > 0
    ]
    best = f" What counted most: {max(found)[1]}." if found else ""
    return f"Colours: relevance of words and boxes for “{document['answers'][0]['text']}”.{best}"


def _find_scores(document: Document, number: int) -> tuple[list[float], list[float], float]:
    """Scores of the words and the regions of a row for the first answer, and the largest of what is not special."""
    row = document["rows"][number]
    found = document["relevance"].get("relevance")
    if not found:
        return [0.0] * len(row["words"]), [0.0] * len(row["regions"]), 1.0
    scores = found[0][number]
    words = [sum(scores["words_tokens"][token] for token in word["tokens"]) for word in row["words"]]
    regions: list[float] = scores["regions"]
    plain = [
        value
        for values, units in ((words, row["words"]), (regions, row["regions"]))
        for value, unit in zip(values, units, strict=True)
        if not unit["special"]
    ]
    return words, regions, max(plain, default=0.0) or 1.0


def _draw_row(document: Document, number: int) -> str:
    """Pictures, words and strongest boxes of a row."""
    row = document["rows"][number]
    words, regions, scale = _find_scores(document, number)
    pictures = "".join(_draw_picture(document["images"][image], image, row, regions, scale) for image in row["image"])
    if not pictures:  # the detector found nothing in them
        pictures = "".join(f'<img class="vl-figure" src="{image["src"]}" alt="">' for image in document["images"])
    order = sorted(
        (n for n in range(len(row["regions"])) if not row["regions"][n]["special"]), key=lambda n: -regions[n]
    )
    listed = "".join(
        _draw_bar("vl-item", row["regions"][n]["name"], regions[n] / scale, number=f"{regions[n]:.3g}")
        for n in order[:_MOST_LISTED]
    )
    label = f'<h4 class="vl-row-label">{escape(row["label"])}</h4>' if row["label"] else ""
    sentence = "".join(_draw_word(word, value, scale) for word, value in zip(row["words"], words, strict=True))
    return (
        f'<section class="vl-block"><div class="vl-pictures">{pictures}</div>'
        f'<div class="vl-side">{label}<div class="vl-sentence">{sentence}</div>{listed}</div></section>'
    )


def _draw_bar(kind: str, name: str, share: float, *, number: str = "", first: bool = False) -> str:
    width = 100 * min(max(share, 0.0), 1.0)
    colour = "" if kind == "vl-answer" else ";background:var(--vl-positive)"
    chosen = " vl-chosen" if first else ""
    return (
        f'<div class="{kind}{chosen}"><span class="vl-name">{escape(name)}</span>'
        f'<span class="vl-bar"><i style="width:{width:.1f}%{colour}"></i></span>'
        f'<span class="vl-number">{number or f"{share:.0%}"}</span></div>'
    )


def _draw_word(word: Mapping[str, Any], value: float, scale: float) -> str:
    strength = min(max(value / scale, 0.0), 1.0)
    kind = "vl-word" + (" vl-special" if word["special"] else "") + (" vl-strong" if strength > _STRONG else "")
    colour = f"color-mix(in oklab, var(--vl-positive) {100 * strength:.0f}%, var(--vl-track))"
    return f'<span class="{kind}" style="background:{colour}" title="{value:.3g}">{escape(word["text"])}</span>'


def _draw_picture(
    image: Mapping[str, Any], number: int, row: Mapping[str, Any], scores: Sequence[float], scale: float
) -> str:
    """An image with the boxes of a row, the strongest filled and named."""
    zoom = _WIDTH / image["width"]
    height = image["height"] * zoom
    shown = [
        n
        for n, region in enumerate(row["regions"])
        if region["box"] is not None and region["image"] == number and not region["special"]
    ]
    largest = max((scores[n] for n in shown), default=0.0)
    strongest = sorted((n for n in shown if scores[n] >= _NAMED * largest > 0), key=lambda n: -scores[n])[:_MOST_NAMED]
    shapes, labels = [], []
    for n in shown:
        x1, y1, x2, y2 = (corner * zoom for corner in row["regions"][n]["box"])
        strength = min(max(scores[n] / scale, 0.0), 1.0)
        fill = 0.1 + 0.25 * strength if n in strongest else 0
        place = f'x="{x1:.1f}" y="{y1:.1f}" width="{max(x2 - x1, 1):.1f}" height="{max(y2 - y1, 1):.1f}"'
        shapes.append(
            f'<rect class="vl-halo" {place} stroke-width="{3 + 3 * strength:.1f}" stroke-opacity="0.6"/>'
            f'<rect {place} stroke="var(--vl-box-positive)" stroke-width="{1 + 3 * strength:.1f}" '
            f'stroke-opacity="{0.35 + 0.65 * strength:.2f}" fill="var(--vl-box-positive)" fill-opacity="{fill:.2f}"/>'
        )
        if n in strongest:
            labels.append(_draw_label(row["regions"][n]["name"], x1, y1, y2))
    named = ", ".join(row["regions"][n]["name"] for n in strongest) or "none"
    return (
        f'<figure class="vl-figure"><svg class="vl-picture" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(f"Picture with {len(shown)} boxes; strongest: {named}")}">'
        f'<image href="{image["src"]}" width="{_WIDTH}" height="{height:.1f}" preserveAspectRatio="none"/>'
        f'{"".join(shapes)}<g class="vl-labels">{"".join(labels)}</g></svg></figure>'
    )


def _draw_label(name: str, x: float, above: float, below: float) -> str:
    """A name above its box, or below one at the upper edge."""
    width = 7.2 * len(name) + 10
    left = min(max(x, 0.0), max(_WIDTH - width, 0.0))
    top = above - _LABEL if above >= _LABEL else below
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{_LABEL}" rx="3" '
        'fill="var(--vl-box-positive)"/>'
        f'<text x="{left + 5:.1f}" y="{top + 12.5:.1f}" fill="#fff" textLength="{width - 10:.1f}" '
        f'lengthAdjust="spacingAndGlyphs">{escape(name)}</text>'
    )
