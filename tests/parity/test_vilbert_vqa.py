"""VQA's rows, losses and scores recorded from both official ViLBERT codes (`golden/vilbert_tasks/vqa`): beta, the first
release, and mt, the multi-task one.

Not as in the releases, on purpose:
- Beta cuts a question that is too long after it has added the special tokens, and loses [SEP]; ours always ends in it.
- Boxes beyond the picture are clipped to it; the releases keep them. Where that happens, losses and scores are of the
  recorded boxes.
- The whole image stands first in the releases; ours is apart (`Regions.whole`), the mean of the regions that the model
  sees. The releases average all regions of the file, also those beyond the limit.
- Candidates are kept up to five, where the releases list eight.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity_support import labelled
from test_vilbert import GRADIENTS, KEYS, STYLES, MultiTask
from test_vilbert import Recording as Weights
from torch import Tensor, nn
from torch.testing import assert_close

from visling.data.annotations import questions
from visling.data.annotations.image_lists import read_image_list, without_images
from visling.data.annotations.prepared_questions import VqaLayout
from visling.data.annotations.questions import QuestionRecord
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.image_ids import canonical
from visling.models.vilbert import SPEC, Vilbert
from visling.nn.heads import build
from visling.runtime import generator_for
from visling.tasks.base import TaskSource
from visling.tasks.vqa import VQA, VqaConfig
from visling.types import Batch, Head, InputSpec, RegionArray, Targets

EXACT: dict[str, Any] = {"atol": 1e-6, "rtol": 0}
CLOSE: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}


class Stored(dict[str, RegionArray]):
    """Recorded regions by the number of their image."""

    fingerprint = "recorded"

    def __init__(self, file: Path) -> None:
        with np.load(file) as found:
            arrays = dict(found)
        for image in {name.partition("/")[0] for name in arrays}:
            height, width = (int(side) for side in arrays[f"{image}/size"])
            self[image] = RegionArray(
                features=arrays[f"{image}/features"], boxes=arrays[f"{image}/boxes"], size=(width, height)
            )
        self.feature_size = next(iter(self.values())).features.shape[1]

    def __contains__(self, image: object) -> bool:
        return super().__contains__(canonical(str(image)))

    def __getitem__(self, image: str) -> RegionArray:
        return super().__getitem__(canonical(image))


@dataclass(frozen=True)
class Recording:
    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "vqa" / "data" / "VQA"

    @property
    def removed(self) -> Path:
        return self.data / "cache" / "coco_test_ids.npy"

    def described(self, case: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "vqa" / f"{case}.json").read_text())
        return found

    def arrays(self, case: str) -> dict[str, NDArray[Any]]:
        with np.load(self.folder / "vqa" / f"{case}.npz") as found:
            return dict(found)

    def cases(self) -> list[str]:
        return sorted(file.stem for file in (self.folder / "vqa").glob("rows_*.json"))

    def store(self) -> Stored:
        return Stored(self.folder / "vqa" / "data" / "features.npz")

    def task(self, layout: VqaLayout = "targets", **settings: Any) -> VQA:
        answers = self.data / "cache" / "trainval_label2ans.pkl"
        return VQA(VqaConfig(answers=answers, layout=layout, **{**SPEC.tasks["vqa"], **settings}))


@pytest.fixture
def recording(golden: Path, monkeypatch: pytest.MonkeyPatch) -> Recording:
    recording = Recording(golden / "vilbert_tasks")
    held_out = len(recording.described("rows_mt_minval")["rows"])  # 3,000 in the releases
    monkeypatch.setattr(questions, "NUM_LAST", held_out)
    return recording


def read_rows(recording: Recording, split: str, layout: VqaLayout) -> Sequence[QuestionRecord]:
    """The rows of a split of the releases, by our names of splits."""
    parts = {"trainval": ("train", "nominval"), "trainval_clean": ("train", "nominval"), "mteval": ("train",)}
    task = recording.task(layout)
    read = [task.records(recording.data, part) for part in parts.get(split, (split,))]
    if layout == "official":  # in the order of the file; the releases sort by id
        read = [sorted(part, key=lambda record: int(record.id)) for part in read]
    records = [record for part in read for record in part]
    kept = without_images(records, recording.removed)
    if split == "trainval_clean":
        return kept
    if split == "mteval":  # what the cleaned training set lacks
        return [record for record in records if record not in kept]
    return records


def collate(
    recording: Recording, records: Sequence[QuestionRecord], described: Mapping[str, Any]
) -> tuple[Batch, Targets]:
    tokenizer, store = (
        Tokenizer(str(recording.folder / "vocab.txt")),
        Stored(recording.folder / "vqa/data/features.npz"),
    )
    spec = InputSpec(
        feature_size=store.feature_size,
        max_tokens=described["max_seq_length"],
        max_regions=described["max_region_num"] - 1,  # one is the whole image
    )
    source = TaskSource(recording.task(), records, TextLayout(tokenizer, spec))
    rngs = [generator_for(0)] * len(records)
    batch, targets = Collator(store, spec, tokenizer)([source.example(n, rngs[n]) for n in range(len(source))], rngs)
    batch.validate()
    return batch, targets


def padded(tensor: Tensor, like: NDArray[Any]) -> Tensor:
    """With zeros up to the length of the recorded rows."""
    result = torch.zeros((*like.shape[:2], *tensor.shape[2:]), dtype=tensor.dtype)
    result[:, : tensor.shape[1]] = tensor
    return result


@pytest.mark.parametrize("layout", ["targets", "official"])
def test_rows(recording: Recording, layout: VqaLayout) -> None:
    """From the prepared targets, and from the people's answers that they were made of."""
    cases, cut = recording.cases(), 0
    assert {case.split("_")[1] for case in cases} == {"beta", "mt"}
    for case in cases:
        described, arrays = recording.described(case), recording.arrays(case)
        split = described["split"]
        records = read_rows(recording, split, "official" if split == "test" else layout)
        assert [(int(record.id), record.question) for record in records] == [
            (row["question_id"], row["question"]) for row in described["rows"]
        ], case
        assert [int(canonical(record.images[0])) for record in records] == [
            row["image_id"] for row in described["rows"]
        ]
        assert arrays["id"].tolist() == [int(record.id) for record in records]
        assert described["label2ans"] == list(recording.task().answers)
        batch, targets = collate(recording, records, described)
        cut += compare_text(batch, arrays, loses_end="beta" in case)
        compare_regions(recording, records, batch, arrays)
        if split == "test":
            assert targets.answer is None
            assert not arrays["target"].any()
        else:
            assert targets.answer is not None
            assert_close(targets.answer, torch.from_numpy(arrays["target"]), **EXACT)
    assert cut


