"""What `encode` returns, for every family and kind of task: names that belong to the features which the model read,
the same alone and in a batch, and attention that is whole."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.testing import assert_close

from visling import api, models
from visling import config as configs
from visling.analysis.encoding import EncodedRow
from visling.analysis.region_names import name_regions
from visling.api import Predictor, Question
from visling.errors import DataError
from visling.recipes.multitask_configs import MultitaskConfig
from visling.recipes.tables import FINETUNING, MULTITASK
from visling.runs.finetune import finetune
from visling.runs.multitask import multitask
from visling.types import RegionArray

FAMILIES = models.names()
DIRECTIONS = ("text_to_text", "text_to_regions", "regions_to_text", "regions_to_regions")
SHORT = (
    "batch_size=8", "train.max_steps=1", "train.validate_every=100", "train.precision=fp32", "train.log_every=1",
)  # fmt: skip
CHOICES = ["red", "because it is left of the kaleidoscopic circle", "blue"]

Make = Callable[..., Predictor]


@pytest.fixture(scope="module")
def make(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A model of a family's tiny preset, trained for one step on a task; `encoder` changes the preset."""
    made: dict[object, Predictor] = {}

    def build(family: str, task: str, *settings: str, blind: bool = False, **encoder: Any) -> Predictor:
        key = (family, task, settings, blind, *encoder.items())
        if key not in made:
            recipe = FINETUNING[f"{family}-{task}"]()
            if "e2e" not in task:
                recipe = dataclasses.replace(
                    recipe, encoder=dataclasses.replace(models.spec(family).presets["tiny"], **encoder)
                )
            config = configs.override(recipe, [*SHORT, *settings, *(["text_only=true"] if blind else [])])
            out = tmp_path_factory.mktemp("run") / "run"
            finetune(
                config,
                out,
                data=world.scenes,
                store=None if blind else world.regions,
                images=world.scenes if config.extractor is not None else None,
                device="cpu",
                stream=io.StringIO(),
            )
            made[key] = api.load(out, device="cpu")
        return made[key]

    return build


@pytest.fixture
def detections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectors find as many regions as a picture is pixels wide, with random boxes, features and names."""
    first = np.random.default_rng(0).random((400, 4)).astype(np.float32)

    def detect(self: Predictor, pixels: NDArray[np.uint8]) -> RegionArray:
        height, width = pixels.shape[:2]
        assert self.detector is not None
        corners = np.sort(first[:width].reshape(-1, 2, 2), axis=1).reshape(-1, 4)
        generator = np.random.default_rng(width)
        return RegionArray(
            features=generator.random((width, self.detector.feature_size)).astype(np.float32),
            boxes=corners * np.array([width, height] * 2, np.float32),
            size=(width, height),
            classes=generator.integers(0, len(self.class_names), (width,)),
            class_confidence=generator.random((width,)).astype(np.float32),
        )

    monkeypatch.setattr(Predictor, "_detect", detect)


def picture(width: int) -> Image.Image:
    """Of which `detections` finds this many regions."""
    return Image.new("RGB", (width, 300))


def check_positions(row: EncodedRow) -> None:
    """Words and regions cover every position once, and states and maps have as many."""
    tokens = [token for word in row.words for token in word.tokens]
    assert tokens == list(range(len(tokens)))
    assert [region.at for region in row.regions] == list(range(len(row.regions)))
    assert all(len(word.pieces) == len(word.tokens) for word in row.words)
    assert [word.special for word in row.words] == [word.text[0] == "[" and len(word.text) > 1 for word in row.words]
    assert row.maps is not None
    assert row.states is not None
    sizes = {"text": len(tokens), "regions": len(row.regions)}
    for direction in DIRECTIONS:
        start, end = direction.split("_to_")
        for name, probs in getattr(row.maps, direction).items():
            assert probs.shape[1:] == (sizes[start], sizes[end]), (direction, name)
    for name, states in row.states.items():
        assert len(states) in (*sizes.values(), sum(sizes.values())), name


def check_attention(row: EncodedRow, *, single_stream: bool) -> int:
    """What each position attends to is 1 in all: over words and regions in a layer of one stream, else in each
    direction that has anything to attend to."""
    checked = 0
    for start in ("text", "regions"):
        within, across = (getattr(row.maps, f"{start}_to_{end}") for end in ("text", "regions"))
        for name in {**within, **across}:
            parts = [maps[name] for maps in (within, across) if name in maps]
            sums = [sum(part.sum(-1) for part in parts)] if single_stream else [p.sum(-1) for p in parts if p.shape[-1]]
            for total in sums:
                assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5, msg=f"{start}, {name}")
                checked += total.numel()
    return checked


def check_names(model: Predictor, question: Question) -> None:
    """A region has the name and the box of the detected region whose feature the model reads in its place."""
    encoding, prepared = model.encode(question.image, question.text, question.choices), model.prepare(question)
    assert prepared.batch.regions is not None
    for number, row in enumerate(encoding.rows):
        read = prepared.batch.regions.features[number].float()
        for region in row.regions:
            detected = prepared.regions[region.image]
            names = name_regions(detected, class_names=model.class_names, attribute_names=model.attribute_names)
            (source,) = [
                k for k, feature in enumerate(detected.features) if np.allclose(feature, read[region.at], atol=2e-3)
            ]
            assert region.name == names[source]
            assert region.box == tuple(detected.boxes[source].tolist())
            assert detected.class_confidence is not None
            assert region.confidence == pytest.approx(float(detected.class_confidence[source]))


def assert_same_rows(found: Sequence[EncodedRow], expected: Sequence[EncodedRow]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.words, ours.regions) == (theirs.words, theirs.regions)
        for field in ("text_states", "region_states", "pooled", "whole", "states", *DIRECTIONS):
            pair = [getattr(row.maps if field in DIRECTIONS else row, field) for row in (ours, theirs)]
            if pair[0] is not None or pair[1] is not None:
                assert_close(*pair, rtol=0, atol=1e-5, msg=field)


def ask(model: Predictor, text: str, *widths: int) -> Question:
    """A question in the form of the model's task, about pictures of these widths."""
    images = [picture(width) for width in widths[: model.task.images]]
    return Question(images, text, CHOICES if model.task.choices else ())


