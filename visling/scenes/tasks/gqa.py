"""GQA's questions about drawn scenes: question, choices and scene-graph files in the official fields, in `gqa/`.

Questions are made in bundles about the same objects, whose answers follow from one another: who can name the colour of
an object can verify it, choose it, and say that such an object exists. Balanced questions are chosen so that words
alone say little about an answer; what they entail is added to the file of all questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from visling.scenes.files import stem, write_json
from visling.scenes.language import (
    OPPOSITE,
    RELATIONS,
    holds,
    indefinite,
    noun_phrase,
    relation_words,
    traits_of,
    unique_traits,
)
from visling.scenes.questions import yes
from visling.scenes.quotas import Candidate, Quotas
from visling.scenes.settings import ScenesConfig
from visling.scenes.world import VALUES, Item, Scene, Traits, pick, shuffled

_NAMED = ("color", "shape")
"""Traits of the objects whose existence a logical question asks about."""
_ROOM = 1000
"""For the questions of a scene in its ids."""
_YES_NO = ("yes", "no")

_Steps = Sequence[tuple[str, str]]
"""Operations and their arguments, each needing the one before it."""


@dataclass(frozen=True, kw_only=True)
class _Question:
    """One question with what the official files say of it."""

    text: str
    answer: str
    full: str
    """The answer as a sentence."""
    types: tuple[str, str, str]
    """Structural, semantic and detailed."""
    asked: str
    """Trait or relation in question; answers are balanced for each."""
    allowed: tuple[str, ...]
    """Valid answers."""
    program: tuple[dict[str, Any], ...]
    named: Mapping[str, int]
    """Phrase of the question -> place of its object in the scene."""
    entails: tuple[str, ...] = ()
    """Other questions of the scene, by their text."""
    one_sided: bool = False
    """Its answer is known from its pattern, so that it is asked only where another question entails it."""


def _find(scene: Scene, traits: Traits, item: Item | None) -> list[tuple[str, str]]:
    """Operations that select an object by its traits; None = there is no such object."""
    name = "-" if item is None else str(_object_id(scene, scene.items.index(item)))
    filters = [(f"filter {trait}", value) for trait, value in traits.items() if trait != "shape"]
    return [("select", f"{traits.get('shape', 'thing')} ({name})"), *filters]


def _program(*chains: _Steps, last: tuple[str, str]) -> tuple[dict[str, Any], ...]:
    """The operations of the chains, and one that needs the ends of all."""
    steps: list[dict[str, Any]] = []
    ends = []
    for chain in chains:
        for place, (operation, argument) in enumerate(chain):
            needs = [len(steps) - 1] if place else []
            steps.append({"operation": operation, "dependencies": needs, "argument": argument})
        ends.append(len(steps) - 1)
    return (*steps, {"operation": last[0], "dependencies": ends, "argument": last[1]})


def _as_chain(program: Sequence[Mapping[str, Any]]) -> _Steps:
    """The operations of a program that is one chain."""
    return [(step["operation"], step["argument"]) for step in program]


def _object_id(scene: Scene, place: int) -> int:
    """As in the instances file."""
    return scene.image_id * 100 + place


def _about_traits(scene: Scene, rng: np.random.Generator) -> Iterator[_Question]:
    """What is a trait of an object, is it this one, is it this or that one, is there such an object?"""
    for item in shuffled(rng, scene.items)[:4]:
        name = pick(rng, tuple(VALUES))
        traits = unique_traits(scene, item, rng, without=(name,))
        if traits is None:
            continue
        subject, value = noun_phrase(traits, rng), item.trait(name)
        wrong = _pick_other(scene, name, value, rng)
        said, said_wrong = (indefinite(one) if name == "shape" else one for one in (value, wrong))
        first, second = shuffled(rng, (said, said_wrong))
        found, is_so = _find(scene, traits, item), f"the {subject} is {said}."
        semantic = "cat" if name == "shape" else "attr"
        exists = replace(
            _ask_existence(scene, traits_of(item, (*traits, name)), item, rng),
            types=("verify", "obj", "existAttr"),
            one_sided=True,
        )
        query = pick(rng, (f"what {name} is the {subject}?", f"what is the {name} of the {subject}?"))
        verified, denied = f"is the {subject} {said}?", f"is the {subject} {said_wrong}?"
        chosen = f"is the {subject} {first} or {second}?"
        about = partial(_Question, asked=name, named={subject: scene.items.index(item)})
        verify, choice = ("verify", semantic, "verifyAttr"), (value, wrong)
        yield about(
            text=query, answer=value, full=is_so, allowed=VALUES[name], program=_program(found, last=("query", name)),
            types=("query", semantic, "categoryThis" if name == "shape" else "directOf"),
            entails=(verified, denied, chosen, exists.text),
        )  # fmt: skip
        yield about(
            text=verified, answer="yes", full=f"yes, {is_so}", types=verify, allowed=_YES_NO,
            program=_program(found, last=(f"verify {name}", value)), entails=(chosen, exists.text),
        )  # fmt: skip
        yield about(
            text=denied, answer="no", full=f"no, {is_so}", types=verify, allowed=_YES_NO,
            program=_program(found, last=(f"verify {name}", wrong)),
        )  # fmt: skip
        yield about(
            text=chosen, answer=value, full=is_so, types=("choose", semantic, "chooseAttr"), allowed=choice,
            program=_program(found, last=(f"choose {name}", "|".join(choice))),
            entails=(verified, denied, exists.text),
        )  # fmt: skip
        yield exists


def _about_relations(scene: Scene, rng: np.random.Generator) -> Iterator[_Question]:
    """On which side of an object is another one, and which trait has the only one on a side?"""
    for _ in range(3):
        first, second = shuffled(rng, scene.items)[:2]
        side = pick(rng, RELATIONS)
        related = holds(side, first, second, scene.margin)
        named, named_second = unique_traits(scene, first, rng), unique_traits(scene, second, rng)
        if related is None or named is None or named_second is None:
            continue
        side = side if related else OPPOSITE[side]
        other = OPPOSITE[side]
        one, two = noun_phrase(named, rng), noun_phrase(named_second, rng)
        where, where_not = (relation_words(word, rng) for word in (side, other))
        sides = shuffled(rng, ("left", "right") if side in ("left", "right") else ("above", "below"))
        tail = " of" if "left" in sides else ""
        verified, denied = f"is the {one} {where} the {two}?", f"is the {one} {where_not} the {two}?"
        converse = f"is the {two} {relation_words(other, rng)} the {one}?"
        chosen = f"is the {one} {sides[0]} or {sides[1]}{tail} the {two}?"
        is_so = f"the {one} is {where} the {two}."
        chains = (_find(scene, named, first), _find(scene, named_second, second))
        places = {one: scene.items.index(first), two: scene.items.index(second)}
        for text, answer, asked, ends, entails in (
            (verified, "yes", side, chains, (converse, denied, chosen)),
            (denied, "no", other, chains, ()),
            (converse, "yes", other, chains[::-1], (verified, chosen)),
        ):
            yield _Question(
                text=text, answer=answer, full=f"{answer}, {is_so}", types=("verify", "rel", "relVerify"), asked=asked,
                allowed=_YES_NO, program=_program(*ends, last=("verify rel", asked)), named=places, entails=entails,
            )  # fmt: skip
        yield _Question(
            text=chosen, answer=side, full=is_so, types=("choose", "rel", "relChooser"), asked=" ".join(sorted(sides)),
            allowed=(side, other), program=_program(*chains, last=("choose rel", "|".join(sides))), named=places,
            entails=(verified, denied, converse),
        )  # fmt: skip
        beside = [holds(side, item, second, scene.margin) for item in scene.items if item is not second]
        if None not in beside and sum(map(bool, beside)) == 1:
            name = pick(rng, tuple(VALUES))
            yield _Question(
                text=f"what {name} is the thing {where} the {two}?", answer=first.trait(name),
                full=f"the {name} is {first.trait(name)}.", types=("query", "rel", "relS"), asked=name,
                allowed=VALUES[name], named={two: scene.items.index(second)}, entails=(verified, converse),
                program=_program([*chains[1], ("relate", f"_,{where},s")], last=("query", name)),
            )  # fmt: skip


def _about_existence(scene: Scene, rng: np.random.Generator) -> Iterator[_Question]:
    """Are there two kinds of objects, or one of the two?"""
    there = list({tuple(traits_of(item, _NAMED).values()): item for item in shuffled(rng, scene.items)}.values())[:2]
    absent = _find_absent(scene, rng)
    if len(there) < 2 or len(absent) < 2:
        return
    some = [_ask_existence(scene, traits_of(item, _NAMED), item, rng) for item in there]
    none = [_ask_existence(scene, traits, None, rng) for traits in absent]
    yield from (*some, *none)
    for word, pairs in (
        ("and", ((some[0], some[1]), (some[0], none[0]), (none[1], some[1]))),
        ("or", ((none[0], none[1]), (some[1], none[1]), (none[0], some[0]))),
    ):
        for pair in pairs:
            one, two = (question.text.removeprefix("is there ").removesuffix("?") for question in pair)
            known = [question.answer for question in pair]
            truth = known.count("yes") == 2 if word == "and" else "yes" in known
            settled = known in (["yes", "yes"], ["no", "no"])  # the answer says which of the two are there
            yield _Question(
                text=f"is there {one} {word} {two}?", answer=yes(truth),
                types=("logical", "obj", f"exist{word.title()}"),
                full=f"{yes(truth)}, there is {'' if truth else 'not '}{one} {word} {two}.", asked="exist",
                allowed=_YES_NO, named={**pair[0].named, **pair[1].named},
                program=_program(*(_as_chain(question.program) for question in pair), last=(word, "")),
                entails=tuple(question.text for question in pair) if settled else (),
            )  # fmt: skip


def _ask_existence(scene: Scene, traits: Traits, item: Item | None, rng: np.random.Generator) -> _Question:
    """Is there an object of a description?"""
    phrase = noun_phrase(traits, rng)
    some = indefinite(phrase)
    return _Question(
        text=f"is there {some}?", answer=yes(item is not None), types=("verify", "obj", "exist"),
        asked=" ".join(traits),
        full=f"no, there is no {phrase}." if item is None else f"yes, there is {some}.", allowed=_YES_NO,
        program=_program(_find(scene, traits, item), last=("exist", "?")),
        named={} if item is None else {phrase: scene.items.index(item)},
    )  # fmt: skip


def _about_pairs(scene: Scene, rng: np.random.Generator) -> Iterator[_Question]:
    """Do two objects share a trait?"""
    for name in shuffled(rng, tuple(VALUES)):
        for truth in (True, False):
            first, second = shuffled(rng, scene.items)[:2]
            if (first.trait(name) == second.trait(name)) is not truth:
                continue
            named, named_second = (unique_traits(scene, one, rng, without=(name,)) for one in (first, second))
            if named is None or named_second is None:
                continue
            one, two = noun_phrase(named, rng), noun_phrase(named_second, rng)
            places = {one: scene.items.index(first), two: scene.items.index(second)}
            chains = (_find(scene, named, first), _find(scene, named_second, second))
            same = f"do the {one} and the {two} have the same {name}?"
            differ = f"is the {name} of the {one} different from that of the {two}?"
            is_so = f"the {one} and the {two} {'have' if truth else 'do not have'} the same {name}."
            for text, answer, word, other in (
                (same, yes(truth), "same", differ), (differ, yes(not truth), "different", same),
            ):  # fmt: skip
                yield _Question(
                    text=text, answer=answer, full=f"{answer}, {is_so}", asked=name, allowed=_YES_NO, named=places,
                    types=("compare", "attr", f"two{word.title()}"), entails=(other,),
                    program=_program(*chains, last=(f"{word} {name}", "")),
                )  # fmt: skip


def _pick_other(scene: Scene, name: str, value: str, rng: np.random.Generator) -> str:
    """Another value of a trait, one that occurs where possible."""
    others = [other for other in VALUES[name] if other != value]
    return pick(rng, [other for other in others if scene.count({name: other})] or others)


def _find_absent(scene: Scene, rng: np.random.Generator) -> list[dict[str, str]]:
    """At most two descriptions that no object fits, of a colour and a shape that occur."""
    found: list[dict[str, str]] = []
    for _ in range(8):
        traits = {name: pick(rng, scene.items).trait(name) for name in _NAMED}
        if not scene.count(traits) and traits not in found:
            found.append(traits)
    return found[:2]


def _describe_graph(scene: Scene) -> dict[str, Any]:
    """The scene graph: boxes, attributes and sides."""
    objects = {}
    for place, item in enumerate(scene.items):
        x1, y1, x2, y2 = item.box
        objects[str(_object_id(scene, place))] = {
            "name": item.shape,
            "x": x1,
            "y": y1,
            "w": x2 - x1,
            "h": y2 - y1,
            "attributes": [item.size, item.color, item.texture],
            "relations": [
                {
                    "name": f"to the {side} of" if side in ("left", "right") else side,
                    "object": str(_object_id(scene, k)),
                }
                for k, other in enumerate(scene.items)
                if other is not item
                for side in RELATIONS
                if holds(side, item, other, scene.margin)
            ],
        }
    return {"width": scene.size, "height": scene.size, "objects": objects}


class GqaWriter:
    """GQA's files of a split."""

    name: ClassVar[str] = "gqa"
    purpose: ClassVar[int] = 20

    def __init__(self, split: str, config: ScenesConfig) -> None:
        self.split, self.config = split, config
        self.quotas = Quotas()
        self.questions: dict[str, dict[str, Any]] = {}
        self.choices: dict[str, dict[str, Any]] = {}
        self.graphs: dict[str, dict[str, Any]] = {}

    @staticmethod
    def describe(scene: Scene, rng: np.random.Generator) -> tuple[list[_Question], dict[str, Any]]:
        """Questions that could be asked, no two alike, and the scene graph."""
        by_text: dict[str, _Question] = {}
        for make in (_about_existence, _about_traits, _about_relations, _about_pairs):
            for question in make(scene, rng):
                by_text.setdefault(question.text, question)
        return list(by_text.values()), _describe_graph(scene)

    def add(self, scene: Scene, described: tuple[list[_Question], dict[str, Any]], rng: np.random.Generator) -> None:
        """Choose balanced questions, and add what they entail."""
        questions, graph = described
        image = stem(scene.image_id)
        self.graphs[image] = graph
        by_text = {question.text: question for question in questions}
        options = [_as_candidate(question) for question in questions if not question.one_sided]
        chosen = [option.text for option in self.quotas.choose(options, self.config.questions_per_image, rng)]
        entailed = dict.fromkeys(other for text in chosen for other in by_text[text].entails)
        written = [*chosen, *(text for text in entailed if text not in chosen)]
        ids = {text: f"{scene.image_id * _ROOM + number:09d}" for number, text in enumerate(written)}
        for number, text in enumerate(written):
            question = by_text[text]
            self.questions[ids[text]] = {
                "semantic": list(question.program),
                "entailed": [ids[other] for other in question.entails if other in ids],
                "equivalent": [ids[text]],
                "question": text,
                "imageId": image,
                "isBalanced": number < len(chosen),
                "groups": _name_groups(question),
                "answer": question.answer,
                "semanticStr": _write_program(question.program),
                "annotations": {"answer": {}, "question": _mark_objects(scene, question), "fullAnswer": {}},
                "types": dict(zip(("structural", "semantic", "detailed"), question.types, strict=True)),
                "fullAnswer": question.full,
            }
            self.choices[ids[text]] = {"valid": list(question.allowed), "plausible": list(question.allowed)}

    def write(self, folder: Path) -> dict[str, int]:
        """Write the files of questions, choices and scene graphs."""
        balanced = {number: question for number, question in self.questions.items() if question["isBalanced"]}
        (folder / "gqa").mkdir(exist_ok=True)
        for name, content in {
            "balanced_questions": balanced,
            "all_questions": self.questions,
            "choices": self.choices,
            "sceneGraphs": self.graphs,
        }.items():
            write_json(folder / "gqa" / f"{self.split}_{name}.json", content)
        return {"balanced_questions": len(balanced), "all_questions": len(self.questions)}


