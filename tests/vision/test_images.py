"""Files of every mode become upright RGB; damaged ones are refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visling.errors import DataError
from visling.vision.images import fit, read_image, to_batch


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


def test_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    image.save(tmp_path / "a.png", exif=exif)
    assert rgb(tmp_path / "a.png") == [[[255, 0, 0]], [[0, 0, 255]]]


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
