"""Shared by the writers of scenes and panels: blocks of annotation files, and work spread over processes."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from visling.scenes.world import SHAPES, Scene

J = TypeVar("J")
R = TypeVar("R")

SCHEMA = 3
"""Version of what is written; raised when the same settings and seed give other files."""

_DATE = "2024-01-01 00:00:00"
"""Fixed, so that two runs are equal byte for byte."""


def stem(image_id: int) -> str:
    """File name of a scene without extension."""
    return f"scene_{image_id:012d}"


def license_entry() -> dict[str, Any]:
    """The one licence of everything drawn."""
    return {"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}


def info(description: str) -> dict[str, Any]:
    """COCO's and VQA's info block."""
    return {
        "description": f"visling {description}",
        "version": str(SCHEMA),
        "year": 2024,
        "contributor": "visling",
        "url": "",
        "date_created": _DATE,
    }


def image_entry(image_id: int, file_name: str, width: int, height: int) -> dict[str, Any]:
    """One entry of COCO's images block."""
    return {
        "id": image_id,
        "file_name": file_name,
        "width": width,
        "height": height,
        "license": 1,
        "flickr_url": "",
        "coco_url": "",
        "date_captured": _DATE,
    }


def instance_entry(scene: Scene, number: int) -> dict[str, Any]:
    """One object of a scene as an entry of COCO's instances."""
    item = scene.items[number]
    x1, y1, x2, y2 = item.box
    return {
        "id": scene.image_id * 100 + number,
        "image_id": scene.image_id,
        "category_id": SHAPES.index(item.shape) + 1,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": 0,
        "segmentation": [],
    }


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write one JSON file, its keys in the order of the content."""
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def in_order(work: Callable[[J], R], jobs: Sequence[J], processes: int) -> Iterator[R]:
    """Results of all jobs in their order, computed by this process or by several."""
    if processes == 1 or len(jobs) < 2:
        yield from map(work, jobs)
        return
    # spawn: a fork of a process with threads (torch starts some) may hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(work, jobs, chunksize=max(1, min(64, len(jobs) // (4 * processes))))
