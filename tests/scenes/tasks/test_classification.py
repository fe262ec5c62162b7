"""Labelled texts about scenes: labels checked against the annotated objects; neither words nor pictures alone give them
away."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from visling.data.annotations.classification import LabelledText
from visling.data.text import Tokenizer
from visling.scenes.world import VALUES
from visling.tasks.classification import Classification

SPLITS = ("train", "val", "test")
VALUE_OF = {value: name for name, values in VALUES.items() for value in values}
MARGIN = 0.08 * 128


def records(written: Any, split: str, *folders: str) -> list[LabelledText]:
    return Classification().records(written.folder.joinpath(*folders), split)


def number_of(record: LabelledText) -> int:
    return int(record.images[0].rpartition("_")[2])


def fitting(objects: list[dict[str, Any]], phrase: str) -> list[dict[str, Any]]:
    traits = {VALUE_OF[word]: word for word in phrase.split() if word in VALUE_OF}
    return [one for one in objects if all(one[name] == value for name, value in traits.items())]


def judge(sentence: str, objects: list[dict[str, Any]]) -> bool:
    """The truth of a sentence, by reading it."""
    if match := re.fullmatch(r"there is (?:no|an?) (.+) here", sentence):
        return bool(fitting(objects, match[1])) != sentence.startswith("there is no ")
    match = re.fullmatch(r"the (.+) is (?:to the )?(left of|right of|above|below) the (.+)", sentence)
    assert match, f"no rule reads {sentence!r}"
    (first,), (second,) = fitting(objects, match[1]), fitting(objects, match[3])
    (x1, y1), (x2, y2) = (((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in (first["box"], second["box"]))
    ahead = {"left of": x2 - x1, "right of": x1 - x2, "above": y2 - y1, "below": y1 - y2}[match[2]]
    assert abs(ahead) >= MARGIN - 1
    return ahead > 0


def test_labels_are_true_of_the_annotated_objects(written: Any) -> None:
    for split in SPLITS:
        objects = written.objects(split)
        for record in records(written, split):
            assert record.labels == (str(int(judge(record.text, objects[number_of(record)]))),), record
            assert (written.folder / "images" / split / f"{record.images[0]}.png").is_file()


def test_several_labels_are_the_shapes_asked_for(written: Any) -> None:
    sizes: Counter[int] = Counter()
    for split in SPLITS:
        objects = written.objects(split)
        for record in records(written, split, "classification", "multilabel"):
            (value,) = [word for word in re.findall(r"\w+", record.text) if word in VALUE_OF]
            shapes = {one["shape"] for one in fitting(objects[number_of(record)], value)}
            assert set(record.labels or ()) == shapes
            assert record.several
            sizes[len(shapes)] += 1
    assert sizes[1]
    assert len(sizes) > 3


def test_pictures_alone_give_nothing_away(written: Any) -> None:
    by_picture: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in records(written, "train"):
        by_picture[record.images[0]].update(record.labels or ())
    assert all(labels["0"] == labels["1"] for labels in by_picture.values())


def features_of(text: str) -> Iterable[str]:
    """Words, and pairs of words wherever they stand."""
    words = re.findall(r"\w+", text)
    yield from words
    yield from (f"{a} {b}" for number, a in enumerate(words) for b in words[number + 1 :])


def train_naive_bayes(examples: Iterable[tuple[str, str]]) -> Callable[[str], str]:
    """The best label of a text by the words that it has."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    totals: Counter[str] = Counter()
    for text, label in examples:
        counts[label].update(set(features_of(text)))
        totals[label] += 1

    def predict(text: str) -> str:
        present = set(features_of(text))

        def score(label: str) -> float:
            return sum(math.log((counts[label][word] + 1) / (totals[label] + 2)) for word in present)

        return max(sorted(totals), key=score)

    return predict


def is_star(record: LabelledText) -> str:
    """One of the several labels."""
    return str("star" in (record.labels or ()))


def test_words_alone_give_little_away(written: Any) -> None:
    train, unseen = records(written, "train"), [*records(written, "val"), *records(written, "test")]
    predict = train_naive_bayes((record.text, (record.labels or ("",))[0]) for record in train)
    right = sum(record.labels == (predict(record.text),) for record in unseen) / len(unseen)
    assert len(unseen) > 300
    assert 0.4 < right < 0.6
    several = ("classification", "multilabel")
    guess = train_naive_bayes((record.text, is_star(record)) for record in records(written, "train", *several))
    asked = [record for split in ("val", "test") for record in records(written, split, *several)]
    share = sum(is_star(record) == "False" for record in asked) / len(asked)
    found = sum(is_star(record) == guess(record.text) for record in asked) / len(asked)
    assert found < share + 0.1, "the words say whether there is a star"


def test_every_word_is_one_piece(written: Any) -> None:
    tokenizer = Tokenizer("scenes")
    for folders in ((), ("classification", "multilabel")):
        for record in records(written, "train", *folders):
            words = re.findall(r"\w+|[^\w\s]", record.text)
            assert len(tokenizer.encode(record.text)) == len(words), record.text


def test_counts_are_in_the_summary(written: Any) -> None:
    for split in SPLITS:
        counts = written.summary["counts"][split]
        assert counts["classification_sentences"] == len(records(written, split))
        assert counts["classification_questions"] == counts["images"]
