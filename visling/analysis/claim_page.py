"""The result of a claim as Markdown and as a page: verdict, contrasts, arms, curves, commands.

All is computed from `claim.json` alone, finished or not; verdicts are those of the file. The page is one HTML file that
loads nothing and needs no script. Markdown shows the curves by a file next to it, `claim.svg`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from visling.analysis.charts import Series, describe_charts, render_chart, render_charts
from visling.analysis.page import REPORT_STYLE, escape, render_facts, render_page, write_beside
from visling.analysis.run_files import as_mapping, as_number
from visling.analysis.tables import Table, escape_markdown, format_number, format_spread, render_html, render_markdown

WORDS: Mapping[str, str] = {
    "agrees": "Agrees",
    "disagrees": "Disagrees",
    "undecided": "Undecided at this budget",
    "not run": "Not run",
}
"""What may come of a claim -> the same in words."""


def write_claim(folder: Path) -> tuple[Path, Path]:
    """Write `claim.md` and `claim.html` next to `claim.json` and return their paths; `claim.svg` if there are curves.

    Raises:
        RunError: the folder holds no claim, or it cannot be read or written.
    """
    write_beside(
        folder / "claim.json",
        _render,
        content="a claim",
        origin="Give the folder of a claim, OUT/claims/NAME after visling reproduce NAME --out OUT.",
        remedy="Run visling reproduce again with the same --out: finished runs are kept.",
    )
    return folder / "claim.md", folder / "claim.html"


def _render(result: Mapping[str, Any]) -> dict[str, str]:
    drawing = render_charts(_collect_curves(result))
    return {
        **({"claim.svg": drawing} if drawing else {}),
        "claim.md": _render_markdown(result),
        "claim.html": _render_html(result),
    }


# Verdict


def find_outcome(result: Mapping[str, Any]) -> str:
    """A key of `WORDS`; undecided where the file has no verdict yet."""
    outcome = str(result["status"] if result.get("status") == "not run" else result.get("verdict"))
    return outcome if outcome in WORDS else "undecided"


def count_seeds(result: Mapping[str, Any]) -> int:
    """Number of seeds that have been measured in all arms."""
    arms = as_mapping(result.get("arms"))
    measured = [
        {seed for seed, value in _values_of(arms.get(arm)).items() if value is not None}
        for arm in result["claim"]["arms"]
    ]
    return len(set.intersection(*measured)) if measured else 0


def list_contrasts(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Every contrast as it was planned, together with what was found."""
    found = as_mapping(result.get("contrasts"))
    return {name: {**plan, **as_mapping(found.get(name))} for name, plan in result["claim"]["contrasts"].items()}


def format_interval(contrast: Mapping[str, Any]) -> str:
    """The 95 % interval of a contrast; a dash where it has none."""
    low, high = as_number(contrast.get("low")), as_number(contrast.get("high"))
    return "–" if low is None or high is None else f"{low:+.1f} to {high:+.1f}"


def _values_of(about: Any) -> dict[int, float | None]:
    """Values by seed of an arm or a contrast."""
    return {int(seed): as_number(value) for seed, value in as_mapping(as_mapping(about).get("values")).items()}


def is_small(contrast: Mapping[str, Any]) -> bool:
    """Whether a difference that the paper expects was found, and is smaller than would matter."""
    high = as_number(contrast.get("high"))
    found = contrast["expected"] == "above" and contrast.get("verdict") == "agrees"
    return found and high is not None and high < contrast["size"]


def _explain_outcome(result: Mapping[str, Any]) -> str:
    """Why the verdict is what it is, in a few words."""
    outcome, contrasts = find_outcome(result), list_contrasts(result)
    if outcome == "not run":
        return "the power estimate below says what it needs."
    if result.get("size") == "tiny":
        return "size tiny is a test of the machinery; its numbers mean nothing."
    if len(contrasts) == 1:
        return f"{_explain_contrast(next(iter(contrasts.values())))}."
    if outcome == "agrees":
        return "all contrasts agree."
    names = [name for name, contrast in contrasts.items() if (contrast.get("verdict") or "undecided") == outcome]
    return f"contrast{'s' if len(names) > 1 else ''} {', '.join(names)}." if names else "see the contrasts."


