"""What each address of the server answers, and that its errors are those of the command line."""

from __future__ import annotations

import asyncio
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fixtures.serving import ask, error_of, serving, upload
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient

from visling import api
from visling.errors import DataError
from visling.serve import app as app_module
from visling.serve.pictures import Pictures
from visling.serve.served import Asked, ServedModel
from visling.serve.service import Service
from visling.serve.settings import ServeSettings


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def test_models_and_examples_are_listed(client: TestClient, world: Any) -> None:
    (model,) = client.get("/api/models").json()
    assert {name: model[name] for name in ("run", "family", "task", "form", "images", "choices", "notice")} == {
        "run": "vqa", "family": "visualbert", "task": "vqa", "form": "vqa", "images": 1, "choices": False, "notice": "",
    }  # fmt: skip
    files = sorted((world.scenes / "images" / "test").glob("*.png"))
    examples = client.get("/api/examples").json()
    assert [one["name"] for one in examples] == [file.name for file in files]
    assert [one["id"] for one in examples] == [file.stem for file in files]
    assert all(one["searched"] for one in examples)
    assert {(one["width"], one["height"]) for one in examples} == {size_of(files[0])}
    offered = model["examples"]
    assert offered
    for one in offered:
        (image,) = one["images"]
        assert one["truth"]
        (about,) = (example for example in examples if example["id"] == image)
        assert one["text"] in about["questions"]
        assert ask(client, images=one["images"], text=one["text"]).status_code == 200


