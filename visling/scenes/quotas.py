"""Chooses questions and statements so that the answers of a split come out even."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A question that could be asked, or a statement that could be made, about a scene."""

    family: str
    """Written as `question_type`."""
    form: str
    """Within a form answers are balanced: family and traits asked about."""
    text: str
    answer: str
    choices: int
    """Number of answers that this form has."""


class Quotas:
    """Chooses among candidates so that the families, forms and answers of a split are balanced."""

    def __init__(self, *, slack: float = 0.06) -> None:
        """
        Args:
            slack: share by which an answer may exceed its even part.
        """
        self.slack = slack
        self.families: Counter[str] = Counter()
        self.forms: Counter[str] = Counter()
        self.answers: Counter[tuple[str, str]] = Counter()
        self.seen: defaultdict[str, set[str]] = defaultdict(set)

    def choose(self, options: Sequence[Candidate], number: int, rng: np.random.Generator) -> list[Candidate]:
        """At most `number` of the candidates, rarest families first; fewer when the rest would unbalance the
        answers."""
        ties = rng.random(len(options))
        left = dict(enumerate(options))
        chosen: list[Candidate] = []
        used: Counter[str] = Counter()
        while left and len(chosen) < number:
            best = min(
                left,
                key=lambda i: (
                    used[left[i].family],
                    self.families[left[i].family],
                    self.answers[left[i].form, left[i].answer] * left[i].choices,
                    self.forms[left[i].form],
                    ties[i],
                ),
            )
            candidate = left.pop(best)
            if not self._has_room(candidate):
                continue
            used[candidate.family] += 1
            self.families[candidate.family] += 1
            self.forms[candidate.form] += 1
            self.answers[candidate.form, candidate.answer] += 1
            self.seen[candidate.form].add(candidate.answer)
            chosen.append(candidate)
        return chosen

    def _has_room(self, candidate: Candidate) -> bool:
        """Whether one more answer of this kind keeps its form balanced."""
        seen = self.seen[candidate.form] | {candidate.answer}
        even = (self.forms[candidate.form] + 1) / min(candidate.choices, max(2, len(seen)))
        return self.answers[candidate.form, candidate.answer] + 1 <= 2 + (1 + self.slack) * even
