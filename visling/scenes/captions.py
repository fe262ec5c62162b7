"""Captions of a scene, with their grammar. Of five, three name every trait of one object and one those of several
objects; the last counts, relates, compares or denies.

Half of the captions describe one object because a model learns from these which word belongs to which region
(docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from visling.scenes.grammar import Tree, join_and, tree
from visling.scenes.language import (
    RELATIONS,
    counted_tree,
    holds,
    indefinite_tree,
    noun_tree,
    place_tree,
    relation_words,
    traits_of,
    unique_traits,
)
from visling.scenes.world import VALUES, Item, Scene, pick, shuffled

_ALL_TRAITS = tuple(VALUES)
_PICTURE = tree("the:det picture*")


def captions(scene: Scene, rng: np.random.Generator, number: int = 5) -> list[Tree]:
    """Different true sentences about a scene; together the first ones describe as many objects in full as they can."""
    found: dict[str, Tree] = {}
    single = math.ceil(0.5 * number)
    full = single + math.ceil(0.2 * number)
    queue: list[Item] = []
    for _ in range(200):
        if len(found) >= number:
            break
        sentence: Tree | None
        if len(found) < full:
            if len(queue) <= len(scene.items):
                queue += shuffled(rng, scene.items)
            sentence = _describe_one(queue, rng) if len(found) < single else _describe_several(scene, queue, rng)
        else:
            sentence = next(pick(rng, _SHORT_FORMS)(scene, rng), None)
        if sentence is not None:
            found.setdefault(sentence.text, sentence)
    return list(found.values())


def _there_is(thing: Tree, verb: str = "is") -> Tree:
    """That something exists."""
    return tree(f"there:expl {verb}/VERB* {{}}:nsubj", thing)


def _picture_has(thing: Tree, verb: str = "has") -> Tree:
    """That the picture has, or shows, something."""
    return tree(f"{{}}:nsubj {verb}/VERB* {{}}:obj", _PICTURE, thing)


def _picture_of(thing: Tree, preposition: str = "of") -> Tree:
    """A picture of, or with, something."""
    return tree("a:det picture* {}:nmod", tree(f"{preposition}:case {{}}*", thing))


def _describe_one(queue: list[Item], rng: np.random.Generator) -> Tree:
    """All four traits of the next object in the queue."""
    thing = _name_fully(queue.pop(0), rng)
    return thing if rng.random() < 0.7 else pick(rng, (_there_is(thing), _picture_has(thing)))


def _describe_several(scene: Scene, queue: list[Item], rng: np.random.Generator) -> Tree:
    """A sentence that names all four traits of two or three objects, taken from the queue."""
    first = queue.pop(0)
    second = queue.pop(next(i for i, item in enumerate(queue) if item is not first))
    one, two = _name_fully(first, rng), _name_fully(second, rng)
    true = [asked for asked in RELATIONS if holds(asked, first, second, scene.margin)]
    if true and rng.random() < 0.7:
        place, relation = place_tree(relation_words(pick(rng, true), rng), two)
        placed = tree(f"{{}}* {{}}:{relation}", one, place)
        return pick(
            rng, (placed, _there_is(placed), tree("{}:nsubj is:cop {}*", one, place), _picture_has(placed, "shows"))
        )
    third = queue.pop(0)
    if third in (first, second) or first.fits(traits_of(second, _ALL_TRAITS)):
        both = join_and([one, two])
        return pick(rng, (both, _there_is(both)))
    three = join_and([one, two, _name_fully(third, rng)])
    return pick(rng, (three, _picture_of(three)))


def _name_fully(item: Item, rng: np.random.Generator) -> Tree:
    """An object with all four traits: "a large red striped star"."""
    return indefinite_tree(noun_tree(traits_of(item, _ALL_TRAITS), rng))


def _say_counts(scene: Scene, rng: np.random.Generator) -> Iterator[Tree]:
    """How many objects have a trait."""
    names = shuffled(rng, _ALL_TRAITS)
    first, second = (
        {names[0]: pick(rng, scene.items).trait(names[0])},
        {names[1]: pick(rng, scene.items).trait(names[1])},
    )
    one, two = counted_tree(scene.count(first), first, rng), counted_tree(scene.count(second), second, rng)
    verb = "is" if scene.count(first) == 1 else "are"
    exactly = tree("exactly:advmod {}*", one)
    both = join_and([one, two])
    yield pick(rng, (both, _there_is(one, verb), _there_is(exactly, verb), _picture_of(both, "with")))


def _say_total(scene: Scene, rng: np.random.Generator) -> Iterator[Tree]:
    """How many objects there are."""
    number = len(scene.items)
    traits = traits_of(pick(rng, scene.items), [pick(rng, _ALL_TRAITS)])
    alone, total = counted_tree(number, {}, rng), counted_tree(number, {}, rng)
    part = tree("+,:punct {}*", counted_tree(scene.count(traits), traits, rng))
    yield pick(rng, (_there_is(alone, "are"), tree("{}* {}:list", total, part)))


def _say_absence(scene: Scene, rng: np.random.Generator) -> Iterator[Tree]:
    """What the scene lacks."""
    names = shuffled(rng, _ALL_TRAITS)[: int(rng.integers(1, 3))]
    traits = {name: pick(rng, VALUES[name]) for name in VALUES if name in names}
    if not scene.count(traits):
        one, many = (tree("no:det {}*", noun_tree(traits, rng, many=many)) for many in (False, True))
        yield pick(rng, (_there_is(one), _there_is(many, "are")))


def _say_sameness(scene: Scene, rng: np.random.Generator) -> Iterator[Tree]:
    """Whether two objects share a trait."""
    first, second = shuffled(rng, scene.items)[:2]
    name = pick(rng, _ALL_TRAITS)
    one, two = unique_traits(scene, first, rng, without=(name,)), unique_traits(scene, second, rng, without=(name,))
    if one is None or two is None:
        return
    equal = first.trait(name) == second.trait(name)
    how, link = ("the:det same:amod", "as") if equal else ("a:det different:amod", "than")
    subject = tree("the:det {}*", noun_tree(one, rng))
    other = tree(f"{link}:case the:det {{}}*", noun_tree(two, rng))
    yield tree("{}:nsubj has/VERB* {}:obj {}:obl", subject, tree(f"{how} {name}*"), other)


def _say_predicate(scene: Scene, rng: np.random.Generator) -> Iterator[Tree]:
    """One trait of an object that the others identify."""
    item, name = pick(rng, scene.items), pick(rng, ("color", "size", "texture"))
    traits = unique_traits(scene, item, rng, without=(name,))
    if traits is not None:
        yield tree(f"{{}}:nsubj is:cop {item.trait(name)}/ADJ*", tree("the:det {}*", noun_tree(traits, rng)))


def _say_place(scene: Scene, rng: np.random.Generator) -> Iterator[Tree]:
    """Where one object is relative to another."""
    first, second = shuffled(rng, scene.items)[:2]
    asked = pick(rng, RELATIONS)
    one, two = unique_traits(scene, first, rng), unique_traits(scene, second, rng)
    if one is not None and two is not None and holds(asked, first, second, scene.margin):
        subject = tree("the:det {}*", noun_tree(one, rng))
        where = relation_words(asked, rng)
        place, _ = place_tree(where, tree("the:det {}*", noun_tree(two, rng)))
        yield tree("{}:nsubj is:cop {}*", subject, place)


def _say_comparison(scene: Scene, rng: np.random.Generator) -> Iterator[Tree]:
    """Which of two traits is more frequent."""
    name = pick(rng, _ALL_TRAITS)
    a, b = shuffled(rng, VALUES[name])[:2]
    first, second = scene.count({name: a}), scene.count({name: b})
    if first > second > 0:
        more = tree("more:amod {}*", noun_tree({name: a}, rng, many=True))
        fewer = tree("than:case {}*", noun_tree({name: b}, rng, many=True))
        yield tree("there:expl are/VERB* {}:nsubj {}:obl", more, fewer)


def _say_uniform(scene: Scene, rng: np.random.Generator) -> Iterator[Tree]:
    """That all objects share a trait."""
    name = pick(rng, _ALL_TRAITS)
    values = {item.trait(name) for item in scene.items}
    if len(values) == 1:
        same = tree(f"the:det same:amod {name}*")
        yield pick(
            rng,
            (
                tree("{}:nsubj have/VERB* {}:obj", tree("all:det things*"), same),
                tree("{}:nsubj has/VERB* {}:obj", tree("every:det object*"), same),
            ),
        )


_SHORT_FORMS: Sequence[Callable[[Scene, np.random.Generator], Iterator[Tree]]] = (
    _say_counts,
    _say_total,
    _say_absence,
    _say_sameness,
    _say_predicate,
    _say_place,
    _say_comparison,
    _say_uniform,
)
