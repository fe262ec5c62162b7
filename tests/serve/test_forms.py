"""Every task is served in its own form, with questions about the scenes that it was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.serving import ask, error_of, serving
from PIL import Image
from starlette.testclient import TestClient

from visling import config as configs
from visling.recipes.tables import FINETUNING
from visling.runs.finetune import finetune
from visling.serve.examples import MOST_QUESTIONS, find_scenes, gallery_of

TINY = ("encoder=tiny", "batch_size=8", "train.max_steps=1", "train.precision=fp32")
FORMS = {
    "vqa": ("vqa", 1), "gqa": ("vqa", 1), "nlvr2": ("pair", 2), "referring": ("referring", 1),
    "grounding": ("grounding", 1), "vcr": ("choices", 1), "retrieval": ("retrieval", 1),
    "classification": ("classification", 1), "vcr-rationale": ("choices", 1), "nlvr": ("statement", 1),
    "blind": ("vqa", 0),
}  # fmt: skip
"""Run -> form and images."""


@pytest.fixture(scope="module")
def runs(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each task, and one that reads the words alone."""
    folder, found = tmp_path_factory.mktemp("forms"), {}
    for name in FORMS:
        recipe = {"nlvr": "nlvr", "blind": "vqa-scenes"}.get(name, f"{name}-scenes")
        more = {"nlvr": ["train_split=train", "valid_split=val"], "blind": ["text_only=true"]}.get(name, [])
        config = configs.override(FINETUNING[f"visualbert-{recipe}"](), [*TINY, *more])
        found[name] = folder / name
        data = world.nlvr if name == "nlvr" else world.scenes
        finetune(config, found[name], data=data, store=world.regions, device="cpu")
    return found


@pytest.fixture(scope="module")
def client(world: Any, runs: dict[str, Path]) -> Iterator[TestClient]:
    """A client of a server of all of them."""
    with serving(dict(runs), gallery_of(world.scenes), world.scenes) as found:
        yield found


@pytest.fixture(scope="module")
def models(client: TestClient) -> dict[str, Any]:
    """What the server says of each."""
    return {model["run"]: model for model in client.get("/api/models").json()}


@pytest.mark.parametrize("name", FORMS)
def test_a_task_has_its_form(models: dict[str, Any], name: str) -> None:
    form, images = FORMS[name]
    assert (models[name]["form"], models[name]["images"]) == (form, images)
    assert models[name]["choices"] == name.startswith("vcr")


@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("nlvr", "blind")])
def test_offered_questions_can_be_asked(client: TestClient, models: dict[str, Any], name: str) -> None:
    offered = models[name]["examples"]
    assert 1 <= len(offered) <= MOST_QUESTIONS
    for one in offered:
        assert len(one["images"]) == models[name]["images"]
        body = {key: one[key] for key in ("images", "text", "choices")}
        answered = ask(client, run=name, **body)
        assert answered.status_code == 200, answered.text
        document = client.post("/api/inspect", json={"run": name, **body})
        assert document.status_code == 200, document.text
        for image in one["images"]:
            assert client.get(f"/api/examples/{image}").status_code == 200
    with_truth = {"vqa", "gqa", "nlvr2", "vcr", "vcr-rationale", "classification"}
    assert all((one["truth"] is not None) == (name in with_truth) for one in offered)


def test_offered_questions_ask_for_colours_textures_and_numbers(models: dict[str, Any]) -> None:
    beginnings = [" ".join(one["text"].split()[:2]) for one in models["vqa"]["examples"]]
    assert sorted(beginnings) == ["how many", "what color", "what texture"]


def test_a_pair_is_judged(client: TestClient, models: dict[str, Any]) -> None:
    (left, right) = models["nlvr2"]["examples"][0]["images"]
    found = ask(client, run="nlvr2", images=[left, right], text="both are red").json()
    assert {name for name, _ in found["top"]} == {"True", "False"}
    assert len(found["regions"]) == 2
    assert "reads 2 images at a time; found 1" in error_of(ask(client, run="nlvr2", images=[left]), 400)


def test_a_statement_is_judged(client: TestClient, world: Any) -> None:
    found = ask(client, run="nlvr", images=[world.picture().stem], text="there is a red star").json()
    assert {name for name, _ in found["top"]} == {"true", "false"}


def test_an_expression_has_a_box(client: TestClient, world: Any) -> None:
    found = ask(client, run="referring", images=[world.picture().stem], text="the red star").json()
    assert [name for name, _ in found["pointed_at"]] == ["the red star"]
    assert len(found["boxes"]) == len(found["top"])
    with Image.open(world.picture()) as picture:
        width, height = picture.size
    for x1, y1, x2, y2 in found["boxes"]:
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height


