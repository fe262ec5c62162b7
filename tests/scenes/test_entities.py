"""Phrases about scenes in Flickr30K Entities' files: what they name is in their boxes, and the words alone do not say
where that is."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from visling.data.annotations.entities import EntitiesRecord, Phrase, read_boxes, read_entities, read_sentences
from visling.runtime import generator_for
from visling.scenes.language import NUMBERS, plural
from visling.scenes.tasks.entities import FOLDER, MOST_PHRASES, SENTENCES, WRITER
from visling.scenes.world import SHAPES, VALUES, Item, Scene, sample_items
from visling.tasks.grounding import PhraseGrounding

SPLITS = ("train", "val", "test")
SINGULAR = {plural(noun): noun for noun in (*SHAPES, "thing", "object")}


def records(written: Any, split: str) -> list[EntitiesRecord]:
    return PhraseGrounding().records(written.folder, split)


def objects_by_image(written: Any, split: str) -> dict[str, list[dict[str, Any]]]:
    return {f"scene_{image:012d}": objects for image, objects in written.objects(split).items()}


def box_of(one: dict[str, Any]) -> tuple[float, ...]:
    """Corners from 1 on, both inside, of a box whose end is the first pixel after it."""
    x1, y1, x2, y2 = one["box"]
    return x1 + 1, y1 + 1, x2, y2


def traits_in(phrase: str) -> dict[str, str]:
    """The traits that a phrase names."""
    words = [SINGULAR.get(word, word) for word in phrase.split()]
    return {name: word for name, values in VALUES.items() for word in words if word in values}


@pytest.mark.parametrize("split", SPLITS)
def test_the_boxes_of_a_phrase_are_those_of_all_objects_that_fit(written: Any, split: str) -> None:
    objects = objects_by_image(written, split)
    several = 0
    for record in records(written, split):
        for phrase in record.phrases:
            traits = traits_in(phrase.text)
            assert traits, phrase.text
            fitting = [
                one for one in objects[record.images[0]] if all(one[name] == value for name, value in traits.items())
            ]
            assert sorted(phrase.boxes or ()) == sorted(map(box_of, fitting)), (record.id, phrase.text)
            first, last = phrase.text.split()[0], phrase.text.split()[-1]
            assert (last in SINGULAR) == (len(fitting) > 1)
            assert first in ("the", NUMBERS[len(fitting)])
            several += len(fitting) > 1
    assert several > 10


def test_official_layout(written: Any) -> None:
    folder = written.folder / FOLDER
    kinds: Counter[str] = Counter()
    for split in SPLITS:
        images = (folder / f"{split}.txt").read_text(encoding="utf-8").split()
        assert images == sorted(objects_by_image(written, split))
        counts = written.summary["counts"][split]
        found = read_entities(written.folder, split)
        assert len(found.records) == counts["grounding_sentences"] == SENTENCES * len(images)
        assert sum(len(record.phrases) for record in found.records) == counts["grounding_phrases"]
        assert found.unboxed_phrases > 0, "the picture as a whole, and words that name nothing"
        for image in images:
            sentences = [sentence for _, sentence in read_sentences(folder, image)]
            boxes = read_boxes(folder / "Annotations" / f"{image}.xml")
            chains: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
            for sentence in sentences:
                for phrase in sentence.phrases:
                    kinds.update(phrase.types)
                    chains[phrase.chain].add(boxes.boxes.get(phrase.chain, ()))
            assert all(len(own) == 1 for own in chains.values())
            named = list(boxes.boxes.values())
            assert len(set(named)) == len(named), "phrases that name the same objects share a chain"
            assert boxes.scene == (str(100 * int(image[-12:])),)
    assert set(kinds) == {"other", "bodyparts", "clothing", "scene", "notvisual"}


def test_sentences_name_two_to_four_things(written: Any) -> None:
    lengths = Counter(len(record.phrases) for split in SPLITS for record in records(written, split))
    assert sum(lengths[number] for number in range(2, MOST_PHRASES + 1)) >= 0.99 * lengths.total()
    assert max(lengths) == MOST_PHRASES
    shared = [
        len({(phrase.chain, phrase.text) for phrase in own}) - len({phrase.chain for phrase in own})
        for own in _phrases_by_image(written)
    ]
    assert sum(shared) > 0, "one chain is named in several ways"


def _phrases_by_image(written: Any) -> Iterator[list[Phrase]]:
    by_image: dict[str, list[Phrase]] = defaultdict(list)
    for record in records(written, "train"):
        by_image[record.images[0]] += record.phrases
    yield from by_image.values()


CELLS = 3
"""Rows and columns of the grid of places that words are to predict."""


def cell_of(box: tuple[float, ...], size: tuple[int, int]) -> int:
    column, row = (
        min(int(CELLS * (low + high) / 2 / extent), CELLS - 1)
        for low, high, extent in zip(box[:2], box[2:], size, strict=True)
    )
    return CELLS * row + column


def features_of(record: EntitiesRecord, phrase: Phrase) -> set[str]:
    """Words and pairs of words of the phrase, and of its sentence."""
    found = set()
    for where, words in (("phrase", phrase.text.split()), ("sentence", record.sentence.split())):
        found |= {f"{where} {word}" for word in words} | {f"{where} {one} {two}" for one, two in pairwise(words)}
    return found


class NaiveBayes:
    """Log-odds of each place given words."""

    def __init__(self) -> None:
        self.places: Counter[int] = Counter()
        self.words: dict[str, Counter[int]] = defaultdict(Counter)

    def learn(self, features: set[str], place: int) -> None:
        self.places[place] += 1
        for word in features:
            self.words[word][place] += 1

    def score(self, features: set[str], place: int) -> float:
        seen = self.places[place]
        known = [self.words[word][place] for word in features if word in self.words]
        return math.log((seen + 1) / (self.places.total() + CELLS**2)) + sum(
            math.log((count + 1) / (seen + 2)) for count in known
        )


def test_the_words_alone_do_not_find_the_object(written: Any) -> None:
    """A classifier of words and word pairs ranks the objects of the picture by where they are."""
    model = NaiveBayes()
    for record in records(written, "train"):
        for phrase in record.phrases:
            for box in phrase.boxes or ():
                assert record.size is not None
                model.learn(features_of(record, phrase), cell_of(box, record.size))
    objects = objects_by_image(written, "test") | objects_by_image(written, "val")
    hits, chance, total = 0, 0.0, 0
    for record in [*records(written, "test"), *records(written, "val")]:
        boxes = [box_of(one) for one in objects[record.images[0]]]
        for phrase in record.phrases:
            assert record.size is not None
            size, features = record.size, features_of(record, phrase)
            scores = [model.score(features, cell_of(box, size)) for box in boxes]
            hits += boxes[scores.index(max(scores))] in (phrase.boxes or ())
            chance += len(phrase.boxes or ()) / len(boxes)
            total += 1
    assert total > 500
    assert hits / total < chance / total + 0.06, (hits / total, chance / total)


def test_a_position_is_no_answer_either(written: Any) -> None:
    task = PhraseGrounding()
    test = records(written, "test")
    for predictions in task.baselines(records(written, "train"), test).values():
        assert task.report(predictions, test).scores["recall_at_1"].value < 10


def scene(number: int, items: list[Item]) -> Scene:
    placed = [
        Item(shape=one.shape, color=one.color, size=one.size, texture=one.texture, box=(10 * k, 0, 10 * k + 8, 9))
        for k, one in enumerate(items)
    ]
    return Scene(image_id=number, size=128, items=tuple(placed))


def test_objects_that_are_all_alike() -> None:
    """There is one thing to name, all of them."""
    twin = Item(shape="star", color="red", size="small", texture="solid")
    described = WRITER.describe(scene(1, [twin, twin]), generator_for(0))
    for line in [sentence.marked_text for sentence in described.sentences]:
        assert line.count("[/EN#101/other") == 1
        assert " and " not in line
    assert described.phrases == SENTENCES
    assert described.annotation.count("<name>101</name>") == 2


def test_it_takes_well_under_three_milliseconds_a_scene() -> None:
    scenes = [scene(number, sample_items(generator_for(number), 3, 10)) for number in range(1, 101)]
    start = time.process_time()
    for one in scenes:
        WRITER.describe(one, generator_for(one.image_id))
    assert (time.process_time() - start) / len(scenes) < 0.003
