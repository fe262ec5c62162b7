"""Many cases, by number, and what came of them.

To repeat one:  python -m fuzz.campaign --reader "stores, whole" --seed 0 --case 17  (in `tests`)
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.readers import READERS
from fuzz.sample import Sample
from fuzz.sandbox import Sandbox


@dataclass
class Tally:
    """What came of the cases of one reader."""

    cases: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """By kind of outcome."""
    escaped: list[tuple[int, str]] = field(default_factory=list)
    """Number of the case, and what escaped."""


def run_cases(sandbox: Sandbox, names: Sequence[str], cases: int, seed: int) -> Iterator[tuple[str, Tally]]:
    """Tally of each reader over at least so many cases in all, the same number for each."""
    each = -(-cases // len(names))
    for name in names:
        yield name, _run_reader(sandbox, name, each, seed)


def _run_reader(sandbox: Sandbox, name: str, cases: int, seed: int) -> Tally:
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        sample = Sample(READERS[name], Path(folder))
        for case, outcome in sandbox.run(sample, seed, range(1, cases + 1)):
            tally.cases += 1
            tally.counts[outcome.kind] += 1
            if outcome.kind == "escaped":
                tally.escaped.append((case, outcome.what))
    return tally


def _describe(name: str, tally: Tally) -> Iterator[str]:
    yield f"{name}: {tally.cases} cases, {dict(tally.counts)}"
    for case, what in tally.escaped:
        yield f"    case {case}: {what}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", nargs="+", default=list(READERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int)
    parser.add_argument("--cases", type=int, default=10_000, help="in all")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    names = [name for name in READERS if any(name.startswith(wanted) for wanted in arguments.reader)]
    with Sandbox() as sandbox:
        if arguments.case is not None:
            for name in names:
                with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
                    sample = Sample(READERS[name], Path(folder))
                    print(name, list(sandbox.run(sample, arguments.seed, [arguments.case])))
            return
        tallies = {}
        for name, tally in run_cases(sandbox, names, arguments.cases, arguments.seed):
            tallies[name] = tally
            print("\n".join(_describe(name, tally)), flush=True)
    if arguments.out is not None:
        found = {
            name: {"cases": t.cases, **t.counts, "what": [what for _, what in t.escaped]} for name, t in tallies.items()
        }
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
