"""Referring expressions as ViLBERT's two releases read, label, learn and score them (`golden/vilbert_tasks/refer`; the
README beside it describes every file; weights are those of `golden/vilbert`).

Compared for every recorded split and length: expressions and their order, word pieces, features, boxes, masks and
targets of the rows, cleaned training sets, the training loss with the gradient of every weight, and the rows that are
chosen. What is kept elsewhere is converted: the release's row 0 is the whole image, which stands last in our logits.

By design, ours differs where the recording does so: boxes that leave the image are cut to it (locations are compared
after cutting, losses computed on the recorded ones); the first release loses [SEP] of a long text; the whole image's
feature is the mean of the detector's regions there, here of all that are shown, and is taken from the recording where
a loss is compared; overlaps outside training keep values below 0.5 in the release, which only its loss of validation
sees: here validation reports no loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_vilbert import MultiTask, batch_of, candidates
from test_vilbert import Recording as Weights
from torch import Tensor
from torch.testing import assert_close

from visling.data.annotations.image_lists import without_images
from visling.data.annotations.referring import ReferringRecord
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.metrics.grounding import THRESHOLD, overlap
from visling.models import spec
from visling.tasks.base import TaskSource
from visling.tasks.referring import WHOLE, Referring, ReferringConfig
from visling.types import IGNORE, Batch, InputSpec, RegionArray, Targets

SETTINGS = {**spec("vilbert").tasks["referring"], "rule": "strict"}


class Store(dict[str, RegionArray]):
    """A region store in memory."""

    fingerprint = "recorded"
    feature_size = 0


@dataclass(frozen=True)
class Rows:
    """One recorded file: what it is of, and its arrays."""

    folder: Path
    name: str
    described: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]

    @property
    def dataset(self) -> str:
        return str(self.described["dataset"])

    @property
    def split(self) -> str:
        return str(self.described["split"])

    @property
    def training(self) -> bool:
        return self.split.startswith("train")

    def task(self) -> Referring:
        return Referring(ReferringConfig(**SETTINGS, dataset=self.dataset))

    def records(self) -> list[ReferringRecord]:
        split = "train" if self.training or self.split == "mteval" else self.split
        records = self.task().records(self.folder / "data", split)
        if self.split not in ("train_clean", "mteval"):
            return records
        cleaned = without_images(records, self.folder / "data" / "cache" / "coco_test_ids.npy")
        return cleaned if self.split == "train_clean" else [record for record in records if record not in cleaned]

    def store(self) -> Store:
        """Detected regions, in training followed by the annotated ones."""
        found, given = (
            dict(np.load(self.folder / "data" / f"{self.dataset}_{part}.npz")) for part in ("detections", "gt")
        )
        store = Store()
        for image in {name.partition("/")[0] for name in found}:
            parts = [found, given] if self.training else [found]
            height, width = found[f"{image}/size"].tolist()
            store[image] = RegionArray(
                features=np.concatenate([part[f"{image}/features"] for part in parts]),
                boxes=np.concatenate([part[f"{image}/boxes"] for part in parts]),
                size=(width, height),
            )
            store.feature_size = store[image].features.shape[1]
        return store

    def collate(self) -> tuple[Batch, Targets]:
        store = self.store()
        inputs = InputSpec(
            vocabulary=str(self.folder.parent / "vocab.txt"),
            feature_size=store.feature_size,
            max_tokens=self.described["max_seq_length"],
            max_regions=self.described["max_region_num"] - 1,
        )
        tokenizer = Tokenizer(inputs.vocabulary)
        source = TaskSource(self.task(), self.records(), TextLayout(tokenizer, inputs))
        rngs = [np.random.default_rng(0) for _ in range(len(source))]
        return Collator(store, inputs, tokenizer)(
            [source.example(number, rng) for number, rng in enumerate(rngs)], rngs
        )

    def recorded_batch(self, task: int | None) -> Batch:
        """The recorded rows as our batch, with the number of a task token, if the release has such."""
        named = {
            "input_ids": "tokens", "attention_mask": "input_mask", "token_type_ids": "segment_ids",
            "image_feat": "features", "image_loc": "spatials", "image_attention_mask": "image_mask",
        }  # fmt: skip
        inputs = {ours: torch.from_numpy(self.arrays[theirs]) for ours, theirs in named.items()}
        inputs["image_loc"] = inputs["image_loc"].clamp(0, 1)  # `validate` refuses the rest; put back below
        if task is not None:
            inputs["task_ids"] = torch.full((len(inputs["input_ids"]), 1), task)
        batch = batch_of(inputs)
        assert batch.regions is not None
        boxes = torch.from_numpy(self.arrays["spatials"])[:, 1:, :4]
        return replace(batch, regions=replace(batch.regions, boxes=boxes))


@pytest.fixture
def recorded(golden: Path) -> dict[str, Rows]:
    folder = golden / "vilbert_tasks" / "refer"
    found = {}
    for file in sorted(folder.glob("rows_*.json")):
        arrays = dict(np.load(file.with_suffix(".npz"))) if file.with_suffix(".npz").exists() else {}
        found[file.stem] = Rows(folder, file.stem, json.loads(file.read_text()), arrays)
    assert found
    return found


def test_every_recorded_row(recorded: dict[str, Rows]) -> None:
    for name, rows in recorded.items():
        if not rows.arrays:
            continue  # the first release stops there, see the next test
        records = rows.records()
        described = rows.described["rows"]
        assert [(record.raw, record.id, record.images) for record in records] == [
            (row["caption"], str(row["sent_id"]), (str(row["image_id"]),)) for row in described
        ], name
        assert [(record.reference, record.box) for record in records] == [
            (row["ref_id"], tuple(row["refBox_xywh"])) for row in described
        ], name
        batch, targets = rows.collate()
        _check_text(batch, rows)
        _check_regions(batch, rows)
        _check_targets(batch, targets, rows)


def _check_text(batch: Batch, rows: Rows) -> None:
    width = batch.text.ids.shape[1]
    tokens, mask = rows.arrays["tokens"], rows.arrays["input_mask"]
    assert not mask[:, width:].any(), rows.name
    np.testing.assert_array_equal(batch.text.mask.numpy(), mask[:, :width] > 0, err_msg=rows.name)
    assert not rows.arrays["segment_ids"].any()
    for ours, theirs in zip(batch.text.ids.numpy(), tokens, strict=True):
        last = int((ours > 0).sum()) - 1
        cut = last + 1 == len(theirs) and theirs[last] != ours[last]
        assert not cut or rows.name.startswith("rows_beta"), f"{rows.name}: {ours} {theirs}"
        length = last if cut else width
        np.testing.assert_array_equal(ours[:length], theirs[:length], err_msg=rows.name)


def _check_regions(batch: Batch, rows: Rows) -> None:
    assert batch.regions is not None
    count = batch.regions.mask.shape[1]
    mask = rows.arrays["image_mask"][:, 1:] > 0
    assert not mask[:, count:].any(), rows.name
    np.testing.assert_array_equal(batch.regions.mask.numpy(), mask[:, :count], err_msg=rows.name)
    features = rows.arrays["features"][:, 1 : 1 + count]
    boxes = rows.arrays["spatials"][:, 1 : 1 + count, :4].clip(0, 1)
    np.testing.assert_allclose(batch.regions.features.numpy(), features, atol=1e-6, err_msg=rows.name)
    np.testing.assert_allclose(batch.regions.boxes.numpy(), boxes, atol=1e-6, err_msg=rows.name)


def _check_targets(batch: Batch, targets: Targets, rows: Rows) -> None:
    """Ours has all overlaps, the whole image's first; below 0.5 they count as 0 in the loss."""
    assert targets.region_scores is not None
    assert targets.object_classes is not None
    ours, theirs = targets.region_scores.numpy(), rows.arrays["target"][..., 0]
    ours = np.where(ours >= THRESHOLD, ours, 0) if rows.training else ours
    count = ours.shape[1]
    np.testing.assert_allclose(ours, theirs[:, :count], atol=1e-6, err_msg=rows.name)
    assert not theirs[:, count:].any()
    real = rows.arrays["image_mask"][:, :count] > 0
    np.testing.assert_array_equal(targets.object_classes.numpy() == 1, theirs[:, :count] > THRESHOLD)
    np.testing.assert_array_equal(targets.object_classes.numpy() >= 0, real)


