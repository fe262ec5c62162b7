"""Intervals, verdicts and numbers of seeds, against published tables and simulated seeds."""

from __future__ import annotations

import numpy as np
import pytest

from visling.recipes.claim_configs import Contrast
from visling.runs.verdicts import count_seeds, find_interval, join_verdicts, judge, spread, t_quantile

ABOVE = Contrast(weights={"with": 1, "without": -1}, size=2.0)
NOT_BELOW = Contrast(weights={"one": 1, "two": -1}, expected="not below", size=2.0)


@pytest.mark.parametrize(
    ("degrees", "probability", "value"),
    # Printed tables of Student's t
    [
        (1, 0.975, 12.706),
        (2, 0.975, 4.303),
        (3, 0.975, 3.182),
        (4, 0.975, 2.776),
        (5, 0.975, 2.571),
        (10, 0.975, 2.228),
        (30, 0.975, 2.042),
        (120, 0.975, 1.980),
        (4, 0.80, 0.941),
        (7, 0.80, 0.896),
    ],
)
def test_quantiles_are_those_of_the_tables(degrees: int, probability: float, value: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(value, abs=6e-4)


def test_an_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = [find_interval(list(rng.normal(3.0, 5.0, 5))) for _ in range(4000)]
    covered = [one is not None and one.low <= 3.0 <= one.high for one in intervals]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(
    ("contrast", "values", "verdict"),
    [
        (ABOVE, [3.0, 4.0, 5.0, 4.0], "agrees"),
        (ABOVE, [0.5, 0.6, 0.7], "agrees"),  # above 0, though less than would matter
        (ABOVE, [-3.0, -4.0, -5.0], "disagrees"),
        (ABOVE, [-0.1, 0.1, 0.0, 0.0], "disagrees"),  # a difference of 2 points is excluded
        (ABOVE, [-3.0, 8.0, 2.0], "undecided"),
        (NOT_BELOW, [-0.1, 0.1, 0.0, 0.0], "agrees"),
        (NOT_BELOW, [-5.0, -5.1, -4.9], "disagrees"),
        (NOT_BELOW, [-5.0, 3.0, 0.0], "undecided"),
    ],
)
def test_verdicts(contrast: Contrast, values: list[float], verdict: str) -> None:
    assert judge(contrast, values) == verdict


@pytest.mark.parametrize("values", [[], [9.0], [9.0, 9.1]])
def test_one_or_two_seeds_decide_nothing(values: list[float]) -> None:
    assert judge(ABOVE, values) == "undecided"


def test_a_claim_needs_all_its_contrasts_and_one_refutes_it() -> None:
    assert join_verdicts(["agrees", "agrees"]) == "agrees"
    assert join_verdicts(["agrees", "undecided"]) == "undecided"
    assert join_verdicts(["agrees", "undecided", "disagrees"]) == "disagrees"


def test_the_seeds_that_are_asked_for_decide_four_times_in_five() -> None:
    rng = np.random.default_rng(1)
    for deviation in (1.0, 2.5):
        seeds = count_seeds(deviation, 2.0)
        assert seeds is not None
        decided = [judge(ABOVE, list(rng.normal(2.0, deviation, seeds))) == "agrees" for _ in range(3000)]
        assert 0.78 < np.mean(decided) < 0.97  # few seeds come in whole numbers
    assert count_seeds(2.5, 2.0) == 15  # printed tables for a paired t test, effect 0.8: 15
    assert count_seeds(100.0, 0.5) is None


def test_the_spread_of_one_seed_is_unknown() -> None:
    assert spread({3: 1.5}) == {"mean": 1.5, "spread": None, "values": {"3": 1.5}}
