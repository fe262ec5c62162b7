"""A detector of one's own on the command line: how many regions it keeps, images in which it finds nothing, and
pictures of what it found."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visling import api
from visling.analysis.report import write_report
from visling.cli import app
from visling.regions.store import NativeStore
from visling.runs.evaluate import evaluate
from visling.vision.detector import Detector
from visling.vision.detectors import load_detector

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Runs a command line in an empty folder: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["visling", *map(str, words)])
        capsys.readouterr()
        status = 0
        try:
            app.run()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def silent(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's detector with a threshold that nothing passes."""
    folder = tmp_path_factory.mktemp("silent")
    detector = Detector.load(world.detector)
    detector.limit_regions(0, 8)
    settings = json.loads((world.detector / "model" / "config.json").read_text())["config"]
    assert settings["min_regions"] == 4
    object.__setattr__(detector.config, "min_confidence", 1.0)
    detector.save(folder)
    return folder


def test_limits_reach_the_model_and_its_predictions(call: Call, world: Any, tmp_path: Path) -> None:
    extract = ("regions", "extract", world.scenes / "images", "--detector", world.detector, "--out", "regions")
    status, _, err = call(*extract, "--min-regions", 6, "--max-regions", 7)
    assert (status, err) == (0, "")
    store = NativeStore.open(Path("regions"))
    assert {6, 7} >= {store.count(image_id) for image_id in store.ids}
    assert store.fingerprint != load_detector(world.detector).fingerprint
    kept = load_detector(tmp_path / "regions" / "detector")
    assert kept.fingerprint == store.fingerprint
    assert store.settings["detector"] == str(tmp_path / "regions" / "detector")
    settings = [word for setting in world.settings for word in ("--set", setting)]
    tuned = call("finetune", "--recipe", "visualbert-vqa-scenes", "--data", world.scenes, "--store", "regions",
                 *settings, "--device", "cpu", "--out", "vqa")  # fmt: skip
    assert tuned[0] == 0, tuned[2]
    answer = api.load("vqa", device="cpu").answer(world.picture(), "how many objects are there?")
    assert len(answer.regions) == len(store[world.picture().stem])
    np.testing.assert_allclose(
        answer.regions.features, store[world.picture().stem].features.astype(np.float32), atol=2e-2
    )
    # Without the limits, or with others, the store is of another detector.
    for limits in ((), ("--min-regions", 5)):
        status, _, err = call(*extract, *limits, "--resume")
        assert status == 2
        assert "fingerprint" in err or "another detector" in err
    assert load_detector(tmp_path / "regions" / "detector").fingerprint == store.fingerprint, "nothing was overwritten"
    status, _, err = call(*extract[:-1], "new", "--min-regions", 9, "--max-regions", 7)
    assert status == 2
    assert "min_regions (9) exceeds max_regions (7)" in err
    assert not Path("new").exists()


def test_images_without_regions_are_counted_and_all_of_them_is_loud(call: Call, world: Any, silent: Path) -> None:
    extract = ("regions", "extract", world.scenes / "images" / "val", "--detector", silent)
    status, out, err = call(*extract, "--out", "none", "--json")
    assert status == 0, "such a store is whole; training refuses it"
    assert json.loads(out)["images without regions"] == 3
    assert "found nothing in ANY of the 3 images (100%)" in err
    assert "--min-regions 10" in err
    status, out, err = call(*extract, "--out", "some", "--min-regions", 2, "--json")
    assert (json.loads(out)["images without regions"], err) == (0, "")


def test_some_empty_images_are_a_warning_from_a_tenth_on(call: Call, world: Any, tmp_path: Path) -> None:
    pictures = sorted((world.scenes / "images" / "train").glob("*.png"))
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in pictures]
    detector = Detector.load(world.detector)
    detector.limit_regions(0, 8)

    def count_empty(threshold: float) -> int:
        object.__setattr__(detector.config, "min_confidence", threshold)
        return sum(not len(found) for found in detector.detect(pixels))  # in the batch of the extraction

    for most, warned in ((2, False), (len(pictures) - 1, True)):
        low, high = 0.0, 1.0
        for _ in range(24):  # the highest threshold with at most so many empty images
            middle = (low + high) / 2
            low, high = (middle, high) if count_empty(middle) <= most else (low, middle)
        empty = count_empty(low)
        assert 0 < empty <= most
        assert warned is (empty >= 0.1 * len(pictures))
        detector.save(tmp_path / f"detector-{most}")
        status, out, err = call(
            "regions", "extract", *pictures, "--detector", f"detector-{most}", "--out", f"regions-{most}", "--json"
        )
        assert status == 0
        assert json.loads(out)["images without regions"] == empty
        assert (f"found nothing in {empty} of the {len(pictures)} images" in err) is warned, err


