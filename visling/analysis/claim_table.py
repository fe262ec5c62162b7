"""All claims in one table, in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from visling.analysis.claim_page import WORDS, count_seeds, find_outcome, format_interval, is_small, list_contrasts
from visling.analysis.page import write_file
from visling.analysis.run_files import as_mapping, as_number
from visling.analysis.tables import escape_markdown, render_rows
from visling.errors import RunError

_HEAD = ("claim", "paper", "the paper's figure", "ours", "95 % interval", "verdict", "seeds", "command", "minutes")


def write_table(out: Path, claims: Sequence[Mapping[str, Any]]) -> Path:
    """Write `claims.md` into a folder and return its path.

    Args:
        out: folder of `visling reproduce`, which holds claims/NAME/claim.md of those that were run.
        claims: contents of claim.json; of one that was not run "claim", "status": "not run" and "power". Papers come in
            the order in which they first appear.
    Raises:
        RunError: a result is of another version, or the file cannot be written.
    """
    target = out / "claims.md"
    write_file(target, _render_table(claims))
    return target


def _render_table(claims: Sequence[Mapping[str, Any]]) -> str:
    by_paper: dict[str, list[list[str]]] = {}
    outcomes: Counter[str] = Counter()
    for result in claims:
        try:
            by_paper.setdefault(result["claim"]["paper"], []).append(_render_row(result))
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            name = as_mapping(result.get("claim")).get("name", "NAME")
            raise RunError(
                f"the result of claim {name} is not of this version: {error!r}. Run visling reproduce {name} again: "
                "finished runs are kept."
            ) from error
        outcomes[find_outcome(result)] += 1
    counts = ", ".join(f"{words[0].lower()}{words[1:]}: {outcomes[outcome]}" for outcome, words in WORDS.items())
    rows = [row for rows in by_paper.values() for row in rows]
    parts = [
        "# The papers' claims on drawn scenes",
        f"Claims: {len(rows)}; {counts}.",
        render_rows([_HEAD, *rows]),
        "Ours: mean of each contrast over seeds, in percentage points, with the 95 % interval of Student's t. Seeds: "
        "those measured; in brackets those needed, where nothing is decided. Minutes: of all trainings on one core, "
        "those shared with other claims included; ≈ estimated before running.",
    ]
    return "\n\n".join(parts) + "\n"


def _render_row(result: Mapping[str, Any]) -> list[str]:
    """Cells in Markdown."""
    claim, contrasts = result["claim"], list_contrasts(result)
    name, outcome = escape_markdown(claim["name"]), find_outcome(result)
    title = name if outcome == "not run" else f"[{name}](claims/{quote(claim['name'])}/claim.md)"
    means = {key: as_number(contrast.get("mean")) for key, contrast in contrasts.items()}
    return [
        f"{title}<br>{escape_markdown(claim['statement'])}",
        escape_markdown(f"{claim['paper']}, {claim['section']}"),
        escape_markdown(claim["figure"]),
        _join({key: "–" if mean is None else f"{mean:+.1f}" for key, mean in means.items()}),
        _join({key: format_interval(contrast) for key, contrast in contrasts.items()}),
        _describe_outcome(result),
        _describe_seeds(result),
        f"`visling reproduce {name}`",
        _describe_minutes(result),
    ]


def _join(cells: Mapping[str, str]) -> str:
    """One line for each contrast, named if there are several; a dash if there is nothing to show."""
    if all(cell == "–" for cell in cells.values()):
        return "–"
    if len(cells) == 1:
        return escape_markdown(next(iter(cells.values())))
    return "<br>".join(escape_markdown(f"{name}: {cell}") for name, cell in cells.items())


def _describe_outcome(result: Mapping[str, Any]) -> str:
    outcome = find_outcome(result)
    if outcome == "not run":
        return outcome
    if result.get("size") == "tiny":
        return f"{outcome} (tiny: a test of the machinery)"
    if result.get("status") == "running":
        return f"{outcome} (not finished)"
    small = outcome == "agrees" and any(map(is_small, list_contrasts(result).values()))
    return f"**{outcome}**{', by less than would matter' if small else ''}"


def _describe_seeds(result: Mapping[str, Any]) -> str:
    """Seeds measured, and those needed if nothing is decided."""
    outcome, count = find_outcome(result), str(count_seeds(result))
    if outcome == "not run":
        needed = [as_mapping(result.get("power")).get("seeds_needed")]
    elif outcome == "undecided" and result.get("size") != "tiny":
        needed = [contrast.get("seeds_needed") for contrast in list_contrasts(result).values()]
    else:
        needed = []
    known = [number for number in map(as_number, needed) if number is not None]
    return f"{count} ({max(known):,.0f})" if known else count


def _describe_minutes(result: Mapping[str, Any]) -> str:
    measured = as_number(result.get("minutes"))
    minutes = as_number(as_mapping(result.get("power")).get("minutes")) if measured is None else measured
    if minutes is None:
        return "–"
    return f"{'≈ ' if measured is None else ''}{minutes:,.{0 if minutes >= 10 else 1}f}"