TASKS = ("vqa-scenes", "nlvr2-scenes", "vcr-scenes", "grounding-scenes")
"""One row, two images, several rows about one image, phrases in brackets."""


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoding_is_named_whole_and_the_same_in_a_batch(
    make: Make, detections: None, family: str, task: str
) -> None:
    model = make(family, task)
    questions = [
        ask(model, "is [the star] red?", 3, 7),
        ask(model, "[a star's] kaleidoscopic neighbours, unaffable or not", 7, 3),
        ask(model, "red", 1, 1),
        ask(model, "what is it?", 12, 1),
    ]
    encodings = list(model.encode_each(questions, capture=True))
    for question, together in zip(questions, encodings, strict=True):
        alone = model.encode(question.image, question.text, question.choices, capture=True)
        assert_same_rows(together.rows, alone.rows)
        plain = model.encode(question.image, question.text, question.choices)
        assert plain.maps is None
        assert_close(plain.text_states, alone.text_states, rtol=0, atol=1e-5)
        assert_close(plain.pooled, alone.pooled, rtol=0, atol=1e-5)
        check_names(model, question)
        for row in together.rows:
            check_positions(row)
            assert check_attention(row, single_stream=family in ("visualbert", "vlbert")) > 0
    if model.task.choices:
        assert [row.word(choice.split()[0]).text for row, choice in zip(alone.rows, CHOICES, strict=True)] == [
            "red", "because", "blue",
        ]  # fmt: skip
    if model.task.images == 2:
        seen = [region.image for row in encodings[0].rows for region in row.regions if not region.special]
        assert seen == [0] * 3 + [1] * 7


def test_two_images_in_one_row_are_told_apart(make: Make, detections: None) -> None:
    model = make("visualbert", "nlvr2-scenes", pair="sequence")
    (row,) = model.encode([picture(2), picture(3)], "a star", capture=True).rows
    assert [region.image for region in row.regions] == [0, 0, 1, 1, 1]
    check_names(model, ask(model, "a star", 2, 3))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["vqa-scenes", "nlvr2-scenes"])
