"""What the engine asks of a loader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol


class Batches(Protocol):
    """One epoch of (batch, targets) pairs after another; the same epoch number always gives the same pairs."""

    epoch: int
    """Setting it moves to the beginning of that epoch."""

    def __len__(self) -> int:
        """Pairs per epoch on this process; the same on all."""
        ...

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """The rest of the epoch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position after the last pair that was handed out, as JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move to a position; the next iteration begins there."""
        ...
