"""One small data set, written once for all tests of this folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from visling.scenes import ScenesConfig, write_scenes

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Written:
    """A written data set."""

    folder: Path
    summary: dict[str, Any]

    def json(self, name: str) -> Any:
        """A JSON file of the data set."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def lines(self, name: str) -> list[Any]:
        """A JSON lines file of the data set."""
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    def objects(self, split: str, kind: str = "instances") -> dict[int, list[dict[str, Any]]]:
        """Image id -> objects with shape, color, size, texture and corners, read from the instances file alone."""
        content = self.json(f"annotations/{kind}_{split}.json")
        names = {category["id"]: category["name"] for category in content["categories"]}
        found: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for one in content["annotations"]:
            x, y, w, h = one["bbox"]
            traits = dict(zip(("color", "size", "texture"), one["attributes"], strict=False))
            found[one["image_id"]].append({"shape": names[one["category_id"]], "box": (x, y, x + w, y + h)} | traits)
        return found


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    summary = write_scenes(folder, ScenesConfig(images=300, seed=7, panels=48, statements_per_panel=5))
    return Written(folder=folder, summary=summary)
