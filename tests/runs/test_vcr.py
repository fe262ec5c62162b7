"""VisualBERT's phase on VCR from files of its true layout: which regions names are linked to, what a run shows and
tells, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling import config as configs
from visling import models
from visling.data.batches.collate import Collator
from visling.data.corpora.reading import Corpora
from visling.data.corpora.vcr import VcrChoices
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError, StoreError
from visling.recipes.configs import PretrainConfig
from visling.recipes.tables import PUBLISHED_PRETRAINING
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.runs import pretrain as pretraining
from visling.runs.pretrain import read_corpora
from visling.runtime import generator_for
from visling.types import RegionArray

Files = Callable[..., Path]
OBJECTS = ((0, 0, 30, 30), (10, 10, 50, 40), (40, 0, 60, 60))
"""The objects of both pictures that the fixture `files` writes; their metadata says 40.4 where this says 40."""
WHOLE = (0, 0, 64, 64)


def store_of(path: Path, *, width: int = 16, **boxes: Sequence[tuple[int, ...]]) -> Path:
    """A store with the boxes of picture 1 (`first`) and picture 2 (`second`)."""
    rng = np.random.default_rng(0)
    with StoreWriter(path, feature_size=width, fingerprint="test") as writer:
        for image, key in (("1", "first"), ("2", "second")):
            corners = np.array(boxes.get(key, OBJECTS), np.float32)
            features = rng.standard_normal((len(corners), width)).astype(np.float16)
            writer.add(image, RegionArray(features=features, boxes=corners, size=(64, 64)))
    return path


def tiny(*settings: str) -> PretrainConfig:
    shared = ["encoder=tiny", "batch_size=4", "train.epochs=1", "train.max_steps=2", "train.log_every=1"]
    return configs.override(PUBLISHED_PRETRAINING["visualbert-vcr"](), [*shared, *settings])


def read(run: PretrainConfig, data: Path, store: Path) -> tuple[VcrChoices, Corpora]:
    layout = TextLayout(Tokenizer(), models.spec(run.model).inputs(run.encoder))
    found = read_corpora(run, [str(data)], layout, NativeStore.open(store), valid=False, answers=None)
    assert isinstance(found.examples, VcrChoices)
    return found.examples, found


def test_the_recipe_trains_end_to_end(files: Files, tmp_path: Path) -> None:
    data = files(tmp_path / "data", "vcr")
    files(data, "vcr", "val")
    run = tiny()
    store = store_of(tmp_path / "store", second=OBJECTS[:2])
    state = pretraining.pretrain(run, tmp_path / "run", data=[str(data)], store=store, device="cpu")
    assert state.step == 2
    told = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in told if line["kind"] == "train"]
    assert len(steps) == 2
    assert all(np.isfinite(line["loss"]) and line["parts"]["matching"] > 0 for line in steps)
    assert [np.isfinite(line["scores"]["matching"]) for line in told if line["kind"] == "valid"] == [True]
    notes = {line["message"] for line in told if line["kind"] == "event"}
    assert f"vcr of {data}: left out 1 questions with a sentence without a word, 1 repeated questions" in notes
    unlinked = "names are not linked to regions in 1 of 2 images, whose regions are not the objects of VCR's metadata"
    assert f"vcr of {data}: {unlinked}" in notes


@pytest.mark.parametrize(
    ("boxes", "start"),
    [
        (OBJECTS, 0),
        ((WHOLE, *OBJECTS), 1),
        ((*OBJECTS, WHOLE), None),
        (OBJECTS[::-1], None),
        (OBJECTS[:2], None),
        ((WHOLE, WHOLE, *OBJECTS), None),
        ((*OBJECTS[:2], (42, 0, 60, 60)), None),
    ],
    ids=["objects", "whole image first", "whole image last", "other order", "too few", "too many", "another box"],
)
def test_names_are_linked_where_regions_are_the_objects(
    files: Files, tmp_path: Path, boxes: Sequence[tuple[int, ...]], start: int | None
) -> None:
    data = files(tmp_path / "data", "vcr")
    source, found = read(tiny(), data, store_of(tmp_path / "store", first=boxes))
    # "why is casey here? [SEP] casey pets dog": objects 0, 0 and 1.
    links = [region for _, region in source.example(1, generator_for(0)).rows[0].links]
    assert links == ([] if start is None else [start, start, start + 1])
    assert source.example(9, generator_for(0)).rows[0].links, "picture 2 has its objects"
    assert any("names are not linked" in note for note in found.notes) == (start is None)


def test_links_reach_the_model(files: Files, tmp_path: Path) -> None:
    source, _ = read(tiny(), files(tmp_path / "data", "vcr"), store_of(tmp_path / "store"))
    examples = [source.example(index, generator_for(0)) for index in (1, 5)]
    tokenizer, store = Tokenizer(), NativeStore.open(tmp_path / "store")
    spec = replace(source.layout.spec, feature_size=16)
    batch, targets = Collator(store, spec, tokenizer)(examples, [generator_for(0)] * 2)
    batch.validate()
    assert batch.links is not None
    assert batch.links[0].nonzero().tolist() == [[3, 0], [7, 0], [9, 1]]
    named = [
        (tokenizer.tokens([int(batch.text.ids[1, at])])[0], region) for at, region in batch.links[1].nonzero().tolist()
    ]
    assert named == [("casey", 0), ("casey", 0), ("dog", 1), ("casey", 2), ("dog", 1)], "person 2 is named anew"
    assert targets.matched is not None
    assert targets.matched.tolist() == [1, 0]


def test_the_mistakes_of_the_release_are_settings(files: Files, tmp_path: Path) -> None:
    data, store = files(tmp_path / "data", "vcr"), store_of(tmp_path / "store")
    plain, _ = read(tiny(), data, store)
    assert (plain.same_choice, plain.word_links) == (False, False)
    released, _ = read(tiny('corpora=[{kind = "vcr", same_choice = true, word_links = true}]'), data, store)
    assert {released.example(index, generator_for(0)).id for index in range(len(released))} == {
        "train-0:0",
        "train-1:1",
    }
    assert released.word_links
    for setting in ("same_choice", "word_links"):
        with pytest.raises(ConfigError, match=f"{setting} is a setting of vcr; found it with captions"):
            tiny(f'corpora=[{{kind = "captions", {setting} = true}}]')


def lines(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change every line of a file."""
    rows = [json.loads(line) for line in file.read_text().splitlines() if line]
    for row in rows:
        change(row)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_a_run_refuses(files: Files, tmp_path: Path) -> None:
    data, store = files(tmp_path / "data", "vcr"), store_of(tmp_path / "store")
    lines(data / "train.jsonl", lambda row: row.pop("answer_label"))
    with pytest.raises(DataError, match="'train-0' has no labels"):
        read(tiny(), data, store)
    lines(files(data, "vcr") / "train.jsonl", lambda row: row.update(question=[[3]]))
    with pytest.raises(DataError, match=r"line 1: question names object 3"):
        read(tiny(), data, store)
    (files(data, "vcr") / "vcr1images" / "movie_2" / "2.json").unlink()
    with pytest.raises(DataError, match=r"question 'train-1' of VCR has no metadata .*movie_2/2\.json"):
        read(tiny(), data, store)
    with StoreWriter(tmp_path / "other", feature_size=16, fingerprint="test") as writer:
        writer.add(
            "1", RegionArray(features=np.zeros((3, 16), np.float16), boxes=np.array(OBJECTS, np.float32), size=(64, 64))
        )
    with pytest.raises(StoreError, match=r"example 'train-1' needs image '2'"):
        read(tiny(), files(data, "vcr"), tmp_path / "other")
    run = PUBLISHED_PRETRAINING["visualbert-vcr"]()
    with pytest.raises(StoreError, match="holds features of width 16; recipe visualbert-vcr reads 512"):
        pretraining.pretrain(run, tmp_path / "run", data=[str(files(data, "vcr", "val"))], store=store, device="cpu")
