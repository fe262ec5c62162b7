"""A model that is served: its name, its form, and what it does with questions that go through it together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

from visling.analysis.changing import Box, Place, draw_boxes, find_regions, leave_out
from visling.analysis.question import Prepared, Question, SeenImage
from visling.api import Predictor
from visling.errors import DataError, VislingError
from visling.serve.cache import ByteCache
from visling.serve.pictures import Pictures
from visling.vision.images import decode_image

Form = Literal["vqa", "statement", "pair", "referring", "grounding", "choices", "retrieval", "classification"]
"""How a task is asked: by a question, a sentence to judge (of one picture or of two), an expression or phrases to
point at, choices, a caption that searches a folder, a text to label."""

_FORMS: Mapping[str, Form] = {
    "vqa": "vqa",
    "gqa": "vqa",
    "nlvr": "statement",
    "nlvr2": "pair",
    "referring": "referring",
    "grounding": "grounding",
    "vcr": "choices",
    "retrieval": "retrieval",
    "classification": "classification",
}
"""Task of this package -> form."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question about pictures by their ids."""

    images: tuple[str, ...]
    text: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Inspected(Asked):
    """A question to be looked into, perhaps changed by its reader."""

    without_words: tuple[Place, ...] = ()
    without_regions: tuple[Place, ...] = ()
    """Numbers are those of the question without drawn boxes."""
    boxes: tuple[tuple[int, Box], ...] = ()
    """Number of the image, and a box to be added to it."""
    removal: bool = True
    """Whether it is also asked without each of its parts."""


class ServedModel:
    """A loaded model. Its methods are called by the computing thread only."""

    def __init__(self, name: str, predictor: Predictor, pictures: Pictures) -> None:
        self.name, self.predictor, self.pictures = name, predictor, pictures
        self._seen: ByteCache[SeenImage] = ByteCache(pictures.settings.seen_bytes)

    @property
    def form(self) -> Form:
        """How its task is asked; of a task of one's own by what it reads."""
        task = self.predictor.task
        if task.name in _FORMS:
            return _FORMS[task.name]
        if task.all_pairs() is not None:
            return "retrieval"
        return "choices" if task.choices else "pair" if task.images > 1 else "vqa"

    @property
    def images(self) -> int:
        """Pictures of a question; 0 of a model that reads the words alone."""
        return 0 if self.predictor.folder.text_only else self.predictor.task.images

    def answer(self, asked: Sequence[Asked]) -> list[dict[str, Any] | Exception]:
        """What is answered to each question, as `Answer.to_json` says it, or why it cannot be answered."""
        found: dict[int, dict[str, Any] | Exception] = {}
        questions: dict[int, Question] = {}
        for number, one in enumerate(asked):
            try:
                questions[number] = Question([self.look(image) for image in one.images], one.text, one.choices)
            except VislingError as error:
                found[number] = error
        waiting = list(questions)
        while waiting:
            try:
                # One by one: an answer holds its pictures, which need not all be there at once.
                for answer in self.predictor.answer_each([questions[number] for number in waiting]):
                    found[waiting.pop(0)] = answer.to_json()
            except Exception as error:
                # Of several that fail together, the first is asked alone before the others have their turn.
                first = waiting.pop(0)
                found[first] = self._answer_alone(questions[first]) if waiting else error
        return [found[number] for number in range(len(asked))]

    def inspect(self, asked: Sequence[Inspected]) -> list[bytes | Exception]:
        """The document of each question, as `Inspection.to_json` writes it, or why there is none."""
        found: list[bytes | Exception] = []
        for one in asked:
            try:
                document = self.predictor.inspect_prepared(self._prepare(one), removal=one.removal).to_json()
                found.append(json.dumps(document, allow_nan=False, separators=(",", ":")).encode())
            except Exception as error:
                found.append(error)
        return found

    def _prepare(self, asked: Inspected) -> Prepared:
        """A question with the changes of its reader."""
        predictor = self.predictor
        seen = [self.look(image) for image in asked.images]
        prepared = predictor.prepare(Question(seen, asked.text, asked.choices))
        regions = asked.without_regions
        if asked.boxes:
            for number in {number for number, _ in asked.boxes}:
                if not 0 <= number < len(seen):
                    raise DataError(f"a box is drawn in image {number}; there are {len(seen)}, counted from 0.")
                boxes = [box for image, box in asked.boxes if image == number]
                seen[number] = draw_boxes(seen[number], predictor.detector, boxes, predictor.spec.max_regions)
            plain, prepared = prepared, predictor.prepare(Question(seen, asked.text, asked.choices))
            regions = tuple(find_regions(plain, prepared, regions))
        if asked.without_words or regions:
            prepared = leave_out(prepared, predictor.tokenizer, words=asked.without_words, regions=regions)
        return prepared

    def rank(self, asked: Sequence[Asked]) -> list[list[float] | Exception]:
        """How well the text of each question fits each of its images, in their order."""
        found: list[list[float] | Exception] = []
        for one in asked:
            try:
                seen = [self.look(image) for image in one.images]
                scores = {id(image): score for image, score in self.predictor.rank(seen, one.text)}
                found.append([scores[id(image)] for image in seen])
            except Exception as error:
                found.append(error)
        return found

    def look(self, image: str) -> SeenImage:
        """A picture with its regions, detected when it is first asked about.

        Raises:
            DataError: it is no longer held, or damaged.
        """
        found = self._seen.get(image)
        if found is None:
            pixels = decode_image(BytesIO(self.pictures.find(image).data), image).pixels
            found = self.predictor.look(pixels)
            arrays = (found.pixels, found.regions.features, found.regions.probs)
            self._seen.put(image, found, sum(array.nbytes for array in arrays if array is not None))
        return found

    def _answer_alone(self, question: Question) -> dict[str, Any] | Exception:
        try:
            (answer,) = self.predictor.answer_each([question])
            return answer.to_json()
        except Exception as error:
            return error
