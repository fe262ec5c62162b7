"""The document of an inspection: its numbers are those of the encoding, its positions those of the maps."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.tiny_models import FAMILIES, save_tiny_model
from PIL import Image

from visling import api
from visling import config as configs
from visling.analysis.head_statistics import DIRECTIONS, QUANTITIES
from visling.analysis.inspection import FORMAT, NO_PICTURE, Inspection
from visling.analysis.relevance import METHODS
from visling.api import Predictor
from visling.errors import DataError, RunError
from visling.recipes.tables import FINETUNING
from visling.runs.finetune import finetune

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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_directions_at_the_right_places(world: Any, family: str, tmp_path: Path) -> None:
    model = api.load(save_tiny_model(world, family, tmp_path / family), device="cpu")
    found = model.inspect(world.picture(), QUESTION)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    (row,) = document["rows"]
    (encoded,) = model.encode(world.picture(), QUESTION, capture=True).rows
    names = {way for layer in row["attention"]["layers"] for way in layer["directions"]}
    assert names == set(DIRECTIONS)
    for layer in row["attention"]["layers"]:
        for way, part in layer["directions"].items():
            expected = getattr(encoded.maps, way)[layer["name"]].numpy()
            assert np.abs(unpack(part, document["scale"]) - expected).max() <= document["scale"] / 255
    tokens = sum(len(word["tokens"]) for word in row["words"])
    for places in [*document["relevance"].values(), document["against"]]:
        for (scores,) in places:
            assert (len(scores["words_tokens"]), len(scores["regions"])) == (tokens, len(row["regions"]))
    assert set(document["relevance"]) == set(METHODS)
    assert set(row["statistics"]) == {*QUANTITIES, "gradient_weighted_attention"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_reads_words_alone_says_so(world: Any, family: str, tmp_path: Path) -> None:
    model = api.load(save_tiny_model(world, family, tmp_path / family, text_only=True), device="cpu")
    for images in ([], world.picture()):
        found = model.inspect(images, QUESTION)
        document = found.to_json()
        assert document["notice"] == NO_PICTURE
        assert document["images"] == []
        assert set(found.layers_by_direction) == {"text_to_text"}
        (row,) = document["rows"]
        assert row["image"] == []
        assert {way for layer in row["attention"]["layers"] for way in layer["directions"]} == {"text_to_text"}
        found.to_html(tmp_path / f"{family}.html")
    with pytest.raises(DataError, match=r"no maps text_to_regions: it reads the words alone. It has: text_to_text"):
        found.check_direction("text_to_regions")


def inspect_without_regions(model: Predictor, question: str) -> Inspection:
    """A question about an image in which the detector finds nothing."""
    image = Image.new("RGB", (64, 64))
    seen = model.detect(image)
    arrays = {field.name: getattr(seen, field.name) for field in fields(seen)}
    nothing = replace(seen, **{name: value[:0] for name, value in arrays.items() if isinstance(value, np.ndarray)})
    assert model.detector is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.detector, "detect", lambda pixels: [nothing])
        return model.inspect(image, question)


def test_an_image_without_regions_is_shown_and_named(world: Any, tmp_path: Path) -> None:
    found = inspect_without_regions(api.load(world.vqa, device="cpu"), QUESTION)
    document = found.to_json()
    assert "the detector found nothing" in document["notice"]
    assert len(document["images"]) == 1
    assert document["rows"][0]["regions"] == []
    with pytest.raises(DataError, match="the detector found no region in the image"):
        found.check_direction("text_to_regions")
    assert "<img" in found._repr_html_()
    found.to_html(tmp_path / "page.html")


def test_maps_that_a_model_does_not_have_are_named(world: Any, model: Predictor) -> None:
    found = model.inspect(world.picture(), QUESTION, removal=False)
    assert found.rows[0].maps is not None
    maps = replace(found.rows[0].maps, regions_to_text={})
    other = replace(found, rows=(replace(found.rows[0], maps=maps),))
    with pytest.raises(DataError, match=r"no maps regions_to_text: no layer attends that way. It has: text_to_text, "):
        other.check_direction("regions_to_text")


@pytest.fixture(scope="module")
def tasks(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Predictor]:
    """Model of a task, trained for a few steps."""

    @functools.cache
    def load(task: str, family: str = "visualbert") -> Predictor:
        folder = tmp_path_factory.mktemp("tasks") / task
        recipe = configs.override(FINETUNING[f"{family}-{task}-scenes"](), world.settings[4:])
        recipe = configs.override(recipe, ["encoder.hidden_size=16", "encoder.num_heads=2"])
        finetune(recipe, folder, data=world.scenes, store=world.regions, device="cpu")
        return api.load(folder, device="cpu")

    return load


def test_a_pair_has_a_row_for_each_image(world: Any, tasks: Callable[..., Predictor]) -> None:
    pictures = sorted((world.scenes / "images" / "test").glob("*.png"))[:2]
    document = tasks("nlvr2", "lxmert").inspect(pictures, "there is a star in both").to_json()
    assert [row["label"] for row in document["rows"]] == ["image 1", "image 2"]
    assert [row["image"] for row in document["rows"]] == [[0], [1]]
    assert len(document["relevance"]["relevance"][0]) == 2


def test_a_pair_in_one_sequence_has_one_row_of_two_images(world: Any, tasks: Callable[..., Predictor]) -> None:
    pictures = sorted((world.scenes / "images" / "test").glob("*.png"))[:2]
    (row,) = tasks("nlvr2").inspect(pictures, "there is a star in both").to_json()["rows"]
    assert row["image"] == [0, 1]
    assert {region["image"] for region in row["regions"]} == {0, 1}


def test_choices_have_a_row_each(world: Any, tasks: Callable[..., Predictor]) -> None:
    choices = ["it is red", "it is blue", "because", "no"]
    document = tasks("vcr").inspect(world.picture(), "what is it?", choices).to_json()
    assert [row["label"] for row in document["rows"]] == choices
    assert {answer["text"] for answer in document["answers"]} == set(choices)
    assert all(row["image"] == [0] for row in document["rows"])


def test_an_expression_has_the_candidates_with_their_boxes(world: Any, tasks: Callable[..., Predictor]) -> None:
    document = tasks("referring").inspect(world.picture(), "the red star").to_json()
    regions = document["rows"][0]["regions"]
    assert document["answers_are"] == "alternatives"
    for answer in document["answers"]:
        assert answer["text"] == regions[answer["region"]]["name"]
        assert answer["box"] == pytest.approx(regions[answer["region"]]["box"], abs=0.6)


def test_where_nothing_can_be_pointed_at_there_is_no_answer(tasks: Callable[..., Predictor], tmp_path: Path) -> None:
    found = inspect_without_regions(tasks("referring"), "the red star")
    document = found.to_json()
    assert document["answers"] == []
    assert document["removal"] is None
    assert found.list_reasons() == []
    found.to_html(tmp_path / "page.html")
    assert "The model weighed no answer" in (tmp_path / "page.html").read_text()


def test_phrases_have_a_box_each(world: Any, tasks: Callable[..., Predictor]) -> None:
    document = tasks("grounding").inspect(world.picture(), "[a star] is above [a ring]").to_json()
    assert document["answers_are"] == "phrases"
    assert [answer["text"] for answer in document["answers"]] == ["a star", "a ring"]
    assert all(answer["region"] is not None for answer in document["answers"])


def test_a_caption_has_its_score(world: Any, tasks: Callable[..., Predictor]) -> None:
    (answer,) = tasks("retrieval").inspect(world.picture(), "a red star").to_json()["answers"]
    assert answer["text"].startswith("score ")


def test_what_was_taken_away_is_in_it_unless_left_out(world: Any, model: Predictor, document: Any) -> None:
    curves = document["removal"]["curves"]
    assert {curve["method"] for curve in curves} == {*METHODS, "random"}
    assert all(len(curve["values"]) == len(document["removal"]["fractions"]) for curve in curves)
    (row,) = document["leave_one_out"]["rows"]
    assert [one is None for one in row["words"]] == [word["special"] for word in document["rows"][0]["words"]]
    assert all(one is not None for one in row["regions"])
    shorter = model.inspect(world.picture(), QUESTION, removal=False, most=2).to_json()
    assert shorter["removal"] is None
    assert shorter["leave_one_out"] is None
    assert len(shorter["answers"]) == len(shorter["relevance"]["relevance"]) == 2


def test_the_right_answer_is_marked_where_it_is_known(world: Any, model: Predictor) -> None:
    found = model.inspect(world.picture(), QUESTION, removal=False)
    right = found.answers[1].text
    document = replace(found, truth=(right,), truth_boxes=((1.0, 2.0, 3.0, 4.0),)).to_json()
    assert [answer["truth"] for answer in document["answers"][:2]] == [False, True]
    assert document["truth"] == {"text": [right], "boxes": [[1.0, 2.0, 3.0, 4.0]]}


def test_the_command_and_the_name_give_no_folder_away(world: Any, model: Predictor) -> None:
    facts = model.inspect(world.picture(), QUESTION, removal=False).to_json()["model"]
    assert str(world.folder) not in json.dumps(facts)
    assert facts["command"].startswith(f"visling inspect {facts['name']} ")
    assert len(facts["checkpoint"]) == 12


def test_a_page_that_cannot_be_written_is_refused(world: Any, model: Predictor, tmp_path: Path) -> None:
    found = model.inspect(world.picture(), QUESTION, removal=False)
    with pytest.raises(RunError, match=r"cannot write the page .*nowhere.*Name another file"):
        found.to_html(tmp_path / "nowhere" / "page.html")


def test_an_inspection_is_a_line_and_in_a_notebook_a_figure(world: Any, model: Predictor) -> None:
    found = model.inspect(world.picture(), QUESTION, removal=False)
    assert repr(found).startswith("Inspection(")
    assert len(repr(found)) < 200
    figure = found._repr_html_()
    assert found.list_reasons()[0][0] in figure
    assert "<script" not in figure
