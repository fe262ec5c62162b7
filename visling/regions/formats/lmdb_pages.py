"""The entries of an LMDB file, read page by page with every number checked.

LMDB's own library maps the file and follows the numbers in it: a damaged one kills the process (SIGBUS, SIGSEGV), which
no reader can catch. Reading needs little of it: two descriptions at the front, and a tree of pages.

Source  lmdb.h and mdb.c of LMDB 0.9 on 64-bit little-endian machines: MDB_meta, MDB_db, MDB_page, MDB_node.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_META = struct.Struct("<2I2Q")
"""Magic number, version, address, size of the map."""
_TREE = struct.Struct("<I2H5Q")
"""Page size (of the first tree), flags, depth, pages of three kinds, entries, root."""
_META_END = struct.Struct("<2Q")
"""Last page in use, number of the transaction."""
_PAGE = struct.Struct("<Q4H")
"""Own number, padding, flags, end of the list of nodes, begin of the nodes."""
_NODE = struct.Struct("<4H")
"""Length of the value, or number of the page below, in two or three parts; length of the key."""

_BRANCH, _LEAF, _OVERFLOW = 0x01, 0x02, 0x04
_IN_PAGES, _OTHER_NODES = 0x01, 0x06
"""Flags of a node: the value has pages of its own; it is a tree or one of several values."""
_NONE = (1 << 64) - 1
"""Root of an empty tree."""
_PAGE_SIZES = frozenset(1 << bits for bits in range(9, 17))
_DEEPEST = 32
_FIRST_PAGE = 2
"""Behind the two descriptions."""


class _Node(NamedTuple):
    key: bytes
    page: int
    """Of a branch: the page below. Of a leaf: the first page of the value, or 0."""
    length: int
    """Of the value."""
    value: bytes
    """Of a leaf, where it lies in the page."""


class LmdbPages:
    """An open file.

    Raises:
        ValueError: it is not LMDB, or damaged. All methods do, with what is wrong.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, 2)
        first = self._read_meta(0)
        if first is None:
            raise ValueError("it does not begin as an LMDB file does")
        page_size = first[0]
        second = self._read_meta(page_size)
        newest = max((meta for meta in (first, second) if meta is not None), key=lambda meta: meta[-1])
        self._page_size, self.entries, self._root, last, _ = newest
        self.needed = (last + 1) * self._page_size
        """Bytes of the whole file."""

    def _read_meta(self, at: int) -> tuple[int, int, int, int, int] | None:
        """Page size, entries, root, last page and transaction of the description at a byte; None if there is none."""
        self._file.seek(at + _PAGE.size)
        content = self._file.read(_META.size + 2 * _TREE.size + _META_END.size)
        if len(content) < _META.size + 2 * _TREE.size + _META_END.size:
            return None
        magic, version, *_ = _META.unpack_from(content)
        page_size, *_ = _TREE.unpack_from(content, _META.size)
        *_, entries, root = _TREE.unpack_from(content, _META.size + _TREE.size)
        last, transaction = _META_END.unpack_from(content, _META.size + 2 * _TREE.size)
        if (magic, version) != (_MAGIC, _VERSION) or page_size not in _PAGE_SIZES:
            return None
        return page_size, entries, root, last, transaction

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values in the order of the keys."""
        if self._root == _NONE:
            return
        read = 0
        above = [iter(self._read_nodes(self._root))]
        pages = 1
        while above:
            node = next(above[-1], None)
            if node is None:
                above.pop()
            elif node.page and not node.length:
                pages += 1
                if len(above) >= _DEEPEST or pages * self._page_size > self._size:
                    raise ValueError("its pages form a circle")
                above.append(iter(self._read_nodes(node.page)))
            else:
                read += node.length
                if read > self._size:
                    raise ValueError("two entries share a value")
                yield node.key, self._read_value(node)

    def __contains__(self, key: bytes) -> bool:
        page = self._root
        for _ in range(_DEEPEST):
            if page == _NONE:
                return False
            nodes = self._read_nodes(page)
            if not nodes or not nodes[0].page or nodes[0].length:
                return any(node.key == key for node in nodes)
            page = next((node.page for node in reversed(nodes[1:]) if node.key <= key), nodes[0].page)
        raise ValueError("its pages form a circle")

    def _read_page(self, number: int, size: int) -> bytes:
        at = number * self._page_size
        if number < _FIRST_PAGE or at + size > self._size:
            raise ValueError(f"it names page {number} of {self._size // self._page_size}")
        self._file.seek(at)
        return self._file.read(size)

    def _read_nodes(self, number: int) -> list[_Node]:
        """The nodes of a page of the tree."""
        page = self._read_page(number, self._page_size)
        own, _, flags, end, _ = _PAGE.unpack_from(page)
        is_leaf = flags & (_BRANCH | _LEAF | _OVERFLOW) == _LEAF
        if own != number or not (is_leaf or flags & (_BRANCH | _LEAF | _OVERFLOW) == _BRANCH):
            raise ValueError(f"page {number} is none of its tree")
        if not _PAGE.size <= end <= self._page_size or end % 2:
            raise ValueError(f"page {number} has a damaged list of entries")
        places = struct.unpack_from(f"<{(end - _PAGE.size) // 2}H", page, _PAGE.size)
        return [self._read_node(page, number, at, is_leaf=is_leaf) for at in places]

    def _read_node(self, page: bytes, number: int, at: int, *, is_leaf: bool) -> _Node:
        if at + _NODE.size > len(page):
            raise ValueError(f"page {number} has a damaged list of entries")
        low, high, flags, key_length = _NODE.unpack_from(page, at)
        start = at + _NODE.size + key_length
        key = page[at + _NODE.size : start]
        if not is_leaf:
            below = low | high << 16 | flags << 32
            if below < _FIRST_PAGE:
                raise ValueError(f"it names page {below}, which is none of its tree")
            return _Node(key, below, 0, b"")
        length, inside = low | high << 16, 8 if flags & _IN_PAGES else low | high << 16
        if flags & _OTHER_NODES or start + inside > len(page) or not length:
            raise ValueError(f"page {number} has a damaged entry")
        content = page[start : start + inside]
        return _Node(key, int.from_bytes(content, "little") if flags & _IN_PAGES else 0, length, content)

    def _read_value(self, node: _Node) -> bytes:
        if not node.page:
            return node.value
        content = self._read_page(node.page, _PAGE.size + node.length)
        own, _, flags, *_ = _PAGE.unpack_from(content)
        if own != node.page or flags & (_BRANCH | _LEAF | _OVERFLOW) != _OVERFLOW:
            raise ValueError(f"page {node.page} is no value")
        return content[_PAGE.size :]
