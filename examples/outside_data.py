"""ShapeWorld and SHAPES, two small data sets of other people's drawings, as files of the task classification.

    python examples/outside_data.py shapeworld FOLDER OUT    FOLDER: *.zip of examples/agreement (AlexKuhnle/ShapeWorld)
    python examples/outside_data.py shapes FOLDER OUT        FOLDER: train.small.{json,npz} and val.{json,npz}

Writes OUT/images, OUT/{train,val,test}.jsonl and the region store OUT/regions, which needs no detector: of ShapeWorld
one region per entity, its shape and colour one-hot; of SHAPES one region per filled cell of the 3 x 3 grid, its pixels.
SHAPES has no test split here. A store of another kind is made by a script like this one: a `RegionArray` per image.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visling.regions.writer import StoreWriter
from visling.types import RegionArray

TRAIN, VALID = 80, 90
"""Of 100 pictures of a ShapeWorld configuration, those before the first number are for training, those before the
second for validation, the others for the test."""

CELL = 10
"""Pixels of a cell of SHAPES."""


def convert_shapeworld(folder: Path, out: Path) -> dict[str, int]:
    """Convert every configuration in a folder; returns the number of captions of each split."""
    worlds: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for file in sorted(folder.glob("*.zip")):
        with zipfile.ZipFile(file) as pack:
            listing = next(name for name in pack.namelist() if name.endswith("data.json"))
            for number, world in enumerate(json.loads(pack.read(listing))):
                name = f"{file.stem}-{number}"
                picture = pack.read(listing.replace("data.json", world["image"]))
                (out / "images" / f"{name}.png").write_bytes(picture)
                worlds[name] = number, world
    entities = [entity for _, world in worlds.values() for entity in world["entities"]]
    values = [(trait, value) for trait in ("shape", "color") for value in sorted({one[trait] for one in entities})]
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
    with StoreWriter(out / "regions", feature_size=len(values), fingerprint="shapeworld entities") as store:
        for name, (number, world) in worlds.items():
            store.add(name, _read_entities(out / "images" / f"{name}.png", world["entities"], values))
            split = "train" if number < TRAIN else "val" if number < VALID else "test"
            rows[split] += [
                {"id": f"{name}-{k}", "image": f"images/{name}.png", "text": text, "label": int(truth)}
                for k, (text, truth) in enumerate(zip(world["captions"], world["agreement"], strict=True))
            ]
    return _write_splits(out, rows)


def _read_entities(picture: Path, entities: Iterable[Mapping[str, Any]], values: list[tuple[str, str]]) -> RegionArray:
    """A region per entity, clipped to the picture; one that is outside is left out."""
    with Image.open(picture) as image:
        width, height = image.size
    features, boxes = [], []
    for entity in entities:
        x1, y1, x2, y2 = np.clip(entity["bbox"], 0, 1) * [width, height, width, height]
        if x2 - x1 >= 1 and y2 - y1 >= 1:
            features.append([float(entity[trait] == value) for trait, value in values])
            boxes.append((x1, y1, x2, y2))
    return RegionArray(
        features=np.array(features, np.float32).reshape(-1, len(values)),
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        size=(width, height),
    )


def convert_shapes(folder: Path, out: Path) -> dict[str, int]:
    """Convert both splits; returns the number of questions of each."""
    rows: dict[str, list[dict[str, Any]]] = {}
    with StoreWriter(out / "regions", feature_size=3 * CELL**2, fingerprint="shapes cells") as store:
        for split, stem in (("train", "train.small"), ("val", "val")):
            pictures = np.load(folder / f"{stem}.npz")["images"]
            questions = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
            rows[split] = []
            for number, (picture, question) in enumerate(zip(pictures, questions, strict=True)):
                name = f"{split}-{number}"
                Image.fromarray(picture).save(out / "images" / f"{name}.png")
                store.add(name, _read_cells(picture))
                rows[split].append(
                    {
                        "id": name,
                        "image": f"images/{name}.png",
                        "text": question["question"],
                        "label": question["answer"],
                    }
                )
    return _write_splits(out, rows)


def _read_cells(picture: np.ndarray[Any, Any]) -> RegionArray:
    """A region per cell that is not black."""
    height, width = picture.shape[:2]
    corners = [(x, y) for y in range(0, height, CELL) for x in range(0, width, CELL)]
    filled = [(x, y) for x, y in corners if picture[y : y + CELL, x : x + CELL].any()]
    features = [picture[y : y + CELL, x : x + CELL].reshape(-1) / 255 for x, y in filled]
    return RegionArray(
        features=np.array(features, np.float32).reshape(-1, 3 * CELL**2),
        boxes=np.array([(x, y, x + CELL, y + CELL) for x, y in filled], np.float32).reshape(-1, 4),
        size=(width, height),
    )


def _write_splits(out: Path, rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, int]:
    for split, some in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in some)
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return {split: len(some) for split, some in rows.items()}


def main() -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(description="ShapeWorld and SHAPES as classification data.")
    parser.add_argument("data", choices=("shapeworld", "shapes"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"{given.out} exists: name another folder.")
    (given.out / "images").mkdir(parents=True)
    convert = convert_shapeworld if given.data == "shapeworld" else convert_shapes
    print(convert(given.folder, given.out))


if __name__ == "__main__":
    main()
