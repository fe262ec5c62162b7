"""What decoders raise when a file is damaged, by format, so that its reader can turn it into an error of the library.

These decoders were not written for damaged files: they index, convert and recurse until something gives way. A
`MemoryError` is in no list: readers look at the sizes that a file claims before they decode it.
"""

from __future__ import annotations

import json
import lzma
import pickle
import struct
import tarfile
import zipfile
import zlib
from typing import Any

_OF_ALL = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, EOFError, OSError, RecursionError,
    AssertionError, struct.error,
)  # fmt: skip
"""Of decoders written in Python; text that is not UTF-8 is a `ValueError`."""

PACKED = (zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError)
"""Of a compressed stream, or one that is encrypted."""

ZIP = (*_OF_ALL, *PACKED, zipfile.BadZipFile)
TAR = (*_OF_ALL, *PACKED, tarfile.TarError)
PICKLE = (*_OF_ALL, pickle.UnpicklingError)
TORCH = (*_OF_ALL, *PACKED, pickle.UnpicklingError, zipfile.BadZipFile)
"""Of torch's weights-only loading: its decoder of pickles is written in Python, its readers of archives raise
`RuntimeError`."""

LAYOUT = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)
"""Of code that takes apart what a file holds, when that is of another layout."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or nested too deeply, or a number in it has thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def describe_layout(error: Exception) -> str:
    """What an error of `LAYOUT` says of the file."""
    if isinstance(error, KeyError):
        return f"lacks the field {error}"
    return f"holds a value of another kind than expected ({error})"
