"""A run folder as one page: verdict, scores, curves, examples with their images, exact configuration.

The page is one HTML file that loads nothing and needs no script. What a run does not have yet is listed at the top of
the page; it is not an error.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from visling.analysis.charts import Point, render_chart
from visling.analysis.examples import describe
from visling.analysis.page import REPORT_STYLE, escape, render_facts, render_page, replace_file
from visling.analysis.report_examples import Asks, render_examples
from visling.analysis.run_files import RunFiles, as_mapping, as_number, score_value
from visling.errors import DataError, RunError
from visling.types import RegionStore


def write_report(
    run: Path,
    *,
    out: Path | None = None,
    examples: int = 24,
    images: Path | None = None,
    store: RegionStore | None = None,
    compare: Sequence[Path] = (),
    asks: Asks | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the page about a run and return its path.

    Args:
        run: run folder, finished or not.
        out: file to write; None = `report.html` in the run folder.
        examples: most examples in the gallery, half of them wrong ones where there are enough.
        images: folder of the images, searched with its sub-folders; None takes the one named in run.json.
        store: regions to draw; None opens the store named in run.json.
        compare: other run folders, whose scores are shown next to this one's.
        asks: opens the run's model with the examples of a split, to show on each what it looked at; where that is not
            possible, the page says so. None = not shown.
        overwrite: replace an existing page.
    Raises:
        RunError: no such run folder, or the page exists or cannot be written.
        DataError: no such image folder.
    """
    files, others = RunFiles.read(run), [RunFiles.read(other) for other in compare]
    target = out if out is not None else run / "report.html"
    if target.is_dir():
        raise RunError(f"{target} is a folder; the report is one file. Name a file with --out, ending in .html.")
    if target.exists() and not overwrite:
        raise RunError(f"{target} exists. Replace it with --overwrite, or name another file with --out.")
    if images is not None and not images.is_dir():
        raise DataError(f"no image folder {images}. Check the path.")
    for other in others:
        files.add_baseline(other)
    image_folder = images if images is not None else files.image_folder()
    regions = store if store is not None else files.open_store()
    # The sections come first: what they lack is listed at the top of the page.
    sections = [
        _render_scores(files),
        _render_curves(files),
        render_examples(files, examples, image_folder, regions, asks=asks),
        _render_configuration(files),
    ]
    title = f"{describe(files.about.get('model'), 'model')} on {describe(files.about.get('task'), 'task')}"
    body = "\n".join([_render_verdict(files, title), _render_missing(files), _NAVIGATION, *sections])
    try:
        replace_file(target, render_page(title, body, REPORT_STYLE, images=True))
    except OSError as error:
        raise RunError(
            f"cannot write the report {target}: {error}. Name another file with --out, in a folder that exists."
        ) from error
    return target


_NAVIGATION = """\
<nav aria-label="Sections"><a href="#scores">Scores</a> <a href="#curves">Curves</a> <a href="#examples">Examples</a>
<a href="#configuration">How it was made</a></nav>"""


# Words and numbers


def _format_count(value: Any) -> str:
    number = as_number(value)
    return "" if number is None else f"{number:,.0f}"


def _format_duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _is_share(name: str) -> bool:
    """Whether a score is in percent: all are, except ranks, losses and counts."""
    return not any(word in name.lower() for word in ("loss", "rank", "count", "perplexity", "seconds"))


def _format_score(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f} %" if _is_share(name) else f"{value:,.4g}"


def _describe_interval(name: str, cell: Any) -> str:
    """The 95 % interval of a score, where the evaluation computed one."""
    low, high = (as_number(as_mapping(cell).get(end)) for end in ("low", "high"))
    if low is None or high is None:
        return ""
    return f", 95 % interval {_format_score(name, low)} to {_format_score(name, high)}"


# Sections


