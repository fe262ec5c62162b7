"""What the engine asks a run that does not know beforehand how many updates it will make."""

from __future__ import annotations

from typing import Protocol


class Pace(Protocol):
    """How far a run has come whose batches depend on its validations, so that neither the length of an epoch nor the
    number of updates is known beforehand. It is validated after every epoch."""

    @property
    def most(self) -> int:
        """Updates of the run, if there is no reason to make fewer."""
        ...

    @property
    def complete(self) -> bool:
        """Whether the last update of the run has been made."""
        ...

    def share(self, update: int) -> float:
        """Share of the run that has passed before update number `update` of this epoch; the schedule reads it."""
        ...

    def epoch(self, update: int) -> int:
        """Epoch, from 1, that the log shows when `update` updates of this epoch have been made."""
        ...

    def finish(self) -> None:
        """End the run, whatever was still to come: the next validation is the last, and of everything."""
        ...
