"""Captions of a scene. Of five, three name every trait of one object and one those of several objects; the last counts,
relates, compares or denies.

Half of the captions describe one object because a model learns from these which word belongs to which region
(docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from visling.scenes.language import (
    RELATIONS,
    counted,
    holds,
    indefinite,
    noun_phrase,
    relation_words,
    traits_of,
    unique_traits,
)
from visling.scenes.world import VALUES, Item, Scene, pick, shuffled

_ALL_TRAITS = tuple(VALUES)


def captions(scene: Scene, rng: np.random.Generator, number: int = 5) -> list[str]:
    """Different true sentences about a scene; together the first ones describe as many objects in full as they can."""
    texts: dict[str, None] = {}
    single = math.ceil(0.5 * number)
    full = single + math.ceil(0.2 * number)
    queue: list[Item] = []
    for _ in range(200):
        if len(texts) >= number:
            break
        if len(texts) < full:
            if len(queue) <= len(scene.items):
                queue += shuffled(rng, scene.items)
            text = _describe_one(queue, rng) if len(texts) < single else _describe_several(scene, queue, rng)
        else:
            text = next(pick(rng, _SHORT_FORMS)(scene, rng), "")
        if text:
            texts[text] = None
    return list(texts)


def _describe_one(queue: list[Item], rng: np.random.Generator) -> str:
    """All four traits of the next object in the queue."""
    thing = _name_fully(queue.pop(0), rng)
    return thing if rng.random() < 0.7 else pick(rng, (f"there is {thing}", f"the picture has {thing}"))


def _describe_several(scene: Scene, queue: list[Item], rng: np.random.Generator) -> str:
    """A sentence that names all four traits of two or three objects, taken from the queue."""
    first = queue.pop(0)
    second = queue.pop(next(i for i, item in enumerate(queue) if item is not first))
    one, two = _name_fully(first, rng), _name_fully(second, rng)
    true = [asked for asked in RELATIONS if holds(asked, first, second, scene.margin)]
    if true and rng.random() < 0.7:
        where = relation_words(pick(rng, true), rng)
        return pick(
            rng,
            (
                f"{one} {where} {two}",
                f"there is {one} {where} {two}",
                f"{one} is {where} {two}",
                f"the picture shows {one} {where} {two}",
            ),
        )
    third = queue.pop(0)
    if third in (first, second) or first.fits(traits_of(second, _ALL_TRAITS)):
        return pick(rng, (f"{one} and {two}", f"there is {one} and {two}"))
    return pick(
        rng, (f"{one}, {two} and {_name_fully(third, rng)}", f"a picture of {one}, {two} and {_name_fully(third, rng)}")
    )


def _name_fully(item: Item, rng: np.random.Generator) -> str:
    """An object with all four traits: "a large red striped star"."""
    return indefinite(noun_phrase(traits_of(item, _ALL_TRAITS), rng))


def _say_counts(scene: Scene, rng: np.random.Generator) -> Iterator[str]:
    """How many objects have a trait."""
    names = shuffled(rng, _ALL_TRAITS)
    first, second = (
        {names[0]: pick(rng, scene.items).trait(names[0])},
        {names[1]: pick(rng, scene.items).trait(names[1])},
    )
    one, two = counted(scene.count(first), first, rng), counted(scene.count(second), second, rng)
    verb = "is" if scene.count(first) == 1 else "are"
    yield pick(
        rng,
        (f"{one} and {two}", f"there {verb} {one}", f"there {verb} exactly {one}", f"a picture with {one} and {two}"),
    )


def _say_total(scene: Scene, rng: np.random.Generator) -> Iterator[str]:
    """How many objects there are."""
    number = len(scene.items)
    traits = traits_of(pick(rng, scene.items), [pick(rng, _ALL_TRAITS)])
    yield pick(
        rng,
        (
            f"there are {counted(number, {}, rng)}",
            f"{counted(number, {}, rng)}, {counted(scene.count(traits), traits, rng)}",
        ),
    )


def _say_absence(scene: Scene, rng: np.random.Generator) -> Iterator[str]:
    """What the scene lacks."""
    names = shuffled(rng, _ALL_TRAITS)[: int(rng.integers(1, 3))]
    traits = {name: pick(rng, VALUES[name]) for name in VALUES if name in names}
    if not scene.count(traits):
        yield pick(
            rng, (f"there is no {noun_phrase(traits, rng)}", f"there are no {noun_phrase(traits, rng, many=True)}")
        )


def _say_sameness(scene: Scene, rng: np.random.Generator) -> Iterator[str]:
    """Whether two objects share a trait."""
    first, second = shuffled(rng, scene.items)[:2]
    name = pick(rng, _ALL_TRAITS)
    one, two = unique_traits(scene, first, rng, without=(name,)), unique_traits(scene, second, rng, without=(name,))
    if one is None or two is None:
        return
    equal = first.trait(name) == second.trait(name)
    how, link = ("the same", "as") if equal else ("a different", "than")
    yield f"the {noun_phrase(one, rng)} has {how} {name} {link} the {noun_phrase(two, rng)}"


def _say_predicate(scene: Scene, rng: np.random.Generator) -> Iterator[str]:
    """One trait of an object that the others identify."""
    item, name = pick(rng, scene.items), pick(rng, ("color", "size", "texture"))
    traits = unique_traits(scene, item, rng, without=(name,))
    if traits is not None:
        yield f"the {noun_phrase(traits, rng)} is {item.trait(name)}"


def _say_place(scene: Scene, rng: np.random.Generator) -> Iterator[str]:
    """Where one object is relative to another."""
    first, second = shuffled(rng, scene.items)[:2]
    asked = pick(rng, RELATIONS)
    one, two = unique_traits(scene, first, rng), unique_traits(scene, second, rng)
    if one is not None and two is not None and holds(asked, first, second, scene.margin):
        yield f"the {noun_phrase(one, rng)} is {relation_words(asked, rng)} the {noun_phrase(two, rng)}"


def _say_comparison(scene: Scene, rng: np.random.Generator) -> Iterator[str]:
    """Which of two traits is more frequent."""
    name = pick(rng, _ALL_TRAITS)
    a, b = shuffled(rng, VALUES[name])[:2]
    first, second = scene.count({name: a}), scene.count({name: b})
    if first > second > 0:
        yield f"there are more {noun_phrase({name: a}, rng, many=True)} than {noun_phrase({name: b}, rng, many=True)}"


def _say_uniform(scene: Scene, rng: np.random.Generator) -> Iterator[str]:
    """That all objects share a trait."""
    name = pick(rng, _ALL_TRAITS)
    values = {item.trait(name) for item in scene.items}
    if len(values) == 1:
        yield pick(rng, (f"all things have the same {name}", f"every object has the same {name}"))


_SHORT_FORMS: Sequence[Callable[[Scene, np.random.Generator], Iterator[str]]] = (
    _say_counts,
    _say_total,
    _say_absence,
    _say_sameness,
    _say_predicate,
    _say_place,
    _say_comparison,
    _say_uniform,
)
