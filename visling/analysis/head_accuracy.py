"""What `analysis.alignment` has collected, as accuracies of heads with intervals, next to baselines: JSON and a page.

Letters  N queries, C cells (a head of a layer), L layers, H heads. Accuracies are in percent, mass is a share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from visling.analysis.alignment import DIRECTIONS, PHRASES, Answers, Collector, Kind, Lost
from visling.analysis.matrices import render_matrix
from visling.analysis.page import REPORT_STYLE, escape, render_facts, render_page
from visling.metrics.answers import bootstrap_columns
from visling.tasks.base import Score

FORMAT: Final = "visling-alignment-1"
FEWEST_QUERIES: Final = 20
"""Relations with fewer in a direction are in the JSON alone: the best of many heads is right about some by chance."""


@dataclass(frozen=True, kw_only=True)
class BestHead:
    """The cell that is right most often."""

    layer: str
    head: int
    score: Score
    """On the queries that chose it: it flatters, since the best of many heads is lucky too."""
    held_out: Score | None
    """Of heads that one half of the images chose, on the other half; None for queries about a single image."""
    control: Score
    """How often the words of the sentence in general attend, in this head, to a region that is right."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadAccuracy:
    """How often each head is right about queries of one kind."""

    queries: int
    images: int
    accuracy: NDArray[np.float64]
    """(L, H) percent; NaN where a layer has fewer heads."""
    low: NDArray[np.float64]
    """(L, H) lower end of the 95 % interval over images."""
    high: NDArray[np.float64]
    mass: NDArray[np.float64]
    """(L, H) mean share of the queries' attention that is on detected regions."""
    control: NDArray[np.float64]
    """(L, H) percent: how often the words of the sentence in general attend to a region that is right."""
    best: BestHead
    baselines: Mapping[str, Score]
    """Best one first."""
    upper_bound: Score
    """Queries for which some region is right."""

    @property
    def above(self) -> int:
        """Heads whose interval is above the best baseline."""
        return int((self.low > max(score.value for score in self.baselines.values())).sum())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "queries": self.queries,
            "images": self.images,
            "accuracy": _plain(self.accuracy),
            "low": _plain(self.low),
            "high": _plain(self.high),
            "mass_on_regions": _plain(self.mass),
            "any_word": _plain(self.control),
            "best": {
                "layer": self.best.layer,
                "head": self.best.head,
                **asdict(self.best.score),
                "held_out": None if self.best.held_out is None else asdict(self.best.held_out),
                "any_word": asdict(self.best.control),
            },
            "heads_above_baselines": self.above,
            "baselines": {name: asdict(score) for name, score in self.baselines.items()},
            "upper_bound": asdict(self.upper_bound),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Alignment:
    """What the heads of a model ground."""

    layers: tuple[str, ...]
    phrases: HeadAccuracy
    relations: Mapping[str, Mapping[str, HeadAccuracy]]
    """Relation -> direction (`alignment.DIRECTIONS`) -> accuracy; the most frequent relation first."""
    lost: Lost
    empty_images: int
    """Images without any region; their queries count as misses."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; arrays are layers x heads."""
        return {
            "format": FORMAT,
            "layers": list(self.layers),
            "phrases": self.phrases.to_json(),
            "relations": {
                relation: {direction: part.to_json() for direction, part in parts.items()}
                for relation, parts in self.relations.items()
            },
            "left_out": asdict(self.lost),
            "images_without_regions": self.empty_images,
        }

    def frequent(self) -> list[tuple[str, str, HeadAccuracy]]:
        """Relation, direction and accuracy of those with at least `FEWEST_QUERIES`."""
        return [
            (relation, direction, part)
            for relation, parts in self.relations.items()
            for direction, part in parts.items()
            if part.queries >= FEWEST_QUERIES
        ]

    def draw(self, part: HeadAccuracy, title: str) -> str:
        """Layers x heads as SVG, coloured from 0 to 100 percent, so that all maps can be compared."""
        heads = [str(head) for head in range(part.accuracy.shape[1])]
        return render_matrix(title, part.accuracy, self.layers, heads, high=100.0, numbers=True)

    def notes(self) -> list[str]:
        """What was left out, or counts as wrong."""
        lost, found = self.lost, []
        if lost.cut_phrases:
            found.append(f"phrases beyond the longest text that the model reads, left out: {lost.cut_phrases}")
        if lost.cut_words:
            found.append(f"pairs of a relation whose attending word is beyond it, left out: {lost.cut_words}")
        if lost.headless_phrases:
            found.append(
                f"phrases without a single word that stands for them in the parse, left out of relations: "
                f"{lost.headless_phrases}"
            )
        if self.empty_images:
            found.append(f"images in which the detector found nothing, whose queries are misses: {self.empty_images}")
        return found


def measure_alignment(found: Collector, lost: Lost) -> Alignment:
    """The accuracies of everything that was collected; the collector has at least one phrase."""
    cells = found.cells
    layers = tuple(dict.fromkeys(layer for layer, _ in cells))
    counts = {kind: len(answers.images) for kind, answers in found.answers.items()}
    kinds = sorted(found.answers, key=lambda kind: (-counts[kind], kind))
    relations: dict[str, dict[str, HeadAccuracy]] = {}
    for kind in kinds:
        if kind.relation != PHRASES:
            relations.setdefault(kind.relation, {})[kind.direction] = _measure(found.answers[kind], cells, layers)
    return Alignment(
        layers=layers,
        phrases=_measure(found.answers[Kind(PHRASES, "phrase")], cells, layers),
        relations=relations,
        lost=lost,
        empty_images=len(found.empty),
    )


