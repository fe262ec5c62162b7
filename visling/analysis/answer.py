"""What a model answers about one image, or about the images that its task reads together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from visling.types import RegionArray


@dataclass(frozen=True, kw_only=True, repr=False)
class Answer:
    """A model's prediction for one image, or for the images that its task reads together, with their regions."""

    text: str
    """The top answer."""
    confidence: float
    """Its probability."""
    top: tuple[tuple[str, float], ...]
    """Best answers with probabilities, best first."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """Where each of `top` is, in pixels of the first image, if the task points at regions: the candidates of an
    expression, or the best region of each phrase."""
    pointed_at: tuple[tuple[str, float], ...]
    """What the model points at, with probabilities: the expression, at the first of `boxes`; or each phrase, at its
    own."""
    question: str
    images: tuple[Image.Image, ...]
    """As the detector saw them: upright, RGB, transparency on white."""
    regions_by_image: tuple[RegionArray, ...]
    truncated: bool
    """Whether the question was longer than the model reads and was cut."""
    spelled_out: tuple[str, ...] = ()
    """Words of the question that the model's vocabulary does not know, where they are more than half."""
    notice: str = ""
    """What makes the answer doubtful: images in which the detector found nothing."""

    def __repr__(self) -> str:
        """One line, and a second one if there is a notice."""
        shares = ", ".join(f"{name} {share:.0%}" for name, share in self.top[:3]) or self.text
        counts = " and ".join(str(len(regions)) for regions in self.regions_by_image)
        line = f'Answer({shares}; "{self.question}", {counts} regions)'
        return f"{line}\n  {self.notice}" if self.notice else line

    @property
    def image(self) -> Image.Image:
        """The first image."""
        return self.images[0]

    @property
    def regions(self) -> RegionArray:
        """Regions of the first image."""
        return self.regions_by_image[0]

    @property
    def pointed_regions(self) -> RegionArray:
        """The boxes that the model points at as regions without features, to be drawn; class k is the k-th of
        `pointed_at`."""
        number = len(self.pointed_at)
        return RegionArray(
            features=np.zeros((number, 0), np.float32),
            boxes=np.array(self.boxes[:number], np.float32).reshape(-1, 4),
            size=self.regions.size,
            classes=np.arange(number),
            class_confidence=np.array([share for _, share in self.pointed_at], np.float32),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON: what is answered, and what makes it doubtful; boxes only of tasks that point."""
        found = {"answer": self.text, "confidence": self.confidence, "top": self.top, "truncated": self.truncated}
        if self.boxes:
            found |= {"boxes": self.boxes, "pointed_at": self.pointed_at}
        found |= {"notice": self.notice} if self.notice else {}
        found |= {"spelled_out": self.spelled_out} if self.spelled_out else {}
        return found | {"regions": [len(regions) for regions in self.regions_by_image]}
