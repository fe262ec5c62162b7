"""Files damaged at random are refused by an error of the library, or read as what was promised: nothing else escapes,
no code runs, memory and time stay bounded, and nothing is written (`sandbox` watches all of it)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz.campaign import run_cases
from fuzz.mutations import MADE, STRUCTURES, guess_kind, replace_values
from fuzz.readers import READERS
from fuzz.sample import Sample
from fuzz.sandbox import Sandbox
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st

SEED = 0
NAMES = list(READERS)
JSON_READERS = [
    "stores, whole", "questions, VQA", "questions, GQA as columns", "captions, Karpathy", "objects, COCO instances",
    "captions, LXMERT", "questions, VCR", "runs, run.json",
]  # fmt: skip
"""Readers whose files are changed by hypothesis, one after the other."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


def check_cases(sandbox: Sandbox, cases: int, seed: int) -> None:
    """So many cases, none of which escapes; says how each that does is repeated."""
    done, escaped = 0, []
    for name, tally in run_cases(sandbox, NAMES, cases, seed):
        done += tally.cases
        assert tally.counts.total() == tally.cases
        escaped += [f'--reader "{name}" --seed {seed} --case {case}: {what}' for case, what in tally.escaped]
    assert done >= cases
    assert not escaped, f"{len(escaped)} of {done}; python -m fuzz.campaign ...\n" + "\n".join(escaped)
    assert not MADE.exists(), "code of a pickle was run"


def test_500_damaged_files(sandbox: Sandbox) -> None:
    check_cases(sandbox, 500, SEED)


@pytest.mark.slow
def test_10000_damaged_files(sandbox: Sandbox) -> None:
    check_cases(sandbox, 10_000, SEED + 1)


def test_samples_are_read_whole(sandbox: Sandbox, tmp_path: Path) -> None:
    """Otherwise everything would be refused for another reason than its damage."""
    for number, name in enumerate(NAMES):
        folder = tmp_path / f"sample-{number}"
        folder.mkdir()
        Sample(READERS[name], folder)
        assert sandbox.read(name, folder) == ("read", "", False)


def test_every_structure_is_changed(tmp_path: Path) -> None:
    """A mutation that fails leaves the file to the others, so a broken one would go unnoticed."""
    changed = set()
    for number, name in enumerate(NAMES):
        folder = tmp_path / f"sample-{number}"
        folder.mkdir()
        sample = Sample(READERS[name], folder)
        for file, content in sample.files.items():
            kind = guess_kind(file.name) if len(sample.files) > 1 else READERS[name].kind or guess_kind(file.name)
            if kind in STRUCTURES and (kind, file.name) != ("json", "val.json"):  # lines, next to a picture
                draws = (STRUCTURES[kind](content, random.Random(case)) for case in range(5))
                assert any(other != content for other in draws), f"{name}, {file}"
                changed.add(kind)
    assert changed == set(STRUCTURES)


_LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**30, 2**63, ""])
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", JSON_READERS)
def test_values_of_any_kind_in_json(sandbox: Sandbox, tmp_path: Path, name: str) -> None:
    """By hypothesis, which shrinks what escapes."""
    sample = Sample(READERS[name], tmp_path)
    files = [file for file in sample.files if file.suffix in (".json", ".jsonl")]

    @seed(SEED)
    @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(files), st.lists(st.tuples(st.integers(0, 10**6), _VALUES), min_size=1, max_size=2))
    @example(files[0], [(0, None)])
    def check(file: Path, changes: list[tuple[int, Any]]) -> None:
        outcome = sandbox.read_changed(sample, file, replace_values(sample.files[file], changes))
        assert outcome.kind != "escaped", outcome.what

    check()
