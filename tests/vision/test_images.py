"""Files of every mode become upright RGB; damaged ones are refused with a reason."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visling.errors import DataError
from visling.vision import images
from visling.vision.images import decode_image, fit, read_header, read_image, to_batch


def rgb(path: Path) -> list[list[list[int]]]:
    pixels: list[list[list[int]]] = read_image(path).tolist()
    return pixels


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.save(tmp_path / "a.png")
    assert rgb(tmp_path / "a.png") == [[[255, 0, 0], [255, 255, 255]]]


def test_a_palette_with_a_transparent_entry_becomes_white_there(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert rgb(tmp_path / "a.png") == [[[255, 255, 255], [200, 100, 50]]]
    image.save(tmp_path / "b.png")
    assert rgb(tmp_path / "b.png") == [[[10, 20, 30], [200, 100, 50]]]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0x8080, 0xFFFF]], np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 128, 255]


def test_float_grey_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "a.tiff")
    assert read_image(tmp_path / "a.tiff")[0, :, 0].tolist() == [0, 128, 255]


def test_cmyk_grey_and_one_bit(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red = read_image(tmp_path / "a.jpg")[4, 4].astype(int)
    assert red[0] > 200
    assert max(red[1:]) < 60
    Image.new("L", (1, 1), 77).save(tmp_path / "b.png")
    assert rgb(tmp_path / "b.png") == [[[77, 77, 77]]]
    Image.new("1", (1, 1), 1).save(tmp_path / "c.png")
    assert rgb(tmp_path / "c.png") == [[[255, 255, 255]]]


def png(width: int, depth: int, kind: int, row: bytes, *, transparent: bytes = b"", height: int = 1) -> bytes:
    """A PNG of equal rows; Pillow writes neither 16-bit colours nor a transparent grey."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress((b"\0" + row) * height))
        + chunk(b"IEND", b"")
    )


def sixteen(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(2, 16, 2, sixteen(0, 0x80FF, 0xFFFF, 0xFFFF, 0x0100, 0)), [[0, 128, 255], [255, 1, 0]]),
        (png(2, 16, 6, sixteen(0, 0x8080, 0xFFFF, 0xFFFF, 9, 9, 9, 0)), [[0, 128, 255], [255, 255, 255]]),
        (png(2, 16, 4, sixteen(0x8080, 0xFFFF, 0, 0)), [[128] * 3, [255] * 3]),
        (png(2, 16, 0, sixteen(0x8080, 0x1000), transparent=sixteen(0x1000)), [[128] * 3, [255] * 3]),
        (png(2, 8, 0, bytes([77, 5]), transparent=sixteen(5)), [[77] * 3, [255] * 3]),
        (png(2, 8, 2, bytes([77, 5, 9, 1, 2, 3]), transparent=sixteen(1, 2, 3)), [[77, 5, 9], [255] * 3]),
        (png(2, 4, 0, bytes([0x0F])), [[0] * 3, [255] * 3]),
    ],
    ids=["rgb16", "rgba16", "grey-alpha16", "grey16-hidden", "grey8-hidden", "rgb8-hidden", "grey4"],
)
def test_kinds_of_png(content: bytes, expected: list[list[int]]) -> None:
    assert decode_image(io.BytesIO(content)).pixels.tolist() == [expected]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("samples", [1, 3])
def test_sixteen_bit_tiff(order: str, samples: int) -> None:
    """Uncompressed, of one strip, in either order of bytes."""
    values = struct.pack(f"{order}3H", 0, 0x8080, 0xFFFF)
    width = 3 // samples
    tags = {256: width, 257: 1, 258: 16, 259: 1, 262: 1 if samples == 1 else 2, 273: 0, 277: samples, 278: 1, 279: 6}
    bits = 8 + 2 + 12 * len(tags) + 4
    tags[273] = bits + 2 * samples
    content = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    for tag, value in tags.items():
        if tag == 258 and samples == 3:
            content += struct.pack(f"{order}HHII", tag, 3, 3, bits)
        else:
            content += struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
    content += struct.pack(f"{order}I", 0) + struct.pack(f"{order}{samples}H", *[16] * samples) + values
    assert decode_image(io.BytesIO(content)).pixels.flatten().tolist() == (
        [0, 128, 255] if samples == 3 else [0, 0, 0, 128, 128, 128, 255, 255, 255]
    )


