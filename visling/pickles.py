"""Pickled data (annotations, index tables, region features, numpy arrays of objects), read by a restricted reader:
built-in containers and numpy arrays alone, so that no file can execute code.

Such files were written by Python 2 or 3 and by numpy 1 or 2, in protocols 0 to 5; text may be bytes there.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from visling.errors import DataError

_BUILTINS = frozenset({
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set", "slice", "str",
    "tuple",
})  # fmt: skip

_PYTHON2 = {"unicode": str, "long": int, "object": object, "xrange": range}

_NUMPY = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy.core.numeric", "_frombuffer"): np._core.numeric._frombuffer,  # type: ignore[attr-defined]
    ("numpy.core.multiarray", "scalar"): np._core.multiarray.scalar,  # type: ignore[attr-defined]
}


_LARGEST_MEMBER = 1 << 28
"""Most bytes of one array in a .npz file, which holds one image: a hundred times what the released ones have."""

_UNREADABLE = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    MemoryError,
)  # fmt: skip
"""What decoding of a damaged pickle or array raises."""


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
        if module in ("builtins", "__builtin__"):
            if name in _BUILTINS:
                return getattr(__import__("builtins"), name)
            if name in _PYTHON2:
                return _PYTHON2[name]
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
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
    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    with _explain_damage(place, "is not read"):
        return _RestrictedUnpickler(stream, encoding, names or {}, load_persistent).load()


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
                for member in arrays:
                    if member.file_size > _LARGEST_MEMBER:
                        raise ValueError(f"{member.filename} unpacks to {member.file_size} bytes")
                contents = {member.filename: archive.read(member) for member in arrays}
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            raise DataError(f"{path} is not a file of arrays that can be read: {error}. Download it again.") from error
    return {
        name.removesuffix(".npy"): _load_array(io.BytesIO(content), f"{path}, {name}")
        for name, content in contents.items()
    }


def _load_array(file: BinaryIO, place: str) -> NDArray[Any]:
    """The array of an open .npy file."""
    with _explain_damage(place, "is not an array that can be read"):
        start = file.tell()
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[version](file)
        if not dtype.hasobject:
            file.seek(start)
            plain: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
            return plain
        array = _RestrictedUnpickler(file, "latin1", {}, None).load()
        if not isinstance(array, np.ndarray) or array.shape != shape:
            raise ValueError(f"its header says shape {shape}, its content is another")
        return array


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
    except _UNREADABLE as error:
        raise DataError(f"{place} {what}: {str(error) or 'it is truncated'}. Download the file again.") from error
