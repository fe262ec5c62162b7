"""English for descriptions and relations. Every word is one piece of BERT's uncased vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product

import numpy as np

from visling.scenes.grammar import Tree, tree
from visling.scenes.world import VALUES, Item, Scene, Traits, pick, shuffled

NOUNS = ("thing", "object")
"""Words for an object whose shape is not named."""
PLURALS = {"cross": "crosses"}
"""Plurals that do not just add an s."""
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
"""Number words by value."""
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}


def plural(noun: str) -> str:
    """The plural of a noun."""
    return PLURALS.get(noun, noun + "s")


def noun_phrase(traits: Traits, rng: np.random.Generator, *, many: bool = False) -> str:
    """Adjectives and a noun, without an article: "large red star", "striped things"."""
    return " ".join(_choose_words(traits, rng, many))


def _choose_words(traits: Traits, rng: np.random.Generator, many: bool) -> list[str]:
    """The adjectives of a description, then its noun."""
    noun = traits.get("shape") or pick(rng, NOUNS)
    adjectives = [traits[name] for name in VALUES if name in traits and name != "shape"]
    return [*adjectives, plural(noun) if many else noun]


def noun_tree(traits: Traits, rng: np.random.Generator, *, many: bool = False) -> Tree:
    """The words of `noun_phrase`, with their grammar."""
    *adjectives, noun = _choose_words(traits, rng, many)
    return tree(" ".join([*(f"{word}:amod" for word in adjectives), f"{noun}*"]))


def indefinite(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return f"{_choose_article(phrase)} {phrase}"


def indefinite_tree(phrase: Tree) -> Tree:
    """The phrase with "a" or "an" before it."""
    return tree(f"{_choose_article(phrase.text)}:det {{}}*", phrase)


def _choose_article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"


def counted(number: int, traits: Traits, rng: np.random.Generator) -> str:
    """A number word and a noun phrase: "one red star", "three striped things"."""
    return f"{NUMBERS[number]} {noun_phrase(traits, rng, many=number != 1)}"


def counted_tree(number: int, traits: Traits, rng: np.random.Generator) -> Tree:
    """The words of `counted`, with their grammar."""
    relation = "nummod" if number else "det"  # "no" is a determiner
    return tree(f"{NUMBERS[number]}:{relation} {{}}*", noun_tree(traits, rng, many=number != 1))


def relation_words(relation: str, rng: np.random.Generator) -> str:
    """One way to say a relation."""
    return pick(rng, RELATION_WORDS[relation])


def place_tree(where: str, landmark: Tree) -> tuple[Tree, str]:
    """A place, such as "to the left of" a landmark, and the relation to a noun that it says the place of.

    Args:
        where: one of `RELATION_WORDS`.
    """
    *before, last = where.split()
    if last != "of":
        return tree(f"{last}:case {{}}*", landmark), "nmod"
    landmark = tree("of:case {}*", landmark)
    if len(before) == 1:
        return tree(f"{before[0]}/ADV* {{}}:obl", landmark), "advmod"
    return tree(f"to:case the:det {before[-1]}* {{}}:nmod", landmark), "nmod"


def holds(relation: str, first: Item, second: Item, margin: float) -> bool | None:
    """Whether the first object stands in a relation to the second; None where their centres are nearly level."""
    dx, dy = first.centre[0] - second.centre[0], first.centre[1] - second.centre[1]
    ahead = {"left": -dx, "right": dx, "above": -dy, "below": dy}[relation]
    return None if abs(ahead) < margin else ahead > 0


def traits_of(item: Item, names: Sequence[str]) -> dict[str, str]:
    """Values of the named traits, in the order of `VALUES`."""
    return {name: item.trait(name) for name in VALUES if name in names}


def unique_traits(
    scene: Scene, item: Item, rng: np.random.Generator, *, without: Sequence[str] = (), most: int = 3
) -> dict[str, str] | None:
    """A shortest description that fits this object alone; None if no description of at most `most` traits does.

    Args:
        without: traits the description may not use.
    """
    names = [name for name in VALUES if name not in without]
    for length in range(1, min(most, len(names)) + 1):
        for chosen in shuffled(rng, list(combinations(names, length))):
            traits = traits_of(item, chosen)
            if scene.count(traits) == 1:
                return traits
    return None


def every_traits(names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Every description by exactly the named traits."""
    for values in product(*(VALUES[name] for name in names)):
        yield dict(zip(names, values, strict=True))
