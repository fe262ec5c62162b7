"""NLVR2 in ViLBERT's multi-task code (`golden/vilbert_tasks/nlvr2`): rows of both images, word pieces, targets, and a
step of all training rows: loss, accuracy, gradient norms.

Not as in the release, on purpose:
- It joins the rows of both images before it pads or cuts them, and halves the result: the halves mix wherever the first
  image has fewer or more regions than expected. Ours pads and cuts each image by itself. Both are compared with the
  rows of the files; the step is of its mixed rows, with its locations (half a row need not begin with the whole image).
- Its whole image is the mean of all regions of the file, also of those beyond the limit; ours of those that the model
  sees. The comparison computes it from the file.
- Boxes beyond the picture are cut to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_vilbert import GRADIENTS, KEYS, MultiTask
from test_vilbert import Recording as Weights
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from visling.data.annotations.statements import Nlvr2Record
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.models import vilbert
from visling.nn import embeddings
from visling.nn.packing import Packing
from visling.runtime import generator_for
from visling.tasks.base import TaskSource
from visling.tasks.nlvr2 import NLVR2, Nlvr2Config
from visling.types import Batch, InputSpec, RegionArray, Regions, Targets

EXACT: dict[str, Any] = {"atol": 1e-6, "rtol": 0}
CLOSE: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}


class Stored(dict[str, RegionArray]):
    """Recorded regions by image."""

    fingerprint = "recorded"

    def __init__(self, file: Path) -> None:
        with np.load(file) as found:
            arrays = dict(found)
        for image in {name.rpartition("/")[0] for name in arrays}:
            height, width = (int(side) for side in arrays[f"{image}/size"])
            self[image] = RegionArray(
                features=arrays[f"{image}/features"], boxes=arrays[f"{image}/boxes"], size=(width, height)
            )
        self.feature_size = next(iter(self.values())).features.shape[1]


@dataclass(frozen=True)
class Recording:
    folder: Path

    def described(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "nlvr2" / f"{name}.json").read_text(encoding="utf-8"))
        return found

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        with np.load(self.folder / "nlvr2" / f"{name}.npz") as found:
            return dict(found)

    @property
    def cases(self) -> list[str]:
        return sorted(file.stem for file in (self.folder / "nlvr2").glob("rows_*.json"))

    @property
    def task(self) -> NLVR2:
        """With the settings of the family's release."""
        return NLVR2(Nlvr2Config(**vilbert.SPEC.tasks["nlvr2"]))

    @property
    def store(self) -> Stored:
        return Stored(self.folder / "nlvr2" / "data" / "features.npz")

    def records(self, case: str) -> list[Nlvr2Record]:
        return self.task.records(self.folder / "nlvr2" / "data", self.described(case)["split"])

    def collate(self, case: str) -> tuple[Batch, Targets]:
        described, records, store = self.described(case), self.records(case), self.store
        tokenizer = Tokenizer(str(self.folder / "vocab.txt"))
        spec = InputSpec(
            feature_size=store.feature_size,
            max_tokens=described["max_seq_length"],
            max_regions=described["max_region_num"] - 1,  # one is the whole image
        )
        source = TaskSource(self.task, records, TextLayout(tokenizer, spec))
        rngs = [generator_for(0)] * len(records)
        examples = [source.example(number, rngs[0]) for number in range(len(records))]
        batch, targets = Collator(store, spec, tokenizer)(examples, rngs)
        batch.validate()
        return batch, targets


@pytest.fixture
def recording(golden: Path) -> Recording:
    return Recording(golden / "vilbert_tasks")


def test_texts_and_targets(recording: Recording) -> None:
    assert len(recording.cases) >= 2
    for case in recording.cases:
        described, arrays, records = recording.described(case), recording.arrays(case), recording.records(case)
        batch, targets = recording.collate(case)
        assert [record.sentence for record in records] == [row["question"] for row in described["rows"]]
        assert [list(record.images) for record in records] == [row["image_id"] for row in described["rows"]]
        assert [row["question_id"] for row in described["rows"]] == arrays["id"].tolist() == [*range(len(records))]
        for ours, theirs in (("ids", "tokens"), ("mask", "input_mask"), ("segments", "segment_ids")):
            values = getattr(batch.text, ours)[:: batch.group].long()
            assert torch.equal(values, getattr(batch.text, ours)[1 :: batch.group].long()), "both images, one sentence"
            padded = F.pad(values, (0, arrays[theirs].shape[1] - values.shape[1]))
            np.testing.assert_array_equal(padded, arrays[theirs])
        assert targets.answer is not None
        assert described["num_labels"] == arrays["target"].shape[1]
        np.testing.assert_array_equal(F.one_hot(targets.answer, described["num_labels"]), arrays["target"])