def _explain_contrast(contrast: Mapping[str, Any]) -> str:
    """How the interval of a contrast lies, and what would decide it if nothing has."""
    size, interval, needed = contrast["size"], format_interval(contrast), contrast.get("seeds_needed")
    verdict = contrast.get("verdict")
    lowest = 0 if contrast["expected"] == "above" else -size
    if verdict == "agrees":
        small = f", but below {size:g}, the smallest difference that would matter" if is_small(contrast) else ""
        return f"the 95 % interval, {interval}, lies above {lowest:g}{small}"
    if verdict == "disagrees":
        return f"the 95 % interval, {interval}, lies below {size if contrast['expected'] == 'above' else lowest:g}"
    far = "there is no 95 % interval" if interval == "–" else f"the 95 % interval is {interval}"
    if needed is None:
        return f"{far}; how many seeds would decide a difference of {size:g} points is not known"
    return f"{far}; {needed:,} seeds would decide a difference of {size:g} points"


def _describe_progress(result: Mapping[str, Any]) -> str:
    """How many seeds have been measured, if not all have."""
    if result.get("status") != "running":
        return ""
    planned = result.get("planned_seeds") or result["claim"]["seeds"]
    return f"Not finished: {count_seeds(result)} of {planned} seeds have been measured in all arms."


# Tables


def _build_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    yield _build_contrast_table(result)
    yield _build_arm_table(result)
    if _list_seeds(result):
        yield _build_seed_table(result)


def _build_contrast_table(result: Mapping[str, Any]) -> Table:
    return Table(
        title="Contrasts",
        head=(
            "contrast",
            "formula",
            "mean ± spread",
            "95 % interval",
            "the paper says",
            "size",
            "verdict",
            "seeds needed",
        ),
        rows=[
            (
                name,
                _format_formula(contrast["weights"]),
                _format_values(contrast, "{:+.1f}"),
                format_interval(contrast),
                "above 0" if contrast["expected"] == "above" else f"not below {-contrast['size']:g}",
                f"{contrast['size']:g}",
                contrast.get("verdict") or "–",
                format_number(contrast.get("seeds_needed"), "{:,}"),
            )
            for name, contrast in list_contrasts(result).items()
        ],
        note=_describe_rule(contrast["expected"] for contrast in result["claim"]["contrasts"].values()),
    )


def _describe_rule(expected: Iterable[str]) -> str:
    rules = {
        "above": "where the paper says above 0, a contrast agrees if its interval lies above 0; if it does not, the "
        "contrast disagrees if the interval lies below its size",
        "not below": "where the paper says not below minus the size, a contrast agrees if its interval lies above "
        "minus the size, and disagrees if it lies below that",
    }
    wording = "; ".join(rules[kind] for kind in dict.fromkeys(expected))
    return (
        "In percentage points, computed seed by seed; intervals by Student's t over seeds; size: the smallest that "
        f"would matter here. The rule, fixed before running: {wording}. "
        "Everything else, and anything with fewer than three seeds, is undecided. The claim agrees if all its "
        "contrasts do and disagrees if one does. The seeds needed would decide a difference of this size with a "
        "probability of 80 % at the observed spread."
    )


def _build_arm_table(result: Mapping[str, Any]) -> Table:
    plans, arms = result["claim"]["arms"], as_mapping(result.get("arms"))
    found = {arm: as_mapping(arms.get(arm)) for arm in plans}
    measures = {
        arm: _describe_measure(plan.get("measure") or result["claim"]["measure"]) for arm, plan in plans.items()
    }
    alike = len(set(measures.values())) == 1
    return Table(
        title="Arms",
        head=("arm", "what it is", *([] if alike else ["measured"]), "percent", "examples", "updates", "minutes"),
        rows=[
            (
                arm,
                plan["about"],
                *([] if alike else [measures[arm]]),
                _format_values(found[arm], "{:.1f}"),
                format_number(found[arm].get("examples"), "{:,}"),
                " + ".join(format_number(number, "{:,}") for number in found[arm].get("updates") or [None]),
                format_number(found[arm].get("minutes"), "{:,.1f}"),
            )
            for arm, plan in plans.items()
        ],
        note=(f"Measured: {measures[next(iter(plans))]}. " if alike else "")
        + "Mean over seeds ± sample standard deviation. Examples: those that were scored. Updates: of each training, "
        "in their order. Minutes: of the trainings of one seed, on one core.",
    )


def _build_seed_table(result: Mapping[str, Any]) -> Table:
    seeds, arms = _list_seeds(result), as_mapping(result.get("arms"))
    rows = [(arm, _values_of(arms.get(arm)), "{:.1f}") for arm in result["claim"]["arms"]]
    rows += [(name, _values_of(contrast), "{:+.1f}") for name, contrast in list_contrasts(result).items()]
    return Table(
        title="Every seed",
        head=("arm or contrast", *(f"seed {seed}" for seed in seeds)),
        rows=[(name, *(format_number(values.get(seed), form) for seed in seeds)) for name, values, form in rows],
    )


