"""COCO captions: sentences about images."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visling.data.identity import from_file_name
from visling.errors import DataError
from visling.types import Record


@dataclass(frozen=True, kw_only=True)
class CaptionRecord(Record):
    """One caption of one image."""

    caption: str


@dataclass(frozen=True, kw_only=True)
class Captions:
    """What a caption file holds, and what was left out of it."""

    records: tuple[CaptionRecord, ...]
    """In the order of the file."""
    empty: int
    """Captions without a word, left out."""
    repeated: int
    """Annotations whose id had come before, left out."""
    surplus: int
    """Captions beyond the most per image, left out."""
    bare_images: tuple[str, ...]
    """Listed images without any caption left."""


def read_captions(path: str | Path, *, most: int | None = None) -> Captions:
    """Captions of a COCO file (`captions_{split}.json`).

    Args:
        most: most captions per image, the first ones; retrieval uses 5. None keeps all.
    Raises:
        DataError: the file is missing, truncated or of another layout, or a caption names an image that the file does not list.
    """
    path = Path(path)
    content = read_json(path)
    annotations = entries(content, "annotations", ("id", "image_id", "caption"), path)
    images = {image["id"]: from_file_name(image["file_name"]) for image in entries(content, "images", ("id", "file_name"), path)}
    records: list[CaptionRecord] = []
    seen: set[Any] = set()
    per_image: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for annotation in annotations:
        if annotation["image_id"] not in images:
            raise DataError(f"{path}: caption {annotation['id']} speaks of image {annotation['image_id']}, which the file's images do not list.")
        image = images[annotation["image_id"]]
        caption = " ".join(str(annotation["caption"] or "").split())
        if annotation["id"] in seen:
            left_out["repeated"] += 1
        elif not caption:
            left_out["empty"] += 1
        elif most is not None and per_image[image] >= most:
            left_out["surplus"] += 1
        else:
            records.append(CaptionRecord(id=str(annotation["id"]), images=(image,), caption=caption))
            per_image[image] += 1
        seen.add(annotation["id"])
    return Captions(
        records=tuple(records),
        empty=left_out["empty"],
        repeated=left_out["repeated"],
        surplus=left_out["surplus"],
        bare_images=tuple(image for image in images.values() if image not in per_image),
    )


def find_captions_file(root: str | Path, split: str) -> Path:
    """The caption file of a split ("train" finds `captions_train2014.json`) in a folder or its `annotations`.

    Raises:
        DataError: none, or several.
    """
    root = Path(root)
    files = [file for folder in (root / "annotations", root / "Annotations", root) for file in sorted(folder.glob("captions_*.json"))]
    return the_one(_distinct(file for file in files if is_split(file.stem.removeprefix("captions_"), split)), f"captions_{split}*.json", root, files)


def is_split(name: str, split: str) -> bool:
    """Whether the name of a part of a data set is this split, with or without a year: "train2014" is "train", "trainval2014" is not."""
    return re.fullmatch(re.escape(split) + r"(\d{4})?", name) is not None


def the_one(found: list[Path], pattern: str, root: Path, seen: list[Path]) -> Path:
    """The single file found.

    Raises:
        DataError: none (names what is there), or several.
    """
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"several files under {root} match {pattern}: {', '.join(file.name for file in found)}. Name the split in full, with its year."
        )
    there = ", ".join(sorted(file.name for file in seen)) or "no file of this kind"
    raise DataError(f"no file {pattern} under {root} or its annotation folders; found {there}. Check the folder and the split.")


def read_json(path: Path) -> Any:
    """Contents of a JSON annotation file.

    Raises:
        DataError: the file is missing, truncated or not JSON; names the position.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"no annotation file {path}. Check the path.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = f"line {error.lineno}, character {error.pos}" if isinstance(error, json.JSONDecodeError) else f"byte {error.start}"
        raise DataError(f"{path} is truncated or not JSON: {error} ({where} of {path.stat().st_size} bytes). Download it again.") from error


def entries(content: Any, name: str, keys: tuple[str, ...], path: Path) -> list[dict[str, Any]]:
    """The list `name` of a COCO-style file, each entry with the given keys.

    Raises:
        DataError: the list or a key is missing.
    """
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list):
        kind = f"an object with {', '.join(content) or 'nothing'}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise DataError(f"{path} must be an object with a list {name!r}; found {kind}.")
    for number, entry in enumerate(found):
        if lacking := [key for key in keys if key not in entry]:
            raise DataError(f"{path}: entry {number} of {name!r} lacks {', '.join(map(repr, lacking))}.")
    return found


def _distinct(files: Iterable[Path]) -> list[Path]:
    """Each file once, though a file system that ignores case shows it under two names."""
    return list({file.resolve(): file for file in files}.values())
