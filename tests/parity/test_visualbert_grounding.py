"""Phrase grounding against what VisualBERT's own code makes of invented files of Flickr30K Entities
(`golden/visualbert_tasks/flickr`; the README of the folder above says how): rows, positions, targets, a batch, the loss
with its gradients, and the scores of a split.

Phrases stand where the release puts them (`phrase_at="release"`). Where a phrase is not made of whole words the release
stops; ours stands at its own place. Regions are those of the recorded batch, since the recorded stores are HDF5 files,
which are not opened here: targets are compared for the images of that batch, not for those of the other split. Which
words of the pre-training rows are masked is left to the masking's own tests: rows are compared with the masks lifted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity_support import labelled
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from visling import boxes as box_ops
from visling import models
from visling.data.annotations.captions import find_flickr30k
from visling.data.annotations.entities import EntitiesRecord
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.metrics.phrases import first_rank, right_boxes
from visling.models.task_model import TaskModel
from visling.models.visualbert import VisualBert, VisualBertConfig
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.matching import Matching
from visling.tasks.base import TaskSource
from visling.tasks.grounding import HEAD, NOT_READ, GroundingConfig, PhraseGrounding
from visling.types import Batch, Head, InputSpec, Prediction, RegionArray, Targets

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
GRADIENTS: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-4}
TYPES = ("people", "clothing", "bodyparts", "animals", "vehicles", "instruments", "scene", "other")
"""By their number in the release."""
MOST_TYPES = 3
"""Per phrase, in the release."""
RELEASE = PhraseGrounding(GroundingConfig(phrase_at="release"))


class Store(dict[str, RegionArray]):
    """Regions by image id."""

    fingerprint = "recorded"

    def __init__(self, arrays: Mapping[str, RegionArray]) -> None:
        super().__init__(arrays)
        self.feature_size = next(iter(arrays.values())).features.shape[1]


@dataclass(frozen=True)
class Recorded:
    """The recorded set."""

    folder: Path

    @cached_property
    def rows(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "rows.json").read_text(encoding="utf-8"))
        return content

    @cached_property
    def expected(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "expected.json").read_text(encoding="utf-8"))
        return content

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        return load_file(self.folder / "batch.safetensors")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(str(self.folder / "vocab.txt"))

    def records(self, split: str, task: PhraseGrounding = RELEASE) -> list[EntitiesRecord]:
        return task.records(self.folder / "data", split)

    def batch_rows(self) -> list[dict[str, Any]]:
        """The recorded rows of the batch's case."""
        name, split = self.expected["batch"]["case"].split()
        (case,) = (case for case in self.rows["cases"] if (case["name"], case["split"]) == (name, split))
        rows: list[dict[str, Any]] = case["rows"]
        return rows

    def batch_records(self, entries: Sequence[int]) -> list[EntitiesRecord]:
        records = self.records(self.expected["batch"]["case"].split()[1])
        return [records[entry] for entry in entries]

    @cached_property
    def config(self) -> VisualBertConfig:
        sizes = self.expected["batch"]
        return VisualBertConfig(
            vocabulary=str(self.folder / "vocab.txt"),
            vocab_size=sizes["vocab"],
            hidden_size=sizes["hidden"],
            num_layers=sizes["layers"],
            num_heads=sizes["heads"],
            intermediate_size=sizes["intermediate"],
            max_positions=sizes["positions"],
            max_tokens=sizes["positions"],
            feature_size=sizes["visual_width"] - 6,
            append_spatial=True,
        )

    @cached_property
    def store(self) -> Store:
        """Regions of the batch's images; the last six numbers of a feature are the box."""
        arrays = {}
        for number, record in enumerate(self.batch_records(self.expected["batch"]["entries"])):
            assert record.size is not None
            real = self.batch["image_mask"][number].bool()
            features = self.batch["image_feat_variable"][number][real].numpy()
            boxes = features[:, -6:-2] * np.array([*record.size, *record.size], np.float32)
            arrays[record.images[0]] = RegionArray(
                features=features[:, :-6].copy(), boxes=boxes.round(2).astype(np.float32), size=record.size
            )
        return Store(arrays)

    def collate(self, records: Sequence[EntitiesRecord]) -> tuple[Batch, Targets]:
        spec = models.spec("visualbert").inputs(self.config)
        source = TaskSource(RELEASE, records, TextLayout(self.tokenizer, spec))
        rngs = [np.random.default_rng(0) for _ in records]
        examples = [source.example(number, rng) for number, rng in enumerate(rngs)]
        return Collator(self.store, spec, self.tokenizer)(examples, rngs)