def test_images_with_many_regions_are_cut_where_the_first_release_stops(recorded: dict[str, Rows]) -> None:
    stopped = [rows for rows in recorded.values() if not rows.arrays]
    for rows in stopped:
        batch, _ = rows.collate()
        assert batch.regions is not None
        assert batch.regions.mask.shape[1] == rows.described["max_region_num"] - 1
        assert len(batch.text.ids) == rows.described["entries"]


def test_rows_of_removed_images_are_the_rest_of_training(recorded: dict[str, Rows]) -> None:
    """The splits "mteval" and cleaned training are disjoint and together all of it."""
    for name, rows in recorded.items():
        if rows.split != "mteval":
            continue
        cleaned, whole = (recorded[name.replace("mteval", split)].records() for split in ("train_clean", "train"))
        removed = rows.records()
        assert sorted(record.id for record in [*cleaned, *removed]) == sorted(record.id for record in whole)
        assert not {record.images for record in cleaned} & {record.images for record in removed}


class Model:
    """The recorded multi-task model and what a release computed with it; the first release has no task token."""

    def __init__(self, golden: Path, release: str) -> None:
        self.step = json.loads((golden / "vilbert_tasks" / "refer" / f"step_{release}.json").read_text())
        self.number = int(self.step["task_id_used"].removeprefix("TASK")) if release == "mt" else None
        self.multi_task = MultiTask(Weights(golden / "vilbert"))
        if self.number is None:
            self.multi_task.encoder.tasks = None

    def logits(self, batch: Batch) -> dict[str, Tensor]:
        return {"regions": self.multi_task.heads["regions"](candidates(self.multi_task.encoder(batch)))}