def test_no_region_at_all_is_encoded(make: Make, monkeypatch: pytest.MonkeyPatch, family: str, task: str) -> None:
    model = make(family, task)

    def detect(self: Predictor, pixels: NDArray[np.uint8]) -> RegionArray:
        assert self.detector is not None
        count = 0 if pixels.shape[1] == 1 else 2
        features = np.full((count, self.detector.feature_size), 0.5, np.float32)
        boxes = np.array([[1, 2, 3, 4], [2, 2, 9, 9]], np.float32)[:count]
        return RegionArray(features=features, boxes=boxes, size=(pixels.shape[1], pixels.shape[0]))

    monkeypatch.setattr(Predictor, "_detect", detect)
    questions = [ask(model, "is it a star?", *widths) for widths in ((1, 1), (2, 2), (1, 2))]
    for question, together in zip(questions, model.encode_each(questions, capture=True), strict=True):
        alone = model.encode(question.image, question.text, capture=True)
        assert_same_rows(together.rows, alone.rows)
        for row in together.rows:
            check_positions(row)
            check_attention(row, single_stream=family in ("visualbert", "vlbert"))
            for states in (row.text_states, row.pooled, *(row.states or {}).values()):
                assert torch.isfinite(states).all()
    assert [region for region in model.encode(questions[0].image, "what?").regions if not region.special] == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["vqa-scenes", "nlvr2-scenes", "vcr-scenes"])
def test_a_text_only_model_has_words_alone(make: Make, family: str, task: str) -> None:
    model = make(family, task, blind=True)
    for images in ([picture(9)] * model.task.images, []):
        encoding = model.encode(images, "is it a star?", CHOICES if model.task.choices else (), capture=True)
        for row in encoding.rows:
            check_positions(row)
            check_attention(row, single_stream=family in ("visualbert", "vlbert"))
            assert row.word("star").tokens
            assert row.region_states.shape[0] == 0
            assert all(region.special and region.box is None for region in row.regions)
        assert "<img" not in encoding._repr_html_()
    with pytest.raises(DataError, match="there is no region 'star'"):
        encoding.region("star")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hundred_boxes_and_more_are_cut_to_what_the_model_reads(make: Make, detections: None, family: str) -> None:
    model = make(family, "vqa-scenes")
    encoding = model.encode(picture(150), "is it a star?", capture=True)
    detected = [region for region in encoding.regions if not region.special]
    assert len(detected) == model.spec.max_regions < 150
    check_positions(encoding.rows[0])
    check_names(model, ask(model, "is it a star?", 150))
    page = encoding._repr_html_()
    assert page.count("<tr>") >= len(detected)


def test_regions_sorted_by_confidence_keep_their_names(make: Make, detections: None) -> None:
    model = make("vlbert", "vqa-scenes", region_order="confidence", max_regions=5)
    encoding = model.encode(picture(12), "is it a star?")
    shares = [region.confidence for region in encoding.regions]
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)  # type: ignore[type-var]
    check_names(model, ask(model, "is it a star?", 12))


