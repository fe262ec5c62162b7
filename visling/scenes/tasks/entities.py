"""Flickr30K Entities' files about drawn scenes: sentences that name objects, and the boxes of what they name.

`flickr30k_entities/Sentences/ID.txt`, `flickr30k_entities/Annotations/ID.xml`, the list of a split's images, and the
grammar of its sentences, `flickr30k_entities/SPLIT.conllu`, whose ids are `ID#NUMBER`, counted from 0.

A description fits exactly the objects in its boxes: one object, or several where it is plural. Sentences say nothing
about places, so the words alone do not give a box away.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from visling.scenes.files import stem
from visling.scenes.grammar import Tree, join_and, tree, write_conllu
from visling.scenes.language import counted_tree, noun_tree, traits_of, unique_traits
from visling.scenes.settings import ScenesConfig
from visling.scenes.world import VALUES, Item, Scene, Traits, pick, shuffled

FOLDER = "flickr30k_entities"
SENTENCES = 5
"""Per scene, as in the official files."""
MOST_PHRASES = 4
"""With a box, per sentence."""
PLURAL_RATE = 0.25
"""Share of phrases that name all objects with a trait or two, where there are several."""

_TYPES = {"heart": "bodyparts/other", "ring": "clothing/other"}
"""Shape -> its types in the official mark-up; all else is of type other."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """The contents of a scene's two files, and the grammar of its sentences."""

    sentences: tuple[Tree, ...]
    """Each phrase has its mark-up as a mark."""
    annotation: str
    phrases: int
    """Phrases with a box."""


class EntitiesWriter:
    """Collects the files of one split."""

    name: ClassVar[str] = "grounding"
    purpose: ClassVar[int] = 23

    def __init__(self, split: str, config: ScenesConfig) -> None:
        self.split = split
        self.scenes: dict[str, Described] = {}

    @staticmethod
    def describe(scene: Scene, rng: np.random.Generator) -> Described:
        """Marked-up sentences and their annotation."""
        return _Describer(scene, rng).describe()

    def add(self, scene: Scene, described: Described, rng: np.random.Generator) -> None:
        """Keep the files of a scene."""
        self.scenes[stem(scene.image_id)] = described

    def write(self, folder: Path) -> dict[str, int]:
        """Write the files of the split; returns the numbers of sentences and of phrases with a box."""
        folder = folder / FOLDER
        for part in ("Sentences", "Annotations"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for image, described in self.scenes.items():
            _write(
                folder / "Sentences" / f"{image}.txt", "".join(f"{one.marked_text}\n" for one in described.sentences)
            )
            _write(folder / "Annotations" / f"{image}.xml", described.annotation)
        _write(folder / f"{self.split}.txt", "".join(f"{image}\n" for image in self.scenes))
        parses = (
            (f"{image}#{number}", sentence)
            for image, described in self.scenes.items()
            for number, sentence in enumerate(described.sentences)
        )
        _write(folder / f"{self.split}.conllu", write_conllu(parses))
        return {
            "sentences": sum(len(described.sentences) for described in self.scenes.values()),
            "phrases": sum(described.phrases for described in self.scenes.values()),
        }


class _Describer:
    """Sentences about one scene; phrases that name the same objects belong to one chain."""

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.scene, self.rng = scene, rng
        self.chains: dict[tuple[Item, ...], int] = {}
        self.scene_chain = 100 * scene.image_id  # 0 is reserved for what is not visible
        self.phrases = 0

    def describe(self) -> Described:
        """All sentences, and the boxes of what they name."""
        sentences = tuple(self._write_sentence() for _ in range(SENTENCES))
        return Described(sentences=sentences, annotation=self._annotate(), phrases=self.phrases)

    def _write_sentence(self) -> Tree:
        """A sentence that names two to four different things, or fewer where the scene has no more."""
        number = int(self.rng.integers(2, MOST_PHRASES + 1))
        named: dict[tuple[Item, ...], Tree] = {}
        for item in shuffled(self.rng, self.scene.items):
            traits = self._choose_traits(item)
            items = self.scene.fitting(traits)
            if len(named) < number and items not in named:
                named[items] = self._mark(traits, items)
        self.phrases += len(named)
        listed = join_and(list(named.values()), comma=",")
        article, noun = pick(self.rng, (("the", "picture"), ("this", "picture"), ("the", "image")))
        picture = tree(f"{article}:det {noun}*").marked(f"/EN#{self.scene_chain}/scene")
        it = tree("it/PRON*").marked("/EN#0/notvisual")
        forms = [
            tree("{}* .:punct", listed),
            tree("{}:nsubj shows/VERB* {}:obj .:punct", picture, listed),
            tree("{}:nsubj has/VERB* {}:obj .:punct", picture, listed),
            tree("{}:nsubj is:cop a:det picture* {}:nmod", it, tree("of:case {}*", listed)),
        ]
        if len(named) > 1:
            forms.append(tree("{}:nsubj are:cop in:case {}* .:punct", listed, picture))
        return pick(self.rng, forms)

    def _choose_traits(self, item: Item) -> Traits:
        """A description of this object alone, or of several objects of which it is one."""
        if self.rng.random() < PLURAL_RATE:
            for name in shuffled(self.rng, tuple(VALUES)):
                traits = traits_of(item, (name, pick(self.rng, tuple(VALUES))))
                if 1 < self.scene.count(traits) <= MOST_PHRASES:
                    return traits
        return unique_traits(self.scene, item, self.rng) or traits_of(item, tuple(VALUES))

    def _mark(self, traits: Traits, items: tuple[Item, ...]) -> Tree:
        """The phrase with its mark-up."""
        chain = self.chains.setdefault(items, self.scene_chain + 1 + len(self.chains))
        kind = _TYPES.get(traits.get("shape", ""), "other")
        many = len(items) > 1
        if many and self.rng.random() < 0.5:
            words = counted_tree(len(items), traits, self.rng)
        else:
            words = tree("the:det {}*", noun_tree(traits, self.rng, many=many))
        return words.marked(f"/EN#{chain}/{kind}")

    def _annotate(self) -> str:
        """The annotation file: each box once, with all chains that it belongs to."""
        size = self.scene.size
        objects = [
            _element("object", *(_element("name", str(chain)) for chain in chains), _box(item))
            for item in self.scene.items
            if (chains := [chain for items, chain in self.chains.items() if item in items])
        ]
        whole = _element(
            "object", _element("name", str(self.scene_chain)), _element("scene", "1"), _element("nobndbox", "0")
        )
        sides = [_element(name, str(number)) for name, number in (("width", size), ("height", size), ("depth", 3))]
        name = _element("filename", f"{stem(self.scene.image_id)}.png")
        return _element("annotation", name, _element("size", *sides), *objects, whole) + "\n"


def _box(item: Item) -> str:
    """The box of an object; its first pixel is number 1 and its last one belongs to it."""
    x1, y1, x2, y2 = item.box
    sides = (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2))
    return _element("bndbox", *(_element(name, str(number)) for name, number in sides))


def _element(name: str, *content: str) -> str:
    return f"<{name}>{''.join(content)}</{name}>"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


WRITER = EntitiesWriter
