"""The table of all claims: one row each, counted, by paper, and readable where a cell has several lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fixtures.claim_results import CLAIM, TWICE, describe_arm, describe_contrast, describe_result, describe_unrun
from fixtures.result_pages import read_cells

from visling.analysis.claim_table import write_table
from visling.errors import RunError


def written(folder: Path, claims: list[dict[str, Any]]) -> tuple[str, list[list[str]]]:
    """The file, and the rows below the table's head."""
    file = write_table(folder, claims)
    assert file == folder / "claims.md"
    text = file.read_text(encoding="utf-8")
    head, *rows = read_cells(text)
    assert head[0] == "claim"
    assert {len(row) for row in rows} == {len(head)}
    return text, rows


def test_a_row_has_everything(tmp_path: Path) -> None:
    _, rows = written(tmp_path, [describe_result()])
    assert rows == [
        [
            "[vlbert-relation](claims/vlbert-relation/claim.md)<br>Sentence-image relation prediction hurts.",
            "VL-BERT, section 4.3",
            "VQA 66.2 with, 67.2 without",
            "+3.5",
            "+2.3 to +4.6",
            "**agrees**",
            "3",
            "`visling reproduce vlbert-relation`",
            "47",
        ]
    ]


def test_a_difference_that_is_too_small_to_matter_is_called_so(tmp_path: Path) -> None:
    small, large = (describe_contrast(1.0, 1.0, 1.1, low=0.5, high=high) for high in (1.5, 2.5))
    _, rows = written(tmp_path, [describe_result(contrasts={"gain": contrast}) for contrast in (small, large)])
    assert [row[5] for row in rows] == ["**agrees**, by less than would matter", "**agrees**"]


def test_one_that_was_not_run_has_its_estimate(tmp_path: Path) -> None:
    _, rows = written(tmp_path, [describe_unrun(), describe_unrun(power={"seeds_needed": None, "minutes": None})])
    assert rows[0][0].startswith("vlbert-relation<br>"), "there is no page to link"
    assert rows[0][3:] == ["–", "–", "not run", "0 (30)", "`visling reproduce vlbert-relation`", "≈ 900"]
    assert rows[1][6:] == ["0", "`visling reproduce vlbert-relation`", "–"]


def test_several_contrasts_are_lines_of_a_cell(tmp_path: Path) -> None:
    worse = describe_contrast(-1.0, -2.0, low=-7.9, high=4.9, verdict="undecided", seeds_needed=40)
    contrasts = {"gain": describe_contrast(3.0, 3.0, 4.5, seeds_needed=4), "no loss": worse}
    arms = {**describe_result()["arms"], "heads": describe_arm(40.0, 42.0)}
    _, rows = written(tmp_path, [describe_result(TWICE, arms=arms, contrasts=contrasts, verdict="undecided")])
    assert rows[0][3:7] == [
        "gain: +3.5<br>no loss: -1.5",
        "gain: +2.3 to +4.6<br>no loss: -7.9 to +4.9",
        "**undecided**",
        "2 (40)",
    ]


def test_outcomes_are_counted_and_papers_stand_together(tmp_path: Path) -> None:
    def describe(number: int, paper: str, **changes: Any) -> dict[str, Any]:
        return describe_result(replace(CLAIM, name=f"claim-{number}", paper=paper), **changes)

    text, rows = written(
        tmp_path,
        [
            describe(1, "VL-BERT"),
            describe(2, "CVLP", verdict="disagrees"),
            describe(3, "VL-BERT", verdict="disagrees"),
            describe(4, "CVLP", verdict="undecided", size="tiny", minutes=0.31),
            describe(5, "VL-BERT", verdict=None, status="running"),
            describe_unrun(replace(CLAIM, name="claim-6", paper="CVLP")),
        ],
    )
    assert "Claims: 6; agrees: 1, disagrees: 2, undecided at this budget: 2, not run: 1." in text
    assert [row[7] for row in rows] == [f"`visling reproduce claim-{number}`" for number in (1, 3, 5, 2, 4, 6)]
    assert [row[5] for row in rows] == [
        "**agrees**",
        "**disagrees**",
        "undecided (not finished)",
        "**disagrees**",
        "undecided (tiny: a test of the machinery)",
        "not run",
    ]
    assert rows[4][6] == "3", "seeds needed say nothing of a test of the machinery"
    assert rows[4][8] == "0.3"


def test_nothing_breaks_a_row(tmp_path: Path) -> None:
    claim = replace(CLAIM, statement="a | b\n<b>", figure="1 | 2", paper="<i>|")
    _, rows = written(tmp_path, [describe_result(claim)])
    assert rows[0][0].endswith("<br>a \\| b &lt;b>")
    assert rows[0][1:3] == ["&lt;i>\\|, section 4.3", "1 \\| 2"]


def test_a_result_of_another_version(tmp_path: Path) -> None:
    damaged = describe_result()
    del damaged["claim"]["figure"]
    with pytest.raises(RunError, match=r"claim vlbert-relation is not of this version: KeyError\('figure'\)"):
        write_table(tmp_path, [describe_result(), damaged])
    with pytest.raises(RunError, match=r"cannot write .*none.*Free space"):
        write_table(tmp_path / "none", [describe_result()])
    assert not list(tmp_path.iterdir())
