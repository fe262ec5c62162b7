"""Three-valued truth: what is open to dispute stays so unless the rest decides; quantities and the words for them."""

from __future__ import annotations

import pytest

from visling.runtime import generator_for
from visling.scenes.panels.logic import (
    Quantity,
    Truth,
    all_true,
    any_true,
    both_true,
    common_truth,
    inflect_noun,
    negate,
    sample_quantity,
    say_there_is,
)

VALUES: tuple[Truth, ...] = (True, False, None)


def test_a_disputed_part_matters_only_if_the_rest_does_not_decide() -> None:
    assert [negate(truth) for truth in VALUES] == [False, True, None]
    for first in VALUES:
        for second in VALUES:
            pair = (first, second)
            assert both_true(*pair) is all_true(pair)
            assert all_true(pair) is (False if False in pair else None if None in pair else True)
            assert any_true(pair) is negate(all_true([negate(truth) for truth in pair]))
            assert common_truth(*pair) is (first if first is second else None)


@pytest.mark.parametrize(
    ("truths", "expected"),
    [((True, True), True), ((True, None), None), ((True, True, True), False), ((None, None), None), ((False,), False)],
)
def test_a_quantity_counts_what_is_certain_and_what_is_disputed(truths: tuple[Truth, ...], expected: Truth) -> None:
    two = Quantity(words="two", singular=False, holds=lambda number: number == 2)
    assert two.judge(truths) is expected


def test_sampled_quantities_agree_with_their_words() -> None:
    number = {"no": 0, "a": 1, "one": 1, "two": 2, "three": 3} | {str(n): n for n in range(1, 4)}
    for seed in range(300):
        quantity = sample_quantity(generator_for(seed), 3)
        how, _, last = quantity.words.rpartition(" ")
        said = number[last]
        least = {"": said, "exactly": said, "only": said, "at least": said, "atleast": said, "at most": 0}
        first = said + 1 if how == "more than" else least[how]
        assert quantity.holds(first), quantity.words
        assert first == 0 or not quantity.holds(first - 1), quantity.words
        assert quantity.holds(first + 5) is (how in ("at least", "atleast", "more than") or last == "a"), quantity.words


def test_nouns_and_verbs_agree_in_number() -> None:
    one = Quantity(words="a", singular=True, holds=bool)
    two = Quantity(words="two", singular=False, holds=bool)
    assert say_there_is(one, inflect_noun("box", True)) == "There is a box"
    assert say_there_is(two, inflect_noun("box", False)) == "There are two boxes"
    assert inflect_noun("tower", False) == "towers"
