"""VL-BERT's fine-tuning on VCR (`golden/vlbert_tasks/vcr`; the README next to it says what each file holds): texts,
links, cuts, labels and classes of every recorded row, losses and gradients of a recorded batch, masks of outlines.

Names continue to be counted from row to row in the release, so each row is laid out with the recorded counter. In test
mode the release does not cut the texts of rationales; ours are laid out with room for all. The recorded tag 0 (-1
without whole image) is what a token without a link reads here, the whole image. Pixels are not compared: pictures are
read by `vision`. The first region of the recording is the whole image; here it is the last.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_vlbert import Given, whole_last
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from visling import models
from visling.data.annotations.vcr import VcrRecord, read_metadata, read_vcr, with_names
from visling.data.batches.collate import Collator
from visling.data.named_objects import CLASSES, LISTED_NAMES, list_names
from visling.data.named_text import Order, split_words
from visling.data.outlines import outline_mask
from visling.data.text import TextLayout, Tokenizer
from visling.models.task_model import TaskModel
from visling.models.vlbert import VlBertConfig
from visling.tasks.base import TaskSource
from visling.tasks.vcr import VCR, VcrConfig
from visling.types import Batch, RegionArray, Targets, TextRow
from visling.vision.end_to_end import ExtractorConfig
from visling.vision.pictures import PictureFiles

CASES = (
    "q2a_train", "q2a_train_flip", "q2a_val", "q2a_test", "q2a_train_len20", "q2a_train_relevant",
    "q2a_train_basic_align", "q2a_val_no_image_box", "qa2r_train", "qa2r_train_len24", "qa2r_train_relevant",
    "qa2r_val_noq", "qa2r_test",
)  # fmt: skip
LOSSES: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}
GRADIENTS: dict[str, Any] = {"atol": 1e-7, "rtol": 1e-4}


class Counted(np.random.Generator):
    """Draws the number that the release's counter had."""

    def __init__(self, number: int) -> None:
        super().__init__(np.random.PCG64(0))
        self.number = number

    def integers(self, high: int, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        return self.number % high


@pytest.fixture
def folder(golden: Path) -> Path:
    return golden / "vlbert_tasks" / "vcr"


def settings(**changed: Any) -> VcrConfig:
    return VcrConfig(**{**models.spec("vlbert").tasks["vcr"], "new_names": True, **changed})


def records(folder: Path, split: str) -> dict[str, VcrRecord]:
    found = read_vcr(folder / "data" / f"{split}.jsonl", folder / "data" / "vcr1images").records
    return {record.id: record for record in found}


def task_of(case: dict[str, Any]) -> VCR:
    return VCR(
        settings(
            phase={"Q2A": "answer", "QA2R": "rationale"}[case["task"]],
            with_question=not case["qa2r_noq"],
            only_relevant=case["only_use_relevant_dets"],
        )
    )


def layout_of(folder: Path, case: dict[str, Any]) -> TextLayout:
    room = 512 if (case["task"], case["mode"]) == ("QA2R", "test") else case["seq_len"]
    tokenizer = Tokenizer(str(folder / "vocab.txt"))
    spec = models.spec("vlbert").inputs(models.spec("vlbert").presets["tiny"])
    return TextLayout(tokenizer, replace(spec, max_tokens=room + 3))


def halves(row: TextRow, tokenizer: Tokenizer) -> tuple[slice, slice]:
    """Places of context and choice in a row."""
    middle, end = np.flatnonzero(row.ids == tokenizer.sep)
    assert row.ids[0] == tokenizer.cls
    assert end == len(row.ids) - 1
    assert row.segments.tolist() == [0] * (middle + 1) + [1] * (end - middle)
    return slice(1, int(middle)), slice(int(middle) + 1, int(end))


def tags_of(row: TextRow, kept: list[int], *, image_box: bool) -> list[int]:
    """The links as the release counts them."""
    tags = [0 if image_box else -1] * len(row.ids)
    for token, item in row.links:
        tags[token] = kept.index(item) + image_box
    return tags


def load_case(folder: Path, name: str) -> dict[str, Any]:
    cases = json.loads((folder / "rows.json").read_text(encoding="utf-8"))["cases"]
    found: dict[str, Any] = next(case for case in cases if case["name"] == name)
    return found


def test_every_recorded_case_is_compared(folder: Path) -> None:
    recorded = json.loads((folder / "rows.json").read_text(encoding="utf-8"))["cases"]
    assert [case["name"] for case in recorded] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_texts_links_and_labels_are_those_of_the_release(folder: Path, name: str) -> None:
    case = load_case(folder, name)
    task, layout, known = task_of(case), layout_of(folder, case), records(folder, case["file"])
    for there in case["rows"]:
        record = known[there["annot_id"]]
        example = task.example(record, layout, Counted(there["name_counter"][0]))
        contexts = there["question"] if isinstance(there["question"], list) else [there["question"]]
        kept = task.shown_objects(record)
        assert len(example.rows) == len(contexts) * len(there["choices"])
        for number, row in enumerate(example.rows):
            pieces, tags = layout.tokenizer.tokens(row.ids), tags_of(row, kept, image_box=case["image_box"])
            places = halves(row, layout.tokenizer)
            parts = (contexts[number // len(there["choices"])], there["choices"][number % len(there["choices"])])
            for place, part in zip(places, parts, strict=True):
                assert pieces[place] == part["pieces"]
                assert row.ids[place].tolist() == part["ids"]
                assert tags[place] == part["tags"]
        assert example.labels.get("choice") == there.get("label")
        people = sum(record.objects[item] == "person" for item in kept)
        assert (there["name_counter"][0] + people) % len(LISTED_NAMES) == there["name_counter"][1]


@pytest.mark.parametrize("name", CASES)
def test_words_are_counted_as_in_the_release(folder: Path, name: str) -> None:
    case = load_case(folder, name)
    tokenizer, known = Tokenizer(str(folder / "vocab.txt")), records(folder, case["file"])
    for there in case["rows"]:
        record = known[there["annot_id"]]
        kept = task_of(case).shown_objects(record)
        listed = list_names([record.objects[item] for item in kept], there["name_counter"][0])
        names = {item: listed[place] for place, item in enumerate(kept)}
        choices = record.answer_choices if case["task"] == "Q2A" else record.rationale_choices
        for choice, part in zip(choices, there["choices"], strict=True):
            pieces = split_words(tokenizer, with_names(choice, record.objects, names, conjunction=True)[0])
            numbers = pieces.words if case["basic_align"] else pieces.owners
            assert numbers[: len(part["word"])].tolist() == part["word"]
        if case["task"] == "Q2A":
            pieces = split_words(tokenizer, with_names(record.question, record.objects, names, conjunction=True)[0])
            numbers = pieces.words if case["basic_align"] else pieces.owners
            assert numbers[: len(there["question"]["word"])].tolist() == there["question"]["word"]


@pytest.mark.parametrize("name", CASES)
def test_boxes_and_classes_follow_from_the_metadata(folder: Path, name: str) -> None:
    """Scaled, mirrored and clamped to the picture, as `im_info` says."""
    case = load_case(folder, name)
    known, task = records(folder, case["file"]), task_of(case)
    for there in case["rows"]:
        record = known[there["annot_id"]]
        described, (width, height, *ratio, _) = read_metadata(record), there["im_info"]
        kept = task.shown_objects(record)
        whole = np.array([[0, 0, described.size[0] - 1, described.size[1] - 1]], np.float32)
        boxes = np.concatenate([whole, described.boxes[kept]]) * np.tile(ratio, 2)
        if case["flip_forced"]:
            boxes[:, [0, 2]] = width - 1 - boxes[:, [2, 0]]
        boxes = boxes.clip(0, np.tile([width - 1, height - 1], 2))
        scores = [1, *described.confidence[kept]]
        classes = [0, *(1 + CLASSES.index(record.objects[item]) for item in kept)]
        found = np.column_stack([boxes, scores, classes])[0 if case["image_box"] else 1 :]
        np.testing.assert_allclose(found, there["boxes"], atol=1e-3)


# Losses of a batch


class Objects:
    """A store that holds the objects of each image."""

    feature_size, fingerprint = 4, "objects"

    def __init__(self, known: dict[str, VcrRecord]) -> None:
        self.images = {record.images[0]: record for record in known.values()}

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, image_id: str) -> RegionArray:
        described = read_metadata(self.images[image_id])
        features = np.zeros((len(described.boxes), self.feature_size), np.float32)
        return RegionArray(features=features, boxes=described.boxes, size=described.size)


def collate(folder: Path, task: VCR, recorded: dict[str, Any]) -> tuple[Batch, Targets]:
    """The recorded batch from its annotations."""
    known, counter, examples = records(folder, "train"), recorded["name_counter_before"], []
    tokenizer = Tokenizer(str(folder / "vocab.txt"))
    spec = replace(models.spec("vlbert").inputs(models.spec("vlbert").presets["tiny"]), feature_size=4, max_tokens=67)
    layout, rng = TextLayout(tokenizer, spec), np.random.default_rng(0)
    for name in recorded["annot_ids"]:
        source = TaskSource(task, [known[name]], layout)
        examples.append(source.example(0, Counted(counter)))
        counter += known[name].objects.count("person")
    batch, targets = Collator(Objects(known), spec, tokenizer)(examples, [rng] * len(examples))
    batch.validate()
    return batch, targets


def build_model(folder: Path, task: VCR, sizes: dict[str, Any], visual: Tensor, batch: Batch) -> TaskModel:
    config = VlBertConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        visual_size=sizes["hidden"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        intermediate_size=sizes["intermediate"],
        max_positions=sizes["positions"],
        norm_eps=sizes["layer_norm_eps"],
        feature_size=4,
        max_tokens=67,
    )
    model = TaskModel(models.build("vlbert", config), task.heads, models.head_styles("vlbert"), group=task.group)
    parts = {"encoder": model.encoder, "classifier": model.heads["score"], "objects": model.heads["objects"]}
    models.spec("vlbert").keys["vcr"].load(load_file(folder / "model.safetensors"), parts, strict=False)
    assert batch.regions is not None
    real = F.pad(batch.regions.mask, (0, 1), value=True)  # the whole image is the last
    model.encoder.projection = Given(whole_last(visual), real)
    return model.eval()


@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_positive_weight_3", "softmax"])
@pytest.mark.parametrize(("file", "phase"), [("q2a_train", "answer"), ("qa2r_train", "rationale")])
def test_losses_and_gradients_are_those_of_the_release(folder: Path, file: str, phase: str, kind: str) -> None:
    described = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
    recorded, sizes, tensors = described[f"{file}.{kind}"], described["batch"], load_file(folder / "batch.safetensors")
    weight = 3.0 if kind.endswith("weight_3") else 1.0
    task = VCR(settings(phase=phase, loss=kind.partition("_")[0], positive_weight=weight))
    batch, targets = collate(folder, task, sizes)
    text, links = batch.text, cast(Tensor, batch.links)
    for name, ours in (("ids", text.ids), ("segments", text.segments), ("mask", text.mask)):
        assert torch.equal(ours.long(), tensors[f"{file}.question_first.{name}"].flatten(0, 1)), name
    tags = torch.where(links.any(2), links.long().argmax(2) + 1, 0)
    assert torch.equal(tags, tensors[f"{file}.question_first.tags"].flatten(0, 1))
    assert cast(Tensor, targets.choice).tolist() == recorded["label"]

    model = build_model(folder, task, sizes, tensors[f"{file}.obj_reps"], batch)
    logits = model(batch)
    loss = task.loss(logits, targets)
    assert_close(logits["score"], torch.tensor(recorded["logits"]), atol=2e-6, rtol=1e-5)
    found = {name: total / count for name, (total, count) in loss.parts.items()}
    assert_close(found["answer"], torch.tensor(recorded["answer_loss"]), **LOSSES)
    assert_close(found["object_classes"], torch.tensor(recorded["class_loss"]), **LOSSES)
    assert_close(loss.value, torch.tensor(recorded["loss"]), **LOSSES)
    if "accuracy" in recorded:
        assert_close(found["answer_accuracy"], torch.tensor(recorded["accuracy"]))
    if "grad_norm" in recorded:
        loss.value.backward()
        compare_gradients(model, recorded["grad_norm"])


def compare_gradients(model: TaskModel, recorded: dict[str, float]) -> None:
    parts = {"encoder": model.encoder, "classifier": model.heads["score"], "objects": model.heads["objects"]}
    ours = {
        f"{part}.{name}": parameter.grad
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    theirs = models.spec("vlbert").keys["vcr"].invert(ours)
    for name, norm in recorded.items():
        assert_close(
            theirs[name].norm(), torch.tensor(norm), **GRADIENTS, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("order", ["answer_first", "one_sentence"])
@pytest.mark.parametrize(("file", "phase"), [("q2a_train", "answer"), ("qa2r_train", "rationale")])
def test_the_other_orders_of_question_and_choice(folder: Path, file: str, phase: str, order: Order) -> None:
    sizes = json.loads((folder / "losses.json").read_text(encoding="utf-8"))["batch"]
    tensors = load_file(folder / "batch.safetensors")
    batch, _ = collate(folder, VCR(settings(phase=phase, order=order)), sizes)
    links = cast(Tensor, batch.links)
    tags = torch.where(links.any(2), links.long().argmax(2) + 1, 0)
    for name, ours in (("ids", batch.text.ids), ("segments", batch.text.segments), ("tags", tags)):
        assert torch.equal(ours, tensors[f"{file}.{order}.{name}"].flatten(0, 1)), name


# Masks of outlines


def test_masks_of_polygons_are_those_of_the_release(folder: Path) -> None:
    for case in json.loads((folder / "polygons.json").read_text(encoding="utf-8")):
        found = outline_mask(case["polygons"], case["box"], size=len(case["mask"]))
        assert ["".join(map(str, row)) for row in found.astype(int).tolist()] == case["mask"], case["note"]


@pytest.mark.parametrize("name", CASES)
def test_masks_of_objects_are_those_of_the_release(folder: Path, name: str) -> None:
    """All of three cases, and in all cases the number of their cells; the first mask, of the whole image, is full."""
    case = load_case(folder, name)
    known, task = records(folder, case["file"]), task_of(case)
    with np.load(folder / "masks.npz") as arrays:
        whole = dict(arrays)
    for there in case["rows"]:
        record = known[there["annot_id"]]
        described = read_metadata(record)
        masks = [outline_mask(described.outlines[item], described.boxes[item]) for item in task.shown_objects(record)]
        found = np.array([*[np.ones((14, 14), bool)] * case["image_box"], *masks])
        if case["flip_forced"]:
            found = found[..., ::-1]
        assert found.sum((1, 2)).tolist() == there["masks_on"]
        if (recorded := whole.get(f"{name}.{record.id}")) is not None:
            assert np.array_equal(found, recorded)
    assert name not in {key.partition(".")[0] for key in whole} or f"{name}.{case['rows'][0]['annot_id']}" in whole


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_pixels_has_the_masks_and_classes_of_the_release(folder: Path, name: str) -> None:
    case = load_case(folder, name)
    known, task = records(folder, case["file"]), task_of(case)
    layout, spec = layout_of(folder, case), layout_of(folder, case).spec
    shorter, longer = case["scales"]
    files = {file.stem: file for file in (folder / "data" / "vcr1images").rglob("*.jpg")}
    collator = Collator(
        Objects(known),
        spec,
        layout.tokenizer,
        pictures=PictureFiles(files, ExtractorConfig(shorter_side=shorter, longer_side=longer)),
        flip=float(case["flip_forced"]),
    )
    with np.load(folder / "masks.npz") as arrays:
        whole = dict(arrays)
    first = int(case["image_box"])  # here that region is not of the batch: the extractor adds it
    for there in case["rows"]:
        example = TaskSource(task, [known[there["annot_id"]]], layout).example(0, Counted(0))
        pixels = collator([example], [np.random.default_rng(0)])[0].pixels
        assert pixels is not None
        masks, classes = cast(Tensor, pixels.masks)[0], cast(Tensor, pixels.classes)[0]
        count = len(there["boxes"]) - first
        assert masks[:count].sum((1, 2)).tolist() == there["masks_on"][first:]
        assert classes[:count].tolist() == [box[5] for box in there["boxes"][first:]]
        if (recorded := whole.get(f"{name}.{there['annot_id']}")) is not None:
            assert np.array_equal(masks[:count].numpy(), recorded[first:])
