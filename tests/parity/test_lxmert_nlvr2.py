"""NLVR2 in LXMERT's and CVLP's own code (`golden/{lxmert,cvlp}_tasks/nlvr2`): records, features, boxes, word pieces,
targets, losses, scores and dump files.

Not as in the releases, on purpose:
- Records whose images have no features (`dropped_ids`, every record of the split hidden) are refused with a message
  that names them, instead of left out; so is the release's score over too few predictions.
- Boxes that leave the picture by rounding are cut to it, within the releases' tolerance of 1e-5.
Sizes, lengths and splits come from the recording.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch.testing import assert_close

from visling import models
from visling.data.annotations.statements import Nlvr2Record
from visling.data.batches.collate import Collator
from visling.data.corpora.base import check_images
from visling.data.text import TextLayout, Tokenizer
from visling.errors import DataError, StoreError
from visling.models.task_model import TaskModel
from visling.regions.formats.base import convert_regions
from visling.regions.formats.tsv import RegionTsv
from visling.regions.store import NativeStore
from visling.runtime import generator_for
from visling.tasks.base import TaskSource
from visling.tasks.nlvr2 import NLVR2, Nlvr2Config
from visling.types import Batch, InputSpec, Prediction, Targets

FAMILIES = ("lxmert", "cvlp")
MOST_REGIONS = 36
BOXES = 2e-5
"""Absolute tolerance of unit boxes; those outside the picture are cut."""
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


@dataclass(frozen=True)
class Recording:
    """One family's NLVR2."""

    root: Path
    family: str
    store: NativeStore

    def read(self, name: str) -> Any:
        return json.loads((self.root / "nlvr2" / f"{name}.json").read_text(encoding="utf-8"))

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        with np.load(self.root / "nlvr2" / f"{name}.npz") as found:
            return dict(found)

    @property
    def task(self) -> NLVR2:
        return NLVR2(Nlvr2Config(**models.spec(self.family).tasks["nlvr2"]))

    @property
    def sizes(self) -> dict[str, Any]:
        found: dict[str, Any] = self.read("training_run")["settings"]["tiny_model"]
        return found

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(str(self.root / "vocab.txt"))

    def records(self, splits: str) -> dict[str, Nlvr2Record]:
        """Our records of splits that commas join, by the release's own ids."""
        found = {}
        for split in splits.split(","):
            folder = self.root / "data" / "nlvr2"
            uids = [entry["uid"] for entry in json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))]
            found |= dict(zip(uids, self.task.records(folder, split), strict=True))
        return found

    def collate(self, records: Sequence[Nlvr2Record]) -> tuple[Batch, Targets]:
        spec = InputSpec(
            feature_size=self.sizes["visual_feat_dim"],
            max_tokens=self.sizes["max_seq_length"],
            max_regions=MOST_REGIONS,
        )
        source = TaskSource(self.task, records, TextLayout(self.tokenizer, spec))
        rngs = [generator_for(0)] * len(records)
        examples = [source.example(number, rngs[0]) for number in range(len(records))]
        batch, targets = Collator(self.store, spec, self.tokenizer)(examples, rngs)
        batch.validate()
        return batch, targets

    def model(self, weights: str) -> TaskModel:
        """Recorded weights in a model of the recorded sizes."""
        sizes, spec = self.sizes, models.spec(self.family)
        config = spec.config(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            num_text_layers=sizes["l_layers"],
            num_region_layers=sizes["r_layers"],
            num_cross_layers=sizes["x_layers"],
            num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            max_positions=sizes["max_position_embeddings"],
            num_segments=sizes["type_vocab_size"],
            feature_size=sizes["visual_feat_dim"],
            max_tokens=sizes["max_seq_length"],
        )
        model = TaskModel(spec.build(config), self.task.heads, models.head_styles(self.family), group=self.task.group)
        source = load_file(self.root / "nlvr2" / f"{weights}.safetensors")
        spec.keys["official_finetuned"].load(source, {"encoder": model.encoder, "classifier": model.heads["classify"]})
        return model.eval()