@pytest.fixture
def recorded(golden: Path) -> Recorded:
    return Recorded(golden / "visualbert_tasks" / "flickr")


CASES = ("fine_tuning", "no_spatial_features", "pretraining")


def cases(recorded: Recorded, name: str) -> list[tuple[dict[str, Any], list[EntitiesRecord]]]:
    found = [(case, recorded.records(case["split"])) for case in recorded.rows["cases"] if case["name"] == name]
    assert found
    return found


def test_every_case_is_compared(recorded: Recorded) -> None:
    assert {case["name"] for case in recorded.rows["cases"]} == set(CASES)
    for split, number in recorded.rows["entries"].items():
        assert len(recorded.records(split)) == number


@pytest.mark.parametrize("name", CASES)
def test_rows_and_positions(recorded: Recorded, name: str) -> None:
    compared = 0
    for case, records in cases(recorded, name):
        layout = TextLayout(recorded.tokenizer, InputSpec(max_tokens=case["settings"]["max_seq_length"]))
        for record, wanted in zip(records, case["rows"], strict=True):
            assert (record.images, record.sentence) == ((str(wanted["image_id"]),), wanted["sentence"])
            (row,) = RELEASE.example(record, layout, np.random.default_rng(0)).rows
            pieces = recorded.tokenizer.tokens(row.ids)
            if "error" in wanted:
                own = [pieces[at] for at in row.phrases]
                assert own == [recorded.tokenizer.tokens(recorded.tokenizer.encode(phrase.text))[-1]
                               for phrase in record.phrases]  # fmt: skip
                continue
            hidden = wanted.get("mlm_labels", [-1] * len(wanted["ids"]))
            ids = [there if label < 0 else label for there, label in zip(wanted["ids"], hidden, strict=True)]
            assert row.ids.tolist() == ids
            assert row.segments.tolist() == wanted["segments"]
            last = len(ids) - 1  # where a row is cut, the release still counts to the end of its sentence
            assert list(row.phrases) == [at if at < last else NOT_READ for at in wanted["position"]]
            if name != "pretraining":
                assert pieces == wanted["pieces"]
            compared += 1
    assert compared > 0


def test_entities_and_types(recorded: Recorded) -> None:
    for case, records in cases(recorded, "fine_tuning"):
        for record, wanted in zip(records, case["rows"], strict=True):
            assert [int(phrase.chain) for phrase in record.phrases] == wanted["entity_ids"]
            numbers = [[TYPES.index(kind) for kind in phrase.types] for phrase in record.phrases]
            assert [(own + [-1] * MOST_TYPES)[:MOST_TYPES] for own in numbers] == wanted["entity_types"]


def test_the_corpus_reads_the_same_sentences(recorded: Recorded) -> None:
    for case, _ in cases(recorded, "pretraining"):
        captions = find_flickr30k(recorded.folder / "data", case["split"]).records
        assert [caption.caption for caption in captions] == [row["sentence"] for row in case["rows"]]


@pytest.mark.parametrize("name", CASES)
def test_targets(recorded: Recorded, name: str) -> None:
    compared = 0
    for case, records in cases(recorded, name):
        for record, wanted in zip(records, case["rows"], strict=True):
            if record.images[0] not in recorded.store:
                continue
            regions = recorded.store[record.images[0]]
            shares = RELEASE.region_targets(record, [regions])["phrase_boxes"]
            assert [np.flatnonzero(share).tolist() for share in shares] == wanted["matching_boxes"]
            if "error" not in wanted:
                assert len(regions) == wanted["regions"]
                np.testing.assert_allclose(shares, wanted["target"], atol=1e-6)
            compared += 1
    assert compared > 0


