"""Pickled data (annotations, index tables, region features, numpy arrays of objects), read by a restricted reader:
built-in containers and numpy arrays alone, so that no file can execute code.

Such files were written by Python 2 or 3 and by numpy 1 or 2, in protocols 0 to 5; text may be bytes there.
"""

from __future__ import annotations

import collections
import io
import math
import mmap
import pickle
import re
import sys
import tokenize
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from visling import damage
from visling.errors import DataError
from visling.pickle_length import find_end


def _convert(kind: Callable[..., Any], *sources: type) -> Callable[..., Any]:
    """A constructor that only converts what a pickle holds: `bytearray(10**12)` and `list(range(10**12))` would fill
    the memory, `str` of a list of lists of lists too."""

    def convert(*arguments: Any) -> Any:
        if arguments and not isinstance(arguments[0], sources):
            raise pickle.UnpicklingError(f"it makes a {kind.__name__} of a {type(arguments[0]).__name__}")
        return kind(*arguments)

    return convert


_CONTAINERS = (list, tuple, dict, set, frozenset)
_TEXTS = (str, bytes, bytearray)
_BUILTINS: Mapping[str, Any] = {
    **{kind.__name__: kind for kind in (bool, complex, float, int, slice)},
    **{kind.__name__: _convert(kind, *_CONTAINERS) for kind in (dict, frozenset, list, set, tuple)},
    **{kind.__name__: _convert(kind, *_TEXTS) for kind in (bytearray, bytes)},
    "str": _convert(str, *_TEXTS, bool, int, float),
    "unicode": _convert(str, *_TEXTS, bool, int, float),
    "long": int,
    "object": object,
    "xrange": range,
}
"""Names of Python 2 and 3."""


_KINDS = re.compile(r"[<>|=]?(?:[biufc]\d{1,2}|[SU]\d{1,9}|O[48]?|\?)")
"""Types of numbers, texts and objects, as numpy writes them."""


class _Kind:
    """Type of an array. numpy's own takes a damaged state as it comes, and kills the process later."""

    def __init__(self, name: Any, *_: Any) -> None:
        if not isinstance(name, str) or not _KINDS.fullmatch(name):
            raise pickle.UnpicklingError(f"it holds an array of type {name!r:.40}, which no data file needs")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        _, order, *parts = state
        if any(part is not None for part in parts[:3]) or order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("it holds an array of structures, which no data file needs")
        self.dtype = self.dtype.newbyteorder(order)


def _read_kind(kind: Any) -> np.dtype[Any]:
    if not isinstance(kind, _Kind):
        raise pickle.UnpicklingError("it holds an array without a type")
    return kind.dtype


class _CheckedArray(np.ndarray[Any, Any]):
    """An array of a pickle, whose numbers must be there before there is room made for them."""

    def __new__(cls, *_: Any) -> _CheckedArray:
        raise pickle.UnpicklingError("it makes an array without numbers")

    def __setstate__(self, state: Any) -> None:
        version, shape, kind, order, content = state
        dtype = _read_kind(kind)
        held = len(content) if dtype.hasobject else len(content) // max(dtype.itemsize, 1)
        if math.prod(shape) > held:
            raise ValueError(f"it has an array of shape {shape} with {held} entries")
        super().__setstate__((version, shape, dtype, order, content))
        _check_characters(self)


def _check_characters(array: NDArray[Any]) -> None:
    """Refuse texts with characters that there are none of: numpy makes strings of them that break Python.

    Raises:
        ValueError: an array has one.
    """
    if array.dtype.kind == "U" and array.size and array.dtype.itemsize:
        codes = np.ascontiguousarray(array).reshape(-1).view(np.dtype("u4").newbyteorder(array.dtype.byteorder))
        if codes.max() > sys.maxunicode:
            raise ValueError("it holds texts with characters that do not exist")


def _begin_array(*_: Any) -> Any:
    """An empty array, which gets its shape and its numbers next."""
    return np._core.multiarray._reconstruct(_CheckedArray, (0,), b"b")  # type: ignore[attr-defined]


