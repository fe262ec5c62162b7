"""VCR's files of drawn scenes: what is said is true of the picture, exactly one choice is right, and words alone say
nothing."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.data.annotations.vcr import VcrRecord, read_metadata
from visling.data.text import Tokenizer
from visling.scenes import ScenesConfig, write_scenes
from visling.tasks.vcr import VCR

FEW_WORDS = {"questions_per_image": 0, "captions_per_image": 0, "statements_per_image": 0}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    write_scenes(folder, ScenesConfig(images=900, size=64, train=0.7, val=0.0, seed=5, **FEW_WORDS))
    return folder


def read(folder: Path, split: str) -> list[VcrRecord]:
    return VCR().records(folder, split)


def place_is_true(words: list[str], first: tuple[int, ...], second: tuple[int, ...], boxes: Any, size: int) -> bool:
    """Whether a relation holds clearly between all objects of two tags."""
    relation = next(word for word in words if word in OPPOSITE)
    axis, sign = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    ahead = [sign * (centres[other, axis] - centres[one, axis]) for one in first for other in second]
    assert min(map(abs, ahead)) >= 0.08 * size, "the drawn objects are clearly apart"
    assert len({step > 0 for step in ahead}) == 1
    return ahead[0] > 0


def test_one_choice_is_right_of_the_picture(folder: Path) -> None:
    traits: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    content = json.loads((folder / "annotations" / "instances_test.json").read_text())
    for item in content["annotations"]:
        color, size, texture = item["attributes"]
        traits[f"scene_{item['image_id']:012d}"].append((size, color, texture))
    asked: Counter[str] = Counter()
    for record in read(folder, "test"):
        described = read_metadata(record)
        looks, boxes, side = traits[record.images[0]], described.boxes, described.size[0]
        words = [token for token in record.question if isinstance(token, str)]
        (tag,) = (token for token in record.question if not isinstance(token, str))
        kind = "look" if "look" in words else "place"
        asked[kind] += 1
        assert {record.objects[item] for item in tag} & {
            name for number, name in enumerate(record.objects) if number not in tag
        } == set(), "a tag holds all objects of its class"

        def look(sentence: Any) -> tuple[str, ...]:
            size, color, _, texture = [token for token in sentence if isinstance(token, str)][-5:-1]
            return (size, color, texture)

        if kind == "look":
            right = [look(choice) == looks[tag[0]] for choice in record.answer_choices]
            assert all(look(choice) in looks for choice in record.answer_choices), "true of another object"
            reasons = [
                place_is_true(
                    [w for w in choice if isinstance(w, str)], tag,
                    next(w for w in choice if not isinstance(w, str)), boxes, side,
                )
                for choice in record.rationale_choices
            ]  # fmt: skip
        else:
            targets = [next(w for w in choice if not isinstance(w, str)) for choice in record.answer_choices]
            right = [place_is_true(words, target, tag, boxes, side) for target in targets]
            reasons = [look(choice) == looks[targets[right.index(True)][0]] for choice in record.rationale_choices]
        for choices, label in ((right, record.answer_label), (reasons, record.rationale_label)):
            assert [number for number, truth in enumerate(choices) if truth] == [label]
    assert min(asked["look"], asked["place"]) >= 5


def test_every_word_is_in_the_small_vocabulary(folder: Path) -> None:
    tokenizer = Tokenizer("scenes")
    words = {
        token
        for record in read(folder, "train")
        for sentence in (record.question, *record.answer_choices, *record.rationale_choices)
        for token in sentence
        if isinstance(token, str)
    }
    assert not [word for word in words if tokenizer.unk in tokenizer.encode(word) or len(tokenizer.encode(word)) > 1]


def tokens(record: VcrRecord, kind: str, choice: int) -> list[str]:
    """Words and pairs of words of a choice, by themselves and with each word of the question."""

    def spell(sentence: Any) -> list[str]:
        return [w if isinstance(w, str) else "-".join(record.objects[item] for item in w) for w in sentence]

    context = spell(record.question)
    if kind == "rationale":
        assert record.answer_label is not None
        context += spell(record.answer_choices[record.answer_label])
    choices = record.answer_choices if kind == "answer" else record.rationale_choices
    own = spell(choices[choice])
    others = {word for number, other in enumerate(choices) if number != choice for word in spell(other)}
    pairs = [f"{a} {b}" for a, b in itertools.pairwise(own)]
    crossed = [f"{a}|{b}" for a in context for b in own]
    return [*own, *pairs, *crossed, *(f"only {word}" for word in own if word not in others)]


@pytest.mark.parametrize("kind", ["answer", "rationale"])
def test_words_alone_are_near_chance(folder: Path, kind: str) -> None:
    """Naive Bayes over words, pairs of words, and words with those of the question and of the other choices."""
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    train, test = read(folder, "train"), read(folder, "test")
    assert min(len(train), len(test)) > 150
    for record in train:
        for choice in range(4):
            counts[choice == getattr(record, f"{kind}_label")].update(tokens(record, kind, choice))
    totals = {truth: found.total() for truth, found in counts.items()}

    def score(words: list[str]) -> float:
        return sum(
            np.log((counts[True][word] + 1) / totals[True]) - np.log((counts[False][word] + 3) / totals[False])
            for word in words
        ) / len(words)

    hits = [
        int(np.argmax([score(tokens(record, kind, choice)) for choice in range(4)])) == getattr(record, f"{kind}_label")
        for record in test
    ]
    spread = 3 * np.sqrt(0.25 * 0.75 / len(hits))
    assert abs(np.mean(hits) - 0.25) < spread, f"{kind}: {np.mean(hits):.3f} of {len(hits)}"
    labels = Counter(getattr(record, f"{kind}_label") for record in train)
    assert max(labels.values()) < 0.35 * len(train)


def test_the_official_layout(folder: Path) -> None:
    record = read(folder, "test")[0]
    assert record.images[0].startswith("scene_")
    assert (folder / "images" / "test" / f"{record.images[0]}.png").is_file()
    described = read_metadata(record)
    assert described.size == (64, 64)
    assert len(described.outlines) == len(record.objects)
    assert record.movie == "scenes"
    assert record.id == "test-0"
    summary = json.loads((folder / "scenes.json").read_text())
    assert summary["counts"]["test"]["vcr_questions"] == len(read(folder, "test"))