def test_a_phrase_stands_at_its_own_place_unless_the_release_is_asked_for(recorded: Recorded) -> None:
    """A repeated phrase points at its first occurrence in the release."""
    layout = TextLayout(recorded.tokenizer, InputSpec())
    moved = 0
    for case, records in cases(recorded, "fine_tuning"):
        for record in records:
            own, theirs = (
                task.example(record, layout, np.random.default_rng(0)).rows[0] for task in (PhraseGrounding(), RELEASE)
            )
            pieces = recorded.tokenizer.tokens(own.ids)
            for phrase, at, first in zip(record.phrases, own.phrases, theirs.phrases, strict=True):
                last = recorded.tokenizer.tokens(recorded.tokenizer.encode(phrase.text))[-1]
                assert pieces[at] == pieces[first] == last
                assert first <= at
                moved += first != at
            assert list(own.phrases) == sorted(own.phrases), case["split"]
    assert moved > 0


def test_batch(recorded: Recorded) -> None:
    batch, targets = recorded.collate(recorded.batch_records(recorded.expected["batch"]["entries"]))
    batch.validate()
    wanted = recorded.batch
    assert torch.equal(batch.text.ids, wanted["bert_input_ids"].long())
    assert torch.equal(batch.text.mask, wanted["bert_input_mask"].bool())
    assert torch.equal(batch.text.segments, wanted["bert_input_type_ids"].long())
    regions, slots = batch.regions, batch.phrases
    assert regions is not None
    assert slots is not None
    assert torch.equal(regions.mask, wanted["image_mask"].bool())
    features = torch.cat([regions.features, box_ops.spatial_six(regions.boxes)], dim=-1)
    assert_close(features[regions.mask], wanted["image_feat_variable"][regions.mask], **CLOSE)
    rows = recorded.batch_rows()
    for number, entry in enumerate(recorded.expected["batch"]["entries"]):
        total = features[number][regions.mask[number]].sum().item()
        assert_close(total, rows[entry]["feature_sum"], atol=1e-3, rtol=1e-4)
    phrases = wanted["flickr_position"].shape[1]
    assert torch.equal(slots.at.masked_fill(~slots.mask, -1)[:, :phrases], wanted["flickr_position"].long())
    assert not slots.mask[:, phrases:].any()
    assert targets.phrase_boxes is not None
    assert_close(targets.phrase_boxes, wanted["label"].to(torch.float32), atol=1e-6, rtol=0)


@dataclass(frozen=True)
class Loaded:
    """The recorded tiny model."""

    model: TaskModel
    names: dict[str, str]
    """Parameter -> its name in the release."""


