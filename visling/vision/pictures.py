"""Images by id as a jointly trained region extractor reads them, in the form that `data.batches.pixels.Pictures` asks
for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visling.types import Canvas, MaskGrid
from visling.vision.images import read_image

_READERS = 4
"""Threads that decode the images of a batch; Pillow releases the interpreter lock while it decodes and scales."""


class PictureSettings(Protocol):
    """How an extractor reads images; the config of each offers it."""

    @property
    def mask_grid(self) -> MaskGrid:
        """How the masks of objects are drawn."""
        ...

    @property
    def whole_image(self) -> bool:
        """Whether the image itself is the first region of each."""
        ...

    @property
    def canvas(self) -> Canvas | None:
        """What pictures are laid on; None = they are padded to the largest of a batch."""
        ...

    def prepare(self, image: NDArray[np.uint8], *, mirrored: bool) -> Tensor:
        """(3, H, W) of an RGB image (H', W', 3): scaled, mirrored if asked, normalised."""
        ...


class PictureFiles:
    """Images in files."""

    def __init__(self, files: Mapping[str, Path], settings: PictureSettings) -> None:
        self.files, self.settings = files, settings
        self.mask_grid, self.canvas, self.whole_image = settings.mask_grid, settings.canvas, settings.whole_image

    def read(self, image_ids: Sequence[str], mirrored: Sequence[bool]) -> list[Tensor]:
        """Each image, (3, H, W) of its own size; several are decoded at a time.

        Raises:
            DataError: a file is missing or damaged.
        """
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self._read_one, image_ids, mirrored))

    def _read_one(self, image_id: str, mirrored: bool) -> Tensor:
        return self.settings.prepare(read_image(self.files[image_id]), mirrored=mirrored)


class GivenPictures:
    """Images at hand, RGB (H, W, 3)."""

    def __init__(self, images: Mapping[str, NDArray[np.uint8]], settings: PictureSettings) -> None:
        self.images, self.settings = images, settings
        self.mask_grid, self.canvas, self.whole_image = settings.mask_grid, settings.canvas, settings.whole_image

    def read(self, image_ids: Sequence[str], mirrored: Sequence[bool]) -> list[Tensor]:
        """Each image, (3, H, W) of its own size."""
        return [
            self.settings.prepare(self.images[image_id], mirrored=turned)
            for image_id, turned in zip(image_ids, mirrored, strict=True)
        ]
