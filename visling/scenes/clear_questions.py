"""Questions with one clear answer about drawn pictures, chosen from their annotation files.

What `make demo` asks at its end: a reader who looks at the picture can check every answer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visling.errors import DataError
from visling.scenes.language import plural
from visling.scenes.world import VALUES


@dataclass(frozen=True, kw_only=True)
class ClearQuestion:
    """A question about one picture, and its only right answer."""

    image: Path
    text: str
    answer: str


def choose_questions(scenes: Path, split: str = "test") -> list[ClearQuestion]:
    """A colour, a texture and a count, each about another picture: the first picture that has a clear answer.

    A colour or texture is asked of a shape that occurs once, a count of a shape that occurs two to four times.

    Args:
        scenes: folder that `visling scenes` wrote.
    Returns:
        Three questions; fewer where no picture is left that suits.
    Raises:
        DataError: the folder has no boxes of this split.
    """
    pictures = list(_read_pictures(scenes, split))
    chosen: list[ClearQuestion] = []
    for ask in _ASK:
        used = {question.image for question in chosen}
        for path, objects in pictures:
            found = next(ask(objects), None)
            if found is not None and path not in used:
                chosen.append(ClearQuestion(image=path, text=found[0], answer=found[1]))
                break
    return chosen


def list_questions(scenes: Path, split: str = "test") -> Iterator[ClearQuestion]:
    """Every such question about every picture, picture by picture.

    Raises:
        DataError: the folder has no boxes of this split.
    """
    for path, objects in _read_pictures(scenes, split):
        for ask in _ASK:
            for text, answer in ask(objects):
                yield ClearQuestion(image=path, text=text, answer=answer)


def _read_pictures(scenes: Path, split: str) -> Iterator[tuple[Path, list[Mapping[str, str]]]]:
    """Each picture of a split with the traits of its objects."""
    file = scenes / "annotations" / f"instances_{split}.json"
    if not file.exists():
        raise DataError(f"no {file}. Give the folder that `visling scenes` wrote.")
    content = json.loads(file.read_text(encoding="utf-8"))
    shapes = {category["id"]: category["name"] for category in content["categories"]}
    objects: dict[int, list[Mapping[str, str]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append(_read_traits(annotation, shapes))
    for image in content["images"]:
        yield scenes / "images" / split / image["file_name"], objects[image["id"]]


def describe_answer(question: ClearQuestion, top: Sequence[tuple[str, float]]) -> str:
    """A model's answers to a question in one line, with the truth and whether the first of them is right.

    Args:
        top: (answer, probability), the best first.
    """
    shares = ", ".join(f"{answer} {share:.0%}" for answer, share in top[:3])
    verdict = "right" if top and top[0][0] == question.answer else "wrong"
    return f"{question.text} {shares or 'no answer'}; truth: {question.answer} ({verdict})"


def _read_traits(annotation: Mapping[str, Any], shapes: Mapping[int, str]) -> dict[str, str]:
    """Trait -> value of an annotated object, whose attributes are its other traits in no promised order."""
    traits = {name: value for value in annotation["attributes"] for name, values in VALUES.items() if value in values}
    return {**traits, "shape": shapes[annotation["category_id"]]}


def _ask_trait(name: str) -> Callable[[Sequence[Mapping[str, str]]], Iterator[tuple[str, str]]]:
    """Questions for one trait of a shape that occurs once."""

    def ask(objects: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, str]]:
        counts = Counter(traits["shape"] for traits in objects)
        for traits in objects:
            if counts[traits["shape"]] == 1:
                yield f"what {name} is the {traits['shape']}?", traits[name]

    return ask


def _ask_count(objects: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """Questions for the number of objects of a shape that occurs two to four times."""
    for shape, number in sorted(Counter(traits["shape"] for traits in objects).items()):
        if 2 <= number <= 4:
            yield f"how many {plural(shape)} are there?", str(number)


_ASK = (_ask_trait("color"), _ask_trait("texture"), _ask_count)
