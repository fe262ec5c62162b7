"""Ways to damage a file: bytes, numbers, and the structure that its kind has.

Every change comes of the generator that is passed in, so that a case is made again from its seed.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Draw = random.Random

SIZES = (0, 1, -1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1)
"""Numbers that overflow, or ask for terabytes."""
_NUMBER = re.compile(rb"\d+")
_WRITTEN = (b"", b"-1", b"0", b"1e309", b"NaN", b"-Infinity", b"99999999999999999999", b"9" * 5000, b"0x10", b"1.5")
_EDGE = 512
"""Bytes at the front and at the end of a file, where its header and its directory lie, that are hit more often."""


def damage(content: bytes, kind: str, draw: Draw) -> bytes:
    """A file's content, changed in one to three places.

    Args:
        kind: what the file is: one of `STRUCTURES`, or "bytes".
    """
    for number in range(draw.choice((1, 1, 1, 2, 3))):
        # Only what is whole is taken apart: a pickle that was changed may be harmful by now.
        if not number and kind in STRUCTURES and draw.random() < 0.6:
            try:
                content = STRUCTURES[kind](content, draw)
                continue
            except ValueError:  # a file of another kind in the sample of this one
                pass
        content = draw.choice(_BYTES)(content, draw)
    return content


def _place(content: bytes | bytearray, draw: Draw) -> int:
    """A place in the content, at its edges more often than in its middle."""
    where, last = draw.random(), max(len(content) - 1, 0)
    if where < 0.4:
        return draw.randint(0, min(last, _EDGE))
    return draw.randint(max(last - _EDGE, 0), last) if where < 0.6 else draw.randint(0, last)


def _flip_bits(content: bytes, draw: Draw) -> bytes:
    changed = bytearray(content or b"\0")
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[_place(changed, draw)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _set_bytes(content: bytes, draw: Draw) -> bytes:
    at, count = _place(content, draw), draw.choice((1, 2, 4, 16))
    return content[:at] + draw.randbytes(count) + content[at + count :]


def _truncate(content: bytes, draw: Draw) -> bytes:
    return content[: draw.randint(0, len(content))]


def _delete(content: bytes, draw: Draw) -> bytes:
    at = _place(content, draw)
    return content[:at] + content[at + draw.choice((1, 2, 7, 64, 1024)) :]


def _repeat(content: bytes, draw: Draw) -> bytes:
    at, size, into = _place(content, draw), draw.choice((1, 8, 100, 2000)), _place(content, draw)
    return content[:into] + content[at : at + size] * draw.choice((1, 1, 30)) + content[into:]


def _insert(content: bytes, draw: Draw) -> bytes:
    at = _place(content, draw)
    block = draw.choice((b"\0" * 64, b"\xff" * 8, draw.randbytes(32), b'"', b"[" * 100_000, b'{"a":' * 3000, b"\n"))
    return content[:at] + block + content[at:]


def _overwrite_number(content: bytes, draw: Draw) -> bytes:
    """A binary number of 1 to 8 bytes becomes another: as likely to be a size as anything else."""
    at, width = _place(content, draw), draw.choice((1, 2, 4, 4, 8, 8))
    number = draw.choice(SIZES) % (1 << (8 * width))
    return content[:at] + number.to_bytes(width, draw.choice(("little", "big"))) + content[at + width :]


def _rewrite_number(content: bytes, draw: Draw) -> bytes:
    """A number that is written in digits becomes another."""
    found = list(_NUMBER.finditer(content[:100_000]))
    if not found:
        return _overwrite_number(content, draw)
    one = draw.choice(found)
    other = draw.choice((*_WRITTEN, *(str(size).encode() for size in SIZES)))
    return content[: one.start()] + other + content[one.end() :]


_BYTES: tuple[Callable[[bytes, Draw], bytes], ...] = (
    _flip_bits, _set_bytes, _truncate, _delete, _repeat, _insert, _overwrite_number, _rewrite_number, _rewrite_number,
)  # fmt: skip


# Values: JSON, pickles, headers


def _deep(draw: Draw) -> Any:
    value: Any = []
    for _ in range(draw.choice((50, 400))):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value


_VALUES: tuple[Callable[[Draw], Any], ...] = (
    lambda draw: None,
    lambda draw: draw.random() < 0.5,
    lambda draw: draw.choice(SIZES),
    lambda draw: draw.choice((10**20, -(10**20), 10**400)),
    lambda draw: draw.choice((0.5, -1.5, 1e308, float("inf"), float("-inf"), float("nan"))),
    lambda draw: draw.choice(("", " ", "x", "0", "-1", "\0", "\ud800", "../../x", "/etc/passwd", "ä", "\u0661", "²")),
    lambda draw: "x" * draw.choice((100, 20_000)),
    lambda draw: draw.choice(([], {}, [None], {"a": 1}, [[]], [0, 0, 0, 0], [1.5, "x"])),
    _deep,
)


def _list_places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Container and key of everything in a value."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        pairs = list(inner.items()) if isinstance(inner, dict) else list(enumerate(inner))
        for key, child in pairs:
            yield inner, key
            if isinstance(child, dict | list):
                waiting.append(child)


def change_value(value: Any, draw: Draw) -> Any:
    """A structure of lists and dictionaries with one thing changed, in place where that is possible."""
    places = list(_list_places(value)) if isinstance(value, dict | list) else []
    if not places or draw.random() < 0.03:
        return draw.choice(_VALUES)(draw)
    inner, key = draw.choice(places)
    kind = draw.random()
    if kind < 0.45:
        inner[key] = draw.choice(_VALUES)(draw)
    elif kind < 0.65:
        del inner[key]
    elif kind < 0.75 and isinstance(inner, dict):
        inner[draw.choice((f"{key}x", "", str(key).upper()))] = inner.pop(key)
    elif kind < 0.85:
        if isinstance(inner, list):
            inner.insert(draw.randint(0, len(inner)), copy.deepcopy(inner[key]))
        else:
            inner[f"{key} "] = copy.deepcopy(inner[key])
    elif kind < 0.95:
        other, at = draw.choice(places)
        if other in (inner, inner[key]) or isinstance(other, dict) != isinstance(inner, dict):
            inner[key] = [inner[key]]
        else:
            inner[key], other[at] = copy.deepcopy(other[at]), copy.deepcopy(inner[key])
    else:
        inner[key] = inner[key][::-1] if isinstance(inner[key], str | list) else str(inner[key])
    return value


def replace_values(content: bytes, changes: list[tuple[int, Any]]) -> bytes:
    """JSON, or a line of JSON lines, with values replaced.

    Args:
        changes: number of the place that is changed, counted around, and what is put there.
    """
    try:
        value, rest = json.loads(content), b""
    except ValueError:
        first, _, rest = content.partition(b"\n")
        value = json.loads(first)
    for number, other in changes:
        places = list(_list_places(value)) if isinstance(value, dict | list) else []
        if places:
            inner, key = places[number % len(places)]
            inner[key] = other
    return json.dumps(value).encode() + b"\n" + rest


def _change_json(content: bytes, draw: Draw) -> bytes:
    text = json.dumps(change_value(json.loads(content), draw))
    if draw.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]  # every key twice
    return text.encode()


def _change_lines(content: bytes, draw: Draw) -> bytes:
    lines = content.split(b"\n")
    at = draw.randrange(len(lines))
    lines[at] = _change_json(lines[at], draw) if lines[at].strip() else b"null"
    return b"\n".join(lines)


MADE = Path("/tmp/visling-hostile-file-was-run")
"""A folder that would be there if code of a pickle was run."""


class _Harmful:
    """Would make a folder, or run a command that does, when Python's own reader unpickles it."""

    def __init__(self, draw: Draw) -> None:
        made = str(MADE)
        self.call = draw.choice(((os.mkdir, (made,)), (os.system, (f"mkdir {made}",)), (eval, (f"1 + len({made!r})",))))

    def __reduce__(self) -> Any:
        return self.call


