"""GQA's questions about scenes are read back from their English and checked against the instances file; words alone
must say little about an answer."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.data.text import Tokenizer
from visling.scenes import ScenesConfig, write_scenes
from visling.scenes.world import VALUES
from visling.tasks.gqa import GQA
from visling.types import Prediction

SPLITS = ("train", "val", "test")
CONFIG = ScenesConfig(
    images=800, train=0.7, val=0.05, seed=5, questions_per_image=8, captions_per_image=1, statements_per_image=0
)
KIND = {value: name for name, values in VALUES.items() for value in values}
OFFICIAL = {
    "semantic", "entailed", "equivalent", "question", "imageId", "isBalanced", "groups", "answer", "semanticStr",
    "annotations", "types", "fullAnswer",
}  # fmt: skip
MARGIN = 0.08 * CONFIG.size

Things = list[dict[str, Any]]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gqa") / "scenes"
    write_scenes(folder, CONFIG)
    return folder


def read(scenes: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((scenes / "gqa" / f"{name}.json").read_text())
    return found


def things_of(scenes: Path, split: str) -> dict[str, Things]:
    """Objects by image, from the instances file alone."""
    content = json.loads((scenes / "annotations" / f"instances_{split}.json").read_text())
    shapes = {category["id"]: category["name"] for category in content["categories"]}
    stems = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
    found: dict[str, Things] = {stem: [] for stem in stems.values()}
    for one in content["annotations"]:
        x, y, width, height = one["bbox"]
        traits = dict(zip(("color", "size", "texture"), one["attributes"], strict=True))
        found[stems[one["image_id"]]].append(
            traits
            | {"shape": shapes[one["category_id"]], "x": x + width / 2, "y": y + height / 2, "id": str(one["id"])}
        )
    return found


def fitting(things: Things, phrase: str) -> Things:
    """Objects that a noun phrase describes."""
    words = [word for word in phrase.split() if word not in ("a", "an", "thing", "object")]
    return [thing for thing in things if all(thing[KIND[word]] == word for word in words)]


def the(things: Things, phrase: str) -> dict[str, Any]:
    (found,) = fitting(things, phrase)
    return found


def stands(one: dict[str, Any], side: str, other: dict[str, Any]) -> bool:
    """Whether one is clearly on a side of the other; asked only where it is clearly on one."""
    axis = "x" if side in ("left", "right") else "y"
    ahead = one[axis] - other[axis] if side in ("right", "below") else other[axis] - one[axis]
    assert abs(ahead) >= MARGIN, "nearly level"
    return bool(ahead > 0)


def yes(truth: bool) -> str:
    return "yes" if truth else "no"


SIDE = r"(?:to the )?(left|right|above|below)(?: of)?"
TRAIT = "(color|shape|size|texture)"


def answer(things: Things, question: str) -> str:
    """The answer, worked out from the English."""
    if found := re.fullmatch(rf"what {TRAIT} is the (?:thing|object) {SIDE} the (.+)\?", question):
        name, side, anchor = found.groups()
        landmark = the(things, anchor)
        (only,) = [thing for thing in things if thing is not landmark and stands(thing, side, landmark)]
        return str(only[name])
    if found := re.fullmatch(rf"what (?:is the )?{TRAIT} (?:is|of) the (.+)\?", question):
        return str(the(things, found[2])[found[1]])
    if found := re.fullmatch(rf"do the (.+) and the (.+) have the same {TRAIT}\?", question):
        return yes(the(things, found[1])[found[3]] == the(things, found[2])[found[3]])
    if found := re.fullmatch(rf"is the {TRAIT} of the (.+) different from that of the (.+)\?", question):
        return yes(the(things, found[2])[found[1]] != the(things, found[3])[found[1]])
    if found := re.fullmatch(r"is there (.+?) (and|or) (.+)\?", question):
        present = [bool(fitting(things, phrase)) for phrase in (found[1], found[3])]
        return yes(all(present) if found[2] == "and" else any(present))
    if found := re.fullmatch(r"is there (.+)\?", question):
        return yes(bool(fitting(things, found[1])))
    if found := re.fullmatch(r"is the (.+) (left|right|above|below) or (\w+)(?: of)? the (.+)\?", question):
        one, other = the(things, found[1]), the(things, found[4])
        return next(side for side in found.groups()[1:3] if stands(one, side, other))
    if found := re.fullmatch(rf"is the (.+?) {SIDE} the (.+)\?", question):
        return yes(stands(the(things, found[1]), found[2], the(things, found[3])))
    if found := re.fullmatch(r"is the (.+?) (?:an? )?(\w+) or (?:an? )?(\w+)\?", question):
        return next(value for value in found.groups()[1:] if the(things, found[1])[KIND[value]] == value)
    found = re.fullmatch(r"is the (.+?) (?:an? )?(\w+)\?", question)
    assert found is not None, question
    return yes(the(things, found[1])[KIND[found[2]]] == found[2])


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_right(scenes: Path, split: str) -> None:
    things = things_of(scenes, split)
    questions = read(scenes, f"{split}_all_questions")
    assert questions
    for number, entry in questions.items():
        assert answer(things[entry["imageId"]], entry["question"]) == entry["answer"], (number, entry)


def test_the_reader_of_this_test_can_say_no(scenes: Path) -> None:
    things = things_of(scenes, "train")
    wrong = 0
    for entry in read(scenes, "train_balanced_questions").values():
        changed = [{**thing, "color": "red", "shape": "star"} for thing in things[entry["imageId"]]]
        try:
            wrong += answer(changed, entry["question"]) != entry["answer"]
        except (ValueError, StopIteration):
            wrong += 1
    assert wrong > 500


@pytest.mark.parametrize("split", SPLITS)
def test_official_fields(scenes: Path, split: str) -> None:
    every, balanced = read(scenes, f"{split}_all_questions"), read(scenes, f"{split}_balanced_questions")
    assert balanced == {number: entry for number, entry in every.items() if entry["isBalanced"]}
    assert len(every) > len(balanced)
    choices, graphs = read(scenes, f"{split}_choices"), read(scenes, f"{split}_sceneGraphs")
    things = things_of(scenes, split)
    assert choices.keys() == every.keys()
    assert graphs.keys() == things.keys()
    for number, entry in every.items():
        assert entry.keys() == OFFICIAL
        assert number.isdigit()
        assert number.startswith("0")
        assert entry["types"]["structural"] in ("query", "verify", "choose", "logical", "compare")
        assert entry["types"]["semantic"] in ("obj", "attr", "cat", "rel", "global")
        assert entry["answer"] in choices[number]["valid"]
        assert set(choices[number]["valid"]) >= set(choices[number]["plausible"]) - {"yes", "no"}
        assert set(entry["entailed"]) <= every.keys()
        assert {every[other]["imageId"] for other in entry["entailed"]} <= {entry["imageId"]}
        words = entry["question"].removesuffix("?").split()
        objects = graphs[entry["imageId"]]["objects"]
        for span, identity in entry["annotations"]["question"].items():
            start, _, end = span.partition(":")
            named = " ".join(words[int(start) : int(end) if end else int(start) + 1])
            assert identity in [thing["id"] for thing in fitting(things[entry["imageId"]], named)]
            assert identity in objects
        for place, step in enumerate(entry["semantic"]):
            assert step.keys() == {"operation", "dependencies", "argument"}
            assert all(need < place for need in step["dependencies"])
    for image, graph in graphs.items():
        assert (graph["width"], graph["height"]) == (CONFIG.size, CONFIG.size)
        assert graph["objects"].keys() == {thing["id"] for thing in things[image]}
        for thing in things[image]:
            found = graph["objects"][thing["id"]]
            assert found["name"] == thing["shape"]
            assert {found["x"] + found["w"] / 2, found["y"] + found["h"] / 2} == {thing["x"], thing["y"]}


def test_all_types_are_there_and_answers_are_balanced(scenes: Path) -> None:
    balanced = read(scenes, "train_balanced_questions").values()
    structural = Counter(entry["types"]["structural"] for entry in balanced)
    assert set(structural) == {"query", "verify", "choose", "logical", "compare"}
    assert min(structural.values()) > 0.05 * len(balanced)
    for kind in ("verify", "logical", "compare"):
        share = np.mean([entry["answer"] == "yes" for entry in balanced if entry["types"]["structural"] == kind])
        assert 0.45 < share < 0.55, kind


def test_what_is_entailed_follows(scenes: Path) -> None:
    """Most balanced questions entail something; a model that is always right is consistent, and one that is right on
    the balanced ones alone is not."""
    task = GQA()
    records = list(task.records(scenes, "test_all"))
    entailing = [record for record in records if record.balanced and set(record.entailed) - {record.id}]
    assert len(entailing) > 0.4 * sum(record.balanced for record in records)
    right = [Prediction(id=record.id, value=record.answer, confidence=1.0) for record in records]
    report = task.report(right, records)
    assert {name: score.value for name, score in report.scores.items()} == {
        "accuracy": 100, "binary": 100, "open": 100, "validity": 100, "plausibility": 100, "consistency": 100,
        "distribution": 0,
    }  # fmt: skip
    half = [
        prediction if record.balanced else Prediction(id=record.id, value="?", confidence=1.0)
        for prediction, record in zip(right, records, strict=True)
    ]
    assert task.report(half, records).scores["consistency"].value < 50


def test_every_word_is_known(scenes: Path) -> None:
    tokenizer = Tokenizer("scenes")
    for entry in read(scenes, "train_all_questions").values():
        ids, words = tokenizer.pieces(entry["question"])
        assert tokenizer.unk not in ids
        assert len(ids) == len(set(words.tolist())), entry["question"]


def pairs_of(question: str) -> set[str]:
    words = question.removesuffix("?").split()
    return {*words, *(f"{one} {two}" for one, two in itertools.pairwise(words))}


def naive_bayes(train: list[Mapping[str, Any]], test: list[Mapping[str, Any]]) -> float:
    """Accuracy of a classifier that sees words and pairs of neighbouring words."""
    answers = sorted({entry["answer"] for entry in train})
    features = sorted({feature for entry in train for feature in pairs_of(entry["question"])})
    column = {feature: number for number, feature in enumerate(features)}

    def table(entries: list[Mapping[str, Any]]) -> Any:
        found = np.zeros((len(entries), len(features)))
        for row, entry in enumerate(entries):
            found[row, [column[one] for one in pairs_of(entry["question"]) if one in column]] = 1
        return found

    truth = np.array([answers.index(entry["answer"]) for entry in train])
    one_hot = np.eye(len(answers))[truth]
    chance = (one_hot.T @ table(train) + 0.5) / (one_hot.sum(0)[:, None] + 1)
    seen = table(test)
    scores = seen @ np.log(chance).T + (1 - seen) @ np.log1p(-chance).T + np.log(one_hot.mean(0))
    return float(
        np.mean([answers[best] == entry["answer"] for best, entry in zip(scores.argmax(1), test, strict=True)])
    )


@pytest.mark.parametrize("kind", ["query", "verify", "choose", "logical", "compare"])
def test_words_alone_say_little(scenes: Path, kind: str) -> None:
    train, test = (
        [
            entry
            for entry in read(scenes, f"{split}_balanced_questions").values()
            if entry["types"]["structural"] == kind
        ]
        for split in ("train", "test")
    )
    choices = read(scenes, "test_choices")
    balanced = read(scenes, "test_balanced_questions").items()
    chance = np.mean(
        [1 / len(choices[number]["valid"]) for number, entry in balanced if entry["types"]["structural"] == kind]
    )
    noise = 2.5 * np.sqrt(chance * (1 - chance) / len(test))
    assert naive_bayes(train, test) < chance + 0.04 + noise, (kind, chance, len(test))


def test_the_classifier_of_this_test_can_learn(scenes: Path) -> None:
    """Guards the guard: with answers that the words give away, it finds them."""
    entries = list(read(scenes, "train_balanced_questions").values())
    given_away = [{**entry, "answer": yes("star" in entry["question"])} for entry in entries]
    assert naive_bayes(given_away[:2000], given_away[2000:]) > 0.85


def test_other_settings_write_other_numbers(tmp_path: Path) -> None:
    write_scenes(tmp_path / "none", ScenesConfig(images=4, questions_per_image=0, min_objects=2))
    assert read(tmp_path / "none", "train_all_questions") == {}
    counts = json.loads((tmp_path / "none" / "scenes.json").read_text())["counts"]["train"]
    assert (counts["gqa_balanced_questions"], counts["gqa_all_questions"]) == (0, 0)
