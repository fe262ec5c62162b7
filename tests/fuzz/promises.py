"""What readers promise of the values that they return: the types of records, the shapes of regions and weights."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from visling.regions.formats.base import RegionReader
from visling.types import RegionArray


def check_records(records: Iterable[Any]) -> None:
    """Every field of every record has its declared type."""
    for record in records:
        check(record)


def check(value: Any) -> None:
    """The fields of a dataclass have their declared types, those of dataclasses within it too."""
    for name, hint in _read_hints(type(value)).items():
        found = getattr(value, name)
        assert _conforms(found, hint), f"{type(value).__name__}.{name} is {found!r:.80}; promised {hint}"


@cache
def _read_hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if not field.name.startswith("_")}


def _conforms(value: Any, hint: Any) -> bool:
    """Whether a value is of a declared type. What is declared as anything is."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if hint is None or hint is types.NoneType:
        return value is None
    if origin in (types.UnionType, typing.Union):
        return any(_conforms(value, one) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is ...:
            return all(_conforms(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_conforms, value, arguments))
    if origin is np.ndarray:
        kinds = typing.get_args(arguments[-1])
        return isinstance(value, np.ndarray) and (not kinds or kinds[0] is Any or value.dtype == np.dtype(kinds[0]))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _conforms(key, arguments[0]) and _conforms(item, arguments[1]) for key, item in value.items()
        )
    if isinstance(origin, type) and issubclass(origin, Collection):
        return (
            isinstance(value, origin)
            and not isinstance(value, str)
            and all(_conforms(item, arguments[0]) for item in value)
        )
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(value, hint):
        return False
    if dataclasses.is_dataclass(hint):
        check(value)
    return True


def check_regions(regions: RegionArray, width: int | None = None) -> None:
    """Arrays of one image with as many rows as it has regions, numbers all of them."""
    count = len(regions)
    assert regions.features.ndim == 2
    assert width in (None, regions.features.shape[1]), f"features {regions.features.shape}, promised width {width}"
    assert regions.boxes.shape == (count, 4), f"boxes {regions.boxes.shape} of {count} regions"
    assert [type(side) for side in regions.size] == [int, int], f"size {regions.size!r}"
    for field in dataclasses.fields(regions):
        value = getattr(regions, field.name)
        if field.name != "size" and value is not None:
            assert isinstance(value, np.ndarray)
            assert value.dtype.kind in "fiu", f"{field.name} of {value.dtype}"
            assert len(value) == count, f"{field.name} {value.shape} of {count} regions"


def check_reader(reader: RegionReader) -> None:
    """Reads all images of a file of region features."""
    assert isinstance(reader.fingerprint, str)
    for image in reader.images():
        assert isinstance(image.image_id, str)
        assert image.regions is not None
        check_regions(image.regions, reader.feature_size)


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Names and tensors whose numbers are all there."""
    assert tensors
    for name, tensor in tensors.items():
        assert isinstance(name, str)
        assert isinstance(tensor, Tensor)
        assert tensor.device.type == "cpu"
        tensor.clone()


def check_texts(values: Sequence[Any]) -> None:
    """Texts, all of them."""
    assert all(isinstance(value, str) for value in values), f"{values!r:.80}; promised texts"


def find_one(folder: Path, pattern: str) -> Path:
    """The file of a sample."""
    (file,) = folder.glob(pattern)
    return file