def test_cmyk_with_and_without_the_mark_of_adobe(tmp_path: Path) -> None:
    """Pillow writes inverted values, as Photoshop does, and the mark; both must come out red."""
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    content = (tmp_path / "a.jpg").read_bytes()
    at = content.index(b"Adobe")
    length = struct.unpack(">H", content[at - 2 : at])[0]
    for written in (content, content[: at - 4] + content[at - 2 + length :]):
        red = decode_image(io.BytesIO(written)).pixels[4, 4].astype(int)
        assert red[0] > 200
        assert max(red[1:]) < 60
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert rgb(tmp_path / "a.tif")[0][0] == [255, 0, 0]


PLACES = {1: (0, 0), 2: (0, 2), 3: (1, 2), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (2, 1), 8: (2, 0)}
"""EXIF orientation -> row and column of the first pixel of a picture of 3 x 2 pixels once it is upright."""


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "lzw.tif"])
@pytest.mark.parametrize("orientation", PLACES)
def test_orientation_is_applied(tmp_path: Path, orientation: int, kind: str) -> None:
    image = Image.new("RGB", (3, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    how: dict[str, dict[str, Any]] = {
        "jpg": {"quality": 100}, "webp": {"lossless": True}, "lzw.tif": {"compression": "tiff_lzw"}
    }  # fmt: skip
    image.save(tmp_path / f"a.{kind}", exif=exif, **how.get(kind, {}))
    pixels = read_image(tmp_path / f"a.{kind}")
    assert pixels.shape == ((2, 3, 3) if orientation < 5 else (3, 2, 3))
    assert np.argwhere(pixels[..., 0] > 128).tolist() == [list(PLACES[orientation])]


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 30])
def test_damaged_exif_does_not_spoil_a_picture(tmp_path: Path, exif: bytes) -> None:
    Image.new("RGB", (4, 2), "red").save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (2, 4, 3)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tif"])
def test_of_several_frames_or_pages_the_first_is_taken(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    how: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"many.{kind}", save_all=True, append_images=frames[1:], **how)
    frames[0].save(tmp_path / f"one.{kind}", **how)
    many, one = (decode_image(tmp_path / f"{name}.{kind}") for name in ("many", "one"))
    assert (many.has_more, one.has_more) == (True, False)
    assert many.pixels.tolist() == one.pixels.tolist() == np.full((4, 4, 3), (255, 0, 0)).tolist()


def test_the_other_eye_is_no_further_page(tmp_path: Path) -> None:
    eyes = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green")]
    eyes[0].save(tmp_path / "a.mpo", save_all=True, append_images=eyes[1:])
    assert not decode_image(tmp_path / "a.mpo").has_more


def test_damage_behind_the_first_frame_does_not_matter(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "a.gif").write_bytes((tmp_path / "a.gif").read_bytes()[:-30])
    assert rgb(tmp_path / "a.gif")[3][3] == [255, 0, 0]


