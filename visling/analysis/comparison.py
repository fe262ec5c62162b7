"""A comparison of models as one table, in Markdown and as a page.

Both are computed from `comparison.json` alone, finished or not. The page is one HTML file that loads nothing and needs
no script.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from visling.analysis.page import COMPARISON_STYLE, escape, render_facts, render_page, write_beside
from visling.analysis.tables import Table, escape_markdown, format_number, format_spread, render_html, render_markdown


def write_comparison(folder: Path) -> tuple[Path, Path]:
    """Write `comparison.md` and `comparison.html` next to `comparison.json` and return their paths.

    Raises:
        RunError: the folder holds no comparison, or it cannot be read or written.
    """
    write_beside(
        folder / "comparison.json",
        _render,
        content="a comparison",
        origin="Give the folder that visling compare wrote with --out.",
        remedy="Write it again with visling compare --resume.",
    )
    return folder / "comparison.md", folder / "comparison.html"


def _render(comparison: Mapping[str, Any]) -> dict[str, str]:
    return {"comparison.md": _render_markdown(comparison), "comparison.html": _render_html(comparison)}


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


def _build_tables(comparison: Mapping[str, Any]) -> Iterator[Table]:
    plan = comparison["plan"]
    for task in plan["tasks"]:
        rows = [row for row in comparison["rows"] if row["task"] == task]
        yield _build_score_table(task, rows, comparison["baselines"].get(task, {}))
        yield _build_seed_table(task, rows, plan["seeds"])
    for phase, settings in plan["differences"].items():
        if settings:
            yield Table(
                title=f"Settings of {'pre-training' if phase == 'pretrain' else phase} that differ, encoders aside",
                head=("setting", *plan["models"]),
                rows=[
                    (name, *(json.dumps(values[model]) for model in plan["models"]))
                    for name, values in settings.items()
                ],
            )


def _build_score_table(task: str, rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, float]) -> Table:
    starts, gains = rows[0]["starts"], rows[0]["gains"]
    count = next((row["examples"] for row in rows if "examples" in row), 0)
    references = [f"{name}: {value:.1f}" for name, value in baselines.items()]
    return Table(
        title=f"{task}: {rows[0]['metric']} in percent on {count:,} examples",
        head=(
            "model", "parameters", "pre-training", "fine-tuning", "fine-tuning updates",
            *starts, *(f"pre-trained minus {start}" for start in gains),
        ),
        rows=[
            (
                row["model"],
                _format_count(row["starts"]["pre-trained"].get("parameters")),
                format_spread(row["pretraining"].get("seconds"), "{:,.0f}", " s"),
                format_spread(row["starts"]["pre-trained"].get("seconds"), "{:,.0f}", " s"),
                _format_updates(row["starts"]["pre-trained"].get("updates")),
                *(format_spread(row["starts"][start]["score"], "{:.1f}") for start in starts),
                *(format_spread(row["gains"][start], "{:+.1f}") for start in gains),
            )
            for row in rows
        ],
        note="Mean over seeds ± sample standard deviation; differences are taken seed by seed. Parameters: encoder and "
        "task head. Times: wall clock of one run, validation included; they depend on the machine's other load."
        + (f" Baselines without a model: {'; '.join(references)}." if references else ""),
    )  # fmt: skip


def _build_seed_table(task: str, rows: Sequence[Mapping[str, Any]], seeds: int) -> Table:
    return Table(
        title=f"{task}: every seed",
        head=("model", "start", *(f"seed {seed}" for seed in range(seeds))),
        rows=[
            (
                row["model"],
                start,
                *(format_number(about["score"]["values"].get(str(seed)), "{:.1f}") for seed in range(seeds)),
            )
            for row in rows
            for start, about in row["starts"].items()
        ],
    )


def _format_count(value: int | None) -> str:
    return format_number(value, "{:,}")


def _format_updates(values: Mapping[str, Any] | None) -> str:
    """Number of updates; without a spread where all seeds made the same number."""
    return format_spread(values and {**values, "spread": values["spread"] or None}, "{:,.0f}")


# Markdown


def _render_markdown(comparison: Mapping[str, Any]) -> str:
    parts = [f"# {escape_markdown(_compose_title(comparison))}"]
    if missing := _describe_progress(comparison):
        parts.append(f"**{missing}**")
    parts += map(render_markdown, _build_tables(comparison))
    parts += [
        "## The same for all models",
        "\n".join(f"- {name}: {escape_markdown(fact)}" for name, fact in _list_facts(comparison).items()),
    ]
    return "\n\n".join(parts) + "\n"


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
    tables = "".join(map(render_html, _build_tables(comparison)))
    body = (
        f"<h1>{escape(title)}</h1>\n{missing}\n{tables}\n"
        f"<section><h2>The same for all models</h2><dl>{facts}</dl></section>\n"
        f"<section><h2>Every setting</h2>{configs}</section>"
    )
    return render_page(title, body, COMPARISON_STYLE)
