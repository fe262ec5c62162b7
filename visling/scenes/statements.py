"""True and false sentences about one scene, for binary judgement. Every family looks for both labels, and
`quotas.Quotas` balances them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from visling.scenes.language import (
    NUMBERS,
    OPPOSITE,
    RELATIONS,
    counted,
    holds,
    indefinite,
    noun_phrase,
    relation_words,
    traits_of,
    unique_traits,
)
from visling.scenes.quotas import Candidate
from visling.scenes.world import VALUES, Scene, pick, shuffled

Maker = Callable[[Scene, np.random.Generator, bool], Iterator[tuple[str, str]]]


def statements(scene: Scene, rng: np.random.Generator) -> list[Candidate]:
    """Sentences about a scene with the answer "true" or "false": both for every family if the scene allows; no two
    alike."""
    by_text: dict[str, Candidate] = {}
    for family, make in _FAMILIES.items():
        for truth in (True, False):
            for form, text in make(scene, rng, truth):
                answer = "true" if truth else "false"
                by_text.setdefault(
                    text, Candidate(family=family, form=f"{family} {form}", text=text, answer=answer, choices=2)
                )
    return list(by_text.values())


def _say_existence(scene: Scene, rng: np.random.Generator, truth: bool) -> Iterator[tuple[str, str]]:
    """That there is an object of a description."""
    names = shuffled(rng, tuple(VALUES))[: int(rng.integers(1, 4))]
    traits = traits_of(pick(rng, scene.items), names)
    if not truth:
        traits = {name: pick(rng, scene.items).trait(name) for name in traits}
        if scene.count(traits):
            traits = {name: pick(rng, VALUES[name]) for name in traits}
    if (scene.count(traits) > 0) is truth:
        phrase = noun_phrase(traits, rng)
        yield " ".join(traits), pick(rng, (f"there is {indefinite(phrase)}.", f"the picture has {indefinite(phrase)}."))


def _say_number(scene: Scene, rng: np.random.Generator, truth: bool) -> Iterator[tuple[str, str]]:
    """How many objects have a trait."""
    name = pick(rng, tuple(VALUES))
    traits = {name: pick(rng, scene.items).trait(name)}
    count = scene.count(traits)
    how = pick(rng, ("exactly", "at least", "at most"))
    said = int(rng.integers(1, 5))
    agrees = {"exactly": count == said, "at least": count >= said, "at most": count <= said}[how]
    if agrees is truth:
        verb = "is" if said == 1 else "are"
        yield f"{how} {said} {name}", f"there {verb} {how} {counted(said, traits, rng)}."


def _say_relation(scene: Scene, rng: np.random.Generator, truth: bool) -> Iterator[tuple[str, str]]:
    """Where one object is relative to another."""
    first, second = shuffled(rng, scene.items)[:2]
    one, two = unique_traits(scene, first, rng), unique_traits(scene, second, rng)
    asked = pick(rng, RELATIONS)
    related = holds(asked, first, second, scene.margin)
    if one is not None and two is not None and related is not None:
        asked = asked if related is truth else OPPOSITE[asked]
        yield asked, f"the {noun_phrase(one, rng)} is {relation_words(asked, rng)} the {noun_phrase(two, rng)}."


def _say_sameness(scene: Scene, rng: np.random.Generator, truth: bool) -> Iterator[tuple[str, str]]:
    """That two objects share a trait."""
    first, second = shuffled(rng, scene.items)[:2]
    name = pick(rng, tuple(VALUES))
    one, two = unique_traits(scene, first, rng, without=(name,)), unique_traits(scene, second, rng, without=(name,))
    if one is not None and two is not None and (first.trait(name) == second.trait(name)) is truth:
        yield name, f"the {noun_phrase(one, rng)} and the {noun_phrase(two, rng)} have the same {name}."


def _say_every(scene: Scene, rng: np.random.Generator, truth: bool) -> Iterator[tuple[str, str]]:
    """That all objects with one trait have another."""
    name, held = pick(rng, ("color", "size", "texture")), pick(rng, ("shape", "color"))
    if name == held:
        return
    options = [
        (group, value)
        for group in VALUES[held]
        for value in VALUES[name]
        if (number := scene.count({held: group})) and (number == scene.count({held: group, name: value})) is truth
    ]
    if options:
        group, value = pick(rng, options)
        some = noun_phrase({held: group}, rng, many=True)
        yield (
            f"{name} {held}",
            pick(rng, (f"all {some} are {value}.", f"every {noun_phrase({held: group}, rng)} is {value}.")),
        )


def _say_none(scene: Scene, rng: np.random.Generator, truth: bool) -> Iterator[tuple[str, str]]:
    """That no object has two traits."""
    names = shuffled(rng, tuple(VALUES))[:2]
    traits = {name: pick(rng, scene.items).trait(name) for name in VALUES if name in names}
    if (scene.count(traits) == 0) is truth:
        yield (
            " ".join(traits),
            pick(
                rng,
                (
                    f"there is no {noun_phrase(traits, rng)}.",
                    f"the picture has no {noun_phrase(traits, rng, many=True)}.",
                ),
            ),
        )


def _say_comparison(scene: Scene, rng: np.random.Generator, truth: bool) -> Iterator[tuple[str, str]]:
    """That one trait is more frequent than another."""
    name = pick(rng, tuple(VALUES))
    a, b = shuffled(rng, VALUES[name])[:2]
    first, second = scene.count({name: a}), scene.count({name: b})
    if first and second and (first > second) is truth:
        yield (
            name,
            f"there are more {noun_phrase({name: a}, rng, many=True)} than {noun_phrase({name: b}, rng, many=True)}.",
        )


def _say_total(scene: Scene, rng: np.random.Generator, truth: bool) -> Iterator[tuple[str, str]]:
    """How many objects there are."""
    number = len(scene.items)
    said = number if truth else number + pick(rng, (-2, -1, 1, 2))
    if 1 <= said < len(NUMBERS):
        yield str(said), f"there {'is' if said == 1 else 'are'} {counted(said, {}, rng)} in the picture."


_FAMILIES: Mapping[str, Maker] = {
    "existence": _say_existence,
    "number": _say_number,
    "relation": _say_relation,
    "same": _say_sameness,
    "every": _say_every,
    "none": _say_none,
    "compare": _say_comparison,
    "total": _say_total,
}
