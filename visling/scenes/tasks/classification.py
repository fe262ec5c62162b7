"""Labelled texts about scenes, in the form of Hateful Memes: whether a sentence is true of its picture, and which
shapes a question asks for (several labels).

Neither the words nor the picture alone say anything: every picture has as many true as false sentences, and both are
made of traits that the picture shows, whose values are exchangeable (sizes, which are not, are left out).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from visling.scenes.files import stem, write_lines
from visling.scenes.language import (
    OPPOSITE,
    RELATIONS,
    holds,
    indefinite,
    noun_phrase,
    relation_words,
    traits_of,
    unique_traits,
)
from visling.scenes.settings import ScenesConfig
from visling.scenes.world import SHAPES, VALUES, Scene, Traits, pick, shuffled

_EXCHANGEABLE = ("color", "texture", "shape")


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What is said about one scene."""

    sentences: tuple[tuple[str, int], ...]
    """Sentence and label, 1 = true of the picture; as many true as false."""
    question: str
    """What shape some objects have."""
    shapes: tuple[str, ...]
    """Its answer."""


class ClassificationWriter:
    """classification/{split}.jsonl with one label, classification/multilabel/{split}.jsonl with several."""

    name: ClassVar[str] = "classification"
    purpose: ClassVar[int] = 25

    def __init__(self, split: str, config: ScenesConfig) -> None:
        self.split = split
        self.single: list[dict[str, Any]] = []
        self.several: list[dict[str, Any]] = []

    @staticmethod
    def describe(scene: Scene, rng: np.random.Generator) -> Labelled:
        """True and false sentences, and a question with its shapes."""
        sentences = [pair for make in _FAMILIES for pair in make(scene, rng)]
        question, shapes = _ask_shapes(scene, rng)
        return Labelled(sentences=tuple(sentences), question=question, shapes=shapes)

    def add(self, scene: Scene, described: Labelled, rng: np.random.Generator) -> None:
        """Keep all that is said, in random order."""
        image = f"../images/{self.split}/{stem(scene.image_id)}.png"
        for text, label in shuffled(rng, described.sentences):
            number = len(self.single) + 1
            self.single.append({"id": number, "img": image, "label": label, "text": text})
        number = len(self.several) + 1
        self.several.append(
            {
                "id": number,
                "image": f"../{image}",
                "question": described.question,
                "labels": list(described.shapes),
            }
        )

    def write(self, folder: Path) -> dict[str, int]:
        """Write the two files of the split."""
        target = folder / "classification"
        (target / "multilabel").mkdir(parents=True, exist_ok=True)
        write_lines(target / f"{self.split}.jsonl", self.single)
        write_lines(target / "multilabel" / f"{self.split}.jsonl", self.several)
        return {"sentences": len(self.single), "questions": len(self.several)}


WRITER = ClassificationWriter


def _claim_presence(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, int]]:
    """That there is an object of a description, once truly and once falsely; either may be denied."""
    names = _EXCHANGEABLE if rng.random() < 0.3 else tuple(sorted(shuffled(rng, _EXCHANGEABLE)[:2]))
    present = traits_of(pick(rng, scene.items), names)
    absent = _mix_traits(scene, names, rng)
    if absent is None:
        return
    denied = rng.random() < 0.5
    for traits, is_there in ((present, True), (absent, False)):
        phrase = noun_phrase(traits, rng)
        yield f"there is {f'no {phrase}' if denied else indefinite(phrase)} here", int(is_there != denied)


def _mix_traits(scene: Scene, names: Sequence[str], rng: np.random.Generator) -> Traits | None:
    """A description that fits no object, of traits that the picture shows if it can be."""
    for _ in range(8):
        traits = {name: pick(rng, scene.items).trait(name) for name in VALUES if name in names}
        if not scene.count(traits):
            return traits
    for _ in range(8):
        traits = {name: pick(rng, VALUES[name]) for name in VALUES if name in names}
        if not scene.count(traits):
            return traits
    return None


def _claim_place(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, int]]:
    """Where one object is relative to another, once truly and once falsely."""
    for _ in range(4):
        first, second = shuffled(rng, scene.items)[:2]
        one = unique_traits(scene, first, rng, without=("size",))
        two = unique_traits(scene, second, rng, without=("size",))
        asked = pick(rng, RELATIONS)
        true = holds(asked, first, second, scene.margin)
        if one is None or two is None or true is None:
            continue
        first_phrase, second_phrase = noun_phrase(one, rng), noun_phrase(two, rng)
        for relation, label in ((asked, int(true)), (OPPOSITE[asked], int(not true))):
            yield f"the {first_phrase} is {relation_words(relation, rng)} the {second_phrase}", label
        return


_FAMILIES: tuple[Callable[[Scene, np.random.Generator], Iterator[tuple[str, int]]], ...] = (
    _claim_presence,
    _claim_presence,
    _claim_place,
)


def _ask_shapes(scene: Scene, rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    """A question about the shapes of some objects, and these shapes."""
    name = pick(rng, ("color", "size", "texture"))
    value = pick(rng, scene.items).trait(name)
    shapes = {item.shape for item in scene.fitting({name: value})}
    question = pick(rng, (f"what shape do the {value} things have?", f"of what shape are the {value} objects?"))
    return question, tuple(shape for shape in SHAPES if shape in shapes)
