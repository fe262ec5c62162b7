"""Caption retrieval on drawn scenes, in Karpathy's layout: five captions that together tell a scene from all others.

Each caption names two to four objects with all their traits, so that hardly another scene fits it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from visling.scenes.files import stem, write_json
from visling.scenes.language import indefinite, noun_phrase, traits_of
from visling.scenes.settings import ScenesConfig
from visling.scenes.world import VALUES, Item, Scene, pick, shuffled

FOLDER = "karpathy"
CAPTIONS = 5
FEWEST, MOST = 2, 4
"""Objects that a caption names."""

_OPENINGS = ("", "there is ", "a picture of ", "the picture shows ", "the picture has ")


class RetrievalWriter:
    """Writes `karpathy/dataset_scenes_{split}.json`."""

    name: ClassVar[str] = "retrieval"
    purpose: ClassVar[int] = 24

    def __init__(self, split: str, config: ScenesConfig) -> None:
        self._split = split
        self._images: list[dict[str, Any]] = []

    @staticmethod
    def describe(scene: Scene, rng: np.random.Generator) -> list[str]:
        """Five different captions."""
        captions: dict[str, None] = {}
        while len(captions) < CAPTIONS:
            number = int(rng.integers(min(FEWEST, len(scene.items)), min(MOST, len(scene.items)) + 1))
            captions[_describe(shuffled(rng, scene.items)[:number], rng)] = None
        return list(captions)

    def add(self, scene: Scene, described: list[str], rng: np.random.Generator) -> None:
        """All captions of the scene."""
        first = CAPTIONS * scene.image_id
        self._images.append(
            {
                "filename": f"{stem(scene.image_id)}.png",
                "imgid": scene.image_id,
                "split": self._split,
                "sentids": list(range(first, first + len(described))),
                "sentences": [
                    {
                        "tokens": re.findall(r"\w+", text.lower()),
                        "raw": text,
                        "imgid": scene.image_id,
                        "sentid": first + number,
                    }
                    for number, text in enumerate(described)
                ],
            }
        )

    def write(self, folder: Path) -> dict[str, int]:
        """The split's file."""
        (folder / FOLDER).mkdir(exist_ok=True)
        content = {"images": self._images, "dataset": "scenes"}
        write_json(folder / FOLDER / f"dataset_scenes_{self._split}.json", content)
        return {"captions": sum(len(image["sentences"]) for image in self._images)}


def _describe(items: list[Item], rng: np.random.Generator) -> str:
    """The objects with all their traits: "a large red striped star and a small blue solid ring"."""
    names = [indefinite(noun_phrase(traits_of(item, tuple(VALUES)), rng)) for item in items]
    return pick(rng, _OPENINGS) + " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


WRITER = RetrievalWriter
