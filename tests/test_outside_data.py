"""The example that turns ShapeWorld and SHAPES into classification data, on files of their layout."""

from __future__ import annotations

import io
import json
import runpy
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visling.regions.store import NativeStore
from visling.tasks.classification import Classification

EXAMPLE = Path(__file__).parents[1] / "examples" / "outside_data.py"


def convert(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["outside_data.py", *map(str, words)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_shapeworld(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entities = [
        {"id": 0, "shape": "circle", "color": "red", "bbox": [0.25, 0.5, 0.75, 1.25]},
        {"id": 1, "shape": "cross", "color": "blue", "bbox": [1.0, 0.0, 1.5, 0.5]},  # outside
    ]
    worlds = [
        {
            "image": f"world-{number}.png",
            "captions": ["a red circle .", "a cross is blue ."],
            "agreement": [1.0, 0.0],
            "entities": entities,
        }
        for number in range(100)
    ]
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "png")
    with zipfile.ZipFile(tmp_path / "existential.zip", "w") as pack:
        pack.writestr("existential/data.json", json.dumps(worlds))
        for world in worlds:
            pack.writestr(f"existential/{world['image']}", picture.getvalue())
    convert(monkeypatch, "shapeworld", tmp_path, tmp_path / "out")
    task: Any = Classification()
    records = {split: task.records(tmp_path / "out", split) for split in ("train", "val", "test")}
    assert {split: len(some) for split, some in records.items()} == {"train": 160, "val": 20, "test": 20}
    assert [(one.text, one.labels) for one in records["test"][:2]] == [
        ("a red circle .", ("1",)),
        ("a cross is blue .", ("0",)),
    ]
    store = NativeStore.open(tmp_path / "out" / "regions")
    regions = store[records["test"][0].images[0]]
    assert regions.boxes.tolist() == [[16, 32, 48, 64]], "clipped to the picture"
    assert regions.features.tolist() == [[1, 0, 0, 1]], "circle of circle and cross, red of blue and red"
    with pytest.raises(SystemExit):
        convert(monkeypatch, "shapeworld", tmp_path, tmp_path / "out")


def test_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = np.zeros((2, 30, 30, 3), np.uint8)
    pictures[0, 12:18, 22:28] = (255, 0, 0)
    asked = [{"index": k, "question": "is red right", "answer": answer} for k, answer in enumerate(("true", "false"))]
    for stem in ("train.small", "val"):
        np.savez(tmp_path / f"{stem}.npz", images=pictures)
        (tmp_path / f"{stem}.json").write_text(json.dumps(asked))
    convert(monkeypatch, "shapes", tmp_path, tmp_path / "out")
    task: Any = Classification()
    records = task.records(tmp_path / "out", "val")
    assert [one.labels for one in records] == [("true",), ("false",)]
    store = NativeStore.open(tmp_path / "out" / "regions")
    assert store["val-0"].boxes.tolist() == [[20, 10, 30, 20]]
    assert store["val-0"].features.shape == (1, 300)
    assert len(store["val-1"]) == 0
