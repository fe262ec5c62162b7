"""visling inspect: the file it writes, what it prints, what it refuses."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from fixtures.tiny_models import save_tiny_model

from visling import api
from visling.analysis.inspection_page import read_static
from visling.checkpoints.files import digest
from visling.cli import app

ROOT = Path(__file__).parents[2]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Runs the command in an empty folder: status, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["visling", "inspect", *map(str, words)])
        capsys.readouterr()
        status = 0
        try:
            app.run()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return run


def embedded(page: Path) -> Any:
    """Documents and first state in a page."""
    text = page.read_text().partition('id="visling-data">')[2].partition("</script>")[0]
    return json.loads(text)


def test_one_page_says_what_it_holds(call: Call, world: Any) -> None:
    status, out, err = call(world.vqa, world.picture(), "how many stars?", "--json", "numbers.json")
    assert (status, err) == (0, "")
    page = Path(f"{world.picture().stem}-how-many-stars.html")
    numbers = json.loads(Path("numbers.json").read_text())
    assert embedded(page) == {"documents": [numbers], "state": {}}
    assert f"Wrote {page} and numbers.json" in out
    assert numbers["answers"][0]["text"] in out
    assert "what counted most: " in out
    assert (
        numbers["model"]["command"]
        == f"visling inspect {world.vqa} {world.picture()} 'how many stars?' --json numbers.json"
    )


def test_several_runs_stand_side_by_side(call: Call, world: Any, tmp_path: Path) -> None:
    other = save_tiny_model(world, "lxmert", tmp_path / "other")
    status, out, _ = call(world.vqa, other, world.picture(), "how many?", "--out", "two.html", "--json", "two.json")
    assert status == 0
    documents = embedded(Path("two.html"))["documents"]
    assert [document["model"]["family"] for document in documents] == ["visualbert", "lxmert"]
    assert json.loads(Path("two.json").read_text()) == documents
    assert out.count("what counted most") == 2


def test_a_layer_a_head_and_a_direction_can_be_shown_first(call: Call, world: Any, tmp_path: Path) -> None:
    run = save_tiny_model(world, "lxmert", tmp_path / "run")
    layers = api.load(run, device="cpu").inspect(world.picture(), "how many?").layers_by_direction
    asked = (run, world.picture(), "how many?", "--no-removal", "--out")
    call(*asked, "a.html", "--layer", layers["text_to_regions"][-1], "--head", 1)
    last = len(layers["text_to_regions"]) - 1
    assert embedded(Path("a.html"))["state"] == {
        "show": "attention", "direction": "text_to_regions", "cells": f"{last}.1",
    }  # fmt: skip
    call(*asked, "b.html", "--direction", "regions_to_text")
    assert embedded(Path("b.html"))["state"]["cells"] == "all"
    assert embedded(Path("b.html"))["documents"][0]["removal"] is None
    call(*asked, "c.html", "--layer", layers["regions_to_regions"][0])
    assert embedded(Path("c.html"))["state"]["direction"] == "regions_to_regions", "the direction of that layer"
    call(*asked, "d.html", "--layer", 0)
    assert embedded(Path("d.html"))["state"]["cells"] == "0.*"


def test_heads_can_be_coloured_by_the_phrases_that_they_ground(call: Call, world: Any, tmp_path: Path) -> None:
    weights = digest(world.vqa / "model" / "model.safetensors")
    measured = {
        "format": "visling-alignment-1", "checkpoint": weights, "layers": ["layers.0"],
        "phrases": {"accuracy": [[20.0, 50.0]]},
    }  # fmt: skip
    file = tmp_path / "alignment.json"
    file.write_text(json.dumps(measured))
    asked = (world.vqa, world.picture(), "how many?", "--no-removal", "--json", "numbers.json", "--alignment", file)
    assert call(*asked)[0] == 0
    (row,) = json.loads(Path("numbers.json").read_text())["rows"]
    assert row["statistics"]["phrases_grounded"] == {"text_to_regions": {"layers.0": [0.2, 0.5]}}
    assert set(row["statistics"]["gradient_weighted_attention"]["text_to_regions"]) == {"layers.0"}

    def refused(content: str, message: str) -> None:
        file.write_text(content)
        status, _, err = call(*asked, "--out", "other.html", "--json", "other.json")
        assert (status, message in err) == (2, True), err
        assert not Path("other.html").exists()

    refused(json.dumps(measured | {"checkpoint": "0" * 64}), "was measured on weights 000000000000, which no run given")
    refused("{}", "is not what `visling analysis alignment` writes ('format'); expected visling-alignment-1")
    refused("no", "alignment.json is not what")
    file.unlink()
    status, _, err = call(*asked, "--out", "other.html", "--json", "other.json")
    assert (status, "Give the alignment.json of this model" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "layers.9"], "no layer 'layers.9' with maps text_to_regions in"),
        (["--layer", "7"], "Give one of layers.0, or its number, from 0 to 0."),
        (["--head", "2"], "no head 2 in"),
        (["--choice", "a"], "reads no answers to choose from"),
        (["--out", "taken.html"], "taken.html exists. Name another file with --out, or remove it."),
        (["--json", "taken.html"], "taken.html exists."),
        (["--out", "no/folder/page.html"], "cannot write the page no/folder/page.html"),
        (["--json", "no/folder/numbers.json"], "cannot write no/folder/numbers.json"),
    ],
)
def test_what_cannot_be_done_is_refused(call: Call, world: Any, options: list[str], message: str) -> None:
    Path("taken.html").write_text("mine")
    status, out, err = call(world.vqa, world.picture(), "how many?", *options)
    assert (status, out) == (2, "")
    assert message in err
    assert Path("taken.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "gone.png", "how many?"], "no image gone.png. Check the path, and put the text into quotes: visling"),
        (["RUN", "how many?"], "reads 1 image at a time; found 0"),
        (["nowhere", "PICTURE", "how many?"], "no model in nowhere"),
        (["RUN", "PICTURE", "PICTURE", "how many?"], "reads 1 image at a time; found 2"),
        (["RUN", "PICTURE", " "], "the question is empty"),
        (["RUN", "broken.png", "how many?"], "cannot read image broken.png"),
    ],
)  # fmt: skip
def test_what_is_no_question_is_refused(call: Call, world: Any, words: list[str], message: str) -> None:
    Path("broken.png").write_bytes(b"no picture")
    names = {"RUN": world.vqa, "PICTURE": world.picture()}
    status, out, err = call(*(names.get(word, word) for word in words))
    assert (status, out) == (2, "")
    assert message in err
    assert not list(Path().glob("*.html"))


def test_a_run_alone_is_no_command(call: Call, world: Any) -> None:
    status, _, err = call(world.vqa)
    assert status == 2
    assert "give a run, an image and the text" in err


def test_a_run_that_reads_words_alone_needs_no_image(call: Call, world: Any, tmp_path: Path) -> None:
    run = save_tiny_model(world, "visualbert", tmp_path / "blind", text_only=True)
    status, out, _ = call(run, "how many stars?")
    assert status == 0
    assert "no picture side" in out
    assert Path("how-many-stars.html").is_file()
    status, _, err = call(run, "how many stars?", "--direction", "text_to_regions", "--out", "again.html")
    assert status == 2
    assert "has no maps text_to_regions: it reads the words alone" in err


def test_script_and_style_travel_with_the_package() -> None:
    """The wheel holds all of `visling/` but what git ignores (hatch, "packages")."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert settings["targets"]["wheel"] == {"packages": ["visling"]}
    assert set(settings) == {"targets"}
    ignored = [line for line in (ROOT / ".gitignore").read_text().splitlines() if line and line[0] != "#"]
    for name in ("inspect.js", "inspect.css"):
        assert len(read_static(name)) > 1000
        assert not any(fnmatch(name, pattern) or "static" in pattern for pattern in ignored)