_OBJECTS: tuple[Callable[[Draw], Any], ...] = (
    _Harmful,
    _Harmful,
    lambda draw: b"\xff\0",
    lambda draw: (1, "x"),
    lambda draw: {1, 2},
    lambda draw: np.zeros(draw.choice((0, 3, (2, 0), (2, 2)))),
    lambda draw: np.array([{"a": 1}, None], object),
    lambda draw: np.float32("nan"),
    lambda draw: np.int64(-7),
)
"""What pickles may hold in addition."""


def change_object(value: Any, draw: Draw) -> Any:
    """As `change_value`, for what is pickled."""
    places = list(_list_places(value)) if isinstance(value, dict | list) else []
    if places and draw.random() < 0.4:
        inner, key = draw.choice(places)
        inner[key] = draw.choice(_OBJECTS)(draw)
        return value
    return change_value(value, draw)


def _change_pickle(content: bytes, draw: Draw) -> bytes:
    return pickle.dumps(change_object(pickle.loads(content), draw), draw.randint(0, 5))


def _change_header(content: bytes, draw: Draw) -> bytes:
    """The header of a file in safetensors layout."""
    length = int.from_bytes(content[:8], "little")
    header = _change_json(content[8 : 8 + length], draw)
    header = header.ljust(length) if draw.random() < 0.7 else header
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _change_array(content: bytes, draw: Draw) -> bytes:
    """The header of a .npy file, or the objects in it."""
    if b"'|O'" in content[:200] and draw.random() < 0.8:
        loaded = np.load(io.BytesIO(content), allow_pickle=True)
        value = change_object(loaded.tolist(), draw)
        array: Any = np.empty((), object)
        array[()] = value
        if loaded.ndim and isinstance(value, list):
            array = np.empty(len(value), object)
            array[:] = value
        target = io.BytesIO()
        np.save(target, array, allow_pickle=True)
        return target.getvalue()
    length = 10 + int.from_bytes(content[8:10], "little")
    header = content[10:length]
    for old, new in draw.choice((
        ((rb"\(\d+", f"({draw.choice(SIZES)}".encode()),),
        ((rb"'[<|]\w+'", draw.choice((b"'<f8'", b"'|O'", b"'|V9'", b"'<U99999999'", b"'<M8[s]'", b"[('a','<f4')]"))),),
        ((rb"\(.*?\)", draw.choice((b"()", b"(1,)", b"(2**40,)", b"(99999999999,)", b"(1, -1)", b"(0, 9)", b"None"))),),
        ((rb"False", b"True"),),
    )):  # fmt: skip
        header = re.sub(old, new.replace(b"\\", b"\\\\"), header, count=1)
    return content[:8] + len(header).to_bytes(2, "little") + header + content[length:]


