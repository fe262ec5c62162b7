"""Every error is one a user can catch as ValueError, and suggestions name a key that exists."""

from __future__ import annotations

import inspect

import pytest

from visling import errors


def test_every_error_is_a_value_error() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, BaseException)]
    assert len(kinds) > 5
    assert all(issubclass(kind, errors.VislingError) and issubclass(kind, ValueError) for kind in kinds), kinds


@pytest.mark.parametrize(
    ("wrong", "valid", "expected"),
    [
        ("epoch", ["name", "epochs"], "Did you mean 'epochs'?"),
        ("zzz", ["name", "epochs"], "Valid: epochs, name."),
        ("zzz", [], "Valid: (none)."),
    ],
)
def test_nearest(wrong: str, valid: list[str], expected: str) -> None:
    assert errors.nearest(wrong, iter(valid)) == expected
