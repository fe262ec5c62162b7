"""Questions that go through a model in one batch, with the images that they are about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from visling import runtime
from visling.analysis.question import ImageLike, Question, SeenImage
from visling.data.batches.collate import Collator
from visling.data.text import Tokenizer
from visling.pretrained.folder import ModelFolder
from visling.regions.given import GivenRegions
from visling.types import Batch, Example, InputSpec, Record
from visling.vision.pictures import GivenPictures

_MOST_QUESTIONS, _MOST_IMAGES = 64, 8
"""Of a batch; pictures may have many pixels, and little is gained by reading more of them at a time."""

ImageKey = tuple[str, int, int] | int
"""Of a file its name, the time of its last change and its size; of an open image its identity."""


def image_key(image: ImageLike) -> ImageKey:
    """What tells an image from others; a file that is not there has zeros."""
    if isinstance(image, (Image.Image, SeenImage)):
        return id(image)
    if not Path(image).is_file():
        return str(image), 0, 0
    about = Path(image).stat()
    return str(image), about.st_mtime_ns, about.st_size


class Asked(NamedTuple):
    """A question as the model reads it."""

    question: Question
    images: Sequence[str]
    """Name of each image in the batch."""
    record: Record
    example: Example
    truncated: bool


@dataclass
class Together:
    """Questions that go through the model in one batch."""

    asked: list[Asked] = field(default_factory=list)
    seen: dict[ImageKey, SeenImage] = field(default_factory=dict)
    """Distinct images."""

    def has_room(self, question: Question) -> bool:
        """Whether another question may join: one with as many rows of text, while there are not too many."""
        if not self.asked:
            return True
        same = len(question.choices) == len(self.asked[0].question.choices)
        return same and len(self.asked) < _MOST_QUESTIONS and len(self.seen) < _MOST_IMAGES

    def name(self, key: ImageKey) -> str:
        """Name in the batch of an image that was seen: its number."""
        return str(list(self.seen).index(key))

    def list_images(self, asked: Asked) -> list[SeenImage]:
        """Images of one of the questions."""
        seen = list(self.seen.values())
        return [seen[int(name)] for name in asked.images]

    def collate(self, folder: ModelFolder, spec: InputSpec, tokenizer: Tokenizer) -> Batch:
        """The questions as a batch of the model in a folder."""
        seen = list(self.seen.values())
        store = pictures = None
        if not folder.text_only:
            store = GivenRegions([one.regions for one in seen], folder.fingerprint)
        if folder.extractor is not None:
            pictures = GivenPictures({str(n): one.pixels for n, one in enumerate(seen)}, folder.extractor)
        collate = Collator(store, spec, tokenizer, pictures=pictures, share=True)
        batch, _ = collate([one.example for one in self.asked], [runtime.generator_for(0) for _ in self.asked])
        return batch
