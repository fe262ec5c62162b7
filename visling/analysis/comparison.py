"""A comparison of models as one table, in Markdown and as a page.

Both are computed from `comparison.json` alone, finished or not. The page is one HTML file that loads nothing and needs
no script.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visling.analysis.page import COMPARISON_STYLE, escape, render_facts, render_page, replace_file
from visling.errors import RunError


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Text in cells; the first column names the rows."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def write_comparison(folder: Path) -> tuple[Path, Path]:
    """Write `comparison.md` and `comparison.html` next to `comparison.json` and return their paths.

    Raises:
        RunError: the folder holds no comparison, or it cannot be read or written.
    """
    file = folder / "comparison.json"
    try:
        comparison = json.loads(file.read_text(encoding="utf-8"))
        text, page = _render_markdown(comparison), _render_html(comparison)
    except (OSError, ValueError) as error:
        raise RunError(
            f"cannot read {file}: {error}. Give the folder that visling compare wrote with --out."
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{file} is not a comparison of this version: {error!r}. Write it again with visling compare --resume."
        ) from error
    targets = folder / "comparison.md", folder / "comparison.html"
    for target, content in zip(targets, (text, page), strict=True):
        try:
            replace_file(target, content)
        except OSError as error:
            raise RunError(f"cannot write {target}: {error}. Free space or fix permissions.") from error
    return targets


# Facts and tables


def _compose_title(comparison: Mapping[str, Any]) -> str:
    plan = comparison["plan"]
    return f"{', '.join(plan['models'])} on {', '.join(plan['tasks'])}"


def _describe_progress(comparison: Mapping[str, Any]) -> str:
    """How many runs have ended, if not all have."""
    if comparison["status"] == "finished":
        return ""
    runs = comparison["runs"]
    return f"Not finished: {runs['ended']} of {runs['planned']} runs have ended. Means are of those."


def _list_facts(comparison: Mapping[str, Any]) -> dict[str, str]:
    """What is the same for all models."""
    plan = comparison["plan"]
    configs = {model: plan["configs"][model] for model in plan["models"]}
    first = next(iter(configs.values()))
    facts = {
        "pre-training": f"recipe MODEL-{plan['recipe']}, {plan['updates']:,} updates of "
        f"{first['pretrain']['batch_size']} examples",
        **{
            f"fine-tuning, {task}": f"recipe MODEL-{task}, {_describe_examples(first[task], plan['examples'][task])}"
            for task in plan["tasks"]
        },
        "scored": f"once, on split {plan['split']}, with the weights that were best on the validation split",
        "seeds": f"{plan['seeds']}, from 0 on: for random initial weights, the order and masking of examples, and "
        "which of them are used",
        "data": plan["data"],
        "region features": f"fingerprint {plan['fingerprint'][:12]}, width {plan['feature_size']}",
        "device": f"{plan['device']}; runs in parallel: {' or '.join(map(str, comparison['jobs']))}",
        "versions": ", ".join(f"{name} {version}" for name, version in plan["versions"].items()),
    }
    for phase, settings in (("pre-training", plan["pretrain_settings"]), ("fine-tuning", plan["finetune_settings"])):
        if settings:
            facts[f"changed in {phase}"] = "; ".join(settings)
    return facts


def _describe_examples(config: Mapping[str, Any], examples: Mapping[str, Any]) -> str:
    available, limit = examples["splits"][config["train_split"]], config["train_limit"]
    used = available if limit is None else min(limit, available)
    return f"{used:,} of {available:,} labelled examples, batches of {config['batch_size']}"


def _build_tables(comparison: Mapping[str, Any]) -> Iterator[_Table]:
    plan = comparison["plan"]
    for task in plan["tasks"]:
        rows = [row for row in comparison["rows"] if row["task"] == task]
        yield _build_score_table(task, rows, comparison["baselines"].get(task, {}))
        yield _build_seed_table(task, rows, plan["seeds"])
    for phase, settings in plan["differences"].items():
        if settings:
            yield _Table(
                title=f"Settings of {'pre-training' if phase == 'pretrain' else phase} that differ, encoders aside",
                head=("setting", *plan["models"]),
                rows=[
                    (name, *(json.dumps(values[model]) for model in plan["models"]))
                    for name, values in settings.items()
                ],
            )


def _build_score_table(task: str, rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, float]) -> _Table:
    starts, gains = rows[0]["starts"], rows[0]["gains"]
    count = next((row["examples"] for row in rows if "examples" in row), 0)
    references = [f"{name}: {value:.1f}" for name, value in baselines.items()]
    return _Table(
        title=f"{task}: {rows[0]['metric']} in percent on {count:,} examples",
        head=(
            "model", "parameters", "pre-training", "fine-tuning", "fine-tuning updates",
            *starts, *(f"pre-trained minus {start}" for start in gains),
        ),
        rows=[
            (
                row["model"],
                _format_count(row["starts"]["pre-trained"].get("parameters")),
                _format_spread(row["pretraining"].get("seconds"), "{:,.0f}", " s"),
                _format_spread(row["starts"]["pre-trained"].get("seconds"), "{:,.0f}", " s"),
                _format_updates(row["starts"]["pre-trained"].get("updates")),
                *(_format_spread(row["starts"][start]["score"], "{:.1f}") for start in starts),
                *(_format_spread(row["gains"][start], "{:+.1f}") for start in gains),
            )
            for row in rows
        ],
        note="Mean over seeds ± sample standard deviation; differences are taken seed by seed. Parameters: encoder and "
        "task head. Times: wall clock of one run, validation included; they depend on the machine's other load."
        + (f" Baselines without a model: {'; '.join(references)}." if references else ""),
    )  # fmt: skip


def _build_seed_table(task: str, rows: Sequence[Mapping[str, Any]], seeds: int) -> _Table:
    return _Table(
        title=f"{task}: every seed",
        head=("model", "start", *(f"seed {seed}" for seed in range(seeds))),
        rows=[
            (
                row["model"],
                start,
                *(_format_number(about["score"]["values"].get(str(seed)), "{:.1f}") for seed in range(seeds)),
            )
            for row in rows
            for start, about in row["starts"].items()
        ],
    )


def _format_number(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else form.format(value)


def _format_count(value: int | None) -> str:
    return _format_number(value, "{:,}")


def _format_spread(values: Mapping[str, Any] | None, form: str, unit: str = "") -> str:
    """Mean ± spread; a dash without values, no spread with only one."""
    if values is None or values["mean"] is None:
        return "–"
    around = "" if values["spread"] is None else f" ± {form.replace('+', '').format(values['spread'])}"
    return f"{form.format(values['mean'])}{around}{unit}"


def _format_updates(values: Mapping[str, Any] | None) -> str:
    """Number of updates; without a spread where all seeds made the same number."""
    return _format_spread(values and {**values, "spread": values["spread"] or None}, "{:,.0f}")


# Markdown


def _render_markdown(comparison: Mapping[str, Any]) -> str:
    parts = [f"# {_escape_cell(_compose_title(comparison))}"]
    if missing := _describe_progress(comparison):
        parts.append(f"**{missing}**")
    for table in _build_tables(comparison):
        lines = [_render_row(table.head), _render_row(["---"] * len(table.head)), *map(_render_row, table.rows)]
        parts += [f"## {_escape_cell(table.title)}", "\n".join(lines), *([table.note] if table.note else [])]
    parts += [
        "## The same for all models",
        "\n".join(f"- {name}: {_escape_cell(fact)}" for name, fact in _list_facts(comparison).items()),
    ]
    return "\n\n".join(parts) + "\n"


def _render_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escape_cell, cells))} |"


def _escape_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


# The page


def _render_html(comparison: Mapping[str, Any]) -> str:
    title, progress = _compose_title(comparison), _describe_progress(comparison)
    missing = f'<p class="missing">{escape(progress)}</p>' if progress else ""
    facts = render_facts(_list_facts(comparison))
    configs = "".join(
        f"<details><summary>{escape(model)}</summary>"
        f"<pre>{escape(json.dumps(config, indent=2, ensure_ascii=False))}</pre></details>"
        for model, config in comparison["plan"]["configs"].items()
    )
    tables = "".join(map(_render_html_table, _build_tables(comparison)))
    body = (
        f"<h1>{escape(title)}</h1>\n{missing}\n{tables}\n"
        f"<section><h2>The same for all models</h2><dl>{facts}</dl></section>\n"
        f"<section><h2>Every setting</h2>{configs}</section>"
    )
    return render_page(title, body, COMPARISON_STYLE)


def _render_html_table(table: _Table) -> str:
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
