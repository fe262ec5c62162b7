"""Image files -> RGB arrays, whatever their mode; arrays -> one padded batch.

Shapes   B images, H x W pixels.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from visling.errors import DataError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic"}
)
"""File name endings, lower case, that count as images when a folder is listed. Photos in HEIC cannot be read; they are
listed so that they are not passed over in silence."""

LARGE = 40_000_000
"""Pixels of an image beyond which only one is decoded at a time. Beyond 179 million Pillow refuses an image, unless
`PIL.Image.MAX_IMAGE_PIXELS` is raised."""


_HEIC = frozenset(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
"""Bytes 4 to 11 of photos in HEIC, the format of many telephones."""


@dataclass(frozen=True, slots=True)
class Picture:
    """What an image file shows."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    has_more: bool
    """Whether the file has further frames or pages, which are left out."""


@dataclass(frozen=True, slots=True)
class Header:
    """What an image file says of itself at its beginning."""

    format: str
    """As Pillow names it: "JPEG", "PNG"."""
    size: tuple[int, int]
    """Width and height in pixels, upright; as stored where the orientation may follow the pixels (PNG)."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) RGB pixels, upright by EXIF orientation; transparency is composited on white, 16 bit reduced to 8. Of
    an animation or of several pages the first one.

    Raises:
        DataError: the file is missing, empty, truncated, or not an image.
    """
    return decode_image(path).pixels


def decode_image(source: Path | BytesIO, name: str = "") -> Picture:
    """A file or its content as `read_image` returns it, and whether there is more in it; may be called by any thread.

    Args:
        name: what messages call it; the path by default.
    Raises:
        DataError: the file is missing, empty, truncated, or not an image.
    """
    try:
        with _QUIET, _open(source) as content, Image.open(content) as file, _wait_if_large(file.size):
            pixels = to_pixels(file)
            return Picture(pixels, _has_more(file))
    except FileNotFoundError as error:
        raise DataError(f"no image {source}. Check the folder and the file name.") from error
    except IsADirectoryError as error:
        raise DataError(f"{source} is a folder, not an image. Name the images in it.") from error
    except MemoryError:
        raise
    # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error, ... on damaged files
    except Exception as error:
        raise DataError(_explain_unreadable(name or str(source), source, error)) from error


def read_header(source: Path | BytesIO, name: str = "") -> Header:
    """Format and size of an image, of which nothing is decoded: to refuse what would not fit into memory.

    Args:
        name: what messages call it; the path by default.
    Raises:
        DataError: the file is missing or empty, or its beginning is not that of an image; or it states more pixels than
            Pillow accepts.
    """
    try:
        with _QUIET, _open(source) as content, Image.open(content) as file:
            width, height = file.size
            return Header(file.format or "", (height, width) if _lies_on_its_side(file) else (width, height))
    except FileNotFoundError as error:
        raise DataError(f"no image {source}. Check the folder and the file name.") from error
    except Exception as error:  # as in `decode_image`
        raise DataError(_explain_unreadable(name or str(source), source, error)) from error


def _open(source: Path | BytesIO) -> contextlib.AbstractContextManager[BinaryIO]:
    """Pillow is not given paths: it maps such files, and garbles uncompressed TIFF files that must be turned."""
    return source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source)


