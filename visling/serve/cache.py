"""A cache that is bounded by bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByteCache(Generic[Value]):
    """Values by key; beyond a number of bytes those unused for longest are dropped. May be used by several threads."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._values: OrderedDict[str, tuple[Value, int]] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Sum over the values."""
        return self._held

    def get(self, key: str) -> Value | None:
        """The value, which counts as used; None if it is not held."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: str, value: Value, size: int) -> None:
        """Hold a value of so many bytes; one larger than the whole cache is not held."""
        with self._lock:
            if key in self._values:
                self._held -= self._values.pop(key)[1]
            if size > self.most_bytes:
                return
            self._values[key] = value, size
            self._held += size
            while self._held > self.most_bytes:
                _, (_, dropped) = self._values.popitem(last=False)
                self._held -= dropped
