"""VQA's rows, logits, loss and first answer weights as the official VL-BERT code has them (`golden/vlbert_tasks/vqa`).

Not as in the release, on purpose:
- Questions and annotations are paired by id, not by position (`minival_annotations_in_other_order`), and every image
  set can be opened.
- With the question files, the release takes punctuation out of its list of answers and leaves the people's as they are;
  ours reads the list as it is written. The tests use the recorded list, in which a second "no" can have no score.
- With imdb files, the release exchanges whole words left and right, with question files word pieces; ours always word
  pieces, so "leftmost" is exchanged too.
- The release mirrors boxes in the resized picture, ours in the original one: up to a pixel apart. It clamps boxes to
  the last pixel, ours to the edge; the tests clamp.
- The whole image stands first in the release and always apart in ours (`val_no_image_box`). Its feature is the mean of
  the regions; an `image_box_feature` of the file is not read.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from parity_support import labelled
from safetensors.torch import load_file
from test_vlbert import CLOSE, GRADIENTS, LOSSES, Given, whole_last
from torch import Tensor
from torch.testing import assert_close

from visling import models
from visling.data.annotations.questions import QuestionRecord
from visling.data.answers import AnswerVocabulary
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer, swap_sides
from visling.errors import DataError
from visling.image_ids import canonical
from visling.metrics.answers import strip_marks
from visling.models.base import TaskStart
from visling.models.task_model import TaskModel
from visling.models.vlbert import SPEC, VlBertConfig
from visling.nn.head_blocks import TransformClassifier
from visling.runtime import generator_for
from visling.tasks.base import TaskSource
from visling.tasks.vqa import VQA, VqaConfig
from visling.types import Batch, Example, InputSpec, RegionArray, Regions, Targets


class Precomputed(dict[str, RegionArray]):
    """Regions of a folder of JSON files, by the number of their image."""

    fingerprint = "recorded"

    def __init__(self, folder: Path) -> None:
        for file in sorted(folder.glob("*.json")):
            entry = json.loads(file.read_text())
            boxes, features = (
                np.frombuffer(base64.b64decode(entry[name]), np.float32).reshape(entry["num_boxes"], -1)
                for name in ("boxes", "features")
            )
            self[file.stem] = RegionArray(
                features=features, boxes=boxes, size=(int(entry["image_w"]), int(entry["image_h"]))
            )
        self.feature_size = next(iter(self.values())).features.shape[1]

    def __contains__(self, image: object) -> bool:
        return super().__contains__(canonical(str(image)))

    def __getitem__(self, image: str) -> RegionArray:
        return super().__getitem__(canonical(image))


@dataclass(frozen=True)
class Recording:
    folder: Path

    def read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return found

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def case(self, name: str) -> dict[str, Any]:
        (found,) = (case for case in self.read("rows")["cases"] if case["name"] == name)
        return dict(found)

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(str(self.folder / "vocab.txt"))

    def answers(self, *, imdb: bool) -> AnswerVocabulary:
        """The recorded list; a second entry of the same spelling gets one that nobody answers."""
        listed = self.read("rows")["answer_vocab_imdb" if imdb else "answer_vocab_questions_json"]
        return AnswerVocabulary(
            [answer if answer not in listed[:n] else f"second {answer}" for n, answer in enumerate(listed)]
        )

    def task(self, *, imdb: bool = False) -> VQA:
        config = VqaConfig(layout="imdb" if imdb else "official", **SPEC.tasks["vqa"])
        return VQA(config, self.answers(imdb=imdb))

    def records(self, case: Mapping[str, Any]) -> list[QuestionRecord]:
        task = self.task(imdb=case["use_imdb"])
        return [
            record
            for part in case["image_set"].split("+")
            for record in task.records(self.folder / "data" / "vqa", part)
        ]

    def layout(self, feature_size: int = 2048) -> TextLayout:
        slot: Any = "second_segment"
        return TextLayout(self.tokenizer, InputSpec(answer_slot=slot, feature_size=feature_size, max_regions=100))


@pytest.fixture
def recording(golden: Path) -> Recording:
    return Recording(golden / "vlbert_tasks" / "vqa")


def names(golden: Path) -> list[str]:
    found = json.loads((golden / "vlbert_tasks" / "vqa" / "rows.json").read_text())["cases"]
    return [case["name"] for case in found]


def test_rows(recording: Recording, golden: Path) -> None:
    compared = 0
    for name in names(golden):
        case = recording.case(name)
        for row, record in zip(case["rows"], recording.records(case), strict=True):
            folder = (recording.folder / "data" / row["box_file"]).parent
            compare_row(recording, case, row, record, Precomputed(folder))
            compared += 1
    assert compared > len(names(golden))


def compare_row(
    recording: Recording, case: Mapping[str, Any], row: Mapping[str, Any], record: QuestionRecord, store: Precomputed
) -> None:
    where = f"{case['name']}, question {row['question_id']}"
    assert record.id == str(row["question_id"]), where
    assert canonical(record.images[0]) == str(row["image_id"]), where
    if case["use_imdb"]:  # the recorded question files do not say that their images are COCO's
        assert record.images[0] == Path(row["image_file"]).stem, where
    layout = recording.layout(store.feature_size)
    flipped = case["flip_forced"]
    example = recording.task(imdb=case["use_imdb"]).example(record, layout, generator_for(0))
    compare_text(layout, row, example, swap=flipped, by_word=case["use_imdb"])
    if case["name"] == "minival_annotations_in_other_order":
        shown = {str(other["question_id"]): other["answers"] for other in case["rows"]}
        assert list(record.answers or ()) in [answers for name, answers in shown.items() if name != record.id]
    elif "label" in row:
        compare_labels(row, example, record, swap=flipped)
    else:
        assert record.answers is None
    collate = Collator(store, layout.spec, layout.tokenizer, flip=float(flipped))
    batch, _ = collate([example], [generator_for(0)])
    batch.validate()
    compare_regions(row, batch, store[record.images[0]], whole=case["image_box"], flipped=flipped)


def compare_text(layout: TextLayout, row: Mapping[str, Any], example: Example, *, swap: bool, by_word: bool) -> None:
    found = swap_sides(example.rows[0], layout.tokenizer) if swap else example.rows[0]
    special = layout.tokenizer
    assert found.ids[[0, -3, -2, -1]].tolist() == [special.cls, special.sep, special.mask, special.sep]
    assert found.segments.tolist() == [0] * (len(found.ids) - 2) + [1, 1]
    question = found.ids[1:-3].tolist()
    if swap and by_word:  # words of several pieces stay as they are in the release
        pieces = row["pieces"]
        stays = {n for n, piece in enumerate(pieces[1:]) if piece.startswith("##") and pieces[n] in ("left", "right")}
        question = [example.rows[0].ids[1 + n] if n in stays else piece for n, piece in enumerate(question)]
    assert question == row["ids"]
    assert layout.tokenizer.tokens(row["ids"]) == row["pieces"]


def compare_labels(row: Mapping[str, Any], example: Example, record: QuestionRecord, *, swap: bool) -> None:
    assert list(record.answers or ()) == row["answers"]
    labels = {**example.labels, **example.mirrored_labels} if swap else example.labels
    scores = labels["answer"]
    found = dict(zip(scores.indices.tolist(), scores.scores.tolist(), strict=True))
    assert found == pytest.approx({int(index): score for index, score in row["label"].items()})


def compare_regions(row: Mapping[str, Any], batch: Batch, stored: RegionArray, *, whole: bool, flipped: bool) -> None:
    width, height, x_ratio, y_ratio = row["im_info"]
    regions = batch.regions
    assert regions is not None
    count = int(regions.mask.sum())
    assert count + whole == row["regions"]
    size = np.array(stored.size, np.float32)
    resized = np.array([x_ratio, y_ratio] * 2, np.float32) * np.concatenate([size, size]) * regions.boxes[0].numpy()
    boxes: NDArray[np.float32] = np.clip(resized, 0, np.array([width - 1, height - 1] * 2, np.float32))
    first = np.array(row["box_first_2_and_last"])
    near = 0.01 + flipped * abs(x_ratio - 1)
    compared = [boxes[0], boxes[-1]] if whole else [boxes[0], boxes[1], boxes[-1]]
    np.testing.assert_allclose(compared, first[-len(compared) :], atol=near)
    corner = size - 1
    everything = np.array([0, 0, *corner]) * np.array([x_ratio, y_ratio] * 2)
    total = boxes.sum(0) + whole * everything
    if whole:
        left, _, right, _ = everything
        mirrored = everything if not flipped else np.array([width - 1 - right, 0, width - 1 - left, everything[3]])
        np.testing.assert_allclose(mirrored, first[0], atol=0.01)
        total = boxes.sum(0) + mirrored
    np.testing.assert_allclose(total, row["box_sum"], atol=0.01 + near * count)
    features = regions.features[0, :count].numpy()
    given = np.array(row["first_feature"])
    if not whole:
        np.testing.assert_allclose(features[0], given, atol=1e-5)
    assert features.sum() + whole * given.sum() == pytest.approx(row["feature_sum"], abs=1e-3)
    np.testing.assert_array_equal(features, stored.features)


def test_a_whole_image_without_a_feature_of_its_own_is_the_mean(recording: Recording) -> None:
    """Of the files with 36 regions; the others hold an `image_box_feature`."""
    case = recording.case("val_36")
    for row, record in zip(case["rows"], recording.records(case), strict=True):
        file = recording.folder / "data" / row["box_file"]
        assert "image_box_feature" not in json.loads(file.read_text())
        mean = Precomputed(file.parent)[record.images[0]].features.mean(0)
        np.testing.assert_allclose(mean, row["first_feature"], atol=1e-5)


def test_the_release_strips_its_list_of_answers(recording: Recording) -> None:
    written = (recording.folder / "data" / "vqa" / "answers_vqa.txt").read_text().splitlines()
    kept = [line.strip().lower() for line in written if line.strip()]
    rows = recording.read("rows")
    assert kept == rows["answer_vocab_imdb"]
    assert [strip_marks(line) for line in kept[1:]] == rows["answer_vocab_questions_json"][1:]


def test_a_folder_with_two_layouts_is_refused(recording: Recording) -> None:
    folder = recording.folder / "data" / "vqa"
    with pytest.raises(DataError, match=r"several layouts: official .*; imdb .*task_settings.layout=official"):
        VQA().records(folder, "train")
    assert VQA().records(folder / "vqa_imdb", "train")


def test_question_files_need_no_imdb_file(recording: Recording, tmp_path: Path) -> None:
    """The release looks every image set up in its table of imdb files, and stops at those that it lacks."""
    unknown = recording.read("rows")["image_sets_that_the_release_cannot_open"]
    assert unknown
    (given,) = (recording.folder / "data" / "vqa").glob("*test2015_questions.json")
    for split in unknown:
        (tmp_path / f"v2_OpenEnded_mscoco_{split}_questions.json").write_bytes(given.read_bytes())
        assert [record.id for record in recording.task().records(tmp_path, split)] == [
            str(row["question_id"]) for row in recording.case("test")["rows"]
        ]


# Logits, loss and first weights


def build_model(recording: Recording) -> TaskModel:
    expected = recording.read("expected")["batch"]
    tensors = recording.tensors("model")
    config = VlBertConfig(
        vocab_size=expected["vocab"],
        hidden_size=expected["hidden"],
        num_layers=expected["layers"],
        num_heads=expected["heads"],
        intermediate_size=expected["intermediate"],
        max_positions=expected["positions"],
        max_tokens=expected["positions"] - 2,
        visual_size=len(tensors["vlbert.visual_ln_object.weight"]),
        feature_size=recording.tensors("batch")["boxes_and_features"].shape[-1] - 4,
    )
    model = TaskModel(SPEC.build(config), recording.task().heads, models.head_styles("vlbert"))
    # The layers that would compute obj_reps are not recorded
    SPEC.keys["vqa"].load(tensors, {"encoder": model.encoder, "classifier": model.heads["classify"]}, strict=False)
    batch = recording.tensors("batch")
    model.encoder.projection = Given(
        whole_last(batch["obj_reps"]), whole_last(batch["boxes_and_features"][..., 0] > -1.5)
    )
    return model.eval()


def collate(recording: Recording) -> tuple[Batch, Targets]:
    expected, tensors = recording.read("expected")["batch"], recording.tensors("batch")
    case = recording.case("train")
    asked = {record.id: record for record in recording.records(case)}
    records = [asked[str(number)] for number in expected["question_ids"]]
    layout = recording.layout()
    source = TaskSource(recording.task(), records, layout)
    rngs = [generator_for(0)] * len(records)
    batch, targets = Collator(None, layout.spec, layout.tokenizer)(
        [source.example(n, rngs[n]) for n in range(len(records))], rngs
    )
    text = batch.text
    assert text.answer_at is not None
    for name, ours in {"ids": text.ids, "segments": text.segments, "answer_position": text.answer_at}.items():
        assert torch.equal(ours, tensors[f"text.{name}"])
    assert torch.equal(text.mask, tensors["text.mask"].bool())
    assert targets.answer is not None
    assert_close(targets.answer, tensors["label"], rtol=0, atol=1e-6)
    mask = tensors["boxes_and_features"][:, 1:, 0] > -1.5
    regions = Regions(
        features=torch.zeros(*mask.shape, tensors["boxes_and_features"].shape[-1] - 4),
        boxes=torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(*mask.shape, 4),
        mask=mask,
        size=tensors["im_info"][:, :2],
    )
    batch = Batch(text=text, regions=regions)
    batch.validate()
    return batch, targets


def test_logits_loss_and_gradients(recording: Recording) -> None:
    expected, model = recording.read("expected"), build_model(recording)
    batch, targets = collate(recording)
    logits = model(batch)
    assert_close(logits["classify"], recording.tensors("batch")["logits"], **CLOSE)
    loss = recording.task().loss(logits, targets)
    assert_close(loss.value, torch.tensor(expected["loss"]), **LOSSES)
    reached, count = loss.parts["answer_accuracy"]
    assert float(reached / count) == pytest.approx(expected["soft_accuracy"])
    loss.value.backward()  # type: ignore[no-untyped-call]
    gradients = {
        name.replace("heads.classify.", "classifier."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    norms = {name: tensor.norm() for name, tensor in SPEC.keys["vqa"].invert(gradients).items()}
    compared = 0
    for name, recorded in expected["grad_norm"].items():
        if name in norms:
            assert_close(norms[name], torch.tensor(recorded), **GRADIENTS, msg=labelled(name))
            compared += 1
    assert compared == len(expected["grad_norm"])


def test_answers_start_from_their_word_vectors(recording: Recording) -> None:
    started, model = recording.read("expected")["answer_start"], build_model(recording)
    tokenizer, answers = recording.tokenizer, recording.read("rows")["answer_vocab_questions_json"]
    assert [each["answer"] for each in started] == answers
    pieces = [tokenizer.encode(answer) for answer in answers]
    assert pieces == [each["ids"] for each in started]
    assert [tokenizer.tokens(ids) for ids in pieces] == [each["pieces"] for each in started]
    head = model.heads["classify"]
    assert isinstance(head, TransformClassifier)
    bias = head.linear.bias.detach().clone()
    assert SPEC.start_task is not None
    SPEC.start_task(
        TaskStart(
            encoder=model.encoder,
            heads=dict(model.heads.items()),
            kinds=model.kinds,
            objectives={},
            answers=pieces,
        )
    )
    norms = head.linear.weight.norm(dim=1)
    assert_close(norms, torch.tensor([each["weight_norm"] for each in started]), rtol=1e-5, atol=1e-6)
    assert torch.equal(head.linear.bias, bias)
