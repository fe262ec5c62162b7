"""Referring expressions about scenes, in the refer API's layout: refcoco/instances.json and refcoco/refs(unc).p.

A reference is made for objects that share their shape or colour with another one, in one of two ways: by traits of
which each is needed ("the small red star"; part testA of the test split), or by a relation to another object ("the
circle left of the blue square"; testB). One file holds all splits: each split is added to what the ones before it
wrote.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from visling.scenes.files import image_entry, info, instance_entry, license_entry, stem, write_json
from visling.scenes.language import RELATIONS, holds, noun_phrase, relation_words, traits_of, unique_traits
from visling.scenes.settings import ScenesConfig
from visling.scenes.world import SHAPES, VALUES, Item, Scene, pick, shuffled

REFERENCES = 2
"""Objects per scene that are referred to."""

SENTENCES = 2
"""Most sentences per object."""

_CONSIDERED = 4
"""Objects per scene for which expressions are looked for."""

_PARTS = {"traits": "testA", "relation": "testB"}
"""Way of referring -> part of the test split."""

Expressions = list[tuple[int, str, list[str]]]
"""Number of the object, way of referring, sentences."""


class ReferringWriter:
    """Writes one split."""

    name: ClassVar[str] = "referring"
    purpose: ClassVar[int] = 22

    def __init__(self, split: str, config: ScenesConfig) -> None:
        self.split = split
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.references: list[dict[str, Any]] = []

    @staticmethod
    def describe(scene: Scene, rng: np.random.Generator) -> Expressions:
        """Sentences that fit one object alone, for some of those that others resemble."""
        found: Expressions = []
        alike = [number for number, item in enumerate(scene.items) if _is_alike(scene, item)]
        for number in shuffled(rng, alike)[:_CONSIDERED]:
            for way, texts in (
                ("traits", _by_traits(scene, scene.items[number], rng)),
                ("relation", _by_relation(scene, scene.items[number], rng)),
            ):
                if texts:
                    found.append((number, way, texts))
        return found

    def add(self, scene: Scene, described: Expressions, rng: np.random.Generator) -> None:
        """Refer to objects in one way each."""
        chosen: dict[int, tuple[str, list[str]]] = {}
        for number, way, texts in shuffled(rng, described):
            if number not in chosen and len(chosen) < REFERENCES:
                chosen[number] = way, shuffled(rng, texts)[: int(rng.integers(1, SENTENCES + 1))]
        if not chosen:
            return
        name = f"{stem(scene.image_id)}.png"
        self.images.append(image_entry(scene.image_id, name, scene.size, scene.size))
        self.annotations += [instance_entry(scene, number) for number in range(len(scene.items))]
        for number, (way, texts) in chosen.items():
            reference = scene.image_id * 100 + number
            sentences = [_write_sentence(reference * 10 + place, text) for place, text in enumerate(texts)]
            self.references.append(
                {
                    "ref_id": reference,
                    "ann_id": reference,
                    "image_id": scene.image_id,
                    "category_id": SHAPES.index(scene.items[number].shape) + 1,
                    "split": _PARTS[way] if self.split == "test" else self.split,
                    "sent_ids": [sentence["sent_id"] for sentence in sentences],
                    "file_name": f"{stem(scene.image_id)}_{number}.png",
                    "sentences": sentences,
                }
            )

    def write(self, folder: Path) -> dict[str, int]:
        """Add the split to the two files."""
        place = folder / "refcoco"
        place.mkdir(exist_ok=True)
        instances, references = place / "instances.json", place / "refs(unc).p"
        content: dict[str, Any] = {
            "info": info("scenes"),
            "licenses": [license_entry()],
            "images": [],
            "annotations": [],
            "categories": [
                {"id": number, "name": shape, "supercategory": "shape"} for number, shape in enumerate(SHAPES, start=1)
            ],
        }
        earlier: list[Any] = []
        if instances.exists():
            content = json.loads(instances.read_text(encoding="utf-8"))
            earlier = pickle.loads(references.read_bytes())
        content["images"] += self.images
        content["annotations"] += self.annotations
        write_json(instances, content)
        # A pickle remembers which strings are one object in memory, which depends on the processes that made them.
        fresh = json.loads(json.dumps(earlier + self.references))
        references.write_bytes(pickle.dumps(fresh, protocol=2))
        return {
            "references": len(self.references),
            "sentences": sum(len(reference["sentences"]) for reference in self.references),
        }


def _is_alike(scene: Scene, item: Item) -> bool:
    """Whether another object has the same shape or colour."""
    return any(scene.count({name: item.trait(name)}) > 1 for name in ("shape", "color"))


def _by_traits(scene: Scene, item: Item, rng: np.random.Generator) -> list[str]:
    """Descriptions by traits that fit this object alone, each of which would fit several without one of its traits."""
    unique: list[frozenset[str]] = []
    for length in range(1, len(VALUES) + 1):
        for names in combinations(VALUES, length):
            described = frozenset(names)
            if not any(shorter <= described for shorter in unique) and scene.count(traits_of(item, names)) == 1:
                unique.append(described)
    return [
        f"the {noun_phrase(traits_of(item, tuple(names)), rng)}"
        for names in unique
        if len(names) > 1 and names & {"shape", "color"}
    ]


def _by_relation(scene: Scene, item: Item, rng: np.random.Generator) -> list[str]:
    """Descriptions that fit several objects, of which this one alone stands in a relation to another object."""
    return list(dict.fromkeys(_relate(scene, item, rng)))


def _relate(scene: Scene, item: Item, rng: np.random.Generator) -> Iterator[str]:
    for names in (("shape",), ("color",)):
        traits = traits_of(item, names)
        others = [other for other in scene.fitting(traits) if other is not item]
        if not others:
            continue
        anchors = [anchor for anchor in scene.items if not anchor.fits(traits)]
        for anchor in shuffled(rng, anchors)[:2]:
            named = unique_traits(scene, anchor, rng, most=2)
            true = [
                relation
                for relation in RELATIONS
                if holds(relation, item, anchor, scene.margin)
                and all(holds(relation, other, anchor, scene.margin) is False for other in others)
            ]
            if named is not None and true:
                words = relation_words(pick(rng, true), rng)
                yield f"the {noun_phrase(traits, rng)} {words} the {noun_phrase(named, rng)}"


def _write_sentence(number: int, text: str) -> dict[str, Any]:
    """A sentence as it is written, cleaned, and in words."""
    return {"sent_id": number, "raw": text.capitalize(), "sent": text, "tokens": text.split()}


WRITER = ReferringWriter