def compare_text(batch: Batch, arrays: Mapping[str, NDArray[Any]], *, loses_end: bool) -> int:
    """Compares text; returns how many rows have lost their [SEP]."""
    ids, theirs = padded(batch.text.ids, arrays["tokens"]), torch.from_numpy(arrays["tokens"])
    ends = batch.text.mask.sum(1) - 1
    rows = torch.arange(len(ids))
    lost = theirs[rows, ends] != ids[rows, ends]
    assert not lost.any() or loses_end
    assert (ends[lost] == theirs.shape[1] - 1).all()
    theirs[rows[lost], ends[lost]] = ids[rows[lost], ends[lost]]
    assert torch.equal(ids, theirs)
    assert torch.equal(padded(batch.text.mask, arrays["input_mask"]), torch.from_numpy(arrays["input_mask"]).bool())
    assert torch.equal(padded(batch.text.segments, arrays["segment_ids"]), torch.from_numpy(arrays["segment_ids"]))
    return int(lost.sum())


def compare_regions(
    recording: Recording, records: Sequence[QuestionRecord], batch: Batch, arrays: Mapping[str, NDArray[Any]]
) -> None:
    regions, store = batch.regions, recording.store()
    assert regions is not None
    features, boxes, mask = (torch.from_numpy(arrays[name]) for name in ("features", "spatials", "image_mask"))
    assert torch.equal(padded(regions.mask, arrays["image_mask"][:, 1:]), mask[:, 1:].bool())
    assert bool(mask[:, 0].all())
    assert_close(padded(regions.features, arrays["features"][:, 1:]), features[:, 1:], **EXACT)
    assert_close(padded(regions.boxes, arrays["spatials"][:, 1:]), boxes[:, 1:, :4].clamp(0, 1), **EXACT)
    assert torch.equal(boxes[:, 0], torch.tensor([0.0, 0, 1, 1, 1]).expand(len(boxes), 5))
    for number, record in enumerate(records):
        everything = store[record.images[0]].features
        assert_close(features[number, 0], torch.from_numpy(everything.mean(0)), **EXACT)


def test_a_cleaned_training_set_lacks_the_listed_images(recording: Recording) -> None:
    listed = read_image_list(recording.removed)
    records = read_rows(recording, "trainval", "targets")
    kept = read_rows(recording, "trainval_clean", "targets")
    assert 0 < len(kept) < len(records)
    assert [record for record in records if canonical(record.images[0]) not in listed] == list(kept)


# Losses and scores: the batch of all training rows