def test_content_decides_not_the_suffix(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.jpg", "GIF")
    Image.new("RGB", (3, 2), "red").save(tmp_path / "data", "PNG")
    assert rgb(tmp_path / "a.jpg") == rgb(tmp_path / "data") == [[[255, 0, 0]] * 3] * 2


def test_huge_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large image only brings a warning from Pillow; a decompression bomb is refused before it is decoded."""
    bomb = png(20_000, 1, 0, bytes(2500), height=20_000)
    with pytest.raises(DataError, match="exceeds limit of 178956970 pixels"):
        decode_image(io.BytesIO(bomb), name="bomb")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_image(io.BytesIO(png(15, 8, 0, bytes(15), height=10))).pixels.shape == (10, 15, 3)
    with pytest.raises(DataError, match="exceeds limit"):
        decode_image(io.BytesIO(png(21, 8, 0, bytes(21), height=10)))


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten threads, and never two in the decoder of large images; the warnings of all are silenced until the last."""
    monkeypatch.setattr(images, "LARGE", 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    decode, inside, most, lock = images.to_pixels, [0], [0], threading.Lock()

    def count(image: Image.Image) -> Any:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        pixels = decode(image)
        with lock:
            inside[0] -= 1
        return pixels

    monkeypatch.setattr(images, "to_pixels", count)
    before = list(warnings.filters)
    with ThreadPoolExecutor(10) as pool:
        content = png(15, 8, 0, bytes(15), height=10)
        shapes = list(pool.map(lambda _: decode_image(io.BytesIO(content)).pixels.shape, range(200)))
    assert set(shapes) == {(10, 15, 3)}
    assert most == [1]
    assert warnings.filters == before


@pytest.mark.parametrize("kind", ["gif", "webp", "bmp", "tif", "ppm", "png", "jpg"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"a.{kind}")
    content = (tmp_path / f"a.{kind}").read_bytes()
    (tmp_path / f"a.{kind}").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=f"cannot read image .*a.{kind} .* bytes.*(Replace|Save)"):
        read_image(tmp_path / f"a.{kind}")


def test_photos_of_telephones_are_named() -> None:
    with pytest.raises(DataError, match=r"a\.heic .*: it is a HEIC photo.*Save it as JPEG"):
        decode_image(io.BytesIO(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50)), name="a.heic")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    for suffix in ("png", "jpg"):
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=f"cannot read image .*cut.{suffix} .* bytes"):
            read_image(tmp_path / f"cut.{suffix}")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty.png \(0 bytes\)"):
        read_image(tmp_path / "empty.png")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(DataError, match="not an image of a known format"):
        read_image(tmp_path / "text.jpg")
    with pytest.raises(DataError, match=r"no image .*absent\.png"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(DataError, match="is a folder"):
        read_image(tmp_path)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1, 1), (64, 64)), ((1000, 3), (64, 1)), ((3, 1000), (1, 64)), ((64, 30), (64, 30)), ((128, 60), (64, 30))],
)
def test_the_longer_side_is_fitted(size: tuple[int, int], expected: tuple[int, int]) -> None:
    fitted = fit(np.full((size[1], size[0], 3), 9, np.uint8), 64)
    assert fitted.shape == (expected[1], expected[0], 3)
    assert (fitted == 9).all()


def test_a_batch_is_padded_with_zeros_after_scaling() -> None:
    white, black = np.full((3, 5, 3), 255, np.uint8), np.zeros((4, 2, 3), np.uint8)
    batch = to_batch([white, black], 4, torch.device("cpu"))
    assert batch.shape == (2, 3, 4, 8)
    assert batch[0, :, :3, :5].eq(1).all()
    assert batch[0, :, 3:].eq(0).all()
    assert batch[0, :, :, 5:].eq(0).all()
    assert batch[1, :, :4, :2].eq(-1).all()
    same = to_batch([np.arange(48, dtype=np.uint8).reshape(4, 4, 3)] * 2, 4, torch.device("cpu"))
    assert same.shape == (2, 3, 4, 4)
    assert same[1, 2, 3, 1].item() == pytest.approx((3 * 12 + 1 * 3 + 2) / 255 * 2 - 1)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "gif", "bmp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_header_has_the_size_of_the_picture(tmp_path: Path, orientation: int, kind: str) -> None:
    path, exif = tmp_path / f"a.{kind}", Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (8, 4), "red").save(path, **({"exif": exif} if kind in ("jpg", "png", "webp", "tif") else {}))
    header = read_header(path)
    assert header.format == {"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind.upper())
    height, width = read_image(path).shape[:2]
    assert header.size == ((8, 4) if kind == "png" else (width, height))
    assert read_header(io.BytesIO(path.read_bytes())) == header


def test_a_header_is_read_without_the_pixels(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    Image.effect_noise((400, 300), 50).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:1000])
    assert read_header(tmp_path / "half.png").size == (400, 300)
    with pytest.raises(DataError, match="cannot read image"):
        read_image(tmp_path / "half.png")
    for name, content, message in [("a.png", b"", "it is empty"), ("b.png", b"text", "it is not an image")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_header(tmp_path / name)
    with pytest.raises(DataError, match="no image"):
        read_header(tmp_path / "gone.png")
