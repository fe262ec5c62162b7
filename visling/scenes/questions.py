"""Questions about a scene with their answers.

Every family looks for each of its answers separately, with descriptions drawn in the same way, and `quotas.Quotas`
balances the rest, so that the words of a question say little about its answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from visling.scenes.language import (
    OPPOSITE,
    RELATIONS,
    every_traits,
    holds,
    indefinite,
    noun_phrase,
    relation_words,
    traits_of,
    unique_traits,
)
from visling.scenes.quotas import Candidate
from visling.scenes.world import VALUES, Item, Scene, Traits, pick, shuffled

Maker = Callable[[Scene, np.random.Generator], Iterator[Candidate]]

_SINGLE = (("color",), ("shape",), ("size",), ("texture",))
_PAIRS = (
    ("size", "color"),
    ("size", "shape"),
    ("color", "texture"),
    ("color", "shape"),
    ("texture", "shape"),
    ("size", "texture"),
)
_TRIPLES = (("size", "color", "shape"), ("color", "texture", "shape"), ("size", "texture", "shape"))


def yes(truth: bool) -> str:
    """The answer word of a truth value."""
    return "yes" if truth else "no"


def answer_type(answer: str) -> str:
    """VQA v2's coarse type of an answer."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"


def existence(scene: Scene, rng: np.random.Generator) -> Iterator[Candidate]:
    """Is there an object of a description?"""
    for names in (pick(rng, _SINGLE), pick(rng, _PAIRS), pick(rng, _TRIPLES)):
        for truth in (True, False):
            traits = traits_of(pick(rng, scene.items), names) if truth else _find_absent(scene, names, rng)
            if traits is not None:
                phrase = noun_phrase(traits, rng)
                text = pick(
                    rng,
                    (
                        f"is there {indefinite(phrase)}?",
                        f"can you see {indefinite(phrase)}?",
                        f"does the picture show {indefinite(phrase)}?",
                        f"are there any {noun_phrase(traits, rng, many=True)}?",
                    ),
                )
                yield _make_candidate("existence", names, text, yes(truth), 2)


def count(scene: Scene, rng: np.random.Generator) -> Iterator[Candidate]:
    """How many objects fit a description?"""
    everything = _ask_how_many({}, rng)
    yield _make_candidate("count", ("all",), everything, str(len(scene.items)), 8)
    for names in (*shuffled(rng, _SINGLE)[:2], pick(rng, _PAIRS)):
        by_count: dict[int, list[Traits]] = {}
        for traits in every_traits(names):
            by_count.setdefault(scene.count(traits), []).append(traits)
        for number, options in by_count.items():
            yield _make_candidate(
                "count", names, _ask_how_many(pick(rng, options), rng), str(number), 5 if len(names) == 1 else 4
            )


def color(scene: Scene, rng: np.random.Generator) -> Iterator[Candidate]:
    """What colour is the object of a unique description?"""
    return _ask_trait("color", scene, rng)


def shape(scene: Scene, rng: np.random.Generator) -> Iterator[Candidate]:
    """What shape is the object of a unique description?"""
    return _ask_trait("shape", scene, rng)


def size(scene: Scene, rng: np.random.Generator) -> Iterator[Candidate]:
    """What size is the object of a unique description?"""
    return _ask_trait("size", scene, rng)


def texture(scene: Scene, rng: np.random.Generator) -> Iterator[Candidate]:
    """What texture does the object of a unique description have?"""
    return _ask_trait("texture", scene, rng)


def verify(scene: Scene, rng: np.random.Generator) -> Iterator[Candidate]:
    """Does the object of a unique description have this trait?"""
    for truth in (True, False):
        for name in shuffled(rng, ("color", "size", "texture"))[:2]:
            item = pick(rng, scene.items)
            traits = unique_traits(scene, item, rng, without=(name,))
            if traits is None:
                continue
            value = item.trait(name) if truth else _pick_other_value(scene, name, item.trait(name), rng)
            subject = noun_phrase(traits, rng)
            text = pick(
                rng,
                (
                    f"is the {subject} {value}?",
                    f"does the {subject} look {value}?",
                    f"is {value} the {name} of the {subject}?",
                ),
            )
            yield _make_candidate("verify", (name,), text, yes(truth), 2)


