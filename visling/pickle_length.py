"""Where a pickle ends, found without decoding it, and that it does not ask for more memory than it has bytes.

Python's decoder allocates what a pickle asks for before it looks whether the pickle holds it: ten bytes may ask for a
string of terabytes, or for a place in the memo that needs tens of gigabytes. The operations are therefore walked
through first. A regular expression takes those of fixed and of short length, which are nearly all, in a fraction of the
time that decoding takes.

Source  pickletools.py of Python 3.13, protocols 0 to 5.
"""

from __future__ import annotations

import mmap
import pickle
import re
from functools import lru_cache

_LEAST_MEMO = 1 << 20
"""Places in the memo that any pickle may use; they take 16 MB."""

_LENGTHS = {
    b"T": 4, b"X": 4, b"B": 4, b"\x8b": 4, b"\x8d": 8, b"\x8e": 8, b"\x96": 8,
}  # fmt: skip
"""Operations with a text, bytes or number of any length -> bytes of the length in front of it."""

_STOP = b"."


def find_end(content: bytes | mmap.mmap, start: int = 0) -> int:
    """Where the pickle ends that begins at a byte.

    Raises:
        UnpicklingError: it is truncated, is no pickle, or asks for more than it holds.
    """
    size = len(content)
    walk = _compile(max((size - start).bit_length(), _LEAST_MEMO.bit_length()))
    at = start
    while True:
        found = walk.match(content, at)
        at = at if found is None else found.end()
        operation = content[at : at + 1]
        if operation == _STOP:
            return at + 1
        width = _LENGTHS.get(operation)
        if width is None:
            what = f"at byte {at - start} it is damaged or cut off" if operation else "it is truncated"
            raise pickle.UnpicklingError(what)
        length = int.from_bytes(content[at + 1 : at + 1 + width], "little")
        at += 1 + width
        if length > size - at:
            raise pickle.UnpicklingError(
                f"at byte {at - start} it asks for {length} bytes, but only {max(size - at, 0)} follow"
            )
        at += length


@lru_cache(maxsize=8)
def _compile(bits: int) -> re.Pattern[bytes]:
    """The operations that are walked through at once.

    Args:
        bits: of the largest place in the memo.
    """
    digits = len(str(1 << bits))
    low = b"." * (bits // 8)
    places = low + (b"[\\x00-" + re.escape(bytes([(1 << bits % 8) - 1])) + b"]" if bits % 8 else b"")
    zeros = b"\\x00" * (4 - -(-bits // 8))
    short = b"|".join(re.escape(bytes([length])) + b".{%d}" % length for length in range(256))
    medium = b"|".join(re.escape(bytes([length])) + b"\\x00{3}.{%d}" % length for length in range(256))
    return re.compile(
        b"(?>"
        rb"[(012NQRab)d}el\]ostu\x81\x85-\x89\x8f-\x91\x93\x94\x97\x98]"  # without argument
        rb"|[Khq\x80\x82]."
        rb"|[M\x83].."
        rb"|[Jj\x84].{4}"
        rb"|[G\x95].{8}"  # the decoder takes no more than there is of a frame
        + (b"|r" + places + zeros if bits < 32 else b"|r.{4}")
        + b"|p[0-9]{1,%d}\\n" % digits
        + rb"|[ILFSVPg][^\n]*\n"
        rb"|[ci][^\n]*\n[^\n]*\n"
        rb"|[UC\x8a\x8c](?:" + short + b")"
        rb"|[TXB\x8b](?:" + medium + b"))*+",
        re.DOTALL,
    )
