"""Cases by number: which file of a reader's sample is damaged, and how, follows from the seed and the number alone.

To repeat one:  python -m fuzz.campaign --reader "stores, whole" --seed 0 --case 17  (in `tests`)
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.mutations import damage, guess_kind
from fuzz.readers import READERS
from fuzz.readers.base import Reader
from fuzz.sandbox import Outcome, Sandbox


@dataclass
class Tally:
    """What came of the cases of one reader."""

    cases: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """By kind of outcome."""
    escaped: list[tuple[int, str]] = field(default_factory=list)
    """Number of the case, and what escaped."""


class Sample:
    """The valid files of a reader, in a folder that each case changes and sets right again.

    Args:
        folder: an empty one, whose name is part of every message about a file in it.
    """

    def __init__(self, reader: Reader, folder: Path) -> None:
        self.reader, self.folder = reader, folder
        reader.write(folder)
        self.files = {
            file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
        }

    def read_damaged(self, sandbox: Sandbox, seed: int, case: int) -> Outcome:
        """What comes of reading the files with one of them damaged. Case 0 is the sample as it is."""
        draw = random.Random(f"{seed}/{self.reader.name}/{case}")
        name = draw.choice(list(self.files))
        if case:
            content = damage(self.files[name], self.reader.kind or guess_kind(name.name), draw)
            (self.folder / name).write_bytes(content)
        try:
            return sandbox.read(self.reader.name, self.folder)
        finally:
            if self.reader.writes:
                shutil.rmtree(self.folder)
                self.folder.mkdir()
                for other, whole in self.files.items():
                    (self.folder / other).parent.mkdir(parents=True, exist_ok=True)
                    (self.folder / other).write_bytes(whole)
            elif case:
                (self.folder / name).write_bytes(self.files[name])


def run_cases(sandbox: Sandbox, names: Sequence[str], cases: int, seed: int) -> dict[str, Tally]:
    """Tally of each reader over at least so many cases in all, the same number for each."""
    each = -(-cases // len(names))
    return {name: _run_reader(sandbox, name, each, seed) for name in names}


def _run_reader(sandbox: Sandbox, name: str, cases: int, seed: int) -> Tally:
    tally = Tally()
    with _make_sample(name) as sample:
        for case in range(1, cases + 1):
            outcome = sample.read_damaged(sandbox, seed, case)
            tally.cases += 1
            tally.counts[outcome.kind] += 1
            if outcome.kind == "escaped":
                tally.escaped.append((case, outcome.what))
    return tally


class _make_sample:
    """A sample in a temporary folder."""

    def __init__(self, name: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hostile-")
        self._name = name

    def __enter__(self) -> Sample:
        return Sample(READERS[self._name], Path(self._folder.__enter__()))

    def __exit__(self, *raised: Any) -> None:
        self._folder.__exit__(*raised)


def _print_cases(tallies: dict[str, Tally], seed: int) -> Iterator[str]:
    for name, tally in tallies.items():
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
                with _make_sample(name) as sample:
                    print(name, sample.read_damaged(sandbox, arguments.seed, arguments.case))
            return
        tallies = run_cases(sandbox, names, arguments.cases, arguments.seed)
    print("\n".join(_print_cases(tallies, arguments.seed)))
    if arguments.out is not None:
        found = {
            name: {"cases": t.cases, **t.counts, "what": [what for _, what in t.escaped]} for name, t in tallies.items()
        }
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
