"""Images of every format, by themselves and in archives."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.promises import find_one
from fuzz.readers.base import Reader, save
from PIL import Image

from visling.vision.image_files import ImageReader, list_images
from visling.vision.images import read_header, read_image

_PICTURE_MEMORY = 4 << 30
"""Bytes for the largest picture that is decoded, of 179 million pixels: its channels, and a copy of them."""


def _encode(suffix: str, mode: str = "RGB", **settings: Any) -> bytes:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (13, 17, 3), np.uint8)).convert(mode)
    target = io.BytesIO()
    kinds = {"jpg": "jpeg", "tif": "tiff"}
    if settings.pop("frames", False):
        settings |= {"save_all": True, "append_images": [picture.rotate(90), picture.rotate(180)]}
    if settings.pop("turned", False):
        exif = Image.Exif()
        exif[0x0112] = 6
        settings["exif"] = exif
    picture.save(target, kinds.get(suffix, suffix), **settings)
    return target.getvalue()


def _writes(suffix: str, mode: str = "RGB", **settings: Any) -> Callable[[Path], None]:
    return lambda folder: save(folder / f"x.{suffix}", _encode(suffix, mode, **settings))


def _read(folder: Path) -> None:
    file = find_one(folder, "x.*")
    try:
        header = read_header(file)
    except ValueError:
        header = None
    pixels = read_image(file)
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.dtype == np.uint8
    assert header is not None


def _write_archive(folder: Path) -> None:
    with zipfile.ZipFile(folder / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", _encode("png"))
        archive.writestr("a/2.jpg", _encode("jpg"))


def _read_archive(folder: Path) -> None:
    listed = list_images([folder / "x.zip"])
    with ImageReader() as reader:
        for image in listed:
            pixels = reader.read(image).pixels
            assert pixels.shape[2] == 3


_FORMATS = tuple(
    Reader(f"images, {name}", write, _read, least_memory=_PICTURE_MEMORY)
    for name, write in {
        "JPEG": _writes("jpg", turned=True),
        "JPEG progressive": _writes("jpg", "L", progressive=True),
        "PNG": _writes("png"),
        "PNG palette": _writes("png", "P"),
        "PNG 16 bit": _writes("png", "I;16"),
        "GIF": _writes("gif", "P", frames=True),
        "BMP": _writes("bmp"),
        "TIFF": _writes("tif", turned=True),
        "TIFF deflated": _writes("tif", compression="tiff_deflate"),
        "WebP": _writes("webp"),
        "PPM": _writes("ppm"),
    }.items()
)
READERS = (
    *_FORMATS,
    Reader("images, in a zip archive", _write_archive, _read_archive, least_memory=_PICTURE_MEMORY),
)
