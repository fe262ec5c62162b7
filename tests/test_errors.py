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


def test_a_single_error_is_raised_as_it_is_and_none_not_at_all() -> None:
    errors.refuse([])
    error = errors.StoreError("one")
    with pytest.raises(errors.StoreError) as caught:
        errors.refuse([error, errors.StoreError("one")])
    assert caught.value is error


def test_several_errors_are_listed_once_each_and_share_their_kind_if_they_can() -> None:
    first, second, third = errors.DataError("a\nb"), errors.DataError("c"), errors.ConfigError("d")
    with pytest.raises(errors.DataError, match=r"^2 problems were found:\n- a\n  b\n- c$") as two:
        errors.refuse([first, second])
    with pytest.raises(errors.VislingError, match=r"^3 problems were found:\n- a\n  b\n- c\n- d$") as three:
        errors.refuse([two.value, third, second])
    assert type(three.value) is errors.VislingError
    assert three.value.several == (first, second, third)


def test_steps_that_do_not_depend_on_each_other_all_run() -> None:
    conflicts, done = errors.Conflicts(), []
    for number in range(3):
        with conflicts.collect():
            done.append(number)
            raise errors.ConfigError(f"step {number}")
    with pytest.raises(errors.ConfigError, match="3 problems"):
        conflicts.refuse()
    assert done == [0, 1, 2]
    with pytest.raises(KeyError), conflicts.collect():
        raise KeyError("not a user's error")