@pytest.fixture(params=FAMILIES)
def recording(request: pytest.FixtureRequest, golden: Path, tmp_path: Path) -> Recording:
    root = golden / f"{request.param}_tasks"
    files = sorted((root / "data" / "nlvr2_imgfeat").glob("*.tsv"))
    convert_regions([RegionTsv(file) for file in files], tmp_path / "store", dtype="float32")
    return Recording(root, request.param, NativeStore.open(tmp_path / "store"))


def row_files(recording: Recording) -> list[str]:
    return sorted(file.stem for file in (recording.root / "nlvr2").glob("rows_*.json"))


def test_records_features_boxes_and_targets(recording: Recording) -> None:
    names = row_files(recording)
    assert len(names) >= 4
    for name in names:
        described = recording.read(name)
        records = recording.records(described["splits"])
        assert len(records) == described["loaded"]
        assert set(records) == {*described["kept_ids"], *described["dropped_ids"]}
        kept = [records[uid] for uid in described["kept_ids"]]
        assert [record.sentence for record in kept] == described["sentences"]
        if not kept:
            continue
        recorded = recording.arrays(name)
        batch, targets = recording.collate(kept)
        assert batch.regions is not None
        assert batch.group == 2
        shape = recorded["features"].shape
        np.testing.assert_array_equal(batch.regions.features.view(shape), recorded["features"])
        np.testing.assert_allclose(batch.regions.boxes.view(*shape[:3], 4), recorded["boxes"], rtol=0, atol=BOXES)
        assert batch.regions.mask.all()
        np.testing.assert_array_equal(targets.answer, recorded["target"])
        assert targets.answer.tolist() == described["targets"]  # type: ignore[union-attr]


def test_records_without_features_are_refused(recording: Recording) -> None:
    refused = 0
    for name in row_files(recording):
        described = recording.read(name)
        if described["dropped_ids"] and described["splits"] != "hidden":
            records = recording.records(described["splits"])
            missing = records[described["dropped_ids"][0]]
            with pytest.raises(StoreError, match=f"example '{missing.id}' needs image"):
                check_images(records.values(), recording.store)
            refused += 1
    assert refused
    hidden = recording.records("hidden")
    assert len(hidden) == recording.read("rows_hidden")["loaded"]
    assert not recording.task.labelled(list(hidden.values()))


def test_word_pieces(recording: Recording) -> None:
    recorded = recording.arrays("tokens_train")
    records = list(recording.records(recording.read("training_run")["settings"]["train"]).values())
    layout = TextLayout(recording.tokenizer, InputSpec(max_tokens=recorded["input_ids"].shape[1]))
    assert len(records) == len(recorded["input_ids"])
    for number, record in enumerate(records):
        row = layout.row(record.sentence)
        real = recorded["input_mask"][number].astype(bool)
        np.testing.assert_array_equal(row.ids, recorded["input_ids"][number][real])
        np.testing.assert_array_equal(row.segments, recorded["segment_ids"][number][real])
        assert not recorded["input_ids"][number][~real].any()
    assert layout.truncated, "the recording has a sentence that is too long"


def test_losses_of_the_recorded_logits(recording: Recording) -> None:
    run = recording.read("training_run")
    records = recording.records(run["settings"]["train"])
    for step in run["steps"]:
        _, targets = recording.collate([records[uid] for uid in step["ids"]])
        loss = recording.task.loss({"classify": torch.tensor(step["logits"])}, targets)
        assert loss.value.item() == pytest.approx(step["loss"], rel=1e-6)


