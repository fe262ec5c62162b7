"""True and false sentences about one scene, for binary judgement. Both labels are sought for every form and evened out
by `questions.Quotas`."""

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
from visling.scenes.questions import Candidate
from visling.scenes.world import VALUES, Scene, pick, shuffled

Maker = Callable[[Scene, np.random.Generator, bool], Iterator[tuple[str, str]]]


def statements(scene: Scene, rng: np.random.Generator) -> list[Candidate]:
    """Sentences about a scene with answer "true" or "false", both labels of every family where the scene allows; no two
    alike."""
    found: dict[str, Candidate] = {}
    for family, make in _FAMILIES.items():
        for truth in (True, False):
            for form, text in make(scene, rng, truth):
                answer = "true" if truth else "false"
                found.setdefault(
                    text, Candidate(family=family, form=f"{family} {form}", text=text, answer=answer, choices=2)
                )
    return list(found.values())


def _existence(scene: Scene, rng: np.random.Generator, truth: bool) -> Iterator[tuple[str, str]]:
    names = shuffled(rng, tuple(VALUES))[: int(rng.integers(1, 4))]
    traits = traits_of(pick(rng, scene.items), names)
    if not truth:
        traits = {name: pick(rng, scene.items).trait(name) for name in traits}
        if scene.count(traits):
            traits = {name: pick(rng, VALUES[name]) for name in traits}
    if (scene.count(traits) > 0) is truth:
        phrase = noun_phrase(traits, rng)
        yield " ".join(traits), pick(rng, (f"there is {indefinite(phrase)}.", f"the picture has {indefinite(phrase)}."))


def _number(scene: Scene, rng: np.random.Generator, truth: bool) -> Iterator[tuple[str, str]]:
    name = pick(rng, tuple(VALUES))
    traits = {name: pick(rng, scene.items).trait(name)}
    found = scene.count(traits)
    how = pick(rng, ("exactly", "at least", "at most"))
    said = int(rng.integers(1, 5))
    agrees = {"exactly": found == said, "at least": found >= said, "at most": found <= said}[how]
    if agrees is truth:
        verb = "is" if said == 1 else "are"
        yield f"{how} {said} {name}", f"there {verb} {how} {counted(said, traits, rng)}."


def _relation(scene: Scene, rng: np.random.Generator, truth: bool) -> Iterator[tuple[str, str]]:
    first, second = shuffled(rng, scene.items)[:2]
    one, two = unique_traits(scene, first, rng), unique_traits(scene, second, rng)
    asked = pick(rng, RELATIONS)
    found = holds(asked, first, second, scene.margin)
    if one is not None and two is not None and found is not None:
        asked = asked if found is truth else OPPOSITE[asked]
        yield asked, f"the {noun_phrase(one, rng)} is {relation_words(asked, rng)} the {noun_phrase(two, rng)}."


def _sameness(scene: Scene, rng: np.random.Generator, truth: bool) -> Iterator[tuple[str, str]]:
    first, second = shuffled(rng, scene.items)[:2]
    name = pick(rng, tuple(VALUES))
    one, two = unique_traits(scene, first, rng, without=(name,)), unique_traits(scene, second, rng, without=(name,))
    if one is not None and two is not None and (first.trait(name) == second.trait(name)) is truth:
        yield name, f"the {noun_phrase(one, rng)} and the {noun_phrase(two, rng)} have the same {name}."


def _every(scene: Scene, rng: np.random.Generator, truth: bool) -> Iterator[tuple[str, str]]:
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


def _none(scene: Scene, rng: np.random.Generator, truth: bool) -> Iterator[tuple[str, str]]:
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


def _comparison(scene: Scene, rng: np.random.Generator, truth: bool) -> Iterator[tuple[str, str]]:
    name = pick(rng, tuple(VALUES))
    a, b = shuffled(rng, VALUES[name])[:2]
    first, second = scene.count({name: a}), scene.count({name: b})
    if first and second and (first > second) is truth:
        yield (
            name,
            f"there are more {noun_phrase({name: a}, rng, many=True)} than {noun_phrase({name: b}, rng, many=True)}.",
        )


def _total(scene: Scene, rng: np.random.Generator, truth: bool) -> Iterator[tuple[str, str]]:
    number = len(scene.items)
    said = number if truth else number + pick(rng, (-2, -1, 1, 2))
    if 1 <= said < len(NUMBERS):
        yield str(said), f"there {'is' if said == 1 else 'are'} {counted(said, {}, rng)} in the picture."


_FAMILIES: Mapping[str, Maker] = {
    "existence": _existence,
    "number": _number,
    "relation": _relation,
    "same": _sameness,
    "every": _every,
    "none": _none,
    "compare": _comparison,
    "total": _total,
}
