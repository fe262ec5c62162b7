"""What can go wrong for a user, one class per kind. All are `ValueError`s; each message says what was wrong, what was
found, what is expected, and how to fix it."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class VislingError(ValueError):
    """Base of every error that a user of this library can fix."""

    several: tuple[VislingError, ...] = ()
    """The errors that this one lists, if it stands for several."""


class ConfigError(VislingError):
    """A setting that does not exist, has the wrong type, or contradicts another."""


class DataError(VislingError):
    """An annotation, image or answer file that is missing, truncated or not of its documented layout."""


class BoxError(VislingError):
    """Boxes that are not of the stated form (pixels instead of unit corners, negative area)."""


class StoreError(VislingError):
    """A region store that is incomplete, damaged, of another width, or lacks an image."""


class CheckpointError(VislingError):
    """Weights that cannot be read, do not cover the model, or belong to other features or answers."""


class RunError(VislingError):
    """A run folder that cannot be used: already taken, unfinished, or not writable."""


class LostProcessError(RunError):
    """Another process of this run has ended, or its machine is gone: this one is not to blame, and can only be started
    again together with it."""

    status = 75
    """Exit status of a command that ends with it, as of every failure that may pass (EX_TEMPFAIL)."""


def nearest(wrong: str, valid: Iterable[str], otherwise: str = "") -> str:
    """Sentence that names the valid key closest to a wrong one; when none is close, `otherwise`, or the list of all."""
    names = sorted(valid)
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    return otherwise or f"Valid: {', '.join(names) if names else '(none)'}."


def refuse(errors: Iterable[VislingError]) -> None:
    """Raise what independent checks found, all at once: a single error as it is, several as one that lists them, of
    their own kind if they share one.

    Raises:
        VislingError: there is an error.
    """
    found: dict[str, VislingError] = {}
    for error in errors:
        for one in error.several or (error,):
            found.setdefault(str(one), one)
    if not found:
        return
    if len(found) == 1:
        raise next(iter(found.values()))
    kinds = {type(error) for error in found.values()}
    kind = kinds.pop() if len(kinds) == 1 else VislingError
    listed = "".join("\n- " + message.replace("\n", "\n  ") for message in found)
    joined = kind(f"{len(found)} problems were found:{listed}")
    joined.several = tuple(found.values())
    raise joined


class Conflicts:
    """Errors of steps that do not depend on each other, to be raised together.

    Example:
        conflicts = Conflicts()
        with conflicts.collect():
            check_the_store()
        with conflicts.collect():
            check_the_annotations()
        conflicts.refuse()
    """

    def __init__(self) -> None:
        self.errors: list[VislingError] = []

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Remember an error of the block, which ends there, in place of raising it."""
        try:
            yield
        except VislingError as error:
            self.errors.append(error)

    def refuse(self) -> None:
        """Raise what was collected, see `refuse`."""
        refuse(self.errors)