def _measure(answers: Answers, cells: Sequence[tuple[str, int]], layers: Sequence[str]) -> HeadAccuracy:
    hits, control, images = np.stack(answers.hits), np.stack(answers.control), answers.images  # (N, C)
    best = int(hits.mean(0).argmax())
    held_out = _hold_out(hits, images)
    more = {
        "control": control[:, best],
        "upper bound": np.array(answers.chance) > 0,
        "random region": np.array(answers.chance),
        **{name: np.array(own) for name, own in answers.guesses.items()},
        **({} if held_out is None else {"held out": held_out}),
    }
    columns = np.column_stack([hits, *more.values()]).astype(np.float64)
    means, (low, high) = columns.mean(0), bootstrap_columns(columns, images)

    def score(column: int) -> Score:
        value, *ends = (100 * float(part[column]) for part in (means, low, high))
        return Score(value, len(images), low=ends[0], high=ends[1])

    def lay_out(values: NDArray[np.floating]) -> NDArray[np.float64]:
        table = np.full((len(layers), 1 + max(head for _, head in cells)), np.nan)
        for (layer, head), value in zip(cells, values, strict=False):  # columns of heads come first
            table[layers.index(layer), head] = value
        return table

    scores = {name: score(len(cells) + number) for number, name in enumerate(more)}
    baselines = {name: scores[name] for name in ("random region", *answers.guesses)}
    return HeadAccuracy(
        queries=len(images),
        images=len(set(images)),
        accuracy=lay_out(100 * means),
        low=lay_out(100 * low),
        high=lay_out(100 * high),
        mass=lay_out(np.stack(answers.mass).mean(0, dtype=np.float64)),
        control=lay_out(100 * control.mean(0, dtype=np.float64)),
        best=BestHead(
            layer=cells[best][0],
            head=cells[best][1],
            score=score(best),
            held_out=scores.get("held out"),
            control=scores["control"],
        ),
        baselines=dict(sorted(baselines.items(), key=lambda pair: -pair[1].value)),
        upper_bound=scores["upper bound"],
    )


def _hold_out(hits: NDArray[np.bool_], images: Sequence[str]) -> NDArray[np.bool_] | None:
    """(N,) hits of the best cell of every other image on the rest, and the other way round; None for one image."""
    number = {image: place for place, image in enumerate(dict.fromkeys(images))}
    even = np.array([number[image] % 2 == 0 for image in images])
    if even.all():
        return None
    values = np.zeros(len(hits), bool)
    for part in (even, ~even):
        values[part] = hits[part][:, hits[~part].mean(0).argmax()]
    return values


def _plain(table: NDArray[np.float64]) -> list[list[float | None]]:
    """Rows of a table; None where a layer has fewer heads."""
    return [[None if np.isnan(value) else round(float(value), 4) for value in row] for row in table]


def describe_relation(relation: str, direction: str) -> str:
    """A kind of queries in a few words."""
    return f"{relation}: {DIRECTIONS[direction]}"


def render_alignment(found: Alignment, title: str, facts: Mapping[str, str]) -> str:
    """One HTML page: a table of the best heads next to the baselines, and a matrix of layers and heads for phrases and
    for each relation."""
    rows = [("phrases", found.phrases)]
    rows += [(describe_relation(relation, direction), part) for relation, direction, part in found.frequent()]
    names = list(found.phrases.baselines)
    head = "".join(
        f"<th>{escape(name)}</th>" for name in ("", "queries", "best head", "right", "held out", "any word", *names)
    )
    body = "".join(f"<tr>{_render_row(name, part, names)}</tr>" for name, part in rows)
    figures = "".join(f"<div>{found.draw(part, name)}</div>" for name, part in rows)
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes())
    return render_page(
        title,
        f"<h1>{escape(title)}</h1>"
        "<p>How often the region that a phrase, or a word whose head or dependent is a phrase, attends to most is a "
        "right one, for each head, in percent. Attention shows where information can flow, not what the model "
        "answers by. Held out: of heads that one half of the images chose, on the other half. Any word: how often, in "
        "the best head, the words of the sentence in general attend to the same region; a head that is no better for "
        "the words in question does not follow them.</p>"
        f'<dl class="facts">{render_facts(dict(facts))}</dl>'
        f'<div class="wide"><table><caption>Best heads and baselines, percent</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f"<ul>{notes}</ul>"
        f'<h2>Layers and heads</h2><div class="charts">{figures}</div>',
        REPORT_STYLE,
    )


def _render_row(name: str, part: HeadAccuracy, baselines: Sequence[str]) -> str:
    best = part.best
    held = "–" if best.held_out is None else f"{best.held_out.value:.1f}"
    cells = [
        f"{part.queries:,}",
        f"{best.layer}, head {best.head}",
        f"{best.score.value:.1f} ({best.score.low:.1f} to {best.score.high:.1f})",
        held,
        f"{best.control.value:.1f}",
        *(f"{part.baselines[baseline].value:.1f}" for baseline in baselines),
    ]
    return f"<th>{escape(name)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