_NAMES = (
    "../../outside",
    "/tmp/visling-hostile-file-outside",
    "a/../../b",
    "C:\\x",
    "\\\\x",
    "",
    ".",
    "x" * 5000,
    "a\nb",
)


def _change_zip(content: bytes, draw: Draw) -> bytes:
    """A member of a zip archive: its content, its name, its number."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(member.filename, archive.read(member)) for member in archive.infolist()]
    at = draw.randrange(len(members))
    name, inner = members[at]
    what = draw.random()
    if what < 0.6:
        members[at] = name, damage(inner, guess_kind(name), draw)
    elif what < 0.75:
        members[at] = draw.choice((*_NAMES, f"x/{name}", name.upper())), inner
    elif what < 0.85:
        members.insert(at, (name, inner))
    elif what < 0.95:
        del members[at]
    else:
        members[at] = name, content  # the archive within itself
    target = io.BytesIO()
    method = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    with warnings.catch_warnings(), zipfile.ZipFile(target, "w", method) as archive:
        warnings.filterwarnings("ignore", message="Duplicate name")
        for name, inner in members:
            archive.writestr(zipfile.ZipInfo(name), inner, method)
    return target.getvalue()


def _change_tar(content: bytes, draw: Draw) -> bytes:
    """A member of a tar archive: its content, its name, or what kind of member it is."""
    packed = content.startswith(b"\x1f\x8b")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive.getmembers()]  # type: ignore[union-attr]
    at = draw.randrange(len(members))
    member, inner = members[at]
    what = draw.random()
    if what < 0.5:
        inner = damage(inner, guess_kind(member.name), draw)
    elif what < 0.7:
        member.name = draw.choice((*_NAMES, f"x/{member.name}"))
    elif what < 0.9:
        member.type = draw.choice(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
        )
        member.linkname = draw.choice(("/etc/passwd", "../../x", member.name))
    else:
        inner = content
    member.size = len(inner) if member.isreg() else 0
    members[at] = member, inner
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz" if packed else "w") as archive:
        for member, inner in members:
            archive.addfile(member, io.BytesIO(inner))
    return target.getvalue()


STRUCTURES: dict[str, Callable[[bytes, Draw], bytes]] = {
    "json": _change_json,
    "lines": _change_lines,
    "pickle": _change_pickle,
    "safetensors": _change_header,
    "array": _change_array,
    "zip": _change_zip,
    "tar": _change_tar,
}
"""Kind of a file -> what changes its structure."""

_KINDS = {
    ".json": "json", ".jsonl": "lines", ".jsonline": "lines", ".pkl": "pickle", ".p": "pickle",
    ".safetensors": "safetensors", ".npy": "array", ".npz": "zip", ".zip": "zip", ".tar": "tar", ".gz": "tar",
}  # fmt: skip


def guess_kind(name: str) -> str:
    """What a file of this name is."""
    # torch's pickle refers to data outside of itself.
    return "bytes" if name.endswith("data.pkl") else _KINDS.get(Path(name).suffix, "bytes")