def _list_seeds(result: Mapping[str, Any]) -> list[int]:
    """Every seed of which there is a value."""
    parts = [*as_mapping(result.get("arms")).values(), *as_mapping(result.get("contrasts")).values()]
    return sorted({seed for part in parts for seed in _values_of(part)})


def _format_values(about: Mapping[str, Any], form: str) -> str:
    return format_spread({"mean": about.get("mean"), "spread": about.get("spread")}, form)


def _format_formula(weights: Mapping[str, float]) -> str:
    """A weighted sum of arms: `with - without`, `0.5 a + 0.5 b - c`."""
    terms = [
        f"{'-' if weight < 0 else '+'} {'' if abs(weight) == 1 else f'{abs(weight):g} '}{arm}"
        for arm, weight in weights.items()
        if weight
    ]
    return " ".join(terms).removeprefix("+ ")


def _describe_measure(measure: Mapping[str, Any]) -> str:
    where = f" on split {measure['split']}"
    words = measure.get("fewest_words", 0)
    return {
        "score": f"{measure['name']}{where}" + (f", texts of {words} words or more" if words else ""),
        "validation": f"the last {measure['name']} in its own validation",
        "heads": f"how often the best head attends most to what a phrase names{where}",
        "syntax": "how often the best head of a word attends most to the region of its head or dependent, minus any "
        f"word of the sentence{where}",
        "unread": f"how often a hidden region's class is named without any text{where}",
    }[measure["kind"]]


# Facts


def _list_basics(claim: Mapping[str, Any]) -> dict[str, str]:
    basics = {"the paper's figure": claim["figure"], "what differs": claim["differs"]}
    return basics | ({"where this differs from the paper": claim["note"]} if claim.get("note") else {})


def _list_estimate(result: Mapping[str, Any]) -> dict[str, str]:
    """The power estimate made before running."""
    power, claim = as_mapping(result.get("power")), result["claim"]
    if not power:
        return {}
    spread, needed, minutes = (as_number(power.get(name)) for name in ("spread", "seeds_needed", "minutes"))
    size = next(iter(claim["contrasts"].values()))["size"]
    within = "" if power.get("fits") is None else f", {'within' if power['fits'] else 'more than'} the budget"
    return {
        "standard deviation of the first contrast": "unknown" if spread is None else f"{spread:.1f} points",
        "source": power.get("source") or "none",
        f"seeds that decide a difference of {size:g} points": "unknown" if needed is None else f"{needed:,.0f}",
        "minutes": "unknown" if minutes is None else f"{minutes:,.0f}{within}",
    }


def _list_conditions(result: Mapping[str, Any]) -> dict[str, str]:
    """What is the same for all arms."""
    claim, machine = result["claim"], as_mapping(result.get("machine"))
    rate, minutes = as_number(machine.get("product_rate")), as_number(result.get("minutes"))
    cores = f"{machine.get('cores')} cores" if machine.get("cores") else ""
    facts = {
        "worlds": "; ".join(["plain", *(_describe_world(name, world) for name, world in claim["worlds"].items())]),
        "seeds": f"{count_seeds(result)}, from 0 on: initial weights, order and masking of examples",
        "size": result.get("size"),
        "versions": ", ".join(f"{name} {version}" for name, version in as_mapping(result.get("versions")).items()),
        "device": result.get("device"),
        "processor": ", ".join(filter(None, [machine.get("processor"), cores])),
        "measured product rate": "" if rate is None else f"{rate / 1e12:.2g} TFLOP/s",
        "runs in parallel": result.get("jobs"),
        "training time of all runs": "" if minutes is None else f"{minutes:,.0f} minutes on one core",
        "date": machine.get("date"),
    }
    return {name: str(fact) for name, fact in facts.items() if fact}


def _describe_world(name: str, world: Mapping[str, Any]) -> str:
    changes = [f"{key} = {value}" for key, value in world["scenes"].items()]
    if world["label_noise"]:
        changes.append(f"{100 * world['label_noise']:g} % of the regions with another class and attribute")
    changes += [f"split {split}: {100 * share:g} % of the training images" for split, share in world["shares"].items()]
    return f"{name} ({', '.join(changes) or 'as plain'})"


# Curves and commands


