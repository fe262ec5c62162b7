"""A comparison of models as one table, in Markdown and as a page.

Both are made of `comparison.json` alone, finished or not. The page is one HTML file that loads nothing and needs no
script.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from visling.errors import RunError


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Text in cells; the first column names the rows."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def write_comparison(folder: Path) -> tuple[Path, Path]:
    """Write `comparison.md` and `comparison.html` beside `comparison.json` and return their paths.

    Raises:
        RunError: there is no comparison in the folder, or it cannot be read or written.
    """
    file = folder / "comparison.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        text, page = _markdown(found), _html(found)
    except (OSError, ValueError) as error:
        raise RunError(
            f"cannot read {file}: {error}. Give the folder that visling compare wrote with --out."
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{file} is not a comparison of this version: {error!r}. Make it again with visling compare --resume."
        ) from error
    targets = folder / "comparison.md", folder / "comparison.html"
    for target, content in zip(targets, (text, page), strict=True):
        part = target.with_name(f"{target.name}.part")
        try:
            part.write_text(content, encoding="utf-8")
            part.replace(target)
        except OSError as error:
            raise RunError(f"cannot write {target}: {error}. Free space or fix permissions.") from error
    return targets


# What is said


def _title(found: Mapping[str, Any]) -> str:
    plan = found["plan"]
    return f"{', '.join(plan['models'])} on {', '.join(plan['tasks'])}"


def _missing(found: Mapping[str, Any]) -> str:
    runs = found["runs"]
    return (
        ""
        if found["status"] == "finished"
        else f"Not finished: {runs['ended']} of {runs['planned']} runs have ended. Means are of those."
    )


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    """What is the same for all models."""
    plan = found["plan"]
    configs = {model: plan["configs"][model] for model in plan["models"]}
    first = next(iter(configs.values()))
    facts = {
        "pre-training": f"recipe MODEL-{plan['recipe']}, {plan['updates']:,} updates of {first['pretrain']['batch_size']} examples",
        **{
            f"fine-tuning, {task}": f"recipe MODEL-{task}, {_labelled(first[task], plan['examples'][task])}"
            for task in plan["tasks"]
        },
        "scored": f"once, on split {plan['split']}, with the weights that were best on the validation split",
        "seeds": f"{plan['seeds']}, from 0 on: of fresh weights, of the order and masking of examples, of which of them are used",
        "data": plan["data"],
        "region features": f"fingerprint {plan['fingerprint'][:12]}, width {plan['feature_size']}",
        "device": f"{plan['device']}; runs side by side: {' or '.join(map(str, found['jobs']))}",
        "versions": ", ".join(f"{name} {version}" for name, version in plan["versions"].items()),
    }
    for phase, settings in (("pre-training", plan["pretrain_settings"]), ("fine-tuning", plan["finetune_settings"])):
        if settings:
            facts[f"changed in {phase}"] = "; ".join(settings)
    return facts


def _labelled(config: Mapping[str, Any], examples: Mapping[str, Any]) -> str:
    there, limit = examples["splits"][config["train_split"]], config["train_limit"]
    used = there if limit is None else min(limit, there)
    return f"{used:,} of {there:,} labelled examples, batches of {config['batch_size']}"


def _tables(found: Mapping[str, Any]) -> Iterator[_Table]:
    plan = found["plan"]
    for task in plan["tasks"]:
        rows = [row for row in found["rows"] if row["task"] == task]
        yield _scores(task, rows, found["baselines"].get(task, {}))
        yield _seeds(task, rows, plan["seeds"])
    for phase, settings in plan["differences"].items():
        if settings:
            yield _Table(
                title=f"Settings of {'pre-training' if phase == 'pretrain' else phase} that differ, besides the encoders",
                head=("setting", *plan["models"]),
                rows=[
                    (name, *(json.dumps(values[model]) for model in plan["models"]))
                    for name, values in settings.items()
                ],
            )


def _scores(task: str, rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, float]) -> _Table:
    starts, gains = rows[0]["starts"], rows[0]["gains"]
    count = next((row["examples"] for row in rows if "examples" in row), 0)
    looks = [f"{name}: {value:.1f}" for name, value in baselines.items()]
    return _Table(
        title=f"{task}: {rows[0]['metric']} in per cent on {count:,} examples",
        head=(
            "model", "parameters", "pre-training", "fine-tuning", "fine-tuning updates", *starts, *(f"pre-trained minus {start}" for start in gains)
        ),
        rows=[
            (
                row["model"],
                _count(row["starts"]["pre-trained"].get("parameters")),
                _spread(row["pretraining"].get("seconds"), "{:,.0f}", " s"),
                _spread(row["starts"]["pre-trained"].get("seconds"), "{:,.0f}", " s"),
                _updates(row["starts"]["pre-trained"].get("updates")),
                *(_spread(row["starts"][start]["score"], "{:.1f}") for start in starts),
                *(_spread(row["gains"][start], "{:+.1f}") for start in gains),
            )
            for row in rows
        ],
        note="Mean over seeds ± sample standard deviation; differences are taken seed by seed. Parameters: encoder and task head. Times: wall clock "
        "of one run, validation included; they depend on what else the machine did." + (f" Looking at nothing: {'; '.join(looks)}." if looks else ""),
    )  # fmt: skip


def _seeds(task: str, rows: Sequence[Mapping[str, Any]], seeds: int) -> _Table:
    return _Table(
        title=f"{task}: every seed",
        head=("model", "start", *(f"seed {seed}" for seed in range(seeds))),
        rows=[
            (
                row["model"],
                start,
                *(_number(about["score"]["values"].get(str(seed)), "{:.1f}") for seed in range(seeds)),
            )
            for row in rows
            for start, about in row["starts"].items()
        ],
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _count(value: int | None) -> str:
    return _number(value, "{:,}")


def _spread(values: Mapping[str, Any] | None, form: str, unit: str = "") -> str:
    """Mean ± spread, as far as there are any."""
    if values is None or values["mean"] is None:
        return "–"
    around = "" if values["spread"] is None else f" ± {form.replace('+', '').format(values['spread'])}"
    return f"{form.format(values['mean'])}{around}{unit}"


def _updates(values: Mapping[str, Any] | None) -> str:
    """Without a spread where all seeds made the same number."""
    return _spread(values and {**values, "spread": values["spread"] or None}, "{:,.0f}")


# Markdown


def _markdown(found: Mapping[str, Any]) -> str:
    parts = [f"# {_cell(_title(found))}"]
    if missing := _missing(found):
        parts.append(f"**{missing}**")
    for table in _tables(found):
        lines = [_line(table.head), _line(["---"] * len(table.head)), *map(_line, table.rows)]
        parts += [f"## {_cell(table.title)}", "\n".join(lines), *([table.note] if table.note else [])]
    parts += [
        "## The same for all models",
        "\n".join(f"- {name}: {_cell(fact)}" for name, fact in _facts(found).items()),
    ]
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


# The page


def _html(found: Mapping[str, Any]) -> str:
    title = _h(_title(found))
    missing = f'<p class="missing">{_h(_missing(found))}</p>' if _missing(found) else ""
    facts = "".join(f"<div><dt>{_h(name)}</dt><dd>{_h(fact)}</dd></div>" for name, fact in _facts(found).items())
    configs = "".join(
        f"<details><summary>{_h(model)}</summary><pre>{_h(json.dumps(config, indent=2, ensure_ascii=False))}</pre></details>"
        for model, config in found["plan"]["configs"].items()
    )
    tables = "".join(map(_html_table, _tables(found)))
    return _PAGE.format(title=title, style=_STYLE, missing=missing, tables=tables, facts=facts, configs=configs)


def _html_table(table: _Table) -> str:
    head = "".join(f'<th scope="col">{_h(name)}</th>' for name in table.head)
    body = "".join(
        f'<tr><th scope="row">{_h(first)}</th>{"".join(f"<td>{_h(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in table.rows
    )
    note = f"<p><small>{_h(table.note)}</small></p>" if table.note else ""
    return (
        f'<section><h2>{_h(table.title)}</h2><div class="wide" tabindex="0" role="region" aria-label="{_h(table.title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}</section>"
    )


def _h(value: Any) -> str:
    return escape(str(value), quote=True)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{missing}
{tables}
<section><h2>The same for all models</h2><dl>{facts}</dl></section>
<section><h2>Every setting</h2>{configs}</section>
</main>
</body>
</html>
"""

_STYLE = """
:root { --paper: #fff; --card: #f6f7f9; --ink: #1c2028; --soft: #5c6470; --rule: #dfe3e8; --warn: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --card: #1e2229; --ink: #e8eaee; --soft: #a2abb8; --rule: #353b45;
  --warn: #3a3014; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
small, dt, thead th { color: var(--soft); } dt { font-size: .8rem; } dd { margin: 0 0 .6rem; overflow-wrap: anywhere; }
.missing { background: var(--warn); border-radius: 8px; padding: .8rem 1.1rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--rule); }
thead th { font-size: .85rem; } tbody th { font-weight: 500; } td { font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: var(--card); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; }
@media print { .wide, pre { overflow: visible; } pre { white-space: pre-wrap; } h2 { break-after: avoid; } }
"""
