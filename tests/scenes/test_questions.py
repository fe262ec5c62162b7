"""Every question, statement and caption is read back from its English and checked against the instances file by an
evaluator of its own."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from visling.runtime import generator_for
from visling.scenes.drawing import draw_scene
from visling.scenes.questions import FAMILIES, candidates
from visling.scenes.quotas import Candidate, Quotas
from visling.scenes.world import Scene, sample_items

WORDS = {
    "shape": ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "moon", "ring"),
    "color": ("red", "green", "blue", "yellow", "orange", "purple", "brown", "black"),
    "size": ("small", "medium", "large"),
    "texture": ("solid", "striped", "dotted"),
}
KIND = {word: kind for kind, words in WORDS.items() for word in words}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MARGIN = 0.08 * 128
T = "(color|shape|size|texture)"
Things = list[dict[str, Any]]


def fitting(things: Things, phrase: str) -> Things:
    """Objects that a noun phrase describes."""
    wanted = {}
    for word in phrase.split():
        single = "cross" if word == "crosses" else word if word in KIND else word.removesuffix("s")
        if single in KIND:
            wanted[KIND[single]] = single
        else:
            assert single in ("thing", "object", "a", "an"), f"unknown word {word!r} in {phrase!r}"
    return [thing for thing in things if all(thing[kind] == value for kind, value in wanted.items())]


def the(things: Things, phrase: str) -> dict[str, Any]:
    """The only object that a noun phrase describes."""
    found = fitting(things, phrase)
    assert len(found) == 1, f"{phrase!r} describes {len(found)} objects"
    return found[0]


def centre(thing: dict[str, Any]) -> tuple[float, float]:
    x1, y1, x2, y2 = thing["box"]
    return (x1 + x2) / 2, (y1 + y2) / 2


def stands(thing: dict[str, Any], relation: str, other: dict[str, Any]) -> bool:
    (ax, ay), (bx, by) = centre(thing), centre(other)
    ahead = {"left": bx - ax, "right": ax - bx, "above": by - ay, "below": ay - by}[relation]
    assert abs(ahead) >= MARGIN, f"centres are nearly level: {ahead}"
    return ahead > 0


def odd_values(things: Things, kind: str) -> list[str]:
    return [value for value, number in Counter(thing[kind] for thing in things).items() if number == 1]


def only(values: list[str]) -> str:
    assert len(values) == 1, values
    return values[0]


def yes(truth: bool) -> str:
    return "yes" if truth else "no"


def answer(things: Things, question: str) -> str:
    """The answer of a question, from its words and the objects."""
    relation = r"(?:(?:to the )?(left|right) of|(above|below))"

    def m(pattern: str) -> list[str] | None:
        match = re.fullmatch(pattern.replace("<REL>", relation).replace("<T>", T) + r"\?", question)
        return [group for group in match.groups() if group is not None] if match else None

    if g := m(r"(?:is there|can you see) an? (\w+) that is not (\w+)"):
        stars = fitting(things, g[0])
        assert stars
        return yes(any(thing[KIND[g[1]]] != g[1] for thing in stars))
    if g := m(r"(?:is there|can you see) an? (.+?) <REL> the (.+)"):
        landmark = the(things, g[2])
        return yes(any(stands(thing, g[1], landmark) for thing in fitting(things, g[0]) if thing is not landmark))
    if g := m(r"(?:is there|can you see|does the picture show) an? ((?!other).+)"):
        return yes(bool(fitting(things, g[0])))
    if g := m(r"are there any (.+)"):
        return yes(bool(fitting(things, g[0])))
    if g := m(r"how many (?:things|objects here) are not (\w+)"):
        return str(sum(thing[KIND[g[0]]] != g[0] for thing in things))
    if g := m(r"how many (.+) (?:are there|can you see)") or m(r"what is the number of (.+)"):
        return str(len(fitting(things, g[0])))
    if g := m(r"what <T> is the thing closest to the (.+)") or m(r"what is the <T> of the object nearest to the (.+)"):
        landmark = the(things, g[1])
        near = sorted(
            (math.dist(centre(landmark), centre(thing)), i) for i, thing in enumerate(things) if thing is not landmark
        )
        assert len(near) == 1 or near[1][0] - near[0][0] >= MARGIN
        return str(things[near[0][1]][g[0]])
    if g := m(r"what <T> is the (.+?) <REL> the (.+)") or m(r"what is the <T> of the (.+?) <REL> the (.+)"):
        landmark = the(things, g[3])
        there = [thing for thing in things if thing is not landmark and stands(thing, g[2], landmark)]
        return str(the(there, g[1])[g[0]])
    if g := m(r"(?:what <T> can you see|which <T> occurs) only once"):
        return only(odd_values(things, g[0]))
    if g := m(r"one thing has another <T> than all the others\. which \w+") or m(r"what <T> has the odd one out"):
        assert len({thing[g[0]] for thing in things}) == 2
        return only(odd_values(things, g[0]))
    if g := m(r"what <T> has the thing with the odd <T>") or m(r"what is the <T> of the thing of the odd <T>"):
        return str(next(thing for thing in things if thing[g[1]] == only(odd_values(things, g[1])))[g[0]])
    if g := m(r"what <T> is the (.+)") or m(r"what is the <T> of the (.+)") or m(r"which <T> does the (.+) have"):
        return str(the(things, g[1])[g[0]])
    if g := m(r"(?:is|can you see) the (.+?) <REL> the (.+)") or m(r"does the (.+?) stand <REL> the (.+)"):
        return yes(stands(the(things, g[0]), g[1], the(things, g[2])))
    if g := m(r"are there as many (.+) as (.+)") or m(r"is the number of (.+) and (.+) the same"):
        return yes(len(fitting(things, g[0])) == len(fitting(things, g[1])))
    if g := m(r"(?:are there|can you see) (more|fewer) (.+) than (.+)"):
        first, second = len(fitting(things, g[1])), len(fitting(things, g[2]))
        return yes(first > second if g[0] == "more" else first < second)
    if g := m(r"is the (.+) of the same <T> as the (.+)"):
        return yes(the(things, g[0])[g[1]] == the(things, g[2])[g[1]])
    if g := m(r"do the (.+) and the (.+) have the same <T>") or m(r"are the (.+) and the (.+) equal in <T>"):
        return yes(the(things, g[0])[g[2]] == the(things, g[1])[g[2]])
    if g := m(r"is there another thing of the same <T> as the (.+)") or m(
        r"does anything else have the <T> of the (.+)"
    ):
        thing = the(things, g[1])
        return yes(sum(other[g[0]] == thing[g[0]] for other in things) > 1)
    if g := m(r"are there no (.+)") or m(r"is the picture without (.+)"):
        return yes(not fitting(things, g[0]))
    if g := m(r"does the (.+) look (\w+)") or m(r"is the (.+) (\w+)"):
        return yes(the(things, g[0])[KIND[g[1]]] == g[1])
    if g := m(r"is (\w+) the <T> of the (.+)"):
        return yes(the(things, g[2])[g[1]] == g[0])
    raise AssertionError(f"no reading for {question!r}")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_answer_follows_from_the_instances(written: Any, split: str) -> None:
    objects = written.objects(split)
    questions = written.json(f"annotations/v2_OpenEnded_scenes_{split}_questions.json")["questions"]
    answers = written.json(f"annotations/v2_scenes_{split}_annotations.json")["annotations"]
    assert len(questions) > 8 * len(objects)
    for question, annotation in zip(questions, answers, strict=True):
        expected = answer(objects[question["image_id"]], question["question"])
        assert annotation["multiple_choice_answer"] == expected, question


def examples(written: Any) -> list[tuple[str, str, str]]:
    """(family, question, answer) of the training split."""
    questions = written.json("annotations/v2_OpenEnded_scenes_train_questions.json")["questions"]
    answers = written.json("annotations/v2_scenes_train_annotations.json")["annotations"]
    return [
        (a["question_type"], q["question"], a["multiple_choice_answer"])
        for q, a in zip(questions, answers, strict=True)
    ]


def skeleton(question: str) -> str:
    """The question with its content words replaced by their kind."""
    words = re.findall(r"\w+", question)
    return " ".join(KIND.get(w, KIND.get(w.removesuffix("s"), w)) for w in words)


def test_families_are_many_and_even(written: Any) -> None:
    families = Counter(family for family, _, _ in examples(written))
    assert len(families) >= 8
    assert min(families.values()) > 0.8 * max(families.values()), families


def test_templates_do_not_give_the_answer_away(written: Any) -> None:
    by_family: dict[str, Counter[str]] = defaultdict(Counter)
    for family, _, a in examples(written):
        if a in ("yes", "no"):
            by_family[family][a] += 1
    for family, counts in by_family.items():
        assert abs(counts["yes"] / counts.total() - 0.5) < 0.07, (family, counts)
    colours = Counter(a for family, _, a in examples(written) if family == "color")
    assert max(colours.values()) / colours.total() < 0.2, colours
    numbers = Counter(a for family, question, a in examples(written) if family == "count")
    assert max(numbers.values()) / numbers.total() < 0.28, numbers


def test_a_question_only_reader_gains_little(written: Any) -> None:
    """Naive Bayes over the words and the template of one half of the images, scored on the other half."""
    rows = [(family, question, a) for family, question, a in examples(written) if a in ("yes", "no")]
    half = len(rows) // 2
    right = 0
    for fit, score in ((rows[:half], rows[half:]), (rows[half:], rows[:half])):
        seen: dict[str, Counter[str]] = defaultdict(Counter)
        for family, question, a in fit:
            for feature in {*re.findall(r"\w+", question), skeleton(question), family}:
                seen[feature][a] += 1
        for family, question, a in score:
            features = {*re.findall(r"\w+", question), skeleton(question), family}
            lean = sum(math.log((seen[f]["yes"] + 1) / (seen[f]["no"] + 1)) for f in features)
            right += yes(lean > 0) == a
    assert len(rows) > 800
    assert right / len(rows) < 0.56, right / len(rows)


def asked(scenes: int) -> list[Candidate]:
    """Questions chosen about drawn scenes, with their forms, which the files do not hold."""
    quotas, chosen = Quotas(), []
    for number in range(scenes):
        rng = generator_for(3, number)
        _, items = draw_scene(sample_items(rng, 3, 10), 128, "plain", rng)
        chosen += quotas.choose(candidates(Scene(image_id=number, size=128, items=tuple(items)), rng), 10, rng)
    return chosen


def group(one: Candidate) -> tuple[str, str, int]:
    """Family, kind of answer and number of choices: forms between which the words of a question may well tell."""
    return one.family, KIND.get(one.answer, "yes or no" if one.answer in ("yes", "no") else "number"), one.choices


def read_without_looking(fit: list[Candidate], score: list[Candidate]) -> Iterator[tuple[tuple[str, str, int], bool]]:
    """Group and success of naive Bayes over words, which knows the group."""

    def features(one: Candidate) -> set[str]:
        return set(re.findall(r"\w+", one.text))

    prior: dict[Any, Counter[str]] = defaultdict(Counter)
    seen: dict[Any, Counter[str]] = defaultdict(Counter)
    for one in fit:
        prior[group(one)][one.answer] += 1
        for feature in features(one):
            seen[group(one), feature][one.answer] += 1
    for one in score:
        known, parts = prior[group(one)], [seen[group(one), feature] for feature in features(one)]

        def lean(answer: str, known: Counter[str] = known, parts: list[Counter[str]] = parts) -> float:
            return math.log(known[answer]) + sum(math.log((part[answer] + 0.5) / (known[answer] + 1)) for part in parts)

        yield group(one), bool(known) and max(known, key=lean) == one.answer


def above_chance(rows: list[Candidate]) -> dict[tuple[str, str, int], tuple[float, float]]:
    """Group -> share that the reader gets right, and the most that is allowed: chance, 3 points, and 3 standard
    deviations."""
    half = len(rows) // 2
    right: dict[tuple[str, str, int], list[bool]] = defaultdict(list)
    for fit, score in ((rows[:half], rows[half:]), (rows[half:], rows[:half])):
        for key, success in read_without_looking(fit, score):
            right[key].append(success)
    found = {}
    for key, successes in right.items():
        chance = 1 / key[-1]
        found[key] = (
            sum(successes) / len(successes),
            chance + 0.03 + 3 * math.sqrt(chance * (1 - chance) / len(successes)),
        )
    return found


@pytest.mark.parametrize("scenes", [150, pytest.param(4000, marks=pytest.mark.slow)])
def test_no_form_is_answered_above_its_chance_without_the_image(scenes: int) -> None:
    rows = asked(scenes)
    assert len(rows) > 9 * scenes
    found = above_chance(rows)
    kinds = {*((family, kind) for family, kind, _ in found)}
    assert kinds >= {(family, kind) for family in ("odd", "nearest", "relation query") for kind in WORDS}
    assert kinds >= {
        ("size", "size"),
        ("shape", "shape"),
        ("texture", "texture"),
        ("color", "color"),
        ("negation", "number"),
        ("count", "number"),
    }
    assert {family for family, _ in kinds} == set(FAMILIES)
    for key, (share, most) in found.items():
        assert share < most, (key, share, most)
    told = [replace(one, text=f"{one.text} {one.answer}") for one in rows]
    assert sum(share > most for share, most in above_chance(told).values()) > len(found) / 3, (
        "the reader sees what words give away"
    )


def holds(things: Things, sentence: str) -> bool | None:
    """Truth of a statement or short caption; None where this reader does not know the construction."""
    text = sentence.removesuffix(".")
    relation = r"(?:(?:to the )?(left|right) of|(above|below))"

    def m(pattern: str) -> list[str] | None:
        match = re.fullmatch(pattern.replace("<REL>", relation).replace("<T>", T), text)
        return [group for group in match.groups() if group is not None] if match else None

    if g := m(r"there (?:is|are) exactly (\w+) (.+)"):
        return len(fitting(things, g[1])) == NUMBERS.index(g[0])
    if g := m(r"there (?:is|are) (at least|at most) (\w+) (.+)"):
        found, said = len(fitting(things, g[2])), NUMBERS.index(g[1])
        return found >= said if g[0] == "at least" else found <= said
    if g := m(r"there are more (.+) than (.+)"):
        return len(fitting(things, g[0])) > len(fitting(things, g[1]))
    if g := m(r"(?:there is|there are|the picture has) no (.+)"):
        return not fitting(things, g[0])
    if g := m(r"(?:(?:there is|the picture shows) )?an? (.+?)(?: is)? <REL> an? (.+)"):
        pairs = [(a, b) for a in fitting(things, g[0]) for b in fitting(things, g[2]) if a is not b]
        index = {"left": 0, "right": 0, "above": 1, "below": 1}[g[1]]
        sign = 1 if g[1] in ("left", "above") else -1
        return any(sign * (centre(b)[index] - centre(a)[index]) >= MARGIN for a, b in pairs)
    if g := m(r"the (.+?) is <REL> the (.+)"):
        return stands(the(things, g[0]), g[1], the(things, g[2]))
    if g := m(r"the (.+) and the (.+) have the same <T>"):
        return bool(the(things, g[0])[g[2]] == the(things, g[1])[g[2]])
    if g := m(r"the (.+) has (the same|a different) <T> (?:as|than) the (.+)"):
        return bool((the(things, g[0])[g[2]] == the(things, g[3])[g[2]]) == (g[1] == "the same"))
    if g := m(r"there (?:is|are) (\w+) (\w+) in the picture"):
        return len(things) == NUMBERS.index(g[0])
    if (
        (g := m(r"(?:a picture with )?(\w+) ([\w ]+)(?: and|,) (\w+) ([\w ]+)"))
        and g[0] in NUMBERS[1:]
        and g[2] in NUMBERS[1:]
    ):
        return all(len(fitting(things, phrase)) == NUMBERS.index(n) for n, phrase in (g[:2], g[2:]))
    if (g := m(r"there (?:is|are) (\w+) (.+)")) and g[0] in NUMBERS:
        return len(fitting(things, g[1])) == NUMBERS.index(g[0])
    if g := m(r"(?:there is |a picture of )?(an? [\w ]+(?:, an? [\w ]+)* and an? [\w ]+)"):
        return all(fitting(things, phrase) for phrase in re.split(r", | and ", g[0]))
    if g := m(r"(?:there is |the picture has )?an? ([\w ]+)"):
        return bool(fitting(things, g[0]))
    if g := m(r"(?:all|every) (.+) (?:are|is) (\w+)"):
        return all(thing[KIND[g[1]]] == g[1] for thing in fitting(things, g[0]))
    if g := m(r"(?:all things have|every object has) the same <T>"):
        return len({thing[g[0]] for thing in things}) == 1
    if g := m(r"the (.+) is (\w+)"):
        return bool(the(things, g[0])[KIND[g[1]]] == g[1])
    return None


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_statement_has_its_label_and_labels_are_even(written: Any, split: str) -> None:
    objects = written.objects(split)
    rows = written.lines(f"statements/{split}.json")
    for row in rows:
        image_id = int(row["image"].rsplit("_", 1)[1])
        assert row["identifier"].split("-")[0] == str(image_id)
        assert holds(objects[image_id], row["sentence"]) is (row["label"] == "true"), row
    share = sum(row["label"] == "true" for row in rows) / len(rows)
    assert 0.4 < share < 0.6, share


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_caption_is_true_and_five_differ(written: Any, split: str) -> None:
    objects = written.objects(split)
    captions: dict[int, list[str]] = defaultdict(list)
    for row in written.json(f"annotations/captions_{split}.json")["annotations"]:
        assert holds(objects[row["image_id"]], row["caption"]) is True, row
        captions[row["image_id"]].append(row["caption"])
    for image_id, texts in captions.items():
        assert len(set(texts)) == 5, (image_id, texts)
        named = [
            text for text in texts if all(any(w in WORDS[kind] for w in re.findall(r"\w+", text)) for kind in WORDS)
        ]
        assert len(named) >= 4, texts
        assert sum(len(re.findall(r"\ban?\b", text)) == 1 for text in named) >= 3, "three speak of one object"


def test_the_reader_of_this_test_can_say_no(written: Any) -> None:
    """Guards the guard: with one object's colour changed, some answers are no longer right."""
    objects = written.objects("train")
    questions = written.json("annotations/v2_OpenEnded_scenes_train_questions.json")["questions"]
    answers = written.json("annotations/v2_scenes_train_annotations.json")["annotations"]
    wrong = 0
    for question, annotation in zip(questions[:400], answers[:400], strict=True):
        things = [
            dict(thing, color="pink") if i == 0 else thing for i, thing in enumerate(objects[question["image_id"]])
        ]
        try:
            wrong += answer(things, question["question"]) != annotation["multiple_choice_answer"]
        except (AssertionError, IndexError):
            wrong += 1
    assert wrong > 40
