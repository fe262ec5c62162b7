"""Members of a zip archive, one after another in constant memory.

The standard library's `zipfile` keeps half a kilobyte for every member: 1.8 GB for VL-BERT's archive of 3.3 million
images. Here the archive's directory is read from front to back, as often as it is needed.

Source  APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3 (sizes beyond 4 GB).
"""

from __future__ import annotations

import binascii
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from visling.errors import DataError

_END = struct.Struct("<4s4H2LH")
"""Signature, numbers of this disk and of the directory's, members on this disk and in all, length and start of the
directory, length of the comment."""
_LOCATOR = struct.Struct("<4sLQL")
"""Signature, disk, start of the end record of a large archive, disks."""
_LARGE_END = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
"""Signature, versions, flags, method, time, date, checksum, lengths in the archive and of the content, lengths of name,
extra fields and comment, disk, attributes, start of the member."""
_LOCAL = struct.Struct("<4s5H3L2H")
"""The same in front of a member, as far as the length of the extra fields."""

_ENCRYPTED, _UTF8 = 0x1, 0x800
"""Flags of a member."""
_STORED, _DEFLATED = 0, 8
"""Methods of compression that are read."""
_LARGE_FIELDS = 0x0001
"""Kind of the extra field with the sizes that do not fit into 32 bits."""
_TOO_LARGE = 0xFFFFFFFF
"""In place of such a size."""
_LARGEST_MEMBER = 1 << 28
"""Most bytes that one image may unpack to: a hundred times what the released ones have."""
_BUFFER = 1 << 20


class Member(NamedTuple):
    """An entry of an archive's directory."""

    name: str
    """With the folders in front of it, separated by "/"; a folder's own ends so."""
    flags: int
    method: int
    checksum: int
    packed: int
    """Bytes in the archive."""
    size: int
    """Bytes of the content."""
    start: int
    """Where in the archive the member's own header begins."""


def list_members(path: Path) -> Iterator[Member]:
    """Members in the order of the archive's directory.

    Raises:
        DataError: no zip archive, or one that is truncated or damaged.
    """
    with path.open("rb", buffering=_BUFFER) as file:
        start, count = _find_directory(path, file)
        file.seek(start)
        for _ in range(count):
            yield _read_entry(path, file)


def read_member(file: BinaryIO, member: Member) -> bytes:
    """Content of a member of an open archive.

    Raises:
        ValueError: encrypted, compressed by another method than deflate, too large for one image, truncated or damaged;
            the message begins with a verb.
    """
    if member.flags & _ENCRYPTED:
        raise ValueError("is encrypted; only archives without a password are read")
    if member.method not in (_STORED, _DEFLATED):
        raise ValueError(f"is compressed by method {member.method}; only stored (0) and deflated (8) members are read")
    if max(member.packed, member.size) > _LARGEST_MEMBER:
        raise ValueError(f"would unpack to {member.size} bytes; an image has at most {_LARGEST_MEMBER}")
    file.seek(member.start)
    header = file.read(_LOCAL.size)
    if len(header) != _LOCAL.size or not header.startswith(b"PK\x03\x04"):
        raise ValueError("is not where the archive's directory says")
    file.seek(sum(_LOCAL.unpack(header)[-2:]), 1)
    content = file.read(member.packed)
    if member.method == _DEFLATED:
        try:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, member.size + 1)
        except zlib.error as error:
            raise ValueError(f"cannot be unpacked ({error})") from error
    if len(content) != member.size or binascii.crc32(content) != member.checksum:
        raise ValueError("does not match its checksum")
    return content


def _find_directory(path: Path, file: BinaryIO) -> tuple[int, int]:
    """Start of the directory and number of its entries."""
    length = file.seek(0, 2)
    tail_start = max(0, length - _END.size - 0xFFFF)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise _damaged_archive(path, "has no directory at its end")
    _, _, _, _, count, _, start, _ = _END.unpack_from(tail, at)
    locator = at - _LOCATOR.size
    if locator >= 0 and tail.startswith(b"PK\x06\x07", locator):
        file.seek(_LOCATOR.unpack_from(tail, locator)[2])
        record = file.read(_LARGE_END.size)
        if len(record) != _LARGE_END.size or not record.startswith(b"PK\x06\x06"):
            raise _damaged_archive(path, "has no directory where its end says")
        *_, count, _, start = _LARGE_END.unpack(record)
    return int(start), int(count)


def _read_entry(path: Path, file: BinaryIO) -> Member:
    header = file.read(_ENTRY.size)
    if len(header) != _ENTRY.size or not header.startswith(b"PK\x01\x02"):
        raise _damaged_archive(path, "has a damaged directory")
    _, _, _, flags, method, _, _, checksum, packed, size, *lengths, _, _, _, start = _ENTRY.unpack(header)
    raw_name, extra, _ = (file.read(length) for length in lengths)
    if _TOO_LARGE in (packed, size, start):
        size, packed, start = _read_large_fields(path, extra, size, packed, start)
    name = raw_name.decode("utf-8" if flags & _UTF8 else "cp437", "replace")
    return Member(name, flags, method, checksum, packed, size, start)


def _read_large_fields(path: Path, extra: bytes, *fields: int) -> list[int]:
    """The fields with those that did not fit replaced, which the extra field lists in the same order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == _LARGE_FIELDS and 8 * fields.count(_TOO_LARGE) <= min(length, len(extra) - at - 4):
            values = iter(struct.unpack_from(f"<{fields.count(_TOO_LARGE)}Q", extra, at + 4))
            return [next(values) if field == _TOO_LARGE else field for field in fields]
        at += 4 + length
    raise _damaged_archive(path, "has a damaged directory")


def _damaged_archive(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}: the zip archive is truncated or damaged. Download it again.")
