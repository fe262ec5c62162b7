"""A run folder as one page: verdict, scores, curves, examples with their pictures, exact configuration.

The page is one HTML file that loads nothing and needs no script. Whatever a run does not have yet is named in the page,
not an error.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from visling.analysis.drawing import draw_regions
from visling.errors import DataError, RunError, StoreError
from visling.image_ids import Aliases, canonical
from visling.regions.store import NativeStore
from visling.types import RegionArray, RegionStore
from visling.vision.images import SUFFIXES, read_image

_SPLITS = ("test", "testdev", "test_dev", "val", "valid", "validation", "dev")
"""Splits in the order in which they speak for a run; others follow by name."""
_DRAWN_REGIONS = 12
_PICTURE_SIZE = 440
"""Longest side of a picture in the gallery: about the width of a card, so that labels keep their size."""
_POINTS = 240
"""Most points of a curve; more are averaged in equal stretches of steps."""
_RIGHT = 0.5
"""Score from which an example counts as right in the gallery (soft scores go up to 1)."""

Point = tuple[float, float]


def write_report(
    run: Path,
    *,
    out: Path | None = None,
    examples: int = 24,
    images: Path | None = None,
    store: RegionStore | None = None,
    compare: Sequence[Path] = (),
    overwrite: bool = False,
) -> Path:
    """Write the page about a run and return its path.

    Args:
        run: run folder, finished or not.
        out: file to write; None = `report.html` in the run folder.
        examples: most examples in the gallery, half of them wrong ones where there are enough.
        images: folder with the pictures, searched with its sub-folders; None takes the one named in run.json.
        store: regions to draw; None opens the store named in run.json.
        compare: other run folders, whose scores stand beside this one's.
        overwrite: replace a page that is there.
    Raises:
        RunError: there is no such folder, or the page is there or cannot be written.
        DataError: there is no such folder of pictures.
    """
    for folder in (run, *compare):
        if not folder.is_dir():
            raise RunError(
                f"no run folder {folder}. Give the folder that holds run.json, as printed when the training began."
            )
    target = out if out is not None else run / "report.html"
    if target.is_dir():
        raise RunError(f"{target} is a folder; the report is one file. Name a file with --out, ending in .html.")
    if target.exists() and not overwrite:
        raise RunError(f"{target} exists. Replace it with --overwrite, or name another file with --out.")
    if images is not None and not images.is_dir():
        raise DataError(f"no image folder {images}. Check the path.")
    found = _Run.read(run)
    for other in compare:
        found.stand_beside(_Run.read(other))
    pictures = images if images is not None else _path(found.about.get("images"))
    regions = store if store is not None else _open_store(found)
    # The sections come first: what they miss is named at the top of the page.
    body = [_scores(found), _curves(found), _gallery(found, examples, pictures, regions), _configuration(found)]
    title = f"{_say(found.about.get('model'), 'model')} on {_say(found.about.get('task'), 'task')}"
    page = _PAGE.format(
        title=_h(title), style=_STYLE, verdict=_verdict(found, title), missing=_missing(found), body="\n".join(body)
    )
    part = target.with_name(f"{target.name}.part")
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(target)
    except OSError as error:
        raise RunError(
            f"cannot write the report {target}: {error}. Name another file with --out, in a folder that exists."
        ) from error
    return target


# Reading


@dataclass(kw_only=True)
class _Run:
    """What a run folder holds, and what it lacks."""

    path: Path
    about: Mapping[str, Any] = field(default_factory=dict)
    train: list[Mapping[str, Any]] = field(default_factory=list)
    valid: list[Mapping[str, Any]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    evaluations: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    details: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> _Run:
        run = cls(path=path)
        run.about = run._object(path / "run.json", "no run.json: model, task and configuration are unknown")
        if not (path / "log.jsonl").exists():
            run.missing.append("no log.jsonl: there are no curves")
        for entry in run._lines(path / "log.jsonl"):
            if entry.get("kind") == "train":
                run.train.append(entry)
            elif entry.get("kind") == "valid":
                run.valid.append(entry)
            elif entry.get("kind") == "event":
                run.events.append(str(entry.get("message", "")))
        for file in sorted(path.glob("evaluation_*.json"), key=lambda f: _rank(f.stem.removeprefix("evaluation_"))):
            evaluation = run._object(file, "")
            if evaluation:
                run.evaluations[file.stem.removeprefix("evaluation_")] = evaluation
        for file in sorted(path.glob("details_*.jsonl"), key=lambda f: _rank(f.stem.removeprefix("details_"))):
            run.details[file.stem.removeprefix("details_")] = list(run._lines(file))
        if run.about and run.about.get("status") != "finished":
            last = f"; its last record is step {_say(run.train[-1].get('step'), '?')}" if run.train else ""
            run.missing.append(f"the run has not finished{last}")
        if not run.evaluations:
            run.missing.append("no evaluation yet: there are no test scores")
        return run

    def stand_beside(self, other: _Run) -> None:
        """Show another run's scores as a column beside this one's."""
        for split, evaluation in self.evaluations.items():
            if split in other.evaluations:
                beside = {**_table(evaluation.get("baselines")), other.path.name: other.evaluations[split]}
                self.evaluations[split] = {**evaluation, "baselines": beside}
            else:
                self.missing.append(f"{other.path.name} has not been evaluated on {split}: it has no column there")

    def _object(self, file: Path, absent: str) -> Mapping[str, Any]:
        if not file.exists():
            self.missing.append(absent)
            return {}
        try:
            value = json.loads(file.read_text(encoding="utf-8", errors="replace"))
        except ValueError:
            value = None
        if not isinstance(value, dict):
            self.missing.append(f"{file.name} cannot be read: it is not a complete JSON object")
            return {}
        return value

    def _lines(self, file: Path) -> Iterator[Mapping[str, Any]]:
        """The JSON objects of a file, one a line; a killed run leaves half a line, which is named and left out."""
        broken = 0
        if file.exists():
            with file.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    try:
                        value = json.loads(line) if line.strip() else {}
                    except ValueError:
                        value = None
                    if not isinstance(value, dict):
                        broken += 1
                    elif value:
                        yield value
        if broken:
            self.missing.append(f"{file.name}: {broken} incomplete {'line' if broken == 1 else 'lines'} left out")


def _rank(split: str) -> tuple[int, str]:
    return (_SPLITS.index(split) if split in _SPLITS else len(_SPLITS), split)


def _path(value: Any) -> Path | None:
    return Path(value) if isinstance(value, str) and value else None


def _open_store(run: _Run) -> RegionStore | None:
    path = _path(run.about.get("store"))
    if path is None:
        return None
    try:
        return NativeStore.open(path)
    except (StoreError, OSError):
        run.missing.append("the region store of this run cannot be opened: pictures are shown without regions")
        return None


# Words and numbers


def _h(value: Any) -> str:
    return escape(str(value), quote=True)


def _say(value: Any, otherwise: str = "not given") -> str:
    """A value of a file in words: lists and tables of answers by frequency or weight, without repetition."""
    if value is None or value == "" or value == [] or value == {}:
        return otherwise
    if isinstance(value, Mapping):
        return ", ".join(str(key) for key in sorted(value, key=lambda k: -(_number(value[k]) or 0.0)))
    if isinstance(value, (list, tuple)):
        return ", ".join(answer for answer, _ in Counter(map(str, value)).most_common())
    return str(value)


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _count(value: Any) -> str:
    number = _number(value)
    return "" if number is None else f"{number:,.0f}"


def _short(value: float) -> str:
    """A number for an axis or a legend."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _trained_for(run: _Run) -> str | None:
    seconds = _number(run.train[-1].get("seconds")) if run.train else None
    if seconds is None:
        begin, end = _moment(run.about.get("started")), _moment(run.about.get("finished"))
        seconds = end - begin if begin is not None and end is not None else None
    return None if seconds is None else _duration(seconds)