def _collect_curves(result: Mapping[str, Any]) -> dict[str, Series]:
    """Points of each arm by chart; an arm has the same colour in all."""
    return {
        title: {
            arm: [
                (float(step), float(value))
                for step, value in as_mapping(curves).get(arm) or ()
                if as_number(step) is not None and as_number(value) is not None
            ]
            for arm in result["claim"]["arms"]
        }
        for title, curves in as_mapping(result.get("curves")).items()
    }


def _list_commands(result: Mapping[str, Any]) -> str:
    """What trains and measures seed 0, as lines of a shell; a command of several arms is there once."""
    users: dict[str, list[str]] = {}
    for arm in result["claim"]["arms"]:
        for words in as_mapping(as_mapping(result.get("arms")).get(arm)).get("commands") or ():
            users.setdefault(shlex.join(words), []).append(" ".join(arm.split()))
    return "\n".join(f"# {', '.join(arms)}\n{command}" for command, arms in users.items())


# Markdown


def _render_markdown(result: Mapping[str, Any]) -> str:
    claim, curves, commands = result["claim"], _collect_curves(result), _list_commands(result)
    contrasts = _explain_each(result)
    parts = [
        f"# {escape_markdown(claim['name'])}",
        escape_markdown(_compose_statement(claim)),
        _render_list(_list_basics(claim)),
    ]
    if progress := _describe_progress(result):
        parts.append(f"**{progress}**")
    parts.append(f"**{WORDS[find_outcome(result)]}:** {escape_markdown(_explain_outcome(result))}")
    if contrasts:
        parts.append(_render_list(contrasts))
    parts += map(render_markdown, _build_tables(result))
    if estimate := _list_estimate(result):
        parts += ["## Power estimate, made before running", _render_list(estimate)]
    if spoken := describe_charts(curves):
        alternative = escape_markdown(spoken).replace("[", "\\[").replace("]", "\\]")
        parts += ["## Curves", "Means over seeds.", f"![{alternative}](claim.svg)"]
    if commands:
        parts += ["## Commands of seed 0", "\n".join(f"    {line}" for line in commands.splitlines())]
    parts += ["## The same for all arms", _render_list(_list_conditions(result))]
    return "\n\n".join(parts) + "\n"


def _compose_statement(claim: Mapping[str, Any]) -> str:
    return f"{claim['statement']} ({claim['paper']}, {claim['section']})"


def _explain_each(result: Mapping[str, Any]) -> dict[str, str]:
    """Contrast -> its verdict with the reason, where the claim has several."""
    contrasts = list_contrasts(result)
    if len(contrasts) == 1 or result.get("size") == "tiny" or find_outcome(result) == "not run":
        return {}
    return {
        name: f"{contrast.get('verdict') or 'undecided'}: {_explain_contrast(contrast)}"
        for name, contrast in contrasts.items()
    }


def _render_list(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {escape_markdown(name)}: {escape_markdown(fact)}" for name, fact in facts.items())


# The page


def _render_html(result: Mapping[str, Any]) -> str:
    claim, commands = result["claim"], _list_commands(result)
    charts = "".join(render_chart(title, series) for title, series in _collect_curves(result).items())
    progress, contrasts = _describe_progress(result), _explain_each(result)
    parts = [
        f"<h1>{escape(claim['name'])}</h1>",
        f"<p>{escape(_compose_statement(claim))}</p>",
        f'<dl class="facts">{render_facts(_list_basics(claim))}</dl>',
        f'<p class="missing">{escape(progress)}</p>' if progress else "",
        f'<p class="score"><strong>{WORDS[find_outcome(result)]}:</strong> {escape(_explain_outcome(result))}</p>',
        f'<dl class="facts">{render_facts(contrasts)}</dl>' if contrasts else "",
        *map(render_html, _build_tables(result)),
        _render_section("Power estimate, made before running", _list_estimate(result)),
        f'<section><h2>Curves</h2><p>Means over seeds.</p><div class="charts">{charts}</div></section>'
        if charts
        else "",
        f'<section><h2>Commands of seed 0</h2><pre class="wrap">{escape(commands)}</pre></section>' if commands else "",
        _render_section("The same for all arms", _list_conditions(result)),
    ]
    return render_page(f"Claim: {claim['name']}", "\n".join(filter(None, parts)), REPORT_STYLE)


def _render_section(title: str, facts: dict[str, str]) -> str:
    return f'<section><h2>{title}</h2><dl class="facts">{render_facts(facts)}</dl></section>' if facts else ""