def _targets(rows: Rows) -> Targets:
    """The recorded targets as our batch has them."""
    scores = torch.from_numpy(rows.arrays["target"][..., 0])
    padding = torch.from_numpy(rows.arrays["image_mask"]) == 0
    return Targets(region_scores=scores, object_classes=(scores > THRESHOLD).long().masked_fill(padding, IGNORE))


@pytest.mark.parametrize("release", ["beta", "mt"])
def test_training_loss_and_gradients(golden: Path, recorded: dict[str, Rows], release: str) -> None:
    (rows,) = (
        rows
        for name, rows in recorded.items()
        if name.startswith(f"rows_{release}_") and rows.split == "train" and len(rows.arrays["tokens"]) > 3
    )
    model = Model(golden, release)
    loss = rows.task().loss(model.logits(rows.recorded_batch(model.number)), _targets(rows))
    assert_close(loss.value.detach().double(), torch.tensor(model.step["train_loss"]).double(), rtol=1e-5, atol=0)
    hits, count = loss.parts["referring_accuracy"]
    assert float(hits / count) == pytest.approx(model.step["train_score"])
    assert float(hits) == model.step["val_score_sum"]
    assert int(count) == model.step["val_batch_size"]
    loss.value.backward()  # type: ignore[no-untyped-call]
    compared, total = set(), 0.0
    for part, module in model.multi_task.parts.items():
        for name, parameter in module.named_parameters():
            theirs = model.multi_task.coverage.mapped[f"{part}.{name}"][0]
            norm = 0.0 if parameter.grad is None else float(parameter.grad.norm())
            assert norm == pytest.approx(model.step["grad_norms"].get(theirs, 0.0), rel=1e-4, abs=1e-6), theirs
            compared.add(theirs)
            total += norm**2
    assert model.step["grad_norms"].keys() <= compared
    assert total**0.5 == pytest.approx(model.step["grad_total_norm"], rel=1e-4)


@pytest.mark.parametrize("release", ["beta", "mt"])
def test_chosen_rows(golden: Path, recorded: dict[str, Rows], release: str) -> None:
    """Rows of val and testA: which candidate is chosen, of which overlap, and how many are right."""
    model = Model(golden, release)
    results = model.step["evaluation"]["results"]
    length = "many" if release == "beta" else "few"  # the first release stops at images with more regions than rows
    chosen, right = [], 0.0
    for split in ("val", "testA"):
        rows = recorded[f"rows_{release}_{recorded_dataset(recorded, release)}_{split}_{length}"]
        records, store, batch = rows.records(), rows.store(), rows.recorded_batch(model.number)
        assert batch.regions is not None
        size = torch.tensor([store[record.images[0]].size for record in records], dtype=torch.float32)
        batch = replace(batch, regions=replace(batch.regions, size=size))
        predictions = rows.task().decode(model.logits(batch), batch, records)
        for prediction, record in zip(predictions, records, strict=True):
            x1, y1, x2, y2 = prediction.value
            reached = overlap((x1, y1, x2 - x1, y2 - y1), record.box, "strict")  # type: ignore[arg-type]
            name = prediction.top[0][0]
            chosen.append((int(record.images[0]), 0 if name == WHOLE else int(name) + 1, float(reached)))
        report = rows.task().report(predictions, records)
        right += report.scores["accuracy"].value / 100 * len(records)
    assert [(image, row) for image, row, _ in chosen] == [(result["id"], result["target"]) for result in results]
    np.testing.assert_allclose([reached for *_, reached in chosen], [result["IOU"] for result in results], atol=1e-4)
    assert right == pytest.approx(model.step["evaluation"]["score_sum"])


def recorded_dataset(recorded: Mapping[str, Rows], release: str) -> str:
    """Of the training rows, on which the step was taken."""
    return next(
        rows.dataset
        for name, rows in recorded.items()
        if name.startswith(f"rows_{release}_") and rows.split == "train" and len(rows.arrays["tokens"]) > 3
    )
