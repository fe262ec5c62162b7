"""The document of an inspection: its numbers are those of the encoding, its positions those of the maps."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visling import api
from visling.analysis.head_statistics import DIRECTIONS
from visling.analysis.inspection import FORMAT
from visling.api import Predictor

QUESTION = "how many objects are there?"


@pytest.fixture(scope="module")
def model(world: Any) -> Predictor:
    return api.load(world.vqa, device="cpu")


@pytest.fixture(scope="module")
def document(world: Any, model: Predictor) -> Any:
    return json.loads(json.dumps(model.inspect(world.picture(), QUESTION).to_json(), allow_nan=False))


def unpack(part: dict[str, Any], scale: float) -> np.ndarray[Any, Any]:
    """(H, M, N) weights of a packed map."""
    levels = np.frombuffer(base64.b64decode(part["data"]), np.uint8)
    return levels.reshape(part["heads"], part["from"], part["to"]) / 255 * scale


def test_the_document_holds_the_maps_of_the_encoding(world: Any, model: Predictor, document: Any) -> None:
    assert document["format"] == FORMAT
    (row,) = document["rows"]
    encoded = model.encode(world.picture(), QUESTION, capture=True).rows[0]
    compared = 0
    for layer in row["attention"]["layers"]:
        assert set(layer["directions"]) <= set(DIRECTIONS)
        for direction, part in layer["directions"].items():
            expected = getattr(encoded.maps, direction)[layer["name"]].numpy()
            assert np.abs(unpack(part, document["scale"]) - expected).max() <= document["scale"] / 255
            compared += 1
    assert compared == sum(len(getattr(encoded.maps, direction)) for direction in DIRECTIONS)
    assert [word["text"] for word in row["words"]] == [word.text for word in encoded.words]
    assert [region["name"] for region in row["regions"]] == [region.name for region in encoded.regions]


def test_the_answers_are_those_of_the_prediction(world: Any, model: Predictor, document: Any) -> None:
    answer = model.answer(world.picture(), QUESTION)
    assert [found["text"] for found in document["answers"]] == [text for text, _ in answer.top]
    assert [found["probability"] for found in document["answers"]] == pytest.approx(
        [share for _, share in answer.top], rel=1e-4
    )
    assert document["answers_are"] == "alternatives"


def test_words_and_regions_lie_at_the_positions_of_the_maps(document: Any) -> None:
    """The border between words and regions is where the model has it: special tokens are counted."""
    (row,) = document["rows"]
    tokens = [token for word in row["words"] for token in word["tokens"]]
    assert tokens == list(range(len(tokens)))
    assert [word["text"] for word in row["words"] if word["special"]] == ["[CLS]", "[MASK]", "[SEP]"]
    for layer in row["attention"]["layers"]:
        for direction, part in layer["directions"].items():
            start, end = direction.split("_to_")
            sizes = {"text": len(tokens), "regions": len(row["regions"])}
            assert (part["from"], part["to"]) == (sizes[start], sizes[end])
        joint = [
            sum(unpack(layer["directions"][f"text_to_{end}"], document["scale"]).sum(-1) for end in ("text", "regions"))
        ]
        assert joint[0] == pytest.approx(1, abs=0.05), "what a word attends to in both is all of its attention"


def test_the_picture_travels_with_its_size(document: Any) -> None:
    (image,) = document["images"]
    assert (image["width"], image["height"]) == (128, 128)
    assert image["src"].startswith("data:image/png;base64,")


def test_a_large_picture_is_made_smaller_and_its_boxes_stay(model: Predictor) -> None:
    document = model.inspect(Image.new("RGB", (3000, 1500), "white"), QUESTION).to_json()
    (image,) = document["images"]
    assert (image["width"], image["height"]) == (3000, 1500)
    assert len(image["src"]) < 100_000


def test_a_cut_text_is_said(world: Any, model: Predictor) -> None:
    document = model.inspect(world.picture(), " ".join(["red"] * 300)).to_json()
    assert "the text was cut" in document["notice"]
    assert len(document["rows"][0]["words"]) == model.spec.max_tokens
