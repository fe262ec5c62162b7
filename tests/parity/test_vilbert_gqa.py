"""GQA as ViLBERT's multi-task release reads and trains on it (`golden/vilbert_tasks/gqa`): prepared caches, rows, one
step with the recorded weights.

The recorded rows begin with the whole image; ours leave it to the model, which averages the regions it is shown, while
the release averages all regions of the image: the two agree where no region was cut, and the test checks the recorded
row against all regions otherwise. Boxes that leave the image are clipped in a batch and not in the recording, so rows
are compared after clipping and the step is made with the recorded rows. The release turns ids into numbers and loses
leading zeros, which we keep. It holds out 3,000 questions; the recording says how many it held out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_vilbert import MultiTask
from test_vilbert import Recording as Weights
from torch.testing import assert_close

from visling.data.annotations import gqa as annotations
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.runtime import generator_for
from visling.tasks.gqa import GQA, GqaConfig
from visling.types import Batch, InputSpec, RegionArray, Regions, Targets, Text

ROWS = ("train", "trainval", "minval", "trainval_clean", "test")
SPLITS = {"test": "testdev"}
"""What the release calls a split -> its file's name."""


@dataclass(frozen=True)
class Recording:
    """The recorded set."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "gqa" / "data"

    def json(self, name: str) -> Any:
        return json.loads((self.folder / "gqa" / f"{name}.json").read_text())

    def arrays(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        return dict(np.load(self.folder / "gqa" / f"{name}.npz"))

    def regions(self) -> dict[str, RegionArray]:
        stored = np.load(self.data / "features.npz")
        return {
            name.removesuffix("/size"): RegionArray(
                features=stored[name.replace("/size", "/features")],
                boxes=stored[name.replace("/size", "/boxes")],
                size=(int(stored[name][1]), int(stored[name][0])),
            )
            for name in stored
            if name.endswith("/size")
        }


@pytest.fixture
def recording(golden: Path, monkeypatch: pytest.MonkeyPatch) -> Recording:
    recording = Recording(golden / "vilbert_tasks")
    monkeypatch.setattr(annotations, "NUM_MINVAL", len(recording.json("rows_mt_minval")["rows"]))
    return recording


def task_of(recording: Recording) -> GQA:
    """With the release's answers."""
    listed = recording.json("rows_mt_train")["label2ans"]
    task = GQA(GqaConfig(answers=recording.data / "gqa" / "cache" / "trainval_label2ans.pkl"))
    assert list(task.answers) == listed
    return task


@pytest.fixture
def store(recording: Recording, tmp_path: Path) -> NativeStore:
    regions = recording.regions()
    width = next(iter(regions.values())).features.shape[1]
    with StoreWriter(tmp_path / "store", feature_size=width, fingerprint="recorded", dtype="float32") as writer:
        for name, array in regions.items():
            writer.add(name, array)
    return NativeStore.open(tmp_path / "store")


@pytest.mark.parametrize("split", ROWS)
def test_rows(recording: Recording, store: NativeStore, split: str) -> None:
    rows, arrays, task = recording.json(f"rows_mt_{split}"), recording.arrays(f"rows_mt_{split}"), task_of(recording)
    records = list(task.records(recording.data, SPLITS.get(split, split)))
    assert [int(record.id) for record in records] == [row["question_id"] for row in rows["rows"]]
    assert [int(record.id) for record in records] == arrays["id"].tolist()
    assert [record.question for record in records] == [row["question"] for row in rows["rows"]]
    assert [record.images[0] for record in records] == [row["image_id"] for row in rows["rows"]]
    tokenizer = Tokenizer(str(recording.folder / "vocab.txt"))
    spec = InputSpec(
        feature_size=store.feature_size, max_tokens=rows["max_seq_length"], max_regions=rows["max_region_num"] - 1
    )
    layout = TextLayout(tokenizer, spec)
    rngs = [generator_for(0) for _ in records]
    examples = [task.example(record, layout, rng) for record, rng in zip(records, rngs, strict=True)]
    batch, targets = Collator(store, spec, tokenizer)(examples, rngs)
    batch.validate()
    length = batch.text.ids.shape[1]
    for ours, theirs in (
        (batch.text.ids, "tokens"),
        (batch.text.mask, "input_mask"),
        (batch.text.segments, "segment_ids"),
    ):
        assert ours.long().tolist() == arrays[theirs][:, :length].tolist(), theirs
        assert not arrays[theirs][:, length:].any(), theirs
    assert batch.regions is not None
    mask = batch.regions.mask
    count = mask.shape[1]
    assert mask.long().tolist() == arrays["image_mask"][:, 1 : 1 + count].tolist()
    assert arrays["image_mask"][:, 0].all()
    assert not arrays["image_mask"][:, 1 + count :].any()
    features, boxes = torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["spatials"])
    assert_close(batch.regions.features, features[:, 1 : 1 + count], rtol=0, atol=1e-6)
    assert_close(batch.regions.boxes[mask], boxes[:, 1 : 1 + count, :4].clamp(0, 1)[mask], rtol=0, atol=1e-6)
    assert_close(boxes[:, 0], torch.tensor([0.0, 0, 1, 1, 1]).expand(len(boxes), 5), rtol=0, atol=0)
    for number, record in enumerate(records):
        mean = recording.regions()[record.images[0]].features.mean(0)
        np.testing.assert_allclose(arrays["features"][number, 0], mean, rtol=0, atol=1e-6)
    if records[0].answer is None:
        assert not arrays["target"].any()
        assert targets.answer is None
    else:
        assert targets.answer is not None
        assert_close(targets.answer, torch.from_numpy(arrays["target"]), rtol=0, atol=0)