def relation(scene: Scene, rng: np.random.Generator) -> Iterator[Candidate]:
    """Does this relation hold between two objects?"""
    for truth in (True, False):
        for _ in range(2):
            first, second = shuffled(rng, scene.items)[:2]
            named, named_second = unique_traits(scene, first, rng), unique_traits(scene, second, rng)
            asked = pick(rng, RELATIONS)
            related = holds(asked, first, second, scene.margin)
            if named is None or named_second is None or related is None:
                continue
            asked = asked if related is truth else OPPOSITE[asked]
            where, one, two = relation_words(asked, rng), noun_phrase(named, rng), noun_phrase(named_second, rng)
            text = pick(
                rng,
                (
                    f"is the {one} {where} the {two}?",
                    f"can you see the {one} {where} the {two}?",
                    f"does the {one} stand {where} the {two}?",
                ),
            )
            yield _make_candidate("relation", (asked,), text, yes(truth), 2)
    yield from _ask_relation_existence(scene, rng)


def relation_query(scene: Scene, rng: np.random.Generator) -> Iterator[Candidate]:
    """Which trait does the only object on one side of another have?"""
    for item in shuffled(rng, scene.items)[:4]:
        anchor = unique_traits(scene, item, rng, most=2)
        asked = pick(rng, RELATIONS)
        if anchor is None:
            continue
        others = [other for other in scene.items if other is not item]
        if any(holds(asked, other, item, scene.margin) is None for other in others):
            continue
        related = [other for other in others if holds(asked, other, item, scene.margin)]
        for names in shuffled(rng, ((), *_SINGLE)):
            only = [other for other in related if sum(o.fits(traits_of(other, names)) for o in related) == 1]
            free = [name for name in VALUES if name not in names]
            if not only:
                continue
            target, name = pick(rng, only), pick(rng, free)
            subject = noun_phrase(traits_of(target, names), rng)
            where, landmark = relation_words(asked, rng), noun_phrase(anchor, rng)
            text = pick(
                rng,
                (
                    f"what {name} is the {subject} {where} the {landmark}?",
                    f"what is the {name} of the {subject} {where} the {landmark}?",
                ),
            )
            yield _make_candidate("relation query", (name,), text, target.trait(name), len(VALUES[name]))
            break


def nearest(scene: Scene, rng: np.random.Generator) -> Iterator[Candidate]:
    """Which trait does the object closest to another have?"""
    for item in shuffled(rng, scene.items)[:3]:
        anchor = unique_traits(scene, item, rng, most=2)
        others = sorted((_measure_distance(item, other), i) for i, other in enumerate(scene.items) if other is not item)
        if anchor is None or (len(others) > 1 and others[1][0] < others[0][0] + scene.margin):
            continue
        target, name = scene.items[others[0][1]], pick(rng, tuple(VALUES))
        landmark = noun_phrase(anchor, rng)
        text = pick(
            rng,
            (
                f"what {name} is the thing closest to the {landmark}?",
                f"what is the {name} of the object nearest to the {landmark}?",
            ),
        )
        yield _make_candidate("nearest", (name,), text, target.trait(name), len(VALUES[name]))


def compare(scene: Scene, rng: np.random.Generator) -> Iterator[Candidate]:
    """Are there more, fewer or as many objects of one description than of another?"""
    for names in shuffled(rng, _SINGLE)[:2]:
        seen = list({item.trait(names[0]) for item in scene.items})
        values = [value for value in VALUES[names[0]] if value in seen]
        if len(values) < 2:
            continue
        pairs = [(a, b) for a in values for b in values if a != b]
        for wording in ("more", "fewer", "same"):
            for truth in (True, False):
                fitting = [
                    (a, b)
                    for a, b in pairs
                    if _holds_comparison(wording, scene.count({names[0]: a}), scene.count({names[0]: b})) is truth
                ]
                if not fitting:
                    continue
                a, b = pick(rng, fitting)
                one, two = noun_phrase({names[0]: a}, rng, many=True), noun_phrase({names[0]: b}, rng, many=True)
                if wording == "same":
                    text = pick(
                        rng, (f"are there as many {one} as {two}?", f"is the number of {one} and {two} the same?")
                    )
                else:
                    text = pick(
                        rng, (f"are there {wording} {one} than {two}?", f"can you see {wording} {one} than {two}?")
                    )
                yield _make_candidate("compare", (wording, names[0]), text, yes(truth), 2)