def _as_candidate(question: _Question) -> Candidate:
    """For the quotas: structural and semantic types come equally often, answers within a pattern and a trait."""
    structural, semantic, detailed = question.types
    return Candidate(
        family=f"{structural} {semantic}",
        form=f"{detailed} {question.asked}",
        text=question.text,
        answer=question.answer,
        choices=len(VALUES.get(question.asked, _YES_NO)) if structural == "choose" else len(question.allowed),
    )


def _name_groups(question: _Question) -> dict[str, str | None]:
    """Global group: what open questions ask for. Local group: the pattern, the object and the trait."""
    structural, _, detailed = question.types
    noun = next(iter(question.named), "-").rsplit(" ", 1)[-1]
    is_open = structural in ("query", "choose")
    return {"global": question.asked if is_open else None, "local": f"{detailed}-{noun}_{question.asked}"}


def _write_program(program: Sequence[Mapping[str, Any]]) -> str:
    """The program on one line, as official files repeat it."""
    parts = []
    for step in program:
        needs = f" [{', '.join(map(str, step['dependencies']))}]" if step["dependencies"] else ""
        parts.append(f"{step['operation']}: {step['argument']}{needs}")
    return "->".join(parts)


def _mark_objects(scene: Scene, question: _Question) -> dict[str, str]:
    """Words of the question, as "first" or "first:end", -> the object that they name."""
    words = question.text.removesuffix("?").split()
    marked = {}
    for phrase, place in question.named.items():
        length = len(phrase.split())
        for start in range(len(words) - length + 1):
            if words[start : start + length] == phrase.split():
                marked[str(start) if length == 1 else f"{start}:{start + length}"] = str(_object_id(scene, place))
    return marked


WRITER = GqaWriter