def _make_scalar(kind: Any, content: Any) -> Any:
    dtype = _read_kind(kind)
    if dtype.hasobject or not isinstance(content, bytes | str):
        raise pickle.UnpicklingError("it holds a number that is an object")
    return np._core.multiarray.scalar(dtype, content)  # type: ignore[attr-defined]


def _view_buffer(buffer: Any, kind: Any, shape: Any, order: Any) -> Any:
    return np._core.numeric._frombuffer(buffer, _read_kind(kind), shape, order)  # type: ignore[attr-defined]


_NUMPY = {
    ("numpy", "ndarray"): _CheckedArray,
    ("numpy", "dtype"): _Kind,
    ("numpy.core.multiarray", "_reconstruct"): _begin_array,
    ("numpy.core.numeric", "_frombuffer"): _view_buffer,
    ("numpy.core.multiarray", "scalar"): _make_scalar,
}


_LARGEST_MEMBER = 1 << 28
"""Most bytes that all arrays in a .npz file unpack to, or its own size, if that is more: a hundred times what the
released files of one image have."""


class _Refusal(pickle.UnpicklingError):
    """A pickle names what no data file needs: it could execute code."""


class _RestrictedUnpickler(pickle.Unpickler):
    """Resolves nothing but the names above and those of `names`."""

    def __init__(
        self,
        file: BinaryIO,
        encoding: str,
        names: Mapping[tuple[str, str], Any],
        load_persistent: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(file, encoding=encoding)
        self._names = names
        self._load_persistent = load_persistent

    def find_class(self, module: str, name: str) -> Any:
        """The class or function of a name that a data file may use.

        Raises:
            UnpicklingError: any other name.
        """
        if (module, name) in self._names:
            return self._names[module, name]
        if module in ("builtins", "__builtin__") and name in _BUILTINS:
            return _BUILTINS[name]
        if (module, name) == ("collections", "OrderedDict"):
            return _make_ordered
        if (module, name) == ("_codecs", "encode"):
            return _encode
        numpy_name = (module.replace("numpy._core", "numpy.core"), name)
        if numpy_name in _NUMPY:
            return _NUMPY[numpy_name]
        raise _Refusal(f"it names {module}.{name}, which no data file needs")

    def persistent_load(self, pid: Any) -> Any:
        if self._load_persistent is None:
            raise pickle.UnpicklingError("it refers to data outside of itself")
        return self._load_persistent(pid)


_make_ordered = _convert(collections.OrderedDict, *_CONTAINERS)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Bytes that protocol 2 stores as text."""
    if encoding not in ("latin1", "latin-1", "iso8859-1"):
        raise pickle.UnpicklingError(f"it stores bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def read_pickle(path: Path, *, encoding: str = "latin1") -> Any:
    """Contents of a pickled annotation file.

    Args:
        encoding: of byte strings that Python 2 wrote; "bytes" leaves them as they are.
    Raises:
        DataError: the file is missing, damaged or truncated, or names a class that no data file needs: such a file
            could execute code and is refused.
    """
    with _open_file(path) as file:
        return load_pickle(file, str(path), encoding=encoding)


def load_pickle(
    file: BinaryIO | bytes,
    place: str,
    *,
    encoding: str = "latin1",
    names: Mapping[tuple[str, str], Any] | None = None,
    load_persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The next pickle of an open file, or one that lies in memory.

    Args:
        place: what it is part of, for messages.
        encoding: as in `read_pickle`.
        names: (module, name) -> what stands for it, for names that this kind of file needs in addition.
        load_persistent: what stands for an id of data that lies outside the pickle; None = such ids are refused.
    Raises:
        DataError: as `read_pickle`.
    """
    with _explain_damage(place, "is not read"):
        return decode(file, encoding, names, load_persistent)


def decode(
    file: BinaryIO | bytes,
    encoding: str = "latin1",
    names: Mapping[tuple[str, str], Any] | None = None,
    load_persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """As `load_pickle`, with the errors of the decoder.

    Raises:
        UnpicklingError, and others of `damage.PICKLE`.
    """
    content = cut_pickle(file)
    loaded = _RestrictedUnpickler(io.BytesIO(content), encoding, {} if names is None else names, load_persistent).load()
    return loaded.view(np.ndarray) if isinstance(loaded, _CheckedArray) else loaded


def cut_pickle(file: IO[bytes] | bytes) -> bytes:
    """The bytes of the next pickle, behind which an open file then stands.

    Raises:
        UnpicklingError: see `find_end`.
    """
    if isinstance(file, bytes):
        return file[: find_end(file)]
    start = file.tell()
    try:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # no file but a stream in memory; or an empty file
        content = file.read()
        end = find_end(content)
        file.seek(start + end)
        return content[:end]
    with whole:
        end = find_end(whole, start)
        file.seek(end)
        return whole[start:end]


def read_object_array(path: Path) -> list[Any]:
    """Entries of a one-dimensional numpy array of objects (an imdb file of Pythia and MMF: its first one is a header).

    Raises:
        DataError: as `read_pickle`; or not such an array.
    """
    array = read_array(path)
    if array.ndim != 1:
        raise DataError(f"{path} holds an array of shape {array.shape}; expected a list of entries. Download it again.")
    return list(array)


def read_array(path: Path) -> NDArray[Any]:
    """The array of a .npy file; objects are decoded by the restricted reader.

    Raises:
        DataError: as `read_pickle`; or not an array.
    """
    with _open_file(path) as file:
        return _load_array(file, str(path))


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a .npz file by name; objects are decoded by the restricted reader.

    Raises:
        DataError: as `read_pickle`; or not a file of arrays.
    """
    with _open_file(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                arrays = [member for member in archive.infolist() if member.filename.endswith(".npy")]
                most = max(_LARGEST_MEMBER, path.stat().st_size)
                for member in arrays:
                    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise ValueError(f"{member.filename} is compressed by method {member.compress_type}")
                    if member.file_size > most:
                        raise ValueError(f"{member.filename} unpacks to {member.file_size} bytes")
                if (size := sum(member.file_size for member in arrays)) > most:
                    raise ValueError(f"its arrays unpack to {size} bytes")
                contents = {member.filename: archive.read(member) for member in arrays}
        except damage.ZIP as error:
            raise DataError(f"{path} is not a file of arrays that can be read: {error}. Download it again.") from error
    return {
        name.removesuffix(".npy"): _load_array(io.BytesIO(content), f"{path}, {name}")
        for name, content in contents.items()
    }


def _load_array(file: BinaryIO, place: str) -> NDArray[Any]:
    """The array of an open .npy file."""
    with _explain_damage(place, "is not an array that can be read"):
        start = file.tell()
        size = file.seek(0, io.SEEK_END) - start
        file.seek(start)
        shape, dtype = _read_array_header(file, size)
        if dtype.hasobject:
            array = decode(file)
            if not isinstance(array, np.ndarray) or array.shape != shape:
                raise ValueError(f"its header says shape {shape}, its content is another")
            return array
        count = math.prod(shape)
        needed, there = count * dtype.itemsize, start + size - file.tell()
        if needed > there or (count > 0 and not dtype.itemsize):
            raise ValueError(f"its header says shape {shape} of {dtype}, {needed} bytes, of which it has {there}")
        file.seek(start)
        plain: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        _check_characters(plain)
        return plain


def _read_array_header(file: BinaryIO, size: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type that a .npy file of `size` bytes says it has."""
    version = np.lib.format.read_magic(file)
    if version == (2, 0):
        at = file.tell()
        if int.from_bytes(file.read(4), "little") > size:
            raise ValueError("its header is longer than the file")
        file.seek(at)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, _, dtype = read_header[version](file)
    except (SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"its header is damaged ({error})") from error
    return shape, dtype


@contextmanager
def _open_file(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"no file {path}. Check the path.") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error


@contextmanager
def _explain_damage(place: str, what: str) -> Iterator[None]:
    """Turn what decoding raises into a `DataError` that says where and why."""
    try:
        yield
    except _Refusal as error:
        raise DataError(
            f"{place} {what}: {error}. Such a file could execute code when it is unpickled, so it is refused; "
            "get it from its authors, and do not open it with other programs."
        ) from error
    except damage.PICKLE as error:
        raise DataError(f"{place} {what}: {str(error) or 'it is truncated'}. Download the file again.") from error