def _moment(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            return None
    return _number(value)


def _is_share(name: str) -> bool:
    """Whether a score is in per cent, as all are but ranks, losses and counts."""
    return not any(word in name.lower() for word in ("loss", "rank", "count", "perplexity", "seconds"))


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _value(cell: Any) -> float | None:
    return _number(cell.get("value") if isinstance(cell, Mapping) else cell)


def _score(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f} %" if _is_share(name) else f"{value:,.4g}"


# Sections


def _verdict(run: _Run, title: str) -> str:
    lines = []
    if run.evaluations:
        split, evaluation = next(iter(run.evaluations.items()))
        for name, cell in list(_table(evaluation.get("scores")).items())[:1]:
            value, count = _value(cell), _count(cell.get("count") if isinstance(cell, Mapping) else None)
            over = f" over {count} examples" if count else ""
            lines.append(
                f'<p class="score"><strong>{_h(_score(name, value))}</strong> {_h(name)} on {_h(split)}{over}</p>'
            )
            lines += [f"<p>{_h(line)}</p>" for line in _against_baselines(evaluation, name, value)]
    parameters = run.about.get("parameters")
    size = parameters.get("total", parameters) if isinstance(parameters, Mapping) else parameters
    facts = {
        "model": _say(run.about.get("model")),
        "task": _say(run.about.get("task")),
        "parameters": _count(size) or _say(size),
        "training time": _trained_for(run) or "not recorded",
        "steps": _count(run.train[-1].get("step")) if run.train else "none recorded",
        "seed": _say(run.about.get("seed")),
        "status": _say(run.about.get("status"), "unknown"),
    }
    terms = "".join(f"<div><dt>{_h(term)}</dt><dd>{_h(fact)}</dd></div>" for term, fact in facts.items())
    return f'<header><h1>{_h(title)}</h1>{"".join(lines)}<dl class="facts">{terms}</dl></header>'


def _against_baselines(evaluation: Mapping[str, Any], name: str, value: float | None) -> Iterator[str]:
    others = {
        title: _value(_table(_table(baseline).get("scores")).get(name))
        for title, baseline in _table(evaluation.get("baselines")).items()
    }
    known = {title: other for title, other in others.items() if other is not None}
    if value is None or not known or not _is_share(name):
        return
    best = max(known, key=lambda title: known[title])
    points = value - known[best]
    yield f"{abs(points):.1f} points {'above' if points >= 0 else 'BELOW'} the best baseline ({best}: {_score(name, known[best])})."


def _missing(run: _Run) -> str:
    if not run.missing:
        return ""
    items = "".join(f"<li>{_h(item)}</li>" for item in dict.fromkeys(run.missing))
    return f'<section class="missing" aria-label="What is missing"><h2>What is missing</h2><ul>{items}</ul></section>'


def _scores(run: _Run) -> str:
    parts = []
    for split, evaluation in run.evaluations.items():
        baselines = _table(evaluation.get("baselines"))
        groups: list[tuple[str, Mapping[str, Any], dict[str, Mapping[str, Any]]]] = [
            (
                "score",
                _table(evaluation.get("scores")),
                {name: _table(_table(b).get("scores")) for name, b in baselines.items()},
            )
        ]
        for group, rows in _table(evaluation.get("by")).items():
            groups.append(
                (
                    group,
                    _table(rows),
                    {name: _table(_table(_table(b).get("by")).get(group)) for name, b in baselines.items()},
                )
            )
        parts.append(f"<h3>{_h(split)}</h3>")
        parts += [_score_table(split, group, rows, others) for group, rows, others in groups if rows]
    text = "".join(parts) or "<p>This run has not been evaluated. Run <code>visling evaluate</code> on it.</p>"
    return f'<section><h2 id="scores">Scores</h2>{text}</section>'


def _score_table(split: str, group: str, rows: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> str:
    plain = group.replace("_", " ")
    heads = "".join(f'<th scope="col">{_h(head)}</th>' for head in (plain, "model", *others, "examples"))
    body = []
    for name, cell in rows.items():
        count = _count(cell.get("count") if isinstance(cell, Mapping) else None)
        # Types of questions are shares whatever they are called; only scores can be ranks or losses.
        kind = name if group == "score" else "share"
        cells = _score_cell(kind, _value(cell), "") + "".join(
            _score_cell(kind, _value(o.get(name)), "base") for o in others.values()
        )
        body.append(f'<tr><th scope="row">{_h(name)}</th>{cells}<td class="count">{count}</td></tr>')
    caption = "Scores" if group == "score" else f"By {plain}"
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{_h(caption)}, {_h(split)}"><table><caption>{_h(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _score_cell(name: str, value: float | None, look: str) -> str:
    bar = ""
    if value is not None and _is_share(name):
        bar = f'<span class="bar {look}"><span style="width:{min(max(value, 0.0), 100.0):.1f}%"></span></span>'
    return f'<td><span class="number">{_score(name, value)}</span>{bar}</td>'


def _curves(run: _Run) -> str:
    loss: dict[str, list[Point]] = defaultdict(list)
    rate: dict[str, list[Point]] = defaultdict(list)
    speed: dict[str, list[Point]] = defaultdict(list)
    for entry in run.train:
        step = _number(entry.get("step"))
        parts = _table(entry.get("parts"))
        _append(loss["total"], step, entry.get("loss"))
        for name, value in parts.items():
            _append(loss[str(name)], step, value)
        _append(rate["learning rate"], step, entry.get("lr"))
        _append(speed["examples per second"], step, entry.get("examples_per_second"))
    if len(loss) == 2:
        # One part is the total under another name.
        del loss["total"]
    scores: dict[str, list[Point]] = defaultdict(list)
    for entry in run.valid:
        for name, value in _table(entry.get("scores")).items():
            _append(scores[str(name)], _number(entry.get("step")), value)
    shares = {name: points for name, points in scores.items() if _is_share(name)}
    charts = [_chart("Training loss", loss), _chart("Validation scores", shares)]
    charts += [_chart(f"Validation: {name}", {name: points}) for name, points in scores.items() if name not in shares]
    charts += [_chart("Learning rate", rate), _chart("Speed", speed)]
    drawn = "".join(charts) or "<p>No steps have been logged.</p>"
    events = "".join(f"<li>{_h(event)}</li>" for event in run.events[-20:])
    noted = f"<details><summary>Last events</summary><ul>{events}</ul></details>" if events else ""
    return f'<section><h2 id="curves">Curves</h2><div class="charts">{drawn}</div>{noted}</section>'


def _append(points: list[Point], step: float | None, value: Any) -> None:
    number = _number(value)
    if step is not None and number is not None:
        points.append((step, number))


def _thin(points: list[Point]) -> list[Point]:
    """At most `_POINTS` points, each the mean of an equal share of the given ones."""
    if len(points) <= _POINTS:
        return points
    edges = [round(i * len(points) / _POINTS) for i in range(_POINTS + 1)]
    parts = [points[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within a range, three to six of them."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _chart(title: str, series: Mapping[str, Sequence[Point]]) -> str:
    """Line chart as inline SVG with a legend that says the numbers; nothing if there is no point."""
    # A resumed run may have logged a step twice; the later record holds.
    lines = {name: _thin(sorted(dict(points).items())) for name, points in series.items() if points}
    if not lines:
        return ""
    width, height, left, bottom, top, right = 560, 250, 58, 34, 12, 14
    xs, ys = [x for p in lines.values() for x, _ in p], [y for p in lines.values() for _, y in p]
    x0, x1 = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    y0, y1 = min(ys), max(ys)
    pad = (y1 - y0) * 0.06 or abs(y1) * 0.1 or 1.0
    # A quantity that is never negative is not shown on an axis that is.
    y0, y1 = (max(y0 - pad, 0.0) if y0 >= 0 else y0 - pad), y1 + pad

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * (width - left - right), height - bottom - (y - y0) / (y1 - y0) * (
            height - top - bottom
        )

    marks = []
    for tick in _ticks(y0, y1):
        y = at(x0, tick)[1]
        marks.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for tick in _ticks(x0, x1):
        marks.append(
            f'<text x="{at(tick, y0)[0]:.1f}" y="{height - bottom + 17}" text-anchor="middle">{_short(tick)}</text>'
        )
    marks.append(f'<text x="{(left + width - right) / 2:.0f}" y="{height - 2}" text-anchor="middle">step</text>')
    legend, spoken = [], []
    for number, (name, points) in enumerate(lines.items()):
        look = f"line c{number % 6}" + (" dashed" if number % 12 >= 6 else "")
        places = [at(x, y) for x, y in points]
        if len(places) == 1:
            marks.append(f'<circle class="{look} dot" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="4"/>')
        else:
            marks.append(f'<polyline class="{look}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        story = f"{_short(points[0][1])} → {_short(points[-1][1])}" if len(points) > 1 else _short(points[0][1])
        swatch = f'<svg class="swatch" viewBox="0 0 22 8" aria-hidden="true"><line class="{look}" x1="1" x2="21" y1="4" y2="4"/></svg>'
        legend.append(f"<li>{swatch}{_h(name)} <span>{story}</span></li>")
        spoken.append(f"{name} {story}")
    return (
        f'<figure class="chart"><figcaption>{_h(title)}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_h(title)}: {_h("; ".join(spoken))}">{"".join(marks)}</svg>'
        f'<ul class="legend">{"".join(legend)}</ul></figure>'
    )


def _gallery(run: _Run, examples: int, folder: Path | None, store: RegionStore | None) -> str:
    split, rows = next(((split, rows) for split, rows in run.details.items() if rows), ("", []))
    if not rows or examples < 1:
        run.missing += [] if rows else ["no details of single examples: there is no gallery"]
        return '<section><h2 id="examples">Examples</h2><p>There are no examples to show.</p></section>'
    marked = {True: [], False: [], None: []}  # type: dict[bool | None, list[Mapping[str, Any]]]
    for row in rows:
        score = _number(row.get("score"))
        marked[None if score is None else score >= _RIGHT].append(row)
    wrong = _spread(marked[False], max(examples // 2, examples - len(marked[True])))
    right = _spread(marked[True], examples - len(wrong))
    unknown = _spread(marked[None], examples - len(wrong) - len(right))
    pictures = _find_pictures(folder, {i for row in (*wrong, *right, *unknown) for i in _image_ids(row)})
    if folder is None:
        run.missing.append("no folder of pictures is known: examples are shown without")
    elif not pictures:
        run.missing.append("none of the pictures was found in the folder of images")
    groups = (
        ("Wrong", wrong, len(marked[False])),
        ("Right", right, len(marked[True])),
        ("Without a score", unknown, len(marked[None])),
    )
    parts = []
    for title, chosen, total in groups:
        if chosen:
            cards = "".join(_card(row, pictures, store) for row in chosen)
            parts.append(f'<h3>{title} <small>{len(chosen)} of {total:,}</small></h3><div class="cards">{cards}</div>')
    note = f"From {_h(split)}, taken at even distances over the file and over all types; nobody picked them."
    return f'<section><h2 id="examples">Examples</h2><p>{note}</p>{"".join(parts)}</section>'


def _spread(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Rows in turn from every type, within a type at even distances."""
    types: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        types[str(row.get("type"))].append(row)
    order = sorted(types.values(), key=len, reverse=True)
    shares = [0] * len(order)
    while sum(shares) < min(count, len(rows)):
        for number, of_type in enumerate(order):
            if shares[number] < len(of_type) and sum(shares) < count:
                shares[number] += 1
    chosen = [
        [of_type[k * len(of_type) // share] for k in range(share)] for of_type, share in zip(order, shares, strict=True)
    ]
    return [row for turn in zip_longest(*chosen) for row in turn if row is not None]


def _image_ids(row: Mapping[str, Any]) -> list[str]:
    ids = row.get("image")
    return [str(i) for i in ids] if isinstance(ids, (list, tuple)) else [] if ids is None else [str(ids)]


def _find_pictures(folder: Path | None, wanted: set[str]) -> dict[str, Path]:
    """Image id -> file whose stem it is or means (VQA says 9 for COCO_val2014_000000000009), the first in order of path
    where several are."""
    found: dict[str, Path] = {}
    meant = {canonical(image) for image in wanted}
    if folder is not None:
        for where, folders, files in os.walk(folder):
            folders.sort()
            for name in sorted(files):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES and canonical(stem) in meant:
                    found.setdefault(stem, Path(where) / name)
    known = Aliases(found)
    return {image: found[name] for image, name in ((image, known.find(image)) for image in wanted) if name is not None}


def _card(row: Mapping[str, Any], pictures: Mapping[str, Path], store: RegionStore | None) -> str:
    score = _number(row.get("score"))
    look, sign = ("", "") if score is None else ("right", "✓ right") if score >= _RIGHT else ("wrong", "✗ wrong")
    partly = f" ({score:.2g})" if score is not None and 0 < score < 1 else ""
    shown = (
        "".join(_picture(image, pictures.get(image), store) for image in _image_ids(row)[:2])
        or '<p class="none">no picture</p>'
    )
    kind = f'<span class="kind">{_h(row["type"])}</span>' if row.get("type") else ""
    confidence = _number(row.get("confidence"))
    sure = "" if confidence is None else f" <small>{100 * confidence:.0f} %</small>"
    bars = []
    for answer in (row.get("top") or [])[:4]:
        if isinstance(answer, (list, tuple)) and len(answer) == 2 and (share := _number(answer[1])) is not None:
            length = min(max(100 * share, 0.0), 100.0)
            bars.append(
                f'<li><span>{_h(answer[0])}</span><span class="bar"><span style="width:{length:.1f}%"></span></span><span>{length:.0f} %</span></li>'
            )
    return (
        f'<article class="card {look}">{shown}<div class="words"><p class="tags"><span class="sign">{sign}{partly}</span>{kind}</p>'
        f'<p class="question">{_h(_say(row.get("text"), "(no text)"))}</p>'
        f"<p>Model: <strong>{_h(_say(row.get('prediction'), 'nothing'))}</strong>{sure}<br>Truth: <strong>{_h(_say(row.get('truth')))}</strong></p>"
        f'<ul class="bars">{"".join(bars)}</ul></div></article>'
    )


def _picture(image: str, file: Path | None, store: RegionStore | None) -> str:
    if file is None:
        return f'<p class="none">picture {_h(image)} was not found</p>'
    try:
        picture = Image.fromarray(read_image(file))
    except DataError:
        return f'<p class="none">picture {_h(image)} cannot be read</p>'
    picture.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE), Image.Resampling.LANCZOS)
    count = 0
    regions = _regions(image, store)
    if regions is not None:
        count = min(len(regions), _DRAWN_REGIONS)
        names, attributes = getattr(store, "class_names", ()), getattr(store, "attribute_names", ())
        picture = draw_regions(
            picture,
            regions,
            class_names=names,
            attribute_names=attributes,
            top=count,
            scale=_PICTURE_SIZE // max(picture.size),
        )
    alt = f"Image {image}" + (f" with {count} regions drawn" if count else "")
    return f'<img alt="{_h(alt)}" width="{picture.width}" height="{picture.height}" src="{_data_uri(picture)}">'


def _regions(image: str, store: RegionStore | None) -> RegionArray | None:
    try:
        return store[image] if store is not None and image in store else None
    except StoreError:
        return None


def _data_uri(picture: Image.Image) -> str:
    """The smaller of PNG (drawings) and JPEG (photographs)."""
    options = []
    for kind, settings in (("png", {"optimize": True}), ("jpeg", {"quality": 82})):
        with io.BytesIO() as file:
            picture.save(file, kind, **settings)
            options.append((len(file.getvalue()), kind, file.getvalue()))
    _, kind, content = min(options)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _configuration(run: _Run) -> str:
    about = run.about
    versions = "".join(
        f'<tr><th scope="row">{_h(name)}</th><td>{_h(value)}</td></tr>'
        for name, value in _table(about.get("versions")).items()
    )
    table = f'<table><caption>Versions</caption><thead><tr><th scope="col">package</th><th scope="col">version</th></tr></thead>{versions}</table>'
    command = about.get("command")
    words = " ".join(map(str, command)) if isinstance(command, (list, tuple)) else _say(command, "not recorded")
    config = (
        json.dumps(about["config"], indent=2, ensure_ascii=False) if about.get("config") is not None else "not recorded"
    )
    rest = {name: _say(about.get(name), "") for name in ("recipe", "seed", "started", "finished", "images", "store")}
    facts = "".join(f"<div><dt>{_h(name)}</dt><dd>{_h(value)}</dd></div>" for name, value in rest.items() if value)
    return (
        f'<section><h2 id="configuration">How it was made</h2><h3>Command</h3><pre>{_h(words)}</pre>'
        f'<dl class="facts">{facts}</dl>{table if versions else ""}<h3>Configuration</h3><pre>{_h(config)}</pre></section>'
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{verdict}
{missing}
<nav aria-label="Sections"><a href="#scores">Scores</a> <a href="#curves">Curves</a> <a href="#examples">Examples</a>
<a href="#configuration">How it was made</a></nav>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --paper: #fff; --card: #f6f7f9; --ink: #1c2028; --soft: #5c6470; --rule: #dfe3e8; --accent: #1d78c8; --base: #9aa5b1;
  --good: #1b7f4d; --bad: #b3261e; --warn: #fff4d6;
  --c0: #1d78c8; --c1: #d1495b; --c2: #2a9d69; --c3: #b8770a; --c4: #8e4fd0; --c5: #0e8ea6; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --card: #1e2229; --ink: #e8eaee; --soft: #a2abb8; --rule: #353b45;
  --accent: #5fb0f5; --base: #6b7683; --good: #5fd39a; --bad: #ff8a80; --warn: #3a3014;
  --c0: #5fb0f5; --c1: #ff8593; --c2: #5fd39a; --c3: #f0b54a; --c4: #bd93f9; --c5: #56d0e6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
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
th, td { text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: middle; }
thead th { color: var(--soft); font-size: .85rem; } tbody th { font-weight: 500; }
.number { display: inline-block; min-width: 4.2em; font-variant-numeric: tabular-nums; } .count { font-variant-numeric: tabular-nums; }
.bar { display: inline-block; width: 8rem; height: .55rem; border-radius: 4px; background: var(--rule); overflow: hidden; }
.bar span { display: block; height: 100%; background: var(--accent); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.bar.base { width: 4rem; } .bar.base span { background: var(--base); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.chart { margin: 0; background: var(--card); border-radius: 8px; padding: .8rem; break-inside: avoid; }
.chart figcaption { font-weight: 600; } .chart svg { width: 100%; height: auto; }
.chart text { fill: var(--soft); font-size: 12px; } .grid { stroke: var(--rule); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .dashed { stroke-dasharray: 5 3; } .dot { fill: currentColor; }
.c0 { stroke: var(--c0); color: var(--c0); } .c1 { stroke: var(--c1); color: var(--c1); } .c2 { stroke: var(--c2); color: var(--c2); }
.c3 { stroke: var(--c3); color: var(--c3); } .c4 { stroke: var(--c4); color: var(--c4); } .c5 { stroke: var(--c5); color: var(--c5); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .3rem 0 0; padding: 0; font-size: .85rem; }
.legend span { color: var(--soft); font-variant-numeric: tabular-nums; } .chart .swatch { width: 22px; height: 8px; margin-right: .4rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; align-items: start; }
.card { background: var(--card); border-radius: 8px; border-top: 4px solid var(--rule); overflow: hidden; break-inside: avoid; }
.card.right { border-color: var(--good); } .card.wrong { border-color: var(--bad); }
.card img { display: block; width: 100%; height: auto; background: #fff; }
.none { margin: 0; padding: 2rem 1rem; text-align: center; color: var(--soft); font-style: italic; overflow-wrap: anywhere; }
.words { padding: .6rem .9rem .9rem; overflow-wrap: anywhere; } .words p { margin: .2rem 0; }
.tags { display: flex; justify-content: space-between; gap: 1rem; font-size: .8rem; } .kind { color: var(--soft); }
.right .sign { color: var(--good); } .wrong .sign { color: var(--bad); } .sign { font-weight: 600; }
.question { font-weight: 600; }
.bars { list-style: none; margin: .5rem 0 0; padding: 0; font-size: .82rem; }
.bars li { display: grid; grid-template-columns: minmax(4rem, 1fr) 5rem 3rem; gap: .5rem; align-items: center; }
.bars .bar { width: 100%; } .bars li > :last-child { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: var(--card); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
@media print { body { font-size: 11pt; } main { max-width: none; padding: 0; } nav { display: none; }
  .wide, pre { overflow: visible; } pre { white-space: pre-wrap; overflow-wrap: anywhere; } h2, h3 { break-after: avoid; } }
"""