def test_logits_and_loss_of_the_recorded_weights(recording: Recording) -> None:
    run = recording.read("training_run")
    first = run["steps"][0]
    records = recording.records(run["settings"]["train"])
    batch, targets = recording.collate([records[uid] for uid in first["ids"]])
    model = recording.model("training_run_start")
    logits = model(batch)
    assert_close(logits["classify"], torch.tensor(first["logits"]), **CLOSE)
    loss = recording.task.loss(logits, targets)
    assert loss.value.item() == pytest.approx(first["loss"], rel=1e-5)
    loss.value.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(first["grad_norm"], rel=1e-4)


def predictions_of(recording: Recording, given: Sequence[Sequence[Any]]) -> list[Prediction]:
    """Recorded pairs of id and label as predictions of ours."""
    records = recording.records(recording.read("evaluator")["split"])
    return [Prediction(id=records[uid].id, value=str(bool(label)), confidence=1.0) for uid, label in given]


def test_scores_and_too_few_predictions(recording: Recording) -> None:
    described = recording.read("evaluator")
    records = recording.records(described["split"])
    whole = 0
    for case in described["cases"]:
        predictions = predictions_of(recording, case["predictions"])
        if len(predictions) < len(records):
            with pytest.raises(DataError, match="missing"):
                recording.task.report(predictions, list(records.values()))
        else:
            whole += 1
        predicted = [records[uid] for uid, _ in case["predictions"]]
        report = recording.task.report(predictions, predicted)
        assert report.scores["accuracy"].value == pytest.approx(100 * case["score"])
    assert whole
    unknown = Prediction(id="nosuchid", value="True", confidence=1.0)
    with pytest.raises(DataError, match="1 in excess"):
        recording.task.report([unknown], list(records.values())[:1])


def test_dump_file(recording: Recording) -> None:
    """Of the model at the end of the run, and of invented predictions."""
    described = recording.read("evaluator")
    records = list(recording.records(described["split"]).values())
    (complete,) = [case for case in described["cases"] if len(case["predictions"]) == len(records)]
    dumped = (recording.root / "nlvr2" / described["dump_file"]).read_text(encoding="utf-8")
    assert recording.task.submission(predictions_of(recording, complete["predictions"])) == dumped

    run = recording.read("training_run")
    batch, _ = recording.collate(records)
    with torch.inference_mode():
        logits = recording.model("training_run_end")(batch)
    expected = torch.tensor(run["validation_logits_of_the_model_at_the_end"])
    assert_close(logits["classify"], expected, **CLOSE)
    decoded = recording.task.decode(logits, batch, records)
    assert [prediction.value for prediction in decoded] == [str(bool(row.argmax())) for row in expected]
    score = recording.task.report(decoded, records).scores["accuracy"].value
    last = run["evaluations"][-1]["result"]
    assert score == pytest.approx(100 * (last[0] if isinstance(last, list) else last))


@pytest.mark.parametrize("change", ["swapped images", "other label", "longer text"])
def test_another_rule_is_noticed(golden: Path, tmp_path: Path, change: str) -> None:
    root = golden / "lxmert_tasks"
    files = sorted((root / "data" / "nlvr2_imgfeat").glob("*.tsv"))
    convert_regions([RegionTsv(file) for file in files], tmp_path / "store", dtype="float32")
    recording = Recording(root, "lxmert", NativeStore.open(tmp_path / "store"))
    first = recording.read("training_run")["steps"][0]
    records = recording.records(recording.read("training_run")["settings"]["train"])
    chosen = [records[uid] for uid in first["ids"]]
    changed = [
        Nlvr2Record(
            id=record.id,
            images=record.images[::-1] if change == "swapped images" else record.images,
            sentence=f"{record.sentence} no" if change == "longer text" else record.sentence,
            label=record.label != (change == "other label"),
        )
        for record in chosen
    ]
    batch, targets = recording.collate(changed)
    loss = recording.task.loss(recording.model("training_run_start")(batch), targets)
    assert loss.value.item() != pytest.approx(first["loss"], rel=1e-5)
