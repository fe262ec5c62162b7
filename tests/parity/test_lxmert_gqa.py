"""GQA as the releases of LXMERT and CVLP read, score and train on it (`golden/lxmert_tasks` and `golden/cvlp_tasks`,
there `gqa` and `data`).

Every size, id and answer comes from the recordings. Boxes are compared after clipping to the image, which our store
does: the release keeps those that leave it by rounding. The releases drop questions about images without features; we
refuse them before training (`check_images`), so the kept ids are those that the store has. Weights before and after
updates belong to the optimiser's tests; here each recorded update is checked from its logits to its loss.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from visling.data.annotations.gqa_records import GqaRecord
from visling.data.batches.collate import Collator
from visling.data.corpora.base import check_images
from visling.data.text import TextLayout, Tokenizer
from visling.errors import DataError, StoreError
from visling.metrics.gqa import label_scores
from visling.regions.formats.base import convert_regions
from visling.regions.formats.tsv import RegionTsv
from visling.regions.store import NativeStore
from visling.runtime import generator_for
from visling.tasks.gqa import GQA, GqaConfig
from visling.types import Batch, InputSpec, Prediction, Targets

SPLITS = ("train+valid", "testdev", "submit")
LOSS = {"rtol": 1e-5, "atol": 1e-6}
LOSSES = {"BCEWithLogits(mean) x number of answers": "bce", "CrossEntropy x number of answers": "mce"}
"""As recorded -> ours."""


@dataclass(frozen=True)
class Recording:
    """One release's recording of GQA."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def json(self, name: str) -> Any:
        return json.loads((self.folder / "gqa" / f"{name}.json").read_text())

    def arrays(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        return dict(np.load(self.folder / "gqa" / f"{name}.npz"))

    def task(self, **settings: Any) -> GQA:
        return GQA(GqaConfig(answers=self.data / "gqa" / "trainval_label2ans.json", **settings))

    def store(self, split: str, folder: Path) -> NativeStore:
        """testdev has a feature file of its own, in the release and here."""
        name = "gqa_testdev" if split == "testdev" else "vg_gqa"
        file = RegionTsv(self.data / "vg_gqa_imgfeat" / f"{name}_obj36.tsv")
        convert_regions([file], folder / name, dtype="float32")
        return NativeStore.open(folder / name)

    def records(self, task: GQA, split: str) -> list[GqaRecord]:
        return [record for part in split.split("+") for record in task.records(self.data, part)]

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(str(self.folder / "vocab.txt"))


@pytest.fixture(params=["lxmert", "cvlp"])
def recording(request: pytest.FixtureRequest, golden: Path) -> Recording:
    return Recording(golden / f"{request.param}_tasks")


def collate(
    recording: Recording, task: GQA, records: list[GqaRecord], store: NativeStore, max_tokens: int
) -> tuple[Batch, Targets]:
    spec = InputSpec(feature_size=store.feature_size, max_tokens=max_tokens)
    tokenizer = recording.tokenizer()
    layout = TextLayout(tokenizer, spec)
    rngs = [generator_for(0) for _ in records]
    examples = [task.example(record, layout, rng) for record, rng in zip(records, rngs, strict=True)]
    batch, targets = Collator(store, spec, tokenizer)(examples, rngs)
    batch.validate()
    return batch, targets


@pytest.mark.parametrize("split", SPLITS)
def test_rows(recording: Recording, tmp_path: Path, split: str) -> None:
    rows, arrays, task = recording.json(f"rows_{split}"), recording.arrays(f"rows_{split}"), recording.task()
    store = recording.store(split, tmp_path)
    records = recording.records(task, split)
    assert len(records) == rows["loaded"]
    kept = [record for record in records if record.images[0] in store]
    assert [record.id for record in kept] == rows["kept_ids"]
    assert [record.id for record in records if record not in kept] == rows["dropped_ids"]
    assert [record.question for record in kept] == rows["sentences"]
    if rows["dropped_ids"]:
        with pytest.raises(StoreError, match=repr(rows["dropped_ids"][0])):
            check_images(records, store)
    batch, targets = collate(recording, task, kept, store, max_tokens=64)
    assert batch.regions is not None
    assert_close(batch.regions.features, torch.from_numpy(arrays["features"]), rtol=0, atol=0)
    assert_close(batch.regions.boxes, torch.from_numpy(arrays["boxes"]).clamp(0, 1), rtol=0, atol=1e-6)
    assert (targets.answer is None) == (rows["fields_per_row"] == 4)
    if targets.answer is not None:
        assert_close(targets.answer, torch.from_numpy(arrays["target"]), rtol=0, atol=0)
        assert targets.answer.tolist() == rows["targets"]


def test_tokens(recording: Recording, tmp_path: Path) -> None:
    recorded, task = recording.arrays("tokens_train"), recording.task()
    layout = TextLayout(recording.tokenizer(), InputSpec(max_tokens=recorded["input_ids"].shape[1]))
    records = recording.records(task, "train")
    assert len(records) == len(recorded["input_ids"])
    for number, record in enumerate(records):
        (row,) = task.example(record, layout, generator_for(0)).rows
        real = recorded["input_mask"][number].astype(bool)
        assert not recorded["input_ids"][number][~real].any()
        assert row.ids.tolist() == recorded["input_ids"][number][real].tolist()
        assert row.segments.tolist() == recorded["segment_ids"][number][real].tolist()
    assert layout.truncated, "the recording has a question that is too long"


def soft_targets(recording: Recording, task: GQA, split: str, ids: list[str]) -> Tensor:
    """Of these questions, as they reach the loss."""
    by_id = {record.id: record for record in recording.records(task, split.replace(",", "+"))}
    layout = TextLayout(recording.tokenizer(), InputSpec())
    labels = [task.example(by_id[number], layout, generator_for(0)).labels["answer"] for number in ids]
    return torch.from_numpy(np.stack([label.dense() for label in labels]))


def check_losses(recording: Recording, name: str, *, loss: str | None = None) -> None:
    run = recording.json(name)
    task = recording.task(loss=LOSSES[run["settings"]["loss"]] if loss is None else loss)
    assert run["steps"]
    for step in run["steps"]:
        scores = soft_targets(recording, task, run["settings"]["train"], step["ids"])
        logits = torch.tensor(step["logits"])
        found = task.loss({"classify": logits}, Targets(answer=scores))
        assert_close(found.value, torch.tensor(step["loss"]), **LOSS)
        assert_close(found.value / logits.shape[1], torch.tensor(step["loss_before_scaling"]), **LOSS)


RUNS = [("lxmert", "training_run"), ("lxmert", "training_mce"), ("cvlp", "training_run")]


@pytest.mark.parametrize(("family", "name"), RUNS)
def test_losses_of_every_update(golden: Path, family: str, name: str) -> None:
    check_losses(Recording(golden / f"{family}_tasks"), name)


@pytest.mark.parametrize(("family", "name"), RUNS)
def test_another_loss_is_noticed(golden: Path, family: str, name: str) -> None:
    with pytest.raises(AssertionError):
        check_losses(Recording(golden / f"{family}_tasks"), name, loss="kl")


def labels_of(records: list[GqaRecord]) -> dict[str, dict[str, float]]:
    return {record.id: {record.answer: 1.0} for record in records if record.answer is not None}


def test_evaluator(recording: Recording) -> None:
    recorded, task = recording.json("evaluator"), recording.task()
    records = recording.records(task, recorded["split"])
    labels = labels_of(records)
    for case in recorded["cases"]:
        assert label_scores(dict(case["predictions"]), labels).value == pytest.approx(case["score"], abs=1e-12)
    facts = {fact["what"]: fact["result"] for fact in recorded["facts"]}
    assert facts["prediction for an unknown id"].startswith("KeyError")
    with pytest.raises(DataError, match="nosuchid"):
        label_scores({"nosuchid": "yes"}, labels)
    assert facts["no predictions"].startswith("ZeroDivisionError")
    with pytest.raises(DataError, match="no examples"):
        assert label_scores({}, labels).value
    assert facts["answer outside the list in a training label"] == "runs"
    unlisted = [record.id for record in recording.records(task, "train") if record.answer not in task.answers]
    assert unlisted
    assert not soft_targets(recording, task, "train", unlisted).any()


def test_report_is_the_evaluators_score(recording: Recording) -> None:
    recorded, task = recording.json("evaluator"), recording.task()
    records = recording.records(task, recorded["split"])
    complete = [case for case in recorded["cases"] if len(case["predictions"]) == len(records)]
    assert complete
    for case in complete:
        given = [Prediction(id=number, value=answer, confidence=1.0) for number, answer in case["predictions"]]
        report = task.report(given, records)
        assert report.scores["accuracy"].value == pytest.approx(100 * case["score"], abs=1e-9)
        assert report.variants["script"].startswith("LXMERT")


def test_submission(recording: Recording) -> None:
    recorded, task = recording.json("evaluator"), recording.task()
    for case in recorded["cases"][:1]:
        given = [Prediction(id=number, value=answer, confidence=1.0) for number, answer in case["predictions"]]
        assert task.submission(given) == recording.json(Path(recorded["dump_file"]).stem)


def test_predictions_are_the_best_answers(recording: Recording) -> None:
    run, task = recording.json("training_run"), recording.task()
    logits = torch.tensor(run["validation_logits_of_the_model_at_the_end"])
    records = recording.records(task, run["settings"]["valid"])
    batch: Any = None  # answers need nothing of it
    found = task.decode({"classify": logits}, batch, records)
    assert [prediction.value for prediction in found] == [task.answers[number] for number in logits.argmax(1).tolist()]
    scores = [float(one.value == record.answer) for one, record in zip(found, records, strict=True)]
    last = run["evaluations"][-1]["result"]
    of_the_model = last[0] if isinstance(last, list) else last
    assert np.mean(scores) == pytest.approx(of_the_model, abs=1e-6)


def test_dump_of_the_averaged_model(golden: Path) -> None:
    """The release writes both models' predictions to one path, so that only those of the averaged one are left."""
    recording = Recording(golden / "cvlp_tasks")
    dumped = recording.json("training_run_dump")
    given = [Prediction(id=number, value=answer, confidence=1.0) for number, answer in dumped["averaged_predictions"]]
    assert recording.task().submission(given) == dumped["dumped_file_after_both_were_written_to_one_path"]