def test_an_example_is_sent_once(client: TestClient, world: Any) -> None:
    file = world.picture()
    sent = client.get(f"/api/examples/{file.stem}")
    assert (sent.status_code, sent.content) == (200, file.read_bytes())
    assert sent.headers["content-type"] == "image/png"
    again = client.get(f"/api/examples/{file.stem}", headers={"If-None-Match": sent.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(("form", "kind"), [("PNG", "PNG"), ("TIFF", "PNG"), ("JPEG", "JPEG"), ("WEBP", "JPEG")])
def test_a_small_example_is_one_that_browsers_show(
    tmp_path: Path, predictor: api.Predictor, form: str, kind: str
) -> None:
    file = tmp_path / f"photo.{form.lower()}"
    Image.new("RGB", (600, 300), "red").save(file)
    with serving({"vqa": predictor}, tmp_path) as client:
        whole, small, large = (client.get(f"/api/examples/photo{query}") for query in ("", "?side=100", "?side=4000"))
        assert whole.content == file.read_bytes()
        for sent, size in ((small, (100, 50)), (large, (600, 300))):
            assert sent.headers["content-type"] == (
                "image/webp" if (form, sent) == ("WEBP", large) else f"image/{kind.lower()}"
            )
            with Image.open(io.BytesIO(sent.content)) as picture:
                assert picture.size == size
                assert abs(picture.convert("RGB").getpixel((3, 3))[0] - 255) < 4
        assert (large.content == whole.content) == (form != "TIFF"), "what is small enough is sent as it is"
        for side in ("0", "5000", "x"):
            assert "side" in error_of(client.get(f"/api/examples/photo?side={side}"), 422)


def test_an_upload_is_answered_as_by_the_library(client: TestClient, world: Any, predictor: api.Predictor) -> None:
    file = world.picture()
    sent = client.post("/api/images", content=file.read_bytes()).json()
    assert (sent["width"], sent["height"]) == size_of(file)
    assert client.post("/api/images", content=file.read_bytes()).json() == sent, "the same picture, the same id"
    text = "how many objects are there?"
    expected = json.loads(json.dumps(predictor.answer(file, text).to_json()))
    for image in (sent["id"], file.stem):
        found = ask(client, images=[image], text=text).json()
        assert {name: found[name] for name in expected} == expected
        assert found["boxes"] == found["pointed_at"] == found["spelled_out"] == []


def test_a_photo_is_turned_upright_before_its_size_is_told(client: TestClient) -> None:
    picture, exif = Image.new("RGB", (80, 40), "red"), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=exif)
    sent = client.post("/api/images", content=file.getvalue()).json()
    assert (sent["width"], sent["height"]) == (40, 80)


def test_the_document_is_that_of_the_library(client: TestClient, world: Any, predictor: api.Predictor) -> None:
    text = "how many objects are there?"
    sent = client.post("/api/inspect", json={"run": "vqa", "images": [world.picture().stem], "text": text})
    assert sent.headers["content-type"] == "application/json"
    with Image.open(world.picture()) as image:
        expected = json.loads(json.dumps(predictor.inspect(image, text).to_json()))
    assert sent.json() == expected


def test_errors_are_those_of_the_command_line(client: TestClient, world: Any, predictor: api.Predictor) -> None:
    file = world.picture()

    def say(image: Any, text: str, choices: Any = ()) -> str:
        with pytest.raises(DataError) as caught:
            predictor.answer(image, text, choices)
        return str(caught.value)

    one = file.stem
    for address in ("/api/answer", "/api/inspect"):
        for images, text, choices, expected in [
            ([one], "", [], say(file, "")),
            ([one], "  ", [], say(file, "  ")),
            ([one, one], "how many?", [], say([file, file], "how many?")),
            ([], "how many?", [], say([], "how many?")),
            ([one], "how many?", ["red", "blue"], say(file, "how many?", ["red", "blue"])),
        ]:
            body = {"run": "vqa", "images": images, "text": text, "choices": choices}
            assert error_of(client.post(address, json=body), 400) == expected
    assert "does not rank images" in say_rank(predictor, file)
    assert error_of(client.post("/api/search", json={"run": "vqa", "text": "red"}), 400) == say_rank(predictor, file)


def say_rank(predictor: api.Predictor, file: Path) -> str:
    with pytest.raises(DataError) as caught:
        predictor.rank([file], "red")
    return str(caught.value)


def test_what_is_not_there_is_named(client: TestClient) -> None:
    assert "no image 'upload-1' is held" in error_of(ask(client, images=["upload-1"]), 404)
    wrong = error_of(ask(client, run="vqb", images=[]), 400)
    assert wrong == "no model 'vqb' is served. Did you mean 'vqa'?"
    assert "no example 'gone'" in error_of(client.get("/api/examples/gone"), 404)
    assert error_of(client.get("/api/gone"), 404) == "there is nothing at /api/gone."
    assert "Method Not Allowed" in error_of(client.get("/api/answer"), 405)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{", "JSON decode error"),
        (b"[]", "the body"),
        (b'{"run": "vqa", "text": "a", "\\ud800": 1}', "the body: Input should be a valid string"),
        (b'{"text": "how many?"}', "run: Field required"),
        (b'{"run": "vqa", "text": 3}', "text: Input should be a valid string"),
        (b'{"run": "vqa", "text": "a", "images": "a.png"}', "images: Input should be a valid list"),
        (b'{"run": "vqa", "text": "a", "image": "a.png"}', "image: Extra inputs are not permitted"),
    ],
)
def test_a_body_that_is_not_understood(client: TestClient, body: bytes, expected: str) -> None:
    sent = client.post("/api/answer", content=body, headers={"Content-Type": "application/json"})
    message = error_of(sent, 422)
    assert message.startswith("the request is not understood: ")
    assert expected in message


@pytest.mark.parametrize("body", [b"\xff", b"[" * 50_000, b'{"run": ' * 5_000])
def test_a_body_that_cannot_be_parsed(client: TestClient, body: bytes) -> None:
    sent = client.post("/api/answer", content=body, headers={"Content-Type": "application/json"})
    assert 400 <= sent.status_code < 500
    assert error_of(sent, sent.status_code)