class Model(nn.Module):
    """The recorded encoder and the classifier of a release."""

    def __init__(self, weights: Weights, release: str) -> None:
        super().__init__()
        multi_task = MultiTask(weights)
        self.release, self.encoder, self.head = release, multi_task.encoder, multi_task.heads["classifier"]
        self.layout = {"mt": "multitask", "beta": "first"}[release]
        if release == "beta":  # it has no task tokens, and a classifier of its own
            source = weights.extras("beta_vqa_head")
            self.encoder = Vilbert(replace(multi_task.encoder.config, num_tasks=0))
            kept = {n: t for n, t in multi_task.encoder.state_dict().items() if not n.startswith("tasks.")}
            self.encoder.load_state_dict(kept)
            outputs = len(source["vil_prediction.main.3.bias"])
            self.head = build(
                Head(kind="classify", outputs=outputs), self.encoder.dims, style=STYLES["first", "classify"]
            )
            KEYS["first"].load(source, {"classifier": self.head})
        self.eval()

    def forward(self, batch: Batch, number: int) -> dict[str, Tensor]:
        if self.release == "mt":
            task = torch.full((len(batch.text.ids),), number)
            batch = replace(batch, text=replace(batch.text, task=task))
        return {"classify": self.head(self.encoder(batch).pooled)}

    def gradient_norms(self) -> dict[str, Tensor]:
        """By official name."""
        gradients = {
            f"{part}.{name}": parameter.grad
            for part, module in (("encoder", self.encoder), ("classifier", self.head))
            for name, parameter in module.named_parameters()
        }
        given = {name: tensor for name, tensor in gradients.items() if tensor is not None}
        return {
            theirs: tensor.norm()
            for part in ("encoder", "classifier")
            for theirs, tensor in KEYS["multitask" if part == "encoder" else self.layout]
            .invert({name: tensor for name, tensor in given.items() if name.startswith(part)})
            .items()
        }


def recorded_batch(recording: Recording, release: str) -> tuple[Batch, Targets, list[QuestionRecord]]:
    """Our batch of all training rows, with the boxes, the whole image and (beta) the lost [SEP] as recorded."""
    case = f"rows_{release}_train"
    arrays, records = recording.arrays(case), list(read_rows(recording, "train", "targets"))
    batch, targets = collate(recording, records, recording.described(case))
    assert batch.regions is not None
    length, count = batch.text.ids.shape[1], batch.regions.mask.shape[1]
    text = replace(batch.text, ids=torch.from_numpy(arrays["tokens"])[:, :length])
    regions = replace(
        batch.regions,
        boxes=torch.from_numpy(arrays["spatials"])[:, 1 : count + 1, :4].contiguous(),
        whole=torch.from_numpy(arrays["features"])[:, 0].contiguous(),
    )
    return replace(batch, text=text, regions=regions), targets, records


def compare_step(recording: Recording, weights: Weights, release: str, change: Callable[[Model], Any]) -> None:
    expected, model = recording.described(f"step_{release}"), Model(weights, release)
    change(model)
    batch, targets, records = recorded_batch(recording, release)
    task = recording.task()
    logits = model(batch, int(expected["task_id_used"].removeprefix("TASK")))
    loss = task.loss(logits, targets)
    for part in ("train", "val"):
        assert_close(loss.value, torch.tensor(expected[f"{part}_loss"]), **CLOSE)
    reached, count = loss.parts["answer_accuracy"]
    assert int(count) == expected["val_batch_size"]
    assert_close(reached, torch.tensor(expected["val_score_sum"]), **CLOSE)
    assert_close(reached / count, torch.tensor(expected["train_score"]), **CLOSE)
    loss.value.backward()  # type: ignore[no-untyped-call]
    norms = model.gradient_norms()
    assert expected["grad_norms"].keys() <= norms.keys()
    for name, norm in norms.items():
        recorded = torch.tensor(expected["grad_norms"].get(name, 0.0))  # zero ones are left out
        assert_close(norm, recorded, **GRADIENTS, msg=labelled(name))
    total = torch.stack(list(norms.values())).norm()
    assert_close(total, torch.tensor(expected["grad_total_norm"]), **GRADIENTS)
    predictions = task.decode(logits, batch, records)
    assert task.submission(predictions) == expected["evaluation"]["results"]
    for prediction, other in zip(predictions, expected["evaluation"]["others"], strict=False):
        assert [answer for answer, _ in prediction.top] == other["answer"][: len(prediction.top)]


@pytest.mark.parametrize("release", ["beta", "mt"])
def test_losses_scores_and_gradients(recording: Recording, golden: Path, release: str) -> None:
    compare_step(recording, Weights(golden / "vilbert"), release, lambda model: None)


def _nudge(model: Model) -> None:
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.view(-1)[0] += 0.01


@pytest.mark.parametrize("release", ["beta", "mt"])
def test_a_nudged_classifier_is_noticed(recording: Recording, golden: Path, release: str) -> None:
    with pytest.raises(AssertionError):
        compare_step(recording, Weights(golden / "vilbert"), release, _nudge)
