"""Regions of one image as rows of a store: checked, then in the store's types and widths.

Letters  R regions of an image, F feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from visling.errors import BoxError, StoreError
from visling.regions.files import Field
from visling.types import RegionArray

OPTIONAL = {
    "classes": "int16",
    "class_confidence": "float16",
    "attributes": "int16",
    "attribute_confidence": "float16",
    "probs": "float16",
}
"""Optional fields and the types they are stored in."""


def check_arrays(image_id: str, regions: RegionArray, *, feature_size: int, dtype: str) -> dict[str, NDArray[Any]]:
    """Arrays of one image by field, after checks of their shapes, boxes and numbers.

    Raises:
        StoreError: arrays that differ in width or length, or features that `dtype` cannot hold.
        BoxError: a box that is not pixel corners, or an image without size.
    """
    count = len(regions)
    if regions.features.shape != (count, feature_size):
        raise StoreError(f"features of image {image_id!r} must be (R, {feature_size}); found {regions.features.shape}.")
    if regions.boxes.shape != (count, 4):
        raise StoreError(
            f"boxes of image {image_id!r} must be ({count}, 4), one per feature row; found {regions.boxes.shape}."
        )
    _check_boxes(image_id, regions.boxes, regions.size)
    low, high = _measure(regions.features)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise StoreError(f"features of image {image_id!r} contain numbers that are not finite. Extract them again.")
    if dtype == "float16" and max(-low, high) > float(np.finfo(np.float16).max):
        raise StoreError(
            f"features of image {image_id!r} exceed the range of float16 (65504). "
            "Store them as float32 (--dtype float32)."
        )
    arrays: dict[str, NDArray[Any]] = {"features": regions.features, "boxes": regions.boxes}
    for name in OPTIONAL:
        array = getattr(regions, name)
        if array is None:
            continue
        if len(array) != count:
            raise StoreError(
                f"{name} of image {image_id!r} must have {count} rows, one per region; found {len(array)}."
            )
        if not np.isfinite(_measure(array)).all():
            raise StoreError(f"{name} of image {image_id!r} holds numbers that are not finite. Extract it again.")
        arrays[name] = array[:, None] if name.startswith("attribute") and array.ndim == 1 else array
    return arrays


def choose_fields(arrays: Mapping[str, NDArray[Any]], *, feature_size: int, dtype: str) -> dict[str, Field]:
    """Fields of a store whose first image with regions has these arrays."""
    fields = {"features": Field(dtype=dtype, width=feature_size), "boxes": Field(dtype="float32", width=4)}
    for name, stored in OPTIONAL.items():
        if name in arrays:
            fields[name] = Field(dtype=stored, width=max(arrays[name].shape[1], 1) if arrays[name].ndim == 2 else 0)
    return fields


def convert_arrays(
    image_id: str, arrays: Mapping[str, NDArray[Any]], count: int, fields: Mapping[str, Field]
) -> dict[str, NDArray[Any]]:
    """Arrays of `count` regions in the store's types; attributes are padded to its width.

    Raises:
        StoreError: other fields or widths than the store's.
    """
    if arrays.keys() != fields.keys():
        raise StoreError(
            f"image {image_id!r} has the fields {', '.join(sorted(arrays))}; this store holds "
            f"{', '.join(sorted(fields))}. All images of a store have the same fields."
        )
    converted = {}
    for name, field in fields.items():
        array = arrays[name]
        if name.startswith("attribute") and array.shape[1] < field.width:
            padding = np.full((count, field.width - array.shape[1]), -1 if name == "attributes" else 0, array.dtype)
            array = np.concatenate([array, padding], axis=1)
        if array.shape != field.shape(count):
            raise StoreError(f"{name} of image {image_id!r} must be {field.shape(count)}; found {array.shape}.")
        converted[name] = _convert(array, field.dtype)
    return converted


def _measure(array: NDArray[Any]) -> tuple[float, float]:
    """Lowest and highest number, 0 without any; one that is not finite shows in them."""
    return (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)


def _convert(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The array in another type, contiguous."""
    if dtype == "float16" and array.dtype == np.float32:
        # torch rounds as numpy does and takes a twentieth of the time; it accepts no read-only array.
        writable = array if array.flags.writeable else array.copy()
        halved: NDArray[Any] = torch.from_numpy(np.ascontiguousarray(writable)).half().numpy()
        return halved
    return np.ascontiguousarray(array, dtype=dtype)


def _check_boxes(image_id: str, boxes: NDArray[Any], size: tuple[int, int]) -> None:
    if min(size) <= 0:
        raise BoxError(
            f"image {image_id!r} must have a positive width and height in pixels; found {size[0]} x {size[1]}."
        )
    if not len(boxes):
        return
    if not np.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
        raise BoxError(
            f"boxes of image {image_id!r} must be finite corners x1, y1, x2, y2 with x2 >= x1 and y2 >= y1. "
            "Are they x, y, width, height?"
        )
    # One box within the first pixel may be a poor detection; several are unit corners.
    if len(boxes) > 1 and boxes.max() <= 1.0 and min(size) > 2:
        raise BoxError(
            f"boxes of image {image_id!r} must be pixel corners; found maximum {boxes.max():.3f} in an image of "
            f"{size[0]} x {size[1]}. They look like unit corners: use boxes.to_pixels(boxes, size)."
        )
