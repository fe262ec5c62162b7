"""Uploads and examples: only pictures, within limits, and no other file of the machine."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from fixtures.serving import ask, error_of, serving
from PIL import Image
from starlette.testclient import TestClient

from visling import api
from visling.errors import DataError
from visling.serve.cache import ByteCache
from visling.serve.pictures import Pictures, UnknownPicture
from visling.serve.settings import ServeSettings


def encode(size: tuple[int, int] = (8, 8), form: str = "PNG", color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, form)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that states so many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "it is empty"),
        (b"hello", "it is not an image of a known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "it is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%id) run\n%%EOF\n", "it is EPS"),
        (encode((64, 64))[:-60], "cannot read image upload"),
        (bomb(30_000, 30_000), "cannot read image upload"),
        (bomb(10_000, 9_000), "has 10,000 x 9,000 pixels; at most 40,000,000 in all"),
        (bomb(20_001, 1), "at most 40,000,000 in all and 20,000 on a side"),
        (bomb(7_000, 6_000), "has 7,000 x 6,000 pixels"),
        (bomb(600, 600), "cannot read image upload"),
    ],
    ids=["empty", "text", "svg", "eps", "truncated", "bomb", "warning", "long", "large", "lying"],
)
def test_what_is_no_picture_within_limits_is_refused(client: TestClient, data: bytes, expected: str) -> None:
    message = error_of(client.post("/api/images", content=data, headers={"Content-Type": "image/png"}), 400)
    assert expected in message
    assert client.get("/api/models").status_code == 200


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_pictures_are_known_by_their_content(client: TestClient, form: str) -> None:
    sent = client.post("/api/images", content=encode((40, 30), form), headers={"Content-Type": "text/html"})
    assert sent.status_code == 200, sent.text
    assert (sent.json()["width"], sent.json()["height"]) == (40, 30)
    assert ask(client, images=[sent.json()["id"]]).status_code == 200


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_the_smallest_pictures_are_answered(client: TestClient, size: tuple[int, int]) -> None:
    sent = client.post("/api/images", content=encode(size)).json()
    assert ask(client, images=[sent["id"]]).status_code == 200


def test_texts_and_choices_are_bounded(client: TestClient, world: Any) -> None:
    image = world.picture().stem
    message = error_of(ask(client, images=[image], text="x" * 2001), 400)
    assert message == "the text has 2,001 characters; at most 2,000 are taken. Shorten it."
    assert "2,001" in error_of(ask(client, images=[image], choices=["a", "x" * 2001]), 400)
    assert "21 answers to choose from; at most 20" in error_of(ask(client, images=[image], choices=["a"] * 21), 400)
    assert "reads 1 image at a time; found 5000" in error_of(ask(client, images=[image] * 5000), 400)
    assert "2,001" in error_of(client.post("/api/search", json={"run": "vqa", "text": "x" * 2001}), 400)
    long = ask(client, images=[image], text=" ".join(["red"] * 300)).json()
    assert long["truncated"] is True


def test_old_uploads_are_dropped(world: Any, predictor: api.Predictor) -> None:
    pictures = [encode(color=color) for color in ("red", "blue", "green")]
    with serving({"vqa": predictor}, upload_bytes=2 * len(pictures[0]) + 10) as client:
        first, second, third = (client.post("/api/images", content=data).json()["id"] for data in pictures)
        assert "Upload it again" in error_of(ask(client, images=[first]), 404)
        assert [ask(client, images=[name]).status_code for name in (second, third)] == [200, 200]


def test_a_cache_holds_so_many_bytes() -> None:
    cache: ByteCache[str] = ByteCache(10)
    cache.put("a", "first", 4)
    cache.put("b", "second", 4)
    assert cache.get("a") == "first"
    cache.put("c", "third", 4)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == ("first", None, "third"), "the oldest unused goes"
    cache.put("a", "again", 6)
    assert (cache.get("a"), cache.held_bytes) == ("again", 10)
    cache.put("c", "large", 11)
    assert (cache.get("c"), cache.get("a"), cache.held_bytes) == (None, "again", 6)


ESCAPES = [
    "../secret.png", "..%2fsecret.png", "%2e%2e/secret.png", "%2e%2e%2fsecret.png", "..%5csecret.png",
    "..%252fsecret.png", "/etc/passwd", "%2fetc%2fpasswd", "//etc/passwd", "a/../../secret.png", "inside.png%00.txt",
    "....//secret.png", "secret.png", "file:///etc/passwd", "link", "folder", "text",
]  # fmt: skip
"""Names that try to leave a folder."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of examples with a picture, beside one that is none of them."""
    folder = tmp_path / "examples"
    folder.mkdir()
    (folder / "inside.png").write_bytes(encode())
    (tmp_path / "secret.png").write_bytes(encode(color="blue"))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "secret.png").write_bytes(encode(color="blue"))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "folder").symlink_to(tmp_path / "more", target_is_directory=True)
    (folder / "again").symlink_to(folder, target_is_directory=True)
    (folder / "text.png").write_text("secret")
    (folder / ".hidden.png").write_bytes(encode())
    return folder


def test_only_pictures_of_the_folder_are_examples(predictor: api.Predictor, folder: Path, tmp_path: Path) -> None:
    (folder / "own.png").symlink_to(folder / "inside.png")
    with serving({"vqa": predictor}, folder) as client:
        examples = client.get("/api/examples").json()
        assert {one["name"] for one in examples} == {"inside.png"}
        assert str(tmp_path) not in client.get("/api/examples").text


@pytest.mark.parametrize("name", ESCAPES)
def test_no_other_file_is_reached(predictor: api.Predictor, folder: Path, name: str) -> None:
    with serving({"vqa": predictor}, folder) as client:
        for address in (f"/api/examples/{name}", f"/static/{name}", f"/{name}"):
            sent = client.request("GET", f"http://127.0.0.1:8000{address}")
            assert sent.status_code == 404, (address, sent.text)
            assert encode(color="blue") not in sent.content
        error_of(ask(client, images=[name]), 404)


def test_an_example_that_becomes_a_link_is_no_longer_sent(folder: Path, tmp_path: Path) -> None:
    pictures = Pictures(ServeSettings(examples=folder))
    assert pictures.find("inside").data == encode()
    (folder / "inside.png").unlink()
    with pytest.raises(UnknownPicture, match="no longer in its folder"):
        pictures.find("inside")
    (folder / "inside.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UnknownPicture, match="no longer in its folder"):
        pictures.find("inside")
    (folder / "inside.png").unlink()
    (folder / "inside.png").write_text("secret")
    with pytest.raises(DataError, match="not an image"):
        pictures.find("inside")


def test_files_of_one_name_have_ids_of_their_own(tmp_path: Path) -> None:
    for name in ("a/ä photo.png", "b/ä photo.png", "c/x%2fy.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode())
    pictures = Pictures(ServeSettings(examples=tmp_path, most_examples=2))
    assert list(pictures.examples) == ["-photo", "-photo-2"]
    assert list(Pictures(ServeSettings(examples=tmp_path)).examples) == ["-photo", "-photo-2", "x-2fy"]
    assert pictures.offer(tmp_path / "a" / "ä photo.png") == "-photo"
    assert pictures.offer(tmp_path / "c" / "x%2fy.png") == "x-2fy"
    assert pictures.searched == ["-photo", "-photo-2"]


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder of examples .*gone\. Check --examples"):
        Pictures(ServeSettings(examples=tmp_path / "gone"))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match="1 files are named like images, none of them is one within the limits"):
        Pictures(ServeSettings(examples=tmp_path))
