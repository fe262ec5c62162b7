"""The report's examples: wrong and right answers on cards, with their images and what the model looked at."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from visling.analysis.ask_again import AskAgain
from visling.analysis.drawing import draw_regions, encode_picture
from visling.analysis.examples import (
    Row,
    describe_answer,
    find_image_files,
    find_regions,
    is_right,
    list_boxes,
    list_candidates,
    list_images,
    sample_evenly,
    split_choices,
)
from visling.analysis.looked_at import LookedAt, look_again
from visling.analysis.page import escape
from visling.analysis.run_files import RunFiles, as_number
from visling.errors import DataError, VislingError
from visling.types import RegionStore
from visling.vision.images import read_image

_DRAWN_REGIONS = 12
"""Most regions drawn on an image."""
_IMAGE_SIZE = 440
"""Longest side of an image, pixels: about the width of a card, so that labels keep their size."""


Asks = Callable[[str], AskAgain]
"""Opens the model of the run with the examples of a split; raises a `VislingError` where that is not possible."""


def render_examples(
    run: RunFiles, examples: int, folder: Path | None, store: RegionStore | None, *, asks: Asks | None = None
) -> str:
    """The section of the page; what it lacks is added to `run.missing`.

    Args:
        examples: most examples shown, half of them wrong ones where there are enough.
        folder: of the images.
        store: regions to draw.
        asks: to show what the model looked at; None = not shown.
    """
    split, rows = next(((split, rows) for split, rows in run.details.items() if rows), ("", []))
    if not rows or examples < 1:
        run.missing += [] if rows else ["no details of individual examples: there is no gallery"]
        return '<section><h2 id="examples">Examples</h2><p>There are no examples to show.</p></section>'
    marked: dict[bool | None, list[Row]] = {True: [], False: [], None: []}
    for row in rows:
        marked[is_right(row)].append(row)
    shown: set[str] = set()
    wrong = sample_evenly(marked[False], max(examples // 2, examples - len(marked[True])), shown)
    right = sample_evenly(marked[True], examples - len(wrong), shown)
    unknown = sample_evenly(marked[None], examples - len(wrong) - len(right), shown)
    images = find_image_files(folder, {i for row in (*wrong, *right, *unknown) for i in list_images(row)})
    if folder is None:
        run.missing.append("no image folder is known: examples are shown without their images")
    elif not images:
        run.missing.append("none of the images was found in the image folder")
    groups = (
        ("Wrong", wrong, len(marked[False])),
        ("Right", right, len(marked[True])),
        ("Without a score", unknown, len(marked[None])),
    )
    looks: list[LookedAt | None] = [None] * (len(wrong) + len(right) + len(unknown))
    if asks is not None:
        looks = _look(run, asks, split, (*wrong, *right, *unknown)) or looks
    parts, seen = [], iter(looks)
    for title, chosen, total in groups:
        if chosen:
            cards = "".join(_render_card(row, images, store, next(seen)) for row in chosen)
            parts.append(f'<h3>{title} <small>{len(chosen)} of {total:,}</small></h3><div class="cards">{cards}</div>')
    note = f"From {escape(split)}, sampled evenly over the file and over all types; none is hand-picked."
    if any(looks):
        note += _LEGEND
    return f'<section><h2 id="examples">Examples</h2><p>{note}</p>{"".join(parts)}</section>'


_LEGEND = (
    " Outlines and the ground behind words show what the model looked at: the share that each has in the relevance for "
    "the answer it gave (gradient-weighted attention through all layers; special tokens left out). Relevance is an "
    "estimate, not a proof: <code>visling inspect</code> tests it by removing what it names."
)


def _look(run: RunFiles, asks: Asks, split: str, rows: Sequence[Row]) -> list[LookedAt | None] | None:
    """What the model looked at in each example; None where it cannot be asked again, which is noted."""
    try:
        return [*look_again(asks(split), rows)]
    except VislingError as error:
        reason = str(error)
        # Folders as seen from the run, so that the page can be shared.
        home = run.path.resolve()
        for named in (str(home), str(run.path), *_list_folders(run.about)):
            reason = reason.replace(named, os.path.relpath(named, home.parent))
        run.missing.append(f"what the model looked at is not shown: {reason}")
        return None


def _list_folders(about: Mapping[str, Any]) -> list[str]:
    """Folders that run.json names."""
    named = [about.get("store"), about.get("valid_store"), about.get("images"), *(about.get("data") or ())]
    return [name for name in named if isinstance(name, str) and os.path.isabs(name)]


def _render_card(row: Row, images: Mapping[str, Path], store: RegionStore | None, look: LookedAt | None) -> str:
    score = as_number(row.get("score"))
    colour, sign = {None: ("", ""), True: ("right", "✓ right"), False: ("wrong", "✗ wrong")}[is_right(row)]
    partly = f" ({score:.2g})" if score is not None and 0 < score < 1 else ""
    shown = (
        "".join(
            _render_image(image, images.get(image), store, look, number)
            for number, image in enumerate(list_images(row)[:2])
        )
        or '<p class="none">no image</p>'
    )
    kind = f'<span class="kind">{escape(row["type"])}</span>' if row.get("type") else ""
    confidence = as_number(row.get("confidence"))
    sure = "" if confidence is None else f" <small>{100 * confidence:.0f} %</small>"
    text, choices = split_choices(row)
    bars = []
    for answer, share in _name_candidates(row, choices, look):
        length = min(max(100 * share, 0.0), 100.0)
        bars.append(
            f"<li><span>{escape(answer)}</span>"
            f'<span class="bar"><span style="width:{length:.1f}%"></span></span><span>{length:.0f} %</span></li>'
        )
    return (
        f'<article class="card {colour}">{shown}<div class="words">'
        f'<p class="tags"><span class="sign">{sign}{partly}</span>{kind}</p>'
        f'<p class="question">{_render_words(text, look)}</p>'
        f"<p>Model: <strong>{escape(describe_answer(row.get('prediction'), choices) or 'nothing')}</strong>{sure}<br>"
        f"Truth: <strong>{escape(describe_answer(row.get('truth'), choices) or 'not given')}</strong></p>"
        f'<ul class="bars">{"".join(bars)}</ul>{_render_heaviest(look)}</div></article>'
    )


def _name_candidates(row: Row, choices: Sequence[str], look: LookedAt | None) -> list[tuple[str, float]]:
    """The best answers in words; a region by its name, where the model was asked again."""
    named = []
    boxes = list_boxes(row.get("boxes"))
    for place, (answer, share) in enumerate(list_candidates(row, 4)):
        region = look.name_box(boxes[place]) if look is not None and place < len(boxes) else None
        named.append((region or describe_answer(answer, choices), share))
    return named


def _render_words(text: str, look: LookedAt | None) -> str:
    """The text; where it is known, with what the model takes from each word as its ground."""
    if look is None or not look.words:
        return escape(text)
    most = look.strongest or 1.0
    return " ".join(
        f'<span class="look" style="--strength:{one.weight / most:.2f}" title="{_percent(one.weight)}">'
        f"{escape(one.text)}</span>"
        for one in look.words
    )


def _render_heaviest(look: LookedAt | None) -> str:
    """The regions that the answer takes most from, and how much of it comes from regions at all."""
    if look is None or not look.regions:
        return ""
    named = ", ".join(f"{escape(one.region.name)} <small>{_percent(one.weight)}</small>" for one in look.heaviest())
    shares = f"all regions {_percent(look.image_share)}, words {_percent(1 - look.image_share)}"
    return f'<p class="looked">Looked at: {named or "no region"}<br><small>{shares}</small></p>'


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _render_image(image: str, file: Path | None, store: RegionStore | None, look: LookedAt | None, number: int) -> str:
    """An image of a card; `number` is its number in the example."""
    if file is None:
        return f'<p class="none">image {escape(image)} was not found</p>'
    try:
        picture = Image.fromarray(read_image(file))
    except DataError:
        return f'<p class="none">image {escape(image)} cannot be read</p>'
    picture.thumbnail((_IMAGE_SIZE, _IMAGE_SIZE), Image.Resampling.LANCZOS)
    count = 0
    regions = find_regions(image, store)
    if regions is not None:
        count = min(len(regions), _DRAWN_REGIONS)
        names, attributes = getattr(store, "class_names", ()), getattr(store, "attribute_names", ())
        picture = draw_regions(
            picture,
            regions,
            class_names=names,
            attribute_names=attributes,
            highlight=None if look is None else look.weigh_boxes(regions.boxes.tolist(), number),
            full=None if look is None else look.strongest,
            top=count,
            scale=_IMAGE_SIZE // max(picture.size),
        )
    alt = f"Image {image}" + (f" with {count} regions drawn" if count else "")
    unseen = "" if regions is None or count else '<p class="none">the detector found nothing in this image</p>'
    return (
        f'<img alt="{escape(alt)}" width="{picture.width}" height="{picture.height}" src="{encode_picture(picture)}">'
        f"{unseen}"
    )