@pytest.mark.parametrize("text", ["a\0b", "\u202e red", "🟥 star", "[CLS] [SEP] [MASK]", "x" * 2000, "\n\t .", "??"])
def test_odd_texts_are_answered(client: TestClient, world: Any, text: str) -> None:
    for address in ("/api/answer", "/api/inspect"):
        body = {"run": "vqa", "images": [world.picture().stem], "text": text}
        sent = client.post(address, json=body)
        assert sent.status_code == 200, sent.text


def test_half_a_character_is_refused(client: TestClient, world: Any) -> None:
    for run in ("vqa", "\ud800"):
        body = json.dumps({"run": run, "images": [world.picture().stem], "text": "a\ud800"})
        sent = client.post("/api/answer", content=body, headers={"Content-Type": "application/json"})
        expected = "half a character, '\\ud800' at place 1" if run == "vqa" else "no model '\\ud800' is served"
        assert expected in error_of(sent, 400)


def test_openapi_describes_every_address(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/api/models", "/api/examples", "/api/examples/{name}", "/api/images", "/api/answer", "/api/inspect",
        "/api/search",
    }  # fmt: skip
    assert "image/*" in described["paths"]["/api/images"]["post"]["requestBody"]["content"]
    for path in described["paths"].values():
        for operation in path.values():
            assert operation["description"]
            assert operation["responses"]["4XX"]["content"]["application/json"]
    for address in ("/docs", "/redoc"):
        assert client.get(address).status_code == 404, "these pages load scripts from elsewhere"


