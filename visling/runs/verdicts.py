"""What seeds decide: intervals by Student's t over paired differences, verdicts, and how many seeds a difference needs.

The rule is fixed before anything is run. Letters  n seeds, d = n - 1 degrees of freedom.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from visling.recipes.claim_configs import FEWEST_SEEDS, Contrast

Verdict = Literal["agrees", "disagrees", "undecided"]

CONFIDENCE = 0.95
"""Of the intervals."""
POWER = 0.8
"""Probability with which the seeds that `count_seeds` asks for decide a true difference of the given size."""
MOST_SEEDS = 1000
"""Seeds beyond which counting ends: no budget has room for them."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Mean over seeds with its 95 % interval."""

    mean: float
    low: float
    high: float


def spread(values: Mapping[int, float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None below two values) and the value of every seed."""
    numbers = list(values.values())
    return {
        "mean": statistics.fmean(numbers) if numbers else None,
        "spread": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "values": {str(seed): value for seed, value in values.items()},
    }


def find_interval(values: Sequence[float]) -> Interval | None:
    """The 95 % interval of the mean; None below two values."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def judge(contrast: Contrast, values: Sequence[float]) -> Verdict:
    """The verdict on one contrast from its value in each seed.

    "above": agrees if the interval lies above 0, otherwise disagrees if it lies below `size`: an effect as large as
    would matter is then excluded. "not below": agrees if the interval lies above -`size`, disagrees if it lies below.
    """
    interval = find_interval(values)
    if interval is None or len(values) < FEWEST_SEEDS:
        return "undecided"
    agrees_above, disagrees_below = (0.0, contrast.size) if contrast.expected == "above" else (-contrast.size,) * 2
    if interval.low > agrees_above:
        return "agrees"
    return "disagrees" if interval.high < disagrees_below else "undecided"


def join_verdicts(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on a claim: it agrees if all contrasts do, and disagrees if one does."""
    if "disagrees" in verdicts:
        return "disagrees"
    return "undecided" if "undecided" in verdicts else "agrees"


def count_seeds(deviation: float, size: float) -> int | None:
    """Seeds with which an interval excludes 0 with probability `POWER` if the true mean is `size`.

    Args:
        deviation: standard deviation over seeds, in the unit of `size`.
    Returns:
        At least `FEWEST_SEEDS`; None if `MOST_SEEDS` are not enough.
    Source:
        The smallest n with (t_d(0.975) + t_d(0.8)) x deviation / sqrt(n) <= size.
    """

    def are_enough(n: int) -> bool:
        factor = t_quantile((1 + CONFIDENCE) / 2, n - 1) + t_quantile(POWER, n - 1)
        return factor * deviation <= size * math.sqrt(n)

    counts = range(FEWEST_SEEDS, MOST_SEEDS + 1)
    first = bisect.bisect_left(counts, True, key=are_enough)  # more seeds than enough are enough
    return counts[first] if first < len(counts) else None


def t_quantile(probability: float, degrees: int) -> float:
    """The value below which Student's t lies with a probability of 0.5 or more, by bisection of `_t_probability`."""
    low, high = 0.0, 1.0
    while _t_probability(high, degrees) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_probability(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _t_probability(value: float, degrees: int) -> float:
    """P(T <= value) for value >= 0 and whole degrees of freedom, a finite sum.

    Source:
        Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(value, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2 == 1
    total = term = cosine if odd else 1.0
    for number in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * (number - 1) / number
        total += term
    if odd:
        within = 2 / math.pi * (angle + (sine * total if degrees > 1 else 0.0))
    else:
        within = sine * total
    return (1 + within) / 2
