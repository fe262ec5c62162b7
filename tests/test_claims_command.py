"""`visling reproduce` as it is typed: every claim at the size that only shows that it runs, one's own, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from visling.cli import app
from visling.recipes.claims import CLAIMS

EXAMPLE = Path(__file__).parents[1] / "examples" / "claims" / "shuffled_answers.toml"

QUICK = ("visualbert-captions", "visualbert-heads-ground", "vilbert-data", "cvlp-noise")
"""One of each kind: a score, attention heads, captions of fewer images, labels replaced."""


def type_command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["visling", "reproduce", *map(str, words)])
    try:
        app.run()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all claims, which share its worlds and runs."""
    return tmp_path_factory.mktemp("reproduced") / "tiny"


def read(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "claims" / name / "claim.json").read_text())
    return found


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CLAIMS]
)
def test_every_claim_runs(
    name: str, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert type_command(monkeypatch, name, "--size", "tiny", "--seeds", 1, "--jobs", 1, "--out", out) == 0
    printed = capsys.readouterr().out
    assert f"{name}: undecided" in printed
    found = read(out, name)
    assert (found["status"], found["verdict"]) == ("finished", "undecided")
    for arm, about in found["arms"].items():
        assert list(about["values"]) == ["0"], arm
        # Percent, or the difference of two
        assert -100 <= about["values"]["0"] <= 100
    for contrast in found["contrasts"].values():
        assert list(contrast["values"]) == ["0"]
    page = out / "claims" / name
    assert CLAIMS[name].statement.split()[0] in (page / "claim.md").read_text()
    assert (page / "claim.html").stat().st_size > 1000
    rows = [line for line in (out / "claims.md").read_text().splitlines() if f"visling reproduce {name}`" in line]
    assert len(rows) == 1


def test_the_list_says_what_each_claim_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert type_command(monkeypatch, "list", "--out", tmp_path / "out", "--size", "tiny") == 0
    printed = capsys.readouterr().out
    for name, claim in CLAIMS.items():
        assert name in printed
        assert claim.statement in printed
    assert "minutes" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("visualbert-caption",), "Did you mean 'visualbert-captions'"),
        (("mine.toml",), "no configuration file"),
        ((str(EXAMPLE.parent / "README"),), "no claim"),
    ],
)
def test_an_unknown_claim_is_refused(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert type_command(monkeypatch, *words, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        ("seeds = 3", "seeds = 2", "fewer than 3 decide nothing"),
        ("size = 5", "size = 0", "size must be positive"),
        ("shuffled = -1", "shufled = -1", "no arm 'shufled'. Did you mean 'shuffled'"),
        ('world = "shuffled"', 'world = "shufled"', "no world 'shufled'"),
        ("statement =", "statment =", "'mine.toml.statment' is not a setting of Claim"),
        ('"visualbert-vqa-scenes"', '"visualbert-vqa-scene"', "Did you mean 'visualbert-vqa-scenes'"),
    ],
)
def test_a_wrong_claim_of_ones_own_is_refused_with_what_to_do(
    wrong: str,
    right: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = EXAMPLE.read_text()
    assert wrong in text
    (tmp_path / "mine.toml").write_text(text.replace(wrong, right))
    assert type_command(monkeypatch, tmp_path / "mine.toml", "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_claim_of_ones_own_may_not_have_the_name_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text(EXAMPLE.read_text().replace('"shuffled-answers"', '"vilbert-data"'))
    assert type_command(monkeypatch, tmp_path / "mine.toml", "--out", tmp_path / "out") == 2
    assert "Give yours another name" in capsys.readouterr().err