def test_regions_of_the_same_box_keep_their_order(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("visualbert", "vqa-scenes")

    def detect(self: Predictor, pixels: NDArray[np.uint8]) -> RegionArray:
        assert self.detector is not None
        return RegionArray(
            features=np.random.default_rng(0).random((3, self.detector.feature_size)).astype(np.float32),
            boxes=np.array([[1, 1, 9, 9]] * 3, np.float32),
            size=(20, 20),
            classes=np.array([2, 0, 1]),
            class_confidence=np.ones(3, np.float32),
        )

    monkeypatch.setattr(Predictor, "_detect", detect)
    names = [model.class_names[k] for k in (2, 0, 1)]
    assert [region.name for region in model.encode(picture(20), "what?").regions] == names


def test_layers_of_the_text_alone_have_no_regions(make: Make, detections: None) -> None:
    model = make("visualbert", "vqa-scenes", bypass=True)
    (row,) = model.encode(picture(3), "is it red?", capture=True).rows
    check_positions(row)
    check_attention(row, single_stream=True)
    assert row.maps is not None
    assert row.states is not None
    assert [*row.maps.text_to_text] == ["layers.0", "layers.1", "additional_layer"]
    assert [*row.maps.text_to_regions] == ["additional_layer"]
    tokens = len(row.text_states)
    assert {name: len(states) for name, states in row.states.items()} == {
        "embeddings": tokens + 3,
        "layers.0": tokens,
        "layers.1": tokens,
        "additional_layer": tokens + 3,
    }


def test_boxes_that_an_extractor_cuts_to_the_last_pixel_keep_their_names(world: Any, make: Make) -> None:
    model = make("vlbert", "vqa-scenes-e2e")
    with Image.open(world.picture()) as opened:
        turned, narrow = opened.transpose(Image.Transpose.ROTATE_90), opened.resize((100, 128))
    questions = [Question(world.picture(), "is it red?"), Question(turned, "how many kaleidoscopic stars are there?")]
    encodings = list(model.encode_each(questions, capture=True))
    for question, together in zip(questions, encodings, strict=True):
        assert_same_rows(together.rows, model.encode(question.image, question.text, capture=True).rows)
    # Features of a picture that is padded to the size of another see the padding: docs/models/vlbert.md.
    encodings.append(model.encode(narrow, "is it red?", capture=True))
    for together in encodings:
        (row,) = together.rows
        check_positions(row)
        check_attention(row, single_stream=True)
        *detected, whole, end = row.regions
        assert len(detected) >= 4
        assert not any(region.special for region in detected)
        boxes = model.detect(together.images[0]).boxes
        assert [region.box for region in detected] == [tuple(box.tolist()) for box in boxes]
        assert (whole.name, whole.box) == ("whole image", (0.0, 0.0, *map(float, together.images[0].size)))
        assert (end.name, end.box) == ("[END]", None)


def test_a_task_token_stands_behind_the_text(world: Any, tmp_path: Path) -> None:
    recipe: MultitaskConfig = MULTITASK["vilbert-multitask-scenes"]()
    encoder = dataclasses.replace(models.spec("vilbert").presets["tiny"], num_tasks=20)
    few = [f"tasks.{name}.{setting}" for name in recipe.tasks for setting in ("batch_size=12", "train_limit=24")]
    config = configs.override(
        dataclasses.replace(recipe, encoder=encoder),
        ["train.precision=fp32", "train.max_steps=2", "tasks.retrieval.valid_images=2", *few],
    )
    multitask(config, tmp_path / "run", data=[str(world.scenes)], store=[str(world.regions)], device="cpu")
    model = api.load(tmp_path / "run", task="vqa", device="cpu")
    questions = [Question(world.picture(), "is it red?"), Question(world.picture(), "how many stars are there here?")]
    for question, together in zip(questions, model.encode_each(questions, capture=True), strict=True):
        assert_same_rows(together.rows, model.encode(question.image, question.text, capture=True).rows)
        (row,) = together.rows
        check_positions(row)
        check_attention(row, single_stream=False)
        assert [(word.text, word.special) for word in row.words[-2:]] == [("[SEP]", True), ("[TASK]", True)]
        assert row.word("[TASK]").tokens == (len(row.text_states),)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_are_joined_into_words(make: Make, detections: None, family: str) -> None:
    model = make(family, "nlvr2-scenes")
    words = model.encode([picture(1)] * 2, "Unaffable kaleidoscopes don't café-hop, 星!").words
    assert [word.text for word in words] == [
        "[CLS]", "unaffable", "kaleidoscopes", "don", "'", "t", "cafe", "-", "hop", ",", "星", "!", "[SEP]",
    ]  # fmt: skip
    assert words[1].pieces == ("una", "##ffa", "##ble")
    assert words[1].tokens == (1, 2, 3)
    assert [word.text for word in words if word.special] == ["[CLS]", "[SEP]"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_text_is_cut_to_what_the_model_reads(make: Make, detections: None, family: str) -> None:
    model = make(family, "vqa-scenes")
    row = model.encode(picture(2), " ".join(["kaleidoscope"] * 300), capture=True).rows[0]
    check_positions(row)
    assert sum(len(word.tokens) for word in row.words) == model.spec.max_tokens
    whole = ("ka", "##lei", "##dos", "##cope")
    words = [word for word in row.words if not word.special]
    assert [word.pieces for word in words[:-1]] == [whole] * (len(words) - 1)
    assert words[-1].pieces == whole[: len(words[-1].pieces)]


@pytest.mark.parametrize("text", ["", "  ", "\u200b"])
def test_an_empty_text_is_refused(make: Make, detections: None, text: str) -> None:
    with pytest.raises(DataError, match="the question is empty"):
        make("visualbert", "vqa-scenes").encode(picture(2), text)


def test_an_encoding_shows_each_row_of_a_pair(make: Make, detections: None) -> None:
    encoding = make("lxmert", "nlvr2-scenes").encode([picture(2), picture(3)], "a star", capture=True)
    page = encoding._repr_html_()
    assert page.count("<img") == 2
    assert "row 2 of 2" in page
    joined = make("visualbert", "nlvr2-scenes", pair="sequence").encode([picture(2), picture(3)], "a star")
    assert joined._repr_html_().count("<img") == 2
