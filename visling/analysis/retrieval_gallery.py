"""Caption retrieval before and after fine-tuning, side by side: the images that both models rank first.

Source   ViLBERT, section 4 (zero-shot caption-based image retrieval): what pre-training alone finds.
Letters  I images, T captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visling.analysis.examples import find_image_files
from visling.analysis.page import REPORT_STYLE, escape, render_page, replace_file
from visling.analysis.thumbnails import Thumbnails
from visling.errors import RunError
from visling.metrics.ranking import CUTS, best_ranks

_TOP = 5
"""Images shown of a ranking."""
_STEPS = (1, 5, 10, 50)
"""Last ranks of the groups in the table of how captions moved; the last group is open."""


@dataclass(frozen=True, kw_only=True)
class RankedImages:
    """How a model ranks the images of a split for its captions."""

    name: str
    scores: NDArray[np.float32]
    """(I, T), higher is better."""
    numbers: Mapping[str, float]
    """Scores of the report by name: `image_r1`, `text_r1`, ..."""
    zero_shot: bool = False
    """Whether it ranks by the matching head of its pre-training."""


@dataclass(frozen=True, kw_only=True)
class Captions:
    """The captions of a split and their images."""

    images: tuple[str, ...]
    """Ids in the order of the scores."""
    texts: tuple[str, ...]
    owners: tuple[str, ...]
    """Image that each caption describes."""


def write_retrieval_gallery(
    out: Path,
    captions: Captions,
    before: RankedImages,
    after: RankedImages,
    *,
    split: str,
    images: Path,
    examples: int = 12,
    moved: int = 4,
) -> Path:
    """Write the page, index.html, and its thumbnails into an empty folder; returns the page.

    Args:
        images: folder of the images, searched with its sub-folders.
        examples: captions at even distances over the split.
        moved: captions whose right image rose most, and as many of those in which it fell most.
    Raises:
        RunError: it cannot be written.
    """
    numbers = {image: number for number, image in enumerate(captions.images)}
    owners = np.array([numbers[owner] for owner in captions.owners])
    ranks = np.stack(
        [best_ranks(model.scores.T, owners, np.arange(len(numbers))) + 1 for model in (before, after)]
    )  # (2, T), from 1
    groups = _choose_captions(ranks, owners, examples, moved)
    best = {
        number: [np.argsort(-model.scores[:, number], kind="stable")[:_TOP] for model in (before, after)]
        for numbers_ in groups.values()
        for number in numbers_
    }
    shown = {captions.owners[number] for number in best}
    shown |= {captions.images[at] for rows in best.values() for row in rows for at in row}
    thumbnails = Thumbnails(out, find_image_files(images, shown))
    try:
        parts = [_render_head(split, captions, before, after, ranks)]
        for title, chosen in groups.items():
            cards = "".join(
                _render_caption(captions, number, best[number], (before, after), ranks[:, number], thumbnails)
                for number in chosen
            )
            parts.append(f"<section><h2>{title}</h2>{cards}</section>" if cards else "")
        page = out / "index.html"
        title = f"Caption retrieval on {split}: before and after fine-tuning"
        replace_file(page, render_page(title, "\n".join(parts), REPORT_STYLE + _STYLE, files=True))
    except OSError as error:
        raise RunError(
            f"cannot write the gallery {out}: {error}. Free space or name another folder with --out."
        ) from error
    return page


def _choose_captions(
    ranks: NDArray[np.int64], owners: NDArray[np.int64], examples: int, moved: int
) -> dict[str, list[int]]:
    """Title -> captions; a caption is shown once."""
    total = ranks.shape[1]
    count = min(examples, total)
    even = [int((k + 0.5) * total / count) for k in range(count)]
    gain = np.log(ranks[0]) - np.log(ranks[1])
    order = [int(n) for n in np.argsort(-gain, kind="stable") if n not in even]

    def pick(candidates: Sequence[int]) -> list[int]:
        found: dict[int, int] = {}  # one caption of an image
        for number in candidates:
            found.setdefault(int(owners[number]), number)
        return list(found.values())[:moved]

    return {
        "Captions at even distances over the split": even,
        "Where the right image rose most": pick([n for n in order if gain[n] > 0]),
        "Where it fell most": pick([n for n in reversed(order) if gain[n] < 0]),
    }


def _render_head(
    split: str, captions: Captions, before: RankedImages, after: RankedImages, ranks: NDArray[np.int64]
) -> str:
    images = "image" if len(captions.images) == 1 else "images"
    zero_shot = ", by the matching head of its pre-training, without any fine-tuning" if before.zero_shot else ""
    tables = "".join(_render_scores(of, title, captions, before, after) for of, title in _DIRECTIONS.items())
    return (
        f"<header><h1>Caption retrieval on {escape(split)}: before and after fine-tuning</h1>"
        f"<p>{len(captions.texts):,} captions, {len(captions.images):,} {images}. Before: "
        f"<code>{escape(before.name)}</code>{zero_shot}. After: "
        f'<code>{escape(after.name)}</code>.</p></header><div class="tables">{tables}{_render_moves(ranks)}</div>'
    )


_DIRECTIONS = {"image": "Find the image of a caption", "text": "Find a caption of an image"}


def _render_scores(of: str, title: str, captions: Captions, before: RankedImages, after: RankedImages) -> str:
    """Recalls and median rank of one direction of both models, and what a random order would reach."""
    rows = []
    for name, label in ((f"r{cut}", f"R@{cut}") for cut in CUTS):
        numbers = (before.numbers[f"{of}_{name}"], after.numbers[f"{of}_{name}"], _guess(of, int(name[1:]), captions))
        rows.append((label, [f"{number:.1f} %" for number in numbers]))
    rank = f"{of}_median_rank"
    rows.append(("median rank", [f"{model.numbers[rank]:.0f}" for model in (before, after)] + [""]))
    body = "".join(
        f'<tr><th scope="row">{label}</th>' + "".join(f'<td class="count">{cell}</td>' for cell in cells) + "</tr>"
        for label, cells in rows
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("", "before", "after", "chance"))
    return f"<table><caption>{title}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _guess(of: str, cut: int, captions: Captions) -> float:
    """Recall of a random order, in percent: with k right ones among n candidates, 1 - C(n-k, cut) / C(n, cut)."""
    total = len(captions.images if of == "image" else captions.texts)
    right = 1.0 if of == "image" else len(captions.texts) / len(captions.images)
    missed = 1.0
    for drawn in range(min(cut, total)):
        missed *= max(total - right - drawn, 0.0) / (total - drawn)
    return 100 * (1 - missed)


def _render_moves(ranks: NDArray[np.int64]) -> str:
    """How many captions moved from which group of ranks to which."""
    labels = [
        *(str(last) if last == first else f"{first}–{last}" for first, last in zip((1, 2, 6, 11), _STEPS, strict=True)),
        f"> {_STEPS[-1]}",
    ]
    at = np.searchsorted(_STEPS, ranks)  # (2, T)
    counts = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(counts, (at[0], at[1]), 1)
    most = max(int(counts.max()), 1)
    body = "".join(
        f'<tr><th scope="row">{label}</th>'
        + "".join(f'<td class="count" style="--share:{count / most:.3f}">{count or "·"}</td>' for count in row)
        + "</tr>"
        for label, row in zip(labels, counts.tolist(), strict=True)
    )
    heads = "".join(f'<th scope="col">{label}</th>' for label in labels)
    return (
        '<table class="moves"><caption>Captions by rank of the right image, before (down) and after (across)</caption>'
        f'<thead><tr><th scope="col"></th>{heads}</tr></thead><tbody>{body}</tbody></table>'
    )


def _render_caption(
    captions: Captions,
    number: int,
    best: Sequence[NDArray[np.int64]],
    models: Sequence[RankedImages],
    ranks: NDArray[np.int64],
    thumbnails: Thumbnails,
) -> str:
    owner = captions.owners[number]
    rows = []
    for title, model, places, rank in zip(("before", "after"), models, best, ranks.tolist(), strict=True):
        shown = [(place, captions.images[at]) for place, at in enumerate(places.tolist(), 1)]
        figures = "".join(
            _render_image(
                image, place, float(model.scores[captions.images.index(image), number]), image == owner, thumbnails
            )
            for place, image in shown
        )
        if rank > len(shown):
            score = float(model.scores[captions.images.index(owner), number])
            figures += '<span class="gap" aria-hidden="true">…</span>' + _render_image(
                owner, rank, score, True, thumbnails
            )
        rows.append(f'<h4>{title}: rank {rank}</h4><div class="ranking">{figures}</div>')
    change = "stays" if ranks[0] == ranks[1] else "rises" if ranks[1] < ranks[0] else "falls"
    return (
        f'<article class="caption {change}"><h3>{escape(captions.texts[number])}</h3>'
        f'<p class="rank">rank {ranks[0]} → <strong>{ranks[1]}</strong></p>{"".join(rows)}</article>'
    )


def _render_image(image: str, place: int, score: float, right: bool, thumbnails: Thumbnails) -> str:
    source = thumbnails.write(image)
    mark = " ✓" if right else ""
    alt = f"Image {image}, rank {place}" + (", the right one" if right else "")
    picture = (
        f'<p class="none">image {escape(image)} was not found</p>'
        if source is None
        else f'<img loading="lazy" alt="{escape(alt)}" src="{escape(source)}">'
    )
    look = ' class="true"' if right else ""
    return f"<figure{look}>{picture}<figcaption>{place}{mark} <small>{score:.2f}</small></figcaption></figure>"


_STYLE = """\
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; align-items: start; } .tables table { min-width: 0; }
.caption { background: var(--card); border-radius: 8px; border-left: 4px solid var(--rule); margin: 0 0 1rem; \
padding: .7rem 1rem; break-inside: avoid; display: grid; grid-template-columns: 1fr auto; gap: 0 1rem; }
.caption.rises { border-color: var(--good); } .caption.falls { border-color: var(--bad); }
.caption h3 { margin: 0; font-size: 1.05rem; } .caption h4 { margin: .5rem 0 .2rem; font-size: .85rem; \
font-weight: 600; color: var(--soft); grid-column: 1 / -1; }
.rank { margin: 0; white-space: nowrap; font-variant-numeric: tabular-nums; }
.ranking { grid-column: 1 / -1; display: flex; gap: .5rem; overflow-x: auto; padding: 4px; align-items: end; }
.ranking figure { margin: 0; flex: 0 0 clamp(76px, 15%, 132px); border-radius: 6px; }
.ranking img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff; \
border-radius: 4px; }
.ranking figcaption { font-size: .78rem; font-variant-numeric: tabular-nums; padding: 0 .2rem; }
.ranking .true { outline: 3px solid var(--good); } .ranking .true figcaption { color: var(--good); font-weight: 600; }
.ranking .gap { align-self: center; color: var(--soft); } .ranking .none { padding: .6rem .2rem; font-size: .75rem; }
.moves td { text-align: right; background: color-mix(in srgb, var(--accent) calc(var(--share) * 45%), transparent); \
padding: .3rem .8rem; }
"""
