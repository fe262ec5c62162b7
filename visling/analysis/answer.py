"""What a model answers about one image, or about the images that its task reads together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visling.analysis import notebook
from visling.analysis.drawing import draw_regions, prediction_card, save_picture
from visling.analysis.region_names import name_regions
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
    """As the detector saw them: upright, RGB, transparency on white. None where a text-only model was given none."""
    regions_by_image: tuple[RegionArray, ...]
    class_names: tuple[str, ...] = ()
    """Of the detector, by `RegionArray.classes`."""
    attribute_names: tuple[str, ...] = ()
    """Of the detector, by `RegionArray.attributes`."""
    max_tokens: int
    """Most word pieces that the model reads of a question."""
    truncated: bool
    """Whether the question was longer and was cut."""
    spelled_out: tuple[str, ...] = ()
    """Words of the question that the model's vocabulary does not know, where they are more than half."""
    notice: str = ""
    """What makes the answer doubtful: images in which the detector found nothing."""

    def __repr__(self) -> str:
        """One line, and a further one for each notice."""
        shares = ", ".join(f"{name} {share:.0%}" for name, share in self._list_bars()[:3]) or self.text
        counts = " and ".join(str(len(regions)) for regions in self.regions_by_image)
        seen = f"{counts} regions" if counts else "no image"
        return "\n  ".join([f'Answer({shares}; "{self.question}", {seen})', *self.notices])

    @property
    def notices(self) -> tuple[str, ...]:
        """What a reader of the answer should know, a sentence each."""
        found = [self.notice] if self.notice else []
        if self.truncated:
            found.append(f"the text was cut to {self.max_tokens} word pieces")
        if self.spelled_out:
            unknown = ", ".join(self.spelled_out)
            found.append(f"most words are unknown to the model, which reads them letter by letter: {unknown}")
        return tuple(found)

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

    def _list_bars(self) -> tuple[tuple[str, float], ...]:
        """What is pointed at, or the best answers, with probabilities; of a score alone the score."""
        if self.pointed_at or self.top or not self.confidence:
            return self.pointed_at or self.top
        try:
            return ((f"score {float(self.text):.2f}", self.confidence),)
        except ValueError:  # an answer of a task of one's own that lists no other
            return ((self.text, self.confidence),)

    def draw(self, *, max_boxes: int | None = 12) -> Image.Image:
        """A picture of the answer: the images next to each other with their regions, or with the boxes that the model
        points at; the question; and the best answers as bars.

        Args:
            max_boxes: most regions drawn on each image; None draws all.
        """
        pictures = [
            draw_regions(image, regions, class_names=classes, attribute_names=attributes, top=max_boxes)
            for image, (regions, classes, attributes) in zip(self.images, self._list_drawn(), strict=True)
        ]
        return prediction_card(pictures, self.question, self._list_bars())

    def save(self, target: str | Path, *, max_boxes: int | None = 12) -> None:
        """Write `draw()` to a file.

        Raises:
            RunError: it cannot be written, or no image format has its suffix.
        """
        save_picture(self.draw(max_boxes=max_boxes), Path(target))

    def _list_drawn(self) -> list[tuple[RegionArray, tuple[str, ...], tuple[str, ...]]]:
        """Regions to draw on each image, with the names of their classes and attributes."""
        if self.boxes:
            return [(self.pointed_regions, tuple(name for name, _ in self.pointed_at), ())]
        return [(regions, self.class_names, self.attribute_names) for regions in self.regions_by_image]

    def _repr_html_(self) -> str:
        """What a notebook shows: the drawn images, the question, bars and notices."""
        shown = []
        for image, (regions, classes, attributes) in zip(self.images, self._list_drawn(), strict=True):
            names = name_regions(regions, class_names=classes, attribute_names=attributes)
            drawn = draw_regions(image, regions, class_names=classes, attribute_names=attributes, top=12)
            shown.append(notebook.render_picture(drawn, f"{len(names)} regions: {', '.join(names[:12]) or 'none'}"))
        words = [
            notebook.render_text(self.question, strong=True),
            notebook.render_bars(self._list_bars()),
            *map(notebook.render_text, self.notices),
        ]
        return notebook.render_fragment([notebook.render_row([*shown, f"<div>{''.join(words)}</div>"])])

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON: what is answered, and what makes it doubtful; boxes only of tasks that point."""
        found = {"answer": self.text, "confidence": self.confidence, "top": self.top, "truncated": self.truncated}
        if self.boxes:
            found |= {"boxes": self.boxes, "pointed_at": self.pointed_at}
        found |= {"notice": self.notice} if self.notice else {}
        found |= {"spelled_out": self.spelled_out} if self.spelled_out else {}
        return found | {"regions": [len(regions) for regions in self.regions_by_image]}
