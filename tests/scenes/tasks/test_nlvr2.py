"""Pairs of drawn pictures: the official layout, labels checked against the annotated objects, words that give nothing
away."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from visling.data.text import Tokenizer
from visling.scenes import ScenesConfig, write_scenes
from visling.scenes.language import NUMBERS
from visling.scenes.tasks.nlvr2 import PAIRS, SENTENCES, SHARE
from visling.scenes.world import VALUES
from visling.tasks.nlvr2 import NLVR2

SPLITS = {"train": "train", "dev": "val", "test1": "test"}


def test_the_official_layout(written: Any) -> None:
    for split in SPLITS:
        rows = written.lines(f"nlvr2/{split}.json")
        records = NLVR2().records(written.folder, split)
        assert [record.id for record in records] == [row["identifier"] for row in rows]
        assert all(row["label"] in ("True", "False") for row in rows)
        assert all(("directory" in row) == (split == "train") for row in rows)
        assert max(int(record.id.rpartition("-")[2]) for record in records) < 10, "VisualBERT cuts one digit off"
        for row, record in zip(rows, records, strict=True):
            folder = written.folder / "nlvr2" / "images" / split / str(row.get("directory", ""))
            for image in record.images:
                assert (folder / f"{image}.png").is_file()


def test_pictures_are_copies_of_few_scenes(written: Any) -> None:
    copies = sorted((written.folder / "nlvr2" / "images").rglob("*.png"))
    scenes = sorted((written.folder / "images").rglob("*.png"))
    assert 0 < len(copies) <= SHARE * len(scenes) + 2
    contents = {path.read_bytes() for path in scenes}
    assert all(path.read_bytes() in contents for path in copies)
    assert len({path.stem for path in copies}) == len(copies)
    assert not list((written.folder / "images").rglob("*img0*")), "what is extracted of the scenes stays the same"


def count(objects: list[dict[str, Any]], phrase: str) -> int:
    """Objects that a noun phrase describes."""
    values = {value: name for name, all_values in VALUES.items() for value in all_values}
    traits = {}
    for word in phrase.split():
        single = word if word in values else word.removesuffix("es" if word == "crosses" else "s")
        if single in values:
            traits[values[single]] = single
    return sum(all(one[name] == value for name, value in traits.items()) for one in objects)


def judge(sentence: str, left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    """The truth of a sentence, by reading it."""
    if match := re.fullmatch(r"the (left|right) picture has more (.+) than the (?:left|right) one", sentence):
        first, second = (left, right) if match[1] == "left" else (right, left)
        return count(first, match[2]) > count(second, match[2])
    if match := re.fullmatch(
        r"there are fewer (.+) in the (left|right) picture than in the (?:left|right) one", sentence
    ):
        first, second = (left, right) if match[2] == "left" else (right, left)
        return count(first, match[1]) < count(second, match[1])
    if match := re.fullmatch(r"the left and the right picture have the same number of (.+)", sentence):
        return count(left, match[1]) == count(right, match[1])
    if match := re.fullmatch(r"(each|only one|no) picture has an? (.+)", sentence):
        having = (count(left, match[2]) > 0) + (count(right, match[2]) > 0)
        return having == {"each": 2, "only one": 1, "no": 0}[match[1]]
    if match := re.fullmatch(r"there is an? (.+) in the left picture and an? (.+) in the right one", sentence):
        return count(left, match[1]) > 0 and count(right, match[2]) > 0
    match = re.fullmatch(r"there (?:is|are) (exactly|at least|at most) (\w+) (.+) in all", sentence)
    assert match, f"no rule reads {sentence!r}"
    total, said = count(left, match[3]) + count(right, match[3]), NUMBERS.index(match[2])
    return {"exactly": total == said, "at least": total >= said, "at most": total <= said}[match[1]]


def test_labels_are_true_of_the_annotated_objects(written: Any) -> None:
    kinds: Counter[str] = Counter()
    for split, own in SPLITS.items():
        by_content = {
            path.read_bytes(): int(path.stem.rpartition("_")[2])
            for path in (written.folder / "images" / own).glob("*.png")
        }
        pictures = {path.stem: path for path in (written.folder / "nlvr2" / "images" / split).rglob("*.png")}
        objects = written.objects(own)
        for record in NLVR2().records(written.folder, split):
            left, right = (objects[by_content[pictures[image].read_bytes()]] for image in record.images)
            assert judge(record.sentence, left, right) == record.label, record
            kinds[" ".join(record.sentence.split()[:2])] += 1
    assert len(kinds) >= 6, kinds


def test_every_sentence_is_true_of_half_of_its_pairs(written: Any) -> None:
    """So nothing that reads the sentence alone can do better than chance."""
    by_sentence: defaultdict[tuple[str, str, str], list[bool]] = defaultdict(list)
    sets: defaultdict[str, set[str]] = defaultdict(set)
    for record in NLVR2().records(written.folder, "train"):
        number, pair, sentence = record.id.split("-")[1:]
        by_sentence[number, sentence, record.sentence].append(bool(record.label))
        sets[number].add(pair)
    assert max(len(pairs) for pairs in sets.values()) == PAIRS
    assert len(by_sentence) > 0.8 * SENTENCES * len(sets)
    for key, labels in by_sentence.items():
        if len(labels) % 2 == 0:
            assert sum(labels) == len(labels) / 2, key
    assert len({text for _, _, text in by_sentence}) > 0.5 * len(by_sentence)


def test_every_word_is_one_piece(written: Any) -> None:
    tokenizer = Tokenizer("scenes")
    for record in NLVR2().records(written.folder, "train"):
        assert len(tokenizer.encode(record.sentence)) == len(record.sentence.split()), record.sentence


@pytest.mark.parametrize("images", [2, 5])
def test_few_scenes_give_one_pair_or_none(tmp_path: Path, images: int) -> None:
    summary = write_scenes(tmp_path / "data", ScenesConfig(images=images, train=0.8, val=0.0))
    counts = {split: summary["counts"][split]["nlvr2_pairs"] for split in ("train", "val", "test")}
    assert counts == {"train": 1, "val": 0, "test": 0}
    rows = [json.loads(line) for line in (tmp_path / "data" / "nlvr2" / "train.json").read_text().splitlines()]
    labels = Counter(row["label"] for row in rows)
    assert abs(labels["True"] - labels["False"]) <= 1
