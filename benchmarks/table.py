"""One table of a day's results against the targets.

    python benchmarks/table.py --out benchmarks/results
    python benchmarks/table.py --out benchmarks/results --date 2026-11-30

Reads the results of that day in the folder and writes what they measured of each claim beside its target, and whether
it is met; of a claim that was measured several times that day the last result counts. Results of models that were made
smaller claim nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring import today, versions, write_result


def read_claims(folder: Path, date: str) -> list[dict[str, Any]]:
    """The claims of a day's results, each with the precision and the name of its result; the last of each kind.

    Raises:
        SystemExit: there are none.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    files = sorted(folder.glob(f"*_{date}*.json"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["benchmark"] == "table":
            continue
        precision = result["settings"].get("precision", "fp32")
        for each in result.get("claims", ()):
            key = each["work"], each["what"], precision
            found.pop(key, None)
            found[key] = {**each, "precision": precision, "result": file.stem}
    if not found:
        raise SystemExit(f"no result of {date} in {folder} makes a claim: run the benchmarks first (`make bench`).")
    return [{**each, "met": is_met(each)} for each in found.values()]


def is_met(claim: Mapping[str, Any]) -> bool | None:
    """Whether a number reaches its target; None where it was not measured."""
    measured, target = claim["measured"], claim["target"]
    if measured is None:
        return None
    return bool(measured >= target) if claim["better"] == "higher" else bool(measured <= target)


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""
    words = {True: "met", False: "not met", None: "not measured"}

    def lines() -> Iterator[str]:
        yield f"# Targets and what was measured, {result['date']}"
        yield ""
        yield "| work | precision | what | measured | target | | result |"
        yield "|---|---|---|---|---|---|---|"
        for each in result["claims"]:
            sign = "at least" if each["better"] == "higher" else "at most"
            measured = "" if each["measured"] is None else f"{each['measured']:.2f}"
            yield (
                f"| {each['work']} | {each['precision']} | {each['what']} | {measured} | {sign} {each['target']:g} | "
                f"{words[each['met']]} | [file]({each['result']}.md) |"
            )
        yield ""
        met = [each["met"] for each in result["claims"]]
        yield f"{met.count(True)} met, {met.count(False)} not met, {met.count(None)} not measured."
        yield ""
        yield "## Not claimed"
        yield ""
        for line in result["not_claimed"]:
            yield f"- {line}"

    return "\n".join(lines()) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Put a day's results beside the targets.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--date", default=today(), help="year-month-day (default: today)")
    options = parser.parse_args(arguments)
    result = {
        "benchmark": "table",
        "date": options.date,
        "versions": versions("visling", "torch"),
        "claims": read_claims(options.out, options.date),
        "not_claimed": ["Machine, settings and spread are in the results that each line names."],
    }
    page = as_markdown(result)
    print(page)
    print(write_result(options.out, f"table_{options.date}", result, page))


if __name__ == "__main__":
    main()
