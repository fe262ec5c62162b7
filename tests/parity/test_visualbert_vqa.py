"""VQA's rows, targets, loss and test file recorded from the official VisualBERT code (`golden/visualbert_tasks/vqa`).

Not as in the release, on purpose:
- A question that is too long loses its end, never the [MASK] behind it; the release reads its answer from the last
  piece that is kept (`fine_tuning_len12`).
- An entry with a single `answer` next to the answers of all people keeps their scores; the release leaves it without.
- `vqa_advanced` (`advanced`), which predicts the pieces of an answer at several [MASK], is not offered: only its labels
  are compared.
- Two segments are VL-BERT's form of a question here, which adds no question mark: the test writes it
  (`fine_tuning_two_segments`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from visling.data.annotations.questions import QuestionRecord, release_text
from visling.data.batches.collate import Collator
from visling.data.batches.masking import TokenMasking
from visling.data.corpora.questions import QuestionAnswer
from visling.data.text import TextLayout, Tokenizer
from visling.pickles import read_object_array
from visling.runtime import generator_for
from visling.tasks.base import TaskSource
from visling.tasks.vqa import VQA, VqaConfig
from visling.types import Batch, Example, InputSpec, RegionArray, Targets, TextRow

SPLITS = {"train": ("train2014", "val2014"), "val": ("minival2014",), "test": ("test2015",)}
"""Split -> imdb files, one after the other (`rows.json`, `splits`)."""
UNREAD = cast(Batch, None)
"""The batch of a decoding that does not look at it."""


class Features(dict[str, RegionArray]):
    """Regions of the recorded files, which name no box."""

    fingerprint = "recorded"

    def __init__(self, folder: Path) -> None:
        for file in sorted(folder.rglob("*.npy")):
            features = np.load(file)
            box = np.tile(np.array([0, 0, 100, 100], np.float32), (len(features), 1))
            self[file.stem] = RegionArray(features=features, boxes=box, size=(100, 100))
        self.feature_size = next(iter(self.values())).features.shape[1]


@dataclass(frozen=True)
class Recording:
    folder: Path

    @property
    def rows(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "rows.json").read_text())
        return found

    def cases(self, name: str) -> Iterator[dict[str, Any]]:
        found = [case for case in self.rows["cases"] if case["name"] == name]
        assert found
        return iter(found)

    @property
    def data(self) -> Path:
        return self.folder / "data" / "data"

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(str(self.folder / "vocab.txt"))

    def task(self, **settings: Any) -> VQA:
        return VQA(VqaConfig(answers=self.data / "answers_vqa.txt", loss="kl", **settings))

    def records(self, split: str) -> list[QuestionRecord]:
        return [record for part in SPLITS[split] for record in self.task().records(self.folder / "data", part)]

    def layout(self, settings: Mapping[str, Any]) -> TextLayout:
        slot: Any = "same_segment" if settings["no_next_sentence"] else "second_segment"
        return TextLayout(self.tokenizer, InputSpec(max_tokens=settings["max_seq_length"], answer_slot=slot))


@pytest.fixture
def recording(golden: Path) -> Recording:
    return Recording(golden / "visualbert_tasks" / "vqa")


def compare_labels(recording: Recording, row: Mapping[str, Any], example: Example, entry: Mapping[str, Any]) -> None:
    if "label" not in row:
        assert "answer" not in example.labels
        return
    scores = example.labels["answer"]
    found = dict(zip(scores.indices.tolist(), scores.scores.tolist(), strict=True))
    assert scores.size == recording.rows["answers"]
    if "answer" in entry and not row["label"]:
        assert found  # the release forgets what people answered
    else:
        assert found == pytest.approx({int(index): score for index, score in row["label"].items()})


def entries_of(recording: Recording, split: str) -> list[dict[str, Any]]:
    """Entries of the imdb files as they are."""
    return [
        entry for part in SPLITS[split] for entry in read_object_array(recording.data / f"imdb/imdb_{part}.npy")[1:]
    ]


def asked(record: QuestionRecord, case: Mapping[str, Any]) -> QuestionRecord:
    return record if case["settings"]["no_next_sentence"] else replace(record, question=f"{record.question} ?")


@pytest.mark.parametrize("name", ["fine_tuning", "fine_tuning_len12", "fine_tuning_two_segments"])
def test_rows(recording: Recording, name: str) -> None:
    store, rng = Features(recording.data / "detectron_fix_100"), generator_for(0)
    cut = 0
    for case in recording.cases(name):
        layout, records = recording.layout(case["settings"]), recording.records(case["split"])
        entries = entries_of(recording, case["split"])
        for row, record, entry in zip(case["rows"], records, entries, strict=True):
            assert (record.id, record.images) == (str(row["question_id"]), (row["image_name"],))
            before = layout.truncated
            example = recording.task().example(asked(record, case), layout, rng)
            compare_labels(recording, row, example, entry)
            compare_text(recording, row, example.rows[0], is_cut=layout.truncated > before)
            cut += layout.truncated - before
            assert len(store[record.images[0]]) == row["regions"]
            assert float(store[record.images[0]].features.sum()) == pytest.approx(row["feature_sum"], abs=1e-4)
    assert bool(cut) == name.endswith("len12")


def compare_text(recording: Recording, row: Mapping[str, Any], found: TextRow, *, is_cut: bool) -> None:
    if not is_cut:
        assert found.ids.tolist() == row["ids"]
        assert recording.tokenizer.tokens(found.ids) == row["pieces"]
        assert found.segments.tolist() == row["segments"]
        assert found.answer_at == row["read_out"]
        return
    assert len(found.ids) == len(row["ids"])
    assert row["read_out"] == found.answer_at == len(found.ids) - 2
    assert recording.tokenizer.tokens(found.ids[-2:]) == ["[MASK]", "[SEP]"]
    assert found.ids[:-2].tolist() == row["ids"][:-2]


def test_the_official_questions_give_the_same_text(recording: Recording) -> None:
    for split in SPLITS:
        records = recording.records(split)
        written = [entry["question_str"] for entry in entries_of(recording, split)]
        assert [release_text(text) for text in written] == [record.question for record in records]


def test_labels_of_what_is_not_offered(recording: Recording) -> None:
    for case in recording.cases("advanced"):
        layout, records = recording.layout(case["settings"]), recording.records(case["split"])
        entries = entries_of(recording, case["split"])
        for row, record, entry in zip(case["rows"], records, entries, strict=True):
            example = recording.task().example(record, layout, generator_for(0))
            compare_labels(recording, row, example, entry)
            shared = example.rows[0].answer_at
            assert shared is not None
            assert example.rows[0].ids[: shared + 1].tolist() == row["ids"][: shared + 1]


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


@pytest.mark.parametrize("name", ["pretraining", "pretraining_len14"])
def test_pretraining_rows(recording: Recording, name: str) -> None:
    """Question and spelled answer, masked by the recorded draws."""
    for case in recording.cases(name):
        layout, entries = recording.layout(case["settings"]), entries_of(recording, case["split"])
        tokenizer = layout.tokenizer
        for row, record, entry in zip(case["rows"], recording.records(case["split"]), entries, strict=True):
            drawn = entry["valid_answers"][row["drawn_answer"]] if "drawn_answer" in row else entry["answer"]
            source = QuestionAnswer([replace(record, answers=(drawn,))], layout, spelled=True)
            example = source.example(0, generator_for(0))
            compare_labels(recording, row, recording.task().example(record, layout, generator_for(0)), entry)
            script = Script(row["draws"])
            collate = Collator(None, layout.spec, tokenizer, masking=TokenMasking(in_turn=True))
            batch, targets = collate([example], [cast(np.random.Generator, script)])
            assert not script.left
            assert batch.text.ids[0].tolist() == row["ids"]
            assert tokenizer.tokens(batch.text.ids[0].tolist()) == row["pieces"]
            assert batch.text.segments[0].tolist() == row["segments"]
            labels = torch.full_like(batch.text.ids[0], -1)
            assert targets.token_slots is not None
            assert targets.token_ids is not None
            chosen = targets.token_slots.mask[0]
            labels[targets.token_slots.at[0][chosen]] = targets.token_ids[0][chosen]
            assert labels.tolist() == row["mlm_labels"]


# Batch, loss, score and test file


def batch_tensors(recording: Recording) -> dict[str, Tensor]:
    return load_file(recording.folder / "batch.safetensors")


@pytest.mark.parametrize("split", ["train", "val"])
def test_batches(recording: Recording, split: str) -> None:
    expected = {
        name.removeprefix(f"{split}."): tensor
        for name, tensor in batch_tensors(recording).items()
        if name.startswith(f"{split}.")
    }
    store, count = Features(recording.data / "detectron_fix_100"), len(expected["label"])
    (case,) = (case for case in recording.cases("fine_tuning") if case["split"] == split)
    layout = recording.layout(case["settings"])
    spec = replace(layout.spec, feature_size=store.feature_size)
    source = TaskSource(recording.task(), recording.records(split)[:count], layout)
    rngs = [generator_for(0)] * count
    batch, targets = Collator(store, spec, layout.tokenizer)([source.example(n, rngs[n]) for n in range(count)], rngs)
    batch.validate()
    assert torch.equal(batch.text.ids, expected["bert_input_ids"])
    assert torch.equal(batch.text.mask, expected["bert_input_mask"].bool())
    assert torch.equal(batch.text.segments, expected["bert_input_type_ids"])
    assert batch.regions is not None
    assert torch.equal(batch.regions.mask.sum(1), expected["image_dim_variable"])
    assert_close(batch.regions.features, expected["image_feat_variable"], rtol=0, atol=1e-6)
    assert targets.answer is not None
    labelled = expected["label"].sum(1) > 0
    assert_close(targets.answer[labelled], expected["label"][labelled], rtol=0, atol=1e-6)


def test_loss_and_score(recording: Recording) -> None:
    rows, tensors, task = recording.rows, batch_tensors(recording), recording.task()
    logits, label = tensors["logits"], tensors["train.label"]
    loss = task.loss({"classify": logits}, Targets(answer=label))
    assert loss.value.item() == pytest.approx(rows["loss_on_logits"], rel=1e-6)
    records = recording.records("train")[: len(logits)]
    predictions = task.decode({"classify": logits}, UNREAD, records)
    given = [task.answers.index(prediction.value) for prediction in predictions]
    reached = [float(label[number, index]) for number, index in enumerate(given) if index is not None]
    assert reached == pytest.approx(rows["score_rows"])
    assert sum(reached) / len(reached) == pytest.approx(rows["score_on_logits"])
    unmasked = recording.task(mask_unknown=False).decode({"classify": logits}, UNREAD, records)
    assert [prediction.value for prediction in unmasked] == [task.answers[index] for index in logits.argmax(1).tolist()]


def test_test_file(recording: Recording) -> None:
    """The release's writer may answer `<unk>`; by default ours never does."""
    rows, records = recording.rows, recording.records("test")
    logits = {"classify": torch.tensor(rows["test_logits"])}
    task = recording.task(mask_unknown=False)
    assert task.submission(task.decode(logits, UNREAD, records)) == rows["test_file"]
    masked = recording.task().decode(logits, UNREAD, records)
    assert "<unk>" in {line["answer"] for line in rows["test_file"]}
    assert "<unk>" not in {prediction.value for prediction in masked}
