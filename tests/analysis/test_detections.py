"""What `detect eval --out` leaves: scores, a curve that can be read, and pictures of pairs."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visling.analysis.detections import draw_pair, write_detections
from visling.errors import RunError
from visling.metrics.detection import DetectedBoxes, TrueBoxes, precision_recall, score
from visling.types import RegionArray

NAMES = ("cat", "dog", "car")
BOXES = np.array([[0, 0, 10, 10], [20, 20, 40, 40]], np.float32)
TRUTHS = [TrueBoxes(boxes=BOXES, classes=np.array([0, 1]))] * 2
FOUND = [
    DetectedBoxes(boxes=BOXES, classes=np.array([0, 2]), scores=np.array([0.9, 0.8])),
    DetectedBoxes(boxes=BOXES[:1], classes=np.array([0]), scores=np.array([0.4])),
]


def regions(count: int) -> RegionArray:
    return RegionArray(
        features=np.zeros((count, 0), np.float32), boxes=BOXES[:count], size=(48, 48), classes=np.arange(count)
    )


def test_the_folder_holds_scores_curve_and_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (48, 48), "white").save(tmp_path / "a.png")
    out = tmp_path / "out"
    out.mkdir()
    write_detections(
        out,
        {"detector": "d"},
        score(FOUND, TRUTHS),
        precision_recall(FOUND, TRUTHS),
        names=NAMES,
        attributes=(),
        examples=[(tmp_path / "a.png", regions(2), regions(1))] * 2,
    )
    content = json.loads((out / "evaluation_detector.json").read_text())
    assert content["detector"] == "d"
    assert (content["objects"], content["detections"], content["mean_ap"]) == (4, 3, 0.5)
    assert content["classes"] == [
        {"name": "cat", "ap": 1.0, "objects": 2},
        {"name": "dog", "ap": 0.0, "objects": 2},
    ]
    # The second most confident one is wrong: a car where there is none.
    assert content["curve"] == [
        {"confidence": 0.9, "precision": 1.0, "recall": 0.25},
        {"confidence": 0.8, "precision": 0.5, "recall": 0.25},
        {"confidence": 0.4, "precision": 0.6667, "recall": 0.5},
    ]
    assert content["best_threshold"] == content["curve"][2]
    drawing = ElementTree.parse(out / "precision_recall.svg").getroot()
    line = drawing.find(".//{http://www.w3.org/2000/svg}polyline")
    assert line is not None
    assert len(line.attrib["points"].split()) == 3
    texts = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"recall", "precision"} <= set(texts)
    pictures = sorted(path.name for path in (out / "pictures").iterdir())
    assert pictures == ["001-a.png", "002-a.png"], "two images of one name are two pictures"


def test_nothing_found_is_a_result(tmp_path: Path) -> None:
    nothing = [DetectedBoxes(boxes=BOXES[:0], classes=np.zeros(0, int), scores=np.zeros(0))] * 2
    curve = precision_recall(nothing, TRUTHS)
    assert curve.best is None
    write_detections(tmp_path, {}, score(nothing, TRUTHS), curve, names=NAMES, attributes=(), examples=[])
    content = json.loads((tmp_path / "evaluation_detector.json").read_text())
    assert (content["mean_ap"], content["curve"], content["best_threshold"]) == (0.0, [], None)
    ElementTree.parse(tmp_path / "precision_recall.svg")
    assert not (tmp_path / "pictures").exists()


def test_objects_stand_next_to_what_was_found() -> None:
    sheet = draw_pair(Image.new("RGB", (512, 256), "white"), regions(2), regions(0), NAMES, ())
    pixels = np.asarray(sheet)
    left, right = pixels[20:, :512], pixels[20:, 520:]
    assert (left != 255).any(), "two objects are drawn"
    assert (right == 255).all(), "nothing was found"


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write to .*gone"):
        write_detections(
            tmp_path / "gone", {}, score(FOUND, TRUTHS), precision_recall(FOUND, TRUTHS), names=NAMES, attributes=(),
            examples=[],
        )  # fmt: skip
