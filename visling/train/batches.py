"""What the engine asks of a loader, and what it fetches from one."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from visling.errors import DataError
from visling.train.meter import Meter


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


class Fetched(NamedTuple):
    """A micro-batch."""

    pair: tuple[Any, Any]
    """Batch and targets."""
    before: dict[str, Any]
    """Position of the loader before it."""
    after: dict[str, Any]
    flops: float
    """Operations that its products need."""
    examples: list[int] | None
    """Numbers of its examples in their source; None = the loader does not tell."""


def fetch(batches: Batches, limit: int, meter: Meter) -> Iterator[Fetched]:
    """The next `limit` pairs of the epoch.

    Raises:
        DataError: there are fewer.
    """
    before = batches.state_dict()
    iterator = iter(batches)
    for number in range(limit):
        try:
            with meter.waiting():
                item = next(iterator)
        except StopIteration:
            raise DataError(
                f"the loader promised {limit} more batches in this epoch but gave {number}. "
                "Its length and its iteration disagree."
            ) from None
        after = batches.state_dict()
        if number == limit - 1 and isinstance(iterator, Generator):
            # The last batches may be dropped; the loader must release them before the next epoch is set
            iterator.close()
        numbers = getattr(batches, "numbers", None)  # as `Loader` has them
        yield Fetched(item, before, after, meter.count_products(item), None if numbers is None else numbers.tolist())
        before = after
