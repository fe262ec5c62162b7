"""Small copies of images in a gallery's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from visling.analysis.drawing import compress_picture
from visling.errors import DataError
from visling.vision.images import read_image

FOLDER = "thumbnails"
_SIDE = 240
"""Longest side in pixels."""


class Thumbnails:
    """Writes each image of a gallery once, and knows where.

    Args:
        gallery: its folder.
        files: images by id.
    """

    def __init__(self, gallery: Path, files: Mapping[str, Path]) -> None:
        self._folder, self._files = gallery / FOLDER, files
        self._written: dict[str, str | None] = {}

    def write(self, image: str) -> str | None:
        """Path of a thumbnail below the gallery's folder; None where the image is absent or damaged.

        Raises:
            OSError: it cannot be written.
        """
        if image not in self._written:
            self._written[image] = self._shrink(image, f"{len(self._written) + 1:05d}")
        return self._written[image]

    def _shrink(self, image: str, name: str) -> str | None:
        try:
            picture = Image.fromarray(read_image(self._files[image]))
        except (KeyError, DataError):
            return None
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        kind, content = compress_picture(picture)
        self._folder.mkdir(exist_ok=True)
        (self._folder / f"{name}.{kind}").write_bytes(content)
        return f"{FOLDER}/{name}.{kind}"
