"""NLVR2 in VisualBERT's own code (`golden/visualbert_tasks/nlvr2`): rows of fine-tuning and of pre-training, regions of
both images, labels, and a padded batch.

The feature files of the release have no reader here: the test turns them into a region store. `confidence_cap` screens
regions before they are stored, as extraction does (`DetectorConfig.min_confidence`), and a preset's `max_regions` takes
the place of `image_feature_cap`. Where more regions than the cap pass the screen, the release takes the first ones of
the file whether they pass or not; here the first ones that pass.
Records without a label, of the hidden test split, have label 0 in the release and none here.
"""

from __future__ import annotations

import _codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from visling.data.annotations.statements import Nlvr2Record
from visling.data.batches.collate import Collator
from visling.data.batches.masking import TokenMasking
from visling.data.corpora.base import SentenceRecord
from visling.data.corpora.statements import LabelledSentences
from visling.data.text import TextLayout, Tokenizer
from visling.image_ids import from_file_name
from visling.runtime import generator_for
from visling.tasks.base import TaskSource
from visling.tasks.nlvr2 import NLVR2
from visling.types import Batch, Example, InputSpec, RegionArray, Targets

SUMS = 2e-4
"""Absolute tolerance of summed features, which are rounded to four decimals."""

_SAFE: list[Any] = [
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # type: ignore[attr-defined]
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64")),
    _codecs.encode,
]


class Stored(dict[str, RegionArray]):
    """Recorded regions by image."""

    fingerprint = "recorded"

    def __init__(self, file: Path, least: float) -> None:
        """
        Args:
            least: regions below this confidence are left out, but for the most confident one.
        """
        with torch.serialization.safe_globals(_SAFE):
            content = torch.load(file, weights_only=True)
        for name, (features, boxes, confidence) in content.items():
            keep = confidence >= min(least, confidence.max())
            self[from_file_name(from_file_name(name))] = RegionArray(
                features=features[keep], boxes=boxes[keep], size=(10_000, 10_000), class_confidence=confidence[keep]
            )
        self.feature_size = next(iter(self.values())).features.shape[1]


@dataclass(frozen=True)
class Recording:
    folder: Path

    @property
    def cases(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.folder / "rows.json").read_text(encoding="utf-8"))["cases"]
        return found

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(str(self.folder / "vocab.txt"))

    def store(self, case: Mapping[str, Any]) -> Stored:
        file = self.folder / "data" / f"features_{case['split']}_150.th"
        return Stored(file, case["settings"].get("confidence_cap", 0.0))

    def records(self, case: Mapping[str, Any]) -> list[Nlvr2Record]:
        return NLVR2().records(self.folder / "data", case["split"])

    def layout(self, case: Mapping[str, Any], store: Stored) -> TextLayout:
        settings = case["settings"]
        spec = InputSpec(
            feature_size=store.feature_size,
            max_tokens=settings["max_seq_length"],
            max_regions=settings["image_feature_cap"],
            pair="sequence",
        )
        return TextLayout(self.tokenizer, spec)


@pytest.fixture
def recording(golden: Path) -> Recording:
    return Recording(golden / "visualbert_tasks" / "nlvr2")


def finetuning_examples(records: Sequence[Nlvr2Record], layout: TextLayout) -> list[Example]:
    source = TaskSource(NLVR2(), records, layout)
    return [source.example(number, generator_for(0)) for number in range(len(source))]


def collate(store: Stored, layout: TextLayout, examples: Sequence[Example]) -> tuple[Batch, Targets]:
    collator = Collator(store, layout.spec, layout.tokenizer)
    batch, targets = collator(examples, [generator_for(0)] * len(examples))
    batch.validate()
    return batch, targets


def compare_images(row: Mapping[str, Any], batch: Batch) -> None:
    assert batch.regions is not None
    assert batch.regions.image is not None
    real = batch.regions.mask[0]
    image = batch.regions.image[0][real].tolist()
    left, right = row["regions"]
    assert image == [0] * left + [1] * right
    assert len(image) == row["image_dim"][0]
    features = batch.regions.features[0][real]
    sums = [float(part.sum()) for part in features.split([left, right])]
    assert sums == pytest.approx(row["feature_sums"], abs=SUMS)


