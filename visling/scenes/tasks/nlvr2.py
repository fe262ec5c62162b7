"""NLVR2 on drawn scenes: pairs of pictures, and sentences that are true of half of the pairs of their set.

Layout   As the official one, in nlvr2/: train.json, dev.json and test1.json with one object a line; pictures in
         images/train/{directory}/, images/dev/ and images/test1/, `train-0-1-img0.png` for the left picture of pair 1
         of set 0. They are copies of some of the scenes.
Balance  Each sentence is said of all pairs of its set, four where there are enough scenes, and true of half of them:
         the sentence alone gives nothing away. With one pair, true and false sentences alternate.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from visling.scenes.files import stem, write_lines
from visling.scenes.language import NUMBERS, indefinite, noun_phrase, traits_of
from visling.scenes.settings import ScenesConfig
from visling.scenes.world import VALUES, Scene, Traits, pick, shuffled

SHARE = 0.15
"""Share of the scenes whose pictures are used in pairs."""
PAIRS = 4
"""Pairs of a set, as in NLVR2."""
SENTENCES = 8
"""Sentences of a set; fewer where not enough are found that are true of half of its pairs."""

_SPLITS = {"train": "train", "val": "dev", "test": "test1"}
_DRAWS = 40
"""Sentences that are tried per sentence that is kept."""
_DIRECTORIES = 10
"""Folders over which training pictures are spread."""

Pair = tuple[Scene, Scene]


@dataclass(frozen=True)
class _Sentence:
    text: str
    holds: Callable[[Scene, Scene], bool]
    """Whether it is true of a left and a right picture."""


class Nlvr2Writer:
    """nlvr2/{train,dev,test1}.json and their pictures."""

    name: ClassVar[str] = "nlvr2"
    purpose: ClassVar[int] = 26

    def __init__(self, split: str, config: ScenesConfig) -> None:
        self.split = split
        self.scenes: list[tuple[Scene, np.random.Generator]] = []

    @staticmethod
    def describe(scene: Scene, rng: np.random.Generator) -> None:
        """Nothing: what is said depends on two scenes."""

    def add(self, scene: Scene, described: None, rng: np.random.Generator) -> None:
        """Remember the scene, and the generator that draws what is said about a set that begins with it."""
        self.scenes.append((scene, rng))

    def write(self, folder: Path) -> dict[str, int]:
        """Write the sentences of the split, and the pictures of its pairs."""
        name = _SPLITS[self.split]
        target = folder / "nlvr2"
        target.mkdir(exist_ok=True)
        rows: list[dict[str, Any]] = []
        sets = _form_sets(self.scenes)
        for number, (pairs, rng) in enumerate(sets):
            directory = {"directory": number % _DIRECTORIES} if name == "train" else {}
            pictures = target / "images" / name / str(directory.get("directory", ""))
            pictures.mkdir(parents=True, exist_ok=True)
            for place, pair in enumerate(pairs):
                for side, scene in enumerate(pair):
                    source = folder / "images" / self.split / f"{stem(scene.image_id)}.png"
                    shutil.copyfile(source, pictures / f"{name}-{number}-{place}-img{side}.png")
            for said, sentence in enumerate(_choose_sentences(pairs, rng)):
                rows += [
                    {
                        "sentence": sentence.text,
                        "label": str(sentence.holds(left, right)),
                        "identifier": f"{name}-{number}-{place}-{said}",
                        **directory,
                    }
                    for place, (left, right) in enumerate(pairs)
                ]
        write_lines(target / f"{name}.json", rows)
        return {"pairs": sum(len(pairs) for pairs, _ in sets), "statements": len(rows)}


WRITER = Nlvr2Writer


def _form_sets(scenes: Sequence[tuple[Scene, np.random.Generator]]) -> list[tuple[list[Pair], np.random.Generator]]:
    """Sets of pairs of the scenes that are used, taken at even distances, each with its generator; one pair at least,
    if there are two scenes."""
    number = min(max(2, round(SHARE * len(scenes))), len(scenes)) // 2 * 2
    used = [scenes[place * len(scenes) // number] for place in range(number)]
    pairs = [(left, right) for (left, _), (right, _) in zip(used[::2], used[1::2], strict=True)]
    return [(pairs[first : first + PAIRS], used[2 * first][1]) for first in range(0, len(pairs), PAIRS)]


def _choose_sentences(pairs: Sequence[Pair], rng: np.random.Generator) -> list[_Sentence]:
    """Different sentences that are true of half of the pairs; of an odd number, of the smaller and the larger half in
    turn."""
    chosen: dict[str, _Sentence] = {}
    families = shuffled(rng, _FAMILIES)
    for draw in range(_DRAWS * SENTENCES):
        if len(chosen) == SENTENCES:
            break
        sentence = families[(draw // 2 + len(chosen)) % len(families)](pick(rng, pick(rng, pairs)), rng)
        wanted = (len(pairs) + len(chosen) % 2) // 2
        if sum(sentence.holds(left, right) for left, right in pairs) == wanted:
            chosen.setdefault(sentence.text, sentence)
    return list(chosen.values())


def _draw_traits(scene: Scene, rng: np.random.Generator) -> Traits:
    """One or two traits of an object of a scene."""
    names = shuffled(rng, tuple(VALUES))[: int(rng.integers(1, 3))]
    return traits_of(pick(rng, scene.items), names)


def _compare_counts(scene: Scene, rng: np.random.Generator) -> _Sentence:
    """That one picture has more of something than the other."""
    traits = _draw_traits(scene, rng)
    some = noun_phrase(traits, rng, many=True)
    if rng.random() < 0.5:
        text = pick(
            rng,
            (
                f"the left picture has more {some} than the right one",
                f"there are fewer {some} in the right picture than in the left one",
            ),
        )
        return _Sentence(text, lambda left, right: left.count(traits) > right.count(traits))
    text = pick(
        rng,
        (
            f"the right picture has more {some} than the left one",
            f"there are fewer {some} in the left picture than in the right one",
        ),
    )
    return _Sentence(text, lambda left, right: left.count(traits) < right.count(traits))


def _claim_equal_counts(scene: Scene, rng: np.random.Generator) -> _Sentence:
    """That both pictures have equally many of something."""
    traits = _draw_traits(scene, rng)
    text = f"the left and the right picture have the same number of {noun_phrase(traits, rng, many=True)}"
    return _Sentence(text, lambda left, right: left.count(traits) == right.count(traits))


def _claim_presence(scene: Scene, rng: np.random.Generator) -> _Sentence:
    """That both pictures, only one or none of them have something."""
    traits = _draw_traits(scene, rng)
    how, number = pick(rng, (("each picture has", 2), ("only one picture has", 1), ("no picture has", 0)))
    text = f"{how} {indefinite(noun_phrase(traits, rng))}"
    return _Sentence(text, lambda left, right: (left.count(traits) > 0) + (right.count(traits) > 0) == number)


def _claim_side(scene: Scene, rng: np.random.Generator) -> _Sentence:
    """What each of the pictures has."""
    here, there = _draw_traits(scene, rng), _draw_traits(scene, rng)
    one, two = indefinite(noun_phrase(here, rng)), indefinite(noun_phrase(there, rng))
    text = f"there is {one} in the left picture and {two} in the right one"
    return _Sentence(text, lambda left, right: left.count(here) > 0 and right.count(there) > 0)


def _claim_total(scene: Scene, rng: np.random.Generator) -> _Sentence:
    """How many there are in both pictures together."""
    traits = _draw_traits(scene, rng)
    said = int(rng.integers(1, 6))
    how = pick(rng, ("exactly", "at least", "at most"))
    some = f"{NUMBERS[said]} {noun_phrase(traits, rng, many=said != 1)}"
    text = f"there {'is' if said == 1 else 'are'} {how} {some} in all"

    def holds(left: Scene, right: Scene) -> bool:
        total = left.count(traits) + right.count(traits)
        return {"exactly": total == said, "at least": total >= said, "at most": total <= said}[how]

    return _Sentence(text, holds)


_FAMILIES: tuple[Callable[[Scene, np.random.Generator], _Sentence], ...] = (
    _compare_counts,
    _claim_equal_counts,
    _claim_presence,
    _claim_side,
    _claim_total,
)