def read_open_image(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels of an open image, as `read_image` returns them; its file may be read only now.

    Raises:
        DataError: the file is damaged, or was closed.
    """
    try:
        return to_pixels(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, AssertionError, struct.error, ...
        reason = str(error) or "its file is closed"
        raise DataError(f"cannot read the open image {image!r}: {reason}. Open it again.") from error


def to_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels of an image that is already open, as `read_image` returns them."""
    return np.array(_convert_to_rgb(_turn_upright(image)))


class _Quiet:
    """Odd metadata and merely large images do not make the pixels unusable: Pillow's warnings are ignored while any
    thread reads an image. `warnings.catch_warnings` alone is not safe in several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._readers:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\b")
            self._readers += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if not self._readers:
                self._filters.__exit__(None, None, None)


_QUIET = _Quiet()
_ONE_LARGE = threading.Lock()


def _wait_if_large(size: tuple[int, int]) -> contextlib.AbstractContextManager[object]:
    """Context in which a large image is decoded: one at a time, however many threads there are."""
    return _ONE_LARGE if size[0] * size[1] > LARGE else contextlib.nullcontext()


def _has_more(file: Image.Image) -> bool:
    # The second picture of an MPO file is the same one for the other eye, or smaller.
    if file.format == "MPO":
        return False
    with contextlib.suppress(Exception):  # whatever is wrong behind the first frame
        return bool(getattr(file, "is_animated", False))
    return False


def _explain_unreadable(name: str, source: Path | BytesIO, error: Exception) -> str:
    size, beginning = 0, b""
    with contextlib.suppress(OSError), _open(source) as content:
        size = content.seek(0, os.SEEK_END)
        content.seek(0)
        beginning = content.read(12)
    mend = "Replace or remove the file."
    if not isinstance(error, UnidentifiedImageError):
        reason = str(error).rstrip(".") or type(error).__name__
    elif not size:
        reason = "it is empty"
    elif beginning[4:] in _HEIC:
        reason, mend = "it is a HEIC photo, which cannot be decoded here", "Save it as JPEG."
    else:
        reason = "it is not an image of a known format, or damaged at its beginning"
    return f"cannot read image {name} ({size:,} bytes): {reason}. {mend}"


def _turn_upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; as it is if its EXIF data are damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error, OSError):
        return image


def _lies_on_its_side(file: Image.Image) -> bool:
    """Whether turning a file's picture upright exchanges width and height, as far as its beginning tells."""
    # TIFF files have their upright size already; of other formats Pillow decodes the picture to answer.
    if file.format not in ("JPEG", "MPO", "WEBP"):
        return False
    with contextlib.suppress(SyntaxError, ValueError, TypeError, KeyError, struct.error, OSError):
        return bool(file.getexif().get(ExifTags.Base.Orientation, 1) >= 5)
    return False


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        grey = _reduce_to_eight_bits(values, image.mode)
        if isinstance(hidden := image.info.get("transparency"), int):
            grey[values == hidden] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _reduce_to_eight_bits(values: NDArray[np.generic], mode: str) -> NDArray[np.uint8]:
    """Grey values of 16 bit, 32 bit or float files as 0 to 255; the range is guessed from the largest value where the
    mode leaves it open."""
    grey = np.nan_to_num(values.astype(np.float64))
    high = (
        65535.0
        if mode.startswith("I;16")
        else next((top for top in (1.0, 255.0, 65535.0) if grey.max(initial=0.0) <= top), grey.max())
    )
    return np.rint(grey.clip(0.0, high) * (255.0 / high)).astype(np.uint8)


def fitted_size(width: int, height: int, long_side: int) -> tuple[int, int]:
    """Width and height after scaling to the long side; no side falls below one pixel."""
    scale = long_side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def fit(image: NDArray[np.uint8], long_side: int) -> NDArray[np.uint8]:
    """The image scaled (bilinear with antialiasing) so that its longer side has `long_side` pixels; unchanged if it
    already has."""
    height, width = image.shape[:2]
    size = fitted_size(width, height, long_side)
    if size == (width, height):
        return image
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def to_batch(images: Sequence[NDArray[np.uint8]], multiple: int, device: torch.device) -> Tensor:
    """(B, 3, H, W) float32 in [-1, 1], channels-last, zero-padded on the right and below to multiples of `multiple`."""
    height = max(image.shape[0] for image in images)
    width = max(image.shape[1] for image in images)
    shape = (len(images), -(-height // multiple) * multiple, -(-width // multiple) * multiple, 3)
    same = all(image.shape == images[0].shape for image in images)
    if same and images[0].shape == shape[1:]:
        pixels = torch.from_numpy(np.stack(images)).to(device, non_blocking=True)
        return pixels.permute(0, 3, 1, 2).to(torch.float32).mul_(2 / 255).sub_(1)
    batch = torch.zeros(shape, device=device)
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = (
            torch.from_numpy(np.ascontiguousarray(image)).to(device, torch.float32).mul_(2 / 255).sub_(1)
        )
    return batch.permute(0, 3, 1, 2)
