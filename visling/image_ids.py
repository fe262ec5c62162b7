"""One image, many spellings: 9, "9", "COCO_train2014_000000000009", "train2014/COCO_train2014_000000000009.jpg"."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

_IMAGE_SUFFIXES = frozenset(
    {
        ".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic",
        ".npy", ".npz",
    }
)  # fmt: skip


def canonical(image_id: str | int) -> str:
    """The spelling that all aliases of an id share, which leaves out folders: the number after the last underscore
    without leading zeros, else the whole name."""
    text = str(image_id).rpartition("/")[2]
    tail = text.rpartition("_")[2]
    return str(int(tail)) if tail.isascii() and tail.isdigit() else text


def same(first: str | int, second: str | int) -> bool:
    """Whether two ids may name the same image."""
    return canonical(first) == canonical(second)


def from_file_name(name: str) -> str:
    """Image id of a file name in an annotation: the stem, without folders and without an image suffix."""
    plain = name.replace("\\", "/")
    stem, dot, suffix = plain.rpartition("/")[2].rpartition(".")
    if stem and dot + suffix.lower() in _IMAGE_SUFFIXES:  # nearly every name, a tenth of the time of a path object
        return stem
    path = PurePosixPath(plain)
    return path.stem if path.suffix.lower() in _IMAGE_SUFFIXES else path.name


class Aliases:
    """Finds an id among a set of ids by its exact spelling, else by an alias if exactly one id of the set has it."""

    def __init__(self, known: Iterable[str]) -> None:
        self._known = frozenset(known)
        self._by_alias: dict[str, tuple[str, ...]] | None = None

    def find(self, image_id: str | int) -> str | None:
        """The id of the set, or None if there is none or several."""
        text = str(image_id)
        if text in self._known:
            return text
        candidates = self.candidates(text)
        return candidates[0] if len(candidates) == 1 else None

    def candidates(self, image_id: str | int) -> tuple[str, ...]:
        """Every id of the set that shares its canonical spelling with `image_id`, sorted."""
        if self._by_alias is None:
            table: dict[str, list[str]] = {}
            for known in sorted(self._known):
                table.setdefault(canonical(known), []).append(known)
            self._by_alias = {alias: tuple(ids) for alias, ids in table.items()}
        return self._by_alias.get(canonical(image_id), ())
