"""Records of tensorpack in MessagePack: lists or dictionaries of numbers, text and numpy arrays.

Source   tensorpack 0.9.4, the version that ViLBERT and VOLTA name, serialises by MessagePack with the extension of
         msgpack-numpy: an array is a map with `nd`, its type, its shape and its bytes. Later versions use pickles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from visling.errors import DataError


def decode_message(content: bytes, place: str) -> Any:
    """What a message holds; text is left as bytes.

    Args:
        place: what it is part of, for messages.
    Raises:
        DataError: the message is damaged or truncated, or holds an array of objects: these are pickles, which could
            execute code.
    """
    try:
        return msgpack.unpackb(content, raw=True, strict_map_key=False, object_hook=_decode_array)
    except (msgpack.UnpackException, ValueError, TypeError, KeyError, RecursionError) as error:
        why = str(error) or "it is truncated"
        raise DataError(f"{place} is not read as a record of tensorpack: {why}. Download the file again.") from error


def _decode_array(fields: Mapping[Any, Any]) -> Any:
    """The array or the number that a map stands for; another map as it is."""
    if b"nd" not in fields:
        return fields
    kind = fields[b"type"]
    if not isinstance(kind, bytes):
        raise ValueError("it holds an array of objects or of structures")
    dtype = np.dtype(kind.decode("ascii"))
    if dtype.hasobject or fields.get(b"kind"):
        raise ValueError("it holds an array of objects, which no data file needs")
    values = np.frombuffer(fields[b"data"], dtype)
    return values.reshape(fields[b"shape"]) if fields[b"nd"] else values[0]
