"""docs/results/claims.md and its pages are what `visling reproduce` wrote: no figure is edited by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from visling.analysis.claim_page import write_claim
from visling.recipes.claim_configs import FEWEST_SEEDS, Contrast
from visling.recipes.claims import CLAIMS
from visling.runs.verdicts import find_interval, join_verdicts, judge

RESULTS = Path(__file__).parents[1] / "docs" / "results"
FILES = sorted((RESULTS / "claims").glob("*/claim.json"))


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def test_every_claim_is_in_the_table() -> None:
    rows = [line for line in (RESULTS / "claims.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    for name in CLAIMS:
        assert sum(f"`visling reproduce {name}`" in row for row in rows) == 1, name
    assert len(FILES) >= 10


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_a_page_is_computed_from_its_file(file: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(file.parent, tmp_path / "claim")
    write_claim(folder)
    for name in ("claim.md", "claim.svg"):
        assert (folder / name).read_text(encoding="utf-8") == (file.parent / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_a_verdict_follows_from_the_seeds_by_the_rule(file: Path) -> None:
    found = read(file)
    verdicts = []
    for name, about in found["contrasts"].items():
        contrast = Contrast(**found["claim"]["contrasts"][name])
        values = {
            seed: sum(factor * found["arms"][arm]["values"][seed] for arm, factor in contrast.weights.items())
            for seed in about["values"]
        }
        assert about["values"] == pytest.approx(values)
        interval = find_interval(list(values.values()))
        assert interval is not None
        assert (about["low"], about["high"]) == pytest.approx((interval.low, interval.high))
        assert about["verdict"] == judge(contrast, list(values.values()))
        verdicts.append(about["verdict"])
        assert about["verdict"] == "undecided" or len(values) >= FEWEST_SEEDS
    assert found["verdict"] == join_verdicts(verdicts)
    assert found["size"] == "small"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_the_row_of_a_claim_says_what_its_file_says(file: Path) -> None:
    found = read(file)
    (row,) = [
        line
        for line in (RESULTS / "claims.md").read_text(encoding="utf-8").splitlines()
        if f"`visling reproduce {file.parent.name}`" in line
    ]
    assert f"(claims/{file.parent.name}/claim.md)" in row
    for contrast in found["contrasts"].values():
        assert f"{contrast['mean']:+.1f}" in row
        assert f"{contrast['low']:+.1f} to {contrast['high']:+.1f}" in row
    assert f"**{found['verdict']}**" in row
