"""The examples of a run are those that evaluation reads, of a run, a model folder, a pre-trained model and files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.tiny_models import save_tiny_model

from visling.analysis.encoded_rows import encode_shown
from visling.errors import CheckpointError, ConfigError, DataError, RunError
from visling.runs.evaluate import evaluate
from visling.runs.examples import open_run


def test_the_examples_are_those_of_the_evaluation(world: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world.vqa, tmp_path / "run"))
    evaluate(run, split="val", device="cpu")
    details = [json.loads(line) for line in (run / "details_val.jsonl").read_text().splitlines()]
    opened = open_run(run, split="val", device="cpu")
    assert opened.model is not None
    found = []
    for shown in opened.batches(batch_size=5):
        assert [record.id for record in shown.records] == [example.id for example in shown.examples]
        assert [opened.records[number] for number in shown.numbers] == shown.records
        with torch.no_grad():
            logits = opened.model(shown.batch)
        found += opened.task.decode(logits, shown.batch.unshared(), shown.records)
    assert [(p.id, p.value) for p in found] == [(row["id"], row["prediction"]) for row in details]
    assert [p.confidence for p in found] == pytest.approx([row["confidence"] for row in details], abs=1e-4)


def test_batches_begin_anywhere_and_stop_at_a_limit(world: Any) -> None:
    opened = open_run(world.vqa, split="val", device="cpu", limit=7)
    assert [list(shown.numbers) for shown in opened.batches(batch_size=3, first=2)] == [[2, 3, 4], [5, 6]]
    with pytest.raises(ConfigError, match="at least 1; found 0"):
        open_run(world.vqa, split="val", device="cpu", limit=0)


def test_regions_are_named_by_the_store(world: Any) -> None:
    opened = open_run(world.vqa, split="val", device="cpu", limit=2)
    (shown,) = opened.batches(batch_size=2)
    assert opened.store is not None
    assert opened.class_names == opened.store.class_names
    for record, regions in zip(shown.records, shown.regions, strict=True):
        assert [len(one) for one in regions] == [opened.store.count(image) for image in record.images]


def test_a_pretrained_model_reads_captions(world: Any) -> None:
    opened = open_run(world.pretrained, split="val", device="cpu")
    images = json.loads((world.scenes / "karpathy" / "dataset_scenes_val.json").read_text())["images"]
    assert opened.model is None
    found = [(*record.images, record.caption) for record in opened.records]  # type: ignore[attr-defined]
    captions = [(Path(image["filename"]).stem, one["raw"]) for image in images for one in image["sentences"]]
    assert sorted(found) == sorted(captions)
    (shown, *_) = opened.batches(batch_size=4)
    rows = encode_shown(opened.encoder, shown, tokenizer=opened.inputs.tokenizer)
    words = [word.text for word in rows[0][0].words if not word.special]
    assert words == shown.records[0].caption.replace(".", " .").replace(",", " ,").lower().split()
    assert len(rows[0][0].regions) == len(shown.regions[0][0])


def test_a_model_folder_alone_needs_data_and_a_store(world: Any, tmp_path: Path) -> None:
    folder = save_tiny_model(world, "lxmert", tmp_path / "model")
    with pytest.raises(RunError, match=r"not a run folder, nor in one.*--data and --store"):
        open_run(folder, split="val", device="cpu")
    with pytest.raises(RunError, match=r"Give --store, or"):
        open_run(folder, split="val", data=world.scenes, device="cpu")
    assert len(open_run(folder, split="val", data=world.scenes, store=world.regions, device="cpu").records) == 12


def test_a_model_of_the_words_alone_is_shown_no_image(world: Any, tmp_path: Path) -> None:
    folder = save_tiny_model(world, "lxmert", tmp_path / "model", text_only=True)
    opened = open_run(folder, split="val", data=world.scenes, device="cpu")
    assert (opened.store, opened.class_names, opened.attribute_names) == (None, (), ())
    (shown,) = opened.batches(batch_size=12)
    assert shown.batch.regions is None
    assert list(shown.regions) == [[]] * 12


def test_examples_of_ones_own_are_read(world: Any, tmp_path: Path) -> None:
    picture = world.picture("val").stem
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"image": picture, "question": "what is it?", "answer": "star"}) + "\n")
    opened = open_run(world.vqa, split="test", file=file, device="cpu")
    assert [record.images for record in opened.records] == [(picture,)]


def test_what_is_not_there_is_named(world: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model in"):
        open_run(tmp_path, split="val", device="cpu")
    with pytest.raises(DataError, match="tset"):
        open_run(world.vqa, split="tset", device="cpu")
    with pytest.raises(CheckpointError, match="was not trained on several tasks"):
        open_run(world.vqa, split="val", task="vqa", device="cpu")
