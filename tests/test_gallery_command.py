"""`visling gallery` and `visling report` on the command line: what they write, and what they refuse in a sentence."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from visling import config as configs
from visling.cli import app
from visling.recipes.tables import FINETUNING
from visling.runs.evaluate import evaluate
from visling.runs.finetune import finetune

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command line; returns exit status, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["visling", *map(str, words)])
        capsys.readouterr()
        status = 0
        try:
            app.run()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(scope="module")
def runs(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an evaluated VQA run, `vqa`, and a retrieval run that is not evaluated, `retrieval`."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(world.vqa, folder / "vqa")
    evaluate(folder / "vqa", split="test", device="cpu")
    finetune(
        configs.override(FINETUNING["visualbert-retrieval-scenes"](), world.settings),
        folder / "retrieval",
        data=world.scenes,
        store=world.regions,
        init=world.pretrained,
        device="cpu",
    )
    return folder


def test_a_gallery_is_written_once_and_resumed(call: Call, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("gallery", runs / "vqa", "--examples", 4, "--device", "cpu", "--out", out)
    assert call(*words) == (0, f"Wrote {out / 'index.html'}\n", "")
    assert len(list((out / "views").iterdir())) == 4
    status, _, err = call(*words)
    assert status == 2
    assert "is not empty" in err
    assert "--resume" in err
    assert call(*words, "--resume")[0] == 0


def test_a_gallery_without_views_needs_no_model(call: Call, runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs / "vqa", copy)
    shutil.rmtree(copy / "model")
    assert call("gallery", copy, "--no-views")[0] == 0
    page = (copy / "gallery" / "index.html").read_text(encoding="utf-8")
    assert "What is missing" not in page
    assert not (copy / "gallery" / "views").exists()
    assert call("gallery", copy, "--out", tmp_path / "with")[0] == 0
    page = (tmp_path / "with" / "index.html").read_text(encoding="utf-8")
    assert "looked at is not shown: no model" in page


def test_retrieval_is_shown_before_and_after_fine_tuning(call: Call, runs: Path, world: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("gallery", runs / "retrieval", "--before", world.pretrained, "--device", "cpu", "--out", out)
    status, said, err = call(*words)
    assert (status, err) == (0, "")
    head, of_images, of_captions, wrote = said.splitlines()
    assert head == "15 captions, 3 images; before and after, R@1 / 5 / 10"
    assert of_images.split()[:4] == ["image", "of", "a", "caption"]
    assert of_images.endswith("/ 100.0 / 100.0"), "of three images, the right one is among five"
    assert of_captions.split()[:4] == ["caption", "of", "an", "image"]
    assert wrote == f"Wrote {out / 'index.html'}"
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "15 captions, 3 images" in page
    assert "without any fine-tuning" in page
    assert 12 <= page.count("<h4>before: rank ") == page.count("<h4>after: rank ") <= 15
    assert "was not found" not in page
    assert call(*words)[0] == 2
    limited = tmp_path / "limited"
    assert call(*words[:-1], limited, "--limit", 1)[0] == 0
    assert "5 captions, 1 image." in (limited / "index.html").read_text(encoding="utf-8")


def test_what_cannot_be_shown_is_refused_in_a_sentence(call: Call, runs: Path, world: Any, tmp_path: Path) -> None:
    vqa, retrieval, before = runs / "vqa", runs / "retrieval", ("--before", world.pretrained)
    cases: list[tuple[tuple[object, ...], list[str]]] = [
        ((tmp_path / "absent",), ["no run folder"]),
        ((retrieval,), ["has not been evaluated", "visling evaluate"]),
        ((vqa, "--split", "val"), ["has not been evaluated on 'val'", "It was on test"]),
        ((vqa, "--compare", retrieval), [f"{retrieval} has not been evaluated on 'test'"]),
        ((vqa, "--images", tmp_path / "gone"), ["no image folder"]),
        ((vqa, "--store", tmp_path / "gone"), ["gone"]),
        ((vqa, *before), ["fine-tuned for vqa, which ranks nothing"]),
        ((retrieval, "--before", vqa), ["fine-tuned for vqa, which ranks nothing"]),
        ((retrieval, *before, "--compare", vqa), ["--compare does not go with --before"]),
        ((retrieval, *before, "--resume"), ["--resume does not go with --before"]),
        ((retrieval, *before, "--split", "nope"), ["'nope'"]),
        ((world.pretrained, *before, "--data", tmp_path / "gone"), ["gone"]),
    ]
    for words, expected in cases:
        status, out, err = call("gallery", *words, "--device", "cpu", "--out", tmp_path / "out")
        assert (status, out) == (2, ""), (words, out)
        assert err.startswith("visling: "), (words, err)
        assert "Traceback" not in err
        for part in expected:
            assert part in err, (words, err)


def test_the_report_looks_again_unless_told_not_to(call: Call, runs: Path, world: Any, tmp_path: Path) -> None:
    images = ("--images", world.scenes / "images")
    assert call("report", runs / "vqa", *images, "--out", tmp_path / "with.html")[0] == 0
    assert '<p class="looked">' in (tmp_path / "with.html").read_text(encoding="utf-8")
    assert call("report", runs / "vqa", *images, "--no-relevance", "--out", tmp_path / "plain.html")[0] == 0
    assert '<p class="looked">' not in (tmp_path / "plain.html").read_text(encoding="utf-8")