def test_ids_keep_their_zeros_and_are_sorted_as_text(recording: Recording) -> None:
    records = task_of(recording).records(recording.data, "train")
    ids = records.ids()
    assert ids == sorted(ids)
    assert [str(int(number)) for number in ids] != ids, "the recording has an id with a leading zero"


def recorded_batch(recording: Recording, name: str, task: int) -> Batch:
    """The rows as the release fed them to its model."""
    rows = {key: torch.from_numpy(array) for key, array in recording.arrays(name).items()}
    return Batch(
        text=Text(
            ids=rows["tokens"],
            mask=rows["input_mask"].bool(),
            segments=rows["segment_ids"],
            task=torch.full((len(rows["tokens"]),), task),
        ),
        regions=Regions(
            features=rows["features"][:, 1:],
            boxes=rows["spatials"][:, 1:, :4],
            mask=rows["image_mask"][:, 1:].bool(),
            size=torch.ones(len(rows["tokens"]), 2),
            whole=rows["features"][:, 0],
        ),
    )


def test_one_step(recording: Recording, golden: Path) -> None:
    step, task = recording.json("step_mt"), task_of(recording)
    batch = recorded_batch(recording, "rows_mt_train", int(step["task_id_used"].removeprefix("TASK")))
    scores = torch.from_numpy(recording.arrays("rows_mt_train")["target"])
    model = MultiTask(Weights(golden / "vilbert"))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    logits = model.heads["classifier_gqa"](model.encoder(batch).pooled)
    loss = task.loss({"classify": logits}, Targets(answer=scores))
    assert_close(loss.value, torch.tensor(step["train_loss"]), rtol=1e-5, atol=0)
    assert_close(loss.value, torch.tensor(step["val_loss"]), rtol=1e-5, atol=0)
    reached, count = loss.parts["answer_accuracy"]
    assert count == step["val_batch_size"]
    assert_close(reached / count, torch.tensor(step["train_score"]), rtol=1e-6, atol=0)
    assert_close(reached, torch.tensor(step["val_score_sum"]), rtol=1e-6, atol=0)
    loss.value.backward()  # type: ignore[no-untyped-call]
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    assert_close(torch.stack(norms).norm(), torch.tensor(step["grad_total_norm"]), rtol=1e-4, atol=0)


def test_predictions_of_the_step(recording: Recording, golden: Path) -> None:
    step, task = recording.json("step_mt"), task_of(recording)
    batch = recorded_batch(recording, "rows_mt_train", int(step["task_id_used"].removeprefix("TASK")))
    model = MultiTask(Weights(golden / "vilbert"))
    with torch.inference_mode():
        logits = model.heads["classifier_gqa"](model.encoder(batch).pooled)
    predictions = task.decode({"classify": logits}, batch, list(task.records(recording.data, "train")))
    submission = [{**row, "questionId": str(int(row["questionId"]))} for row in task.submission(predictions)]
    assert submission == step["evaluation"]["results"], "but for leading zeros, which the release loses"