def test_files_of_the_page_are_sent_with_their_type_and_tag(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = {
        "index.html": "text/html; charset=utf-8", "app.js": "text/javascript; charset=utf-8",
        "app.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml",
    }  # fmt: skip
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "secret.txt").write_text("secret")
    for name in types:
        (tmp_path / name).write_text(f"<!-- {name} -->")
    monkeypatch.setattr(app_module, "STATIC", (tmp_path,))
    assert client.get("/").text == "<!-- index.html -->"
    for name, kind in types.items():
        sent = client.get(f"/static/{name}")
        assert (sent.status_code, sent.headers["content-type"]) == (200, kind)
        assert sent.headers["cache-control"] == "no-cache"
        again = client.get(f"/static/{name}", headers={"If-None-Match": sent.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert client.head(f"/static/{name}").status_code == 200
    for name in ("inner", "gone.js", "secret.txt"):
        error_of(client.get(f"/static/{name}"), 404)


def test_one_bad_question_does_not_fail_the_others(client: TestClient, world: Any) -> None:
    image = world.picture().stem
    texts = [f"how many {color} objects are there?" for color in ("red", "blue", "green", "black")]
    texts.insert(2, "")
    with ThreadPoolExecutor(5) as threads:
        found = list(threads.map(lambda text: ask(client, images=[image], text=text), texts))
    assert [one.status_code for one in found] == [200, 200, 400, 200, 200]
    for text, one in zip(texts, found, strict=True):
        if text:
            alone = ask(client, images=[image], text=text).json()
            assert one.json()["answer"] == alone["answer"]
            assert one.json()["confidence"] == pytest.approx(alone["confidence"], abs=1e-5)


def test_questions_that_arrive_together_go_through_the_model_together(
    world: Any, predictor: api.Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    forward = type(predictor.model).forward

    def count(self: Any, batch: Any) -> Any:
        batches.append(len(batch.text.ids))
        time.sleep(0.05)  # as long as a larger model takes: the others arrive meanwhile
        return forward(self, batch)

    monkeypatch.setattr(type(predictor.model), "forward", count)
    texts = [f"how many {number} objects are there?" for number in range(20)]
    with (
        serving({"vqa": predictor}, world.picture().parent, most_together=8) as client,
        ThreadPoolExecutor(20) as threads,
    ):
        found = list(threads.map(lambda text: ask(client, images=[world.picture().stem], text=text), texts))
    assert {one.status_code for one in found} == {200}
    assert sum(batches) == 20
    assert max(batches) <= 8
    assert len(batches) <= 8, f"20 questions took {len(batches)} batches of {batches}"


def test_more_questions_than_may_wait_are_put_off(
    world: Any, predictor: api.Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_each = api.Predictor.answer_each

    def slow(self: Any, questions: Any) -> Any:
        time.sleep(0.2)
        return answer_each(self, questions)

    monkeypatch.setattr(api.Predictor, "answer_each", slow)
    with (
        serving({"vqa": predictor}, world.picture().parent, most_waiting=2, most_together=1) as client,
        ThreadPoolExecutor(8) as threads,
    ):
        found = list(threads.map(lambda _: ask(client, images=[world.picture().stem]), range(8)))
        refused = [one for one in found if one.status_code != 200]
        assert 1 <= len(refused) <= 6
        for one in refused:
            assert error_of(one, 503) == "2 questions wait already. Ask again in a moment."
            assert one.headers["retry-after"] == "2"
        assert ask(client, images=[world.picture().stem]).status_code == 200


def test_a_question_that_takes_too_long_is_given_up(
    world: Any, predictor: api.Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.Predictor, "answer_each", lambda self, questions: time.sleep(0.5) or iter(()))
    with serving({"vqa": predictor}, world.picture().parent, answer_seconds=0.1) as client:
        assert "no answer within 0.1 seconds" in error_of(ask(client, images=[world.picture().stem]), 504)


def test_who_leaves_takes_the_question_along(predictor: api.Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []

    def slow(self: Any, asked: Any) -> Any:
        time.sleep(0.2)
        computed.extend(one.text for one in asked)
        return [{"answer": one.text} for one in asked]

    async def stay() -> None:
        await asyncio.sleep(10)

    async def leave() -> None:
        await asyncio.sleep(0.05)

    async def ask_three() -> list[Any]:
        settings = ServeSettings(most_together=1)
        pictures = Pictures(settings)
        service = Service([ServedModel("vqa", predictor, pictures)], pictures, settings)
        async with service.running():
            asking = [
                asyncio.create_task(service.answer("vqa", Asked(images=(), text=text), left))
                for text, left in (("first", stay), ("second", leave), ("third", stay))
            ]
            return await asyncio.gather(*asking, return_exceptions=True)

    monkeypatch.setattr(ServedModel, "answer", slow)
    first, second, third = asyncio.run(ask_three())
    assert (first, third) == ({"answer": "first"}, {"answer": "third"})
    assert isinstance(second, HTTPException)
    assert second.status_code == 499
    assert computed == ["first", "third"]


def test_a_bug_reaches_the_log_and_not_the_client(
    client: TestClient, world: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Any, questions: Any) -> Any:
        raise RuntimeError("of /secret/folder")

    monkeypatch.setattr(api.Predictor, "answer_each", fail)
    message = error_of(ask(client, images=[world.picture().stem]), 500)
    assert "secret" not in message
    assert "/secret/folder" in caplog.text
    monkeypatch.undo()
    assert ask(client, images=[world.picture().stem]).status_code == 200, "the next question is answered"


def test_two_models_answer_about_one_picture(world: Any, predictor: api.Predictor, tmp_path: Path) -> None:
    with serving({"first": predictor, "second": world.vqa}, world.picture().parent, world.scenes) as client:
        assert [model["run"] for model in client.get("/api/models").json()] == ["first", "second"]
        image = upload(client, world.picture())
        first, second = (ask(client, run=run, images=[image]) for run in ("first", "second"))
        assert first.status_code == 200
        assert first.json() == second.json()


def test_without_a_folder_there_are_no_examples(predictor: api.Predictor, world: Any) -> None:
    with serving({"vqa": predictor}) as client:
        assert client.get("/api/examples").json() == []
        message = error_of(client.post("/api/search", json={"run": "vqa", "text": "red"}), 400)
        assert message == "there is no folder to search. Name one with --examples."
        assert ask(client, images=[upload(client, world.picture())]).status_code == 200