def _render_verdict(run: RunFiles, title: str) -> str:
    lines = []
    if run.evaluations:
        split, evaluation = next(iter(run.evaluations.items()))
        for name, cell in list(as_mapping(evaluation.get("scores")).items())[:1]:
            value, count = score_value(cell), _format_count(cell.get("count") if isinstance(cell, Mapping) else None)
            over = f" over {count} examples" if count else ""
            lines.append(
                f'<p class="score"><strong>{escape(_format_score(name, value))}</strong> '
                f"{escape(name)} on {escape(split)}{over}{escape(_describe_interval(name, cell))}</p>"
            )
            lines += [f"<p>{escape(line)}</p>" for line in _compare_with_baselines(evaluation, name, value)]
    parameters = run.about.get("parameters")
    size = parameters.get("total", parameters) if isinstance(parameters, Mapping) else parameters
    seconds = run.training_seconds()
    facts = {
        "model": describe(run.about.get("model")),
        "task": describe(run.about.get("task")),
        "parameters": _format_count(size) or describe(size),
        "training time": "not recorded" if seconds is None else _format_duration(seconds),
        "steps": _format_count(run.train[-1].get("step")) if run.train else "none recorded",
        "seed": describe(run.about.get("seed")),
        "status": describe(run.about.get("status"), "unknown"),
    }
    return f'<header><h1>{escape(title)}</h1>{"".join(lines)}<dl class="facts">{render_facts(facts)}</dl></header>'


def _compare_with_baselines(evaluation: Mapping[str, Any], name: str, value: float | None) -> Iterator[str]:
    others = {
        title: score_value(as_mapping(as_mapping(baseline).get("scores")).get(name))
        for title, baseline in as_mapping(evaluation.get("baselines")).items()
    }
    known = {title: other for title, other in others.items() if other is not None}
    if value is None or not known or not _is_share(name):
        return
    best = max(known, key=lambda title: known[title])
    points = value - known[best]
    relation = "above" if points >= 0 else "BELOW"
    yield f"{abs(points):.1f} points {relation} the best baseline ({best}: {_format_score(name, known[best])})."


def _render_missing(run: RunFiles) -> str:
    if not run.missing:
        return ""
    items = "".join(f"<li>{escape(item)}</li>" for item in dict.fromkeys(run.missing))
    return f'<section class="missing" aria-label="What is missing"><h2>What is missing</h2><ul>{items}</ul></section>'


def _render_scores(run: RunFiles) -> str:
    parts = []
    for split, evaluation in run.evaluations.items():
        baselines = as_mapping(evaluation.get("baselines"))
        groups: list[tuple[str, Mapping[str, Any], dict[str, Mapping[str, Any]]]] = [
            (
                "score",
                as_mapping(evaluation.get("scores")),
                {name: as_mapping(as_mapping(b).get("scores")) for name, b in baselines.items()},
            )
        ]
        for group, rows in as_mapping(evaluation.get("by")).items():
            groups.append(
                (
                    group,
                    as_mapping(rows),
                    {name: as_mapping(as_mapping(as_mapping(b).get("by")).get(group)) for name, b in baselines.items()},
                )
            )
        parts.append(f"<h3>{escape(split)}</h3>")
        parts += [_render_score_table(split, group, rows, others) for group, rows, others in groups if rows]
    text = "".join(parts) or "<p>This run has not been evaluated. Run <code>visling evaluate</code> on it.</p>"
    return f'<section><h2 id="scores">Scores</h2>{text}</section>'


def _render_score_table(
    split: str, group: str, rows: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]
) -> str:
    plain = group.replace("_", " ")
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in (plain, "model", *others, "examples"))
    body = []
    for name, cell in rows.items():
        count = _format_count(cell.get("count") if isinstance(cell, Mapping) else None)
        # Types of questions are shares whatever they are called; only scores can be ranks or losses.
        kind = name if group == "score" else "share"
        cells = _render_score_cell(kind, score_value(cell), "") + "".join(
            _render_score_cell(kind, score_value(o.get(name)), "base") for o in others.values()
        )
        body.append(f'<tr><th scope="row">{escape(name)}</th>{cells}<td class="count">{count}</td></tr>')
    caption = "Scores" if group == "score" else f"By {plain}"
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}, {escape(split)}">'
        f"<table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _render_score_cell(name: str, value: float | None, look: str) -> str:
    bar = ""
    if value is not None and _is_share(name):
        bar = f'<span class="bar {look}"><span style="width:{min(max(value, 0.0), 100.0):.1f}%"></span></span>'
    return f'<td><span class="number">{_format_score(name, value)}</span>{bar}</td>'