def same(scene: Scene, rng: np.random.Generator) -> Iterator[Candidate]:
    """Do two objects share a trait? Does any other object share the trait of one?"""
    for truth in (True, False):
        for name in shuffled(rng, tuple(VALUES))[:3]:
            first, second = shuffled(rng, scene.items)[:2]
            one, two = (
                unique_traits(scene, first, rng, without=(name,)),
                unique_traits(scene, second, rng, without=(name,)),
            )
            if one is not None and two is not None and (first.trait(name) == second.trait(name)) is truth:
                a, b = noun_phrase(one, rng), noun_phrase(two, rng)
                text = pick(
                    rng,
                    (
                        f"do the {a} and the {b} have the same {name}?",
                        f"is the {a} of the same {name} as the {b}?",
                        f"are the {a} and the {b} equal in {name}?",
                    ),
                )
                yield _make_candidate("same", (name, "pair"), text, yes(truth), 2)
        name = pick(rng, tuple(VALUES))
        item = pick(rng, scene.items)
        traits = unique_traits(scene, item, rng, without=(name,))
        if traits is not None and (scene.count({name: item.trait(name)}) > 1) is truth:
            subject = noun_phrase(traits, rng)
            text = pick(
                rng,
                (
                    f"is there another thing of the same {name} as the {subject}?",
                    f"does anything else have the {name} of the {subject}?",
                ),
            )
            yield _make_candidate("same", (name, "another"), text, yes(truth), 2)


def odd(scene: Scene, rng: np.random.Generator) -> Iterator[Candidate]:
    """Which value stands alone?"""
    for name in shuffled(rng, tuple(VALUES)):
        counts = Counter(item.trait(name) for item in scene.items)
        single = [value for value, number in counts.items() if number == 1]
        if len(single) != 1 or len(counts) < 2:
            continue
        yield _make_candidate(
            "odd",
            (name, "once"),
            pick(rng, (f"which {name} occurs only once?", f"what {name} can you see only once?")),
            single[0],
            len(VALUES[name]),
        )
        if len(counts) == 2 and len(scene.items) > 2:
            text = pick(
                rng,
                (
                    f"one thing has another {name} than all the others. which {name}?",
                    f"what {name} has the odd one out?",
                ),
            )
            yield _make_candidate("odd", (name, "odd"), text, single[0], len(VALUES[name]))
            odd_one = next(item for item in scene.items if item.trait(name) == single[0])
            asked = pick(rng, [other for other in VALUES if other != name])
            text = pick(
                rng,
                (
                    f"what {asked} has the thing with the odd {name}?",
                    f"what is the {asked} of the thing of the odd {name}?",
                ),
            )
            yield _make_candidate("odd", (name, asked), text, odd_one.trait(asked), len(VALUES[asked]))


def negation(scene: Scene, rng: np.random.Generator) -> Iterator[Candidate]:
    """What is absent, or does not have a trait?"""
    for truth in (True, False):
        names = pick(rng, (*_SINGLE, *_PAIRS))
        traits = traits_of(pick(rng, scene.items), names) if not truth else _find_absent(scene, names, rng)
        if traits is not None:
            phrase = noun_phrase(traits, rng, many=True)
            yield _make_candidate(
                "negation",
                ("absent", *names),
                pick(rng, (f"are there no {phrase}?", f"is the picture without {phrase}?")),
                yes(truth),
                2,
            )
        name = pick(rng, ("color", "size", "texture"))
        options = [
            (form, value)
            for form in VALUES["shape"]
            for value in VALUES[name]
            if (number := scene.count({"shape": form}))
            and (number > scene.count({"shape": form, name: value})) is truth
        ]
        if options:
            form, value = pick(rng, options)
            yield _make_candidate(
                "negation",
                ("other", name),
                pick(rng, (f"is there a {form} that is not {value}?", f"can you see a {form} that is not {value}?")),
                yes(truth),
                2,
            )
    name = pick(rng, ("color", "size", "texture"))
    for value in shuffled(rng, VALUES[name])[:3]:
        number = len(scene.items) - scene.count({name: value})
        text = pick(rng, (f"how many things are not {value}?", f"how many objects here are not {value}?"))
        yield _make_candidate("negation", ("number", name), text, str(number), 8)


