"""Every fault of docs/reliability.md, done for real: which ones the library survives, how long that takes, and what it
says.

    python benchmarks/faults.py --out benchmarks/results                    # all, some ten minutes on two free cores
    python benchmarks/faults.py --out benchmarks/results --only disk_full   # some
    python benchmarks/faults.py --out benchmarks/results --read RUN.xml     # of a run of pytest that was made before

It runs the tests of tests/faults and writes down what they recorded: outcome and seconds of each, and what it counted
or the message that it found. A test that this machine does not allow is listed with the reason. `--read` takes what
`pytest tests/faults -o junit_family=xunit1 --junitxml=RUN.xml` has written.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

# The script's folder is on the path: benchmarks share how a machine is described and results are written.
from measuring import circumstances, load_averages, machine, versions, write_result

ROOT = Path(__file__).parents[1]
NOT_CLAIMED = (
    "The run that is killed is small, and its updates are short: most kills meet the start of the command, or files "
    "that are being written, more often than they would in a long run.",
    "A kill is not a power failure: what the system has in its cache is not lost. Files are flushed before they are "
    "renamed, but no disk was unplugged.",
    "A small disk in memory stands for a full one. Other file systems may report a full disk later, when a file is "
    "flushed or closed.",
    "Seconds depend on what else the machine does: the load averages tell.",
)


def run_tests(only: str, place: Path) -> Path:
    """Run the tests of faults; returns the file with their outcomes.

    Args:
        only: expression of pytest's -k; empty = all.
    Raises:
        SystemExit: pytest found nothing to run, or could not.
    """
    outcomes = place / "outcomes.xml"
    command = [
        sys.executable, "-m", "pytest", str(ROOT / "tests" / "faults"), "-p", "no:cacheprovider", "-o",
        "junit_family=xunit1", f"--junitxml={outcomes}", *(["-k", only] if only else []),
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode not in (0, 1):  # 1: some failed, which the result says
        raise SystemExit(f"the tests did not run:\n{ended.stdout}{ended.stderr}")
    return outcomes


def read_outcomes(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Test of tests/faults -> outcome, seconds, and what it recorded; the last one if it is in several files."""
    found = {}
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            if ".faults." not in case.attrib.get("classname", ""):  # the test that a stopped run was at has none
                continue
            name = f"{case.attrib['classname'].rpartition('.')[2]}::{case.attrib['name']}"
            recorded = {one.attrib["name"]: one.attrib["value"] for one in case.iter("property")}
            kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
            outcome = next((kinds[child.tag] for child in case if child.tag in kinds), "passed")
            reason = next((child.attrib.get("message", "") for child in case if child.tag == "skipped"), "")
            found[name] = {
                "outcome": outcome,
                "seconds": float(case.attrib["time"]),
                "recorded": {**recorded, **({"reason": reason} if reason else {})},
            }
    return found


def as_markdown(result: Mapping[str, Any]) -> str:
    """The result for readers."""
    return "\n".join(_list_lines(result)) + "\n"


def _list_lines(result: Mapping[str, Any]) -> Iterator[str]:
    counts = ", ".join(f"{number} {outcome}" for outcome, number in result["outcomes"].items())
    yield f"# Faults done for real, {result['date']}"
    yield ""
    yield f"Tests of `tests/faults`: {counts}. What each of them demands stands in its docstring and assertions."
    yield ""
    yield "| test | outcome | seconds | recorded |"
    yield "|---|---|---|---|"
    for name, found in result["faults"].items():
        recorded = "; ".join(f"{key}: {value}" for key, value in found["recorded"].items())
        yield f"| `{name}` | {found['outcome']} | {found['seconds']:.1f} | {_shorten_paths(recorded)} |"
    yield ""
    yield from circumstances(result)


def _shorten_paths(text: str) -> str:
    """Messages without the temporary folders of the tests, and without what would end a cell of the table."""
    return re.sub(r"/\S*/pytest-\d+/[^/\s]+/", "", text).replace("|", "/").replace("\n", " ")


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the dated result")
    parser.add_argument("--only", default="", help="tests whose names fit this expression of pytest's -k")
    parser.add_argument("--read", type=Path, nargs="+", help="outcomes of earlier runs, instead of running the tests")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tests, or read what they left, and write the result."""
    options = read_options(arguments)
    date, load_before = datetime.date.today().isoformat(), load_averages()
    with tempfile.TemporaryDirectory(prefix="visling-faults-") as folder:
        found = read_outcomes(options.read or [run_tests(options.only, Path(folder))])
    faults = {
        name: {**one, "recorded": {key: _shorten_paths(value) for key, value in one["recorded"].items()}}
        for name, one in sorted(found.items())
    }
    result = {
        "benchmark": "faults",
        "date": date,
        "machine": machine(torch.device("cpu")),
        "versions": versions("visling", "torch", "numpy", "safetensors"),
        "settings": {"only": options.only or "all", "read": len(options.read or ())},
        "load_before": load_before,
        "load_after": load_averages(),
        "outcomes": dict(Counter(one["outcome"] for one in faults.values())),
        "faults": faults,
        "not_claimed": NOT_CLAIMED,
    }
    print(write_result(options.out, f"faults_{date}", result, as_markdown(result)))


if __name__ == "__main__":
    main()