def test_fine_tuning_rows(recording: Recording) -> None:
    cases = [case for case in recording.cases if not case["settings"]["pretraining"]]
    assert {case["name"] for case in cases} > {"fine_tuning", "confidence_half"}
    for case in cases:
        store, records = recording.store(case), recording.records(case)
        layout = recording.layout(case, store)
        assert [record.id for record in records] == [row["identifier"] for row in case["rows"]]
        for record, row, example in zip(records, case["rows"], finetuning_examples(records, layout), strict=True):
            batch, targets = collate(store, layout, [example])
            assert batch.text.ids[0].tolist() == row["ids"]
            assert layout.tokenizer.tokens(row["ids"]) == row["pieces"]
            assert batch.text.segments[0].tolist() == row["segments"]
            compare_images(row, batch)
            assert int(record.label or 0) == row["label"]
            assert (targets.answer is None) == (record.label is None)
            if targets.answer is not None:
                assert targets.answer.tolist() == [row["label"]]


def test_texts_and_regions_are_cut_somewhere(recording: Recording) -> None:
    """Otherwise the cases above prove less than they say."""
    by_name = {(case["name"], case["split"]): case for case in recording.cases}
    shorter = [name for name, _ in by_name if name.startswith("cap_")]
    full = by_name["fine_tuning", "train"]["rows"]
    cut = by_name[shorter[0], "train"]["rows"]
    assert any(len(a["ids"]) > len(b["ids"]) for a, b in zip(full, cut, strict=True))
    assert any(a["image_dim"] > b["image_dim"] for a, b in zip(full, cut, strict=True))


class Script:
    """A generator that returns recorded draws."""

    def __init__(self, draws: Sequence[Any]) -> None:
        self.left = list(draws)

    def random(self) -> float:
        return float(self.left.pop(0))

    def integers(self, size: int) -> int:
        drawn = self.left.pop(0)
        assert drawn["of"] == size
        return int(drawn["index"])


def test_pretraining_rows(recording: Recording) -> None:
    """Masked by the recorded draws; whether the sentence is true is the target of matching, unless the release leaves
    that objective out."""
    cases = [case for case in recording.cases if case["settings"]["pretraining"]]
    assert cases
    for case in cases:
        store = recording.store(case)
        layout = recording.layout(case, store)
        sentences = [
            SentenceRecord(id=record.id, images=record.images, sentence=record.sentence, label=record.label)
            for record in recording.records(case)
        ]
        source = LabelledSentences(sentences, layout)
        for number, row in enumerate(case["rows"]):
            script = Script(row["draws"])
            collator = Collator(store, layout.spec, layout.tokenizer, masking=TokenMasking(in_turn=True))
            rng = cast(np.random.Generator, script)
            batch, targets = collator([source.example(number, generator_for(0))], [rng])
            assert not script.left
            assert batch.text.ids[0].tolist() == row["ids"]
            assert layout.tokenizer.tokens(row["ids"]) == row["pieces"]
            compare_images(row, batch)
            assert targets.token_slots is not None
            assert targets.token_ids is not None
            labels = torch.full_like(batch.text.ids[0], -1)
            chosen = targets.token_slots.mask[0]
            labels[targets.token_slots.at[0][chosen]] = targets.token_ids[0][chosen]
            assert labels.tolist() == row["mlm_labels"]
            assert targets.matched is not None
            assert ("match" in row) != case["settings"]["no_next_sentence"]
            assert targets.matched.tolist() == [row.get("match", row["label"])]


def test_a_padded_batch(recording: Recording) -> None:
    recorded = {name: tensor.numpy() for name, tensor in load_file(recording.folder / "batch.safetensors").items()}
    case = next(case for case in recording.cases if (case["name"], case["split"]) == ("fine_tuning", "train"))
    store = recording.store(case)
    layout = recording.layout(case, store)
    records = recording.records(case)[: len(recorded["label"])]
    batch, targets = collate(store, layout, finetuning_examples(records, layout))
    regions = batch.regions
    assert regions is not None
    assert regions.image is not None
    ours: dict[str, NDArray[Any]] = {
        "bert_input_ids": batch.text.ids.numpy(),
        "bert_input_mask": batch.text.mask.numpy(),
        "bert_input_type_ids": batch.text.segments.numpy(),
        "image_dim_variable": regions.mask.sum(1, keepdim=True).numpy(),
        "is_random_next": np.array([[int(record.label or 0)] for record in records]),
        "label": cast(torch.Tensor, targets.answer).numpy(),
        "visual_embeddings_type": np.where(regions.mask, regions.image, 0),
    }
    assert ours.keys() == recorded.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, recorded[name], err_msg=name)
