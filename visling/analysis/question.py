"""A question to a model, and the same question as the model reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visling.types import Batch, Example, Record, RegionArray


class SeenImage(NamedTuple):
    """An image as the detector saw it, for whoever asks many things about it: it is not looked at again."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB, upright."""
    regions: RegionArray


ImageLike = str | Path | Image.Image | SeenImage
"""An image file, an open image, or an image that was looked at (`Predictor.look`)."""


@dataclass(frozen=True)
class Question:
    """What a model is asked: a question, a sentence to judge, an expression or phrases to point at."""

    image: ImageLike | Sequence[ImageLike]
    """The image, or as many as the task reads together."""
    text: str
    choices: Sequence[str] = ()
    """Answers to choose from, for tasks that read them."""

    @property
    def images(self) -> Sequence[ImageLike]:
        """All images."""
        return [self.image] if isinstance(self.image, (str, Path, Image.Image, SeenImage)) else self.image


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A question as the model reads it, for whoever changes it and asks again."""

    question: Question
    record: Record
    example: Example
    batch: Batch
    """Of this question alone, each row with its own text and regions, on the model's device; features are computed."""
    regions: tuple[RegionArray, ...]
    """Of each image, as detected."""
    images: tuple[Image.Image, ...]
    """As the detector saw them."""
    truncated: bool
    """Whether the text was longer than the model reads and was cut."""