def load(recorded: Recorded) -> Loaded:
    encoder = VisualBert(recorded.config)
    sizes = recorded.expected["batch"]
    head = Head(kind="slots_regions", outputs=1, options={"head_size": sizes["hidden"] // sizes["heads"]})
    model = TaskModel(encoder, {HEAD: head}, models.head_styles("visualbert")).eval()
    parts = {
        "encoder": encoder,
        "slots_regions": model.heads[HEAD],
        "vocabulary": MaskedLM(encoder.dims, "bert", encoder.word_embeddings).head,
        "matching": Matching(encoder.dims, "plain", encoder.word_embeddings).head,
    }
    coverage = models.spec("visualbert").keys["official"].load(load_file(recorded.folder / "model.safetensors"), parts)
    own = {"encoder.": "encoder.", f"heads.{HEAD}.": "slots_regions."}
    return Loaded(
        model=model,
        names={
            name: coverage.mapped[theirs + name.removeprefix(ours)][0].removeprefix("bert.")
            for name, _ in model.named_parameters()
            for ours, theirs in own.items()
            if name.startswith(ours)
        },
    )


def test_scores_loss_and_gradients(recorded: Recorded) -> None:
    loaded, expected = load(recorded), recorded.expected
    batch, targets = recorded.collate(recorded.batch_records(expected["batch"]["entries"]))
    logits = loaded.model(batch)
    assert batch.regions is not None
    assert batch.phrases is not None
    phrases = recorded.batch["flickr_position"].shape[1]
    compared = (batch.phrases.mask[:, :, None] & batch.regions.mask[:, None])[:, :phrases]
    log_scores = logits[HEAD].log_softmax(-1)[:, :phrases]
    assert_close(log_scores[compared], recorded.batch["log_scores"][compared], **CLOSE)

    loss = RELEASE.loss(logits, targets)
    assert_close(loss.value.item(), expected["loss"], **CLOSE)
    hits, matched = loss.parts["grounding_accuracy"]
    assert hits.item() == round(expected["accuracy"] * expected["entities"])
    assert matched.item() == round(expected["upper_bound"] * expected["entities"])

    loss.value.backward()  # type: ignore[no-untyped-call]
    gradients = {loaded.names[name]: parameter.grad for name, parameter in loaded.model.named_parameters()}
    assert {name for name, gradient in gradients.items() if gradient is not None} == set(expected["grad_norm"])
    assert {name for name, gradient in gradients.items() if gradient is None} <= set(expected["without_gradient"])
    for name, norm in expected["grad_norm"].items():
        gradient = gradients[name]
        assert gradient is not None
        assert_close(gradient.norm().item(), norm, **GRADIENTS, msg=labelled(name))


def test_the_loss_may_be_divided_by_phrases(recorded: Recorded) -> None:
    batch, targets = recorded.collate(recorded.batch_records(recorded.expected["batch"]["entries"]))
    logits = load(recorded).model(batch)
    by_sentence, by_phrase = (
        PhraseGrounding(GroundingConfig(loss_per=per)).loss(logits, targets) for per in ("sentence", "phrase")
    )
    matched = by_phrase.parts["grounding"][1]
    assert matched == by_phrase.parts["grounding_accuracy"][1]
    assert_close(by_phrase.value * matched, by_sentence.value * len(batch.text.ids))


def predict(recorded: Recorded, loaded: Loaded, records: Sequence[EntitiesRecord], size: int) -> list[Prediction]:
    predictions = []
    for start in range(0, len(records), size):
        chosen = records[start : start + size]
        batch, _ = recorded.collate(chosen)
        with torch.inference_mode():
            predictions += RELEASE.decode(loaded.model(batch), batch, chosen)
    return predictions


def test_recall_of_the_batch(recorded: Recorded) -> None:
    expected = recorded.expected
    records = recorded.batch_records(expected["batch"]["entries"])
    predictions = predict(recorded, load(recorded), records, len(records))
    scores = RELEASE.report(predictions, records).scores
    assert scores["recall_at_1"].count == expected["entities"]
    assert scores["recall_at_1"].value == pytest.approx(100 * expected["accuracy"])
    assert scores["upper_bound"].value == pytest.approx(100 * expected["upper_bound"])
    ranks = [
        first_rank(right_boxes(grounded.boxes, phrase.boxes or ()))
        for prediction, record in zip(predictions, records, strict=True)
        for grounded, phrase in zip(prediction.value.phrases, record.phrases, strict=True)
    ]
    told = {int(name.rpartition("_")[2]): hits for name, hits in expected.items() if name.startswith("hits_in_top_")}
    assert told
    for most, hits in told.items():
        assert sum(rank is not None and rank <= most for rank in ranks) == hits


def test_scores_of_the_whole_split(recorded: Recorded) -> None:
    """The sums of the release's validation, which has two sentences in a batch."""
    whole = recorded.expected["whole_split"]
    records = recorded.batch_records(whole["entries"])
    scores = RELEASE.report(predict(recorded, load(recorded), records, 2), records).scores
    assert scores["recall_at_1"].count == whole["entities"]
    assert scores["recall_at_1"].value == pytest.approx(100 * whole["hits"] / whole["entities"])
    assert scores["upper_bound"].value == pytest.approx(100 * whole["with_match"] / whole["entities"])


def _turn_query(loaded: Loaded) -> None:
    loaded.model.heads[HEAD].get_parameter("query.weight").data.neg_()


def _swap_corners(recorded: Recorded) -> None:
    for image, regions in recorded.store.items():
        recorded.store[image] = replace(regions, boxes=regions.boxes[::-1].copy())


def test_a_broken_model_and_wrong_boxes_are_noticed(recorded: Recorded) -> None:
    records = recorded.batch_records(recorded.expected["batch"]["entries"])
    loaded = load(recorded)
    _turn_query(loaded)
    batch, targets = recorded.collate(records)
    assert abs(RELEASE.loss(loaded.model(batch), targets).value.item() - recorded.expected["loss"]) > 1e-2
    _swap_corners(recorded)
    with pytest.raises(AssertionError):
        test_targets(recorded, "fine_tuning")
