"""Captions of drawn scenes in Karpathy's layout: five, true, different, and of their scene alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.data.annotations.captions import read_karpathy
from visling.data.text import TextLayout, Tokenizer
from visling.scenes import ScenesConfig, write_scenes
from visling.scenes.world import VALUES
from visling.tasks.base import read_records
from visling.tasks.retrieval import Retrieval
from visling.types import InputSpec

SPLITS = ("train", "val", "test")
_THING = re.compile(rf"an? ({'|'.join(VALUES['size'])}) (\w+) (\w+) ({'|'.join(VALUES['shape'])})")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "data"
    write_scenes(out, ScenesConfig(images=400, seed=5, questions_per_image=0, statements_per_image=0))
    return out


def objects_of(folder: Path, split: str) -> dict[str, Counter[tuple[str, ...]]]:
    """Image -> its objects as size, colour, texture and shape, from the instances file alone."""
    content = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
    shapes = {category["id"]: category["name"] for category in content["categories"]}
    names = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
    found: dict[str, Counter[tuple[str, ...]]] = {name: Counter() for name in names.values()}
    for one in content["annotations"]:
        colour, size, texture = one["attributes"]
        found[names[one["image_id"]]][size, colour, texture, shapes[one["category_id"]]] += 1
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_five_true_captions_that_fit_hardly_any_other_scene(folder: Path, split: str) -> None:
    objects = objects_of(folder, split)
    captions = read_karpathy(folder / "karpathy" / f"dataset_scenes_{split}.json", split)
    assert Counter(Counter(record.images[0] for record in captions.records).values()) == {5: len(objects)}
    assert captions.empty == captions.repeated == captions.surplus == captions.listed_twice == 0
    fitting = []
    for record in captions.records:
        named = Counter(_THING.findall(record.caption))
        assert 2 <= named.total() <= 4, record.caption
        assert named <= objects[record.images[0]], f"not true: {record.caption}"
        fitting.append(sum(named <= other for other in objects.values()))
    assert np.mean(np.array(fitting) == 1) > 0.97


def test_ids_are_of_one_split_and_words_are_known(folder: Path) -> None:
    records = read_records(Retrieval(), folder, "train+val+test")
    assert len(records) == 5 * 400
    assert len({(record.images[0], record.caption) for record in records}) == len(records)
    for name in ("scenes", "bert-base-uncased"):
        tokenizer = Tokenizer(name)
        assert not any(tokenizer.unk in tokenizer.encode(record.caption) for record in records)
    longest = max(len(tokenizer.encode(record.caption)) for record in records)
    assert longest + 2 <= 64, "the presets for scenes read whole captions"


class Words:
    """Naive Bayes over words and pairs of words: is a caption the right one of an example?"""

    def __init__(self, captions: list[tuple[str, int]]) -> None:
        self.counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        for text, label in captions:
            self.counts[label].update(self.parts(text))

    @staticmethod
    def parts(text: str) -> list[str]:
        words = text.split()
        return [*words, *(f"{a} {b}" for a, b in pairwise(words))]

    def score(self, text: str) -> float:
        wrong, right = self.counts
        totals = wrong.total(), right.total()
        odds = [
            np.log((right[part] + 1) / totals[1]) - np.log((wrong[part] + 1) / totals[0]) for part in self.parts(text)
        ]
        return float(np.mean(odds))


def test_words_alone_do_not_tell_the_right_caption(folder: Path) -> None:
    """A right caption and the wrong one that is drawn for it: 50 % by chance."""

    def drawn(split: str) -> list[tuple[str, str]]:
        task = Retrieval()
        records = task.records(folder, split)
        task.setup(records)
        tokenizer, rng = Tokenizer("scenes"), np.random.default_rng(0)
        layout = TextLayout(tokenizer, InputSpec(vocabulary="scenes"))
        rows = [task.example(record, layout, rng).rows for record in records]
        return [(tokenizer.decode(right.ids), tokenizer.decode(wrong.ids)) for right, wrong, _, _ in rows]

    train: list[tuple[str, int]] = [pair for right, wrong in drawn("train") for pair in ((right, 1), (wrong, 0))]
    model, pairs = Words(train), drawn("val") + drawn("test")
    hits = [float(np.sign(model.score(right) - model.score(wrong)) + 1) / 2 for right, wrong in pairs]
    assert len(hits) == 400
    assert abs(np.mean(hits) - 0.5) < 0.1


def test_an_image_does_not_depend_on_the_others(folder: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "few", ScenesConfig(images=10, seed=5, questions_per_image=3))
    task: Any = Retrieval()
    few = {record.id: record.caption for record in read_records(task, tmp_path / "few", "train+val+test")}
    all_of = {record.id: record.caption for record in read_records(task, folder, "train+val+test")}
    assert few.items() <= all_of.items()
    assert len(few) == 50
