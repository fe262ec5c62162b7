"""Examples of an evaluated run as its details file lists them: which were right, which to show, and their images."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from visling.analysis.run_files import as_number
from visling.errors import StoreError
from visling.image_ids import Aliases, canonical
from visling.types import RegionArray, RegionStore
from visling.vision.images import SUFFIXES

Row = Mapping[str, Any]
"""A line of `details_{split}.jsonl`."""

Box = tuple[float, float, float, float]

RIGHT = 0.5
"""Score from which an example counts as right (soft scores go up to 1)."""


def is_right(row: Row) -> bool | None:
    """Whether the model was right; None where nothing was scored."""
    score = as_number(row.get("score"))
    return None if score is None else score >= RIGHT


def describe(value: Any, otherwise: str = "not given") -> str:
    """A value of a file in words: of a list the most frequent first, of a mapping the heaviest; without repetition."""
    if value is None or value == "" or value == [] or value == {}:
        return otherwise
    if isinstance(value, Mapping):
        return ", ".join(str(key) for key in sorted(value, key=lambda k: -(as_number(value[k]) or 0.0)))
    if isinstance(value, (list, tuple)):
        return ", ".join(answer for answer, _ in Counter(map(str, value)).most_common())
    return str(value)


def describe_answer(value: Any, choices: Sequence[str]) -> str:
    """An answer in words: a choice by its text, a box by its corners; empty if there is none."""
    name = describe(value, "")
    if choices and name.isdecimal() and int(name) < len(choices):
        return choices[int(name)]
    boxes = list_boxes([value])
    return f"box ({', '.join(f'{corner:.0f}' for corner in boxes[0])})" if boxes else name


def list_boxes(values: Any) -> list[Box]:
    """Those of some values that are four numbers, corners of boxes."""
    found: list[Box] = []
    for value in values or ():
        if isinstance(value, (list, tuple)) and len(value) == 4 and all(as_number(c) is not None for c in value):
            x1, y1, x2, y2 = map(float, value)
            found.append((x1, y1, x2, y2))
    return found


def list_candidates(row: Row, most: int) -> list[tuple[str, float]]:
    """The best answers of a row with their probabilities, best first."""
    return [
        (str(answer[0]), share)
        for answer in (row.get("top") or [])[:most]
        if isinstance(answer, (list, tuple)) and len(answer) == 2 and (share := as_number(answer[1])) is not None
    ]


def split_choices(row: Row) -> tuple[str, tuple[str, ...]]:
    """The text of a row without the numbered choices that VCR writes behind it, and these."""
    text = describe(row.get("text"), "(no text)")
    question, *choices = re.split(r" \| (?=\d+: )", text)
    named = tuple(choice.removeprefix(f"{number}: ") for number, choice in enumerate(choices))
    numbered = all(choice.startswith(f"{number}: ") for number, choice in enumerate(choices))
    return (question, named) if len(choices) > 1 and numbered else (text, ())


def measure_difference(first: Row, second: Row) -> float:
    """How far two runs are apart in an example, from 0 (the same) to 1: total variation distance of their
    probabilities, as far as both rows list them; or, without lists, whether the answers differ."""
    ours, theirs = (dict(list_candidates(row, len(row.get("top") or []))) for row in (first, second))
    if not ours or not theirs:
        return float(first.get("prediction") != second.get("prediction"))
    gaps = sum(abs(ours.get(name, 0.0) - theirs.get(name, 0.0)) for name in ours.keys() | theirs.keys())
    return min(gaps / 2, 1.0)


def list_images(row: Row) -> list[str]:
    """Ids of the images of an example."""
    ids = row.get("images") or row.get("image")
    return [str(i) for i in ids] if isinstance(ids, (list, tuple)) else [] if ids is None else [str(ids)]


def sample_evenly(rows: Sequence[Row], count: int, shown: set[str]) -> list[Row]:
    """Rows from every type in turn, evenly spaced within a type, about images that are not shown yet where possible.

    Args:
        shown: ids of images that are shown already; those of the rows chosen are added.
    """
    types: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        types[str(row.get("type"))].append(row)
    order = sorted(types.values(), key=len, reverse=True)
    shares = [0] * len(order)
    while sum(shares) < min(count, len(rows)):
        for number, of_type in enumerate(order):
            if shares[number] < len(of_type) and sum(shares) < count:
                shares[number] += 1
    chosen: list[list[Row]] = []
    for number, (of_type, share) in enumerate(zip(order, shares, strict=True)):
        # The first row of every type is often about the same image: each type begins elsewhere in the file.
        begin = (number + 0.5) / len(order)
        edges = [int((k + begin) * len(of_type) / share) for k in range(share)]
        chosen.append([])
        for first, end in pairwise([*edges, len(of_type)]):
            stretch = of_type[first:end]
            row = next((row for row in stretch if shown.isdisjoint(list_images(row))), stretch[0])
            shown.update(list_images(row))
            chosen[-1].append(row)
    return [row for turn in zip_longest(*chosen) for row in turn if row is not None]


def find_image_files(folder: Path | None, wanted: Iterable[str]) -> dict[str, Path]:
    """Image id -> the file whose stem is that id or another spelling of it (VQA says 9 for COCO_val2014_000000000009);
    of several the first in order of path."""
    files_by_stem: dict[str, Path] = {}
    meant = {canonical(image) for image in wanted}
    if folder is not None:
        for where, folders, files in os.walk(folder):
            folders.sort()
            for name in sorted(files):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES and canonical(stem) in meant:
                    files_by_stem.setdefault(stem, Path(where) / name)
    aliases = Aliases(files_by_stem)
    stems = {image: aliases.find(image) for image in wanted}
    return {image: files_by_stem[stem] for image, stem in stems.items() if stem is not None}


def find_regions(image: str, store: RegionStore | None) -> RegionArray | None:
    """Regions of an image; None where the store lacks it, or knows several of that name."""
    try:
        return store[image] if store is not None and image in store else None
    except StoreError:
        return None
