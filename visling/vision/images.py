"""Image files -> RGB arrays, whatever their mode; arrays -> one padded batch.

Shapes   B images, H x W pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from visling.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""File name endings, lower case, that count as images when a folder is listed."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) RGB pixels, upright by EXIF orientation; transparency is composited on white, 16 bit reduced to 8.

    Raises:
        DataError: the file is missing, empty, truncated, or not an image.
    """
    try:
        with warnings.catch_warnings():
            # Odd metadata and merely large images do not make the pixels unusable; a decompression bomb still raises.
            warnings.simplefilter("ignore")
            with Image.open(path) as file:
                return to_pixels(file)
    except FileNotFoundError as error:
        raise DataError(f"no image {path}. Check the folder and the file name.") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder, not an image. Name the images in it.") from error
    except MemoryError:
        raise
    # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error, ... on damaged files
    except Exception as error:
        size = path.stat().st_size if path.is_file() else 0
        raise DataError(
            f"cannot read image {path} ({size:,} bytes): {error or type(error).__name__}. Replace or remove the file."
        ) from error


def to_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels of an image that is already open, as `read_image` returns them."""
    return np.array(_convert_to_rgb(ImageOps.exif_transpose(image)))


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_reduce_to_eight_bits(np.asarray(image), image.mode)).convert("RGB")
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
