"""Quotas: rare families first, answers of a form balanced, and fewer candidates rather than unbalanced ones."""

from __future__ import annotations

from collections import Counter

from visling.runtime import generator_for
from visling.scenes.quotas import Candidate, Quotas


def make(family: str, answer: str, number: int = 0) -> Candidate:
    return Candidate(family=family, form=family, text=f"{family} {answer} {number}", answer=answer, choices=2)


def test_one_answer_is_not_chosen_far_beyond_its_part() -> None:
    quotas, given = Quotas(), Counter[str]()
    for number in range(200):
        options = [make("verify", "yes", k) for k in range(5)] + ([make("verify", "no")] if number % 4 == 0 else [])
        given.update(one.answer for one in quotas.choose(options, 2, generator_for(number)))
    assert given["no"] == 50
    assert 50 <= given["yes"] <= 60, given


def test_families_take_turns_and_the_number_is_kept() -> None:
    options = [make("verify", answer, k) for answer in ("yes", "no") for k in range(5)] + [make("count", "2")]
    chosen = Quotas().choose(options, 3, generator_for(0))
    assert len(chosen) == 3
    assert {one.family for one in chosen[:2]} == {"verify", "count"}
    assert Quotas().choose([], 3, generator_for(0)) == []
