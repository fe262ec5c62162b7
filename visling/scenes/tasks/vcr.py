"""Questions with four answers and four rationales, in the files of VCR.

Two kinds of questions. "look": how an object looks, by size, colour and texture; the rationales say where it is.
"place": which object stands in a relation to another; the rationales say how that one looks. What is wrong about the
object that is asked for is true of another one, and each choice is equally likely to be right: words alone say nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from visling.scenes.files import stem, write_json, write_lines
from visling.scenes.language import OPPOSITE, RELATIONS, holds, relation_words
from visling.scenes.settings import ScenesConfig
from visling.scenes.world import Item, Scene, pick, shuffled

FOLDER = "vcr"
MOVIE = "scenes"
"""Folder of the images in `img_fn`."""
CHOICES = 4
LOOKS = 3
"""Most questions about looks per scene."""

Sentence = list[str | list[int]]
"""Words, and objects by number."""
Described = dict[str, Any]
"""Fields of a question that the scene alone determines."""


def describe_scene(scene: Scene, rng: np.random.Generator) -> list[Described]:
    """At most `LOOKS` questions about looks, and one about a place."""
    return [*itertools.islice(_ask_look(scene, rng), LOOKS), *itertools.islice(_ask_place(scene, rng), 1)]


def _ask_look(scene: Scene, rng: np.random.Generator) -> Iterator[Described]:
    """How does [0] look?"""
    classes = _group_by_class(scene)
    for (target,) in shuffled(rng, [tag for tag in classes if len(tag) == 1]):
        wrong = _draw_other_looks(scene, target, rng)
        reasons = _draw_places(scene, target, classes, rng)
        if wrong is not None and reasons is not None:
            yield _make_question(
                ["how", "does", [target], "look"],
                [["it", "is", *_look(scene.items[item])] for item in (target, *wrong)],
                reasons,
                rng,
            )


def _ask_place(scene: Scene, rng: np.random.Generator) -> Iterator[Described]:
    """What is left of [0, 1]?"""
    classes = _group_by_class(scene)
    for landmark in shuffled(rng, classes):
        for asked in shuffled(rng, RELATIONS):
            placed = {tag[0]: _all_hold(scene, asked, tag, landmark) for tag in classes if len(tag) == 1}
            right = [item for item, truth in placed.items() if truth]
            wrong = [item for item, truth in placed.items() if truth is False]
            if not right or len(wrong) < CHOICES - 1:
                continue
            target = pick(rng, right)
            looks = _draw_other_looks(scene, target, rng)
            if looks is not None:
                yield _make_question(
                    ["what", "is", *relation_words(asked, rng).split(), landmark],
                    [["it", "is", [item]] for item in (target, *shuffled(rng, wrong)[: CHOICES - 1])],
                    [["as", "it", "is", *_look(scene.items[item])] for item in (target, *looks)],
                    rng,
                )


def _group_by_class(scene: Scene) -> list[list[int]]:
    """The objects of each class. Sentences name all of a class or none, so that a model without links between words and
    regions knows which are meant."""
    groups: dict[str, list[int]] = {}
    for number, item in enumerate(scene.items):
        groups.setdefault(item.shape, []).append(number)
    return list(groups.values())


def _all_hold(scene: Scene, asked: str, first: Sequence[int], second: Sequence[int]) -> bool | None:
    """Whether a relation holds between all objects of two groups; None where it does for some, or is not clear."""
    if set(first) & set(second):
        return None
    found = {holds(asked, scene.items[one], scene.items[other], scene.margin) for one in first for other in second}
    return found.pop() if len(found) == 1 else None


def _look(item: Item) -> list[str]:
    """Size, colour and texture in words."""
    return [item.size, item.color, "and", item.texture]


def _draw_other_looks(scene: Scene, target: int, rng: np.random.Generator) -> list[int] | None:
    """Objects that look unlike the target and unlike one another; None if there are too few."""
    looks = {tuple(_look(scene.items[target])): target}
    for item in shuffled(rng, range(len(scene.items))):
        looks.setdefault(tuple(_look(scene.items[item])), item)
    others = list(looks.values())[1:CHOICES]
    return others if len(others) == CHOICES - 1 else None


def _draw_places(
    scene: Scene, target: int, classes: Sequence[list[int]], rng: np.random.Generator
) -> list[Sentence] | None:
    """A true sentence about the place of an object, then false ones; None if there are too few.

    No two of them are about the same side of the same objects, where one would give the other away.
    """
    sentences: list[Sentence] = []
    for tag, asked in shuffled(rng, [(tag, asked) for tag in classes for asked in ("left", "above")]):
        truth = _all_hold(scene, asked, [target], tag)
        if truth is None or len(sentences) == CHOICES:
            continue
        said = asked if truth is (not sentences) else OPPOSITE[asked]
        sentences.append(["as", "it", "is", *relation_words(said, rng).split(), tag])
    return sentences if len(sentences) == CHOICES else None


def _make_question(
    question: Sentence, answers: list[Sentence], rationales: list[Sentence], rng: np.random.Generator
) -> Described:
    """The official fields; of answers and rationales the first is right."""
    fields: Described = {"question": [*question, "?"]}
    for name, choices in (("answer", answers), ("rationale", rationales)):
        order = [int(place) for place in rng.permutation(CHOICES)]
        fields[f"{name}_choices"] = [[*choices[place], "."] for place in order]
        fields[f"{name}_label"] = order.index(0)
    return fields


class VcrWriter:
    """`vcr/{split}.jsonl` and the objects of the images in `vcr/vcr1images`."""

    name: ClassVar[str] = "vcr"
    purpose: ClassVar[int] = 21

    def __init__(self, split: str, config: ScenesConfig) -> None:
        self.split = split
        self.questions: list[dict[str, Any]] = []
        self.objects: dict[str, dict[str, Any]] = {}
        """Image -> its metadata."""

    @staticmethod
    def describe(scene: Scene, rng: np.random.Generator) -> list[Described]:
        """The questions of a scene."""
        return describe_scene(scene, rng)

    def add(self, scene: Scene, described: list[Described], rng: np.random.Generator) -> None:
        """Number the questions and note the objects of their image."""
        image, classes = stem(scene.image_id), [item.shape for item in scene.items]
        for fields in described:
            number = len(self.questions)
            self.questions.append(
                {
                    "movie": MOVIE,
                    "objects": classes,
                    "img_fn": f"{MOVIE}/{image}.png",
                    "metadata_fn": f"{MOVIE}/{image}.json",
                    **fields,
                    "img_id": f"{self.split}-{scene.image_id}",
                    "question_number": number,
                    "annot_id": f"{self.split}-{number}",
                }
            )
        if described:
            self.objects[image] = {
                "boxes": [[*map(float, item.box), 1.0] for item in scene.items],
                "segms": [
                    [[[x1, y1], [x2, y1], [x2, y2], [x1, y2]]] for x1, y1, x2, y2 in (i.box for i in scene.items)
                ],
                "names": classes,
                "width": scene.size,
                "height": scene.size,
            }

    def write(self, folder: Path) -> dict[str, int]:
        """Write the files of the split."""
        metadata = folder / FOLDER / "vcr1images" / MOVIE
        metadata.mkdir(parents=True, exist_ok=True)
        write_lines(folder / FOLDER / f"{self.split}.jsonl", self.questions)
        for image, objects in self.objects.items():
            write_json(metadata / f"{image}.json", objects)
        return {"questions": len(self.questions)}


WRITER = VcrWriter
