"""Pickled annotation files (lists of references, targets, index tables, numpy object arrays), read by a restricted
reader: built-in containers and numpy arrays alone, so that no file can execute code.

Such files were written by Python 2 or 3 and by numpy 1 or 2, in protocols 0 to 5; text may be bytes there.
"""

from __future__ import annotations

import collections
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

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


class _RestrictedUnpickler(pickle.Unpickler):
    """Resolves nothing but the names above."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function of a name that a data file may use.

        Raises:
            UnpicklingError: any other name.
        """
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
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no data file needs")


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
    try:
        with path.open("rb") as file:
            return _load(file, encoding)
    except FileNotFoundError as error:
        raise DataError(f"no file {path}. Check the path.") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise DataError(f"{path} is not read: {error or 'it is truncated'}. Download the file again.") from error


def read_object_array(path: Path) -> list[Any]:
    """Entries of a one-dimensional numpy array of objects (an imdb file of Pythia and MMF: its first one is a header).

    Raises:
        DataError: as `read_pickle`; or not such an array.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read_header[version](file)
            if not dtype.hasobject:
                return list(np.load(path, allow_pickle=False))
            entries = _load(io.BytesIO(file.read()), "latin1")
    except FileNotFoundError as error:
        raise DataError(f"no file {path}. Check the path.") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise DataError(
            f"{path} is not an array of objects that can be read: {error or 'it is truncated'}. Download it again."
        ) from error
    if len(shape) != 1 or len(entries) != shape[0]:
        raise DataError(f"{path} holds an array of shape {shape}; expected a list of entries. Download it again.")
    return list(entries)


def _load(file: Any, encoding: str) -> Any:
    return _RestrictedUnpickler(file, encoding=encoding).load()