def test_every_phrase_has_a_box(client: TestClient, models: dict[str, Any], world: Any) -> None:
    text = "there is [a red star] near [a blue ring]"
    found = ask(client, run="grounding", images=[world.picture().stem], text=text).json()
    assert [name for name, _ in found["pointed_at"]] == ["a red star", "a blue ring"]
    assert len(found["boxes"]) == 2
    assert all("[" in one["text"] for one in models["grounding"]["examples"])
    wrong = error_of(ask(client, run="grounding", images=[world.picture().stem], text="[a red"), 400)
    assert "[" in wrong


def test_choices_are_ranked(client: TestClient, world: Any) -> None:
    choices = ["it is red", "it is blue", "it is far away"]
    found = ask(client, run="vcr", images=[world.picture().stem], text="why?", choices=choices).json()
    assert {name for name, _ in found["top"]} == set(choices)
    assert found["answer"] in choices
    assert "give at least two" in error_of(ask(client, run="vcr", images=[world.picture().stem], choices=["a"]), 400)


def test_reasons_are_chosen_for_an_answer(models: dict[str, Any]) -> None:
    for one in models["vcr-rationale"]["examples"]:
        assert one["text"].split("? ")[1].startswith("it is")
        assert all(choice.startswith("as ") for choice in one["choices"])
    for one in models["vcr"]["examples"]:
        assert one["text"].endswith("?")


def test_a_folder_is_searched_by_a_caption(client: TestClient, world: Any, runs: dict[str, Path]) -> None:
    body = {"run": "retrieval", "text": "a red star left of a blue ring"}
    found = client.post("/api/search", json=body).json()
    assert {one["id"] for one in found} == {file.stem for file in gallery_of(world.scenes).glob("*.png")}
    scores = [one["score"] for one in found]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1
    again = client.post("/api/search", json=body).json()
    assert again == found
    assert error_of(client.post("/api/search", json={**body, "text": ""}), 400)


def test_words_alone_need_no_picture(client: TestClient, world: Any) -> None:
    alone = ask(client, run="blind", images=[]).json()
    assert alone["regions"] == []
    assert ask(client, run="blind", images=[world.picture().stem]).json()["answer"] == alone["answer"]


@pytest.mark.parametrize("name", FORMS)
def test_a_question_can_be_changed(client: TestClient, models: dict[str, Any], world: Any, name: str) -> None:
    images = sorted(path.stem for path in gallery_of(world.scenes).glob("*.png"))[: models[name]["images"]]
    body = {"run": name, "images": images, "text": "the small red star is left"}
    body |= {"choices": ["it is red", "it is blue"]} if name.startswith("vcr") else {}
    before = client.post("/api/inspect", json=body).json()
    words = [word["text"] for word in before["rows"][-1]["words"]]
    changes: dict[str, Any] = {"without_words": [words.index("small")]} if name != "grounding" else {}
    if images:
        changes |= {"without_regions": [0], "boxes": [{"image": len(images) - 1, "box": [1, 2, 30, 40]}]}
    sent = client.post("/api/inspect", json={**body, **changes})
    assert sent.status_code == 200, sent.text
    after = sent.json()
    if name != "grounding":
        assert "small" not in [word["text"] for row in after["rows"] for word in row["words"]]
    if images:
        shown = [[region["box"] for region in row["regions"]] for row in after["rows"]]
        assert [1, 2, 30, 40] in shown[-1]
        removed = before["rows"][0]["regions"][0]
        assert removed["special"] or removed["box"] not in shown[0]
    else:
        drawn = client.post("/api/inspect", json={**body, "boxes": [{"box": [1, 2, 30, 40]}]})
        assert "there are 0" in error_of(drawn, 400)


def test_a_run_knows_its_scenes(world: Any, runs: dict[str, Path], tmp_path: Path) -> None:
    assert find_scenes(runs["vqa"]) == world.scenes
    assert find_scenes(runs["vqa"] / "model") == world.scenes
    shutil.copytree(runs["vqa"], tmp_path / "demo" / "visualbert" / "vqa")
    moved = tmp_path / "demo" / "visualbert" / "vqa"
    about = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps({**about, "data": [str(tmp_path / "gone")]}))
    assert find_scenes(moved) is None
    shutil.copytree(world.scenes / "annotations", tmp_path / "demo" / "scenes" / "annotations")
    shutil.copytree(world.scenes / "images", tmp_path / "demo" / "scenes" / "images")
    assert find_scenes(moved) == tmp_path / "demo" / "scenes", "the scenes beside the run"
    (moved / "run.json").write_text("{")
    assert find_scenes(moved) == tmp_path / "demo" / "scenes"
    assert find_scenes(tmp_path) is None
    assert find_scenes("owner/name") is None
