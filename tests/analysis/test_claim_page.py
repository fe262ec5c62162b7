"""The pages of a claim: every number is there, verdicts are those of the file, an unfinished or tiny one says so, and
nothing in the file can break the page."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fixtures.claim_results import CLAIM, TWICE, describe_arm, describe_contrast, describe_result, describe_unrun
from fixtures.result_pages import Page, assert_stands_alone, read_cells

from visling.analysis.claim_page import write_claim
from visling.errors import RunError
from visling.recipes.claim_configs import Arm, Contrast

ATTACK = '<script>alert("x")</script>|'


def written(folder: Path, found: dict[str, Any]) -> tuple[str, Page]:
    """Markdown and page."""
    (folder / "claim.json").write_text(json.dumps(found))
    text, page = write_claim(folder)
    assert (text, page) == (folder / "claim.md", folder / "claim.html")
    return text.read_text(encoding="utf-8"), Page(page.read_text(encoding="utf-8"))


def verdict_of(text: str) -> str:
    """The paragraph of the verdict, which is the last one in bold before the tables."""
    return [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("**")][-1]


def test_every_number_is_in_both(tmp_path: Path) -> None:
    text, page = written(tmp_path, describe_result())
    expected = [
        [
            "contrast",
            "formula",
            "mean ± spread",
            "95 % interval",
            "the paper says",
            "size",
            "verdict",
            "seeds needed",
        ],
        ["gain", "without - with", "+3.5 ± 0.5", "+2.3 to +4.6", "above 0", "2", "agrees", "4"],
        ["arm", "what it is", "percent", "examples", "updates", "minutes"],
        ["with", "masked words and the relation", "51.0 ± 1.5", "4,000", "1,500 + 625", "4.2"],
        ["without", "masked words alone", "54.5 ± 1.5", "4,000", "1,500 + 625", "4.2"],
        ["arm or contrast", "seed 0", "seed 1", "seed 2"],
        ["with", "50.0", "51.0", "52.0"],
        ["without", "53.0", "54.0", "56.5"],
        ["gain", "+3.0", "+3.0", "+4.5"],
    ]
    assert read_cells(text) == expected
    assert page.rows == expected
    assert verdict_of(text) == "**Agrees:** the 95 % interval, +2.3 to +4.6, lies above 0."
    for fact in (
        "Sentence-image relation prediction hurts. (VL-BERT, section 4.3)",
        "VQA 66.2 with, 67.2 without",
        "the objective of sentence-image relation",
        "no text corpus",
        "Measured: accuracy on split test.",
        "2.1 points",
        "docs/results/finetuning.md",
        "45, within the budget",
        "plain; sketch (domain = sketch, 20 % of the regions with another class and attribute, "
        "split quarter: 25 % of the training images)",
        "3, from 0 on",
        "torch 2.13",
        "a processor, 2 cores",
        "0.11 TFLOP/s",
        "47 minutes on one core",
        "2026-11-30",
        "visling finetune --out 'runs/it'\"'\"'s'",
    ):
        assert fact in text
        assert fact in page.text
    assert "Not finished" not in text
    assert text.count("visling pretrain --out runs/a\n") == 1, "a command of several arms is listed once"
    assert "# with, without\n" in text


def test_the_verdict_is_that_of_the_file_in_words(tmp_path: Path) -> None:
    above, below = {"low": -0.5, "high": 1.5}, {"low": -6.0, "high": -3.5}
    bound = replace(CLAIM, contrasts={"gain": replace(CLAIM.contrasts["gain"], expected="not below")})
    for claim, found, told in (
        (CLAIM, {"verdict": "disagrees", **above}, "**Disagrees:** the 95 % interval, -0.5 to +1.5, lies below 2."),
        (
            CLAIM,
            {"verdict": "agrees", "low": 0.5, "high": 1.5},
            "**Agrees:** the 95 % interval, +0.5 to +1.5, lies above 0, but below 2, the smallest difference that "
            "would matter.",
        ),
        (bound, {"verdict": "agrees", **above}, "**Agrees:** the 95 % interval, -0.5 to +1.5, lies above -2."),
        (bound, {"verdict": "disagrees", **below}, "**Disagrees:** the 95 % interval, -6.0 to -3.5, lies below -2."),
        (
            CLAIM,
            {"verdict": "undecided", "low": -1.0, "high": 4.0, "seeds_needed": 1200},
            "**Undecided at this budget:** the 95 % interval is -1.0 to +4.0; 1,200 seeds would decide a difference of "
            "2 points.",
        ),
        (
            CLAIM,
            {"verdict": "undecided", "low": 1.0, "high": 4.0, "seeds_needed": None},
            "**Undecided at this budget:** the 95 % interval is +1.0 to +4.0; how many seeds would decide a difference "
            "of 2 points is not known.",
        ),
    ):
        expected = claim.contrasts["gain"].expected
        contrast = describe_contrast(3.0, 3.0, 4.5, expected=expected, **found)
        result = describe_result(claim, verdict=found["verdict"], contrasts={"gain": contrast})
        text, page = written(tmp_path, result)
        assert verdict_of(text) == told
        assert told.replace("**", "") in page.text
        rule = "not below minus the size" if expected == "not below" else "above 0; if it does not"
        assert rule in text, "the rule is that of the claim's contrasts"


def test_several_contrasts_are_explained_one_by_one(tmp_path: Path) -> None:
    undecided = describe_contrast(-1.0, 1.0, expected="not below", size=3.0, verdict="undecided", low=-12.7, high=12.7)
    result = describe_result(
        TWICE,
        verdict="undecided",
        arms={**describe_result()["arms"], "heads": describe_arm(40.0, 42.0)},
        contrasts={"gain": describe_contrast(3.0, 3.0, 4.5), "no loss": undecided},
    )
    text, page = written(tmp_path, result)
    assert verdict_of(text) == "**Undecided at this budget:** contrast no loss."
    for line in (
        "gain: agrees: the 95 % interval, +2.3 to +4.6, lies above 0",
        "no loss: undecided: the 95 % interval is -12.7 to +12.7; 4 seeds would decide a difference of 3 points",
    ):
        assert f"- {line}\n" in text
        assert line.partition(": ")[2] in page.text
    rows = {row[0]: row[1:] for row in read_cells(text) if len(row) > 4}
    assert rows["no loss"][0] == "0.5 heads + 0.5 without - with"
    assert rows["no loss"][3] == "not below -3"
    assert rows["arm"][1] == "measured", "arms that are measured differently say how"
    assert rows["with"][1] == "accuracy on split test, texts of 10 words or more"
    assert rows["heads"][1] == "how often the best head attends most to what a phrase names on split test"
    seeds = {row[0]: row[1:] for row in page.rows[-5:]}
    assert seeds["heads"] == ["40.0", "42.0", "–"]
    assert (len(seeds["gain"]), seeds["no loss"][-1]) == (3, "–")
    agreed, _ = written(tmp_path, result | {"verdict": "agrees"})
    assert verdict_of(agreed) == "**Agrees:** all contrasts agree."


def test_one_that_is_running_says_how_far_it_is(tmp_path: Path) -> None:
    arms = {"with": describe_arm(50.0, 51.0), "without": describe_arm(53.0)}
    result = describe_result(
        status="running",
        planned_seeds=5,
        verdict=None,
        arms=arms,
        contrasts={"gain": describe_contrast(3.0, verdict="undecided", seeds_needed=None)},
    )
    text, page = written(tmp_path, result)
    for words in (text, page.text):
        assert "Not finished: 1 of 5 seeds have been measured in all arms." in words
        assert "there is no 95 % interval; how many seeds would decide a difference of 2 points is not known" in words
    assert page.rows[1][2:4] == ["+3.0", "–"]
    assert page.rows[4][2] == "53.0", "one seed has no spread"
    assert page.rows[-2] == ["without", "53.0", "–"]


def test_nothing_measured_yet(tmp_path: Path) -> None:
    found = describe_result(status="running", verdict=None)
    for name in ("arms", "contrasts", "curves", "power", "machine", "minutes", "versions"):
        found[name] = None
    text, page = written(tmp_path, found)
    assert "Not finished: 0 of 3 seeds" in text
    assert page.rows[1] == ["gain", "without - with", "–", "–", "above 0", "2", "–", "–"]
    assert page.rows[3] == ["with", "masked words and the relation", "–", "–", "–", "–"]
    assert len(page.rows) == 5, "without a value there is no table of seeds"
    assert not (tmp_path / "claim.svg").exists()
    for absent in ("Curves", "Commands", "Power estimate"):
        assert absent not in text
        assert absent not in page.text


def test_one_that_was_not_run_shows_its_estimate(tmp_path: Path) -> None:
    text, page = written(tmp_path, describe_unrun())
    assert verdict_of(text).startswith("**Not run:**")
    for words in (text, page.text):
        assert "900, more than the budget" in words
        assert re.search(r"decide a difference of 2 points:? 30", words)


def test_a_tiny_one_is_a_test_of_the_machinery(tmp_path: Path) -> None:
    text, page = written(tmp_path, describe_result(size="tiny", verdict="undecided"))
    for words in (text, page.text):
        assert "Undecided at this budget: size tiny is a test of the machinery" in words.replace("*", "")
        assert "would decide a difference of 2 points" not in words


def test_curves_are_drawn_in_both(tmp_path: Path) -> None:
    found = describe_result()
    found["curves"]["fine-tuning: accuracy"]["without"] += [[100, math.nan], [150, None], [None, 0.5], [200, 0.75]]
    text, page = written(tmp_path, found)
    image = re.search(r"!\[(.*)\]\((.*)\)", text)
    assert image is not None
    assert image[2] == "claim.svg"
    assert image[1] == (
        "pre-training: masked_lm_accuracy: with 0.1 → 0.5; without 0.1 → 0.6. fine-tuning: accuracy: without "
        "0.25 → 0.75"
    )
    space = "{http://www.w3.org/2000/svg}"
    drawing = ElementTree.parse(tmp_path / "claim.svg").getroot()
    panels = drawing.findall(f"{space}g")
    looks = [[line.get("class") for line in panel.iter(f"{space}polyline")] for panel in panels]
    assert looks == [["line c0", "line c1"], ["line c1"]], "an arm has one colour in all charts"
    texts = [[text.text for text in panel.iter(f"{space}text")] for panel in panels]
    assert texts[1][0] == "fine-tuning: accuracy"
    assert texts[1][-1] == "without"
    assert "with" not in texts[1]
    height = float((drawing.get("height") or "").removesuffix("px"))
    last = float((panels[1].get("transform") or "").removesuffix(")").split()[1]) + 250
    assert last < height, "the last chart lies within the picture"
    assert "svg" in page.tags


def test_nothing_in_the_file_breaks_the_pages(tmp_path: Path) -> None:
    first, second = CLAIM.arms.values()
    claim = replace(
        CLAIM,
        statement=ATTACK,
        figure=ATTACK,
        note=f"{ATTACK}\n## {ATTACK}",
        arms={
            ATTACK: replace(first, about=ATTACK),
            "without\n": second,
            "third": Arm(about="x", trainings=(first.trainings)),
        },
        contrasts={ATTACK: Contrast(weights={ATTACK: 1, "without\n": -1, "third": 0}, size=2.0)},
    )
    arm = describe_arm(50.0, commands=[["visling", ATTACK]])
    result = describe_result(
        claim,
        arms={ATTACK: arm},
        contrasts={ATTACK: describe_contrast(1.0)},
        versions={ATTACK: ATTACK},
        curves={f"[{ATTACK}]": {ATTACK: [[1, 2.0], [2, 3.0]]}},
    )
    text, page = written(tmp_path, result)
    assert_stands_alone((tmp_path / "claim.html").read_text(encoding="utf-8"))
    ElementTree.parse(tmp_path / "claim.svg")
    shown = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)  # code is shown as it is
    assert "<script" not in shown
    assert not re.search(r"^## <|^## &", shown, flags=re.MULTILINE)
    unescaped = [[cell.replace("\\|", "|").replace("&lt;", "<") for cell in row] for row in read_cells(text)]
    assert unescaped == [[" ".join(cell.split()) for cell in row] for row in page.rows]
    assert unescaped[1][:2] == [ATTACK, f"{ATTACK} - without"], "an arm with the factor 0 is left out"
    assert f"![\\[{ATTACK}".replace("|", "\\|").replace("<", "&lt;") in text


def test_a_folder_without_a_claim(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"OUT/claims/NAME after visling reproduce"):
        write_claim(tmp_path)
    broken = describe_result(arms={"with": describe_arm(50.0, values={"first": 50.0})})
    missing = describe_result()
    del missing["claim"]["arms"]
    for content, message in (
        ("{", "cannot read"),
        (json.dumps(broken), "cannot read"),
        ("[]", "not a claim of this version"),
        (json.dumps(missing), r"not a claim of this version: KeyError\('arms'\). Run visling reproduce again"),
    ):
        (tmp_path / "claim.json").write_text(content)
        with pytest.raises(RunError, match=message):
            write_claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["claim.json"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "claim.json").write_text(json.dumps(describe_result()))
    (tmp_path / "claim.md").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*claim\.md.*Free space or fix permissions"):
        write_claim(tmp_path)