def _render_curves(run: RunFiles) -> str:
    loss: dict[str, list[Point]] = defaultdict(list)
    accuracy: dict[str, list[Point]] = defaultdict(list)
    rate: dict[str, list[Point]] = defaultdict(list)
    speed: dict[str, list[Point]] = defaultdict(list)
    machine: dict[str, list[Point]] = defaultdict(list)
    memory: dict[str, list[Point]] = defaultdict(list)
    for entry in run.train:
        step = as_number(entry.get("step"))
        parts = as_mapping(entry.get("parts"))
        _append_point(loss["total"], step, entry.get("loss"))
        for name, value in parts.items():
            _append_point((accuracy if "accuracy" in str(name) else loss)[str(name)], step, value)
        _append_point(rate["learning rate"], step, entry.get("lr"))
        _append_point(speed["examples per second"], step, entry.get("examples_per_second"))
        for name, field in (("waiting for data", "data_wait"), ("of the measured product rate", "utilisation")):
            _append_point(machine[name], step, entry.get(field), scale=100)
        _append_point(memory["GB at the peak"], step, entry.get("memory"), scale=1e-9)
    if len(loss) == 2 or any(points == loss["total"] for name, points in loss.items() if name != "total"):
        # A part is the total under another name; drawn over it, it could not be seen.
        loss.pop("total", None)
    scores: dict[str, list[Point]] = defaultdict(list)
    for entry in run.valid:
        for name, value in as_mapping(entry.get("scores")).items():
            _append_point(scores[str(name)], as_number(entry.get("step")), value)
    shares = {name: points for name, points in scores.items() if _is_share(name)}
    charts = [
        render_chart("Training loss", loss),
        render_chart("Training accuracy", accuracy),
        render_chart("Validation scores", shares),
    ]
    others = {name: points for name, points in scores.items() if name not in shares}
    charts += [render_chart(f"Validation: {name}", {name: points}) for name, points in others.items()]
    charts += [render_chart("Learning rate", rate), render_chart("Speed", speed)]
    charts += [render_chart("Use of the machine, %", machine), render_chart("Memory", memory)]
    drawn = "".join(charts) or "<p>No steps have been logged.</p>"
    events = "".join(f"<li>{escape(event)}</li>" for event in run.events[-20:])
    noted = f"<details><summary>Last events</summary><ul>{events}</ul></details>" if events else ""
    return f'<section><h2 id="curves">Curves</h2><div class="charts">{drawn}</div>{noted}</section>'


def _append_point(points: list[Point], step: float | None, value: Any, *, scale: float = 1.0) -> None:
    """Add a point, its value times `scale`, where both numbers are finite."""
    number = as_number(value)
    if step is not None and number is not None:
        points.append((step, number * scale))


def _render_configuration(run: RunFiles) -> str:
    about = run.about
    versions = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in as_mapping(about.get("versions")).items()
    )
    table = (
        "<table><caption>Versions</caption><thead>"
        f'<tr><th scope="col">package</th><th scope="col">version</th></tr></thead>{versions}</table>'
    )
    command = about.get("command")
    words = " ".join(map(str, command)) if isinstance(command, (list, tuple)) else describe(command, "not recorded")
    config = (
        json.dumps(about["config"], indent=2, ensure_ascii=False) if about.get("config") is not None else "not recorded"
    )
    rest = {name: describe(about.get(name), "") for name in ("recipe", "seed", "started", "finished")}
    # Relative to the run, so that the page can be shared: it names no folder of this machine above the run's own.
    rest |= {name: _relate_path(about.get(name), run.path) for name in ("images", "store")}
    facts = render_facts({name: value for name, value in rest.items() if value})
    return (
        f'<section><h2 id="configuration">How it was made</h2><h3>Command</h3><pre class="wrap">{escape(words)}</pre>'
        f'<dl class="facts">{facts}</dl>{table if versions else ""}'
        f"<h3>Configuration</h3><pre>{escape(config)}</pre></section>"
    )


def _relate_path(value: Any, run: Path) -> str:
    """An absolute path of run.json as seen from the run folder; any other value in words."""
    if not isinstance(value, str) or not os.path.isabs(value):
        return describe(value, "")
    return os.path.relpath(value, run.resolve())
