"""Referring expressions of scenes: official files, one object each, nothing to be gained without looking."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.data.annotations.referring import ReferringRecord, find_refer, read_refer
from visling.scenes import ScenesConfig, write, write_scenes
from visling.scenes.language import NOUNS, RELATION_WORDS, holds
from visling.scenes.tasks.referring import REFERENCES, SENTENCES
from visling.scenes.world import VALUES, Item, Scene

NO_MORE = {"captions_per_image": 0, "questions_per_image": 0, "statements_per_image": 0}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("referring") / "scenes"
    write_scenes(folder, ScenesConfig(images=400, train=0.6, val=0.1, **NO_MORE))  # type: ignore[arg-type]
    return folder


def scenes_of(folder: Path) -> dict[str, Scene]:
    scenes = {}
    for split in ("train", "val", "test"):
        content = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        shapes = {category["id"]: category["name"] for category in content["categories"]}
        items = defaultdict(list)
        for one in content["annotations"]:
            color, size, texture = one["attributes"]
            x, y, width, height = one["bbox"]
            shape = shapes[one["category_id"]]
            box = (x, y, x + width, y + height)
            items[one["image_id"]].append(Item(shape=shape, color=color, size=size, texture=texture, box=box))
        for image in content["images"]:
            found = tuple(items[image["id"]])
            scenes[str(image["id"])] = Scene(image_id=image["id"], size=image["width"], items=found)
    return scenes


def fitting(scene: Scene, words: Sequence[str]) -> tuple[Item, ...]:
    """Objects that a noun phrase fits."""
    traits = {name: word for word in words for name, values in VALUES.items() if word in values}
    assert len(traits) + sum(word in ("the", *NOUNS) for word in words) == len(words), words
    return scene.fitting(traits)


def referred(scene: Scene, text: str) -> list[Item]:
    """Objects that a sentence fits, by its words."""
    for relation, phrases in RELATION_WORDS.items():
        for phrase in sorted(phrases, key=len, reverse=True):
            first, found, second = text.partition(f" {phrase} ")
            if found:
                (anchor,) = fitting(scene, second.split())
                candidates = [item for item in fitting(scene, first.split()) if item is not anchor]
                assert len(candidates) > 1, f"{text}: the relation is not needed"
                return [item for item in candidates if holds(relation, item, anchor, scene.margin) is not False]
    return list(fitting(scene, text.split()))


def records_of(folder: Path) -> Iterator[ReferringRecord]:
    for split in ("train", "val", "test"):
        yield from read_refer(find_refer(folder), split)


def test_every_sentence_fits_its_object_alone(drawn: Path) -> None:
    scenes = scenes_of(drawn)
    kinds: Counter[str] = Counter()
    for record in records_of(drawn):
        scene = scenes[record.images[0]]
        (item,) = referred(scene, record.sent)
        assert record.corners == item.box, record
        assert record.size == (scene.size, scene.size)
        alike = [other for other in scene.items if other.shape == item.shape or other.color == item.color]
        assert len(alike) > 1, "an object like it is near"
        assert record.raw == record.sent.capitalize()
        assert list(record.tokens) == record.sent.split()
        kinds[record.split] += 1
    assert kinds.keys() == {"train", "val", "testA", "testB"}
    assert min(kinds.values()) > 20


def test_no_trait_of_a_description_is_idle(drawn: Path) -> None:
    scenes = scenes_of(drawn)
    for record in read_refer(find_refer(drawn), "testA"):
        words = [word for word in record.sent.split() if word not in ("the", *NOUNS)]
        assert len(words) > 1
        for word in words:
            rest = [other for other in words if other != word]
            assert len(fitting(scenes[record.images[0]], rest)) > 1, f"{record.sent}: {word!r} is not needed"


def test_the_parts_of_the_test_split(drawn: Path) -> None:
    whole = {record.id for record in read_refer(find_refer(drawn), "test")}
    parts = [{record.id for record in read_refer(find_refer(drawn), part)} for part in ("testA", "testB")]
    assert whole == parts[0] | parts[1]
    relational = [phrase for phrases in RELATION_WORDS.values() for phrase in phrases]
    for part, expected in (("testA", False), ("testB", True)):
        for record in read_refer(find_refer(drawn), part):
            assert any(f" {phrase} the " in record.sent for phrase in relational) is expected, record.sent


def test_ids_and_counts(drawn: Path) -> None:
    content = json.loads((drawn / "refcoco" / "instances.json").read_text())
    summary = json.loads((drawn / "scenes.json").read_text())["counts"]
    records = list(records_of(drawn))
    assert len({record.id for record in records}) == len(records)
    assert {str(image["id"]) for image in content["images"]} == {record.images[0] for record in records}
    assert len({one["id"] for one in content["annotations"]}) == len(content["annotations"])
    assert sum(summary[split]["referring_sentences"] for split in summary) == len(records)
    by_image = Counter(record.images[0] for record in records)
    assert max(by_image.values()) <= REFERENCES * SENTENCES
    by_reference = Counter(record.reference for record in records)
    assert set(by_reference.values()) == set(range(1, SENTENCES + 1))


def test_files_do_not_depend_on_processes_and_others_do_not_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"images": 12, "train": 0.5, "val": 0.25}
    for processes in (1, 2):
        write_scenes(tmp_path / str(processes), ScenesConfig(processes=processes, **config))  # type: ignore[arg-type]
    own = {Path("refcoco/instances.json"), Path("refcoco/refs(unc).p")}
    one, two = (read_all(tmp_path / str(processes)) for processes in (1, 2))
    assert one == two
    assert own < one.keys()
    monkeypatch.setattr(write, "TASKS", ())
    write_scenes(tmp_path / "bare", ScenesConfig(**config))  # type: ignore[arg-type]
    bare = read_all(tmp_path / "bare")
    shared = bare.keys() - {Path("scenes.json")}
    assert own.isdisjoint(bare)
    assert all(bare[name] == one[name] for name in shared)


def read_all(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def candidates_of(folder: Path) -> dict[str, list[tuple[float, ...]]]:
    """Boxes of every object of each image, in the order of the file."""
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for one in json.loads((folder / "refcoco" / "instances.json").read_text())["annotations"]:
        found[str(one["image_id"])].append(tuple(one["bbox"]))
    return found


def place_of(box: Any, size: int) -> tuple[int, ...]:
    """Cell of the centre in a grid of 3 x 3, and the third of the area."""
    x, y, width, height = box
    area = np.searchsorted([0.02, 0.05], width * height / size**2)
    return int(3 * (x + width / 2) / size), int(3 * (y + height / 2) / size), int(area)


def test_place_and_size_alone_stay_near_chance(drawn: Path) -> None:
    """What a prior over places and sizes of referred objects, learned from all training sentences, chooses."""
    boxes = candidates_of(drawn)
    train, test = (read_refer(find_refer(drawn), split) for split in ("train", "test"))
    asked: Counter[tuple[int, ...]] = Counter()
    shown: Counter[tuple[int, ...]] = Counter()
    for record in train:
        size = record.size[0]  # type: ignore[index]
        asked[place_of(record.box, size)] += 1
        shown.update(place_of(box, size) for box in boxes[record.images[0]])
    share = {place: asked[place] / number for place, number in shown.items()}
    hits, chance = [], []
    for record in test:
        own, size = boxes[record.images[0]], record.size[0]  # type: ignore[index]
        best = max(own, key=lambda box: share.get(place_of(box, size), 0))
        hits.append(best == record.box)
        chance.append(1 / len(own))
    assert len(test) > 150
    assert np.mean(hits) < np.mean(chance) + 0.09, (np.mean(hits), np.mean(chance))


def test_words_alone_stay_near_chance(drawn: Path) -> None:
    """Naive Bayes from words and pairs of words to the number of the object among those of its image."""
    boxes = candidates_of(drawn)
    train, test = (read_refer(find_refer(drawn), split) for split in ("train", "test"))

    def features(record: ReferringRecord) -> list[Any]:
        return [*record.tokens, *pairwise(record.tokens)]

    def number_of(record: ReferringRecord) -> int:
        return boxes[record.images[0]].index(record.box)  # type: ignore[arg-type]

    number = max(map(len, boxes.values()))
    vocabulary = {feature: place for place, feature in enumerate({f: 0 for one in train for f in features(one)})}
    counts, prior = np.ones((number, len(vocabulary))), np.ones(number)
    for record in train:
        prior[number_of(record)] += 1
        for feature in features(record):
            counts[number_of(record), vocabulary[feature]] += 1
    weights = np.log(counts / counts.sum(1, keepdims=True))
    hits, chance = [], []
    for record in test:
        known = [vocabulary[feature] for feature in features(record) if feature in vocabulary]
        allowed = len(boxes[record.images[0]])
        scores = (np.log(prior) + weights[:, known].sum(1))[:allowed]
        hits.append(int(scores.argmax()) == number_of(record))
        chance.append(1 / allowed)
    assert np.mean(hits) < np.mean(chance) + 0.09, (np.mean(hits), np.mean(chance))
