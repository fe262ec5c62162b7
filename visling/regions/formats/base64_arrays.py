"""Arrays that text holds as base64 of little-endian numbers: in TSV, in JSON, in pickled TSV rows.

What cannot be decoded is a `ValueError` whose message begins with a verb: the reader puts file and place in front of it
(`base.damaged_file`).
"""

from __future__ import annotations

import binascii
from typing import Any

import numpy as np
from numpy.typing import NDArray


def decode_bytes(name: str, content: bytes | memoryview | str) -> bytes:
    """Content of a field.

    Raises:
        ValueError: not base64.
    """
    try:
        return binascii.a2b_base64(content, strict_mode=True)
    except ValueError as error:  # binascii.Error, or a character outside ASCII
        raise ValueError(f"has {name} that are not base64 ({error})") from error


def decode_array(name: str, content: bytes | memoryview | str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Array of a field; read-only.

    Raises:
        ValueError: not base64, or of another length.
    """
    decoded, expected = decode_bytes(name, content), int(np.prod(shape)) * np.dtype(dtype).itemsize
    if len(decoded) != expected:
        raise ValueError(
            f"holds {len(decoded)} bytes of {name}; expected {expected} "
            f"({' x '.join(map(str, shape))} of {np.dtype(dtype).name})"
        )
    return np.frombuffer(decoded, dtype).reshape(shape)


def measure_rows(name: str, content: bytes | memoryview | str, count: int) -> int:
    """Width of a field of float32 with one row for each of `count` > 0 regions.

    Raises:
        ValueError: not base64, or no whole width.
    """
    length = len(decode_bytes(name, content))
    width, rest = divmod(length, 4 * count)
    if rest or not width:
        raise ValueError(f"holds {length} bytes of {name} for {count} boxes, which is not a whole width")
    return width