def test_rows_of_each_image(recording: Recording) -> None:
    """The release's joined rows are those of the files, and ours are the first ones of each image."""
    mixed = 0
    for case in recording.cases:
        arrays, store = recording.arrays(case), recording.store
        batch, _ = recording.collate(case)
        regions = batch.regions
        assert regions is not None
        length = recording.described(case)["max_region_num"]
        for number, record in enumerate(recording.records(case)):
            features, boxes = [], []
            for side, image in enumerate(record.images):
                row, stored = 2 * number + side, store[image]
                real = regions.mask[row]
                own = torch.from_numpy(stored.features)
                corners = torch.from_numpy(stored.boxes) / torch.tensor(stored.size * 2)
                assert int(real.sum()) == min(len(own), length - 1)
                assert_close(regions.features[row][real], own[: length - 1], **EXACT)
                assert_close(regions.boxes[row][real], corners[: length - 1].clamp(0, 1), **EXACT)
                features += [own.mean(0, keepdim=True), own]
                boxes += [torch.tensor([[0.0, 0, 1, 1]]), corners]
                mixed += side == 0 and len(own) != length - 1
            joined, located = torch.cat(features)[: 2 * length], torch.cat(boxes)[: 2 * length]
            mask = torch.from_numpy(arrays["image_mask"][number]).bool()
            assert torch.equal(mask, torch.arange(2 * length) < len(joined))
            assert_close(torch.from_numpy(arrays["features"][number])[mask], joined, **EXACT)
            assert_close(torch.from_numpy(arrays["spatials"][number])[mask][:, :4], located, **EXACT)
    assert mixed, "the recording has a first image with more or fewer regions than the release expects"


def recorded_batch(recording: Recording, case: str, task: int) -> tuple[Batch, Targets, Tensor]:
    """The release's own rows, halved as it halves them, and their locations with the first one last, as ours are."""
    arrays = {name: torch.from_numpy(array) for name, array in recording.arrays(case).items()}
    length = recording.described(case)["max_region_num"]

    def halve(name: str) -> Tensor:
        return arrays[name].reshape(-1, length, *arrays[name].shape[2:])

    features, mask, located = halve("features"), halve("image_mask").bool(), halve("spatials")
    text, targets = recording.collate(case)
    rows = len(features)
    batch = Batch(
        text=replace(text.text, task=torch.full((rows,), task)),
        regions=Regions(
            features=features[:, 1:],
            boxes=located[:, 1:, :4],
            mask=mask[:, 1:],
            size=torch.ones(rows, 2),
            whole=features[:, 0],
        ),
        group=text.group,
    )
    assert bool(mask[:, 0].all())
    return batch, targets, located.roll(-1, dims=1)


def compare_step(
    recording: Recording,
    weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[MultiTask], Any] = lambda model: None,
    task: NLVR2 | None = None,
) -> None:
    expected, model = recording.described("step_mt"), MultiTask(weights)
    change(model)
    number = int(expected["task_id_used"].removeprefix("TASK"))
    batch, targets, located = recorded_batch(recording, "rows_mt_train", number)
    assert batch.regions is not None
    rows = Packing.of(F.pad(batch.regions.mask, (0, 1), value=True))  # the whole image is the last
    monkeypatch.setattr(embeddings, "locate", lambda boxes: rows.pack(located))
    head, task = model.heads["pair"], task or recording.task
    logits = {"classify": head(model.encoder(batch).pooled)}
    loss = task.loss(logits, targets)
    for part in (expected["train_loss"], expected["val_loss"], expected["evaluation"]["loss"]):
        assert_close(loss.value, torch.tensor(part), **CLOSE)
    hits, count = loss.parts["answer_accuracy"]
    assert int(hits) == expected["val_score_sum"] == expected["evaluation"]["score_sum"]
    assert int(count) == expected["val_batch_size"]
    assert_close(hits / count, torch.tensor(expected["train_score"]), **CLOSE)
    loss.value.backward()  # type: ignore[no-untyped-call]
    norms = official_gradient_norms({"encoder": model.encoder, "pair": head})
    assert expected["grad_norms"].keys() <= norms.keys()
    for name, norm in norms.items():
        recorded = torch.tensor(expected["grad_norms"].get(name, 0.0))  # zero ones are left out
        assert_close(norm, recorded, **GRADIENTS, msg=lambda text, n=name: f"{n}: {text}")
    total = torch.stack(list(norms.values())).norm()
    assert_close(total, torch.tensor(expected["grad_total_norm"]), **GRADIENTS)


def official_gradient_norms(parts: Mapping[str, torch.nn.Module]) -> dict[str, Tensor]:
    """Norm of each gradient, by the release's name of the parameter."""
    gradients = {
        f"{part}.{name}": parameter.grad
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    return {name: tensor.norm() for name, tensor in KEYS["multitask"].invert(gradients).items()}


def test_loss_accuracy_and_gradients(recording: Recording, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare_step(recording, Weights(golden / "vilbert"), monkeypatch)


def _nudge(model: MultiTask) -> None:
    with torch.no_grad():
        for parameter in model.heads["pair"].parameters():
            parameter.view(-1)[0] += 0.01


def test_a_nudged_head_and_another_loss_are_noticed(
    recording: Recording, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights(golden / "vilbert")
    with pytest.raises(AssertionError):
        compare_step(recording, weights, monkeypatch, _nudge)
    with pytest.raises(AssertionError):
        compare_step(recording, weights, monkeypatch, task=NLVR2(Nlvr2Config(joined=False, loss="cross_entropy")))
