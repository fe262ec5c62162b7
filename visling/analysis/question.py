"""What a model is asked, whether it is a question at all, and what the model reads of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visling.errors import DataError
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
        return [self.image] if isinstance(self.image, ImageLike) else self.image


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


def check_question(question: object) -> None:
    """Refuse what is no question, or holds something else than images and texts.

    Raises:
        DataError: as above.
    """
    if not isinstance(question, Question):
        raise DataError(f"questions must be Question(image, text); found {_describe(question)}.")
    if not isinstance(question.text, str):
        raise DataError(
            f"the text must be a string; found {_describe(question.text)}. Ask several questions with "
            "answer_each([Question(image, text), ...])."
        )
    images: object = question.images
    if not isinstance(images, Sequence) or isinstance(images, (bytes, bytearray)):
        raise DataError(_explain_image(question.image))
    for image in images:
        if not isinstance(image, ImageLike):
            raise DataError(_explain_image(image))
        check_address(image)
    if isinstance(question.choices, str) or not isinstance(question.choices, Sequence):
        raise DataError(f"choices must be a list of strings; found {_describe(question.choices)}.")
    for choice in question.choices:
        if not isinstance(choice, str):
            raise DataError(f"every choice must be a string; found {_describe(choice)}.")


def check_questions(questions: object) -> None:
    """Refuse what does not hold several questions.

    Raises:
        DataError: as above.
    """
    if not isinstance(questions, Iterable):
        raise DataError(f"several questions are a list of Question(image, text); found {_describe(questions)}.")


def check_address(image: ImageLike, where: str = "") -> None:
    """Refuse the address of an image.

    Args:
        where: what the message begins with.
    Raises:
        DataError: as above.
    """
    if isinstance(image, str) and "://" in image:
        raise DataError(f"{where}{image} is an address, which is not read. Download the image first.")


def _explain_image(image: Any) -> str:
    return (
        f"an image must be a path or an open PIL image; found {_describe(image)}. PIL.Image.fromarray(array) makes one "
        "of an array, PIL.Image.open(io.BytesIO(content)) of a file's bytes; a text-only model takes [] for no image."
    )


def _describe(value: object) -> str:
    """A value in an error message: its type and the beginning of what it prints."""
    if value is None:
        return "None"
    shown = " ".join(repr(value).split())
    return f"{type(value).__name__} ({shown[:40]}{'...' if len(shown) > 40 else ''})"
