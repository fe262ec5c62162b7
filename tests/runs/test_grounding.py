"""Phrase grounding from drawn scenes to scores: where regions are the objects themselves, a small model learns which
one a phrase names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling import config as configs
from visling.recipes.tables import FINETUNING
from visling.regions.writer import StoreWriter
from visling.runs.evaluate import evaluate
from visling.runs.finetune import finetune
from visling.scenes import ScenesConfig, write_scenes
from visling.scenes.world import VALUES
from visling.types import RegionArray

SETTINGS = (
    "encoder=tiny", "train.max_steps=150", "train.validate_every=100", "train.precision=fp32", "train.optim.lr=0.003",
    "train.log_every=10",
)  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set and the store of its objects, whose features are their traits."""
    folder = tmp_path_factory.mktemp("grounding")
    write_scenes(folder / "scenes", ScenesConfig(images=250, questions_per_image=1, statements_per_image=1))
    values = [value for own in VALUES.values() for value in own]
    with StoreWriter(folder / "regions", feature_size=len(values), fingerprint="objects") as writer:
        for split in ("train", "val", "test"):
            content = json.loads((folder / "scenes" / "annotations" / f"instances_{split}.json").read_text())
            shapes = {category["id"]: category["name"] for category in content["categories"]}
            for image in content["images"]:
                own = [one for one in content["annotations"] if one["image_id"] == image["id"]]
                boxes = np.array([one["bbox"] for one in own], np.float32)
                boxes[:, 2:] += boxes[:, :2]
                traits = [{shapes[one["category_id"]], *one["attributes"]} for one in own]
                features = np.array([[value in has for value in values] for has in traits], np.float32)
                regions = RegionArray(features=features, boxes=boxes, size=(image["width"], image["height"]))
                writer.add(Path(image["file_name"]).stem, regions)
        writer.commit()
    return folder / "scenes", folder / "regions"


@pytest.mark.parametrize("model", ["visualbert", "vilbert"])
def test_phrases_find_their_objects(drawn: tuple[Path, Path], tmp_path: Path, model: str) -> None:
    data, store = drawn
    config = configs.override(FINETUNING[f"{model}-grounding-scenes"](), SETTINGS)
    finetune(config, tmp_path / "run", data=data, store=store, device="cpu")
    found: dict[str, Any] = evaluate(tmp_path / "run", split="test")
    scores = {name: score["value"] for name, score in found["scores"].items()}
    assert scores["upper_bound"] == 100
    assert scores["recall_at_1"] <= scores["recall_at_5"] <= scores["recall_at_10"] == 100, "ten objects at most"
    assert scores["recall_at_1"] > 36, "a random object is right in 24 of 100 cases"
    assert max(part["scores"]["recall_at_1"]["value"] for part in found["baselines"].values()) < 10
    assert any("phrases without a box" in note for note in found["notes"])
