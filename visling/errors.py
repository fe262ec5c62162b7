"""What can go wrong for a user, one class per kind. All are `ValueError`s; each message says what was wrong, what was
found, what is expected, and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VislingError(ValueError):
    """Base of every error that a user of this library can fix."""


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


def nearest(wrong: str, valid: Iterable[str]) -> str:
    """Sentence that names the valid key closest to a wrong one, or lists them all when none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Valid: {', '.join(names) if names else '(none)'}."
