"""The word pieces of a whole corpus, split once: a file keeps them, and all processes map it."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from visling import runtime
from visling.data.text import Tokenizer
from visling.data.text_arrays import Texts
from visling.errors import DataError

KEPT_FROM = 20_000
"""Texts from which on the pieces are kept in a file; fewer are split in less than a second."""

_MAGIC = b"visling texts 1\n"
_HEADER = np.dtype(
    [("magic", "S16"), ("key", "S32"), ("checksum", "u4"), ("width", "u4"), ("texts", "i8"), ("pieces", "i8")]
)
"""`width` is the size of a number in bytes, `checksum` the CRC-32 of all that follows the header."""


def split_texts(texts: Sequence[str], tokenizer: Tokenizer) -> Texts:
    """The word pieces of texts: from the file that an earlier run left in the cache folder (`runtime.home()`), or made
    now, on all cores, and left there for the next. Where nothing can be written they stay in memory.

    A damaged file is replaced, with a warning.
    """
    if len(texts) < KEPT_FROM:
        return _split(texts, tokenizer)
    key = _fingerprint(texts, tokenizer)
    file = runtime.home() / "texts" / f"{key}.bin"
    if file.exists():
        try:
            return _read(file, key)
        except DataError as error:
            warnings.warn(f"{error} It is made again.", stacklevel=2)
    made = _split(texts, tokenizer)
    with contextlib.suppress(OSError):  # a full disk or a folder of somebody else: the next run splits them again
        _write(file, key, made)
    return made


def _split(texts: Sequence[str], tokenizer: Tokenizer) -> Texts:
    ids, words, lengths = tokenizer.split(texts)
    width = np.int16 if max(tokenizer.size, int(words.max(initial=0))) <= np.iinfo(np.int16).max else np.int32
    return Texts(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), ids.astype(width), words.astype(width))


def _fingerprint(texts: Sequence[str], tokenizer: Tokenizer) -> str:
    """32 hexadecimal digits that depend on the texts and on what splits them."""
    digest = hashlib.blake2b(f"{_MAGIC!r} {tokenizer.fingerprint}".encode(), digest_size=16)
    for start in range(0, len(texts), 100_000):
        chunk = texts[start : start + 100_000]
        digest.update(np.array([len(text) for text in chunk], np.int64).data)
        digest.update("".join(chunk).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _write(file: Path, key: str, texts: Texts) -> None:
    """Write a file that is either complete or absent, whatever interrupts it and however many processes write it."""
    arrays = [np.ascontiguousarray(array).data for array in (texts.offsets, texts.ids, texts.words)]
    header = np.zeros((), _HEADER)
    header["magic"], header["key"], header["width"] = _MAGIC, key.encode(), texts.ids.itemsize
    header["texts"], header["pieces"] = len(texts.offsets) - 1, len(texts.ids)
    for array in arrays:
        header["checksum"] = zlib.crc32(array, int(header["checksum"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".texts-", delete=False) as part:
        try:
            part.write(header.tobytes())
            for array in arrays:
                part.write(array)
            part.close()
            Path(part.name).replace(file)
        except BaseException:
            part.close()
            Path(part.name).unlink(missing_ok=True)
            raise


def _read(file: Path, key: str) -> Texts:
    """The texts of a file, mapped.

    Raises:
        DataError: it cannot be read, is damaged, or holds something else.
    """
    try:
        content = np.memmap(file, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"the word pieces in {file} cannot be read ({error}).") from error
    if len(content) < _HEADER.itemsize:
        raise DataError(f"the word pieces in {file} are damaged: {len(content)} bytes hold no header.")
    header = content[: _HEADER.itemsize].view(_HEADER)[0]
    if header["magic"] != _MAGIC or header["key"] != key.encode():
        raise DataError(f"{file} holds no word pieces of these texts, or those of another version.")
    body = np.asarray(content[_HEADER.itemsize :])
    width, count, pieces = (int(header[name]) for name in ("width", "texts", "pieces"))
    sizes = (8 * (count + 1), width * pieces, width * pieces)
    if width not in (2, 4) or len(body) != sum(sizes) or zlib.crc32(body.data) != int(header["checksum"]):
        raise DataError(f"the word pieces in {file} are damaged: size or checksum is wrong.")
    offsets, ids, words = np.split(body, np.cumsum(sizes[:2]))
    dtype = np.dtype(f"i{width}")
    return Texts(offsets.view(np.int64), ids.view(dtype), words.view(dtype))