FAMILIES: Mapping[str, Maker] = {
    "existence": existence,
    "count": count,
    "color": color,
    "shape": shape,
    "size": size,
    "texture": texture,
    "verify": verify,
    "relation": relation,
    "relation query": relation_query,
    "nearest": nearest,
    "compare": compare,
    "same": same,
    "odd": odd,
    "negation": negation,
}
"""Question type -> the function that makes its candidates."""


def candidates(scene: Scene, rng: np.random.Generator) -> list[Candidate]:
    """Questions that could be asked of a scene, several of every family, each with its answer; no two alike."""
    by_text: dict[str, Candidate] = {}
    for make in FAMILIES.values():
        for candidate in make(scene, rng):
            by_text.setdefault(candidate.text, candidate)
    return list(by_text.values())


def _make_candidate(family: str, form: Sequence[str], text: str, answer: str, choices: int) -> Candidate:
    """A candidate whose form is its family and what is asked about."""
    return Candidate(family=family, form=" ".join((family, *form)), text=text, answer=answer, choices=choices)


def _ask_how_many(traits: Traits, rng: np.random.Generator) -> str:
    """A question for a number."""
    phrase = noun_phrase(traits, rng, many=True)
    return pick(
        rng, (f"how many {phrase} are there?", f"how many {phrase} can you see?", f"what is the number of {phrase}?")
    )


def _ask_trait(name: str, scene: Scene, rng: np.random.Generator) -> Iterator[Candidate]:
    """Questions for one trait of objects with a unique description."""
    for item in shuffled(rng, scene.items)[:4]:
        traits = unique_traits(scene, item, rng, without=(name,))
        if traits is not None:
            subject = noun_phrase(traits, rng)
            text = pick(
                rng,
                (
                    f"what {name} is the {subject}?",
                    f"what is the {name} of the {subject}?",
                    f"which {name} does the {subject} have?",
                ),
            )
            yield _make_candidate(name, (), text, item.trait(name), len(VALUES[name]))


def _find_absent(scene: Scene, names: Sequence[str], rng: np.random.Generator) -> dict[str, str] | None:
    """A description that no object fits, mixed from values that occur where possible; None if there is none."""
    for _ in range(8):
        traits = {name: pick(rng, scene.items).trait(name) for name in names}
        if not scene.count(traits):
            return traits
    free = [traits for traits in every_traits(names) if not scene.count(traits)]
    return pick(rng, free) if free else None


def _pick_other_value(scene: Scene, name: str, value: str, rng: np.random.Generator) -> str:
    """Another value of a trait, one that occurs where possible."""
    present = [other for other in VALUES[name] if other != value and scene.count({name: other})]
    return pick(rng, present or [other for other in VALUES[name] if other != value])


def _ask_relation_existence(scene: Scene, rng: np.random.Generator) -> Iterator[Candidate]:
    """Is there an object of a description on one side of another?"""
    for truth in (True, False):
        item, asked, names = pick(rng, scene.items), pick(rng, RELATIONS), pick(rng, (*_SINGLE, ("color", "shape")))
        anchor = unique_traits(scene, item, rng, most=2)
        others = [other for other in scene.items if other is not item]
        if anchor is None:
            continue
        traits = traits_of(pick(rng, others), names)
        sides = {holds(asked, other, item, scene.margin) for other in others if other.fits(traits)}
        if None in sides or (True in sides) is not truth:
            continue
        where, thing, landmark = relation_words(asked, rng), noun_phrase(traits, rng), noun_phrase(anchor, rng)
        text = pick(
            rng,
            (
                f"is there {indefinite(thing)} {where} the {landmark}?",
                f"can you see {indefinite(thing)} {where} the {landmark}?",
            ),
        )
        yield _make_candidate("relation", ("existence", asked), text, yes(truth), 2)


def _holds_comparison(wording: str, first: int, second: int) -> bool:
    """Whether two numbers compare as the wording says."""
    return first > second if wording == "more" else first < second if wording == "fewer" else first == second


def _measure_distance(first: Item, second: Item) -> float:
    """Pixels between the centres of two objects."""
    (ax, ay), (bx, by) = first.centre, second.centre
    return float(np.hypot(ax - bx, ay - by))