def test_an_answer_about_nothing_says_so(call: Call, world: Any, silent: Path) -> None:
    model = api.load(world.vqa, detector=silent, other_features=True, device="cpu")
    question = "how many objects are there?"
    answer = model.answer(world.picture(), question)
    assert len(answer.regions) == 0
    assert answer.notice == (f"the detector found nothing in {world.picture()}; this is answered from the words alone")
    assert repr(answer).splitlines()[1].strip() == answer.notice
    with Image.open(world.picture()) as picture:
        assert "found nothing in image 1;" in model.answer(picture, question).notice
    asked = ("predict", "--run", world.vqa, "--detector", silent, "--other-features", "--out", "answers")
    assert answer.notice in call(*asked, world.picture(), question)[1]
    assert json.loads(call(*asked, world.picture(), question, "--json")[1])["notice"] == answer.notice
    Path("questions.jsonl").write_text(json.dumps({"image": str(world.picture()), "question": question}) + "\n")
    rows = call(*asked[:-2], "--input", "questions.jsonl")[1]
    assert json.loads(rows)["notice"] == answer.notice


def test_an_answer_about_something_has_no_notice_and_is_one_line(call: Call, world: Any) -> None:
    model = api.load(world.vqa, device="cpu")
    answer = model.answer(world.picture(), "how many objects are there?")
    assert answer.notice == ""
    shown = repr(answer)
    assert str(answer) == shown
    assert "\n" not in shown
    assert len(shown) < 200
    assert shown.startswith(f"Answer({answer.text} {answer.confidence:.0%}, ")
    assert shown.endswith(f'"how many objects are there?", {len(answer.regions)} regions)')
    done = call("predict", "--run", world.vqa, world.picture(), "how many objects are there?", "--json", "--out", "a")
    assert "notice" not in json.loads(done[1])


def test_the_report_names_images_in_which_nothing_was_found(
    call: Call, world: Any, silent: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(world.vqa, tmp_path / "vqa")
    evaluate(run, split="test", device="cpu")
    assert call("regions", "extract", world.scenes / "images" / "test", "--detector", silent, "--out", "none")[0] == 0
    written = write_report(run, store=NativeStore.open(Path("none")))
    assert "the detector found nothing in this image" in Path(written).read_text()
    written = write_report(run, out=tmp_path / "other.html")
    assert "found nothing" not in Path(written).read_text()


def test_an_evaluation_draws_and_warns(call: Call, world: Any, silent: Path) -> None:
    asked = ("detect", "eval", world.scenes / "images" / "val", "--annotations",
             world.scenes / "annotations" / "instances_val.json", "--detector")  # fmt: skip
    status, out, err = call(*asked, silent, "--out", "scored", "--pictures", 2)
    assert status == 0
    assert "Wrote scored" in out
    assert "best confidence threshold          -" in out
    assert "the detector finds hardly any of these objects" in err
    assert sorted(path.name for path in Path("scored").iterdir()) == [
        "evaluation_detector.json", "pictures", "precision_recall.svg",
    ]  # fmt: skip
    assert len(list(Path("scored", "pictures").iterdir())) == 2
    content = json.loads(Path("scored", "evaluation_detector.json").read_text())
    assert content["fingerprint"] == load_detector(silent).fingerprint
    assert content["detections"] == 0
    status, _, err = call(*asked, silent, "--out", "scored")
    assert status == 2
    assert "scored is not empty" in err
    assert call(*asked, silent, "--pictures", 1)[0] == 0
    assert len(list((silent / "evaluation" / "pictures").iterdir())) == 1
    plain = json.loads(call(*asked, world.detector, "--json")[1])
    precisions = [value for name, value in plain.items() if name.startswith("average precision of ")]
    assert precisions == sorted(precisions, reverse=True)


def test_a_detector_is_trained_from_another_on_the_command_line(call: Call, world: Any) -> None:
    train = ("detect", "train", world.scenes / "images" / "val", "--annotations",
             world.scenes / "annotations" / "instances_val.json", "--preset", "scenes", "--steps", 2, "--device", "cpu",
             "--set", "batch_size=2")  # fmt: skip
    status, out, err = call(*train, "--init", world.detector, "--freeze", 1, "--out", "new")
    assert status == 0, err
    assert "Wrote new" in out
    assert "starts from" in err
    run = json.loads(Path("new", "run.json").read_text())
    assert run["config"]["frozen_stages"] == 1
    assert run["config"]["detector"]["feature_size"] == 16, "the size is that of the start"
    status, _, err = call(*train, "--backbone", "resnet50.pth", "--out", "other")
    assert status == 2
    assert "--preset resnet50" in err
    status, _, err = call(*train[:-6], "--preset", "resnet50", "--backbone", "resnet50.pth", "--out", "other")
    assert status == 2
    assert "no weight file resnet50.pth" in err
    assert not Path("other").exists()


def test_regions_thinner_than_a_pixel_are_left_out(world: Any) -> None:
    detector = load_detector(world.detector)
    detector.limit_regions(8, 8)
    for width, height in ((1, 1), (400, 1), (3, 90)):
        regions = detector.detect([np.full((height, width, 3), 90, np.uint8)])[0]
        sides = regions.boxes[:, 2:] - regions.boxes[:, :2]
        assert (sides >= 0.99).all()
    assert len(detector.detect([np.full((1, 1, 3), 90, np.uint8)])[0]) <= 1
